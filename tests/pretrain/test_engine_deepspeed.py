"""The DeepSpeed engine against one process and against the torch engine: maths, updates, checkpoints, whole runs."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ringweave.data_pipes.pack import packs_for_rank
from ringweave.parallel.grad_norm import world_sum
from ringweave.parallel.mesh import Mesh, describe_layout
from ringweave.parallel.ring_layout import RingLayout
from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import checkpoint, verify
from ringweave.pretrain.batch import Batch, collate
from ringweave.pretrain.config import RunConfig, config_from_dict, resume_differences
from ringweave.pretrain.engine import TorchEngine, make_adamw, world_loss
from ringweave.pretrain.errors import ConfigError
from ringweave.pretrain.parallelize import build_model

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
LR, CLIP, SEED = 1e-3, 0.05, 1  # the norm is above the limit, so clipping is part of every step


def _ds(mesh: Mesh, zero: int, **options: Any) -> Any:
    from ringweave.pretrain.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(
        verify.SHAPE, mesh, seed=SEED, rope_theta=1e4, micro_batch=2, zero=zero, **{**ADAMW, **options}
    )


def _torch(mesh: Mesh, precision: str = "fp32") -> TorchEngine:
    model = build_model(verify.SHAPE, mesh, seed=SEED, rope_theta=1e4, precision=precision)
    return TorchEngine(model, mesh, micro_batch=2, precision=precision, optimizer=make_adamw(model, **ADAMW))


def _batch(mesh: Mesh) -> Batch:
    """8 packs; the first has no target, two micro-batches a rank under dp2."""
    packs = verify.make_packs()
    mine = packs_for_rank(0, len(packs), mesh.rank_on["dp"], mesh.sizes["dp"])
    return collate([packs[i] for i in mine], ring=RingLayout(mesh.sizes["sp"]), rank=mesh.rank_on["sp"])


def _step(engine: TorchEngine, batch: Batch) -> tuple[float, float]:
    """One clipped update as the trainer makes it; gives loss and gradient norm."""
    sums, counts = engine.forward_backward(batch)
    loss = world_loss(world_sum(sums), counts, {}, normalize="modality")
    norm = float(world_sum(engine.grad_squares())) ** 0.5
    assert norm > CLIP
    engine.clip(norm, CLIP)
    engine.step(LR)
    return loss, norm


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in tensors.items()}


def _differing_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [n for n in a if not torch.equal(a[n].view(torch.int32), b[n].view(torch.int32))]


def _worst(a: dict[str, Tensor], b: dict[str, Tensor], prefix: str) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in b if n.startswith(prefix))


def _together(a: dict[str, Tensor], b: dict[str, Tensor], prefix: str) -> float:
    """The relative difference of all tensors as one vector."""
    names = [n for n in b if n.startswith(prefix)]
    off = sum(float((a[n] - b[n]).double().square().sum()) for n in names)
    return (off / sum(float(b[n].double().square().sum()) for n in names)) ** 0.5


def _gradients(row: dict[str, Any], engine: Any, batch: Batch, reference: tuple[Any, ...]) -> None:
    loss, grads, squares = reference
    sums, counts = engine.forward_backward(batch)
    ours = world_loss(world_sum(sums), counts, {}, normalize="modality")
    row["loss"] = abs(ours - loss) / abs(loss)
    row["norm"] = abs(float(world_sum(engine.grad_squares())) / squares - 1)
    row["grads"] = verify._worst({n: g.full_tensor().double() for n, g in engine.gradients().items()}, grads)
    engine.zero_grad()  # dropped, not added to what comes next


def _exchange(row: dict[str, Any], engine: Any, torch_engine: TorchEngine, zero: int, place: Path) -> None:
    """DeepSpeed's state to a fresh torch engine and back to a fresh DeepSpeed engine, through files."""
    mesh = engine.mesh
    before = _whole(engine.tensors())
    saved, _ = checkpoint.save(place, 3, engine.tensors(), {}, keep=1)
    mine = _torch(mesh)
    checkpoint.load(saved, mine.tensors())
    mine.set_optimizer_step(3)
    row["to_torch"] = _differing_bits(before, _whole(mine.tensors()))
    theirs = _whole(torch_engine.tensors())
    saved, _ = checkpoint.save(place, 4, torch_engine.tensors(), {}, keep=1)
    other = _ds(mesh, zero)
    state = other.tensors()
    checkpoint.load(saved, state)
    other.loaded(state)
    other.set_optimizer_step(3)
    row["from_torch"] = _differing_bits(theirs, _whole(other.tensors()))
    saved, _ = checkpoint.save(place, 5, other.tensors(), {}, keep=1)
    back = _torch(mesh)
    checkpoint.load(saved, back.tensors())
    back.set_optimizer_step(3)
    row["there_and_back"] = _differing_bits(theirs, _whole(back.tensors()))
    batch = _batch(mesh)
    row["next"] = [_step(e, batch) for e in (mine, engine, other, back)]
    row["next_params"] = _worst(_whole(other.tensors()), _whole(back.tensors()), "model.")


