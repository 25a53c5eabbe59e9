"""How long a document may wait in an open pack: not for epochs, whatever the sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ringweave.data_pipes import bins as bins_module
from ringweave.data_pipes import planner as planner_module
from ringweave.data_pipes.pack import PackPlan
from ringweave.data_pipes.planner import PackPlanner

CONTEXT = 1024


def planner(sizes: np.ndarray) -> PackPlanner:
    return PackPlanner(lengths={"text": sizes}, weights={"text": 1.0}, seed=1, context=CONTEXT, lanes=1)


def waits(plan: PackPlanner, packs: int) -> tuple[int, float]:
    """(the longest that a piece waited, in draws; fill)"""
    longest = tokens = 0
    for _ in range(packs):
        plan._fill()
        _, pieces = plan._ready.popleft()
        longest = max(longest, plan._lanes[0].drawn - min(p[0] for p in pieces))
        tokens += sum(p[5] - p[4] for p in pieces)
    held = [plan._lanes[0].drawn - p[0] for pack in plan._lanes[0].bins.packs for p in pack]
    return max(longest, *held), tokens / (packs * CONTEXT)


def test_documents_of_like_size_do_not_wait_for_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some packs stay just too full for every caption and are never the fullest: they go when they are overdue."""
    captions = np.random.default_rng(0).integers(30, 70, 2000)
    monkeypatch.setattr(bins_module, "OVERDUE", 10**9)
    longest, fill = waits(planner(captions), 1500)
    assert longest > 10_000, "the case that this is about"
    monkeypatch.setattr(bins_module, "OVERDUE", 1000)
    bounded, still = waits(planner(captions), 1500)
    assert bounded <= 1000 + 32 * CONTEXT // 30
    assert still >= fill - 0.002


def test_packs_of_mixed_sizes_are_never_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the limit costs no fill where the fill was measured."""
    mixed = np.exp(np.log(150) + np.random.default_rng(0).normal(size=4000)).astype(np.int64) + 1
    found = []
    for limit in (10**9, bins_module.OVERDUE):
        monkeypatch.setattr(bins_module, "OVERDUE", limit)
        plan = planner(mixed)
        found.append([plan.next() for _ in range(1500)])
    assert found[0] == found[1]


def test_a_restored_plan_counts_the_same_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """From an anchor with open packs on: the cursor has to know since when each has been open."""
    monkeypatch.setattr(planner_module, "_ANCHOR", 500)
    monkeypatch.setattr(bins_module, "OVERDUE", 1000)
    captions = np.random.default_rng(0).integers(30, 70, 2000)
    plan = planner(captions)
    unlimited = planner(captions)
    for stop in (150, 401, 700, 1003):
        while plan.index < stop:
            plan.next()
        assert plan.state()["raw"] > 0
        again = PackPlanner.restore(json.loads(json.dumps(plan.state())), lengths={"text": captions})
        ahead: list[PackPlan] = [again.next() for _ in range(200)]
        assert ahead == [plan.next() for _ in range(200)]
    monkeypatch.setattr(bins_module, "OVERDUE", 10**9)
    assert [unlimited.next() for _ in range(1203)][-200:] != ahead, "packs were overdue in this test"
