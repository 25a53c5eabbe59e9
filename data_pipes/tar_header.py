"""One 512-byte header block of a tar: parsed on its own, and checked many at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*\Z")
_LANES = 0x00FF00FF00FF00FF
#: Where a header leads whose data go beyond the limit.
_CUT = -2
_USTAR = int.from_bytes(b"usta", "little")
_PLACES = 8 ** np.arange(10, -1, -1, dtype=np.int64)
_MAGICS = np.frombuffer(b"ustar\x0000ustar  \0" + bytes(8), np.uint64)


@dataclass(frozen=True, slots=True)
class Header:
    """One parsed tar header block. `name` already has the ustar prefix in front."""

    name: bytes
    size: int
    kind: bytes


class HeaderError(Exception):
    """Why a 512-byte block is not a header this reader accepts."""


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


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return (size + BLOCK - 1) & -BLOCK


class Survey:
    """The plain headers among the blocks of a window, and where each leads.

    Every block with ustar's magic may be a header; which of them are is only known from the header before. So all of
    them are checked together, and `follow` goes from one to the next.
    """

    def __init__(self, blocks: NDArray[np.uint8], limit: int) -> None:
        """blocks: uint8 [n, 512]; limit: where a member's data must end, in bytes from the first block."""
        count = len(blocks)
        self._at = np.flatnonzero(_word(blocks, 257, "<u4") == _USTAR)
        self._rows = blocks[self._at]
        good = plain_rows(self._rows)
        good &= (self._rows[:, 156] == 0x30) | (self._rows[:, 156] == 0)
        digits = self._rows[:, 124:135].astype(np.int64) & 7
        self._sizes = digits @ _PLACES[-11:]
        stops = (self._at + 1) * BLOCK + self._sizes
        leads = np.full(count, -1, np.int64)
        ends = np.where(stops <= limit, (stops + BLOCK - 1) // BLOCK, _CUT)
        leads[self._at[good]] = ends[good]
        self._leads: list[int] = leads.tolist()

    def cut(self, block: int) -> bool:
        """Whether a plain header begins here whose data only do not end in time."""
        return block < len(self._leads) and self._leads[block] == _CUT

    def follow(self, block: int) -> tuple[list[int], list[int], list[str], int]:
        """Members from this block on: places of their headers, sizes and names, and the place behind the last.

        Places are bytes from the first block. Ends at the first block that is no plain header.
        """
        leads, found, count, begun = self._leads, [], len(self._leads), block
        while block < count and (lead := leads[block]) >= 0:
            found.append(block)
            block = lead
        chosen = np.searchsorted(self._at, np.asarray(found, np.int64))
        names = _names(self._rows[chosen, :100]) if found else []
        if len(names) < len(found):  # a name that is no text, or odd: it is looked at on its own
            block = found[len(names)]
            chosen = chosen[: len(names)]
        starts, sizes = (self._at[chosen] * BLOCK).tolist(), self._sizes[chosen].tolist()
        return starts, sizes, names, (block if names else begun) * BLOCK


def _word(blocks: NDArray[np.uint8], at: int, kind: str) -> NDArray[np.generic]:
    """The number at a place of every block, whatever its alignment."""
    size = np.dtype(kind).itemsize
    return np.ascontiguousarray(blocks[:, at : at + size]).view(kind)[:, 0]


def _names(fields: NDArray[np.uint8]) -> list[str]:
    """The names in uint8 [n, 100]; fewer, when one holds a NUL inside, a line feed, or is not UTF-8."""
    raw: list[bytes] = np.ascontiguousarray(fields).view("S100")[:, 0].tolist()
    try:
        text = b"\n".join(raw).decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    names = text.split("\n")
    if "\0" not in text and len(names) == len(raw):
        return names
    names = []
    for one in raw:
        try:
            name = one.decode("utf-8")
        except UnicodeDecodeError:
            break
        if "\0" in name or "\n" in name:
            break
        names.append(name)
    return names


def plain_rows(rows: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """bool [n]: which of the header blocks uint8 [n, 512] are sound and spelled in the plain way.

    Plain: a checksum of 6 octal digits with NUL and space that is right, a known magic, 11 octal digits of size
    before NUL or space, no ustar prefix. False only means that `parse_header` has to look.
    """
    words = rows.view(np.uint64)  # [n, 64]
    lanes = np.empty(len(rows), np.uint64)
    for some in range(0, len(rows), 128):  # few enough that the temporaries stay in the processor's cache
        # Four sums of bytes side by side in one word: 64 words of two bytes each stay below 2^16 a lane.
        few = words[some : some + 128]
        odd = few >> 8
        odd &= _LANES
        odd += few & _LANES
        np.add.reduce(odd, axis=1, out=lanes[some : some + 128])
    total = (lanes & 0xFFFF) + ((lanes >> 16) & 0xFFFF) + ((lanes >> 32) & 0xFFFF) + (lanes >> 48)
    field = rows[:, 148:156].astype(np.int64)
    actual = total.astype(np.int64) - field.sum(axis=1) + 8 * 0x20
    digits = field[:, :6] - 0x30
    stored = digits @ _PLACES[-6:]
    good = (stored == actual) & (digits >= 0).all(axis=1) & (digits < 8).all(axis=1)
    good &= (field[:, 6] == 0) & (field[:, 7] == 0x20)
    magic = _word(rows, 257, "<u8")
    good &= (magic == _MAGICS[0]) | (magic == _MAGICS[1]) | (magic == _MAGICS[2])
    good &= (rows[:, 345] == 0) | (magic != _MAGICS[0])
    size = rows[:, 124:136]
    good &= ((size[:, :11] & 0xF8) == 0x30).all(axis=1)
    return good & ((size[:, 11] == 0) | (size[:, 11] == 0x20))
