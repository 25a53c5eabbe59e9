"""The laws over gloo processes: what `ringweave verify` checks, and more worlds and layouts than it has time for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import verify
from ringweave.pretrain.config import RunConfig, config_from_dict
from ringweave.pretrain.run_folder import RunFolder
from ringweave.pretrain.synthetic import SyntheticCorpus
from ringweave.pretrain.trainer import Trainer
from ringweave.tokenizers.segment import MODALITIES


@pytest.mark.slow
def test_verify_quick_holds_and_says_by_how_much() -> None:
    result = verify.run(quick=True, world=4)
    assert result["holds"], [r for r in result["rows"] if not r["holds"]]
    compared = {r["layout"] for r in result["rows"] if r["law"] == 2}
    assert compared >= {"dp4", "tp4", "pp4", "sp4", "dp2·tp2", "pp2·sp2", "tp2·sp2"}
    assert {r["law"] for r in result["rows"]} == {1, 2, 3, 5}
    assert 0 < result["max_rel_grad_diff"] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        (2, [{"dp": 2}, {"pp": 2}, {"tp": 2}, {"sp": 2}]),
        (3, [{"sp": 3}, {"pp": 3}]),
        (
            8,
            [
                {"dp": 2, "pp": 2, "tp": 2},
                {"dp": 2, "tp": 2, "sp": 2},
                {"pp": 2, "tp": 2, "sp": 2},
                {"dp": 2, "pp": 2, "sp": 2},
            ],
        ),
    ],
)
def test_layouts_equal_one_process(world: int, layouts: list[dict[str, int]]) -> None:
    rows = run_ranks(world, verify._layout_worker, layouts, "fp32", timeout=400)[0]
    assert [r["layout"] for r in rows] == [verify.describe_layout(x) for x in layouts]
    for row in rows:
        assert row["holds"], row


@pytest.mark.slow
def test_layouts_in_double_precision_leave_no_room_for_a_wrong_formula() -> None:
    rows = run_ranks(2, verify._layout_worker, [{"tp": 2}, {"sp": 2}], "fp64", timeout=200)[0]
    for row in rows:
        assert row["max_rel_loss_diff"] <= 1e-12
        assert row["max_rel_grad_diff"] <= 1e-10


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_packed_equals_separate(precision: str) -> None:
    row = verify.check_packing(precision)
    assert row["holds"], row


@pytest.mark.slow
def test_a_leak_between_documents_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: attention that forgets document boundaries must break law 1."""
    from ringweave.parallel.packed import PackedAttention

    real = PackedAttention.plan
    monkeypatch.setattr(
        PackedAttention,
        "plan",
        lambda self, documents, *others: real(self, torch.zeros_like(documents), *others),
    )
    assert not verify.check_packing("fp64")["holds"]
    assert not verify.check_isolation()["holds"]


def test_one_document_cannot_touch_another() -> None:
    assert verify.check_isolation()["holds"]


def test_scaling_all_modality_weights_changes_nothing() -> None:
    from ringweave.pretrain.objectives import coefficients

    counts = np.zeros(len(MODALITIES))
    counts[[1, 2, 6]] = 10.0, 3.5, 2.0
    for normalize in ("modality", "tokens"):
        one = coefficients(counts, {"text": 1.0, "image": 0.5, "score": 2.0}, normalize=normalize)
        ten = coefficients(
            counts,
            {"control": 10, "text": 10.0, "image": 5.0, "rgba": 10, "video": 10, "audio": 10, "score": 20.0},
            normalize=normalize,
        )
        assert np.allclose(one, ten, rtol=1e-15)
        assert one[[0, 3, 4, 5]].tolist() == [0, 0, 0, 0]
    by_hand = coefficients(counts, {"text": 1.0, "image": 0.5, "score": 2.0}, normalize="modality")
    assert by_hand[1] == pytest.approx(1.0 / 10 / 3.5)
    assert by_hand[2] == pytest.approx(0.5 / 3.5 / 3.5)


def _config(place: str, name: str, layout: dict[str, int], precision: str = "fp32") -> RunConfig:
    values = verify.tiny_config(Path(place), name, world=4).to_dict()
    for stage in values["stages"]:
        stage["layout"] = layout
    return config_from_dict({**values, "precision": precision}, source="test")


def _train(config: RunConfig, dies_after: int | None = None) -> dict[int, float]:
    verify._one_run(config, dies_after=dies_after)
    return verify.final_losses(Path(config.run.dir))


