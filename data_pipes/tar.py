"""Tar headers and the walk over all of them: every member's name, place, size and crc32, or a named error.

The readers of the field end a shard silently at a damaged header, never look for the end of the archive and
cannot see a flipped payload bit (tar has no data checksum). This walk accepts only what it fully understands:
ustar, GNU long names (`L`) and pax headers (`path`, `size`); everything else is refused with its place.

It is quick because plain headers are taken a window at a time, in numpy (`tar_header.Survey`). Whatever is not plain
(an extended header, an odd spelling, damage) is parsed on its own by `parse_header`, which is also the reference that
the quick way is tested against.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ringweave.data_pipes.checksum import crc32
from ringweave.data_pipes.tar_header import BLOCK, Header, HeaderError, Survey, padded, parse_header
from ringweave.tokenizers.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

#: Bytes read at once: a window of this many bytes is scanned and crc'd while it is in the processor's cache.
WINDOW = 1 << 20
#: The same where every read is a request.
_REMOTE_WINDOW = 8 << 20
#: Without payload crcs only headers are wanted: below this many in a window they are read one by one.
_SPARSE = 64
#: An extended header (long name, pax records) larger than this is damage or an attack, not a name.
_MAX_EXTENDED = 1 << 20
_ZERO = bytes(BLOCK)
_NOT_FILES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"K": "a link",
    b"3": "a device",
    b"4": "a device",
}
_FIX_SHARD = "copy the shard again from its source, or write it again"


class Readable(Protocol):
    """The part of a byte source that the walk needs: see `storage.ByteSource`."""

    def size(self) -> int: ...
    def read(self, offset: int, size: int) -> bytes: ...


@dataclass(slots=True)
class Members:
    """What a walk found, one entry a regular member in the order of the shard.

    offsets and sizes of the data in bytes; crc32 of the data; header_crc32 of the header block before it;
    headers: member -> the name in that block, only where it differs from the member's name (long names).
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    header_crc32: list[int] = field(default_factory=list)
    headers: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


class LocalBytes:
    """A file of this machine as a `Readable`, which can also fill a buffer that is used again and again."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._size = os.fstat(self._fd).st_size

    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._size

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer only if the file was cut since it was opened."""
        return os.pread(self._fd, size, offset)

    def fill(self, offset: int, buffer: memoryview) -> int:
        """Read into `buffer`; how many bytes came."""
        return os.preadv(self._fd, [buffer], offset)

    def close(self) -> None:
        os.close(self._fd)


