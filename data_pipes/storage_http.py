"""Reads by range over http: checked, retried, resumed at the byte that was reached, and of one version only.

The first answer pins size, etag and time of change; later requests carry `If-Match`, and every answer is compared.
Bytes are counted as they arrive, so after a cut the next request asks for the rest: none is lost or given twice.
"""

from __future__ import annotations

import hashlib
import io
import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import NoReturn, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

import urllib3
from urllib3.exceptions import HTTPError, SSLError

from ringweave.data_pipes.storage_base import StorageOptions, beyond, check_range, redact, with_suffix
from ringweave.data_pipes.storage_net import finish, pieces_of, transport_for
from ringweave.tokenizers.errors import DataError

_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)\Z")
_CODE = re.compile(rb"<Code>(\w{1,60})</Code>")
#: Answers of an overloaded or restarting server. All other 4xx will be the same next time.
_AGAIN = (408, 425, 429)
_NEXT = {
    401: "give credentials in the environment (see docs/data_storage.md), never in the address",
    403: "check the permissions, and whether a signed address has expired",
    404: "check the name",
    410: "check the name",
}
#: Seconds for which the end of a redirect is asked directly.
_TARGET_S = 60.0


class Locator(Protocol):
    """What to ask for an object: changes while signatures expire."""

    url: str

    def __init__(self, url: str, options: StorageOptions) -> None: ...

    def request(self, *, fresh: bool) -> tuple[str, dict[str, str]]:
        """(URL, headers). fresh: the last ones were turned down. Raises DataError without credentials."""
        ...

    def learn(self, answer: urllib3.BaseHTTPResponse) -> bool:
        """Whether this failed answer taught where to ask instead."""
        ...

    def sibling(self, suffix: str) -> Locator:
        """For the object with `suffix` behind the name."""
        ...


class PlainLocator:
    """A web address; a user and password in it become an Authorization header."""

    def __init__(self, url: str, options: StorageOptions) -> None:
        self.url, self.options = url, options

    def request(self, *, fresh: bool) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.url)
        userinfo, at, host = parts.netloc.rpartition("@")
        url = urlunsplit((parts.scheme.lower(), host, parts.path, parts.query, ""))
        if not at:
            return url, {}
        return url, dict(urllib3.make_headers(basic_auth=unquote(userinfo)))

    def learn(self, answer: urllib3.BaseHTTPResponse) -> bool:
        return False

    def sibling(self, suffix: str) -> PlainLocator:
        return type(self)(with_suffix(self.url, suffix), self.options)


@dataclass(frozen=True, slots=True)
class _Pin:
    """The version that a source reads."""

    size: int
    etag: str
    modified: str

    def differs(self, other: _Pin) -> str:
        """How the object changed, "" if it did not."""
        if self.size != other.size:
            return f"it had {self.size} bytes and now has {other.size}"
        if self.etag and other.etag:
            return f"its etag was {self.etag} and now is {other.etag}" if self.etag != other.etag else ""
        if self.modified and other.modified and self.modified != other.modified:
            return f"it was last changed {self.modified!r} and now {other.modified!r}"
        return ""


