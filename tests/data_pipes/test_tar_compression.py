"""gzip and zstd shards and members: whole, or a named error; and bombs are refused before they fill anything."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import pytest
import zstandard

from ringweave.data_pipes.compression import (
    Caps,
    codec_of_member,
    codec_of_shard,
    decompress,
    inflate_member,
    plain_extension,
    unpack,
)
from ringweave.data_pipes.index import build_index, write_index
from ringweave.data_pipes.reader import ShardReader, check_shard
from ringweave.data_pipes.storage import ByteCache, LocalFile, unpacked
from ringweave.tokenizers.errors import DataError

MIB = 1 << 20
PACK = {
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}
CODECS = list(PACK)
TEXT = b"".join(b"%d: the quick brown fox\n" % i for i in range(20_000))


def pieces(data: bytes, size: int = 7000) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def plain(data: bytes, codec: str, *, size: int = 7000, **caps: float) -> bytes:
    limits = Caps(**{"max_bytes": 1 << 34, **caps})
    return b"".join(decompress(pieces(data, size), codec, where="x", caps=limits))


def refused(data: bytes, codec: str, **options: float) -> DataError:
    with pytest.raises(DataError) as caught:
        plain(data, codec, **options)
    assert caught.value.where == "x"
    assert caught.value.why
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [1, 13, 4096, 1 << 22])
def test_streams_in_any_pieces_give_their_bytes(codec: str, size: int) -> None:
    text = TEXT if size > 100 else TEXT[:3000]
    packed = PACK[codec](text)
    assert plain(packed, codec, size=size) == text
    assert plain(packed + PACK[codec](b"more") + PACK[codec](b""), codec, size=size) == text + b"more"
    assert plain(PACK[codec](b""), codec, size=size) == b""


@pytest.mark.parametrize("codec", CODECS)
def test_every_truncation_is_named(codec: str) -> None:
    packed = PACK[codec](TEXT[:5000])
    for cut in range(len(packed)):
        error = refused(packed[:cut], codec)
        assert "truncated" in error.why or "behind the end" in error.why, cut


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rubbish", [b"\0", b"rubbish", b"\0" * 600, b"\x1f\x8c\x08\x00"])
def test_bytes_behind_the_end_are_named(codec: str, rubbish: bytes) -> None:
    assert "behind the end" in refused(PACK[codec](TEXT) + rubbish, codec).why
    assert "does not begin like" in refused(b"rubbish" + PACK[codec](TEXT), codec).why


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_is_named(codec: str) -> None:
    rng = random.Random(3)
    packed = PACK[codec](TEXT[:8000])
    for at in range(10, len(packed), 3):
        data = bytearray(packed)
        data[at] ^= 1 << rng.randrange(8)
        try:
            assert plain(bytes(data), codec) == TEXT[:8000]
        except DataError as error:
            assert error.what.startswith(("damaged", "refused"))


def zstd_bomb(size: int) -> bytes:
    """A frame of run-length blocks: 4 bytes stand for 128 KiB each."""
    block = ((1 << 17) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    last = ((1 << 17) << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd\x00\x60" + block * (size // (1 << 17) - 1) + last


def gzip_bomb(size: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    return b"".join([packer.compress(bytes(MIB)) for _ in range(size // MIB)]) + packer.flush()


BOMBS = {"gzip": gzip_bomb(64 * MIB), "zstd": zstd_bomb(1 << 30)}


@pytest.mark.parametrize("codec", CODECS)
def test_a_bomb_is_refused_early_and_in_little_memory(codec: str) -> None:
    sizes: list[int] = []
    tracemalloc.start()
    with pytest.raises(DataError, match="times its size"):
        sizes.extend(map(len, decompress([BOMBS[codec]], codec, where="x", caps=Caps())))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) <= 80 * MIB
    assert peak <= 200 * MIB


@pytest.mark.parametrize("codec", CODECS)
def test_a_bomb_behind_honest_bytes_is_refused(codec: str) -> None:
    """The ratio over all of it would still be fine: each MiB of input counts on its own."""
    honest = random.Random(0).randbytes(3 * MIB)
    caps = {"ratio": 50.0, "window": 1 << 16}
    assert plain(PACK[codec](honest), codec, **caps) == honest
    error = refused(PACK[codec](honest) + BOMBS[codec][: 1 << 16], codec, **caps)
    assert "times its size (at" in error.why
    assert error.what.startswith("refused")


@pytest.mark.parametrize("codec", CODECS)
def test_the_size_cap_holds_and_small_repetition_is_no_bomb(codec: str) -> None:
    noise = random.Random(0).randbytes(4 * MIB)
    assert "more than 1048576 bytes" in refused(PACK[codec](noise), codec, max_bytes=MIB).why
    assert plain(PACK[codec](bytes(MIB)), codec) == bytes(MIB)


def test_the_window_that_a_zstd_frame_asks_for_is_capped() -> None:
    params = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=params).compressobj()
    packed = packer.compress(TEXT) + packer.flush()  # no content size, so the window is the one asked for
    assert plain(packed, "zstd") == TEXT
    error = refused(packed, "zstd", zstd_window=1 << 20)
    assert "window above 1048576" in error.why


def test_zstd_skippable_frames_are_skipped() -> None:
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    assert plain(skipped + PACK["zstd"](TEXT) + skipped, "zstd") == TEXT


def test_names_and_codecs() -> None:
    assert [codec_of_shard(n) for n in ("a.tar", "a.tar.gz", "a.TGZ", "a.tar.zst", "a.zst")] == [
        None, "gzip", "gzip", "zstd", None,
    ]  # fmt: skip
    assert [codec_of_member(e) for e in ("json", "json.gz", "seg.png.zst", "gz", "zst")] == [
        None, "gzip", "zstd", None, None,
    ]  # fmt: skip
    assert [plain_extension(e) for e in ("json.gz", "seg.png.zst", "gz", "txt")] == [
        "json",
        "seg.png",
        "gz",
        "txt",
    ]


def tar_of(entries: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize(("suffix", "codec"), [(".tar.gz", "gzip"), (".tgz", "gzip"), (".tar.zst", "zstd")])
def test_a_compressed_shard_is_unpacked_once_and_read_like_any_other(
    tmp_path: Path, suffix: str, codec: str
) -> None:
    data = tar_of([("a.txt", b"one"), ("b.txt", TEXT)])
    packed = tmp_path / f"s{suffix}"
    packed.write_bytes(PACK[codec](data))
    with pytest.raises(DataError, match="no random access"):
        build_index(packed)
    target = tmp_path / "s.tar"
    assert unpack(pieces(packed.read_bytes()), target, codec, where=str(packed)) == len(data)
    assert target.read_bytes() == data
    write_index(target, build_index(target))
    with ShardReader(target) as reader:
        assert reader.read(1).members == {"txt": TEXT}
    with pytest.raises(DataError, match="truncated"):
        unpack(pieces(packed.read_bytes()[:-5]), target, codec, where=str(packed))
    assert target.read_bytes() == data
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["s.tar", "s.tar.idx", packed.name])


def test_a_compressed_shard_in_the_cache_is_read_through_its_source(tmp_path: Path) -> None:
    packed = tmp_path / "s.tar.gz"
    packed.write_bytes(gzip.compress(tar_of([("a.txt", b"one"), ("b.txt", TEXT)])))
    cache = ByteCache(tmp_path / "cache", 64 * MIB)
    source = unpacked(LocalFile(packed), "gzip", cache=cache)
    index = build_index(source)
    with ShardReader(source, index=index) as reader:
        assert [s.members["txt"] for s in reader.read_many(0, 2)] == [b"one", TEXT]


def test_compressed_members_come_out_plain(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    entries = [
        ("a.json.gz", gzip.compress(b"{}")),
        ("a.txt.zst", PACK["zstd"](TEXT)),
        ("a.gz", b"as it is"),
        ("b.txt.zst", b"not zstd"),
        ("c.txt.gz", BOMBS["gzip"]),
    ]
    path.write_bytes(tar_of(entries))
    write_index(path, build_index(path))
    with ShardReader(path) as reader:
        assert reader.read(0).members == {"json": b"{}", "txt": TEXT, "gz": b"as it is"}
        for i, key in ((1, "b"), (2, "c")):
            with pytest.raises(DataError, match="compressed member") as caught:
                reader.read(i)
            assert f"#{key}/txt." in caught.value.where
            assert "@" in caught.value.where
    assert len(check_shard(path)) == 2


def test_a_member_may_not_unpack_without_end() -> None:
    with pytest.raises(DataError, match="refused compressed member"):
        inflate_member(BOMBS["zstd"], "zstd", where="s.tar#k/txt.zst @512")
    noise = random.Random(1).randbytes(2 * MIB)
    with pytest.raises(DataError, match="more than 1048576 bytes"):
        inflate_member(gzip.compress(noise), "gzip", where="x", caps=Caps(max_bytes=MIB))