class Walk:
    """One pass over a shard. `members` holds what is whole so far, also after an error.

    where: how messages name the shard. describe: a member's name for messages, given its name in the tar.
    checksums: whether payloads are read for their crc32 (they are 0 otherwise).
    """

    def __init__(
        self,
        source: Readable,
        where: str,
        *,
        describe: Callable[[str], str] = str,
        checksums: bool = True,
    ) -> None:
        self.source, self.where, self.size = source, where, source.size()
        self.members = Members()
        self._describe, self._checksums = describe, checksums
        self._sparse = False
        self._fill: Callable[[int, memoryview], int] | None = getattr(source, "fill", None)
        self._window = WINDOW if self._fill is not None else _REMOTE_WINDOW
        self._store = bytearray(self._window) if self._fill is not None else bytearray()
        self._data: bytes | bytearray = b""
        self._base = self._end = 0
        self._survey: Survey | None = None
        # What extended headers said about the next member.
        self._name: bytes | None = None
        self._length: int | None = None
        self._pending = False

    def run(self) -> Members:
        """Every regular member, up to a proper end of archive.

        Raises DataError for a wrong header checksum, an unknown magic, unreadable numbers, truncation, missing
        end-of-archive blocks, data behind them, links, devices, sparse files and names that are not UTF-8.
        """
        offset = 0
        while True:
            if not self._pending:
                offset = self._plain(offset)
            step = self._one(offset)
            if step is None:
                return self.members
            offset = step

    def error(self, why: str, offset: int, name: str = "", *, fix: str = _FIX_SHARD) -> DataError:
        """A DataError that says where: at `name`, or after the last whole member where no name can be trusted."""
        names = self.members.names
        last = self._describe(names[-1]) if names else "the start"
        place = f"{self.where}#{name}" if name else f"{self.where} (after {last})"
        return DataError("damaged or unusable shard", where=f"{place} @{offset}", why=why, fix=fix)

    def read(self, offset: int, size: int, what: str, name: str = "") -> bytes:
        """Exactly `size` bytes at `offset`, or a DataError that calls it a truncation."""
        if offset + size > self.size:
            why = f"truncated: {what} needs {size} bytes, the file ends after {max(0, self.size - offset)}"
            raise self.error(why, offset, name)
        if self._base <= offset and offset + size <= self._end:
            return bytes(memoryview(self._data)[offset - self._base : offset + size - self._base])
        data = self.source.read(offset, size)
        if len(data) != size:
            raise self.error(f"truncated while reading {what}", offset, name)
        return data

    def _load(self, offset: int) -> None:
        """Make the window begin at `offset`, and see where its plain headers lead."""
        size = min(self._window, self.size - offset)
        if self._fill is None:
            self._data = self.source.read(offset, size) if size > 0 else b""
            count = len(self._data)
        else:
            count = self._fill(offset, memoryview(self._store)[:size]) if size > 0 else 0
            self._data = self._store
        self._base, self._end = offset, offset + count
        blocks = np.frombuffer(self._data, np.uint8, count=count // BLOCK * BLOCK).reshape(-1, BLOCK)
        # Without the payloads' crc32 the data need not be in the window, only in the file.
        limit = count if self._checksums else self.size - offset
        self._survey = Survey(blocks, limit)

    def _plain(self, offset: int) -> int:
        """Take plain members from `offset` on, window by window; the offset of the first that is not plain."""
        while True:
            if self._sparse:
                return offset
            before = len(self.members)
            if not self._base <= offset <= self._end - BLOCK:
                self._load(offset)
            taken = self._scan(offset)
            if taken == offset and self._base != offset and self._survey_cuts(offset):
                self._load(offset)
                taken = self._scan(offset)
            if taken == offset:
                return offset
            self._sparse = not self._checksums and len(self.members) - before < _SPARSE
            offset = taken

    def _survey_cuts(self, offset: int) -> bool:
        """Whether only the end of the window keeps the header here from being plain."""
        return self._survey is not None and self._survey.cut((offset - self._base) // BLOCK)

    def _scan(self, offset: int) -> int:
        """Take the plain members of the window from `offset` on; returns the offset behind the last of them."""
        base, members = self._base, self.members
        if self._survey is None or offset == self._end:
            return offset
        starts, sizes, names, stop = self._survey.follow((offset - base) // BLOCK)
        if not starts:
            return offset
        bodies = [start + BLOCK for start in starts]
        members.names += names
        members.offsets += [base + body for body in bodies]
        members.sizes += sizes
        if self._checksums:
            view = memoryview(self._data)
            members.crc32 += [crc32(view[body : body + size]) for body, size in zip(bodies, sizes)]
            members.header_crc32 += [crc32(view[start:body]) for start, body in zip(starts, bodies)]
        else:
            members.crc32 += [0] * len(starts)
            members.header_crc32 += [0] * len(starts)
        return base + stop

    def _one(self, offset: int) -> int | None:
        """One header, whatever it is; the offset of the next, None at the end of the archive."""
        block = self.read(offset, BLOCK, "a header or the end-of-archive block")
        if block == _ZERO:
            if self._pending:
                raise self.error("an extended header is followed by no member", offset)
            self._finish(offset)
            return None
        try:
            header = parse_header(block)
        except HeaderError as error:
            claimed = block[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
            raise self.error(f"{error}; its name field reads {claimed!r}", offset) from None
        kind, data, length = header.kind, offset + BLOCK, header.size
        if kind in (b"L", b"x"):
            body = self._extended(data, length)
            self._pending = True
            if kind == b"L":
                self._name = body.split(b"\0", 1)[0]
            else:
                self._name, self._length = self._pax(body, offset, self._name, self._length)
        elif kind == b"g":
            if self._pax(self._extended(data, length), offset, None, None) != (None, None):
                raise self.error("a global pax header sets the path or size of members", offset)
        elif kind in (b"0", b"\0"):
            length = header.size if self._length is None else self._length
            self._regular(header, data, length, block)
        elif kind != b"5" or length:
            what = _NOT_FILES.get(kind, f"an entry of type {kind!r}")
            shown = (self._name if self._name is not None else header.name).decode("utf-8", "replace")
            fix = "write the shard with regular files only"
            raise self.error(f"{what} is not a file", offset, shown, fix=fix)
        if kind not in (b"L", b"x", b"g"):  # a folder too: its files carry their full names
            self._name, self._length, self._pending = None, None, False
        return data + padded(length)

    def _regular(self, header: Header, data: int, length: int, block: bytes) -> None:
        raw = self._name if self._name is not None else header.name
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"member name {raw!r} is not UTF-8", data - BLOCK) from None
        crc = self._crc32(data, length, name)
        members = self.members
        spelled = header.name.decode("utf-8", "surrogateescape")
        if spelled != name:
            members.headers[len(members)] = spelled
        members.names.append(name)
        members.offsets.append(data)
        members.sizes.append(length)
        members.crc32.append(crc)
        members.header_crc32.append(crc32(block) if self._checksums else 0)

    def _crc32(self, offset: int, size: int, name: str) -> int:
        """crc32 of a payload, a window at a time."""
        if offset + size > self.size:
            self.read(offset, size, "the data", name)  # raises
        crc, end = 0, offset + size
        while offset < end and self._checksums:
            piece = min(self._window, end - offset)
            crc = crc32(self.read(offset, piece, "the data", name), crc)
            offset += piece
        return crc

    def _extended(self, offset: int, size: int) -> bytes:
        if size > _MAX_EXTENDED:
            raise self.error(f"an extended header of {size} bytes", offset)
        return self.read(offset, size, "an extended header")

    def _pax(
        self, body: bytes, offset: int, name: bytes | None, size: int | None
    ) -> tuple[bytes | None, int | None]:
        """`path` and `size` of pax records `"<length> <key>=<value>\\n"`; other keys do not concern us."""
        while body:
            head, _, _ = body.partition(b" ")
            length = int(head) if head.isdigit() and len(head) < 8 else 0
            record = body[len(head) + 1 : length - 1] if length > len(head) + 1 else b""
            key, equals, value = record.partition(b"=")
            if length > len(body) or not equals or body[length - 1 : length] != b"\n":
                raise self.error("malformed pax header", offset)
            if key.startswith(b"GNU.sparse"):
                raise self.error("sparse files are not supported", offset)
            if key == b"path":
                name = value
            elif key == b"size":
                if not value.isdigit():
                    raise self.error(f"malformed pax size {value!r}", offset)
                size = int(value)
            body = body[length:]
        return name, size

    def _finish(self, offset: int) -> None:
        """Two zero blocks end a tar; only zeros may follow, in whole blocks."""
        if self.read(offset + BLOCK, BLOCK, "the second end-of-archive block") != _ZERO:
            raise self.error("a zero block inside the archive, or only one at its end", offset)
        offset += 2 * BLOCK
        if (self.size - offset) % BLOCK:
            raise self.error("truncated: the file is not a whole number of 512-byte blocks", offset)
        while offset < self.size:
            piece = self.read(offset, min(WINDOW, self.size - offset), "the padding after the end")
            if piece.strip(b"\0"):
                why = "data after the end of the archive (two tars joined?): readers would drop it silently"
                raise self.error(why, offset, fix="join shards by listing both, or write one new shard")
            offset += len(piece)
