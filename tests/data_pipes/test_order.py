"""The order of samples: every sample once an epoch over all lanes, the same on every machine, well shuffled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringweave.data_pipes.lengths import ShardLengths, Table
from ringweave.data_pipes.order import SourceCursor, SourceOrder, network, permutation, run_size, shuffled
from ringweave.tokenizers.errors import DataError

PINNED = [[7, 2, 4, 6, 3, 5, 0, 1], [4, 6, 7, 3, 1, 5, 0, 2], [2, 3, 4, 5, 6, 0, 1, 7]]
NETWORK = [20492, 57836, 63978, 12723, 19594, 13547]


def order_of(counts: list[int], *, lanes: int = 1, whole: bool = False, **options: int | None) -> SourceOrder:
    """A source of shards of these many samples, each of one token."""
    parts = [np.ones(count, np.int64) for count in counts]
    table = Table({"a": parts}, whole=["a"] if whole else [])
    return SourceOrder(
        "a", ShardLengths(table), table.counts("a"), seed=5, lanes=lanes, whole=whole, **options
    )


def draws(order: SourceOrder, lane: int) -> Iterator[tuple[int, int]]:
    """(epoch, sample) of a lane."""
    cursor = SourceCursor(order, lane)
    while (document := cursor.draw()) is not None:
        block, offset, _ = document
        yield block.epoch, int(block.samples[offset])


# --- permutations ------------------------------------------------------------------------------------------


def test_permutations_are_permutations_and_pinned() -> None:
    for count in (1, 2, 7, 1000, 65_536, 65_537, 100_003):
        order = permutation(count, seed=1, source="a", epoch=0)
        assert np.array_equal(np.sort(order), np.arange(count))
    # Written down once: these may never change, or runs would resume into another order.
    assert permutation(8, seed=7, source="text", epoch=0).tolist() == PINNED[0]
    assert permutation(8, seed=7, source="text", epoch=1).tolist() == PINNED[1]
    assert permutation(8, seed=-(2**70), source="größe", epoch=0).tolist() == PINNED[2]
    assert permutation(70_777, seed=7, source="text", epoch=0)[:6].tolist() == NETWORK


def plain_network(at: int, count: int, *key: int | str) -> int:
    """The same permutation in Python's own integers, one entry at a time."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    digest = blake2b(json.dumps(key).encode(), digest_size=64).digest()
    words = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8)]
    bits = max(2, (count - 1).bit_length())
    while True:
        a, b = bits - bits // 2, bits // 2
        for word in words:
            upper, lower = at >> b, at & (1 << b) - 1
            upper ^= mix(lower * 0x9E3779B97F4A7C15 + word & mask) >> 64 - a
            at, a, b = lower << a | upper, b, a
        if at < count:
            return at


@pytest.mark.parametrize("count", [1, 2, 5, 1000, 70_777, 2**31 + 11, 10**15])
def test_the_network_equals_its_plain_form(count: int) -> None:
    at = sorted({0, 1 % count, count // 3, count - 1})
    assert network(np.asarray(at), count, 7, "text", 3).tolist() == [
        plain_network(x, count, 7, "text", 3) for x in at
    ]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3000), key=st.integers(0, 9))
