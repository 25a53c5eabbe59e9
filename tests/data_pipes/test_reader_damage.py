"""Truncation and random bit flips of a small real shard; `tests/prove/data_damage.py` does the same at full size."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

from ringweave.data_pipes.index import ShardIndex, build_index, load_index, write_index
from ringweave.data_pipes.reader import ShardReader, check_shard
from ringweave.tokenizers.errors import DataError

FLIPS = 200


def _png(seed: int) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 64, (16, 24, 3), np.uint8)
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


def _flac(seed: int) -> bytes:
    out = io.BytesIO()
    wave = (np.sin(np.arange(800) / (5 + seed)) * 9000).astype(np.int16)
    soundfile.write(out, wave, 16_000, format="FLAC")
    return out.getvalue()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, bytes]]]:
    """Pictures, sounds, captions, records without text, in webdataset's own writing."""
    path = tmp_path_factory.mktemp("real") / "real-0000.tar"
    samples = [
        {"png": _png(i), "flac": _flac(i), "txt": f"picture {i}".encode() * (i % 3), "json": b'{"n": %d}' % i}
        for i in range(6)
    ]
    with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0) as writer:
        for i, members in enumerate(samples):
            writer.write({"__key__": f"set/{i:04d}", **members})
    write_index(path, build_index(path))
    return path, samples


def _copy(real: Path, tmp_path: Path, data: bytes) -> tuple[Path, ShardIndex]:
    path = tmp_path / real.name
    path.write_bytes(data)
    return path, load_index(real)


def test_truncation_at_every_block_and_at_odd_places(
    real: tuple[Path, list[dict[str, bytes]]], tmp_path: Path
) -> None:
    """Refused at indexing, stale for a reader, and under an open reader each sample is whole or named."""
    shard, samples = real
    data, index = shard.read_bytes(), load_index(shard)
    last = index.samples[-1].members[-1]
    end = last.offset + -(-last.size // 512) * 512 + 1024
    rng = random.Random(0)
    cuts = sorted({*range(0, end, 512), *(rng.randrange(end) for _ in range(60)), end - 1})
    whole = [max(m.offset + m.size for m in index.members(i)) for i in range(index.count)]
    for cut in cuts:
        path, _ = _copy(shard, tmp_path, data[:cut])
        with pytest.raises(DataError) as caught:
            build_index(path)
        assert f"{path}" in caught.value.where
        kept = build_index(path, tail="quarantine").count
        assert kept <= sum(stop <= cut for stop in whole)
        with ShardReader(path, index=index) as reader:
            found = reader.read_many(0, index.count, errors="return")
        for i, sample in enumerate(found):
            if isinstance(sample, DataError):
                assert whole[i] > cut
                assert f"{path}#set/{i:04d}/" in sample.where
                assert "@" in sample.where
            else:
                assert whole[i] <= cut
                assert sample.members == samples[i]


def test_random_bit_flips_are_detected_or_harmless(
    real: tuple[Path, list[dict[str, bytes]]], tmp_path: Path
) -> None:
    shard, samples = real
    data, index = bytearray(shard.read_bytes()), load_index(shard)
    payload = np.zeros(len(data), np.bool_)
    for i in range(index.count):
        for member in index.members(i):
            payload[member.offset : member.offset + member.size] = True
    rng, detected, harmless = random.Random(11), 0, 0
    for _ in range(FLIPS):
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[at] ^= bit
        path, _ = _copy(shard, tmp_path, bytes(data))
        data[at] ^= bit
        with ShardReader(path, index=index) as reader:
            found = reader.read_many(0, index.count, errors="return")
        errors = [x for x in found if isinstance(x, DataError)]
        assert [x.members for x in found if not isinstance(x, DataError)] == [
            m for m, x in zip(samples, found) if not isinstance(x, DataError)
        ]
        assert len(errors) <= 1
        detected, harmless = detected + len(errors), harmless + (not errors)
        if payload[at]:
            assert len(errors) == 1
            assert f"{path}#set/" in errors[0].where
        write_index(path, index)
        assert bool(errors) <= bool(check_shard(path))
        path.with_name(path.name + ".idx").unlink()
    assert detected >= FLIPS // 4
    assert detected + harmless == FLIPS
