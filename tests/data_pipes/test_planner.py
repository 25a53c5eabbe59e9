"""The plan of packs: no document lost or repeated, the same on every machine, exact after a restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ringweave.data_pipes.lengths import Table
from ringweave.data_pipes.mixture import Mixture
from ringweave.data_pipes.order import Orders, SourceCursor
from ringweave.data_pipes.pack import PackPlan, Piece, packs_for_rank
from ringweave.data_pipes.planner import EndOfData, PackPlanner, audit, plan_once
from ringweave.tokenizers.errors import DataError

Lengths = dict[str, NDArray[np.int64]]
Document = tuple[str, int, int, int]
WEIGHTS = {"text": 0.5, "image": 0.25, "video": 0.25}
#: Lanes, batch and steps of a window, small enough for a few dozen packs to see ends, edges and flushes.
SHAPES = st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3]), st.sampled_from([0, 1, 2, 4]))


def numbers(count: int, *, seed: int) -> NDArray[np.int64]:
    """Pseudo-random numbers below 2^31 that no library version can change (MINSTD)."""
    out, x = [], seed * 7919 + 17
    for _ in range(count):
        x = x * 48271 % 0x7FFFFFFF
        out.append(x)
    return np.asarray(out, np.int64)


def corpus(seed: int, *, longest: int = 60) -> Lengths:
    """Three sources of 23, 11 and 5 documents, 0 to `longest` tokens; video may need splitting."""
    return {
        "text": numbers(23, seed=seed) % (longest // 2),
        "image": 1 + numbers(11, seed=seed + 1) % (longest // 3),
        "video": 1 + numbers(5, seed=seed + 2) % (2 * longest),
    }


def planner(
    lengths: Lengths, *, seed: int = 3, context: int = 32, bins: int = 3, **options: Any
) -> PackPlanner:
    return PackPlanner(lengths=lengths, weights=WEIGHTS, seed=seed, context=context, bins=bins, **options)


def shaped(lengths: Lengths, shape: tuple[int, int, int], **options: Any) -> PackPlanner:
    """A planner of these lanes, this batch, and a window of so many steps."""
    lanes, batch, steps = shape
    return planner(lengths, lanes=lanes, batch=batch, window=steps * batch, **options)


def take(plan: PackPlanner, count: int) -> list[PackPlan]:
    return [plan.next() for _ in range(count)]


def drawn_documents(
    lengths: Lengths, weights: Mapping[str, float], *, seed: int, lane: int, lanes: int
) -> Iterable[Document]:
    """(source, epoch, sample, length) of a lane in the order of its mixture, written without the planner."""
    orders, mixture = Orders(Table(lengths), seed=seed, lanes=lanes), Mixture(weights)
    cursors = [SourceCursor(orders.get(orders.names.index(name)), lane) for name in mixture.names]
    while True:
        which = mixture.next()
        document = cursors[which].draw()
        assert document is not None
        block, offset, size = document
        mixture.add(which, size)
        yield mixture.names[which], block.epoch, int(block.samples[offset]), size


def assert_whole(pieces: Iterable[Piece], documents: Iterable[Document]) -> None:
    """The pieces are those documents, each token exactly once."""
    parts: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for p in pieces:
        parts.setdefault((p.source, p.epoch, p.sample), []).append((p.start, p.end))
    documents = list(documents)
    assert set(parts) == {d[:3] for d in documents}
    assert len(documents) == len(parts)
    for source, epoch, sample, size in documents:
        spans = sorted(parts[source, epoch, sample])
        assert [s for s, _ in spans] == [0, *(e for _, e in spans[:-1])], "gap or overlap"
        assert spans[-1][1] == size


def pieces_of(packs: Iterable[PackPlan]) -> list[Piece]:
    return [piece for pack in packs for piece in pack.pieces]


# --- packs ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    context=st.integers(1, 80),
    bins=st.integers(1, 9),
    count=st.integers(1, 80),
    shape=SHAPES,
)
def test_packs_hold_the_drawn_documents_exactly_once(
    seed: int, context: int, bins: int, count: int, shape: tuple[int, int, int]
) -> None:
    lengths = corpus(seed)
    plan = shaped(lengths, shape, seed=seed, context=context, bins=bins)
    packs = take(plan, count)
    assert [p.index for p in packs] == list(range(count))
    assert all(0 < p.tokens <= context == p.context for p in packs)
    for piece in pieces_of(packs):  # only what is longer than the context is split
        assert len(piece) == context or piece.end == lengths[piece.source][piece.sample]
    assert all(len(lane.bins.packs) <= bins for lane in plan._lanes)
    documents: list[Document] = []
    for lane in plan._lanes:
        source = drawn_documents(lengths, WEIGHTS, seed=seed, lane=lane.number, lanes=shape[0])
        documents += islice(source, lane.drawn)
    assert_whole(pieces_of(packs) + plan.waiting(), documents)
    drawn = Counter()
    for name, *_, size in documents:
        drawn[name] += size
    assert plan.tokens == {name: drawn[name] for name in sorted(WEIGHTS)}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    shape=SHAPES,
    context=st.integers(8, 90),
    epochs=st.integers(1, 3),
    shards=st.integers(1, 4),
)
def test_finite_data_is_emitted_whole_and_ends_on_a_full_batch(
    seed: int, shape: tuple[int, int, int], context: int, epochs: int, shards: int
) -> None:
    lengths = corpus(seed)
    batch = 2 * shape[1]
    plan = PackPlanner(
        lengths={name: np.array_split(x, shards) for name, x in lengths.items()}, weights=WEIGHTS, seed=seed,
        context=context, lanes=shape[0], batch=batch, window=shape[2] * batch, bins=3, epochs=epochs,
    )  # fmt: skip
    packs: list[PackPlan] = []
    while (step := plan.plans(batch)) is not None:
        assert len(step) == batch
        packs += step
    assert plan.plans(batch) is None
    with pytest.raises(EndOfData):
        plan.next()
    assert plan.waiting() == []
    documents = [
        (n, e, i, int(x))
        for n, array in lengths.items()
        for e in range(epochs)
        for i, x in enumerate(array)
        if x
    ]
    assert_whole(pieces_of(packs), documents)
    assert [p.index for p in packs] == list(range(len(packs)))
    empty = [bool(p.pieces) for p in packs].count(False)
    assert empty < batch and all(p.pieces for p in packs[: len(packs) - empty]), "padding comes last"
    assert plan.passed == {n: epochs * int((x == 0).sum()) for n, x in sorted(lengths.items())}
    for dp in (d for d in (1, 2) if batch % d == 0):  # every rank ends on the same step
        steps = [len(packs_for_rank(0, batch, rank, dp)) * (len(packs) // batch) for rank in range(dp)]
        assert len(set(steps)) == 1


@pytest.mark.parametrize("lanes", [1, 3, 4])
def test_packs_come_from_the_lanes_in_turn(lanes: int) -> None:
    """Pack n holds samples of lane n mod V alone, and V does not depend on who reads them."""
    lengths = corpus(8)
    orders = Orders(Table(lengths), seed=3, lanes=lanes)
    owner: dict[tuple[str, int, int], int] = {}
    for source, name in enumerate(sorted(lengths)):
        for lane in range(lanes):
            cursor = SourceCursor(orders.get(source), lane)
            for _ in range(200):
                document = cursor.draw()
                assert document is not None
                owner[name, document[0].epoch, int(document[0].samples[document[1]])] = lane
    for number, pack in enumerate(take(planner(lengths, lanes=lanes), 60)):
        assert {owner[p.source, p.epoch, p.sample] for p in pack.pieces} == {number % lanes}


def test_shares_are_reported_against_their_target() -> None:
    lengths = {"a": np.full(500, 10, np.int64), "b": np.full(50, 10, np.int64), "c": np.full(9, 10, np.int64)}
    weights = {"a": 0.9, "b": 0.1, "c": 0.0}
    plan = PackPlanner(lengths=lengths, weights=weights, seed=1, context=100, lanes=2)
    take(plan, 300)
    assert plan.shares() == {
        "a": (0.9, pytest.approx(0.9, abs=0.005)),
        "b": (0.1, pytest.approx(0.1, abs=0.005)),
    }
    plan.switch(context=100, temperature=2.0)
    take(plan, 300)
    for target, drawn in plan.shares().values():
        assert drawn == pytest.approx(target, abs=0.005)
    assert plan.shares()["a"][0] == pytest.approx(0.75, abs=1e-5)


def test_more_ranks_than_shards_all_get_packs_every_step() -> None:
    """Three shards, eight ranks: data belong to lanes and packs, so no rank runs dry."""
    lengths = {"a": [1 + numbers(40, seed=s) % 20 for s in range(3)]}
    plan = PackPlanner(lengths=lengths, weights={"a": 1.0}, seed=1, context=40, batch=8, epochs=2)
    steps = list(iter(partial(plan.plans, 8), None))
    assert all(len(step) == 8 for step in steps)
    assert all(p.pieces for step in steps[:-1] for p in step)
    assert Counter((p.epoch, p.sample) for step in steps for p in pieces_of(step)) == Counter(
        (e, s) for e in range(2) for s in range(120)
    )


Stage = tuple[int, int, int, float, int, int]
STAGES = st.lists(
    st.tuples(
        st.integers(4, 150), st.integers(1, 6), st.integers(0, 15), st.sampled_from([0.0, 0.2, 3.0]),
        st.integers(1, 3), st.integers(0, 3),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def enter(plan: PackPlanner, stage: Stage) -> None:
    context, bins, _, video, batch, steps = stage
    plan.switch(
        context=context, weights={**WEIGHTS, "video": video}, bins=bins, batch=batch, window=steps * batch
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), shape=SHAPES, stages=STAGES)
def test_stage_switches_lose_and_repeat_nothing(
    seed: int, shape: tuple[int, int, int], stages: list[Stage]
) -> None:
    lengths = corpus(seed)
    plan = shaped(lengths, shape, seed=seed)
    packs = take(plan, 5)
    for stage in stages:
        before = Counter(plan.waiting())
        enter(plan, stage)
        assert Counter(plan.waiting()) == before
        for lane in plan._lanes:
            assert lane.bins.packs == []
            order = [(piece[0], piece[4]) for piece in lane.pending]
            assert order == sorted(order), "handed back in the order of the draw"
        drawn = [lane.drawn for lane in plan._lanes]
        for _ in range(stage[2]):
            packs.append(plan.next())
            for lane, old in zip(plan._lanes, drawn):
                if lane.drawn > old:  # a new document only once every old piece has its place
                    assert all(piece[0] >= old for piece in lane.pending)
    assert plan.lanes == shape[0]
    assert [p.index for p in packs] == list(range(len(packs)))
    pieces = pieces_of(packs) + plan.waiting()
    documents = {(p.source, p.epoch, p.sample) for p in pieces}
    assert len(documents) == sum(lane.drawn for lane in plan._lanes)
    assert_whole(pieces, [(*d, int(lengths[d[0]][d[2]])) for d in documents])
    for source, name in enumerate(sorted(lengths)):  # and they are the ones its order lists
        expected = set()
        for lane in plan._lanes:
            fresh = SourceCursor(plan._orders.get(source), lane.number)
            now = lane.cursors.get(source, fresh)
            while (fresh.epoch, fresh.number, fresh.offset) != (now.epoch, now.number, now.offset):
                document = fresh.draw()
                assert document is not None
                expected.add((name, document[0].epoch, int(document[0].samples[document[1]])))
        assert {d for d in documents if d[0] == name} == expected


# --- restarts ---------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    shape=SHAPES,
    before=st.integers(0, 60),
    stages=STAGES,
    epochs=st.sampled_from([None, 1, 2, 4]),
    step=st.integers(1, 4),
)
def test_a_run_killed_anywhere_goes_on_with_the_same_packs(
    seed: int, shape: tuple[int, int, int], before: int, stages: list[Stage], epochs: int | None, step: int
) -> None:
    """Inside a window, at a stage change, at the end of an epoch or of the data: restoring changes nothing."""
    lengths = corpus(seed)
    plan = shaped(lengths, shape, seed=seed, epochs=epochs)
    plan.plans(before)
    again: PackPlanner | None = None
    for stage in [None, *stages]:
        if stage is not None:
            assert again is not None
            enter(plan, stage)
            enter(again, stage)  # a restored planner enters the stage as one that never stopped
            assert json.dumps(again.state()) == json.dumps(plan.state())
        text = json.dumps(plan.state())
        again = PackPlanner.restore(json.loads(text), lengths=lengths, seed=seed)
        assert json.dumps(again.state()) == text, "loading and saving changes the state"
        told = ("passed", "tokens", "index", "context", "window", "batch", "lanes")
        assert [getattr(again, name) for name in told] == [getattr(plan, name) for name in told]
        assert again.shares() == plan.shares()
        assert Counter(again.waiting()) == Counter(plan.waiting())
        for _ in range(3 if stage is None else stage[2]):
            assert again.plans(step) == plan.plans(step)
        assert json.dumps(again.state()) == json.dumps(plan.state())
    assert again is not None
    assert [again.plans(step) for _ in range(30)] == [plan.plans(step) for _ in range(30)]


def test_every_batch_of_a_mixture_can_be_resumed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """From step 0, across exact ends of epochs, with anchors on the way, to the end of the data."""
    monkeypatch.setattr("ringweave.data_pipes.planner._ANCHOR", 9)
    lengths = corpus(7)
    for window in (0, 8):
        plan = planner(lengths, lanes=3, batch=4, window=window, epochs=3)
        states, steps = [json.dumps(plan.state())], []
        while (step := plan.plans(4)) is not None:
            steps.append(step)
            states.append(json.dumps(plan.state()))
        assert len({json.loads(s)["raw"] for s in states}) > 3, "several anchors"
        for at, text in enumerate(states):
            again = PackPlanner.restore(json.loads(text), lengths=lengths)
            assert list(iter(partial(again.plans, 4), None)) == steps[at:]


def test_a_state_is_not_changed_by_what_follows() -> None:
    plan = planner(corpus(2), lanes=2, batch=2, window=4)
    take(plan, 7)
    state = plan.state()
    text = json.dumps(state)
    take(plan, 30)
    plan.switch(context=50, window=0)
    take(plan, 5)
    assert json.dumps(state) == text


def test_plans_depend_neither_on_dict_order_nor_on_hash_randomisation() -> None:
    lengths = corpus(5)
    other = PackPlanner(
        lengths=dict(reversed(lengths.items())),
        weights=dict(reversed(WEIGHTS.items())),
        seed=3,
        context=32,
        bins=3,
    )
    packs = take(planner(lengths), 50)
    assert take(other, 50) == packs
    code = (
        "import json, sys, numpy as np; from ringweave.data_pipes.planner import PackPlanner;"
        "a = json.loads(sys.argv[1]); l = {k: np.asarray(v) for k, v in a['lengths'].items()};"
        "p = PackPlanner(lengths=l, weights=a['weights'], seed=3, context=32, bins=3);"
        "print(json.dumps([p.next().to_json() for _ in range(50)])); print(json.dumps(p.state()))"
    )
    job = json.dumps({"lengths": {k: v.tolist() for k, v in lengths.items()}, "weights": WEIGHTS})
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, job],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert [PackPlan.from_json(p) for p in json.loads(outputs[0].splitlines()[0])] == packs


@pytest.mark.parametrize(("context", "bins"), [(4096, 32), (4096, 8), (32768, 8)])
def test_packs_are_full_and_shares_are_kept(context: int, bins: int) -> None:
    uniform = numbers(60_000, seed=1) / 0x7FFFFFFF
    normal = np.sqrt(-2 * np.log(uniform[:20_000])) * np.cos(2 * np.pi * uniform[20_000:40_000])
    lengths = {
        "text": np.exp(np.log(600) + normal).astype(np.int64) + 1,
        "image": 256 + (uniform[40_000:50_000] * 3840).astype(np.int64),
        "video": np.exp(np.log(256) + uniform[50_000:] * np.log(context / 256)).astype(np.int64),
    }
    plan = PackPlanner(lengths=lengths, weights=WEIGHTS, seed=1, context=context, bins=bins)
    packs = take(plan, 20_000_000 // context)
    fill = sum(p.tokens for p in packs) / (context * len(packs))
    assert fill >= 0.98, fill
    drawn, longest = plan.tokens, max(int(array.max()) for array in lengths.values())
    total = sum(drawn.values())
    bound = plan.lanes * longest  # a lane is never more than a document ahead of its share
    assert all(abs(drawn[name] - w * total) <= bound for name, w in WEIGHTS.items()), drawn


def test_a_long_document_does_not_push_out_open_bins() -> None:
    lengths = {"a": np.asarray([6], np.int64), "b": np.asarray([24], np.int64)}
    plan = PackPlanner(lengths=lengths, weights={"a": 6.0, "b": 24.0}, seed=0, context=10, bins=1)
    packs = take(plan, 3)
    assert [[(p.source, p.start, p.end) for p in pack.pieces] for pack in packs] == [
        [("b", 0, 10)],
        [("b", 10, 20)],
        [("a", 0, 6), ("b", 20, 24)],
    ]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), context=st.integers(5, 80))
def test_one_pass_for_evaluation_holds_every_document_once(seed: int, context: int) -> None:
    lengths = corpus(seed)
    plans = plan_once(lengths, context=context)
    documents = [(n, 0, i, int(x)) for n, array in lengths.items() for i, x in enumerate(array) if x]
    assert_whole(pieces_of(plans), documents)
    assert [p.index for p in plans] == list(range(len(plans)))
    assert plan_once({"a": np.zeros(3, np.int64)}, context=4) == []


# --- refusals ---------------------------------------------------------------------------------------------


def test_restore_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringweave.data_pipes.planner._ANCHOR", 1)  # so that the anchor holds open packs
    lengths = corpus(1)
    plan = planner(lengths, lanes=2, batch=2, window=4)
    take(plan, 7)
    state = plan.state()
    for field in state:
        with pytest.raises(DataError, match=field):
            PackPlanner.restore({k: v for k, v in state.items() if k != field}, lengths=lengths)
    with pytest.raises(DataError, match="surprise"):
        PackPlanner.restore({**state, "surprise": 1}, lengths=lengths)
    with pytest.raises(DataError, match="data cursor of another format"):
        PackPlanner.restore({**state, "format": 99}, lengths=lengths)
    with pytest.raises(DataError, match="seed"):
        PackPlanner.restore(state, lengths=lengths, seed=4)
    changed = {**lengths, "text": lengths["text"] + 1}
    for other in (
        changed,
        {k: v for k, v in lengths.items() if k != "text"},
        {**lengths, "more": lengths["text"]},
    ):
        with pytest.raises(DataError, match="data changed"):
            PackPlanner.restore(state, lengths=other)
    cursors = state["cursors"]
    broken = [
        {"cursors": cursors[:1]},
        {"cursors": [cursors[0], cursors[1][:-4]]},
        {"cursors": [cursors[0], cursors[1][:-8] + "AAAA" + cursors[1][-4:]]},
        {"cursors": [cursors[0], "naïve"]},
        {"cursors": [cursors[0], 3]},
        {"cursors": None},
        {"weights": {"text": 1.0}},
        {"context": 0},
        {"context": 9},
        {"cost": {"width": 3}},
        {"done": 100},
        {"done": -1},
        {"turn": 2},
        {"raw": "1"},
        {"lanes": 3},
        {"window": 3},
    ]
    accepted = []
    for change in broken:
        try:
            PackPlanner.restore({**state, **change}, lengths=lengths)
            accepted.append(change)
        except DataError:
            continue
    assert accepted == []


def test_a_cursor_of_the_former_planner_is_refused_by_its_format() -> None:
    lengths = corpus(1)
    former = {
        "format": 1, "lengths": "0" * 64, "seed": 3, "context": 32, "bins": 3, "close_at": 0.995, "weights": WEIGHTS,
        "index": 0, "drawn": 0, "sources": {}, "tokens": {}, "open": [], "pending": [],
    }  # fmt: skip
    with pytest.raises(DataError, match="another format") as error:
        PackPlanner.restore(former, lengths=lengths)
    assert "format 1, known 2" in str(error.value.why)


def test_a_refused_switch_changes_nothing() -> None:
    lengths = corpus(6)
    plan, other = (planner(lengths, batch=2, window=4) for _ in range(2))
    take(plan, 3)
    take(other, 3)
    refused: list[dict[str, Any]] = [
        {"context": 0}, {"context": 40, "window": 3}, {"context": 40, "batch": 0}, {"context": 40, "bins": 0},
    ]  # fmt: skip
    for options in refused:
        with pytest.raises(ValueError):
            plan.switch(**options)
    with pytest.raises(DataError, match="unknown sources"):
        plan.switch(context=40, weights={"nowhere": 1.0})
    assert take(plan, 30) == take(other, 30)


def test_construction_refuses_unknown_and_empty_sources() -> None:
    lengths = {"a": np.ones(3, np.int64), "empty": np.zeros(2, np.int64), "none": np.zeros(0, np.int64)}
    for weights in ({"b": 1.0}, {"empty": 1.0}, {"none": 1.0}, {"a": 0.0}):
        with pytest.raises(DataError):
            PackPlanner(lengths=lengths, weights=weights, seed=0, context=4)
    assert take(PackPlanner(lengths=lengths, weights={"a": 1.0, "empty": 0.0}, seed=0, context=4), 3)


# --- helpers ----------------------------------------------------------------------------------------------


def test_ranks_share_a_batch_in_blocks() -> None:
    for dp in (1, 2, 3, 4, 6, 12):
        assert [n for r in range(dp) for n in packs_for_rank(24, 12, r, dp)] == list(range(24, 36))
    for bad in ((12, 0, 5), (12, 3, 3), (0, 0, 1)):
        with pytest.raises(ValueError):
            packs_for_rank(0, *bad)


def test_audit_counts_lost_and_repeated_samples() -> None:
    packs = [(p.index, list(p.pieces)) for p in take(planner(corpus(4)), 30)]
    assert audit(packs, packs) == {"samples_lost": 0, "samples_repeated": 0}
    assert audit(list(reversed(packs)), packs) == {"samples_lost": 0, "samples_repeated": 0}
    samples = {(p.source, p.epoch, p.sample) for p in packs[3][1]}
    assert audit(packs[:3] + packs[4:], packs) == {"samples_lost": len(samples), "samples_repeated": 0}
    assert audit([*packs, packs[3], packs[3]], packs) == {
        "samples_lost": 0,
        "samples_repeated": 2 * len(samples),
    }
    one = Piece("new", 0, 0, 0, 1)
    assert audit([*packs[1:], (0, [one])], packs)["samples_repeated"] == 1


def test_plans_survive_json_and_refuse_nonsense() -> None:
    packs = take(planner(corpus(4)), 10)
    assert [PackPlan.from_json(json.loads(json.dumps(p.to_json()))) for p in packs] == packs
    assert sum(PackPlanner.consumed(packs).values()) == sum(len(p.pieces) for p in packs)
    for bad in (
        None,
        [],
        [0, 4, [["a", 0, 0, 0, 5]]],
        [0, 4, [["a", 0, 0, 3, 3]]],
        [0, 4, [[1, 0, 0, 0, 1]]],
        [True, 4, []],
    ):
        with pytest.raises(DataError):
            PackPlan.from_json(bad)
