"""Parameters over data and ring ranks: full, hybrid and no sharding add up to one process, and share checkpoints."""

from __future__ import annotations

import hashlib
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ringweave.data_pipes.pack import Pack, packs_for_rank
from ringweave.parallel.mesh import AXES, Mesh
from ringweave.parallel.ring_layout import RingLayout
from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import checkpoint, verify
from ringweave.pretrain.batch import collate
from ringweave.pretrain.config import config_from_dict
from ringweave.pretrain.engine import TorchEngine, make_adamw
from ringweave.pretrain.parallelize import build_model
from ringweave.pretrain.run_folder import read_events
from ringweave.pretrain.schedule import learning_rate

pytestmark = pytest.mark.slow  # minutes of several processes

#: dp4 and dp2 take 2 and 4 packs a rank, one a pass; the first pack, and so a pass of rank 0, has no target.
LAYOUTS: list[dict[str, Any]] = [
    {"dp": 4}, {"dp": 4, "replicate": 2}, {"dp": 4, "replicate": 4},
    {"dp": 2, "sp": 2}, {"dp": 2, "sp": 2, "replicate": 2}, {"dp": 2, "sp": 2, "replicate": 4},
    {"sp": 4}, {"sp": 4, "replicate": 2},
    {"dp": 2, "tp": 2, "replicate": 2}, {"dp": 2, "pp": 2, "replicate": 2},
]  # fmt: skip
SAVED: dict[str, Any] = {"pp": 2, "tp": 2}
LOADED: list[dict[str, Any]] = [
    {"dp": 4}, {"dp": 4, "replicate": 2}, {"dp": 4, "replicate": 4}, {"sp": 4}, {"tp": 4},
    {"tp": 4, "norms": "replicated"}, {"dp": 2, "tp": 2, "replicate": 2}, {"pp": 4},
]  # fmt: skip


def _engine(case: dict[str, Any], *, seed: int = 1, precision: str = "fp32", unit: int = 1) -> TorchEngine:
    mesh = Mesh.build({a: case[a] for a in AXES if a in case}, replicate=case.get("replicate", 1))
    model = build_model(
        verify.SHAPE, mesh, seed=seed, rope_theta=1e4, precision=precision, unit=unit,
        norms=case.get("norms", "sequence"),
    )  # fmt: skip
    optimizer = make_adamw(model, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    return TorchEngine(model, mesh, micro_batch=1, precision=precision, optimizer=optimizer)


def _forward_backward(engine: TorchEngine, packs: list[Pack]) -> None:
    mesh = engine.mesh
    assert mesh is not None
    mine = packs_for_rank(0, len(packs), mesh.rank_on["dp"], mesh.sizes["dp"])
    ring = RingLayout(mesh.sizes["sp"])
    engine.forward_backward(collate([packs[i] for i in mine], ring=ring, rank=mesh.rank_on["sp"]))


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()
    }


# --- a rank without targets ----------------------------------------------------------------------------------


def _silent_rank() -> dict[str, Any]:
    """Update of dp2 whose first rank has no target, against one process that never saw that rank's packs."""
    packs = verify.make_packs(4)
    for pack in packs[:2]:
        pack.weights[:] = 0.0
        pack.targets[:] = -1
    engine = _engine({"dp": 2, "sp": 2})
    mine = packs[2:] if engine.mesh.rank_on["dp"] else packs[:2]
    sums, _ = engine.forward_backward(collate(mine, ring=RingLayout(2), rank=engine.mesh.rank_on["sp"]))
    finite = bool(torch.isfinite(sums).all()) and bool(torch.isfinite(engine.grad_squares()))
    alone = build_model(verify.SHAPE, None, seed=1, rope_theta=1e4)
    other = TorchEngine(
        alone, None, micro_batch=1,
        optimizer=torch.optim.SGD(alone.parameters(), lr=1.0),
    )  # fmt: skip
    other.forward_backward(collate(packs[2:]))
    engine.optimizer = torch.optim.SGD(engine.model.parameters(), lr=1.0, foreach=False)
    engine.step(1.0)
    other.step(1.0)
    theirs = _whole(dict(alone.named_parameters()))
    start = _whole(dict(build_model(verify.SHAPE, None, seed=1, rope_theta=1e4).named_parameters()))
    worst = 0.0
    for name, p in _whole(dict(engine.model.named_parameters())).items():
        update = theirs[name] - start[name]
        worst = max(worst, float(((p - start[name]) - update).norm() / update.norm()))
    return {"finite": finite, "update": worst}


