"""What a PNG, JPEG or WebP file says of itself, and whether it is whole: walked from its first byte to its end.

Pillow is content once it has all rows: it does not compare the checksums of a PNG's pixels, drops a colour profile
that it cannot unpack, and takes a file cut behind its last row. PNG: ISO 15948; JPEG: ITU T.81; WebP: RFC 9649.
JPEG and WebP have no checksums, so changed bytes inside their pixels can go unseen.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from ringweave.tokenizers.media_error import Damage

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # colour types of PNG
MAX_SCANS = 64  # of a progressive JPEG, each a pass over all pixels; encoders write about 10
_PNG = b"\x89PNG\r\n\x1a\n"
_MARK = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # no stuffed byte, restart or fill
_APP2, _APP14, _END, _SCAN = 0xE2, 0xEE, 0xD9, 0xDA
_BARE = (0x01, 0xD8)  # JPEG marks without a length
_OTHERS = {
    b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"\x00\x00\x01\x00": "ICO",
    b"\x00\x00\x00\x0cjP": "JPEG 2000", b"\xff\x0a": "JPEG XL", b"8BPS": "PSD", b"<svg": "SVG", b"%PDF": "PDF",
}  # fmt: skip
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}
#: Transfer curves of cICP (ITU-T H.273) that 8-bit sRGB can stand for: BT.709, BT.601, sRGB, BT.2020 and unknown.
_SDR = (1, 2, 6, 13, 14, 15)


@dataclass(frozen=True)
class Stated:
    """What the pixels mean, as far as Pillow does not tell it."""

    form: str  # PNG, JPEG or WEBP
    depth: int = 8  # bits of a sample
    colour: int = -1  # PNG colour type
    key: bytes = b""  # PNG tRNS of grey or RGB: 16 bits a channel
    profile: bool = False  # it holds a colour profile
    adobe: bool = False  # JPEG with Adobe's mark: its CMYK is stored inverted


def inspect(data: bytes) -> Stated:
    """What the file states; Damage when it is not whole, or of another format."""
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(b"\xff\xd8"):
        marks = [(mark, data[at : at + 12]) for mark, at in _segments(data)]
        scans = sum(mark == _SCAN for mark, _ in marks)
        if not 0 < scans <= MAX_SCANS:
            raise Damage(f"it has {scans} scans, limit {MAX_SCANS}")
        profile = any(mark == _APP2 and head.startswith(b"ICC_PROFILE\0") for mark, head in marks)
        adobe = any(mark == _APP14 and head.startswith(b"Adobe") for mark, head in marks)
        return Stated("JPEG", profile=profile, adobe=adobe)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        if len(data) < 8 + int.from_bytes(data[4:8], "little"):
            raise Damage("the file ends early")
        return Stated("WEBP")
    names = [name for start, name in _OTHERS.items() if data.startswith(start)]
    names += [name for brand, name in _BRANDS.items() if data[4:12] == b"ftyp" + brand]
    why = f"it is a {names[0]} file" if names else "it is none of PNG, JPEG and WebP"
    raise Damage(why, "write it as PNG, JPEG or WebP")


def _png(data: bytes) -> Stated:
    first: dict[bytes, bytes] = {}
    for name, at, size in _chunks(data):
        if name not in first:
            first[name] = data[at : at + min(size, 1024)]
    head = first.get(b"IHDR", b"")
    if len(head) != 13 or b"IDAT" not in first:
        raise Damage("it has no header or no pixels")
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (0, 4))
    if not width or not height:
        raise Damage(f"it is {width}x{height}")
    transfer = first.get(b"cICP", b"\1\2")[1:2]
    if not transfer or transfer[0] not in _SDR:
        raise Damage("its colours are HDR (cICP), which 8 bits of sRGB cannot hold")
    colour = head[9]
    key = first.get(b"tRNS", b"") if colour in (GREY, RGB) else b""
    if key and len(key) != (2 if colour == GREY else 6):
        raise Damage(f"its transparent colour has {len(key)} bytes")
    return Stated("PNG", head[8], colour, key, profile=b"iCCP" in first)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of every chunk up to IEND, each against its checksum."""
    at = len(_PNG)
    while True:
        size = int.from_bytes(data[at : at + 4], "big")
        name, end = data[at + 4 : at + 8], at + 8 + size
        if end + 4 > len(data):
            raise Damage("the file ends early")
        if zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise Damage(f"the checksum of chunk {name.decode('latin-1')!r} at byte {at} does not match")
        yield name, at + 8, size
        if name == b"IEND":
            return
        at = end + 4


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(mark, offset of its content) up to the end-of-image mark; what follows that is no part of the picture."""
    at = 2
    while True:
        found = _MARK.search(data, at)
        if found is None:
            raise Damage("the file ends early")
        mark, at = data[found.end() - 1], found.end()
        if mark == _END:
            return
        if mark in _BARE:
            continue
        size = int.from_bytes(data[at : at + 2], "big")
        if size < 2 or at + size > len(data):
            raise Damage("the file ends early")
        yield mark, at + 2
        at += size
