"""Failures of a run that the user can act on, with their exit codes, and `redact` for what is printed.

docs/errors.md lists every class and code. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ringweave.tokenizers.errors import EXIT_CONFIG, EXIT_HANG, EXIT_NONFINITE, EXIT_STORAGE, UserError

#: How many problems one message lists before it only counts the rest.
MAX_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a config: `where` is file:line or the override, `key` the dotted key."""

    where: str
    key: str
    message: str
    hint: str = ""

    def line(self) -> str:
        """`where: message (hint)` with empty parts left out."""
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text


class ConfigError(UserError):
    """An unknown key, a wrong type or an impossible combination of settings (exit 2)."""

    exit_code = EXIT_CONFIG

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        why: str = "",
        fix: str = "",
        problems: Sequence[Problem] = (),
    ) -> None:
        self.problems = tuple(problems)
        super().__init__(what, where=where, why=why, fix=fix)

    @classmethod
    def from_problems(cls, problems: Sequence[Problem], *, source: str) -> ConfigError:
        """One error for all `problems` of the config `source`; at least one is needed."""
        if len(problems) == 1:
            only = problems[0]
            return cls(
                only.message,
                where=only.where or source,
                fix=only.hint or _FIX.format(source=source),
                problems=problems,
            )
        shown = [f"  {i}. {p.line()}" for i, p in enumerate(problems[:MAX_PROBLEMS], 1)]
        if len(problems) > MAX_PROBLEMS:
            shown.append(f"  … and {len(problems) - MAX_PROBLEMS} more")
        return cls(
            "\n".join([f"{len(problems)} problems in the config", *shown]),
            where=source,
            fix=_FIX.format(source=source),
            problems=problems,
        )

    def as_dict(self) -> dict[str, object]:
        """The common form plus `problems`, a list of {where, key, message, hint}."""
        return {**super().as_dict(), "problems": [asdict(p) for p in self.problems]}


_FIX = "edit {source}; `ringweave config schema` lists every key with its type and default"


class NonFiniteError(UserError):
    """Loss or gradients were NaN or infinite for longer than allowed (exit 4)."""

    exit_code = EXIT_NONFINITE


class HangError(UserError):
    """A rank died, or did not answer within the timeout (exit 5)."""

    exit_code = EXIT_HANG


class PeerError(UserError):
    """Another rank failed, and this one ends because of it, with that rank's exit code."""

    def __init__(self, what: str, *, exit_code: int, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(what, where=where, why=why, fix=fix)
        self.exit_code = exit_code


class StorageError(UserError):
    """A checkpoint or run folder could not be written, or what is there cannot be read back (exit 6)."""

    exit_code = EXIT_STORAGE


HIDDEN = "[redacted]"
_USERINFO = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@?#'\"]+(?::[^/\s@?#'\"]*)?@")
# `\b` would not stop at `_`, so names are anchored on the separators that can stand before them.
_SECRET = re.compile(
    r"(?P<name>(?:^|(?<=[?&;\s,\"'{]))"
    r"(?:x-amz-[a-z-]+|x-goog-[a-z-]+|sig|signature|token|access_token|api_key|apikey|password|secret|se_sig)"
    r"\s*=\s*)(?P<value>[^&;\s,\"'}]+)",
    re.IGNORECASE,
)


def redact(value: Any) -> Any:
    """`value` with secrets in URLs replaced; walks dicts, lists and tuples, leaves other types alone.

    Hidden: `user:password@` and the values of `X-Amz-*`, `X-Goog-*`, `sig=`, `token=`, `password=` and alike.
    """
    if isinstance(value, str):
        value = _USERINFO.sub(rf"\g<scheme>{HIDDEN}@", value)
        return _SECRET.sub(rf"\g<name>{HIDDEN}", value)
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redact(item) for item in value)
    return value