def _move_layouts(place: str) -> dict[str, Any]:
    whole = _train(_config(place, "whole", {"dp": 2, "sp": 2}))
    _train(_config(place, "moved", {"dp": 2, "tp": 2}), dies_after=3)
    _train(_config(place, "moved", {"sp": 4}), dies_after=6)
    moved = _train(_config(place, "moved", {"pp": 2, "sp": 2}))
    return {"whole": whole, "moved": moved}


@pytest.mark.slow
def test_a_run_moved_between_layouts_goes_on_as_if_nothing_was(tmp_path: Path) -> None:
    result = run_ranks(4, _move_layouts, str(tmp_path), timeout=400)[0]
    assert result["whole"].keys() == result["moved"].keys()
    for step, loss in result["whole"].items():
        assert abs(result["moved"][step] - loss) / loss <= 1e-5, (step, loss, result["moved"][step])


def _bf16(place: str) -> dict[str, dict[int, float]]:
    layouts = {"dp2tp2": {"dp": 2, "tp": 2}, "pp2tp2": {"pp": 2, "tp": 2}, "sp4": {"sp": 4}}
    runs = {name: _train(_config(place, name, layout, "bf16")) for name, layout in layouts.items()}
    return runs | {"fp32": _train(_config(place, "fp32", {"dp": 2, "tp": 2}))}


@pytest.mark.slow
def test_bf16_trains_alike_on_layouts_and_near_fp32(tmp_path: Path) -> None:
    runs = run_ranks(4, _bf16, str(tmp_path), timeout=400)[0]
    for name, losses in runs.items():
        for step, loss in losses.items():
            assert abs(loss - runs["fp32"][step]) / loss < 2e-3, (name, step)
    assert runs["dp2tp2"] != runs["fp32"]


@pytest.mark.slow
def test_checkpoint_step_counts_in_the_manifest_reach_adamw(tmp_path: Path) -> None:
    """A resumed optimizer must know how many updates it has made, or its bias correction restarts."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        config = verify.tiny_config(tmp_path, "run", world=1)
        folder = RunFolder(Path(config.run.dir))
        folder.acquire()
        seen: list[float] = []

        class Looking(Trainer):
            def _open_stage(self, number: int):
                run = super()._open_stage(number)
                state = run.engine.optimizer.state.values()
                seen.append(next((float(s["step"]) for s in state), 0.0))
                return run

        Looking(
            config,
            SyntheticCorpus(vocab=verify.VOCAB),
            vocab=verify.VOCAB,
            vocabulary="0",
            folder=folder,
            rank=0,
            report=lambda line: None,
        ).run()
        folder.release()
    finally:
        dist.destroy_process_group()
    assert seen == [0.0, 4.0]


def test_export_agrees_and_a_wrong_export_would_be_seen(tmp_path: Path) -> None:
    from ringweave.pretrain.export import logit_difference, write_llama
    from ringweave.pretrain.parallelize import build_model

    model = build_model(verify.SHAPE, None, seed=2, rope_theta=1e5)
    with (
        torch.no_grad()
    ):  # as a trained model: norms away from 1, weights large enough that every path counts
        for name, p in model.named_parameters():
            p.mul_(1.5 if name.endswith("norm.weight") else 4.0)
    write_llama(model, tmp_path / "right")
    assert logit_difference(model, tmp_path / "right") <= 1e-4
    model.rope_theta = 1e4
    assert logit_difference(model, tmp_path / "right") > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1, 2**24])
def test_sharding_units_do_not_change_the_gradients(unit: int) -> None:
    rows = run_ranks(2, _with_unit, unit, timeout=200)[0]
    assert rows["max_rel_grad_diff"] <= 1e-5, rows


def _with_unit(unit: int) -> dict[str, Any]:
    real = verify.build_parts
    verify.build_parts = lambda *args, **kw: real(*args, **{**kw, "unit": unit})
    packs = verify.make_packs()
    return verify.check_layout({"dp": 2}, packs, verify._reference(packs, "fp32"), "fp32")


def test_a_windowed_model_exports_as_mistral_and_a_mixed_one_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    from ringweave.pretrain.errors import ConfigError
    from ringweave.pretrain.export import logit_difference, write_llama
    from ringweave.pretrain.parallelize import build_model

    model = build_model(replace(verify.SHAPE, kv_heads=2, window=9), None, seed=2, rope_theta=1e5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)
    write_llama(model, tmp_path / "windowed")
    assert logit_difference(model, tmp_path / "windowed") <= 1e-3
    model.shape = replace(model.shape, window=12)
    assert logit_difference(model, tmp_path / "windowed") > 1e-2
    model.shape = replace(model.shape, full_every=2)
    with pytest.raises(ConfigError, match="cannot be exported"):
        write_llama(model, tmp_path / "mixed")
