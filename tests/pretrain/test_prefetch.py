"""Batches prepared ahead: in order, bounded, with their errors where they belong, and soon gone when stopped."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.stream import PackStream
from ringweave.pretrain.batch_reader import BatchReader, ReadyBatch
from ringweave.pretrain.prefetch import Prefetcher, Stopped
from ringweave.pretrain.synthetic import SyntheticCorpus
from ringweave.tokenizers.errors import DataError


class Counting:
    """Gives 0, 1, 2, ...; slow, failing or blocking on demand."""

    def __init__(self, *, seconds: float = 0.0, fail_at: int = -1) -> None:
        self.made, self.seconds, self.fail_at = 0, seconds, fail_at

    def __call__(self, stop: threading.Event) -> int | None:
        if stop.wait(self.seconds):
            return None
        if self.made == self.fail_at:
            raise DataError("batch 3 is bad")
        self.made += 1
        return self.made - 1


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_batches_come_in_order_and_at_most_so_many_are_made_ahead(depth: int) -> None:
    produce = Counting()
    source = Prefetcher(produce, depth=depth)
    for n in range(20):
        assert source.next() == n
        if n % 7 == 0:
            time.sleep(0.05)
            assert produce.made <= n + 1 + depth
    assert source.stop(timeout=5)
    with pytest.raises(Stopped):
        source.next()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_at_its_own_step_and_stays(depth: int) -> None:
    source = Prefetcher(Counting(fail_at=3), depth=depth)
    assert [source.next() for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(DataError, match="batch 3"):
            source.next()
    assert source.stop(timeout=5)


@pytest.mark.parametrize("depth", [0, 2])
def test_a_limit_ends_production(depth: int) -> None:
    produce = Counting()
    source = Prefetcher(produce, depth=depth, limit=4)
    assert [source.next() for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(Stopped):
        source.next()
    assert source.stop(timeout=5)
    assert produce.made == 4


def test_stop_ends_a_batch_under_way_and_calls_once_more_for_the_peers() -> None:
    seen: list[bool] = []

    def produce(stop: threading.Event) -> int | None:
        seen.append(stop.is_set())
        return None if stop.wait(10 if len(seen) == 3 else 0) else len(seen)

    source = Prefetcher(produce, depth=2)
    source.next()
    time.sleep(0.1)
    began = time.monotonic()
    assert source.stop(timeout=5)
    assert time.monotonic() - began < 2
    idle = Prefetcher(Counting(), depth=1)
    time.sleep(0.05)
    flags: list[bool] = []
    idle._produce = lambda stop: flags.append(stop.is_set())  # type: ignore[assignment]
    assert idle.stop(timeout=5)
    assert flags == [True], "a thread that waits for room takes part once, so that nobody waits for it"


def test_a_thread_that_does_not_end_is_said_to_and_holds_nothing_up() -> None:
    release = threading.Event()
    source: Prefetcher[int] = Prefetcher(lambda stop: release.wait(10) and None, depth=1)  # type: ignore[arg-type]
    began = time.monotonic()
    assert not source.stop(timeout=0.1)
    assert time.monotonic() - began < 2
    release.set()


def test_waits_are_measured() -> None:
    slow = Prefetcher(Counting(seconds=0.2), depth=1)
    slow.next()
    assert 0.1 < slow.waited < 5
    assert slow.share_waited(slow.waited * 4) == pytest.approx(0.25)
    time.sleep(0.5)
    slow.next()
    assert slow.waited < 0.15, "it was prepared meanwhile"
    assert slow.waited_total >= 0.1
    assert slow.share_waited(0.0) == 0.0
    slow.stop()


def reader(state: dict[str, Any] | None = None) -> BatchReader:
    corpus = SyntheticCorpus(vocab=50)
    if state is not None:
        return BatchReader(PackStream.restore(corpus, state), count=2, mine=range(2))
    planner = PackPlanner(lengths=corpus.lengths, weights={"text": 2.0, "image": 1.0}, seed=5, context=64)
    return BatchReader(PackStream(corpus, planner), count=2, mine=range(2))


@pytest.mark.parametrize(("first", "second"), [(0, 3), (3, 0), (2, 1)])
def test_batches_made_ahead_are_made_again_after_a_restart(first: int, second: int) -> None:
    """Kill after step n with batches ready: the cursor of the last one trained on loses and repeats none."""

    def names(batch: ReadyBatch) -> list[Any]:
        return [plan.to_json() for plan in batch.plans]

    plain = Prefetcher(reader(), depth=0)
    reference = [names(plain.next()) for _ in range(12)]
    source = Prefetcher(reader(), depth=first)
    taken = [source.next() for _ in range(5)]
    time.sleep(0.1)
    source.stop()
    resumed = Prefetcher(reader(json.loads(json.dumps(taken[-1].state_after))), depth=second)
    rest = [names(resumed.next()) for _ in range(7)]
    resumed.stop()
    assert [names(b) for b in taken] + rest == reference
