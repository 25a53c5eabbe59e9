"""The diffusion transformer with given vectors of words under laws 1 and 2."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ringweave.data_pipes.pack import Pack, PackPlan
from ringweave.data_pipes.packing import materialise
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.stream import PackStream
from ringweave.parallel.ring_layout import RingLayout
from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import verify, verify_dit
from ringweave.pretrain.dit_batch import DiTBatch, collate_diffusion
from ringweave.pretrain.parallelize import build_model
from ringweave.pretrain.synthetic import SyntheticLatents

TEXT, CHANNELS = 12, verify_dit.CHANNELS  # no multiple of the ranks' 8, and not the width
SHAPE = replace(verify_dit.SHAPE, text=TEXT, words=None, head=False)
SETTINGS = replace(verify_dit.SETTINGS, words=False, given=TEXT)
WEIGHTS = {"text": 0.0}


def corpus() -> SyntheticLatents:
    return SyntheticLatents(vocab=verify_dit.VOCAB, channels=CHANNELS, given=TEXT)


def make_packs(count: int = 8) -> list[Pack]:
    """As `verify_dit.make_packs`, words being vectors; the first holds no document."""
    data = corpus()
    planner = PackPlanner(
        lengths=data.lengths, weights={"rgba": 1.0, "video": 1.0}, seed=3, context=verify_dit.CONTEXT, bins=4
    )
    stream = PackStream(data, planner)
    packs = [stream.materialise(plan) for plan in stream.next_batch(count).plans]
    packs[0] = materialise(PackPlan(packs[0].plan.index, verify_dit.CONTEXT, ()), lambda piece: None)
    return packs


def test_packs_equal_their_documents_alone() -> None:
    packs, data = make_packs(), corpus()
    assert (
        packs[0].embeddings is None
        and sum(len(p.embeddings) for p in packs[1:] if p.embeddings is not None) > 100
    )
    loss, grads, _ = verify_dit.reference(packs, "fp64", shape=SHAPE, settings=SETTINGS)
    alone = [
        materialise(PackPlan(0, len(piece), (piece,)), data.document)
        for p in packs
        for piece in p.plan.pieces
    ]
    other, separate = verify_dit.one_by_one(alone, "fp64", shape=SHAPE, settings=SETTINGS)
    assert abs(loss - other) <= 1e-10 * abs(loss)
    assert verify._worst(separate, grads) <= 1e-10
    assert float(grads["txt_in.weight"].norm()) > 0 and float(grads["txt_norm.weight"].norm()) > 0


def test_one_document_s_vectors_leave_the_others_bit_identical() -> None:
    pack, changed = (max(make_packs(), key=lambda p: len(p.plan.pieces)) for _ in range(2))
    model = build_model(SHAPE, None, seed=1)
    settings = replace(SETTINGS, drop=0.0)
    at = np.flatnonzero((pack.ids == 22) & (pack.modality == 1))
    first = pack.doc[at[0]]
    assert changed.embeddings is not None
    changed.embeddings[pack.doc[at] == first] += 1.0
    before, after = (verify_dit.velocities(p, settings, model) for p in (pack, changed))
    others = torch.from_numpy((pack.doc >= 0) & (pack.doc != first))
    assert torch.equal(before[others], after[others]) and bool(others.any())
    assert not torch.equal(before[~others], after[~others])


def backbone() -> verify.Backbone:
    def batch(packs: Sequence[Pack], ring: RingLayout, rank: int) -> DiTBatch:
        return collate_diffusion(packs, SETTINGS, channels=CHANNELS, ring=ring, rank=rank)

    return verify.Backbone(SHAPE, batch, WEIGHTS)


def check_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    packs = make_packs()
    right = verify_dit.reference(packs, "fp32", shape=SHAPE, settings=SETTINGS)
    return [verify.check_layout(row, packs, right, "fp32", backbone()) for row in rows]


LAYOUTS: list[dict[str, Any]] = [{"pp": 2}, {"tp": 2, "norms": "replicated"}, {"sp": 2}]


@pytest.mark.slow
def test_two_processes_equal_one() -> None:
    rows = run_ranks(2, check_rows, LAYOUTS, timeout=400)[0]
    assert len(rows) == len(LAYOUTS)
    for row in rows:
        assert row["holds"], row
