"""The plan of packs: no document lost or repeated, the same on every machine, exact after a restart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ringweave.data_pipes.mixture import Mixture, integer_weights
from ringweave.data_pipes.order import SourceCursor, permutation
from ringweave.data_pipes.pack import PackPlan, Piece, packs_for_rank
from ringweave.data_pipes.planner import PackPlanner, audit, lengths_digest, plan_once
from ringweave.tokenizers.errors import DataError

Lengths = dict[str, NDArray[np.int64]]
PINNED = [[7, 2, 4, 6, 3, 5, 0, 1], [4, 6, 7, 3, 1, 5, 0, 2], [2, 3, 4, 5, 6, 0, 1, 7]]
WEIGHTS = {"text": 0.5, "image": 0.25, "video": 0.25}


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
    lengths: Lengths, *, seed: int = 3, context: int = 32, bins: int = 3, **options: float
) -> PackPlanner:
    return PackPlanner(lengths=lengths, weights=WEIGHTS, seed=seed, context=context, bins=bins, **options)


def take(plan: PackPlanner, count: int) -> list[PackPlan]:
    return [plan.next() for _ in range(count)]


def drawn_documents(
    lengths: Lengths, weights: Mapping[str, float], *, seed: int
) -> Iterable[tuple[str, int, int, int]]:
    """(source, epoch, sample, length) in the order of the mixture, written without the planner."""
    mixture = Mixture(weights)
    places = {name: (0, 0) for name in mixture.names}
    while True:
        which = mixture.next()
        name = mixture.names[which]
        size = 0
        while not size:
            epoch, position = places[name]
            if position == len(lengths[name]):
                epoch, position = epoch + 1, 0
            sample = int(permutation(len(lengths[name]), seed=seed, source=name, epoch=epoch)[position])
            size = int(lengths[name][sample])
            places[name] = (epoch, position + 1)
        mixture.add(which, size)
        yield name, epoch, sample, size


def waiting(state: dict) -> list[Piece]:
    """What a state says is drawn but not emitted."""
    return [Piece(*row[1:]) for rows in [*state["open"], state["pending"]] for row in rows]


def assert_whole(
    pieces: Iterable[Piece], lengths: Lengths, documents: list[tuple[str, int, int, int]]
) -> None:
    """The pieces are those documents, each token exactly once."""
    parts: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for p in pieces:
        parts.setdefault((p.source, p.epoch, p.sample), []).append((p.start, p.end))
    assert set(parts) == {d[:3] for d in documents}
    assert len(documents) == len(parts)
    for source, epoch, sample, size in documents:
        spans = sorted(parts[source, epoch, sample])
        assert [s for s, _ in spans] == [0, *(e for _, e in spans[:-1])], "gap or overlap"
        assert spans[-1][1] == size


# --- order and mixture -----------------------------------------------------------------------------------


def test_permutation_is_a_permutation_and_pinned() -> None:
    for count in (1, 2, 7, 1000):
        assert sorted(permutation(count, seed=1, source="a", epoch=0)) == list(range(count))
    # Written down once: these may never change, or runs would resume into another order.
    assert permutation(8, seed=7, source="text", epoch=0).tolist() == PINNED[0]
    assert permutation(8, seed=7, source="text", epoch=1).tolist() == PINNED[1]
    assert permutation(8, seed=-(2**70), source="größe", epoch=0).tolist() == PINNED[2]


def test_permutations_differ_by_every_key_and_look_uniform() -> None:
    orders = [
        permutation(500, seed=seed, source=source, epoch=epoch).tolist()
        for seed, source, epoch in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    ]
    assert len({tuple(o) for o in orders}) == 4
    firsts = Counter(int(permutation(5, seed=s, source="a", epoch=0)[0]) for s in range(2000))
    assert all(330 < firsts[i] < 470 for i in range(5)), firsts  # 400 each, 4 sigma


def test_cursor_reads_every_document_once_an_epoch_and_passes_over_empty_ones() -> None:
    lengths = np.asarray([3, 0, 5, 0, 1, 2], np.int64)
    cursor = SourceCursor("a", lengths, seed=1)
    epochs = [[cursor.draw() for _ in range(4)] for _ in range(3)]
    assert [{s for _, s, _ in e} for e in epochs] == [{0, 2, 4, 5}] * 3
    assert [{e for e, _, _ in group} for group in epochs] == [{0}, {1}, {2}]
    assert cursor.passed in (4, 5, 6)  # two an epoch; the last ones may still lie ahead
    again = SourceCursor("a", lengths, seed=1, epoch=cursor.epoch, position=cursor.position)
    assert [again.draw() for _ in range(9)] == [cursor.draw() for _ in range(9)]


def test_cursor_crosses_its_internal_chunks() -> None:
    lengths = np.ones(10_000, np.int64)
    cursor = SourceCursor("a", lengths, seed=2)
    assert [cursor.draw()[1] for _ in range(10_000)] == permutation(
        10_000, seed=2, source="a", epoch=0
    ).tolist()


def test_integer_weights() -> None:
    assert integer_weights({"b": 0.3, "a": 0.7, "zero": 0.0}) == {"a": 7, "b": 3}
    assert integer_weights({"a": 2.0, "b": 2}) == {"a": 1, "b": 1}
    for bad in ({"a": -1.0}, {"a": float("nan")}, {"a": 0.0}, {}):
        with pytest.raises(DataError):
            integer_weights(bad)


@settings(max_examples=25, deadline=None)
@given(
    weights=st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 10), min_size=1),
    sizes=st.lists(st.integers(1, 50), min_size=200, max_size=200),
)
def test_no_source_gets_more_than_a_document_ahead(weights: dict[str, float], sizes: list[int]) -> None:
    mixture, whole = Mixture(weights), integer_weights(weights)
    total = sum(whole.values())
    for size in sizes:
        mixture.add(mixture.next(), size)
        drawn = mixture.tokens
        shares = {name: w / total * sum(drawn.values()) for name, w in whole.items()}
        assert all(drawn[name] <= shares[name] + 50 for name in whole)
        assert all(drawn[name] >= shares[name] - 50 * (len(whole) - 1) - 1e-6 for name in whole)
        assert Mixture(weights, tokens=drawn).next() == mixture.next()


# --- packs ------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), context=st.integers(1, 80), bins=st.integers(1, 9), count=st.integers(1, 80))
def test_packs_hold_the_drawn_documents_exactly_once(seed: int, context: int, bins: int, count: int) -> None:
    lengths = corpus(seed)
    plan = planner(lengths, seed=seed, context=context, bins=bins)
    packs = take(plan, count)
    assert [p.index for p in packs] == list(range(count))
    assert all(0 < p.tokens <= context == p.context for p in packs)
    for piece in (
        piece for p in packs for piece in p.pieces
    ):  # only what is longer than the context is split
        assert len(piece) == context or piece.end == lengths[piece.source][piece.sample]
    state = plan.state()
    assert len(state["open"]) <= bins
    source = iter(drawn_documents(lengths, WEIGHTS, seed=seed))
    documents = [next(source) for _ in range(state["drawn"])]
    assert_whole([p for pack in packs for p in pack.pieces] + waiting(state), lengths, documents)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    stages=st.lists(
        st.tuples(
            st.integers(4, 150), st.integers(1, 6), st.integers(0, 15), st.sampled_from([0.0, 0.2, 3.0])
        ),
        min_size=2,
        max_size=4,
    ),
)
def test_stage_switches_lose_and_repeat_nothing(seed: int, stages: list[tuple[int, int, int, float]]) -> None:
    lengths = corpus(seed)
    plan = planner(lengths, seed=seed)
    packs = take(plan, 5)
    for context, bins, count, video in stages:
        before = sorted(waiting(plan.state()), key=lambda p: (p.source, p.epoch, p.sample, p.start))
        plan.switch(context=context, weights={**WEIGHTS, "video": video}, bins=bins)
        state = plan.state()
        assert state["open"] == []
        assert sorted(waiting(state), key=lambda p: (p.source, p.epoch, p.sample, p.start)) == before
        order = [(row[0], row[4]) for row in state["pending"]]
        assert order == sorted(order), "handed back in the order of the draw"
        drawn = state["drawn"]
        for _ in range(count):
            packs.append(plan.next())
            if plan.state()["drawn"] > drawn:  # a new document only once every old piece has its place
                assert all(row[0] >= drawn for row in plan.state()["pending"])
    assert [p.index for p in packs] == list(range(len(packs)))
    state = plan.state()
    pieces = [p for pack in packs for p in pack.pieces] + waiting(state)
    documents = {(p.source, p.epoch, p.sample) for p in pieces}
    assert len(documents) == state["drawn"]
    assert_whole(pieces, lengths, [(*d, int(lengths[d[0]][d[2]])) for d in documents])
    for name, (epoch, position, _) in state["sources"].items():  # and they are the ones its order lists
        expected = {
            (name, e, int(s))
            for e in range(epoch + 1)
            for s in permutation(len(lengths[name]), seed=seed, source=name, epoch=e)[
                : position if e == epoch else None
            ]
            if lengths[name][s]
        }
        assert {d for d in documents if d[0] == name} == expected


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), before=st.integers(0, 60), switch_at=st.integers(0, 60))
def test_restored_state_continues_identically(seed: int, before: int, switch_at: int) -> None:
    lengths = corpus(seed)
    plan = planner(lengths, seed=seed)
    if switch_at < before:
        take(plan, switch_at)
        plan.switch(context=100, weights={"video": 1.0, "text": 0.1}, bins=2)
        take(plan, before - switch_at)
    else:
        take(plan, before)
    text = json.dumps(plan.state())
    again = PackPlanner.restore(json.loads(text), lengths=lengths, seed=seed)
    assert json.dumps(again.state()) == text
    assert again.passed == plan.passed
    assert take(again, 40) == take(plan, 40)
    again.switch(context=50)
    plan.switch(context=50)
    assert take(again, 10) == take(plan, 10)
    assert again.state() == plan.state()


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
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
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
    assert all(abs(drawn[name] - w * total) <= longest for name, w in WEIGHTS.items()), drawn


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
    assert_whole([p for plan in plans for p in plan.pieces], lengths, documents)
    assert [p.index for p in plans] == list(range(len(plans)))
    assert plan_once({"a": np.zeros(3, np.int64)}, context=4) == []


# --- refusals ---------------------------------------------------------------------------------------------


def test_restore_refuses_what_does_not_fit() -> None:
    lengths = corpus(1)
    plan = planner(lengths)
    take(plan, 7)
    state = plan.state()
    for field in state:
        with pytest.raises(DataError, match=field):
            PackPlanner.restore({k: v for k, v in state.items() if k != field}, lengths=lengths)
    with pytest.raises(DataError, match="surprise"):
        PackPlanner.restore({**state, "surprise": 1}, lengths=lengths)
    with pytest.raises(DataError, match="format"):
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
    broken = [
        {"open": [[[0, "text", 0, 0, 0, 10**6]]]},
        {"pending": [[10**6, "text", 0, 0, 0, 1]]},
        {"pending": [[0, "nowhere", 0, 0, 0, 1]]},
        {"pending": 3},
        {"sources": {"text": [0, 10**6, 0]}},
        {"tokens": {"text": 1}},
        {"context": 0},
    ]
    for change in broken:
        with pytest.raises(DataError):
            PackPlanner.restore({**state, **change}, lengths=lengths)


def test_construction_refuses_unknown_and_empty_sources() -> None:
    lengths = {"a": np.ones(3, np.int64), "empty": np.zeros(2, np.int64), "none": np.zeros(0, np.int64)}
    for weights in ({"b": 1.0}, {"empty": 1.0}, {"none": 1.0}, {"a": 0.0}):
        with pytest.raises(DataError):
            PackPlanner(lengths=lengths, weights=weights, seed=0, context=4)
    assert take(PackPlanner(lengths=lengths, weights={"a": 1.0, "empty": 0.0}, seed=0, context=4), 3)


def test_lengths_digest_sees_values_and_where_they_belong() -> None:
    a, b = np.asarray([1, 2], np.int64), np.asarray([3], np.int64)
    variants = [{"x": a, "y": b}, {"x": b, "y": a}, {"x": a}, {"xy": a, "": b}, {"x": np.concatenate([a, b])}]
    assert len({lengths_digest(v) for v in variants}) == len(variants)
    assert lengths_digest({"x": a, "y": b}) == lengths_digest({"y": b, "x": a.astype(np.int32)})  # type: ignore[dict-item]


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
