"""The cache on disk: exact bytes whatever happens to its files, the cap held, safe after SIGKILL."""

from __future__ import annotations

import errno
import gzip
import logging
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringweave.data_pipes import storage_cache as cache_module
from ringweave.data_pipes.storage import ByteCache, LocalFile, unpacked
from ringweave.data_pipes.storage_cache import CachedSource
from ringweave.data_pipes.storage_cache_dir import CacheDir
from ringweave.tokenizers.errors import DataError

KIB = 1024
BLOCK = 128 * KIB
DATA = random.Random(9).randbytes(3 * (1 << 20) + 777)
FORK = multiprocessing.get_context("fork")


class Remote:
    """A source in memory that counts what is read of it."""

    def __init__(self, data: bytes = DATA, url: str = "http://h/a.tar", version: str = "v1") -> None:
        self.data, self.url, self.named, self.reads = data, url, version, list[tuple[int, int]]()

    def size(self) -> int:
        return len(self.data)

    def version(self) -> str:
        return self.named

    def read(self, offset: int, size: int) -> bytes:
        self.reads.append((offset, size))
        return self.data[offset : offset + size]

    def sibling(self, suffix: str) -> Remote:
        return Remote(url=self.url + suffix)

    def close(self) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path) -> ByteCache:
    return ByteCache(tmp_path / "cache", 8 << 20, block_bytes=BLOCK)


def blocks(cache: ByteCache) -> list[Path]:
    return sorted(path for path in (cache.dir / "blocks").rglob("*") if path.is_file())


def test_reads_are_exact_and_fetched_once(cache: ByteCache) -> None:
    remote, draw = Remote(), random.Random(2)
    source = CachedSource(remote, cache)
    for _ in range(60):
        at = draw.randrange(len(DATA))
        size = draw.choice([0, 1, 100, 70_000, BLOCK, 500_000, len(DATA)])
        size = min(size, len(DATA) - at)
        assert source.read(at, size) == DATA[at : at + size]
    assert source.read(0, len(DATA)) == DATA
    fetched = sum(size for _, size in remote.reads)
    assert fetched == len(DATA), "a block was fetched twice"
    remote.reads.clear()
    again = CachedSource(remote, ByteCache(cache.dir, 8 << 20, block_bytes=BLOCK))
    assert again.read(1000, 2_000_000) == DATA[1000:2_001_000] and remote.reads == []
    with pytest.raises(DataError, match="past the end"):
        source.read(len(DATA) - 1, 2)


def test_missing_neighbours_are_fetched_by_one_request(cache: ByteCache) -> None:
    remote = Remote()
    source = CachedSource(remote, cache)
    source.read(5 * BLOCK, 1)
    source.read(3 * BLOCK + 10, 6 * BLOCK)
    assert remote.reads == [(5 * BLOCK, BLOCK), (3 * BLOCK, 2 * BLOCK), (6 * BLOCK, 4 * BLOCK)]


def test_versions_and_addresses_do_not_mix_and_secrets_do_not_count(cache: ByteCache) -> None:
    CachedSource(Remote(url="http://h/a?sig=1"), cache).read(0, 100)
    for remote, fetched in (
        (Remote(url="http://h/a?sig=2"), 0),
        (Remote(url="http://h/a?sig=1", version="v2", data=DATA[::-1]), 1),
        (Remote(url="http://h/b?sig=1", data=DATA[::-1]), 1),
    ):
        assert CachedSource(remote, cache).read(0, 100) == remote.data[:100]
        assert len(remote.reads) == fetched
    assert not any("sig" in str(path) for path in cache.dir.rglob("*"))


def test_damaged_blocks_are_fetched_again(cache: ByteCache) -> None:
    """Bits flipped, tails lost, headers of other blocks, empty files, at every kind of place."""
    draw = random.Random(4)
    source = CachedSource(Remote(), cache)
    source.read(0, len(DATA))
    for path in blocks(cache):
        whole = bytearray(path.read_bytes())
        kind = draw.randrange(5)
        if kind == 0:
            whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del whole[draw.randrange(len(whole)) :]
        elif kind == 2:
            whole[draw.randrange(48)] ^= 255
        elif kind == 3:
            whole.clear()
        else:
            whole = bytearray(draw.choice(blocks(cache)).read_bytes())
        path.write_bytes(whole)
    assert source.read(0, len(DATA)) == DATA
    for at in range(0, len(DATA) - 5000, 4999):
        assert source.read(at, 5000) == DATA[at : at + 5000]


