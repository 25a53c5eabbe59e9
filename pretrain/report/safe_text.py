"""How text from data gets into the page: secrets redacted, control characters replaced, HTML escaped."""

from __future__ import annotations

import html
import re
from typing import Any

_HIDDEN = "[redacted]"
_USERINFO = re.compile(r"(?<=://)[^/?#\s@\"'<>]+@(?=[^\s/])")
_QUERY = re.compile(
    r"(?i)([?&;](?:x-amz-[\w-]+|x-goog-[\w-]+|awsaccesskeyid|sig|signature|(?:[\w-]*_)?token|se|sp|skoid|"
    r"api[_-]?key|key|secret|password)=)[^&;\s\"'<>]+"
)
_NAMED = re.compile(
    r"(?i)(?<![\w.-])([\w.-]{0,80}?(?:password|passwd|secret|credentials?|api[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|private[_-]?key|token|authorization)[\"']?\s*[:=]\s*)((?:bearer\s+)?(?:\"[^\"]*\"|'[^']*'|[^\s,}\]]+))"
)
_PLAIN_TOKEN = re.compile(
    r"(?i)(?:next|bos|eos|pad|unk|mask|image|audio)_token|token[\"']?\s*[:=]\s*[\d.]{1,8}[km]?$"
)
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}"
    r"|xox[abp]-[\w-]{10,}|sk-[\w-]{20,})"
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def redact(value: str) -> str:
    """Hide credentials: userinfo and signed query parameters of URLs, values of secret-looking keys, known
    key shapes. Special tokens (`bos_token: <s>`), `next_token: 1.0`, booleans and nulls stay."""
    value = _USERINFO.sub(_HIDDEN + "@", value)
    value = _QUERY.sub(r"\1" + _HIDDEN, value)
    value = "\n".join(_NAMED.sub(_hide, line) for line in value.split("\n"))
    return _KNOWN.sub(_HIDDEN, value)


def _hide(match: re.Match[str]) -> str:
    plain = (
        match[2].lower() in ("null", "none", "~", "true", "false", "|", ">", '""', "''")
        or match[2][0] in "{["
    )
    return match[0] if plain or _PLAIN_TOKEN.search(match[0]) else match[1] + _HIDDEN


def text(value: Any) -> str:
    """Any value as safe HTML text: redacted, escaped, control and text-direction characters as U+FFFD."""
    plain = str(value).replace("\r\n", "\n")
    return html.escape(_CONTROL.sub("\ufffd", redact(plain)), quote=True)
