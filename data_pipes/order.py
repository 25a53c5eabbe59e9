"""The order of samples inside a source: pure arithmetic on (seed, source, epoch, lane).

A source is cut into *runs*: R consecutive samples of one shard, or a whole shard where its bytes have no random
access. Its endless stream of runs is P = 0, 1, 2, ...: epoch P // runs, run perm(seed, source, epoch)[P % runs].
Lane l of V owns P = l, l + V, l + 2V, ..., so every run of every epoch belongs to exactly one lane. The runs that a
lane owns in one epoch are cut into even *blocks* of at most B runs, and the samples of a block are shuffled. Data
ranks and workers do not occur here, so their number cannot change the order.

Shuffle quality: runs are in random order over all shards, so the samples of a block come from up to B shards; inside
a block the order is random. What is left of the order on disk is that the R samples of a run lie within B·R draws
of their lane (1/V of the stream) of each other; two that follow each other do so with a chance of about 1/(B·R).
Sources below 8,192 samples have R = 1: any order is possible there.

Permutations sort or walk keys made by keyed *bijections* of 64-bit words. No two keys are equal and nothing is drawn
from a generator, so no version of numpy and no sorting algorithm changes them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.lengths import Lengths, ShardLengths
from ringweave.tokenizers.errors import DataError

#: Runs of a block, and of a block of whole shards (each of which holds a cache's worth of bytes).
BLOCK_RUNS, BLOCK_SHARDS = 64, 1
#: Samples of a run at most, and runs that a source should at least have before its runs grow.
RUN_SAMPLES, RUNS_WANTED = 64, 4096

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
#: Up to here a permutation is a sorted list (exactly uniform keys); above, a network that needs no memory.
_SORTED = 2**16
_ROUNDS = 8
#: Lengths turned into Python integers at a time; bounds the memory of a cursor beside its block.
_CHUNK = 256


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words. [n] -> [n]"""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def _words(count: int, *parts: int | str) -> NDArray[np.uint64]:
    """`count` (at most 8) key words made of `parts`, uint64 [count]."""
    text = json.dumps(parts, ensure_ascii=True).encode()
    return np.frombuffer(blake2b(text, digest_size=8 * count).digest(), dtype="<u8").astype(np.uint64)


def shuffled(count: int, *key: int | str) -> NDArray[np.int64]:
    """A permutation of 0..count-1 by sorting mixed keys, int64 [count]; the same for the same `key`."""
    first, second = _words(2, *key)
    numbers = np.arange(count, dtype=np.uint64) * _GOLDEN + first
    return np.argsort(_mix(_mix(numbers) ^ second), kind="stable").astype(np.int64, copy=False)


