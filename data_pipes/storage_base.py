"""What every byte source is, the options of remote ones, the local file, and how addresses are shown.

The other modules of storage build on this one; users import from `storage.py`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from ringweave.tokenizers.errors import DataError

HIDDEN = "***"
_MIB = 1 << 20
_USERINFO = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_PAIR = re.compile(r"(?<![\w%.-])(?P<name>[\w%.-]{1,200})=(?P<value>[^&;#\s'\"<>,)}]+)")
_HEADER = re.compile(r"(?P<name>\b(?:authorization|x-amz-security-token)\b['\"]?\s*:\s*)[^\r\n'\"]+", re.I)
_SECRET = re.compile(
    r"^x-(?:amz|goog)-|sig$|signature|token|secret|passw|pwd|credential|apikey|accesskey|accessid|jwt"
    r"|(?:^|[-_.])(?:key|keyid|auth|authorization|policy|sas)(?:$|[-_.])",
    re.I,
)


def redact(url: object) -> str:
    """`url` (or a text with URLs in it) with `***` for what may be secret.

    Hidden: the user and password of an address, query values named X-Amz-*, X-Goog-*, sig, token, key, password
    and alike (percent-encoded names too), and Authorization headers.
    """

    def hide(match: re.Match[str]) -> str:
        name = match["name"]
        return f"{name}={HIDDEN}" if _SECRET.search(unquote(name)) else match[0]

    text = _USERINFO.sub(f"{HIDDEN}@", str(url))
    return _HEADER.sub(rf"\g<name>{HIDDEN}", _PAIR.sub(hide, text))


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """Limits and permissions of reads. Times are seconds, sizes bytes.

    timeout_s:     to connect, for an answer to begin, and between two pieces of it
    deadline_s:    for one read with all its retries
    min_rate:      bytes a second, measured over `timeout_s`; a slower answer counts as stalled
    retries:       failures in a row without one new byte before a read gives up
    backoff_s, backoff_cap_s: first pause after a failure, and the longest; each failure doubles it
    seed:          of the pauses' jitter
    allow_hosts:   hosts (`h`, `h:8080`, `*.h`) that redirects may lead to, whatever their address; when given,
                   redirects to other hosts are refused
    allow_private: redirects may lead to private and loopback addresses (link-local ones never, unless listed)
    allow_pipe:    `open_pipe` may run commands
    max_redirects: in a row, for one request
    max_skip:      bytes that may be read and dropped where a server ignores ranges
    s3_endpoint, s3_region, gs_endpoint: of stores that are not the usual ones (default: the environment's)
    anonymous:     s3 and gs without credentials, for public buckets
    """

    timeout_s: float = 20.0
    deadline_s: float = 300.0
    min_rate: float = 1024.0
    retries: int = 5
    backoff_s: float = 0.5
    backoff_cap_s: float = 30.0
    seed: int = 0
    allow_hosts: tuple[str, ...] = ()
    allow_private: bool = False
    allow_pipe: bool = False
    max_redirects: int = 5
    max_skip: int = 8 * _MIB
    s3_endpoint: str | None = None
    s3_region: str | None = None
    gs_endpoint: str | None = None
    anonymous: bool = False


@runtime_checkable
class ByteSource(Protocol):
    """Random access to the bytes of one object. Thread-safe, fork-safe, picklable; `str` shows no secrets."""

    url: str

    def size(self) -> int:
        """Bytes of the object. Raises DataError when it cannot be reached."""
        ...

    def version(self) -> str:
        """Changes when the bytes do: etag, else time of the last change, else size."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes at `offset`, or DataError."""
        ...

    def sibling(self, suffix: str) -> ByteSource:
        """The object whose name is this one's with `suffix` behind it, under the same options and cache."""
        ...

    def close(self) -> None:
        """Give back what is held; a later read takes it again."""
        ...


def check_range(offset: int, size: int) -> None:
    """Raises ValueError for a negative offset or size: a mistake of the caller, not of the data."""
    if offset < 0 or size < 0:
        raise ValueError(f"a range cannot begin at {offset} and hold {size} bytes")


def beyond(where: object, offset: int, size: int, total: int) -> DataError:
    """The error for a range that ends behind the object's end."""
    return DataError(
        "read past the end",
        where=f"{where} @{offset}",
        why=f"{size} bytes were asked for, the object holds {total} in all",
        fix="the object is shorter than its index says: copy it again, or index it again",
    )


class LocalFile:
    """A file by path. `pread`: no shared position, so threads and forked processes may share it."""

    def __init__(self, path: str | Path) -> None:
        """path: of the file, opened at the first use."""
        self.path = Path(path)
        self.url = str(path)
        # No lock: a process may be forked while a thread holds one. setdefault and pop are atomic.
        self._open_fd: dict[str, int] = {}

    def size(self) -> int:
        return self._stat().st_size

    def version(self) -> str:
        return str(self._stat().st_mtime_ns)

    def read(self, offset: int, size: int) -> bytes:
        check_range(offset, size)
        pieces: list[bytes] = []
        at, left = offset, size
        try:
            fd = self._open()
            while left:
                piece = os.pread(fd, left, at)
                if not piece:
                    raise beyond(self, offset, size, os.fstat(fd).st_size)
                pieces.append(piece)
                at, left = at + len(piece), left - len(piece)
        except OSError as error:
            raise self._error(error) from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def sibling(self, suffix: str) -> LocalFile:
        return LocalFile(f"{self.path}{suffix}")

    def close(self) -> None:
        fd = self._open_fd.pop("fd", -1)
        if fd >= 0:
            os.close(fd)

    def _open(self) -> int:
        fd = self._open_fd.get("fd", -1)
        if fd < 0:
            new = self._open_file()
            fd = self._open_fd.setdefault("fd", new)
            if fd != new:  # another thread was first
                os.close(new)
        return fd

    def _open_file(self) -> int:
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def _stat(self) -> os.stat_result:
        try:
            return os.fstat(self._open())
        except OSError as error:
            raise self._error(error) from None

    def _error(self, error: OSError) -> DataError:
        what = "missing file" if isinstance(error, FileNotFoundError) else "cannot read file"
        return DataError(what, where=str(self), why=str(error.strerror or error), fix="check the path")

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def __del__(self) -> None:
        if "_open_fd" in self.__dict__:
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        LocalFile.__init__(self, state["path"])


def with_suffix(url: str, suffix: str) -> str:
    """`suffix` behind the path of a URL, before its query (`?versionId=...`, a signature)."""
    path, mark, query = url.partition("?")
    return f"{path}{suffix}{mark}{query}"


def scheme_of(url: str) -> str:
    """The scheme in lower case, "" for a path."""
    return urlsplit(url).scheme.lower() if "://" in url else ""
