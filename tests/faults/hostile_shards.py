"""Hostile archives, sidecars and folders, made in code. Each is a `Fixture`; nothing here is a test.

`expect` says how it must end: "refused" with a DataError before a sample is read, "unusable" (the shard is
read, the member is refused), or "harmless" (plain bytes, which nothing interprets).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

BLOCK = 512


@dataclass(frozen=True)
class Fixture:
    """kind: "tar" (file is the shard), "member" (goes into a sound shard), "packed" (a compressed shard),
    "sidecar" (beside a sound shard), "jsonl" or "folder". make: the bytes, or fills a folder."""

    name: str
    kind: str
    expect: str
    make: Callable[[], bytes] | Callable[[Path], None]
    ext: str = "tar"


class Trap:
    """Unpickling one of these would leave the file `pwned` behind."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def header(
    name: bytes = b"a.txt",
    *,
    size: bytes | int = 0,
    kind: bytes = b"0",
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
) -> bytes:
    """One tar header with a right checksum."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(BLOCK)
    block[0 : len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136], block[136:148] = field.ljust(12, b"\0"), b"00000000000\0"
    block[148:156], block[156:157] = b" " * 8, kind
    block[157 : 157 + len(link)], block[257:265] = link, magic
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def entry(name: bytes, data: bytes = b"data", **more: object) -> bytes:
    """A header with its padded data."""
    size = more.pop("size", len(data))
    return header(name, size=size, **more) + data + bytes(-len(data) % BLOCK)  # type: ignore[arg-type]


END = bytes(2 * BLOCK)
GOOD = entry(b"ok.txt", b"fine")


def pax(**records: bytes) -> bytes:
    """A pax header with these records."""
    body = b""
    for key, value in records.items():
        rest = b" " + key.replace("__", ".").encode() + b"=" + value + b"\n"
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        body += str(length).encode() + rest
    return entry(b"./PaxHeaders/x", body, kind=b"x")


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.txt", bytes(50_000_000))
    return out.getvalue()


def _nested() -> bytes:
    """Tars in tars, 50 deep."""
    data = GOOD + END
    for _ in range(50):
        data = entry(b"in.tar", data) + END
    return data


def _crowd() -> bytes:
    """20,000 members of one sample."""
    return b"".join(entry(b"k.e%d" % n, b"") for n in range(20_000)) + END


def tars() -> Iterator[tuple[str, str, bytes]]:
    """(name, expect, bytes of the shard)."""
    refused = {
        "symbolic link": entry(b"a.txt", b"", kind=b"2", link=b"/etc/passwd"),
        "hard link": entry(b"a.txt", b"", kind=b"1", link=b"/etc/passwd"),
        "character device": entry(b"a.txt", b"", kind=b"3"),
        "block device": entry(b"a.txt", b"", kind=b"4"),
        "fifo": entry(b"a.txt", b"", kind=b"6"),
        "absolute name": entry(b"/etc/cron.d/a.txt"),
        "name that climbs": entry(b"../../a.txt"),
        "prefix that climbs": entry(b"a.txt", prefix=b"x/../.."),
        "backslash name": entry(b"..\\..\\a.txt"),
        "name with terminal escapes": entry(b"\x1b]0;x\x07.txt"),
        "name with a newline": entry(b"a\nb.txt"),
        "name that is not UTF-8": entry(b"\xff\xfe.txt"),
        "pax path that climbs": pax(path=b"../x.txt") + entry(b"a.txt"),
        "pax link": pax(linkpath=b"/etc/passwd") + entry(b"a.txt", b"", kind=b"2"),
        "pax size beyond the end": pax(size=b"9" * 30) + entry(b"a.txt"),
        "pax size below zero": pax(size=b"-1") + entry(b"a.txt"),
        "pax length that lies": entry(b"./PaxHeaders/x", b"99999 path=a\n", kind=b"x") + entry(b"a.txt"),
        "pax header of 8 GiB": header(b"./PaxHeaders/x", size=0o77777777777, kind=b"x"),
        "long name of 1 GiB": header(b"././@LongLink", size=1 << 30, kind=b"L"),
        "pax sparse file": pax(GNU__sparse__major=b"1", GNU__sparse__realsize=b"9" * 12) + entry(b"a.txt"),
        "GNU sparse file": entry(b"a.txt", b"", kind=b"S", magic=b"ustar  \0"),
        "size beyond the end": header(b"a.txt", size=0o77777777777),
        "base-256 size below zero": header(b"a.txt", size=b"\xff" * 12),
        "base-256 size of 2^80": header(b"a.txt", size=b"\x80" + b"\x7f" * 11),
        "size of spaces": header(b"a.txt", size=b" " * 12),
        "size with a sign": header(b"a.txt", size=b"-0000000001\0"),
        "member twice": entry(b"a.txt") + entry(b"a.TXT"),
        "interleaved samples": entry(b"a.txt") + entry(b"b.txt") + entry(b"a.cls"),
        "dotted names that merge": entry(b"a.v1.0.txt") + entry(b"a.v2.0.txt"),
    }
    for name, data in refused.items():
        yield name, "refused", GOOD + data + END
    yield "wrong checksum", "refused", GOOD + entry(b"a.txt").replace(b"a.txt", b"b.txt", 1) + END
    yield "two tars joined", "refused", (GOOD + END) + (entry(b"b.txt") + END)
    yield "no end of archive", "refused", GOOD
    yield "cut inside a member", "refused", GOOD + entry(b"b.txt", bytes(4000))[:2000]
    yield "empty file", "refused", b""
    yield "random bytes", "refused", bytes((n * n * 131 + n) % 251 for n in range(20_000))
    yield "zip bomb named .tar", "refused", _zip()
    yield "gzip bomb named .tar", "refused", gzip.compress(bytes(50_000_000))
    yield "pickle named .tar", "refused", pickle.dumps(Trap()).ljust(1024, b"\0")
    yield "10,000 pax headers", "refused", pax(path=b"a.txt") * 10_000 + END
    yield "tars in tars", "harmless", _nested()
    yield "20,000 members of one sample", "harmless", _crowd()


def packed() -> Iterator[tuple[str, str, str, bytes]]:
    """(name, expect, ending, bytes) of compressed shards."""
    plain = GOOD + END
    zeros = GOOD + entry(b"b.bin", bytes(200_000_000)) + END
    yield "gzip shard bomb", "refused", "tar.gz", gzip.compress(zeros, 9)
    yield "zstd shard bomb", "refused", "tar.zst", zstandard.ZstdCompressor(level=3).compress(zeros)
    yield "gzip shard cut off", "refused", "tar.gz", gzip.compress(plain)[:-9]
    yield "gzip shard with a tail", "refused", "tar.gz", gzip.compress(plain) + b"tail that nobody reads"
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    ).compressobj()
    yield "zstd shard with a window of 1 GiB", "refused", "tar.zst", wide.compress(plain) + wide.flush()
    yield "plain bytes named .tar.zst", "refused", "tar.zst", plain


def sidecars() -> Iterator[tuple[str, str, str, bytes]]:
    """(name, expect, ending, bytes) of files beside a sound shard."""
    trap = pickle.dumps(Trap())
    huge = struct.pack("<Q", 1 << 62) + b"{}"
    deep = b"[" * 200_000
    shape = json.dumps({"keys": {"dtype": "U8", "shape": [1 << 60], "data_offsets": [0, 1 << 60]}}).encode()
    for ending in ("idx", "idx.json"):
        yield f"pickle as .{ending}", "refused", ending, trap
        yield f"deep JSON as .{ending}", "refused", ending, deep
    yield "index header of 2^62 bytes", "refused", "idx", huge
    yield "index with a tensor of 2^60 bytes", "refused", "idx", struct.pack("<Q", len(shape)) + shape


def folders() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """(name, fills a folder) whose odd entries must stay out of the shards."""

    def links(folder: Path) -> None:
        (folder / "passwd.txt").symlink_to("/etc/passwd")
        (folder / "loop").symlink_to(folder)
        (folder / "up").symlink_to("..")

    def special(folder: Path) -> None:
        os.mkfifo(folder / "pipe.txt")
        (folder / "esc\x1b[31m.txt").write_text("x")
        (folder / "new\nline.txt").write_text("x")

    yield "folder of links", links
    yield "folder of special files", special


def shard_fixtures() -> list[Fixture]:
    """All of this module."""
    made = [Fixture(name, "tar", expect, lambda data=data: data) for name, expect, data in tars()]  # type: ignore[misc]
    made += [Fixture(n, "packed", e, lambda d=d: d, ext) for n, e, ext, d in packed()]  # type: ignore[misc]
    made += [Fixture(n, "sidecar", e, lambda d=d: d, ext) for n, e, ext, d in sidecars()]  # type: ignore[misc]
    return made + [Fixture(name, "folder", "harmless", fill) for name, fill in folders()]


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    """A sound shard."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()
