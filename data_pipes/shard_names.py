"""What a shard may be called: paths, addresses, sources; what of that is shown, stored, and sent to workers.

An address may hold secrets (a signed URL, a password). `address_of` gives it whole, for those who open the shard;
everything that people or files get to see is `shown`, or the name alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from ringweave.data_pipes.compression import codec_of_shard
from ringweave.data_pipes.storage import ByteSource, LocalFile, redact
from ringweave.data_pipes.storage_base import scheme_of
from ringweave.tokenizers.errors import DataError

#: A shard: a file, the address of an object in a store, or an open source of its bytes.
Shard = Path | str | ByteSource
#: Begins the address of a command's output, `command:{"name": ..., "argv": [...]}`. Only `Store.command` makes such
#: addresses, out of the user's own config; no text in a list of shards is ever taken for one.
COMMAND = "command:"
_LONGEST = 120


def local_path(shard: Shard) -> Path | None:
    """The path of a plain tar on a disk; None for what lies in a store, is packed, or comes from a command."""
    if isinstance(shard, LocalFile):
        path = shard.path
    elif isinstance(shard, Path):
        path = shard
    elif isinstance(shard, str) and scheme_of(shard) == "file":
        path = Path(unquote(urlsplit(shard).path))
    elif isinstance(shard, str) and "://" not in shard and not shard.startswith(COMMAND):
        path = Path(shard)
    else:
        return None
    return None if codec_of_shard(path.name) else path


def is_remote(shard: Shard) -> bool:
    """Whether nothing can be kept beside a shard: it lies in a store, is packed, or comes from a command."""
    return local_path(shard) is None


def address_of(shard: Shard) -> str:
    """The whole address, secrets included: what a worker needs to open the shard, and nobody else.

    Raises DataError for a text that poses as a command.
    """
    if isinstance(shard, Path | str):
        if isinstance(shard, str) and shard.lower().startswith((COMMAND, "pipe:")):
            fix = "give the command as a list (`pipe: [curl, -sf, ...]`) and `allow_pipe: true` in your own config"
            raise DataError("a command is not an address", where=shown(shard), fix=fix)
        return str(shard)
    return str(getattr(shard, "address", shard.url))


def shown(shard: Shard) -> str:
    """How messages and metadata name a shard: a path as it is, an address without its secrets."""
    if isinstance(shard, Path):
        return str(shard)
    if isinstance(shard, str) and shard.startswith(COMMAND):
        try:
            return shown_command(*parse_command(shard))
        except DataError:
            return COMMAND
    return redact(shard)


def shard_name(shard: Shard) -> str:
    """The last part of a shard's path or address, without its query: tells shards of a source apart."""
    known = getattr(shard, "name", None) if not isinstance(shard, Path | str) else None
    return str(known) if known else name_of(address_of(shard))


def name_of(address: str) -> str:
    """`a.tar` of `data/a.tar`, `https://h/x/a.tar?sig=...` and `s3://bucket/x/a.tar?versionId=...`."""
    if address.startswith(COMMAND):
        return parse_command(address)[0]
    path = address
    if "://" in address:  # without the host, which may have a password in front
        path = address.partition("://")[2].partition("?")[0].rstrip("/").partition("/")[2] or "shard"
    return path.rstrip("/").rpartition("/")[2][-_LONGEST:]


def stem_of(name: str) -> str:
    """A name without `.tar`, `.tar.gz`, `.tgz` or `.tar.zst`."""
    for ending in (".tar", ".tar.gz", ".tgz", ".tar.zst"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def command_address(name: str, argv: Sequence[str]) -> str:
    """The address of what a command writes."""
    return COMMAND + json.dumps({"name": name, "argv": list(argv)})


def parse_command(address: str) -> tuple[str, list[str]]:
    """(name, arguments) of such an address. Raises DataError for a malformed one."""
    try:
        raw = json.loads(address.removeprefix(COMMAND))
        name, argv = raw["name"], raw["argv"]
        if not (isinstance(name, str) and isinstance(argv, list) and all(isinstance(a, str) for a in argv)):
            raise TypeError("it must hold a name and a list of texts")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError("malformed command", why=f"{type(error).__name__}: {redact(error)}") from None
    return name, argv


def shown_command(name: str, argv: Sequence[str]) -> str:
    """A command's output in messages: arguments may be secret, so only the program is named."""
    return f"{name} (from {Path(argv[0]).name if argv else 'no command'})"


def join_address(base: str | Path, name: str) -> str | Path:
    """`name` in the folder `base`, which may be an address; a whole address or an absolute path stays as it is.

    The query of an http base (a signature for the folder) is that of every name in it: `https://h/d?sig=x` and `a.tar`
    make `https://h/d/a.tar?sig=x`.
    """
    if "://" in name:
        return name
    text = str(base)
    if isinstance(base, Path) or "://" not in text:
        return Path(base) / name
    if name.startswith("/"):
        return Path(name)
    scheme = scheme_of(text)
    if scheme == "file":
        return Path(unquote(urlsplit(text).path)) / name
    if scheme not in ("http", "https"):  # keys are taken letter for letter
        return f"{text.rstrip('/')}/{name}"
    parts = urlsplit(text)
    path, _, query = name.partition("?")
    query = "&".join(q for q in (query, parts.query) if q)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{path}", query, ""))