def _law(
    layouts: list[dict[str, int]], place: str, exchanged: dict[str, tuple[int, ...]]
) -> list[dict[str, Any]]:
    """A row for each layout and stage; `exchanged` says which also pass their checkpoints to and fro."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    reference = verify._reference(verify.make_packs(), "fp32")
    rows = []
    for layout in layouts:
        mesh = Mesh.build(layout)
        batch = _batch(mesh)
        torch_engine = _torch(mesh)
        steps = [_step(torch_engine, batch) for _ in range(3)]
        after = _whole(torch_engine.tensors())
        for zero in (1, 2, 3):
            started = time.monotonic()
            row: dict[str, Any] = {"layout": describe_layout(mesh.sizes), "zero": zero}
            engine = _ds(mesh, zero, recompute={1: "full", 2: "selective"}.get(zero, "none"))
            _gradients(row, engine, batch, reference)
            ours = [_step(engine, batch) for _ in range(3)]
            row["steps"] = max(abs(a / b - 1) for x, y in zip(ours, steps) for a, b in zip(x, y))
            mine = _whole(engine.tensors())
            row["params"] = _worst(mine, after, "model.")
            row["all_params"] = _together(mine, after, "model.")
            row["moments"] = _worst(mine, after, "optimizer.")
            if zero in exchanged[row["layout"]]:
                _exchange(row, engine, torch_engine, zero, Path(place) / f"{row['layout']}-{zero}")
            row["seconds"] = round(time.monotonic() - started, 2)
            rows.append(row)
    return rows


def _check(row: dict[str, Any]) -> None:
    assert row["loss"] <= 1e-6, row
    assert row["grads"] <= 1e-5, row
    assert row["norm"] <= 1e-6, row
    assert row["steps"] <= 1e-6, row
    assert row["all_params"] <= 1e-6, row
    assert row["params"] <= 5e-6, row  # AdamW magnifies rounding where gradients are nearly zero
    assert row["moments"] <= 1e-5, row
    if "to_torch" not in row:
        return
    assert row["to_torch"] == row["from_torch"] == row["there_and_back"] == [], row
    (a, a_norm), (b, b_norm), (c, c_norm), (d, d_norm) = row["next"]
    assert a == pytest.approx(b, rel=1e-6) and a_norm == pytest.approx(b_norm, rel=1e-5), row
    assert c == pytest.approx(d, rel=1e-6) and c_norm == pytest.approx(d_norm, rel=1e-5), row
    assert row["next_params"] <= 1e-6, row


@pytest.mark.slow
@needs_deepspeed
def test_zero_1_2_3_equal_one_process_and_the_torch_engine_over_dp(tmp_path: Path) -> None:
    rows = run_ranks(2, _law, [{"dp": 2}], str(tmp_path), {"dp2": (1, 2, 3)}, timeout=300)[0]
    assert [r["zero"] for r in rows] == [1, 2, 3]
    for row in rows:
        _check(row)


def _world_of_four(place: str) -> tuple[list[dict[str, Any]], dict[str, dict[int, float]]]:
    exchanged = {"dp2·sp2": (1,), "dp2·tp2": (2, 3)}
    rows = _law([{"dp": 2, "sp": 2}, {"dp": 2, "tp": 2}], place, exchanged)
    return rows, _runs(place)


def _config(place: str, name: str, engine: dict[str, Any], first: dict[str, int]) -> RunConfig:
    values = verify.tiny_config(Path(place), name, world=4).to_dict()
    values["engine"] = engine
    values["stages"][0]["layout"], values["stages"][1]["layout"] = first, {"sp": 4}
    return config_from_dict(values, source="test")


def _runs(place: str) -> dict[str, dict[int, float]]:
    """A run that dies on DeepSpeed, goes on and dies on torch, and ends on DeepSpeed; beside one that is torch's."""
    whole = _config(place, "whole", {}, {"dp": 2, "tp": 2})
    verify._one_run(whole)
    for engine, dies in (
        ({"kind": "deepspeed", "zero": 3}, 4),
        ({"kind": "torch"}, 5),
        ({"kind": "deepspeed", "zero": 1}, None),
    ):
        verify._one_run(_config(place, "moved", engine, {"dp": 2, "tp": 2}), dies_after=dies)
    return {n: verify.final_losses(Path(place) / n) for n in ("whole", "moved")}


