"""The pipeline on gloo ranks against one process: every schedule, uneven splits, uneven packs, sharded parameters."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from ringweave.data_pipes.pack import Pack, packs_for_rank
from ringweave.parallel.grad_norm import world_sum
from ringweave.parallel.mesh import AXES, Mesh
from ringweave.parallel.ring_layout import RingLayout
from ringweave.parallel.schedules import SCHEDULES, SPLIT, split_layers
from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import verify
from ringweave.pretrain.batch import collate
from ringweave.pretrain.engine import TorchEngine, make_adamw, world_loss
from ringweave.pretrain.models.lwm import LWM
from ringweave.pretrain.parallelize import build_model, build_parts, initialise

pytestmark = pytest.mark.slow  # minutes of several processes

LOSS_BOUND, GRAD_BOUND = 1e-6, 1e-5
ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
LAYERS = 9  # over 2, 4 or 8 parts: never even
SHAPE = replace(verify.SHAPE, layers=LAYERS)
Case = dict[str, Any]

PP2: list[Case] = [
    {"pp": 2},
    {"pp": 2, "split": [7, 2], "micro_batch": 2},
    {"pp": 2, "schedule": "gpipe"},
    {"pp": 2, "schedule": "interleaved", "virtual": 2},
    {"pp": 2, "schedule": "interleaved", "virtual": 3, "split": [1, 2, 1, 3, 1, 1], "packs": 5},
    {"pp": 2, "schedule": "zero_bubble", "virtual": 1},
    {"pp": 2, "schedule": "zero_bubble", "virtual": 2, "split": [3, 1, 1, 4]},
    {"pp": 2, "schedule": "zbv", "virtual": 2, "split": [3, 1, 1, 4]},
]
PP4: list[Case] = [
    {"pp": 4, "split": [3, 1, 3, 2]},
    {"pp": 4, "packs": 3},
    {"pp": 4, "schedule": "gpipe"},
    {"pp": 4, "schedule": "interleaved", "virtual": 2, "split": [1, 1, 1, 1, 2, 1, 1, 1]},
    {"pp": 4, "schedule": "interleaved", "virtual": 2, "packs": 7},
    {"pp": 4, "schedule": "zero_bubble", "virtual": 2},
    {"pp": 4, "schedule": "zbv", "virtual": 2},
]
CROSSED: list[Case] = [
    {"pp": 2, "dp": 2, "schedule": "1f1b"},
    {"pp": 2, "dp": 2, "schedule": "interleaved", "virtual": 2},
    {"pp": 2, "dp": 2, "schedule": "zero_bubble", "virtual": 2, "unit": 1},
    {"pp": 2, "dp": 2, "schedule": "zero_bubble", "virtual": 4},
    {"pp": 2, "dp": 2, "schedule": "zbv", "virtual": 2},
    {"pp": 2, "sp": 2, "schedule": "zero_bubble", "virtual": 2},
    {"pp": 2, "sp": 2, "schedule": "zbv", "virtual": 2, "recompute": "full"},
    {"pp": 2, "tp": 2, "schedule": "interleaved", "virtual": 2, "recompute": "selective"},
    {"pp": 2, "tp": 2, "schedule": "zero_bubble", "virtual": 2},
    {"pp": 2, "tp": 2, "schedule": "zero_bubble", "virtual": 2, "norms": "replicated", "split": [3, 1, 1, 4]},
]


def uneven_packs(count: int) -> list[Pack]:
    """Packs in turn of one document as long as the pack, of documents of two tokens, and nearly empty ones."""
    packs = verify.make_packs(count)
    slots = np.arange(len(packs[0].ids))
    for number, pack in enumerate(packs):
        size = (len(slots), 2, 3)[number % 3]
        pack.doc[:] = slots // size
        pack.order[:] = slots % size
        if number % 3 == 2:
            pack.doc[slots >= 4] = -1
        last = np.append(pack.doc[1:] != pack.doc[:-1], True)
        pack.targets[:] = np.where(last | (pack.doc < 0), -1, np.roll(pack.ids, -1))
        pack.weights[:] = pack.targets >= 0
    return packs


def one_process(packs: list[Pack]) -> tuple[float, dict[str, torch.Tensor], float]:
    """(loss, gradients, norm) without mesh or pipeline."""
    model = build_model(SHAPE, None, seed=1, rope_theta=1e4)
    engine = TorchEngine(model, None, micro_batch=1)
    sums, counts = engine.forward_backward(collate(packs))
    grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return world_loss(sums, counts, {}, normalize="modality"), grads, float(engine.grad_squares()) ** 0.5


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of all shards, fp64."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).double()


def build(case: Case, mesh: Mesh) -> TorchEngine:
    how = {k: case[k] for k in ("schedule", "virtual", "split", "unit", "norms", "recompute") if k in case}
    parts = build_parts(SHAPE, mesh, seed=1, rope_theta=1e4, **how)
    return TorchEngine(
        parts, mesh, micro_batch=case.get("micro_batch", 1), schedule=case.get("schedule", "1f1b"),
        split_backward="recompute" not in case, optimizer=make_adamw(parts, **ADAMW),
    )  # fmt: skip


def compare(case: Case, packs: list[Pack], truth: tuple[float, dict[str, torch.Tensor], float]) -> Case:
    """The case's largest relative errors over all ranks, on the running world."""
    loss, grads, norm = truth
    mesh = Mesh.build({axis: case.get(axis, 1) for axis in AXES})
    engine = build(case, mesh)
    mine = packs_for_rank(0, len(packs), mesh.rank_on["dp"], mesh.sizes["dp"])
    ring = RingLayout(mesh.sizes["sp"])
    batch = collate([packs[i] for i in mine], ring=ring, rank=mesh.rank_on["sp"])
    engine.forward_backward(batch)
    engine.zero_grad()  # the second step uses the buffers of the first, as training does
    with pytest.MonkeyPatch.context() as patch:
        reductions: list[int] = []
        reduce = _fsdp_param_group.foreach_reduce
        patch.setattr(
            _fsdp_param_group, "foreach_reduce", lambda *a, **kw: (reductions.append(1), reduce(*a, **kw))[1]
        )
        sums, counts = engine.forward_backward(batch)
    ours = world_loss(world_sum(sums), counts, {}, normalize="modality")
    ours_norm = float(world_sum(engine.grad_squares())) ** 0.5
    worst, names = 0.0, []
    for name, p in chain.from_iterable(part.named_parameters() for part in engine.parts):
        assert p.grad is not None, name
        worst = max(worst, float((whole(p.grad) - grads[name]).norm() / grads[name].norm()))
        names.append(name)
    errors = torch.tensor([abs(ours / loss - 1), worst, abs(ours_norm / norm - 1)], dtype=torch.float64)
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    held: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(held, names)
    return {
        "case": case, "loss": float(errors[0]), "grad": float(errors[1]), "norm": float(errors[2]),
        "held": sorted(chain.from_iterable(held)), "reductions": len(reductions), "parts": len(engine.parts),
    }  # fmt: skip