def test_the_cap_is_held_and_the_oldest_go_first(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path / "c", 10 * BLOCK, block_bytes=BLOCK)
    remote = Remote()
    source = CachedSource(remote, cache)
    for number in range(20):
        source.read(number * BLOCK, BLOCK)
        for path in blocks(cache):  # the first block stays in use
            if path.name.endswith("-0"):
                os.utime(path)
            elif path.stat().st_mtime > time.time() - 900:
                os.utime(path, (time.time() - 1000 + number,) * 2)
        assert cache.used() <= 10 * BLOCK
    kept = {int(path.name.rpartition("-")[2]) for path in blocks(cache)}
    assert 0 in kept and 19 in kept and 1 not in kept and len(kept) >= 7
    with pytest.raises(DataError, match="cache too small"):
        ByteCache(tmp_path / "d", BLOCK, block_bytes=BLOCK)


def test_eviction_takes_nothing_from_a_reader(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path / "c", 4 * BLOCK, block_bytes=BLOCK)
    source, wrong = CachedSource(Remote(), cache), list[int]()

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(80):
            at = draw.randrange(len(DATA) - 200_000)
            if source.read(at, 200_000) != DATA[at : at + 200_000]:
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and cache.used() <= 4 * BLOCK


def racer(folder: Path, seed: int, failed: Any) -> None:
    source = CachedSource(Remote(), ByteCache(folder, 12 * BLOCK, block_bytes=BLOCK))
    draw = random.Random(seed)
    for _ in range(150):
        at = draw.randrange(len(DATA) - 100_000)
        if source.read(at, 100_000) != DATA[at : at + 100_000]:
            failed.value += 1


def test_processes_race_for_one_folder(tmp_path: Path) -> None:
    failed = FORK.Value("i", 0)
    racers = [FORK.Process(target=racer, args=(tmp_path / "c", seed, failed)) for seed in range(3)]
    for process in racers:
        process.start()
    folder = None
    while any(process.is_alive() for process in racers):
        if (tmp_path / "c" / "tmp").exists():
            folder = folder or CacheDir(tmp_path / "c", 12 * BLOCK)
            assert folder.used() <= 12 * BLOCK + BLOCK, (
                "over the cap (a file may be counted under both its names)"
            )
        time.sleep(0.01)
    for process in racers:
        process.join()
        assert process.exitcode == 0
    assert failed.value == 0
    cache = ByteCache(tmp_path / "c", 12 * BLOCK, block_bytes=BLOCK)
    assert 6 * BLOCK < cache.used() <= 12 * BLOCK and not list((cache.dir / "tmp").iterdir())


def endless_writer(folder: Path) -> None:
    """Blocks and whole files, as fast as it goes, until it is killed."""
    cache = ByteCache(folder, 6 * BLOCK + (40 << 20), block_bytes=BLOCK)
    for round in range(10**9):
        source = CachedSource(Remote(version=f"v{round}"), cache)
        source.read(0, 4 * BLOCK)
        cache.materialise(f"whole {round}", "", (DATA[:100_000] for _ in range(20)))


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [12])
def test_a_writer_killed_at_any_point_leaves_no_lock_and_no_half_file(tmp_path: Path, rounds: int) -> None:
    folder, draw = tmp_path / "c", random.Random(6)
    cap = 6 * BLOCK + (40 << 20)
    for _ in range(rounds):
        writer = FORK.Process(target=endless_writer, args=(folder,))
        writer.start()
        time.sleep(0.05 + draw.random() * 0.15)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        began = time.monotonic()
        cache = ByteCache(folder, cap, block_bytes=BLOCK)
        assert time.monotonic() - began < 5, "a dead process holds the lock"
        assert cache.used() <= cap
        assert not list((folder / "tmp").iterdir()), "leftovers of a dead process"
        for path in (folder / "whole").iterdir():
            assert path.read_bytes() == DATA[:100_000] * 20
        source = CachedSource(Remote(), cache)
        assert source.read(0, 5 * BLOCK) == DATA[: 5 * BLOCK]
    for path in blocks(cache):
        number = int(path.name.rpartition("-")[2])
        key = bytes.fromhex(path.name.partition("-")[0])
        found = cache.get(key, number, 0, min(BLOCK, len(DATA) - number * BLOCK))
        assert found == DATA[number * BLOCK : (number + 1) * BLOCK]


def test_a_full_disk_is_warned_of_once_and_read_past(
    cache: ByteCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remote = Remote()
    source = CachedSource(remote, cache)
    source.read(0, 10)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "pwrite", full)
    with caplog.at_level(logging.WARNING):
        for at in range(0, 2_000_000, 100_000):
            assert source.read(at, 50_000) == DATA[at : at + 50_000]
    assert [record.getMessage() for record in caplog.records] == [
        f"cache {cache.dir} cannot be written ([Errno 28] No space left on device): reading on without it"
    ]
    assert not cache.usable and not list((cache.dir / "tmp").iterdir())
    assert remote.reads[-1] == (1_900_000, 50_000), "without a cache nothing beyond the wanted bytes is read"
    with pytest.raises(DataError, match="No space left"):
        cache.materialise("w", "", [b"x"])


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="unusable cache folder"):
        ByteCache(tmp_path / "file" / "c", 8 << 20)


