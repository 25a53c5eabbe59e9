"""Whether an Ogg stream is whole: its pages walked one after the other (RFC 3533).

Decoders skip a damaged page and take a cut stream for a short one. Every page has a checksum and a number.
"""

from __future__ import annotations

import zlib

_MIRROR = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_HEAD = 27
_LAST = 4  # flag of a page


def find_damage(data: bytes) -> str:
    """Why these bytes are no whole Ogg file of one stream; "" when they are."""
    at, number, serial, last = 0, 0, b"", False
    while at < len(data):
        count = data[at + 26] if at + _HEAD <= len(data) else 0
        table = data[at + _HEAD : at + _HEAD + count]
        end = at + _HEAD + count + sum(table)
        if at + _HEAD > len(data) or len(table) < count or end > len(data):
            return "the stream ends before its last page"
        if data[at : at + 4] != b"OggS":
            return f"no page begins at byte {at}"
        page = data[at:end]
        if checksum(page[:22] + bytes(4) + page[26:]) != int.from_bytes(page[22:26], "little"):
            return f"the checksum of page {number} does not match"
        serial = serial or page[14:18]
        if page[14:18] != serial or last:
            return "it holds several streams"
        if int.from_bytes(page[18:22], "little") != number:
            return f"page {number} is missing"
        at, number, last = end, number + 1, bool(page[5] & _LAST)
    return "" if last else "the stream ends before its last page"


def checksum(data: bytes) -> int:
    """CRC-32 of polynomial 0x04C11DB7, highest bit first, start 0: zlib's of mirrored bytes, not complemented."""
    mirrored = zlib.crc32(data.translate(_MIRROR), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