def run_cases(cases: list[Case], kind: str = "mixed") -> list[Case]:
    # Gathering whole gradients to compare them is slow on tensor-parallel shards, and torch says so each time.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    rows, truths = [], {}
    for case in cases:
        count = case.get("packs", 8)
        if count not in truths:
            packs = verify.make_packs(count) if kind == "mixed" else uneven_packs(count)
            truths[count] = packs, one_process(packs)
        rows.append(compare(case, *truths[count]))
    return rows


def updates(cases: list[Case]) -> list[float]:
    """Largest relative difference of a parameter after a clipped update, for each case."""
    packs = verify.make_packs(4)
    model = build_model(SHAPE, None, seed=1, rope_theta=1e4)
    one = TorchEngine(model, None, micro_batch=1, optimizer=make_adamw(model, **ADAMW))
    engines = [one, *(build(case, Mesh.build({"pp": case["pp"]})) for case in cases)]
    for engine in engines:
        engine.forward_backward(collate(packs))
        squares = engine.grad_squares()
        norm = float(squares if engine is one else world_sum(squares)) ** 0.5
        engine.clip(norm, norm / 7)
        engine.step(1e-2)
    truth = one.tensors()
    worst = torch.zeros(len(cases), dtype=torch.float64)
    for at, engine in enumerate(engines[1:]):
        for name, value in engine.tensors().items():
            error = (whole(value) - truth[name].double()).norm() / truth[name].double().norm()
            worst[at] = max(worst[at], error)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return [float(w) for w in worst]


