"""The gradient norm and clipping: every parameter once, over any mix of meshes, placements and pipeline ranks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ringweave.data_pipes.pack import packs_for_rank
from ringweave.parallel.grad_norm import clip_, gradient_norm, local_maximum
from ringweave.parallel.mesh import AXES, Mesh
from ringweave.parallel.ring_layout import RingLayout
from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import verify
from ringweave.pretrain.batch import collate
from ringweave.pretrain.engine import TorchEngine
from ringweave.pretrain.parallelize import build_model

pytestmark = pytest.mark.slow  # minutes of several processes

INF = float("inf")
LAYOUTS: list[dict[str, Any]] = [
    {"dp": 4},
    {"dp": 4, "replicate": 2},
    {"dp": 4, "replicate": 4},
    {"dp": 2, "sp": 2, "replicate": 2},
    {"tp": 4, "norms": "sequence"},
    {"tp": 4, "norms": "replicated"},
    {"dp": 2, "tp": 2, "replicate": 2, "norms": "sequence"},
    {"pp": 4},
    {"pp": 2, "tp": 2, "norms": "sequence"},
    {"pp": 2, "tp": 2, "norms": "replicated"},
    {"dp": 2, "pp": 2},
]


def _truth() -> tuple[dict[str, Tensor], float, float]:
    """Gradients of one process clipped by torch to half their norm, and that norm for p = 2 and inf."""
    model = build_model(verify.SHAPE, None, seed=1, rope_theta=1e4)
    TorchEngine(model, None, micro_batch=1).forward_backward(collate(verify.make_packs()))
    parameters = list(model.parameters())
    norms = [
        float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], p))
        for p in (2.0, INF)
    ]
    torch.nn.utils.clip_grad_norm_(parameters, norms[0] / 2)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, norms[0], norms[1]


def _model_row(case: dict[str, Any], truth: tuple[dict[str, Tensor], float, float]) -> dict[str, Any]:
    grads, two, largest = truth
    mesh = Mesh.build({a: case[a] for a in AXES if a in case}, replicate=case.get("replicate", 1))
    model = build_model(
        verify.SHAPE, mesh, seed=1, rope_theta=1e4, unit=1, norms=case.get("norms", "sequence")
    )
    engine = TorchEngine(model, mesh, micro_batch=1)
    packs = verify.make_packs()
    mine = packs_for_rank(0, len(packs), mesh.rank_on["dp"], mesh.sizes["dp"])
    engine.forward_backward(
        collate([packs[i] for i in mine], ring=RingLayout(mesh.sizes["sp"]), rank=mesh.rank_on["sp"])
    )
    found = gradient_norm(engine.parameters(), mesh), gradient_norm(engine.parameters(), mesh, p=INF)
    engine.clip(found[0], found[0] / 2)
    worst = max(
        float((p.grad.full_tensor() - grads[n]).norm() / grads[n].norm()) for n, p in model.named_parameters()
    )
    placements = {type(x).__name__ for p in model.parameters() for x in p.grad.placements}
    return {
        "case": case, "two": abs(found[0] / two - 1), "inf": abs(found[1] / largest - 1), "clipped": worst,
        "placements": placements,
    }  # fmt: skip


class _Mixed(nn.Module):
    """Parameters on all meshes a rank of dp2·tp2 knows, with gradients written by hand; one has none."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.whole: dict[str, Tensor] = {}

        def draw(name: str, *shape: int) -> Tensor:
            self.whole[name] = torch.randn(shape, generator=generator)
            return self.whole[name]

        tp, dp = mesh.device_mesh["tp"], mesh.dp_sp
        placed: dict[str, Any] = {
            "plain": (draw("plain", 5), None, ()),
            "rows": (draw("rows", 7, 3), tp, [Shard(0)]),
            "columns": (draw("columns", 3, 7), tp, [Shard(1)]),
            "copied": (draw("copied", 4), dp, [Replicate()]),
            "grid": (draw("grid", 5, 5), mesh.device_mesh["dp", "tp"], [Shard(0), Shard(1)]),
            "one_row": (draw("one_row", 1, 3), dp, [Shard(0)]),  # a rank holds nothing
        }
        self.inner = nn.Module()
        for name in ("strided", "even"):
            weight = nn.Parameter(distribute_tensor(torch.zeros_like(draw(name, 6, 3)), tp, [Shard(0)]))
            self.inner.register_parameter(name, weight)
        fully_shard(self.inner, mesh=dp)
        for name, (value, where, how) in placed.items():
            p = nn.Parameter(
                value if where is None else distribute_tensor(value, where, how, src_data_rank=None)
            )
            p.grad = p.detach().clone()
            self.register_parameter(name, p)
        for name, p in self.inner.named_parameters():
            assert isinstance(p, DTensor)
            p.grad = distribute_tensor(self.whole[name], p.device_mesh, p.placements, src_data_rank=None)
        self.silent = nn.Parameter(torch.ones(3))

    def truth(self, p: float) -> float:
        everything = torch.cat([w.double().reshape(-1) for w in self.whole.values()])
        return float(torch.linalg.vector_norm(everything, p))