class _Transient(Exception):
    """A failure that may pass. wait_s: how long the server asked to wait."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class RemoteFile:
    """One object on a server. See `ByteSource`; `retried` counts the failures that were made good."""

    def __init__(self, url: str, locator: Locator, *, options: StorageOptions) -> None:
        self.url, self.options, self.retried = url, options, 0
        self._locator = locator
        self._pin: _Pin | None = None
        self._target: tuple[str, float] | None = None

    def size(self) -> int:
        return self._pinned().size

    def version(self) -> str:
        pin = self._pinned()
        return pin.etag.strip('"') or pin.modified or f"size-{pin.size}"

    def read(self, offset: int, size: int) -> bytes:
        check_range(offset, size)
        return self._fetch(offset, offset + size) if size else b""

    def sibling(self, suffix: str) -> RemoteFile:
        locator = self._locator.sibling(suffix)
        return RemoteFile(locator.url, locator, options=self.options)

    def close(self) -> None:
        """Connections are shared and kept for the next source."""

    def __str__(self) -> str:
        return redact(self.url)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({redact(self.url)!r})"

    def _pinned(self) -> _Pin:
        if self._pin is None:
            self._fetch(0, 1)
        assert self._pin is not None
        return self._pin

    def _fetch(self, start: int, end: int) -> bytes:
        """Bytes [start, end). With `size` still unknown, an empty object gives b""."""
        asked = self._pin is None and (start, end) == (0, 1)
        # Joining a list at the end would touch twice the memory: pieces are small, so theirs is used again.
        got = io.BytesIO()
        at, tries, barren, fresh = start, 0, 0, False
        deadline = time.monotonic() + self.options.deadline_s
        while True:
            if self._pin is not None and end > self._pin.size:
                if asked and not self._pin.size:
                    return b""
                raise beyond(self, start, end - start, self._pin.size)
            before, tries = at, tries + 1
            try:
                for piece in self._answer(at, end, deadline, fresh):
                    got.write(piece)
                    at += len(piece)
                if at == end:
                    return got.getvalue()  # the buffer itself, not a copy
                if at > before or (self._pin is not None and end > self._pin.size):
                    continue  # a server may answer less than was asked for
                last, wait = "the answer was empty", 0.0
            except _Transient as error:
                last, wait = str(error), error.wait_s
            barren = 0 if at > before else barren + 1
            pause = max(wait, self._pause(at, barren, tries))
            late = time.monotonic() + pause >= deadline
            if barren > self.options.retries or late:
                self._give_up(
                    start, at, end, tries, last, pause if late and barren <= self.options.retries else 0
                )
            self.retried += 1
            self._target, fresh = None, True
            time.sleep(pause)

    def _answer(self, at: int, end: int, deadline: float, fresh: bool) -> Iterator[bytes]:
        """One request for [at, end): pieces of its body. Raises _Transient, and DataError for good."""
        url, headers = self._locator.request(fresh=fresh)
        direct = url
        if self._target is not None and self._target[1] > time.monotonic():
            direct = self._target[0]
        headers |= {
            "Range": f"bytes={at}-{end - 1}",
            "Accept-Encoding": "identity",
            "User-Agent": "ringweave",
        }
        if self._pin is not None and self._pin.etag and not self._pin.etag.startswith("W/"):
            headers["If-Match"] = self._pin.etag
        try:
            response, final = transport_for(self.options).get(direct, headers, home=url, deadline=deadline)
            if final != direct:
                self._target = (final, time.monotonic() + _TARGET_S)
            try:
                skip, count = self._check(response, at, end, direct == url)
                yield from self._body(response, skip, count)
            except BaseException:
                response.close()  # what is left of the body must not be taken for the next answer
                raise
        except (SSLError, ssl.SSLError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                fix = "have the server's certificate authority installed on this machine"
                raise self._final("certificate refused", at, str(error), fix) from None
            raise _Transient(self._said(error)) from None
        except (HTTPError, OSError) as error:
            raise _Transient(self._said(error)) from None

    def _body(self, response: urllib3.BaseHTTPResponse, skip: int, count: int) -> Iterator[bytes]:
        for piece in pieces_of(response, skip, self.options):
            skip -= len(piece)
        for piece in pieces_of(response, count, self.options):
            count -= len(piece)
            yield piece
        if skip or count:
            raise _Transient(f"the connection ended {skip + count} bytes early")
        if response.status == 206 and not response.read1(1, decode_content=False):
            response.release_conn()
        else:
            response.close()

    def _check(self, response: urllib3.BaseHTTPResponse, at: int, end: int, direct: bool) -> tuple[int, int]:
        """(bytes to drop, bytes to take) of an answer to [at, end)."""
        if response.status not in (200, 206):
            return self._refusal(response, at, end, direct)
        coding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            why = f"the server answers with Content-Encoding {coding}, though identity was asked for"
            fix = "turn compression of shards off on the server: ranges of packed bytes are not ranges of the shard"
            raise self._final("unusable answer", at, why, fix)
        length = response.headers.get("Content-Length", "")
        if response.status == 206:
            return 0, self._check_range(response, at, end, length)
        if not length.isdigit():
            why = "the server ignores ranges and does not say how long the object is"
            raise self._final("server without ranges", at, why, _FIX_RANGES)
        self._same(response, int(length), at)
        if at > self.options.max_skip:
            limit = self.options.max_skip
            why = f"the server ignores ranges, so {at} bytes would be read for nothing (max_skip {limit})"
            raise self._final("server without ranges", at, why, _FIX_RANGES)
        return (at, min(end, int(length)) - at) if at < int(length) else (0, 0)

    def _check_range(self, response: urllib3.BaseHTTPResponse, at: int, end: int, length: str) -> int:
        given = response.headers.get("Content-Range", "")
        match = _RANGE.match(given.strip())
        if match is None or match[1] is None:
            raise _Transient(f"206 without a usable Content-Range ({given!r})")
        first, last = int(match[1]), int(match[2])
        if first != at or not first <= last < end or (match[3] != "*" and last >= int(match[3])):
            raise _Transient(f"bytes {at}-{end - 1} were asked for, the answer is {given!r}")
        if length and length != str(last - first + 1):
            raise _Transient(f"Content-Length {length} does not fit Content-Range {given!r}")
        if match[3] != "*":
            self._same(response, int(match[3]), at)
        elif self._pin is None:
            why = "the server does not say how long the object is (Content-Range ends in /*)"
            raise self._final("unusable answer", at, why, _FIX_RANGES)
        return last - first + 1

    def _same(self, response: urllib3.BaseHTTPResponse, size: int, at: int) -> None:
        """Pins the version, or raises DataError when it is another one than before."""
        headers = response.headers
        new = _Pin(size, headers.get("ETag", "").strip(), headers.get("Last-Modified", "").strip())
        if self._pin is None:
            self._pin = new
        elif why := self._pin.differs(new):
            raise self._changed(at, why)

    def _refusal(
        self, response: urllib3.BaseHTTPResponse, at: int, end: int, direct: bool
    ) -> tuple[int, int]:
        status, headers = response.status, response.headers
        body = finish(response)
        code = _CODE.search(body)
        said = f"HTTP {status} {response.reason or ''}".strip() + (f" ({code[1].decode()})" if code else "")
        if self._locator.learn(response):
            raise _Transient(f"{said}; asking elsewhere")
        if status >= 500 or status in _AGAIN:
            raise _Transient(said, _retry_after(headers.get("Retry-After", "")))
        if not direct and status in (401, 403, 404, 410):
            raise _Transient(f"{said} at the end of a redirect")  # signed targets expire
        if status == 412:
            raise self._changed(at, f"it no longer has the etag {self._pin.etag if self._pin else ''}")
        if status == 416:
            match = _RANGE.match(headers.get("Content-Range", "").strip())
            if match is not None and match[3] != "*":
                self._same(response, int(match[3]), at)
                if end > int(match[3]):
                    return 0, 0  # the caller compares with the size, which is known now
        what = "missing object" if status in (404, 410) else "the server refuses"
        raise self._final(what, at, said, _NEXT.get(status, "check the address"))

    def _pause(self, at: int, barren: int, tries: int) -> float:
        """Doubles with each failure in a row; the jitter is a hash, so a run can be repeated."""
        key = f"{self.options.seed}\0{redact(self.url)}\0{at}\0{tries}".encode()
        draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
        longest = min(self.options.backoff_cap_s, self.options.backoff_s * 2.0 ** max(0, barren - 1))
        return longest * (0.5 + 0.5 * draw)

    def _give_up(self, start: int, at: int, end: int, tries: int, last: str, pause: float) -> NoReturn:
        why = f"{at - start} of {end - start} bytes after {tries} tries; last: {last}"
        if pause:
            why += f"; the next try, in {pause:.1f} s, would be behind the deadline of {self.options.deadline_s:g} s"
        fix = "check the server and the network, then run again: nothing was lost"
        raise self._final("storage does not answer", at, why, fix)

    def _changed(self, at: int, why: str) -> DataError:
        fix = "shards must not change during a run: put new ones under new names, or index these again and start anew"
        return self._final("object changed during the run", at, why, fix)

    def _final(self, what: str, at: int, why: str, fix: str) -> DataError:
        return DataError(what, where=f"{self} @{at}", why=redact(why), fix=fix)

    def _said(self, error: BaseException) -> str:
        if isinstance(error, urllib3.exceptions.TimeoutError | TimeoutError):
            return f"stalled: {redact(error)}"
        return f"{type(error).__name__}: {redact(error)}"


_FIX_RANGES = (
    "serve the shards from a server with range requests (nginx, any object store), or copy them to a disk"
)


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header (a number or a date), 0 for none or nonsense."""
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
