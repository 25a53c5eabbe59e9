"""Faults other trainers had in validation, export and pipelines, as tests of ours (project and issue in each name)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import verify
from ringweave.pretrain.checkpoint import checkpoint_name
from ringweave.pretrain.config import config_from_dict
from ringweave.pretrain.evaluate import heldout_sums
from ringweave.pretrain.export import export_run, llama_name, load_run, write_llama
from ringweave.pretrain.parallelize import build_model


def test_torchtitan_4167_validation_is_one_quotient_whatever_the_packing() -> None:
    """Sums over counts: the same documents in packs of one each give the same loss as in full packs."""
    model = build_model(verify.SHAPE, None, seed=1, rope_theta=1e4, precision="fp64")
    packs = verify.make_packs()
    sums, counts = heldout_sums(model, packs)
    alone, alone_counts = heldout_sums(model, verify.separate(packs))
    assert np.allclose(counts, alone_counts) and counts.sum() > 0
    some = counts > 0
    assert np.allclose(sums.numpy()[some] / counts[some], alone.numpy()[some] / counts[some], rtol=1e-10)
    means = [float(a[some].sum() / b[some].sum()) for a, b in (heldout_sums(model, [p]) for p in packs[1:])]
    assert (
        abs(np.mean(means) / float(sums[some].sum() / counts[some].sum()) - 1) > 1e-5
    )  # a mean of means is not it


def test_torchtitan_1441_export_and_back_is_bit_equal(tmp_path: Path) -> None:
    """Native → Hugging Face → native: every parameter's bits, under a one-to-one map of names."""
    from safetensors.torch import load_file

    model = build_model(verify.SHAPE, None, seed=3, rope_theta=1e5)
    write_llama(model, tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    names = {llama_name(n): p for n, p in model.named_parameters()}
    assert names.keys() == theirs.keys()
    assert all(torch.equal(theirs[n], p) for n, p in names.items())


def _train(place: str) -> None:
    for name, layout in (("pipeline", {"pp": 2, "sp": 2}), ("data", {"dp": 2, "tp": 2})):
        values = verify.tiny_config(Path(place), name, world=4).to_dict()
        for stage in values["stages"]:
            stage["layout"] = {**layout, "schedule": "interleaved" if name == "pipeline" else "1f1b"}
        verify._one_run(config_from_dict(values, source="test"))
    dist.barrier()


@pytest.mark.slow
def test_bridge_3428_export_of_a_pipelined_run_ends_and_equals_the_unpipelined_one(tmp_path: Path) -> None:
    run_ranks(4, _train, str(tmp_path), timeout=400)
    exported = {}
    for name in ("pipeline", "data"):
        record = export_run(tmp_path / name, out=tmp_path / f"{name}-export")
        assert record["max_abs_logit_diff"] <= 1e-4
        model, saved, _ = load_run(tmp_path / name)
        assert saved.path.name == checkpoint_name(8)
        exported[name] = dict(model.named_parameters())
    for key, value in exported["data"].items():
        assert (value - exported["pipeline"][key]).norm() <= 1e-4 * value.norm(), key