def test_a_lock_that_is_not_given_back_only_costs_the_keeping(cache: ByteCache) -> None:
    remote, held, stop = Remote(), threading.Event(), threading.Event()

    def hold() -> None:
        with cache._folder.locked():
            held.set()
            stop.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    cache._folder.lock_s = 0.05
    assert CachedSource(remote, cache).read(0, 1000) == DATA[:1000]
    assert not blocks(cache) and cache.usable
    stop.set()
    thread.join()
    assert CachedSource(remote, cache).read(0, 1000) == DATA[:1000] and len(blocks(cache)) == 1


def test_a_forked_child_does_not_keep_the_lock(cache: ByteCache) -> None:
    with cache._folder.locked():
        child = os.fork()
        if child == 0:
            time.sleep(2)
            os._exit(0)
    cache._folder.lock_s = 0.5
    CachedSource(Remote(), cache).read(0, 10)
    assert len(blocks(cache)) == 1, "the child's copy of the descriptor holds the lock"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_whole_files_are_made_once_held_and_evicted_when_let_go(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path / "c", 48 << 20, block_bytes=BLOCK)
    made = list[str]()

    def pieces(name: str) -> Iterator[bytes]:
        made.append(name)
        for _ in range(12):
            yield DATA[: 1 << 20]

    first = cache.materialise("one", "v", pieces("one"))
    assert cache.materialise("one", "v", pieces("never")).read(1 << 20, 9) == DATA[:9]
    assert made == ["one"] and first.size() == 12 << 20
    worker = pickle.loads(pickle.dumps(first))
    cache.materialise("two", "v", pieces("two")).close()
    cache.materialise("three", "v", pieces("three"))
    cache.materialise("four", "v", pieces("four"))
    assert made == ["one", "two", "three", "four"] and cache.used() <= 48 << 20
    assert first.read(5, 9) == worker.read(5, 9) == DATA[5:14]
    names = {path.name for path in (cache.dir / "whole").iterdir()}
    assert first.path.name in names and len(names) < 4, "what is open stays, what is not goes"
    with pytest.raises(DataError, match="more than the 5 bytes allowed"):
        cache.materialise("five", "v", [b"123456"], max_bytes=5)
    held = [cache.materialise(name, "v", pieces(name)) for name in ("one", "six", "seven")]
    with pytest.raises(DataError, match="cache too small"):
        cache.materialise("eight", "v", pieces("eight"))
    assert all(file.read(0, 3) == DATA[:3] for file in held) and cache.used() <= 48 << 20


def maker(folder: Path, runs: Path) -> None:
    def pieces() -> Iterator[bytes]:
        with open(runs, "ab") as file:
            file.write(b"x")
        time.sleep(0.3)
        yield DATA

    file = ByteCache(folder, 48 << 20).materialise("one", "", pieces())
    os._exit(0 if file.read(0, len(DATA)) == DATA else 1)


def test_processes_that_want_the_same_whole_file_make_it_once(tmp_path: Path) -> None:
    makers = [FORK.Process(target=maker, args=(tmp_path / "c", tmp_path / "runs")) for _ in range(3)]
    for process in makers:
        process.start()
    for process in makers:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "runs").read_bytes() == b"x"


def test_packed_shards_are_unpacked_into_the_cache(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path / "c", 64 << 20, block_bytes=BLOCK)
    remote = Remote(gzip.compress(DATA), url="http://h/a.tar.gz")
    for _ in range(2):
        plain = unpacked(remote, "gzip", cache=cache)
        assert isinstance(plain, LocalFile) and plain.read(0, plain.size()) == DATA
    assert len(remote.reads) == 1
    cut = Remote(gzip.compress(DATA)[:-9], url="http://h/b.tar.gz")
    with pytest.raises(DataError):
        unpacked(cut, "gzip", cache=cache)
    assert len(list((cache.dir / "whole").iterdir())) == 1 and not list((cache.dir / "tmp").iterdir())


def test_a_cache_and_its_sources_are_pickled(cache: ByteCache) -> None:
    source = pickle.loads(pickle.dumps(CachedSource(Remote(), cache)))
    assert source.read(3, 5) == DATA[3:8] and len(blocks(cache)) == 1
    assert source.sibling(".idx").url == "http://h/a.tar.idx"
