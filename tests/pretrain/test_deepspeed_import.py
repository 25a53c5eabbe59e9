"""Checkpoints that DeepSpeed itself wrote, imported: equal to what DeepSpeed says they hold, and never executed."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import checkpoint, deepspeed_import, verify
from ringweave.pretrain.batch import collate
from ringweave.pretrain.config import RunConfig, config_from_dict
from ringweave.pretrain.engine import TorchEngine, make_adamw
from ringweave.pretrain.errors import StorageError
from ringweave.pretrain.parallelize import build_model
from ringweave.tokenizers.errors import EXIT_STORAGE

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.slow,  # its fixture trains on two ranks
]
CASES = {"zero1": (1, False), "zero2": (2, False), "zero3": (3, False), "zero1-bf16": (1, True)}
STEPS = 5


def _config(**model: Any) -> RunConfig:
    """A run whose model is verify.SHAPE: 4 steps in its first stage, 4 in its second."""
    values = verify.tiny_config(Path("runs"), "run", world=1).to_dict()
    values["model"] = {**values["model"], "kv_heads": 4, "head_chunk": 16, **model}
    return config_from_dict(values, source="test")


def _train_with_deepspeed(place: str) -> None:
    """Nothing of ours but the model: DeepSpeed's engine, optimizer and files, on two ranks with other data each."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from ringweave.pretrain.deepspeed_model import import_deepspeed as the_library

    library = the_library("cpu")
    packs = verify.make_packs()
    batch = collate(packs[1 + dist.get_rank() :: 4])
    for name, (zero, bf16) in CASES.items():
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": zero, "memory_efficient_linear": False},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        }
        if bf16:
            settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        model = build_model(verify.SHAPE, None, seed=1, rope_theta=1e4)
        engine, *_ = library.initialize(model=model, model_parameters=model.parameters(), config=settings)
        for _ in range(STEPS):
            engine.backward(engine(batch.ids, **batch.inputs()).float().mean())
            engine.step()
        engine.save_checkpoint(str(Path(place) / name), tag=f"global_step{STEPS}")
        state = {}
        for n, p in model.named_parameters():
            state[f"model.{n}"] = safe_get_full_fp32_param(p).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"optimizer.{key}.{n}"] = safe_get_full_optimizer_state(p, key).clone()
        if dist.get_rank() == 0:
            save_file(state, Path(place) / f"{name}.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    place = tmp_path_factory.mktemp("deepspeed")
    run_ranks(2, _train_with_deepspeed, str(place), timeout=300)
    return place, {name: load_file(place / f"{name}.safetensors") for name in CASES}


def _import(folder: Path, out: Path, config: RunConfig | None = None, **options: Any) -> checkpoint.Saved:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        return deepspeed_import.import_deepspeed(
            folder, out, config=config or _config(), vocab=verify.VOCAB, vocabulary_hash="0" * 64,
            corpus_digest="1", **options,
        )  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_imported_tensors_are_deepspeeds_bit_for_bit_and_train_on(
    trained: tuple[Path, dict[str, dict[str, torch.Tensor]]], tmp_path: Path, name: str
) -> None:
    place, held = trained
    saved = _import(place / name, tmp_path / "checkpoints")
    found = checkpoint.find(tmp_path / "checkpoints", warn=pytest.fail)
    assert found is not None and found.step == saved.step == STEPS
    assert found.manifest["cursor"] == {
        "step": 5, "stage": 1, "stage_step": 1, "tokens": 4 * 4 * 64 + 2 * 128, "stream": None,
    }  # fmt: skip
    model = build_model(verify.SHAPE, None, seed=2, rope_theta=1e4)
    optimizer = make_adamw(model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    engine = TorchEngine(model, None, micro_batch=1, optimizer=optimizer)
    state = engine.tensors()
    checkpoint.load(found, state)
    engine.set_optimizer_step(found.step)
    assert state.keys() == held[name].keys()
    for key, value in state.items():
        assert torch.equal(value, held[name][key]), key
    batch = collate(verify.make_packs())
    sums, _ = engine.forward_backward(batch)
    assert torch.isfinite(sums).all()
    engine.step(1e-3)


def test_parameters_agree_with_deepspeeds_own_converter(
    trained: tuple[Path, dict[str, dict[str, torch.Tensor]]],
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    place, _ = trained
    for name in ("zero2", "zero3"):
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(place / name))
        ours, step = deepspeed_import.read_zero(place / name / f"global_step{STEPS}")
        assert step == STEPS
        for key, value in theirs.items():
            assert torch.equal(ours[f"model.{key}"], value), (name, key)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_have_to_be_executed_is_refused_and_not_executed(
    trained: tuple[Path, dict[str, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    folder = tmp_path / "copy" / f"global_step{STEPS}"
    folder.mkdir(parents=True)
    for file in (trained[0] / "zero1" / f"global_step{STEPS}").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    victim = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    contents = torch.load(victim, weights_only=False)  # made by this test's own run
    contents["client_state"] = _Evil(tmp_path / "executed")
    torch.save(contents, victim)
    with pytest.raises(StorageError, match="would execute a pickle") as caught:
        _import(tmp_path / "copy", tmp_path / "out", tag=f"global_step{STEPS}")
    assert caught.value.exit_code == EXIT_STORAGE == 6
    assert "save it again without" in str(caught.value)
    assert not (tmp_path / "executed").exists()
    assert not list((tmp_path / "out").glob("step-*"))


def test_other_models_missing_ranks_tensor_shards_and_bare_pickles_are_refused(
    trained: tuple[Path, dict[str, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    source = trained[0] / "zero3" / f"global_step{STEPS}"
    with pytest.raises(StorageError, match="another shape"):
        _import(trained[0] / "zero3", tmp_path / "out", _config(ffn=128))
    with pytest.raises(StorageError, match="lacks"):
        _import(trained[0] / "zero3", tmp_path / "out", _config(layers=6))
    with pytest.raises(StorageError, match="latest"):
        _import(tmp_path, tmp_path / "out")
    folder = tmp_path / "copy" / "t"
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").rename(folder / "kept")
    with pytest.raises(StorageError, match="2 ranks wrote it, files of 1"):
        _import(tmp_path / "copy", tmp_path / "out", tag="t")
    (folder / "kept").rename(folder / "zero_pp_rank_1_mp_rank_01_optim_states.pt")
    with pytest.raises(StorageError, match="tensor-parallel shards"):
        _import(tmp_path / "copy", tmp_path / "out", tag="t")
    (folder / "zero_pp_rank_1_mp_rank_01_optim_states.pt").rename(
        folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    )
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"\x80\x04}\x94.")  # pickle, no zip
    with pytest.raises(StorageError, match="cannot be imported"):
        _import(tmp_path / "copy", tmp_path / "out", tag="t")
