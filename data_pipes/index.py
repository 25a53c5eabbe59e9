"""The index beside each shard: where every member lies, how long it is and its crc32.

A shard is a plain WebDataset tar (`key.ext`, members of a sample adjacent). Tar readers in the field end
silently on a damaged header and cannot see a flipped payload bit, so this module walks the headers itself
and refuses everything it does not fully understand. The result is stored as `X.tar.idx.json`:

    {"format": "ringweave-shard-index/1", "shard_size": 20480, "count": 1, "crc32": 123,
     "samples": [{"key": "k", "members": [["txt", 512, 5, 907060870]]}]}

A member row is [ext, offset of its data, size, crc32 of its data] and, only where the name in the tar header
differs from `key.ext` (long names, capitals, a leading `./`), a fifth entry: the name in that header.
`crc32` of the file covers `samples`, so a damaged index is noticed too.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from ringweave.tokenizers.errors import DataError

FORMAT = "ringweave-shard-index/1"
BLOCK = 512
_CHUNK = 1 << 20
#: An extended header (long name, pax records) larger than this is damage or an attack, not a name.
_MAX_EXTENDED = 1 << 20
_ZERO = bytes(BLOCK)
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*\Z")
_NOT_FILES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"K": "a link",
    b"3": "a device",
    b"4": "a device",
}
_FIX_SHARD = "copy the shard again from its source, or write it again"


@dataclass(frozen=True, slots=True)
class MemberEntry:
    """One member: `ext` after the first dot of the base name, `offset` of its data and `size` in bytes."""

    ext: str
    offset: int
    size: int
    crc32: int
    header_name: str  # the name as the member's own tar header spells it


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """The adjacent members that share a key, in the order of the shard."""

    key: str
    members: tuple[MemberEntry, ...]


@dataclass(frozen=True)
class ShardIndex:
    """What the sidecar holds. `shard_size` in bytes tells a stale index from a fresh one."""

    shard_size: int
    samples: tuple[SampleEntry, ...]

    @property
    def count(self) -> int:
        return len(self.samples)

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return [{"key": s.key, "members": [_row(s.key, m) for m in s.members]} for s in self.samples]

    @cached_property
    def crc32(self) -> int:
        """crc32 of the canonical JSON of `samples`: changes whenever a key, place or payload crc does."""
        return zlib.crc32(json.dumps(self._rows, separators=(",", ":")).encode())

    def to_json(self) -> str:
        """The sidecar's text: one line per sample, so that two indexes can be compared with diff."""
        head = {"format": FORMAT, "shard_size": self.shard_size, "count": self.count, "crc32": self.crc32}
        rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in self._rows)
        return json.dumps(head)[:-1] + ', "samples": [\n' + rows + "\n]}\n"


@dataclass(frozen=True, slots=True)
class Header:
    """One parsed tar header block. `name` already has the ustar prefix in front."""

    name: bytes
    size: int
    kind: bytes


class HeaderError(Exception):
    """Why a 512-byte block is not a header this reader accepts."""


def index_path(shard: Path) -> Path:
    """`X.tar` -> `X.tar.idx.json`."""
    return shard.with_name(shard.name + ".idx.json")


def parse_header(block: bytes) -> Header:
    """Parse one 512-byte header block.

    Raises HeaderError for a wrong checksum, an unknown magic or an unreadable number.
    """
    stored = _number(block[148:156], "checksum")
    actual = sum(block[:148]) + 8 * 0x20 + sum(block[156:])
    if stored != actual:
        raise HeaderError(f"bad header checksum (stored {stored}, computed {actual})")
    magic = block[257:265]
    name = block[:100].split(b"\0", 1)[0]
    if magic == b"ustar\x0000":
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    elif magic not in (b"ustar  \0", bytes(8)):  # GNU, and the v7 form that has no magic
        raise HeaderError(f"unknown tar magic {magic!r}")
    return Header(name, _number(block[124:136], "size"), block[156:157])