@needs_deepspeed
@pytest.mark.slow
def test_zero_over_the_ring_and_beside_tensor_parallel_and_a_run_that_changes_engines(tmp_path: Path) -> None:
    rows, runs = run_ranks(4, _world_of_four, str(tmp_path), timeout=500)[0]
    assert [(r["layout"], r["zero"]) for r in rows if "to_torch" in r] == [
        ("dp2·sp2", 1), ("dp2·tp2", 2), ("dp2·tp2", 3),
    ]  # fmt: skip
    assert len(rows) == 6
    for row in rows:
        _check(row)
    assert len(runs["whole"]) == 8
    assert runs["whole"].keys() == runs["moved"].keys()
    for step, loss in runs["whole"].items():
        assert runs["moved"][step] == pytest.approx(loss, rel=1e-5), step


def _bf16() -> dict[str, list[tuple[float, float]]]:
    mesh = Mesh.build({"dp": 2})
    batch = _batch(mesh)
    runs = {"fp32": [_step(e, batch) for e in [_torch(mesh)] for _ in range(3)]}
    for zero in (1, 2, 3):
        engine = _ds(mesh, zero, precision="bf16")
        fresh = _whole(engine.tensors())
        exact = _whole(_torch(mesh).tensors())
        assert not _differing_bits(fresh, exact), "masters start from unrounded values"
        runs[f"zero{zero}"] = [_step(engine, batch) for _ in range(3)]
    return runs


@needs_deepspeed
@pytest.mark.slow
def test_bf16_keeps_fp32_masters_and_trains_near_fp32() -> None:
    runs = run_ranks(2, _bf16, timeout=300)[0]
    for zero in (1, 2, 3):
        for (loss, norm), (exact, exact_norm) in zip(runs[f"zero{zero}"], runs["fp32"], strict=True):
            assert abs(loss / exact - 1) < 2e-3
            assert abs(norm / exact_norm - 1) < 2e-2
    assert runs["zero1"] != runs["fp32"]


