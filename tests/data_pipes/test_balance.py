"""The balancing window: packs of one step cost alike, by the lengths that were emitted; nothing else changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringweave.data_pipes.balance import CostModel, arrange, auto_window
from ringweave.data_pipes.planner import PackPlanner
from ringweave.tokenizers.errors import DataError

PROOF = Path(__file__).parents[1] / "prove" / "data_packing.py"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 70)),
    causal=st.booleans(),
)
def test_costs_count_the_pairs_a_query_sees(lengths: list[int], window: int | None, causal: bool) -> None:
    """Against the mask itself: row q sees keys k with k <= q (causal) and within the window."""
    pairs = 0.0
    for n in lengths:
        q, k = np.indices((n, n))
        near = np.ones((n, n), bool) if window is None else np.abs(q - k) < window
        seen = near & (k <= q) if causal else near
        pairs += float(seen.sum())
    model = CostModel(width=8, ratio=24, causal=causal, window=window)
    exact = 24 * 8 * sum(lengths) + 4 * pairs
    if causal:  # the model leaves out the half of the diagonal: 2 pairs of 4 a token, or less
        assert 0 <= exact - model.pack(lengths) <= 2 * sum(lengths) + 1e-9
    elif window is None:
        assert model.pack(lengths) == exact
    else:  # ... and takes a whole window to either side together
        assert model.pack(lengths) <= 24 * 8 * sum(lengths) + 4 * sum(n * min(n, window) for n in lengths)


def test_costs_grow_with_the_square_of_a_document_not_of_the_pack() -> None:
    model = CostModel(width=4096)
    assert model.pack([1000] * 8) == 8 * model.pack([1000])
    assert model.pack([8000]) > model.pack([1000] * 8)
    assert model.pack([2**20]) / (24 * 4096 * 2**20 + 2 * 2**40) == 1
    assert model.pack([]) == 0
    for bad in ({"width": 0}, {"ratio": 0.0}, {"window": 0}):
        with pytest.raises(DataError, match="cost model"):
            CostModel(**bad)  # type: ignore[arg-type]
    assert CostModel.from_json(json.loads(json.dumps(CostModel(width=5, window=7).to_json()))) == CostModel(
        width=5, window=7
    )
    for value in (None, {}, {"width": 4, "surprise": 1}):
        with pytest.raises(ValueError):
            CostModel.from_json(value)


def test_the_cost_of_a_split_document_is_that_of_what_is_emitted() -> None:
    """A document of 1,000 tokens in packs of 100 costs ten packs of 100, wherever it came from."""
    plan = PackPlanner(
        lengths={"a": np.asarray([1000], np.int64)},
        weights={"a": 1.0},
        seed=0,
        context=100,
        batch=2,
        window=4,
    )
    costs = {CostModel().pack([len(p) for p in plan.next().pieces]) for _ in range(20)}
    assert costs == {CostModel().pack([100])}


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.integers(0, 1000), max_size=60), batch=st.integers(1, 12), seed=st.integers(0, 9))
def test_steps_are_made_of_neighbours_by_cost(costs: list[int], batch: int, seed: int) -> None:
    order = arrange(costs, batch, seed)
    assert sorted(order) == list(range(len(costs)))
    rest = len(costs) % batch
    full = [sorted(costs[i] for i in order[at : at + batch]) for at in range(0, len(costs) - rest, batch)]
    ranked = sorted(costs)
    assert sorted(full) == [ranked[at : at + batch] for at in range(rest, len(costs), batch)]
    assert sorted(costs[i] for i in order[len(costs) - rest :]) == ranked[:rest]


def test_steps_are_shuffled_by_their_key() -> None:
    costs = list(range(64))
    orders = [arrange(costs, 8, "window", key) for key in range(40)]
    assert arrange(costs, 8, "window", 3) == orders[3]
    firsts = Counter(order[0] // 8 for order in orders)
    assert len(firsts) >= 6, "the order of the steps depends on the key"


@pytest.mark.parametrize("dp", [2, 4, 8])
def test_ranks_with_several_packs_get_the_same_load(dp: int) -> None:
    """Blocks of a step for dp ranks: equal sums, and the m-th packs of all ranks are neighbours."""
    costs = [1000 + 37 * i for i in range(16)]
    order = arrange(costs, 16, 0)
    shares = np.asarray([costs[i] for i in order]).reshape(dp, -1)
    assert shares.sum(axis=1).max() / shares.sum(axis=1).mean() < 1.13
    assert np.ptp(shares, axis=0).max() <= 37 * (dp - 1)


def test_automatic_windows() -> None:
    assert [auto_window(context, 8) for context in (4096, 32_768, 262_144, 2**20)] == [32, 64, 256, 256]
    assert auto_window(2**20, 64) == 1024
    assert auto_window(2**20, 512) == 2048
    assert auto_window(4096, 1) == 0
    for context, batch in ((512, 6), (2**20, 7), (2**18, 300)):
        assert auto_window(context, batch) % batch == 0


def test_a_window_moves_packs_but_changes_none() -> None:
    lengths = {"a": 1 + np.arange(300) * 7919 % 120}
    plain, sorted_ = (
        PackPlanner(lengths=lengths, weights={"a": 1.0}, seed=4, context=128, lanes=3, batch=4, window=window)
        for window in (0, 16)
    )
    for _ in range(4):
        ours = [sorted_.next() for _ in range(16)]
        theirs = [plain.next() for _ in range(16)]
        assert Counter(p.pieces for p in ours) == Counter(p.pieces for p in theirs)
        assert [p.pieces for p in ours] != [p.pieces for p in theirs]
        model = CostModel()
        costs = [model.pack([len(x) for x in p.pieces]) for p in ours]
        steps = sorted(sorted(costs[at : at + 4]) for at in range(0, 16, 4))
        assert [c for step in steps for c in step] == sorted(costs)


@pytest.mark.slow
def test_packs_are_full_and_ranks_balanced_at_every_context() -> None:
    """The trimmed form of tests/prove/data_packing.py: fill, balance, shares and restored streams at 4K to 1M."""
    done = subprocess.run(
        [sys.executable, str(PROOF), "--tiny"], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["holds"] is True
    for name, bound in (("4K", 1.02), ("32K", 1.05), ("256K", 1.10), ("1024K", 1.15)):
        assert found[f"fill_{name}"] >= 0.99
        assert found[f"imbalance_{name}"] <= bound
        assert found[f"without_window_{name}"] > found[f"imbalance_{name}"]