def test_the_network_is_a_permutation_at_any_size_and_index(count: int, key: int) -> None:
    whole = network(np.arange(count), count, key, "a")
    assert np.array_equal(np.sort(whole), np.arange(count))
    some = np.asarray([0, count - 1, count // 2])
    assert np.array_equal(network(some, count, key, "a"), whole[some])


def test_the_network_needs_no_memory_for_its_domain() -> None:
    runs = 10**12
    found = network(np.arange(10_000), runs, 3, "a")
    assert len(set(found.tolist())) == 10_000
    assert found.min() >= 0 and found.max() < runs
    assert abs(found.mean() / runs - 0.5) < 0.02


def test_the_network_spreads_evenly_and_forgets_its_input() -> None:
    count = 90_001
    found = network(np.arange(count), count, 1, "a")
    cells = np.histogram2d(np.arange(count), found, bins=16)[0]
    expected = count / 256
    chi = float(((cells - expected) ** 2 / expected).sum())
    assert 135 < chi < 345, chi  # 225 degrees of freedom, 5.6 sigma
    assert abs(np.corrcoef(np.arange(count), found)[0, 1]) < 0.02
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    others = network(np.arange(count), count, 2, "a")
    assert int((found == others).sum()) < 12  # one expected


def test_permutations_differ_by_every_key_and_look_uniform() -> None:
    orders = [
        permutation(500, seed=seed, source=source, epoch=epoch).tolist()
        for seed, source, epoch in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    ]
    assert len({tuple(o) for o in orders}) == 4
    firsts = Counter(int(shuffled(5, s, "a", 0)[0]) for s in range(2000))
    assert all(330 < firsts[i] < 470 for i in range(5)), firsts  # 400 each, 4 sigma


# --- runs, lanes, blocks -----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=7).filter(any),
    lanes=st.integers(1, 13),
    run=st.integers(1, 9),
    block=st.integers(1, 5),
    whole=st.booleans(),
    epochs=st.integers(1, 4),
)
def test_every_sample_is_drawn_once_an_epoch_over_all_lanes(
    counts: list[int], lanes: int, run: int, block: int, whole: bool, epochs: int
) -> None:
    order = order_of(counts, lanes=lanes, run=run, block=block, whole=whole, epochs=epochs)
    found: Counter[tuple[int, int]] = Counter()
    for lane in range(lanes):
        mine = list(draws(order, lane))
        assert [e for e, _ in mine] == sorted(e for e, _ in mine), "a lane ends an epoch before the next"
        found.update(mine)
    assert found == Counter((e, s) for e in range(epochs) for s in range(sum(counts)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), lanes=st.integers(1, 5), run=st.integers(1, 4))
def test_documents_of_length_0_are_passed_over_and_counted(seed: int, lanes: int, run: int) -> None:
    sizes = np.random.default_rng(seed).integers(0, 3, 40)
    sizes[0] = 1
    table = Table({"a": [sizes[:13], sizes[13:]]})
    order = SourceOrder(
        "a", ShardLengths(table), table.counts("a"), seed=seed, lanes=lanes, run=run, block=2, epochs=2
    )
    found, passed = [], 0
    for lane in range(lanes):
        cursor = SourceCursor(order, lane)
        while (document := cursor.draw()) is not None:
            block, offset, size = document
            assert size == sizes[block.samples[offset]] > 0
            found.append(int(block.samples[offset]))
        assert cursor.draw() is None
        passed += cursor.passed
    assert Counter(found) == Counter(2 * np.flatnonzero(sizes).tolist())
    assert passed == 2 * int((sizes == 0).sum())


def test_without_an_end_epochs_go_on_for_ever() -> None:
    order = order_of([3, 0, 2], lanes=2)
    stream = [draws(order, lane) for lane in range(2)]
    found = Counter(next(stream[n % 2]) for n in range(5 * 40))
    assert sum(1 for (epoch, _), n in found.items() if epoch < 38 and n == 1) == 38 * 5


def test_more_lanes_than_runs_share_the_epochs() -> None:
    order = order_of([2], lanes=6, epochs=3)
    assert [[e for e, _ in draws(order, lane)] for lane in range(6)] == [[0], [0], [1], [1], [2], [2]]
    order = order_of([2], lanes=6, epochs=2)
    assert [len(list(draws(order, lane))) for lane in range(6)] == [1, 1, 1, 1, 0, 0]


def test_a_source_without_random_access_gives_whole_shards_one_after_the_other() -> None:
    order = order_of([40, 30, 20, 10], lanes=2, whole=True, epochs=2)
    ends = np.cumsum([40, 30, 20, 10])
    for lane in range(2):
        shards = [int(np.searchsorted(ends, s, side="right")) for _, s in draws(order, lane)]
        changes = 1 + sum(a != b for a, b in pairwise(shards))
        assert changes == 4, "two shards an epoch, each in one go"
    samples = [s for _, s in draws(order, 0)]
    assert samples[:20] != sorted(samples[:20]), "shuffled inside the shard"


def test_run_sizes_grow_with_the_source() -> None:
    assert [run_size(n) for n in (1, 2000, 8191, 8192, 100_000, 262_144, 10**9)] == [1, 1, 1, 2, 16, 64, 64]


# --- quality -----------------------------------------------------------------------------------------------


def test_shuffle_quality_is_what_the_module_says() -> None:
    """A lane of a source of 500 shards of 1,000 samples: runs of 64 in blocks of 64."""
    order = order_of([1000] * 500, lanes=4)
    assert (order.run, order.block_runs) == (64, 64)
    found = np.asarray([s for _, (_, s) in zip(range(40_000), draws(order, 1))])
    shards = found // 1000
    windows = shards[: len(shards) // 256 * 256].reshape(-1, 256)
    kinds = np.mean([len(set(w)) for w in windows])
    assert kinds > 50, f"{kinds} shards in 256 draws; 64 runs would show about 59"
    near = np.mean(np.abs(np.diff(found)) < 64)
    assert near < 3 / 64, f"{near:.4f} of neighbours come from one run; 1/64 by chance"
    assert np.mean(np.diff(found) == 1) < 0.002, "neighbours on disk follow each other"
    place = np.arange(len(found))
    assert abs(np.corrcoef(place, found)[0, 1]) < 0.05, "the order remembers the disk"
    runs = shards * 16 + found % 1000 // 64
    spread = [np.ptp(np.flatnonzero(runs == run)) for run in np.unique(runs[:2000])[:50]]
    assert max(spread) <= 64 * 64, "a run is spread over its block, no further"
    assert np.median(spread) > 3000


def test_a_small_source_is_shuffled_sample_by_sample() -> None:
    order = order_of([50] * 40, lanes=6)
    assert order.run == 1
    found = np.asarray([s for lane in range(6) for _, (_, s) in zip(range(300), draws(order, lane))])
    assert abs(np.corrcoef(np.arange(len(found)), found)[0, 1]) < 0.08
    assert np.mean(np.abs(np.diff(found)) == 1) < 0.01


# --- what it reads -----------------------------------------------------------------------------------------


class Counted(Table):
    """Notes which shards are read."""

    def of(self, name: str, shard: int, /) -> np.ndarray:
        self.read = [*getattr(self, "read", []), shard]
        return super().of(name, shard)


def test_only_shards_in_use_are_read_and_few_are_kept() -> None:
    table = Counted({"a": [np.ones(100, np.int64)] * 1000})
    order = SourceOrder("a", ShardLengths(table, keep=1000), table.counts("a"), seed=1, lanes=10, run=64)
    cursor = SourceCursor(order, 3)
    for _ in range(100):
        cursor.draw()
    assert len(set(table.read)) <= 65, "one block of 64 runs"
    for _ in range(20_000):
        cursor.draw()
    assert len(order._lengths._shards) <= 10


def test_lengths_that_do_not_fit_their_index_are_named() -> None:
    table = Table({"a": [np.ones(5, np.int64), np.ones(4, np.int64)]})
    order = SourceOrder("a", ShardLengths(table), np.asarray([5, 9]), seed=1, lanes=1)
    with pytest.raises(DataError, match="do not fit") as error:
        list(zip(range(14), draws(order, 0)))
    assert "shard 1" in str(error.value.where)
    with pytest.raises(DataError, match="holds no document"):
        SourceOrder("a", ShardLengths(Table({"a": []})), np.zeros(0, np.int64), seed=1, lanes=1)