# --- per-token losses on a ring ------------------------------------------------------------------------------


def _token_losses(case: dict[str, int], packs: list[Pack]) -> float:
    """Largest difference of any token's loss from one process."""
    engine = _engine(case)
    rank, size = engine.mesh.rank_on["sp"], engine.mesh.sizes["sp"]
    batch = collate(packs, ring=RingLayout(size), rank=rank)
    plain = build_model(verify.SHAPE, None, seed=1, rope_theta=1e4)
    whole = collate(packs)
    with torch.no_grad():
        mine = engine.model(batch.ids, **batch.inputs())
        truth = plain(whole.ids, **whole.inputs())
    here = batch.owner == rank
    return float((mine - truth[here].view(mine.shape)).abs().max())


# --- precision -----------------------------------------------------------------------------------------------


class _Reductions(TorchDispatchMode):
    """The dtypes that FSDP's reductions carry."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and ("reduce" in func._opname or "_allgather_base" in func._opname):
            tensor = args[1] if isinstance(args[1], Tensor) else args[0][0]
            self.seen.setdefault(func._opname, set()).add(str(tensor.dtype))
        return func(*args, **(kwargs or {}))


def _bf16(case: dict[str, Any]) -> dict[str, Any]:
    engine = _engine(case, precision="bf16", unit=2**40)
    packs = verify.make_packs(4)
    mine = packs_for_rank(0, len(packs), engine.mesh.rank_on["dp"], engine.mesh.sizes["dp"])
    batch = collate([packs[i] for i in mine])
    counts = engine.global_counts(batch)
    engine.global_counts = lambda batch: counts  # its all-reduce is fp64
    head, coefficients = engine.model.head, set()
    inner = head.cross_entropy

    def seeing(*args: Any, **options: Any) -> Tensor:
        coefficients.add(str(options["expected"].dtype))
        return inner(*args, **options)

    head.cross_entropy = seeing
    with _Reductions() as reductions:
        engine.forward_backward(batch)
    return {
        "case": case, "carried": reductions.seen, "coefficients": coefficients,
        "gradients": {str(p.grad.dtype) for p in engine.parameters()},
        "parameters": {str(p.dtype) for p in engine.parameters()},
        "values": _whole({n: p.grad for n, p in engine.model.named_parameters()}),
    }  # fmt: skip


def _bf16_rows() -> dict[str, Any]:
    rows = [_bf16({"dp": 4, "replicate": r}) for r in (1, 2, 4)]
    first = rows[0].pop("values")
    worst = 0.0
    for row in rows[1:]:
        other = row.pop("values")
        worst = max(worst, *(float((other[n] - g).norm() / g.norm()) for n, g in first.items()))
    return {"rows": rows, "apart": worst}


# --- checkpoints ---------------------------------------------------------------------------------------------


def _digests(engine: TorchEngine) -> dict[str, str]:
    """sha256 of every whole parameter and moment, and the step of every moment; from all ranks."""
    mine = {
        name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()
        for name, t in _whole(engine.tensors()).items()
    }
    for name, p in engine.model.named_parameters():
        mine[f"step.{name}"] = str(float(engine.optimizer.state[p]["step"]))
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    merged: dict[str, str] = {}
    for part in everyone:
        for name, digest in part.items():
            assert merged.setdefault(name, digest) == digest, f"{name} differs between ranks"
    return merged


def _moved_checkpoints(place: str) -> dict[str, Any]:
    """Two updates on one layout, saved, loaded by the others, saved by one of them and loaded again."""
    packs = verify.make_packs(8)
    engine = _engine(SAVED)
    for _ in range(2):
        _forward_backward(engine, packs)
        engine.step(1e-2)
    root = Path(place) / "checkpoints"
    if dist.get_rank() == 0:
        root.mkdir()
    dist.barrier()
    saved, _ = checkpoint.save(root, 2, engine.tensors(), {}, keep=9)
    truth = _digests(engine)
    rows = []
    for number, case in enumerate(LOADED):
        other = _engine(case, seed=9)
        before = _digests_of_parameters(other)
        checkpoint.load(saved, other.tensors())
        other.set_optimizer_step(2)
        found = _digests(other)
        rows.append(
            {"case": case, "equal": found == truth, "was_other": before != _digests_of_parameters(other)}
        )
        if number == 1:  # what a hybrid layout writes is read by the next ones
            saved, _ = checkpoint.save(root, 3, other.tensors(), {}, keep=9)
    return {"rows": rows, "tensors": len(truth)}


def _digests_of_parameters(engine: TorchEngine) -> str:
    return hashlib.sha256(
        b"".join(p.to_local().detach().numpy().tobytes() for p in engine.parameters())
    ).hexdigest()


# --- a run that moves ----------------------------------------------------------------------------------------


def _train(place: str, name: str, layout: dict[str, Any], recompute: str, dies_after: int | None) -> Path:
    values = verify.tiny_config(Path(place), name, world=4).to_dict()
    for stage in values["stages"]:
        stage |= {"layout": layout, "recompute": recompute}
    config = config_from_dict(values, source="test")
    verify._one_run(config, dies_after=dies_after)
    return Path(config.run.dir)


def _moved_run(place: str) -> dict[str, Any]:
    whole = _train(place, "whole", {"pp": 2, "sp": 2}, "none", None)
    steps = ({"dp": 2, "sp": 2, "replicate": 4}, {"dp": 2, "tp": 2, "norms": "replicated", "replicate": 2})
    _train(place, "moved", steps[0], "none", 3)
    _train(place, "moved", steps[1], "selective", 6)
    moved = _train(place, "moved", {"dp": 2, "tp": 2}, "full", None)
    if dist.get_rank() != 0:
        return {}
    events = [read_events(run / "metrics.jsonl") for run in (whole, moved)]
    return {
        name: {e["step"]: (e["loss"], e["lr"], e["grad_norm"]) for e in found if e.get("event") == "step"}
        for name, found in zip(("whole", "moved"), events, strict=True)
    }


def _worker(place: str) -> dict[str, Any]:
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    return {
        "parity": verify._layout_worker(LAYOUTS, "fp32"),
        "silent": _silent_rank(),
        "tokens": [
            _token_losses(c, verify.make_packs(3)) for c in ({"sp": 4}, {"dp": 2, "sp": 2}, {"dp": 4})
        ],
        "bf16": _bf16_rows(),
        "checkpoints": _moved_checkpoints(place),
        "run": _moved_run(place),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(4, _worker, str(tmp_path_factory.mktemp("sharding")), timeout=500)


def test_losses_are_divided_by_global_counts_and_gradients_summed_whatever_the_copies(
    seen: list[dict[str, Any]],
) -> None:
    """Uneven masks and accumulation: sums over dp, sp and copies, never averages."""
    assert len(seen[0]["parity"]) == len(LAYOUTS)
    for row in seen[0]["parity"]:
        assert row["holds"], row


def test_loss_and_norm_are_equal_for_rings_of_1_2_and_4(seen: list[dict[str, Any]]) -> None:
    rows = {r["layout"]: r for r in seen[0]["parity"]}
    for name in ("dp4", "dp2·sp2", "sp4"):
        assert rows[name]["max_rel_loss_diff"] <= 1e-6
        assert rows[name]["rel_norm_diff"] <= 1e-6
    assert max(seen[0]["tokens"]) <= 1e-5, "the loss of some token depends on the ring"


def test_a_rank_without_targets_changes_nothing(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["silent"]["finite"]
        assert rank["silent"]["update"] <= 1e-4, rank["silent"]  # of updates, differences of parameters


def test_bf16_gathers_bf16_and_reduces_fp32_over_shards_and_copies(seen: list[dict[str, Any]]) -> None:
    rows = seen[0]["bf16"]["rows"]
    for row in rows:
        assert row["gradients"] == row["parameters"] == {"torch.float32"}, row
        # Rounded coefficients would be ignored by the head, which then computes its logits twice.
        assert row["coefficients"] == {"torch.float32"}, row
        reduced = {name: kinds for name, kinds in row["carried"].items() if "reduce" in name}
        assert reduced, row
        assert all(kinds == {"torch.float32"} for kinds in reduced.values()), row
    assert rows[0]["carried"]["_allgather_base_"] == {"torch.bfloat16"}
    assert "allreduce_" in rows[1]["carried"], "copies were not reduced"
    assert seen[0]["bf16"]["apart"] <= 1e-5, "copies changed the gradients"


def test_parameters_moments_and_step_are_bit_equal_on_every_layout_that_loads_them(
    seen: list[dict[str, Any]],
) -> None:
    for rank in seen:
        found = rank["checkpoints"]
        parameters = len(list(build_model(verify.SHAPE, None, seed=1, rope_theta=1e4).parameters()))
        assert found["tensors"] == 4 * parameters  # parameter, two moments, step
        assert len(found["rows"]) == len(LOADED)
        for row in found["rows"]:
            assert row["was_other"], row
            assert row["equal"], row


def test_a_run_moved_from_copies_to_tensor_shards_keeps_loss_norm_and_learning_rate(
    seen: list[dict[str, Any]],
) -> None:
    whole, moved = seen[0]["run"]["whole"], seen[0]["run"]["moved"]
    assert whole.keys() == moved.keys()
    for step, (loss, lr, norm) in whole.items():
        assert moved[step][0] == pytest.approx(loss, rel=1e-5)
        assert moved[step][1] == lr
        assert moved[step][2] == pytest.approx(norm, rel=1e-4)
    o = verify.tiny_config(Path("nowhere"), "run", world=4).optimizer
    rates = [
        learning_rate(
            step, peak=o.lr, warmup=o.warmup, total=len(whole), schedule=o.schedule, min_ratio=o.min_lr_ratio
        )
        for step in sorted(whole)
    ]
    assert [whole[step][1] for step in sorted(whole)] == rates
    assert all(a > b for a, b in pairwise(rates[o.warmup :]))


def test_not_a_number_at_padding_does_not_poison_loss_or_gradients() -> None:
    """Masked, not multiplied by zero: what padding slots hold must not matter, whatever it is."""
    packs = verify.make_packs(3)
    for pack in packs[1:]:
        pack.doc[-5:], pack.targets[-5:], pack.weights[-5:] = -1, -1, 0.0
    padding = torch.from_numpy(np.stack([p.doc for p in packs])) < 0
    assert padding.any()
    results = []
    for poison in (False, True):
        model = build_model(verify.SHAPE, None, seed=1, rope_theta=1e4)
        if poison:
            assert model.head is not None
            model.head.register_forward_pre_hook(
                lambda module, args: (args[0].masked_fill(padding[..., None], float("nan")), *args[1:])
            )
        engine = TorchEngine(model, None, micro_batch=3)
        sums, _ = engine.forward_backward(collate(packs))
        results.append((sums, [p.grad for p in model.parameters()]))
    (sums, grads), (poisoned_sums, poisoned_grads) = results
    assert torch.isfinite(sums).all()
    assert torch.equal(sums, poisoned_sums)
    for mine, other in zip(grads, poisoned_grads, strict=True):
        assert torch.equal(mine, other)


def test_copies_that_do_not_divide_the_data_ranks_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="not divisible by replicate = 2"):
            Mesh.build({}, replicate=2)
    finally:
        dist.destroy_process_group()
