"""Finite data ends with one filled-up batch, on every rank at the same step, and nobody waits for anybody."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ringweave.data_pipes.pack import Pack, Piece, packs_for_rank
from ringweave.data_pipes.planner import EndOfData, PackPlanner
from ringweave.data_pipes.stream import PackStream
from ringweave.pretrain.batch_reader import BatchReader
from ringweave.pretrain.data_exchange import DocumentExchange, Gather, Outcome
from ringweave.pretrain.prefetch import Prefetcher, Stopped
from ringweave.pretrain.synthetic import SyntheticCorpus

COUNT = 4


class Meeting:
    """Threads that stand for ranks: `gather(r)` is that of rank r, all meet at each call."""

    def __init__(self, size: int) -> None:
        self.size, self.said = size, [b""] * size
        self.barrier = threading.Barrier(size)

    def gather(self, rank: int) -> Gather:
        meeting = self

        class Met(Gather):
            def __call__(self, data: bytes, *, tag: int = 0) -> list[bytes]:
                meeting.said[rank] = data
                meeting.barrier.wait(20)
                answers = list(meeting.said)
                meeting.barrier.wait(20)
                return answers

        return Met(rank=rank, size=self.size)


def stream(*, epochs: int = 1) -> PackStream:
    corpus = SyntheticCorpus(vocab=50, count=30)
    planner = PackPlanner(
        lengths=corpus.lengths, weights={"text": 2.0, "image": 1.0}, seed=5, context=128, batch=COUNT,
        lanes=3, bins=2, epochs=epochs,
    )  # fmt: skip
    return PackStream(corpus, planner)


def reader(rank: int = 0, size: int = 1, *, everyone: Gather | None = None, epochs: int = 1) -> BatchReader:
    mine = packs_for_rank(0, COUNT, rank, size)
    return BatchReader(stream(epochs=epochs), count=COUNT, mine=mine, everyone=everyone)


def read_all(source: Prefetcher[Any]) -> list[Any]:
    batches = []
    while True:
        try:
            batches.append(source.next())
        except Stopped:
            return batches


@pytest.mark.parametrize("depth", [0, 3])
def test_every_token_of_every_epoch_comes_once_and_the_last_batch_is_filled_up(depth: int) -> None:
    made = reader(epochs=2)
    source = Prefetcher(made, depth=depth)
    batches = read_all(source)
    for _ in range(2):
        with pytest.raises(Stopped):
            source.next()
    assert made.ended
    assert made(threading.Event()) is None
    assert source.stop(timeout=5)
    tokens: Counter[tuple[str, int, int]] = Counter()
    for batch in batches:
        assert len(batch.plans) == len(batch.packs) == COUNT
        for piece in (p for plan in batch.plans for p in plan.pieces):
            tokens[piece.source, piece.epoch, piece.sample] += len(piece)
    lengths = made.stream.corpus.lengths
    assert isinstance(lengths, dict)
    assert tokens == {(n, e, i): x for n, a in lengths.items() for e in range(2) for i, x in enumerate(a)}
    empty: list[Pack] = [p for p in batches[-1].packs if not p.plan.pieces]
    assert empty, "the sizes of this test leave room in the last batch"
    for pack in empty:
        assert len(pack.doc) == 128
        assert (pack.doc == -1).all() and (pack.targets == -1).all() and not pack.weights.any()


def test_a_run_resumed_after_the_last_batch_ends_at_once() -> None:
    batches = read_all(Prefetcher(reader(), depth=0))
    corpus = SyntheticCorpus(vocab=50, count=30)
    again = BatchReader(PackStream.restore(corpus, batches[-1].state_after), count=COUNT, mine=range(COUNT))
    assert again(threading.Event()) is None
    assert again.ended
    before = PackStream.restore(corpus, batches[-2].state_after)
    last = BatchReader(before, count=COUNT, mine=range(COUNT))(threading.Event())
    assert last is not None
    assert last.plans == batches[-1].plans
    assert last.state_after == batches[-1].state_after


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_end_at_the_same_step(size: int) -> None:
    meeting = Meeting(size)

    def rank(number: int) -> int:
        made = reader(number, size, everyone=meeting.gather(number))
        steps = len(read_all(Prefetcher(made, depth=number % 3)))
        return steps if made.ended else -1

    with ThreadPoolExecutor(size) as threads:
        steps = list(threads.map(rank, range(size)))
    assert steps == [len(read_all(Prefetcher(reader(), depth=0)))] * size


def test_a_rank_that_stops_where_the_others_end_is_told_and_holds_nobody_up() -> None:
    meeting, steps = Meeting(2), len(read_all(Prefetcher(reader(), depth=0)))

    def rank(number: int) -> tuple[Any, bool]:
        made, stop = reader(number, 2, everyone=meeting.gather(number)), threading.Event()
        for _ in range(steps):
            assert made(stop) is not None
        if number == 0:
            stop.set()
        return made(stop), made.ended

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(rank, range(2))) == [(None, True)] * 2


def test_a_rank_that_stops_before_the_end_has_not_ended() -> None:
    meeting = Meeting(2)

    def rank(number: int) -> tuple[Any, bool]:
        made, stop = reader(number, 2, everyone=meeting.gather(number)), threading.Event()
        assert made(stop) is not None
        if number == 0:
            stop.set()
        return made(stop), made.ended

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(rank, range(2))) == [(None, False)] * 2


def test_ranks_of_one_data_group_end_together() -> None:
    """Also where one of them stops at the same moment: the end is the same on all of them."""
    meeting = Meeting(3)

    def rank(number: int) -> Outcome:
        exchange = DocumentExchange(rank_in_group=number, size=3)
        exchange.gather = meeting.gather(number)
        stops = number == 1
        return exchange.share(
            [], lambda some: pytest.fail("nothing is to be made"), stopping=stops, ended=not stops
        )

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(rank, range(3))) == [Outcome([], ended=True)] * 3


def test_the_stream_itself_says_that_it_ended() -> None:
    made = stream()
    pieces: Counter[Piece] = Counter()
    steps = len(read_all(Prefetcher(reader(), depth=0)))
    for _ in range(steps):
        batch = made.next_batch(COUNT)
        assert len(batch.plans) == COUNT
        pieces += PackPlanner.consumed(batch.plans)
    with pytest.raises(EndOfData):
        made.next_batch(COUNT)
    assert max(pieces.values()) == 1
    lengths = made.corpus.lengths
    assert isinstance(lengths, dict)
    assert sum(len(p) for p in pieces) == sum(int(np.sum(x)) for x in lengths.values())