def _offloaded() -> dict[str, Any]:
    mesh = Mesh.build({"dp": 2})
    batch = _batch(mesh)
    torch_engine = _torch(mesh)
    steps = [_step(torch_engine, batch) for _ in range(3)]
    after = _whole(torch_engine.tensors())
    out: dict[str, Any] = {}
    for zero in (1, 2, 3):
        try:
            engine = _ds(mesh, zero, offload="cpu")
        except ConfigError as e:  # no compiler on this machine
            return {"unbuildable": str(e)}
        fresh = _ds(mesh, zero, offload="cpu")
        ours = [_step(engine, batch) for _ in range(3)]
        state = torch_engine.tensors()
        moved = fresh.tensors()
        for name, t in moved.items():
            t.to_local().copy_(_rows_of(state[name], t))
        fresh.loaded(moved)
        fresh.set_optimizer_step(3)
        out[f"zero{zero}"] = {
            "steps": max(abs(a / b - 1) for x, y in zip(ours, steps) for a, b in zip(x, y)),
            "params": _worst(_whole(engine.tensors()), after, "model."),
            "moved": _differing_bits(_whole(fresh.tensors()), after),
            "next": [_step(e, batch) for e in (fresh, engine)],
        }
    return out


def _rows_of(whole: Tensor, like: Tensor) -> Tensor:
    """The local part of `whole` placed as `like`; both are DTensors split by rows over the same ranks."""
    assert isinstance(whole, DTensor) and isinstance(like, DTensor)
    full = whole.full_tensor()
    parts = full.chunk(dist.get_world_size(), dim=0)
    return parts[dist.get_rank()] if dist.get_rank() < len(parts) else full[:0]


@needs_deepspeed
@pytest.mark.slow
def test_offloaded_updates_equal_those_on_the_device() -> None:
    out = run_ranks(2, _offloaded, timeout=500)[0]
    if "unbuildable" in out:
        pytest.skip(out["unbuildable"])
    for zero in (1, 2, 3):
        row = out[f"zero{zero}"]
        assert row["steps"] <= 1e-6, row
        assert row["params"] <= 5e-6, row
        assert row["moved"] == [], row
        (a, _), (b, _) = row["next"]
        assert a == pytest.approx(b, rel=1e-5), row


# --- refusals, before any process group --------------------------------------------------------------------


def _refused(change: dict[str, Any], layout: dict[str, Any], recompute: str = "none") -> str:
    values = verify.tiny_config(Path("runs"), "refused", world=4).to_dict()
    values["engine"] = change
    for stage in values["stages"]:
        stage["layout"], stage["recompute"] = layout, recompute
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values, source="test")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_deepspeed_with_a_pipeline_is_refused_with_reason_and_nearest_layouts() -> None:
    text = _refused({"kind": "deepspeed"}, {"pp": 2, "dp": 2})
    assert "owns its schedule" in text and "ZeRO < 2" in text
    assert "legal layouts for 4 processes: dp4, dp2·tp2, dp2·sp2" in text
    assert "engine.kind: torch" in text


def test_what_else_deepspeed_cannot_do_is_refused_before_any_process_starts() -> None:
    assert "replicate" in _refused({"kind": "deepspeed"}, {"dp": 4, "replicate": 2})
    assert "offload" in _refused({"kind": "torch", "offload": "cpu"}, {"dp": 4})
    assert "recompute" in _refused({"kind": "deepspeed", "zero": 3}, {"dp": 4}, "full")
    assert "zero" in _refused({"kind": "deepspeed", "zero": 4}, {"dp": 4})


def test_changing_the_engine_is_a_harmless_difference() -> None:
    saved = verify.tiny_config(Path("runs"), "run", world=4).to_dict()
    for stage in saved["stages"]:
        stage["layout"] = {"dp": 2, "sp": 2}
    before = config_from_dict(saved, source="test")
    after = config_from_dict({**saved, "engine": {"kind": "deepspeed", "zero": 2}}, source="test")
    assert {d[3] for d in resume_differences(before.to_dict(), after)} == {"harmless"}


@pytest.mark.slow
def test_deepspeed_is_imported_only_when_chosen() -> None:
    code = "import sys, ringweave.pretrain.trainer; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
