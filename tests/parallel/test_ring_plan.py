"""The plan against a dense mask, for random packs, masks and any partition of the slots."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringweave.parallel.ring_layout import KINDS, RingLayout
from ringweave.parallel.ring_plan import RingPlan, cut_pieces, plan_pieces, plan_ring


def _pack(lengths: list[int], padding: int, rows: int) -> np.ndarray:
    row = np.concatenate([np.full(n, d) for d, n in enumerate(lengths)] + [np.full(padding, -1)])
    return np.stack([row, row[::-1].copy()][:rows]).astype(np.int32)


def _prefix(documents: np.ndarray, share: list[float]) -> np.ndarray:
    """Every document's two-way prefix is a share of its length (0 causal, 1 bidirectional)."""
    prefix = np.zeros_like(documents)
    for row in range(len(documents)):
        for d in np.unique(documents[row][documents[row] >= 0]):
            at = documents[row] == d
            prefix[row][at] = round(at.sum() * share[d % len(share)])
    return prefix


def _dense(documents: np.ndarray, prefix: np.ndarray, window: int | None) -> np.ndarray:
    """The mask by its definition, over flattened slots."""
    rows, context = documents.shape
    allowed = np.zeros((rows * context, rows * context), np.int32)
    for b in range(rows):
        row = documents[b]
        start = {d: int(np.flatnonzero(row == d)[0]) for d in np.unique(row)}
        for i in range(context):
            for j in range(context):
                if row[i] < 0 or row[i] != row[j] or (window is not None and abs(i - j) >= window):
                    continue
                turn = start[row[i]] + prefix[b, i]
                allowed[b * context + i, b * context + j] = j <= i or (i < turn and j < turn)
    return allowed


def _buffer(plan: RingPlan, hop: int, where: list[np.ndarray]) -> np.ndarray:
    """Flattened slots of the keys a rank holds at a hop."""
    source = where[(plan.rank - hop) % plan.ring]
    if plan.transport != "direct" or hop == 0:
        return source
    assert plan.receives is not None
    return np.concatenate([source[a:b] for a, b in plan.receives[hop]] + [np.zeros(0, np.int64)]).astype(
        np.int64
    )


def _covered(documents: np.ndarray, plans: list[RingPlan], where: list[np.ndarray]) -> np.ndarray:
    """How often each (query, key) pair is computed, over all ranks and hops."""
    seen = np.zeros((documents.size, documents.size), np.int32)
    for plan in plans:
        for hop in range(plan.ring):
            keys = _buffer(plan, hop, where)
            for b in plan.blocks(hop):
                rows, cols = np.arange(b.q1 - b.q0)[:, None], np.arange(b.k1 - b.k0)[None, :]
                inside = np.ones((b.q1 - b.q0, b.k1 - b.k0), bool)
                inside &= True if b.lower is None else cols - rows >= b.lower
                inside &= True if b.upper is None else cols - rows <= b.upper
                assert inside.any(1).all() and inside.any(0).all(), f"an empty row or column in {b}"
                assert b.q1 <= plan.tokens and b.k1 <= len(keys)
                seen[np.ix_(where[plan.rank][b.q0 : b.q1], keys[b.k0 : b.k1])] += inside
    return seen


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=6),
    padding=st.integers(0, 5),
    ring=st.integers(1, 5),
    rows=st.integers(1, 2),
    layout=st.sampled_from([*KINDS, "scattered"]),
    share=st.lists(st.sampled_from([0.0, 0.4, 1.0]), min_size=1, max_size=3),
    window=st.sampled_from([None, None, 1, 3, 9]),
    transport=st.sampled_from(["ring", "direct", "gather"]),
    seed=st.integers(0, 1000),
)
def test_union_of_blocks_is_the_dense_mask_once(
    lengths, padding, ring, rows, layout, share, window, transport, seed
) -> None:
    documents = _pack(lengths, padding, rows)
    prefix = _prefix(documents, share)
    if layout == "scattered":  # any partition, here a random one with uneven sizes
        owner = np.random.RandomState(seed).randint(0, ring, documents.shape).astype(np.int32)
    else:
        owner = RingLayout(ring, layout, width=8, window=window).owner(documents, prefix)
    where = [np.flatnonzero(owner.ravel() == r) for r in range(ring)]
    plans = [
        plan_ring(documents, owner, prefix, rank=r, ring=ring, window=window, transport=transport)
        for r in range(ring)
    ]
    dense = _dense(documents, prefix, window)
    assert np.array_equal(_covered(documents, plans, where), dense)
    assert sum(p.area for p in plans) == dense.sum()
    for p in plans:
        assert p.hop_areas() == [sum(_area(b) for b in p.blocks(t)) for t in range(ring)], (
            "areas in closed form differ from counted ones"
        )
        if p.sends is not None:  # what one sends is what the other expects
            for t in range(ring):
                other = plans[(p.rank + t) % ring]
                assert other.receives is not None
                assert np.array_equal(p.sends[t], other.receives[t])