def four_ranks() -> dict[str, Any]:
    """Everything that wants four processes, in one start of them."""
    uneven = [case for case in PP4 if case.get("packs", 8) == 8]
    return {
        "pp4": run_cases(PP4),
        "crossed": run_cases(CROSSED),
        "uneven": run_cases(uneven, "uneven"),
        "updates": updates(
            [{"pp": 4, "schedule": "interleaved", "virtual": 2}, {"pp": 4, "schedule": "zbv", "virtual": 2}]
        ),
    }


@pytest.fixture(scope="module")
def on_four_ranks() -> dict[str, Any]:
    return run_ranks(4, four_ranks, timeout=500)[0]


def assert_equal_to_one_process(rows: list[Case]) -> None:
    names = sorted(name for name, _ in LWM(SHAPE).named_parameters())
    for row in rows:
        sizes = [row["case"].get(axis, 1) for axis in ("dp", "tp", "sp")]
        assert row["held"] == sorted(names * int(np.prod(sizes))), row["case"]
        errors = {key: row[key] for key in ("case", "loss", "grad", "norm")}
        assert row["loss"] <= LOSS_BOUND, errors
        assert row["grad"] <= GRAD_BOUND, errors
        assert row["norm"] <= GRAD_BOUND, errors


def test_every_schedule_on_two_ranks_equals_one_process() -> None:
    assert {case.get("schedule", "1f1b") for case in PP2} == set(SCHEDULES)
    assert_equal_to_one_process(run_ranks(2, run_cases, PP2, timeout=300)[0])


def test_every_schedule_on_four_ranks_equals_one_process(on_four_ranks: dict[str, Any]) -> None:
    assert {case.get("schedule", "1f1b") for case in PP4} == set(SCHEDULES)
    assert_equal_to_one_process(on_four_ranks["pp4"])


def test_schedules_cross_with_sharding_ring_tensor_parallel_and_recomputation(
    on_four_ranks: dict[str, Any],
) -> None:
    """Split backwards run custom autograd functions in halves; their collectives must still meet on all ranks."""
    assert {axis for case in CROSSED if case["schedule"] in SPLIT for axis in case} >= {"dp", "tp", "sp"}
    assert_equal_to_one_process(on_four_ranks["crossed"])


def test_sharded_gradients_are_reduced_once_a_step_and_part(on_four_ranks: dict[str, Any]) -> None:
    rows = [row for row in on_four_ranks["crossed"] if "dp" in row["case"] and "unit" not in row["case"]]
    assert len(rows) >= 4
    assert [row["reductions"] for row in rows] == [row["parts"] for row in rows]


def test_packs_of_very_different_documents_complete_on_four_ranks(on_four_ranks: dict[str, Any]) -> None:
    assert_equal_to_one_process(on_four_ranks["uneven"])


def test_update_and_clipping_reach_all_parts_of_a_rank(on_four_ranks: dict[str, Any]) -> None:
    assert max(on_four_ranks["updates"]) <= GRAD_BOUND


def test_interleaved_parts_do_not_start_alike() -> None:
    """Each part is a model of its own; a seed by position would give all parts of a rank the same weights."""
    whole_model = dict(build_model(SHAPE, None, seed=1, rope_theta=1e4).named_parameters())
    seen: dict[str, torch.Tensor] = {}
    for number, layers in enumerate(split_layers(LAYERS, 4)):
        part = LWM(SHAPE)
        part.keep_part(layers, first=number == 0, last=number == 3)
        initialise(part, seed=1)
        for name, p in part.named_parameters():
            assert name not in seen
            assert torch.equal(p, whole_model[name])
            seen[name] = p
    assert seen.keys() == whole_model.keys()
    matrices = [seen[f"layers.{i}.attention.wq.weight"] for i in range(LAYERS)]
    assert all(not torch.equal(a, b) for at, a in enumerate(matrices) for b in matrices[:at])


def _odd_packs() -> None:
    engine = build({"pp": 2, "micro_batch": 2}, Mesh.build({"pp": 2}))
    with pytest.raises(ValueError, match="3 packs are no multiple of micro_batch = 2"):
        engine.forward_backward(collate(verify.make_packs(3)))
    for wrong in ({"split": [8, 2]}, {"split": [9]}, {"schedule": "zbv"}, {"virtual": 2}):
        with pytest.raises(ValueError, match=r"add up|zbv holds two|1f1b holds one"):
            build({"pp": 2, **wrong}, engine.mesh)


def test_what_no_pipeline_can_run_is_refused_before_anything_is_sent() -> None:
    run_ranks(2, _odd_packs)
