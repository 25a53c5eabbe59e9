"""The plan against a dense mask, for random packs and any partition of the slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringweave.parallel.ring_plan import plan_ring, ring_slots


def _documents(lengths: list[int], padding: int, rows: int) -> np.ndarray:
    row = np.concatenate([np.full(n, d) for d, n in enumerate(lengths)] + [np.full(padding, -1)])
    return np.stack([row, row[::-1].copy()][:rows]).astype(np.int32)


def _covered(documents: np.ndarray, slots: list[np.ndarray], causal: bool) -> np.ndarray:
    """How often each (query, key) pair of flattened slots is computed, over all ranks and hops."""
    rows, context = documents.shape
    where = [np.concatenate([row * context + own for row in range(rows)]) for own in slots]
    seen = np.zeros((rows * context, rows * context), np.int32)
    for rank in range(len(slots)):
        plan = plan_ring(documents, slots, rank, causal=causal)
        for hop, blocks in enumerate(plan.hops):
            source = where[(rank - hop) % len(slots)]
            for b in blocks:
                size = (b.q1 - b.q0, b.k1 - b.k0)
                pairs = np.tril(np.ones(size, np.int32)) if b.causal else np.ones(size, np.int32)
                seen[np.ix_(where[rank][b.q0 : b.q1], source[b.k0 : b.k1])] += pairs
    return seen


def _dense(documents: np.ndarray, causal: bool) -> np.ndarray:
    rows, context = documents.shape
    flat = np.where(documents < 0, -1, documents + 1000 * np.arange(rows)[:, None]).ravel()
    allowed = (flat[:, None] == flat[None, :]) & (flat[:, None] >= 0)
    at = np.arange(rows * context)
    return (allowed & (at[:, None] >= at[None, :]) if causal else allowed).astype(np.int32)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=6),
    padding=st.integers(0, 5),
    ring=st.integers(1, 5),
    rows=st.integers(1, 2),
    layout=st.sampled_from(["contiguous", "zigzag", "scattered"]),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_union_of_blocks_is_the_dense_mask_once(lengths, padding, ring, rows, layout, causal, seed) -> None:
    documents = _documents(lengths, padding, rows)
    context = documents.shape[1]
    if layout == "scattered":  # any partition, here a random one with uneven sizes
        owner = np.random.RandomState(seed).randint(0, ring, context)
        slots = [np.flatnonzero(owner == r) for r in range(ring)]
    else:
        slots = ring_slots(context, ring, layout=layout)
    assert np.array_equal(_covered(documents, slots, causal), _dense(documents, causal))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("context", "ring"), [(64, 4), (61, 4), (7, 3), (8192, 4), (16, 8)])
def test_slots_are_a_partition(context: int, ring: int, layout: str) -> None:
    slots = ring_slots(context, ring, layout=layout)
    assert np.array_equal(np.sort(np.concatenate(slots)), np.arange(context))
    assert max(map(len, slots)) - min(map(len, slots)) <= 2


def test_zigzag_balances_one_long_causal_document() -> None:
    documents = np.zeros((1, 4096), np.int32)
    area = {}
    for layout in ("contiguous", "zigzag"):
        slots = ring_slots(4096, 4, layout=layout)
        work = [plan_ring(documents, slots, r).area for r in range(4)]
        area[layout] = max(work) / (sum(work) / 4)
        assert sum(work) == 4096 * 4097 // 2
    assert area["zigzag"] < 1.01
    assert area["contiguous"] > 1.7
