"""gzip and zstd, for shards (`.tar.gz`, `.tgz`, `.tar.zst`) and members (`x.json.gz`, `x.txt.zst`), with caps.

A few bytes can unpack to terabytes, so output is made in small pieces and counted: in all, against the input in
all, and against each MiB of input on its own (a bomb behind gigabytes of honest data). zstd's window, which is
memory that the file asks for, is capped too. A stream that ends early and bytes behind its end are errors:
the usual readers give back what they got, or "empty file".

A compressed shard has no random access. `unpack` writes it out once as a plain tar, which is then indexed and
read like any other.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zstandard

from ringweave.tokenizers.errors import DataError

Codec = Literal["gzip", "zstd"]
_MIB = 1 << 20
#: Compressed bytes given to a decoder at once. A zstd block of 4 bytes may stand for 128 KiB, and zstandard gives
#: all that its input yields in one piece: 2 KiB of input is at most 64 MiB of output.
_PIECE = {"gzip": 1 << 16, "zstd": 1 << 11}
_SUFFIXES: dict[str, Codec] = {".gz": "gzip", ".zst": "zstd"}
_SHARDS: dict[str, Codec] = {".tar.gz": "gzip", ".tgz": "gzip", ".tar.zst": "zstd"}


@dataclass(frozen=True, slots=True)
class Caps:
    """What unpacking may cost.

    max_bytes: of output. ratio: output for each byte of input, overall and in every `window` bytes of input; the
    first MiB of output is free, since a short file of one letter is no bomb. zstd_window: memory that a zstd
    frame may ask for.
    """

    max_bytes: int = 1 << 40
    ratio: float = 200.0
    window: int = _MIB
    zstd_window: int = 1 << 27


#: A member is unpacked in memory.
MEMBER_CAPS = Caps(max_bytes=1 << 30)


def codec_of_member(extension: str) -> Codec | None:
    """The codec of `json.gz` or `txt.zst`; None for a plain extension, and for `gz` alone."""
    stem, dot, last = extension.rpartition(".")
    return _SUFFIXES.get(dot + last) if stem else None


def plain_extension(extension: str) -> str:
    """`json.gz` -> `json`; others stay as they are."""
    return extension.rpartition(".")[0] if codec_of_member(extension) else extension


def codec_of_shard(name: str) -> Codec | None:
    """The codec of `x.tar.gz`, `x.tgz` or `x.tar.zst`; None for other names."""
    return next((codec for suffix, codec in _SHARDS.items() if name.lower().endswith(suffix)), None)


class _Gzip:
    """zlib's decoder with its output cut in pieces of 1 MiB."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes) -> Iterator[bytes]:
        while data and not self._inner.eof:
            yield self._inner.decompress(data, _MIB)
            data = self._inner.unconsumed_tail


class _Zstd:
    """zstandard's decoder for one frame."""

    def __init__(self, window: int) -> None:
        self._inner: Any = zstandard.ZstdDecompressor(max_window_size=window).decompressobj()

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    def decompress(self, data: bytes) -> Iterator[bytes]:
        if data:
            yield self._inner.decompress(data)


def _error(what: str, where: str, why: str, fix: str = "") -> DataError:
    return DataError(
        what, where=where, why=why, fix=fix or "copy it again from its source, or write it again"
    )


def decompress(
    pieces: Iterable[bytes], codec: Codec, *, where: str, caps: Caps, what: str = "compressed data"
) -> Iterator[bytes]:
    """The plain bytes of a compressed stream, piece by piece (at most 64 MiB each, mostly 1 MiB).

    Several gzip members or zstd frames after one another are one stream. Raises DataError for damage, a stream
    that ends early, bytes behind its end and a cap that is passed; what came before the error must not be used.
    """
    meter = _Meter(caps, where, what)
    decoder: _Gzip | _Zstd | None = None
    step, size, spill = _PIECE[codec], 0, b""
    for piece in pieces:
        for at in range(0, len(piece), step):
            data = piece[at : at + step]
            meter.read(len(data))
            size += len(data)
            data, spill = spill + data, b""
            while data:
                if decoder is None:
                    if len(data) < 4:  # too short to tell a next part from rubbish; more may come
                        spill = data
                        break
                    decoder = _open(data, codec, where, what, caps, first=size == len(data))
                try:
                    for out in decoder.decompress(data):
                        meter.write(len(out))
                        yield out
                except (zlib.error, zstandard.ZstdError) as error:
                    raise _damaged(error, caps, where, what, size) from None
                data = decoder.unused_data if decoder.eof else b""
                decoder = None if decoder.eof else decoder
    if spill:
        raise _error(f"damaged {what}", where, f"{len(spill)} bytes behind the end of the stream")
    if decoder is not None or not size:
        raise _error(
            f"damaged {what}", where, f"truncated: the {codec} stream ends early, after {size} bytes"
        )


