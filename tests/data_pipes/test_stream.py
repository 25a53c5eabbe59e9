"""The stream as a trainer uses it: batches for any number of ranks, cursors of steps taken (law 3)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ringweave.data_pipes.pack import Pack, PackPlan, Piece, packs_for_rank
from ringweave.data_pipes.planner import PackPlanner, audit
from ringweave.data_pipes.stream import PackStream
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import Document, Segment

WEIGHTS = {"text": 0.7, "image": 0.3}


class Made:
    """Documents by arithmetic: token t of sample s is 1000·s + t."""

    def __init__(self, *, count: int = 17) -> None:
        self.lengths: dict[str, NDArray[np.int64]] = {
            "text": np.asarray([i * i % 23 for i in range(count)], np.int64),  # some are empty
            "image": np.asarray([9 + i % 4 * 20 for i in range(count // 2)], np.int64),
        }
        self.digest = hashlib.sha256(str(count).encode()).hexdigest()
        self.read: list[Piece] = []

    def document(self, piece: Piece, /) -> Document:
        self.read.append(piece)
        length = int(self.lengths[piece.source][piece.sample])
        ids = np.arange(length, dtype=np.int32) + 1000 * piece.sample
        return Document(
            f"{piece.source}-{piece.sample}", (Segment(ids, piece.source, np.zeros((length, 4), np.int32)),)
        )


def stream(corpus: Made, *, seed: int = 5, context: int = 32) -> PackStream:
    return PackStream(
        corpus, PackPlanner(lengths=corpus.lengths, weights=WEIGHTS, seed=seed, context=context, bins=3)
    )


def pieces(plans: list[PackPlan]) -> list[tuple[int, list[Piece]]]:
    return [(p.index, list(p.pieces)) for p in plans]


def run(
    *, steps: int, batch: int, kills: list[int], ahead: int, switch_at: int
) -> list[tuple[int, list[Piece]]]:
    """Trains `steps` steps, checkpointing every 3rd; `ahead` batches are always prepared in advance.

    Each kill throws everything away but the last checkpoint. Returns what the kept steps consumed.
    """
    corpus = Made()
    saved: tuple[int, str | None] = (0, None)
    consumed: dict[int, list[tuple[int, list[Piece]]]] = {}
    kills = sorted(kills)
    while True:
        step, text = saved
        source = stream(corpus) if text is None else PackStream.restore(corpus, json.loads(text), seed=5)
        if step == switch_at:
            source.switch(context=50, weights={"text": 0.2, "image": 0.8})
        queue: list[Any] = []
        while step < steps:
            stage_end = switch_at if step < switch_at else steps
            while len(queue) <= ahead and step + len(queue) < stage_end:
                queue.append(source.next_batch(batch))
            ready = queue.pop(0)
            consumed[step] = pieces(ready.plans)
            step += 1
            if step % 3 == 0 or step == switch_at:
                saved = (step, json.dumps(ready.state_after))
            if kills and step == kills[0]:
                kills.pop(0)
                break
            if step == switch_at:
                source.switch(context=50, weights={"text": 0.2, "image": 0.8})
        else:
            return [pack for s in range(steps) for pack in consumed[s]]


@settings(max_examples=25, deadline=None)
@given(
    kills=st.lists(st.integers(1, 19), max_size=4, unique=True),
    ahead=st.integers(0, 3),
    switch_at=st.integers(1, 19),
    batch=st.integers(1, 4),
)
def test_killed_runs_consume_exactly_what_an_unbroken_one_does(
    kills: list[int], ahead: int, switch_at: int, batch: int
) -> None:
    reference = run(steps=20, batch=batch, kills=[], ahead=0, switch_at=switch_at)
    resumed = run(steps=20, batch=batch, kills=kills, ahead=ahead, switch_at=switch_at)
    assert resumed == reference
    assert [index for index, _ in resumed] == list(range(20 * batch))
    assert audit(resumed, reference) == {"samples_lost": 0, "samples_repeated": 0}


def test_a_cursor_of_batches_prepared_but_not_trained_on_would_lose_samples() -> None:
    """Why the cursor belongs to the batch: the stream's own state is that of production."""
    reference = pieces(stream(Made()).plans(16))
    source = stream(Made())
    first, second = source.next_batch(4), source.next_batch(4)
    right = pieces(first.plans) + pieces(PackStream.restore(Made(), first.state_after).plans(12))
    wrong = pieces(first.plans) + pieces(PackStream.restore(Made(), source.state()).plans(8))
    assert right == reference
    assert pieces(second.plans) == reference[4:8]
    assert audit(wrong, reference)["samples_lost"] > 0


def test_every_number_of_ranks_reads_the_same_batch_and_only_its_own_packs() -> None:
    whole: list[Pack] = []
    for dp in (1, 2, 3, 6):
        packs: list[Pack] = []
        for rank in range(dp):
            corpus = Made()
            source = stream(corpus)
            source.next_batch(6)
            assert corpus.read == [], "planning reads no tokens"
            plans = source.next_batch(6).plans
            mine = [plans[i] for i in packs_for_rank(0, 6, rank, dp)]
            packs += [source.materialise(p) for p in mine]
            assert corpus.read == [piece for p in mine for piece in p.pieces]
        whole = whole or packs
        for ours, one in zip(packs, whole, strict=True):
            assert ours.plan == one.plan
            np.testing.assert_array_equal(ours.ids, one.ids)
            np.testing.assert_array_equal(ours.targets, one.targets)


def test_materialising_does_not_move_the_stream() -> None:
    source = stream(Made())
    plans = source.plans(3)
    before = json.dumps(source.state())
    pack = source.materialise(plans[1])
    assert json.dumps(source.state()) == before
    piece = plans[1].pieces[0]
    assert pack.ids[: len(piece)].tolist() == [1000 * piece.sample + t for t in range(piece.start, piece.end)]


def test_a_state_is_not_changed_by_what_follows() -> None:
    source = stream(Made())
    batch = source.next_batch(3)
    text = json.dumps(batch.state_after)
    source.plans(10)
    source.switch(context=40)
    source.plans(10)
    assert json.dumps(batch.state_after) == text


def test_restore_refuses_another_corpus_and_malformed_cursors() -> None:
    source = stream(Made())
    source.plans(3)
    state = source.state()
    with pytest.raises(DataError, match="data changed"):
        PackStream.restore(Made(count=18), state)
    with pytest.raises(DataError, match="seed"):
        PackStream.restore(Made(), state, seed=6)
    for bad in ({"planner": state["planner"]}, {**state, "extra": 1}, [], {**state, "planner": {}}):
        with pytest.raises(DataError):
            PackStream.restore(Made(), bad)  # type: ignore[arg-type]