def network(at: NDArray[np.int64], count: int, *key: int | str) -> NDArray[np.int64]:
    """Entries `at` of a permutation of 0..count-1, int64 [n] -> [n], without making the others.

    An unbalanced Feistel network over the next power of two (Luby, Rackoff 1988), walked until the value is below
    `count` (Black, Rogaway 2002: cycle walking keeps a bijection a bijection); fewer than two steps on average.
    """
    bits = max(2, (count - 1).bit_length())
    low = np.uint64(bits // 2)
    high = np.uint64(bits - bits // 2)
    keys = _words(_ROUNDS, *key)
    value = at.astype(np.uint64)
    open_ = np.arange(len(value))
    while len(open_):
        x = value[open_]
        a, b = high, low  # bits of the upper and of the lower part; they change places every round
        for word in keys:
            upper, lower = x >> b, x & ((np.uint64(1) << b) - np.uint64(1))
            upper ^= _mix(lower * _GOLDEN + word) >> (np.uint64(64) - a)
            x = (lower << a) | upper
            a, b = b, a
        value[open_] = x
        open_ = open_[x >= np.uint64(count)]
    return value.astype(np.int64)


def permutation(count: int, *, seed: int, source: str, epoch: int) -> NDArray[np.int64]:
    """The order of `count` runs in an epoch, int64 [count]: entry p is the run at position p.

    Sorted keys up to 65,536 runs, a Feistel network above. Part of the meaning of every saved cursor: it may
    never change.
    """
    if count <= _SORTED:
        return shuffled(count, seed, source, epoch)
    return network(np.arange(count, dtype=np.int64), count, seed, source, epoch)


def run_size(samples: int) -> int:
    """Samples of a run for a source of that many: the largest power of two up to 64 that leaves 4,096 runs."""
    size = 1
    while size < RUN_SAMPLES and samples >= 2 * size * RUNS_WANTED:
        size *= 2
    return size


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Shuffled samples of one lane, source and epoch, without those of length 0.

    epoch, number: which block of the lane; samples: [n], ordinals in the source; sizes: [n], their tokens;
    passed: how many of length 0 were left out.
    """

    epoch: int
    number: int
    samples: NDArray[np.unsignedinteger | np.signedinteger]
    sizes: NDArray[np.unsignedinteger | np.signedinteger]
    passed: int


class SourceOrder:
    """Runs, epochs and blocks of one source, for every lane."""

    def __init__(
        self,
        name: str,
        lengths: ShardLengths,
        counts: NDArray[np.int64],
        *,
        seed: int,
        lanes: int,
        whole: bool = False,
        run: int | None = None,
        block: int | None = None,
        epochs: int | None = None,
    ) -> None:
        """counts: int64 [shards], samples of each; whole: a run is a shard; run, block: R and B, by rule if not given;
        epochs: how often the source is read, for ever if not given. Raises DataError if it holds no document."""
        self.name, self.seed, self.lanes, self.epochs = name, seed, lanes, epochs
        self._lengths, self._counts = lengths, np.asarray(counts, np.int64)
        total = int(self._counts.sum())
        self.run = 0 if whole else run or run_size(total)  # 0: the whole shard
        self.block_runs = block or (BLOCK_SHARDS if whole else BLOCK_RUNS)
        runs = (self._counts > 0).astype(np.int64) if whole else -(-self._counts // self.run)
        self._run_ends = np.cumsum(runs)
        self._run_starts = self._run_ends - runs
        self._offsets = np.cumsum(self._counts) - self._counts
        self.runs = int(self._run_ends[-1]) if len(runs) else 0
        self._sample_type = np.uint32 if total < 2**32 else np.int64
        self._orders: OrderedDict[int, NDArray[np.int32]] = OrderedDict()
        if not self._any_document():
            raise DataError(
                f"source {name!r} holds no document",
                where=f"source {name}",
                fix="check its shards and token lengths",
            )

    def _any_document(self) -> bool:
        counts = enumerate(self._counts.tolist())
        return any(bool(self._lengths.get(self.name, s, c).any()) for s, c in counts if c)

    def _runs_at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The runs at these positions of an epoch, int64 [n] -> [n]."""
        if self.runs > _SORTED:
            return network(positions, self.runs, self.seed, self.name, epoch)
        order = self._orders.get(epoch)
        if order is None:
            made = permutation(self.runs, seed=self.seed, source=self.name, epoch=epoch)
            order = self._orders[epoch] = made.astype(np.int32)
            # Lanes of a small source are in many epochs at once, those of a large one in two at most.
            while len(self._orders) > max(2, min(self.lanes + 1, 2**18 // self.runs)):
                self._orders.popitem(last=False)
        return order[positions].astype(np.int64)

    def _turns(self, lane: int, epoch: int) -> tuple[int, int]:
        """[first, stop) of the turns k at which P = lane + k·V lies in the epoch."""
        first = max(0, -((lane - epoch * self.runs) // self.lanes))
        return first, max(0, -((lane - (epoch + 1) * self.runs) // self.lanes))

    def blocks(self, lane: int, epoch: int) -> int:
        """Blocks of a lane in an epoch; 0 where a lane has no run of it, or beyond the last epoch."""
        if epoch < 0 or (self.epochs is not None and epoch >= self.epochs):
            return 0
        first, stop = self._turns(lane, epoch)
        return -(-(stop - first) // self.block_runs)

    def first_epoch(self, lane: int) -> int:
        """The epoch of the lane's first run."""
        return lane // self.runs

    def next_epoch(self, lane: int, epoch: int) -> int:
        """The next epoch in which the lane has a run."""
        return (lane + self._turns(lane, epoch)[1] * self.lanes) // self.runs

    def block(self, lane: int, epoch: int, number: int) -> Block:
        """Block `number` of a lane in an epoch. Raises ValueError if there is none."""
        blocks = self.blocks(lane, epoch)
        if not 0 <= number < blocks:
            raise ValueError(f"source {self.name!r} has no block {number} of epoch {epoch} in lane {lane}")
        first, stop = self._turns(lane, epoch)
        turns = stop - first
        low, high = first + turns * number // blocks, first + turns * (number + 1) // blocks
        positions = lane + np.arange(low, high, dtype=np.int64) * self.lanes - epoch * self.runs
        runs = self._runs_at(epoch, positions)
        shards = np.searchsorted(self._run_ends, runs, side="right")
        counts = self._counts[shards]
        starts = (runs - self._run_starts[shards]) * self.run
        stops = np.minimum(starts + self.run, counts) if self.run else counts
        get, name = self._lengths.get, self.name
        rows = zip(shards.tolist(), counts.tolist(), starts.tolist(), stops.tolist())
        sizes = np.concatenate([get(name, s, c)[a:b] for s, c, a, b in rows])
        spans = stops - starts
        base = self._offsets[shards] + starts - (np.cumsum(spans) - spans)
        samples = np.repeat(base, spans) + np.arange(len(sizes))
        order = shuffled(len(sizes), self.seed, name, epoch, lane, number)
        sizes = sizes[order]
        order = order[sizes > 0] if not sizes.all() else order
        sizes = sizes[sizes > 0]
        kind = np.uint32 if not len(sizes) or int(sizes.max()) < 2**32 else np.int64
        passed = len(samples) - len(order)
        return Block(epoch, number, samples[order].astype(self._sample_type), sizes.astype(kind), passed)


class Orders:
    """The orders of all sources of a job by their index in `names`; one is made when it is first asked for."""

    def __init__(
        self,
        lengths: Lengths,
        *,
        seed: int,
        lanes: int,
        run: int | None = None,
        block: int | None = None,
        epochs: int | None = None,
    ) -> None:
        """As for `SourceOrder`; the sources are numbered in alphabetical order."""
        self.names = sorted(lengths.names)
        self._lengths, self._shards = lengths, ShardLengths(lengths)
        self._made: dict[int, SourceOrder] = {}
        self._seed, self._lanes, self._run, self._block, self._epochs = seed, lanes, run, block, epochs

    def get(self, source: int) -> SourceOrder:
        """Raises ValueError if no source has that number, DataError if it holds no document."""
        if source not in self._made:
            if not 0 <= source < len(self.names):
                raise ValueError(f"no source has number {source}")
            name = self.names[source]
            self._made[source] = SourceOrder(
                name,
                self._shards,
                self._lengths.counts(name),
                seed=self._seed,
                lanes=self._lanes,
                whole=self._lengths.whole(name),
                run=self._run,
                block=self._block,
                epochs=self._epochs,
            )
        return self._made[source]


class SourceCursor:
    """Where one lane stands in a source. State: (epoch, block, offset in it, passed, ended)."""

    def __init__(self, order: SourceOrder, lane: int) -> None:
        self.order, self.lane = order, lane
        self.epoch = order.first_epoch(lane)
        self.number = 0
        self.ended = order.blocks(lane, self.epoch) == 0
        self._passed = 0  # in the blocks left behind
        self._block: Block | None = None
        self._first = self._at = 0
        self._sizes: list[int] = []

    @property
    def offset(self) -> int:
        """Samples drawn from the present block."""
        return self._first + self._at

    @property
    def passed(self) -> int:
        """Samples of length 0 passed over, counted when their block is left."""
        return self._passed

    def draw(self) -> tuple[Block, int, int] | None:
        """The next document as (block, offset in it, tokens > 0); None when the last epoch is over."""
        if self._at == len(self._sizes) and not self._load():
            return None
        at = self._at
        self._at = at + 1
        assert self._block is not None
        return self._block, self._first + at, self._sizes[at]

    def _load(self) -> bool:
        """Lists the next lengths, opening the next block at the end of one; False at the end of the data."""
        while not self.ended:
            if self._block is None:
                self._block = self.order.block(self.lane, self.epoch, self.number)
            first = self._first + self._at
            if first < len(self._block.sizes):
                self._first, self._at = first, 0
                self._sizes = self._block.sizes[first : first + _CHUNK].tolist()
                return True
            self._leave(self._block)
        return False

    def _leave(self, block: Block) -> None:
        """Steps to the next block of the lane, or ends."""
        self._passed += block.passed
        if self.number + 1 < self.order.blocks(self.lane, self.epoch):
            epoch, number = self.epoch, self.number + 1
        else:
            epoch, number = self.order.next_epoch(self.lane, self.epoch), 0
            if self.order.blocks(self.lane, epoch) == 0:
                self.ended = True
                return
        self.epoch, self.number, self._block = epoch, number, None
        self._first = self._at = 0
        self._sizes = []

    def seek(self, block: Block, *, offset: int, passed: int, ended: bool) -> None:
        """Stands `offset` samples into `block`, as a cursor did before. Raises ValueError if it cannot."""
        if not 0 <= offset <= len(block.sizes) or passed < 0 or (ended and offset < len(block.sizes)):
            raise ValueError(f"offset {offset} of source {self.order.name!r} is outside its block")
        self.epoch, self.number, self._block = block.epoch, block.number, block
        self._first, self._at, self._sizes = offset, 0, []
        self._passed, self.ended = passed, ended
