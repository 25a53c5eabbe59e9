"""Runs of samples, other byte sources, and memory: what training reads, over and over."""

from __future__ import annotations

import gc
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import psutil
import pytest

from ringweave.data_pipes import reader as reader_module
from ringweave.data_pipes.index import build_index, load_index, write_index
from ringweave.data_pipes.reader import ShardReader, check_shard, expand_shards
from ringweave.data_pipes.sample import Sample
from ringweave.data_pipes.storage import LocalFile
from ringweave.tokenizers.errors import DataError


class Counting(LocalFile):
    """A source that counts its reads and can fail at one place, as a store that stalls does."""

    def __init__(self, path: Path, fail_at: int = -1) -> None:
        super().__init__(path)
        self.reads: list[tuple[int, int]] = []
        self.fail_at = fail_at

    def read(self, offset: int, size: int) -> bytes:
        self.reads.append((offset, size))
        if offset <= self.fail_at < offset + size:
            raise DataError(
                "stalled", where="https://host/s.tar?sig=***", why="no byte in 20 s", fix="try later"
            )
        return super().read(offset, size)


def write_tar(path: Path, samples: dict[str, dict[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for key, members in samples.items():
            for ext, data in members.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


SAMPLES = {f"k{i}": {"bin": bytes([i]) * (i * 137), "txt": b"%d" % i, "cls": b""} for i in range(12)}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = write_tar(tmp_path / "s.tar", SAMPLES)
    write_index(path, build_index(path))
    return path


def wanted(first: int, count: int, shard: str) -> list[Sample]:
    keys = list(SAMPLES)[first : first + count]
    return [Sample(key, SAMPLES[key], shard, int(key[1:])) for key in keys]


@pytest.mark.parametrize("source", ["path", "source"])
def test_a_run_is_one_read_and_the_same_samples(shard: Path, source: str) -> None:
    counting = Counting(shard)
    with ShardReader(shard if source == "path" else counting) as reader:
        counting.reads.clear()
        for first in range(12):
            for count in (0, 1, 2, 12 - first):
                if first + count <= 12:
                    assert reader.read_many(first, count) == wanted(first, count, str(shard))
        assert [reader.read(i) for i in range(12)] == wanted(0, 12, str(shard))
        for first, count in ((-1, 2), (11, 2), (0, -1), (13, 0)):
            with pytest.raises(IndexError):
                reader.read_many(first, count)
        if source == "source":
            counting.reads.clear()
            reader.read_many(2, 9)
            assert len(counting.reads) == 1


def test_a_long_run_is_read_in_pieces(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (1, 700, 6000, 20_000):
        monkeypatch.setattr(reader_module, "_MAX_RUN", most)
        source = Counting(shard)
        with ShardReader(source) as reader:
            source.reads.clear()
            assert reader.read_many(0, 12) == wanted(0, 12, str(shard))
            assert all(size <= max(most, 4096) for _, size in source.reads)  # a sample is never cut
            assert (len(source.reads) == 12) == (most < 1024)


def test_damage_in_a_run_costs_one_sample(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    member = load_index(shard).samples[5].members[0]
    data[member.offset + 9] ^= 1
    shard.write_bytes(data)
    with ShardReader(shard) as reader:
        found = reader.read_many(0, 12, errors="return")
        with pytest.raises(DataError) as caught:
            reader.read_many(3, 4)
    assert caught.value.where == f"{shard}#k5/bin @{member.offset}"
    assert [i for i, x in enumerate(found) if isinstance(x, DataError)] == [5]
    assert found[:5] + found[6:] == wanted(0, 5, str(shard)) + wanted(6, 6, str(shard))


def test_a_store_that_fails_at_one_place_costs_the_samples_there(shard: Path) -> None:
    member = load_index(shard).samples[7].members[0]
    with ShardReader(Counting(shard, fail_at=member.offset + 10)) as reader:
        found = reader.read_many(0, 12, errors="return")
    assert [i for i, x in enumerate(found) if isinstance(x, DataError)] == [7]
    error = found[7]
    assert isinstance(error, DataError)
    assert error.where == f"{shard}#k7/bin @{member.offset}"
    assert "stalled: no byte in 20 s" in error.why
    assert error.fix == "try later"


def test_paths_urls_and_sources_read_alike(shard: Path) -> None:
    for source in (shard, str(shard), f"file://{shard}", LocalFile(shard)):
        with ShardReader(source) as reader:
            assert [s.members for s in reader.read_many(0, 12)] == list(SAMPLES.values())
            with pickle.loads(pickle.dumps(reader)) as copy:
                assert copy.read(3).members == SAMPLES["k3"]
        assert reader.read(4).members == SAMPLES["k4"]  # a closed reader opens again
        reader.close()
        assert check_shard(source) == []


def test_a_reader_may_be_given_an_index(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", SAMPLES)
    with ShardReader(path, index=build_index(path)) as reader:
        assert reader.read(1).members == SAMPLES["k1"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_between_members_do_not_scatter_a_run(tmp_path: Path, form: int) -> None:
    samples = {f"{'d' * 120}/k{i}": members for i, members in enumerate(SAMPLES.values())}
    path = write_tar(tmp_path / "s.tar", samples, form)
    write_index(path, build_index(path))
    source = Counting(path)
    with ShardReader(source) as reader:
        source.reads.clear()
        assert [(s.key, s.members) for s in reader.read_many(0, 12)] == list(samples.items())
    assert len(source.reads) == 1


def test_a_rewritten_header_with_the_same_name_is_accepted(tmp_path: Path, shard: Path) -> None:
    """The crc32 of the header is a short cut; another time or owner in it, checksum and all, changes no sample."""
    data = bytearray(shard.read_bytes())
    start = load_index(shard).samples[4].members[1].offset - 512
    info = tarfile.TarInfo("k4.txt")
    info.size, info.mtime, info.uname = 1, 1_700_000_000, "somebody"
    data[start : start + 512] = info.tobuf(tarfile.USTAR_FORMAT)
    shard.write_bytes(data)
    with ShardReader(shard) as reader:
        assert reader.read(4).members == SAMPLES["k4"]
    info.name = "k5.txt"
    data[start : start + 512] = info.tobuf(tarfile.USTAR_FORMAT)
    shard.write_bytes(data)
    with ShardReader(shard) as reader, pytest.raises(DataError, match=r"the header is for 'k5\.txt'"):
        reader.read(4)


def test_urls_are_expanded_without_asking_the_store(tmp_path: Path) -> None:
    assert expand_shards("s3://bucket/a-{0008..0010}.tar", tmp_path) == [
        "s3://bucket/a-0008.tar", "s3://bucket/a-0009.tar", "s3://bucket/a-0010.tar",
    ]  # fmt: skip


@pytest.mark.slow
def test_memory_does_not_grow_over_epochs(tmp_path: Path) -> None:
    """At most 1 MiB a 10k samples (webdataset#131, #365, #357): shards opened, read whole and closed again."""
    rng = np.random.default_rng(0)
    samples = {f"k{i}": {"bin": rng.bytes(3000), "txt": b"t" * 50} for i in range(400)}
    shards = [write_tar(tmp_path / f"{n}.tar", samples) for n in range(5)]
    for shard in shards:
        write_index(shard, build_index(shard))

    def epoch() -> None:
        for shard in shards:
            with ShardReader(shard) as reader:
                for first in range(0, 400, 64):
                    assert len(reader.read_many(first, min(64, 400 - first))) == min(64, 400 - first)
                for i in range(0, 400, 7):
                    reader.read(i)

    process = psutil.Process()
    for _ in range(2):
        epoch()
    gc.collect()
    sizes = [process.memory_info().rss]
    for _ in range(10):  # 20,000 samples in runs and 2,900 one by one
        epoch()
        gc.collect()
        sizes.append(process.memory_info().rss)
    slope = np.polyfit(np.arange(len(sizes)) * 2_290, sizes, 1)[0] * 10_000 / (1 << 20)
    assert slope <= 1.0, [s >> 10 for s in sizes]