def _number(field: bytes, what: str) -> int:
    """An octal field, or GNU's base-256 for large values."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.match(field.rstrip(b"\0 ") or b"-")
    if match is None:
        raise HeaderError(f"unreadable {what} field {field!r}")
    return int(match.group(1), 8)


def split_name(name: str) -> tuple[str, str]:
    """`dir/a.seg.png` -> (`dir/a`, `seg.png`): the key ends at the first dot of the base name.

    Extensions are lower case, as webdataset reads them. Raises HeaderError for names that would be lost or
    point outside the shard.
    """
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    if name.startswith("/") or "\\" in name or ".." in folder.split("/"):
        raise HeaderError(f"unsafe member name {name!r}")
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise HeaderError(f"control character in member name {name!r}")
    stem, dot, ext = base.partition(".")
    if not stem or not dot or not ext:
        raise HeaderError(f"member name {name!r} is not key.extension, so it belongs to no sample")
    return folder + slash + stem, ext.lower()


class _Walk:
    """State of one pass over a shard: the file, its size and the name known so far for messages."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.last = ""  # "key/ext" of the last whole member

    def error(self, why: str, offset: int, name: str = "", *, fix: str = _FIX_SHARD) -> DataError:
        place = f"{self.path}#{name}" if name else f"{self.path} (after {self.last or 'the start'})"
        return DataError("damaged or unusable shard", where=f"{place} @{offset}", why=why, fix=fix)

    def read(self, offset: int, size: int, what: str, name: str = "") -> bytes:
        """Exactly `size` bytes at `offset`, or a DataError that calls it a truncation."""
        if offset + size > self.size:
            why = f"truncated: {what} needs {size} bytes, the file ends after {max(0, self.size - offset)}"
            raise self.error(why, offset, name)
        self.file.seek(offset)
        data = self.file.read(size)
        if len(data) != size:
            raise self.error(f"truncated while reading {what}", offset, name)
        return data

    def crc32(self, offset: int, size: int, name: str) -> int:
        """crc32 of a payload, read in pieces of 1 MiB."""
        crc, end = 0, offset + size
        if end > self.size:
            self.read(offset, size, "the data", name)
        while offset < end:
            piece = min(_CHUNK, end - offset)
            crc = zlib.crc32(self.read(offset, piece, "the data", name), crc)
            offset += piece
        return crc

    def members(self) -> Iterator[tuple[str, MemberEntry]]:
        """(full name, entry without ext) of every regular member, up to a proper end of archive."""
        offset, name, size, pax = 0, None, None, False
        while True:
            block = self.read(offset, BLOCK, "a header or the end-of-archive block")
            if block == _ZERO:
                if name is not None or pax:
                    raise self.error("an extended header is followed by no member", offset)
                self._end(offset)
                return
            try:
                header = parse_header(block)
            except HeaderError as error:
                claimed = block[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
                raise self.error(f"{error}; its name field reads {claimed!r}", offset) from None
            data, kind = offset + BLOCK, header.kind
            length = header.size if size is None or kind not in (b"0", b"\0") else size
            if kind in (b"L", b"x"):
                body = self._extended(data, header.size)
                if kind == b"L":
                    name = body.split(b"\0", 1)[0]
                else:
                    pax, (name, size) = True, self._pax(body, offset, name, size)
            elif kind == b"g":
                if self._pax(self._extended(data, header.size), offset, None, None) != (None, None):
                    raise self.error("a global pax header sets the path or size of members", offset)
            elif kind in (b"0", b"\0"):
                full = self._text(name if name is not None else header.name, offset)
                crc = self.crc32(data, length, full)
                yield full, MemberEntry("", data, length, crc, header.name.decode("utf-8", "surrogateescape"))
                name, size, pax = None, None, False
            elif kind == b"5" and header.size == 0:
                name, size, pax = None, None, False  # a folder: its files carry their full names
            else:
                raise self._refused(kind, header, name, offset)
            offset = data + -(-length // BLOCK) * BLOCK

    def _refused(self, kind: bytes, header: Header, name: bytes | None, offset: int) -> DataError:
        what = _NOT_FILES.get(kind, f"an entry of type {kind!r}")
        shown = (name if name is not None else header.name).decode("utf-8", "replace")
        fix = "write the shard with regular files only"
        return self.error(f"{what} is not a file", offset, shown, fix=fix)

    def _extended(self, offset: int, size: int) -> bytes:
        if size > _MAX_EXTENDED:
            raise self.error(f"an extended header of {size} bytes", offset)
        return self.read(offset, size, "an extended header")

    def _text(self, raw: bytes, offset: int) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"member name {raw!r} is not UTF-8", offset) from None

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

    def _end(self, offset: int) -> None:
        """Two zero blocks end a tar; only zeros may follow, in whole blocks."""
        if self.read(offset + BLOCK, BLOCK, "the second end-of-archive block") != _ZERO:
            raise self.error("a zero block inside the archive, or only one at its end", offset)
        offset += 2 * BLOCK
        if (self.size - offset) % BLOCK:
            raise self.error("truncated: the file is not a whole number of 512-byte blocks", offset)
        while offset < self.size:
            piece = self.read(offset, min(_CHUNK, self.size - offset), "the padding after the end")
            if piece.strip(b"\0"):
                why = "data after the end of the archive (two tars joined?): readers would drop it silently"
                raise self.error(why, offset, fix="join shards by listing both, or write one new shard")
            offset += len(piece)


def build_index(shard: Path) -> ShardIndex:
    """Walk every header and payload of a shard and return its index (nothing is written).

    Raises DataError for a missing file and for anything in it that is not a plain, whole, well-formed
    shard: wrong header checksum, truncation, missing end of archive, links, devices, unsafe names, a repeated
    member, a sample whose members are not adjacent.
    """
    seen: dict[str, int] = {}
    samples: list[tuple[str, list[MemberEntry]]] = []
    try:
        with open(shard, "rb") as file:
            walk = _Walk(file, shard)
            for full, entry in walk.members():
                try:
                    key, ext = split_name(full)
                except HeaderError as error:
                    fix = "rename or leave out this member and write the shard again"
                    raise walk.error(str(error), entry.offset - BLOCK, full, fix=fix) from None
                name, at = f"{key}/{ext}", entry.offset - BLOCK
                entry = MemberEntry(ext, entry.offset, entry.size, entry.crc32, entry.header_name)
                if not samples or samples[-1][0] != key:
                    if key in seen:
                        why = f"the members of sample {key!r} are not adjacent (it began @{seen[key]})"
                        fix = "write the members of a sample together; keys must be unique"
                        raise walk.error(why, at, name, fix=fix)
                    seen[key] = at
                    samples.append((key, []))
                elif any(m.ext == ext for m in samples[-1][1]):
                    raise walk.error(f"member {ext!r} occurs twice in sample {key!r}", at, name)
                samples[-1][1].append(entry)
                walk.last = name
            size = walk.size
    except OSError as error:
        raise DataError("cannot read shard", where=str(shard), why=str(error), fix="check the path") from None
    return ShardIndex(size, tuple(SampleEntry(key, tuple(members)) for key, members in samples))


def write_index(shard: Path, index: ShardIndex) -> Path:
    """Store the index beside the shard: temporary file, fsync, rename. Returns the sidecar's path."""
    target = index_path(shard)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(index.to_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def load_index(shard: Path) -> ShardIndex:
    """The index of a shard, checked against the shard's size.

    Raises DataError when the shard is missing, and when the index is missing, malformed or stale, with
    `ringweave data index DIR` as the fix.
    """
    path = index_path(shard)
    fix = f"run `ringweave data index {shard.parent}`"
    try:
        size = os.stat(shard).st_size
    except OSError as error:
        raise DataError("missing shard", where=str(shard), why=str(error), fix="check the path") from None
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError("shard without an index", where=str(shard), why=f"no {path.name}", fix=fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("unreadable index", where=str(path), why=str(error), fix=fix) from None
    try:
        index = _parse(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"not an index of format {FORMAT}: {error}"
        raise DataError("malformed index", where=str(path), why=why, fix=fix) from None
    if index.shard_size != size:
        why = f"it was made for a shard of {index.shard_size} bytes, the shard has {size}"
        raise DataError("stale index", where=f"{shard} ({path.name})", why=why, fix=fix)
    return index


def index_folder(
    folder: Path, *, rebuild: bool = False, progress: Callable[[str, int, int], None] | None = None
) -> list[Path]:
    """Index every `*.tar` of a folder whose index is missing, malformed or stale (all with `rebuild`).

    Returns the sidecars written. Raises DataError at the first damaged shard; those before it stay indexed.
    """
    if not folder.is_dir():
        raise DataError("no such folder", where=str(folder), fix="give the folder that holds the shards")
    written: list[Path] = []
    shards = sorted(folder.glob("*.tar"))
    for done, shard in enumerate(shards, start=1):
        if rebuild or not _has_index(shard):
            written.append(write_index(shard, build_index(shard)))
        if progress is not None:
            progress(shard.name, done, len(shards))
    return written


def _has_index(shard: Path) -> bool:
    try:
        load_index(shard)
    except DataError:
        return False
    return True


def _row(key: str, member: MemberEntry) -> list[str | int]:
    row: list[str | int] = [member.ext, member.offset, member.size, member.crc32]
    return row if member.header_name == f"{key}.{member.ext}" else [*row, member.header_name]


def _parse(text: str) -> ShardIndex:
    """JSON text -> index. Any departure from the format is a ValueError, KeyError or TypeError."""
    raw = json.loads(text)
    if raw["format"] != FORMAT:
        raise ValueError(f"format is {raw['format']!r}")
    size = raw["shard_size"]
    if type(size) is not int:
        raise ValueError("shard_size is not a whole number")
    samples: list[SampleEntry] = []
    for sample in raw["samples"]:
        key, members = sample["key"], []
        for ext, offset, length, crc, *rest in sample["members"]:
            name = rest[0] if rest else f"{key}.{ext}"
            strings, numbers = (key, ext, name), (offset, length, crc)
            if len(rest) > 1 or not all(isinstance(s, str) for s in strings):
                raise ValueError(f"bad member row of sample {key!r}")
            if not all(type(n) is int and n >= 0 for n in numbers) or not BLOCK <= offset <= size - length:
                raise ValueError(f"bad numbers for member {ext!r} of sample {key!r}")
            members.append(MemberEntry(ext, offset, length, crc, name))
        if not members:
            raise ValueError(f"sample {key!r} has no members")
        samples.append(SampleEntry(key, tuple(members)))
    index = ShardIndex(size, tuple(samples))
    if raw["count"] != index.count or raw["crc32"] != index.crc32:
        raise ValueError("its count or crc32 does not match its samples")
    return index
