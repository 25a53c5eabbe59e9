"""Packs with holes, where documents went into quarantine, through slicing and the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ringweave.data_pipes.pack import Pack, PackPlan
from ringweave.data_pipes.packing import materialise
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.quarantine import Failure, Quarantine
from ringweave.data_pipes.stream import PackStream
from ringweave.parallel.ring_layout import KINDS, RingLayout
from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import verify
from ringweave.pretrain.batch import collate
from ringweave.pretrain.models.lwm import LWMShape
from ringweave.pretrain.parallelize import build_model
from ringweave.pretrain.synthetic import SyntheticCorpus

SHAPE = LWMShape(vocab=60, layers=2, width=16, heads=2, kv_heads=2, ffn=32, head_chunk=16)


def packs() -> tuple[list[Pack], list[Pack], list[np.ndarray]]:
    """Whole packs, the same with holes, and where the holes are; the last pack is nothing but one."""
    corpus = SyntheticCorpus(vocab=SHAPE.vocab)
    planner = PackPlanner(lengths=corpus.lengths, weights={"text": 1.0, "image": 1.0}, seed=4, context=160)
    stream = PackStream(corpus, planner, Quarantine(max_share=1.0))
    plans = [plan for plan in stream.plans(12) if len(plan.pieces) > 2][:3]
    assert len(plans) == 3
    whole = [stream.materialise(plan) for plan in plans]
    gone = {(p.source, p.sample) for plan in plans[:2] for p in plan.pieces[1::2]}
    gone |= {(p.source, p.sample) for p in plans[2].pieces}
    stream.quarantine.batch(plans, [Failure(*which, "s", "k", 0, "no") for which in gone])
    holed = [stream.materialise(plan) for plan in plans]
    holes = [(h.doc != w.doc) for h, w in zip(holed, whole)]
    assert all(h.any() for h in holes)
    assert not holes[0].all()
    assert (holed[2].doc == -1).all()
    return whole, holed, holes


@pytest.mark.parametrize("prefix", [False, True])
def test_documents_beside_a_hole_have_the_loss_they_had(prefix: bool) -> None:
    whole, holed, holes = packs()
    model = build_model(SHAPE, None, seed=1, rope_theta=1e4)

    def nll(some: list[Pack]) -> np.ndarray:
        batch = collate(some, prefix=prefix)
        out = model(batch.ids, **batch.inputs())
        out.sum().backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        return out.detach().reshape(len(some), -1).numpy()

    ours, before = nll(holed), nll(whole)
    hole = np.stack(holes)
    np.testing.assert_allclose(ours[~hole], before[~hole], rtol=0, atol=1e-5)
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_ring_layout_takes_packs_with_holes(kind: str) -> None:
    """Each slot has one owner, and what the ranks hold together is the whole pack."""
    _, holed, _ = packs()
    ring = RingLayout(4, kind, width=16)
    parts = [collate(holed, ring=ring, rank=r) for r in range(4)]
    assert sum(p.ids.shape[1] for p in parts) == 160
    expected = np.sort(np.concatenate([h.targets for h in holed]))
    got = np.sort(np.concatenate([p.targets.numpy().ravel() for p in parts]))
    np.testing.assert_array_equal(got, expected)
    assert parts[0].real_tokens == sum(int((h.doc >= 0).sum()) for h in holed)


def _with_empty_packs() -> list[dict]:
    """The last batch of finite data: the second data rank has nothing at all."""
    some = verify.make_packs(2)
    empty = [materialise(PackPlan(9 + i, verify.CONTEXT, ()), lambda piece: None) for i in range(2)]
    reference = verify._reference([*some, *empty], "fp32")
    assert reference[0] == pytest.approx(verify._reference(some, "fp32")[0], rel=1e-6)
    layouts = [{"dp": 2}, {"tp": 2}, {"pp": 2}, {"sp": 2}, {"dp": 2, "replicate": 2}]
    return [verify.check_layout(layout, [*some, *empty], reference, "fp32") for layout in layouts]


@pytest.mark.slow
def test_a_rank_with_empty_packs_only_changes_no_loss_and_no_gradient() -> None:
    for rows in run_ranks(2, _with_empty_packs, timeout=240):
        assert [r["layout"] for r in rows if not r["holds"]] == []