def _mixed_row() -> dict[str, Any]:
    mesh = Mesh.build({"dp": 2, "tp": 2})
    model = _Mixed(mesh)
    found = {p: (gradient_norm(model.parameters(), mesh, p=p), model.truth(p)) for p in (2.0, INF)}
    clip_(model.parameters(), norm=found[2.0][0], limit=1.0)
    after = gradient_norm(model.parameters(), mesh)
    strided = {type(x).__name__ for p in model.inner.parameters() for x in p.grad.placements}
    model.plain.grad = model.plain.grad * float("nan") if dist.get_rank() == 3 else model.plain.grad
    poisoned = [gradient_norm(model.parameters(), mesh, p=p) for p in (2.0, INF)]
    model.copied.grad = DTensor.from_local(torch.ones(4), mesh.dp_sp, [Partial()])
    with pytest.raises(ValueError, match="not reduced yet"):
        gradient_norm(model.parameters(), mesh)
    return {"found": found, "after": after, "placements": strided, "poisoned": poisoned}


def _worker() -> dict[str, Any]:
    # Gathering whole gradients to compare them is slow on tensor-parallel shards, and torch says so each time.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    truth = _truth()
    return {"models": [_model_row(case, truth) for case in LAYOUTS], "mixed": _mixed_row()}


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return run_ranks(4, _worker, timeout=400)


def test_norm_over_data_tensor_ring_and_pipeline_is_that_of_one_process_for_p_2_and_inf(
    seen: list[dict[str, Any]],
) -> None:
    for rank in seen:
        assert len(rank["models"]) == len(LAYOUTS)
        for row in rank["models"]:
            assert row["two"] <= 1e-6, row
            assert row["inf"] <= 1e-5, row
    assert {"_StridedShard", "Shard", "Replicate"} <= set().union(
        *(r["placements"] for r in seen[0]["models"])
    )


def test_clipped_gradients_are_those_torch_clips_on_one_process(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        for row in rank["models"]:
            assert row["clipped"] <= 1e-5, row


def test_plain_and_distributed_parameters_on_different_meshes_count_once(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        mixed = rank["mixed"]
        assert "_StridedShard" in mixed["placements"]
        for found, truth in mixed["found"].values():
            assert found == pytest.approx(truth, rel=1e-6)
        assert mixed["after"] == pytest.approx(1.0, rel=1e-5)


def test_a_nan_on_one_rank_makes_the_norm_nan_on_all(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert all(x != x for x in rank["mixed"]["poisoned"])


def test_largest_gradient_of_no_gradients_is_zero() -> None:
    assert float(local_maximum([nn.Parameter(torch.ones(2))])) == 0.0