def _area(b) -> int:
    rows, cols = np.arange(b.q1 - b.q0)[:, None], np.arange(b.k1 - b.k0)[None, :]
    low = True if b.lower is None else cols - rows >= b.lower
    high = True if b.upper is None else cols - rows <= b.upper
    return int((np.ones((b.q1 - b.q0, b.k1 - b.k0), bool) & low & high).sum())


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=6),
    shape=st.sampled_from([(2, 1), (2, 2), (1, 2), (1, 3), (3, 2)]),
    layout=st.sampled_from(KINDS),
    share=st.lists(st.sampled_from([0.0, 0.4, 1.0]), min_size=1, max_size=3),
)
def test_pooled_ranks_cover_the_same_mask(lengths, shape, layout, share) -> None:
    """Ulysses: groups of ranks hold their tokens one after the other, and the ring runs over the groups."""
    ring, pool = shape
    documents = _pack(lengths, 3, 2)
    prefix = _prefix(documents, share)
    owner = RingLayout(ring * pool, layout, width=8).owner(documents, prefix)
    single = [np.flatnonzero(owner.ravel() == r) for r in range(ring * pool)]
    where = [np.concatenate(single[g * pool : (g + 1) * pool]) for g in range(ring)]
    plans = [plan_ring(documents, owner, prefix, rank=g, ring=ring, ulysses=pool) for g in range(ring)]
    assert np.array_equal(_covered(documents, plans, where), _dense(documents, prefix, None))


def test_a_window_on_contiguous_ranks_needs_few_hops() -> None:
    """lm-engine 447, prime-rl 2828 (A19): a window reaches at most ⌈w/T⌉ + 1 ranks back."""
    documents = np.zeros((1, 96), np.int32)
    owner = RingLayout(8, "contiguous").owner(documents)
    for window in (1, 5, 12, 13, 30):
        plan = plan_ring(documents, owner, np.zeros_like(documents), rank=7, ring=8, window=window)
        used = [t for t in range(8) if any(True for _ in plan.blocks(t))]
        assert len(used) <= -(-window // 12) + 1
        assert max(plan.last) == len(used) - 1


def test_keys_nobody_needs_are_not_sent() -> None:
    documents = np.repeat(np.arange(4), 8)[None].astype(np.int32)  # one document a rank
    owner = RingLayout(4, "contiguous").owner(documents)
    for transport in ("ring", "direct"):
        plan = plan_ring(documents, owner, np.zeros_like(documents), rank=1, ring=4, transport=transport)
        assert plan.sent_tokens() == (0, 0)
    everything = plan_ring(documents, owner, np.zeros_like(documents), rank=1, ring=4, transport="gather")
    assert everything.sent_tokens() == (24, 24)


def test_a_full_ring_sends_what_the_formula_says() -> None:
    """(P-1)·T forward; P·T of gradients backward, the last hop home."""
    documents = np.zeros((1, 64), np.int32)
    owner = RingLayout(4, "zigzag").owner(documents)
    plans = [plan_ring(documents, owner, np.zeros_like(documents), rank=r, ring=4) for r in range(4)]
    assert [p.sent_tokens() for p in plans] == [(48, 64)] * 4


def test_a_thousand_documents_are_planned_in_ten_milliseconds_of_work() -> None:
    """Counted, not timed: the plan's tables grow with the documents, not with their product or the context."""
    rng = np.random.RandomState(0)
    sizes = rng.randint(20, 240, 1000)
    documents = np.repeat(np.arange(1000), sizes)[None].astype(np.int32)
    owner = RingLayout(8, "per_document").owner(documents)
    plan = plan_ring(documents, owner, np.zeros_like(documents), rank=3, ring=8)
    assert len(plan.table) <= 16 * 1000
    planned = RingLayout(8, "planned").owner(documents)
    assert len(plan_ring(documents, planned, np.zeros_like(documents), rank=3, ring=8).table) <= 400
    started = time.perf_counter()
    plan_pieces(cut_pieces(documents, planned, np.zeros_like(documents), ring=8), rank=3, ring=8)
    print(f"planned in {1000 * (time.perf_counter() - started):.1f} ms")


@pytest.mark.parametrize(
    ("owner", "documents", "message"),
    [
        ([[0, 0, 2, 1]], [[0, 0, 0, 0]], "not ranks of a ring of 2"),
        ([[0, 0, 1, 1]], [[0, 1, 0, 0]], "not one run of slots"),
        ([[0, 0, 1]], [[0, 0, 0, 0]], "must have one shape"),
    ],
)
def test_maps_that_cannot_be_are_refused(owner, documents, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan_ring(
            np.array(documents, np.int32),
            np.array(owner, np.int32),
            np.zeros((1, 4), np.int32),
            rank=0,
            ring=2,
        )
