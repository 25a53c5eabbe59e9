"""Files that libraries do not write: PNG of every kind by hand, colour profiles, raw video planes, MP3."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

WHERE = "shard-0000.tar#key"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG colour type
#: Start and step, (x, y) each, of the seven passes of an interlaced PNG (ISO 15948, 8.2).
ADAM7 = [
    ((0, 0), (8, 8)), ((4, 0), (8, 8)), ((0, 4), (4, 8)), ((2, 0), (4, 4)),
    ((0, 2), (2, 4)), ((1, 0), (2, 2)), ((0, 1), (1, 2)),
]  # fmt: skip


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """A picture as Pillow writes it."""
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_by_hand(
    samples: NDArray[Any], depth: int, colour: int, extra: bytes = b"", interlaced: bool = False
) -> bytes:
    """A PNG of integers [H, W, C] below 2 ** depth; `extra` is whole chunks before the pixels."""
    height, width = samples.shape[:2]
    passes = ADAM7 if interlaced else [((0, 0), (1, 1))]
    rows = b""
    for (x, y), (dx, dy) in passes:
        part = samples[y::dy, x::dx]
        if part.shape[1]:
            rows += b"".join(b"\0" + _row(row, depth) for row in part)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    parts = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def icc_chunk(profile: bytes, damage: bool = False) -> bytes:
    """A colour profile in a PNG; damaged, its checksum is right and its packing is not."""
    packed = zlib.compress(profile)
    return chunk(b"iCCP", b"x\0\0" + (packed[:40] + b"\xff" * 9 + packed[49:] if damage else packed))


def _row(row: NDArray[Any], depth: int) -> bytes:
    if depth >= 8:
        return row.astype(">u2" if depth == 16 else np.uint8).tobytes()
    bits = "".join(f"{int(value):0{depth}b}" for value in row.reshape(-1))
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[k : k + 8], 2) for k in range(0, len(bits), 8))


# colour profiles (ICC.1:2010) ----------------------------------------------------------------------------------

#: XYZ under D50 of the primaries of a wide space (Adobe RGB's) and of sRGB; columns are red, green, blue.
WIDE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
GAMMA = 563 / 256


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _curve(gamma: float) -> bytes:
    """A power, or for 0 the curve of sRGB in a table of 256 steps."""
    if not gamma:
        steps = np.arange(256) / 255
        linear = np.where(steps <= 0.04045, steps / 12.92, ((steps + 0.055) / 1.055) ** 2.4)
        return b"curv\0\0\0\0" + struct.pack(">I", 256) + np.rint(linear * 65535).astype(">u2").tobytes()
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def icc(space: bytes, device: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """A version 2 profile of these tags."""
    tags = {b"desc": b"desc\0\0\0\0\0\0\0\2x\0" + bytes(79), b"cprt": b"text\0\0\0\0x\0\0\0"} | tags
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + _fixed(0.9642, 1.0, 0.8249)
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    head = b"lcms" + b"\x02\x10\0\0" + device + space + connection + bytes(12) + b"acsp" + bytes(28)
    head += _fixed(0.9642, 1.0, 0.8249)
    head = struct.pack(">I", at + len(body)) + head
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def rgb_profile(primaries: NDArray[np.float64] = WIDE, gamma: float = GAMMA) -> bytes:
    """A display profile: three primaries and one gamma."""
    tags = {b"%cTRC" % name: _curve(gamma) for name in b"rgb"}
    for name, column in zip(b"rgb", primaries.T, strict=True):
        tags[b"%cXYZ" % name] = b"XYZ \0\0\0\0" + _fixed(*column)
    return icc(b"RGB ", b"mntr", tags)


def grey_profile(gamma: float = 1.0) -> bytes:
    """A profile of one channel."""
    return icc(b"GRAY", b"mntr", {b"kTRC": _curve(gamma)})


#: L*, a*, b* of paper and inks at full strength in `cmyk_profile`; two inks or more are black, as is K.
INKS = {(0, 0, 0, 0): (255, 128, 128), (1, 0, 0, 0): (140, 100, 90), (0, 1, 0, 0): (120, 190, 120),
        (0, 0, 1, 0): (230, 120, 210)}  # fmt: skip


def cmyk_profile() -> bytes:
    """A printer profile: a table of two steps an ink to Lab of 8 bits."""
    ramp = bytes(range(256))
    corners = [(k >> 3, k >> 2 & 1, k >> 1 & 1, k & 1) for k in range(16)]
    grid = b"".join(bytes(INKS.get(corner, (0, 128, 128))) for corner in corners)
    head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return icc(b"CMYK", b"prtr", {b"A2B0": head + ramp * 4 + grid + ramp * 3}, b"Lab ")


def srgb_of_xyz(xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 to 255 in sRGB of XYZ under D50 (IEC 61966-2-1)."""
    linear = np.clip(xyz @ np.linalg.inv(SRGB).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def xyz_of_lab(lab: tuple[int, int, int]) -> NDArray[np.float64]:
    """XYZ under D50 of Lab in 8 bits (CIE 15)."""
    light, a, b = lab[0] * 100 / 255, lab[1] - 128, lab[2] - 128
    f = np.array([(light + 16) / 116 + a / 500, (light + 16) / 116, (light + 16) / 116 - b / 200])
    return np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * np.array([0.9642, 1.0, 0.8249])


# sound and video -----------------------------------------------------------------------------------------------


def sound(samples: NDArray[Any], rate: int, form: str, subtype: str) -> bytes:
    """A file as soundfile writes it."""
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate, format=form, subtype=subtype)
    return sink.getvalue()


def movie(
    planes: list[list[NDArray[Any]]],
    pix_fmt: str,
    *,
    codec: str = "ffv1",
    form: str = "matroska",
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
    **tags: int,
) -> bytes:
    """Frames of raw planes, at the given milliseconds (default: every 100); `tags` as PyAV calls them."""
    height, width = planes[0][0].shape[:2]
    sink = io.BytesIO()
    with av.open(sink, "w", format=form) as file:
        stream: Any = file.add_stream(codec, rate=1000 if times else 10)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        stream.codec_context.options = options or {}
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for number, arrays in enumerate(planes):
            frame = av.VideoFrame(width, height, pix_fmt)
            for plane, array in zip(frame.planes, arrays, strict=True):
                rows = np.ascontiguousarray(array).view(np.uint8).reshape(plane.height, -1)
                padded = np.zeros((plane.height, plane.line_size), np.uint8)
                padded[:, : rows.shape[1]] = rows
                plane.update(padded.tobytes())
            frame.pts = times[number] if times else number
            frame.time_base = Fraction(1, 1000 if times else 10)
            for name, value in tags.items():
                setattr(frame, name, value)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return sink.getvalue()
