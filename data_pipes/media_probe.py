"""Sizes and durations of media from their headers, without decoding: the optional column `media` of an index.

A row is (width, height, frames, milliseconds), 0 where unknown or unreadable: a probe never fails, since what is
damaged shows when it is decoded. Width and height are those of the file, before any EXIF rotation. A sample with
several media takes size and frames from its first video, else its first picture, and the duration from its first
video, else its first sound.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.index_columns import ShardIndex
from ringweave.data_pipes.tar import Readable

#: Headers of pictures and sounds lie in the first bytes (a JPEG's after its EXIF and colour profile).
_HEAD = 1 << 18
_JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = {0x01, *range(0xD0, 0xD9)}
#: A video is read whole, since its tables may lie at its end; a larger one is not probed.
_WHOLE = 1 << 30
Row = tuple[int, int, int, int]
_UNKNOWN: Row = (0, 0, 0, 0)


def probe_shard(index: ShardIndex, source: Readable) -> NDArray[np.int64]:
    """int64 [samples, 4]: the row of each sample. Reads the head of every medium, and videos whole."""
    media = np.zeros((index.count, 4), np.int64)
    kinds = [_KINDS.get(ext.rpartition(".")[2]) for ext in index.extensions]
    if not any(kinds):
        return media
    starts = index.columns["starts"].tolist()
    for sample, rows in enumerate(index.rows[a:b].tolist() for a, b in pairwise(starts)):
        found: dict[str, Row] = {}
        for offset, size, _, _, ext in rows:
            kind = kinds[ext]
            if kind is not None and kind not in found:
                wanted = size if kind == "video" and size <= _WHOLE else min(size, _HEAD)
                row = _PROBES[kind](source.read(offset, wanted), size)
                if kind == "audio" and row[2] and not row[3]:  # Ogg: the end tells how long it is
                    tail = min(size, 1 << 16)
                    row = (0, 0, 0, _ogg_milliseconds(source.read(offset + size - tail, tail), row[2]))
                if row != _UNKNOWN:
                    found[kind] = row
        seen = found.get("video") or found.get("image") or _UNKNOWN
        heard = found.get("video") or found.get("audio") or _UNKNOWN
        media[sample] = (*seen[:3], heard[3])
    return media


def _safely(probe: Callable[[bytes], Row]) -> Callable[[bytes, int], Row]:
    def run(data: bytes, size: int) -> Row:
        try:
            return probe(data)
        except (struct.error, IndexError, ValueError):
            return _UNKNOWN

    return run


def probe_image(data: bytes) -> Row:
    """(width, height, frames, 0) of a PNG, JPEG, WebP or GIF whose first bytes these are."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        return (*struct.unpack_from(">II", data, 16), 1, 0)
    if data[:2] == b"\xff\xd8":
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return (*struct.unpack_from("<HH", data, 6), 0, 0)
    return _UNKNOWN


def _jpeg(data: bytes) -> Row:
    """Follows the segments to the first start of frame (ITU T.81, B.2)."""
    at = 2
    while at + 9 < len(data):
        if data[at] != 0xFF:
            return _UNKNOWN
        mark = data[at + 1]
        if mark == 0xFF or mark in _JPEG_BARE:
            at += 1 if mark == 0xFF else 2
        elif mark in _JPEG_SIZES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height, 1, 0
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return _UNKNOWN


def _webp(data: bytes) -> Row:
    """The three forms of the WebP container: extended, lossless, lossy."""
    form = data[12:16]
    if form == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        return width, height, 0 if data[20] & 2 else 1, 0  # animated: its frames are not counted
    if form == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), 1, 0
    if form == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF, 1, 0
    return _UNKNOWN


def probe_audio(data: bytes) -> Row:
    """(0, 0, 0, milliseconds) of a FLAC or WAV; of an Ogg stream (0, 0, rate, 0), since its end holds its length."""
    if data[:4] == b"fLaC" and data[4] & 0x7F == 0:
        packed = int.from_bytes(data[18:26], "big")
        return 0, 0, 0, _milliseconds(packed & ((1 << 36) - 1), packed >> 44)
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return _wav(data)
    if data[:4] == b"OggS":
        packet = 27 + data[26]
        if data[packet : packet + 8] == b"OpusHead":
            return 0, 0, 48_000, 0  # granules of Opus count 48 kHz whatever the input was (RFC 7845)
        if data[packet : packet + 7] == b"\x01vorbis":
            return 0, 0, struct.unpack_from("<I", data, packet + 12)[0], 0
    return _UNKNOWN


def _wav(data: bytes) -> Row:
    at, rate = 12, 0
    while at + 8 <= len(data):
        name, size = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        if name == b"fmt ":
            rate = struct.unpack_from("<I", data, at + 16)[0]  # bytes a second
        elif name == b"data":
            return 0, 0, 0, _milliseconds(size, rate)
        at += 8 + size + size % 2
    return _UNKNOWN


def _ogg_milliseconds(tail: bytes, rate: int) -> int:
    """From the granule position of the last page."""
    last = tail.rfind(b"OggS")
    if last < 0 or last + 14 > len(tail):
        return 0
    return _milliseconds(max(0, struct.unpack_from("<q", tail, last + 6)[0]), rate)


def _milliseconds(count: int, rate: int) -> int:
    return min((count * 1000 + rate // 2) // rate, 1 << 62) if rate else 0


def probe_video(data: bytes, size: int) -> Row:
    """(width, height, frames, milliseconds) as the container states them; frames 0 where it does not."""
    import av

    form = "mp4" if data[4:8] == b"ftyp" else "matroska" if data[:4] == b"\x1a\x45\xdf\xa3" else None
    if form is None or len(data) != size:  # not a container it knows, or not read whole
        return _UNKNOWN
    try:
        with av.open(io.BytesIO(data), mode="r", format=form) as file:
            stream: Any = file.streams.video[0]
            seconds = 0.0
            if stream.duration is not None and stream.time_base is not None:
                seconds = float(stream.duration * stream.time_base)
            elif file.duration is not None:
                seconds = file.duration / av.time_base
            sizes = stream.codec_context.width, stream.codec_context.height
            return (*sizes, int(stream.frames or 0), round(seconds * 1000))
    except Exception:
        return _UNKNOWN


_KINDS = {
    **dict.fromkeys(("png", "jpg", "jpeg", "webp", "gif"), "image"),
    **dict.fromkeys(("flac", "wav", "ogg", "opus"), "audio"),
    **dict.fromkeys(("mp4", "mov", "webm", "mkv"), "video"),
}
_PROBES: dict[str, Callable[[bytes, int], Row]] = {
    "image": _safely(probe_image),
    "audio": _safely(probe_audio),
    "video": probe_video,
}
