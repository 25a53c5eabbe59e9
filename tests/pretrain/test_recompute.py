"""Activation checkpointing: the same bits, fewer bytes, and nothing sent twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ringweave.data_pipes.pack import packs_for_rank
from ringweave.parallel.mesh import AXES, Mesh
from ringweave.parallel.ring_layout import RingLayout
from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import verify
from ringweave.pretrain.batch import collate
from ringweave.pretrain.engine import TorchEngine
from ringweave.pretrain.models.lwm import LWM, LWMShape
from ringweave.pretrain.parallelize import build_model, initialise
from ringweave.pretrain.recompute import recompute_activations

pytestmark = pytest.mark.slow  # minutes of several processes

HOW = ("none", "selective", "full")
LAYOUTS: list[dict[str, Any]] = [
    {"tp": 2, "sp": 2, "norms": "sequence"},
    {"tp": 2, "sp": 2, "norms": "replicated"},
    {"dp": 2, "sp": 2, "replicate": 2},
    {"pp": 2, "tp": 2},
    {"sp": 4, "ulysses": 2},
]


def _gradients(layout: dict[str, Any], how: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """This rank's gradients of a step, and what its process groups did meanwhile, by the profiler's names."""
    mesh = Mesh.build(
        {a: layout[a] for a in AXES if a in layout},
        replicate=layout.get("replicate", 1),
        ulysses=layout.get("ulysses", 1),
    )
    norms = layout.get("norms", "sequence")
    model = build_model(verify.SHAPE, mesh, seed=1, rope_theta=1e4, unit=1, norms=norms, recompute=how)
    engine = TorchEngine(model, mesh, micro_batch=1, split_backward=how == "none")
    packs = verify.make_packs(2)
    mine = packs_for_rank(0, len(packs), mesh.rank_on["dp"], mesh.sizes["dp"])
    batch = collate([packs[i] for i in mine], ring=RingLayout(mesh.sizes["sp"]), rank=mesh.rank_on["sp"])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        engine.forward_backward(batch)
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    names = (e.name() for e in seen.profiler.kineto_results.events())  # `seen.events()` builds a tree, slowly
    calls = Counter(name for name in names if name.startswith("gloo:"))
    grads = {}
    for name, p in model.named_parameters():
        assert p.grad is not None
        grads[name] = p.grad.to_local().clone()
    return grads, dict(calls)


def _worker() -> list[dict[str, Any]]:
    rows = []
    for layout in LAYOUTS:
        found = {how: _gradients(layout, how) for how in HOW}
        base = found["none"][0]
        equal = {
            how: base.keys() == grads.keys() and all(torch.equal(grads[n], base[n]) for n in base)
            for how, (grads, _) in found.items()
        }
        rows.append(
            {"layout": layout, "equal": equal, "calls": {how: calls for how, (_, calls) in found.items()}}
        )
    return rows


@pytest.fixture(scope="module")
def seen() -> list[list[dict[str, Any]]]:
    return run_ranks(4, _worker, timeout=400)


def test_no_collective_and_no_message_is_replayed_in_the_recomputation(
    seen: list[list[dict[str, Any]]],
) -> None:
    for rank in seen:
        for row in rank:
            assert row["calls"]["none"] == row["calls"]["selective"] == row["calls"]["full"], row
        ring, pipeline = rank[0]["calls"]["full"], rank[3]["calls"]["full"]
        # The count sees what it should: tensor-parallel exchanges, ring hops, sharded parameters.
        assert ring["gloo:all_to_all"] > 0
        assert ring["gloo:all_gather"] > 0
        assert ring["gloo:send"] > 0
        assert rank[4]["calls"]["full"]["gloo:all_to_all"] > 0
        assert sum(pipeline.get(name, 0) for name in ("gloo:send", "gloo:recv")) > 0


def test_gradients_are_bit_equal_to_those_without_recomputation(seen: list[list[dict[str, Any]]]) -> None:
    for rank in seen:
        for row in rank:
            assert row["equal"] == {"none": True, "selective": True, "full": True}, row["layout"]


def _kept(layers: int, how: str, tokens: int) -> int:
    """Bytes that a forward pass leaves allocated."""
    shape = LWMShape(vocab=64, layers=layers, width=64, heads=4, kv_heads=2, ffn=192, head_chunk=64)
    model = LWM(shape)
    initialise(model, seed=1)
    recompute_activations(model, how)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    inputs = {
        "order": torch.arange(tokens)[None], "documents": torch.zeros(1, tokens, dtype=torch.int32), "targets": ids,
    }  # fmt: skip
    model(ids, **inputs).sum().backward()  # buffers that stay are made now
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        nll = model(ids, **inputs)
    assert nll.requires_grad
    return sum(e.self_cpu_memory_usage for e in seen.events())


def test_a_layer_keeps_less_with_selective_and_least_with_full_recomputation() -> None:
    """In units of one hidden state, tokens x width: full keeps its input, attention's output and LSE, no more."""
    tokens, width, heads = 512, 64, 4
    per_layer = {
        how: (_kept(6, how, tokens) - _kept(2, how, tokens)) / 4 / (tokens * width * 4) for how in HOW
    }
    assert per_layer["full"] == pytest.approx(2 + heads / width, abs=0.02), per_layer
    assert 6 < per_layer["selective"] < 8, per_layer  # input, norm, q, k, v, attention's output, middle
    # and all of the feed-forward: norm, gate, up, silu, product, each feed-forward state 3 wide
    assert per_layer["none"] > per_layer["selective"] + 12, per_layer


def test_one_process_gives_the_same_bits_with_packs_and_padding() -> None:
    packs = verify.make_packs(3)
    losses, grads = [], []
    for how in HOW:
        model = build_model(verify.SHAPE, None, seed=1, rope_theta=1e4)
        recompute_activations(model, how)
        sums, _ = TorchEngine(model, None, micro_batch=3).forward_backward(collate(packs))
        losses.append(sums)
        grads.append([p.grad for p in model.parameters()])
    for other_loss, other in zip(losses[1:], grads[1:], strict=True):
        assert torch.equal(other_loss, losses[0])
        assert all(torch.equal(a, b) for a, b in zip(other, grads[0], strict=True))


def test_an_unknown_word_for_recomputation_is_refused() -> None:
    with pytest.raises(ValueError, match="none, selective or full, got 'most'"):
        recompute_activations(LWM(verify.SHAPE), "most")