def _open(data: bytes, codec: Codec, where: str, what: str, caps: Caps, *, first: bool) -> _Gzip | _Zstd:
    """A decoder for the part that begins here, if one does."""
    skippable = 0x184D2A50 <= int.from_bytes(data[:4], "little") <= 0x184D2A5F
    if codec == "gzip" and data[:2] == b"\x1f\x8b":
        return _Gzip()
    if codec == "zstd" and (data[:4] == b"\x28\xb5\x2f\xfd" or skippable):
        return _Zstd(caps.zstd_window)
    if first:
        raise _error(f"damaged {what}", where, f"it does not begin like {codec} (bytes {data[:4].hex()})")
    raise _error(
        f"damaged {what}", where, f"bytes behind the end of the {codec} stream ({data[:4].hex()} ...)"
    )


def _damaged(error: Exception, caps: Caps, where: str, what: str, size: int) -> DataError:
    if "memory" in str(error) or "window" in str(error).lower():
        why = f"its zstd frame asks for a window above {caps.zstd_window} bytes ({error})"
        return _error(f"refused {what}", where, why, "write it again without --long or --ultra")
    return _error(f"damaged {what}", where, f"within the first {size} bytes: {error}")


class _Meter:
    """Counts input and output against the caps."""

    def __init__(self, caps: Caps, where: str, what: str) -> None:
        self._caps, self._where, self._what = caps, where, what
        self._read = self._written = self._window_read = self._window_written = 0

    def read(self, count: int) -> None:
        if self._window_read >= self._caps.window:
            self._window_read = self._window_written = 0
        self._read += count
        self._window_read += count

    def write(self, count: int) -> None:
        caps = self._caps
        self._written += count
        self._window_written += count
        if self._written > caps.max_bytes:
            self._refuse(f"it unpacks to more than {caps.max_bytes} bytes")
        for part, size, made in (
            ("in all", self._read, self._written),
            (f"at {self._read} bytes", self._window_read, self._window_written),
        ):
            if made > _MIB + caps.ratio * size:
                self._refuse(
                    f"it unpacks to more than {caps.ratio:g} times its size ({part}: {size} -> {made})"
                )

    def _refuse(self, why: str) -> None:
        fix = "if it is honest data, store it uncompressed"
        raise _error(f"refused {self._what}", self._where, why, fix)


def inflate_member(data: bytes, codec: Codec, *, where: str, caps: Caps = MEMBER_CAPS) -> bytes:
    """A compressed member's plain bytes. Raises DataError as `decompress` does."""
    return b"".join(decompress([data], codec, where=where, caps=caps, what="compressed member"))


def unpack(
    pieces: Iterable[bytes], target: Path, codec: Codec, *, where: str, caps: Caps | None = None
) -> int:
    """Write a compressed shard out as the plain tar `target`; returns its bytes.

    pieces: the compressed bytes in order. The file is whole or absent: temporary name, fsync, rename. Raises
    DataError as `decompress` does, and when the file cannot be written. (`storage.unpacked` does the same in a
    cache with a cap of its own.)
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    size = 0
    try:
        with open(temporary, "wb") as file:
            for piece in decompress(pieces, codec, where=where, caps=caps or Caps(), what="shard"):
                file.write(piece)
                size += len(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        fix = "free space or change permissions"
        raise DataError(
            "cannot unpack shard", where=f"{where} -> {target}", why=str(error), fix=fix
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return size
