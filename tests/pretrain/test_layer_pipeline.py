"""Documents that stock code reproduces, and our pipeline over stock classes for the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedLayer3DRope, QwenEmbedRope

from ringweave.data_pipes.layer_tasks import TASKS
from ringweave.kernels.rotary import axes_table
from ringweave.pretrain.dit_batch import DiffusionSettings
from ringweave.pretrain.dit_sample import SampleSettings, Wish, sample
from ringweave.pretrain.export_dit import is_layered, write_diffusers
from ringweave.pretrain.export_proof import document_velocity
from ringweave.pretrain.layer_pipeline import LayerPipeline
from ringweave.pretrain.models.dit import DiT
from ringweave.pretrain.models.dit_positions import Grid
from ringweave.pretrain.stock_positions import (
    has_condition,
    reproduced,
    reproduced_plan,
    stock_places,
)
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.manifest import BOS

# Test modules are imported one by one (import mode "importlib"), so shared helpers need a path of their own.
sys.path.append(str(Path(__file__).parent))

from dit_exports import SEEN, close, latents_of, stock_velocity

# ---- our own pipeline ----


def test_more_conditions_than_stock_knows(model: DiT, layered: Path) -> None:
    """Two and three conditions of mixed, odd sizes, clips as layers: velocities of the stock class with our places."""
    pipeline = LayerPipeline.load(layered)
    ids = torch.tensor([BOS, 3, 59, 20])
    words = pipeline.words(ids)
    for grids in (
        [Grid(4, 4), Grid(3, 5, condition=True), Grid(2, 6, condition=True)],
        [Grid(5, 3), Grid(1, 1), Grid(4, 4, condition=True), Grid(4, 2, 2, True), Grid(1, 3, condition=True)],
        [Grid(2, 3, frames=3), Grid(2, 3), Grid(2, 3, condition=True), Grid(2, 3, condition=True)],
        SEEN,
        [Grid(4, 4)],
    ):
        cells = latents_of(grids)
        ours = document_velocity(model, grids, ids, cells, 0.35, preset="bil")
        assert close(pipeline.velocity(cells, 0.35, grids=grids, words=words), ours), grids
    grids = [Grid(4, 4), Grid(3, 5, condition=True), Grid(2, 6, condition=True)]
    both = torch.stack([latents_of(grids, seed) for seed in (1, 2)])
    batch = pipeline.velocity(both, torch.tensor([0.9, 0.1]), grids=grids, words=words)
    for cells, level, found in zip(both, (0.9, 0.1), batch):
        assert close(found, document_velocity(model, grids, ids, cells, level, preset="bil"))
    alone = stock_velocity(layered, grids, ids, 0.35)
    assert not close(alone, document_velocity(model, grids, ids, latents_of(grids), 0.35, preset="bil"))


def test_the_pipeline_counts_as_the_run_did(model: DiT, tmp_path: Path) -> None:
    write_diffusers(model, tmp_path / "out", preset="bil", sign=-1)
    pipeline, ids = LayerPipeline.load(tmp_path / "out"), torch.tensor([BOS])
    assert torch.equal(pipeline.ids(None), ids)
    cells = latents_of(SEEN)
    found = pipeline.velocity(cells, 0.5, grids=SEEN, words=pipeline.words(None))
    assert close(found, document_velocity(model, SEEN, ids, cells, 0.5, preset="bil", sign=-1))
    assert not close(found, document_velocity(model, SEEN, ids, cells, 0.5, preset="bil", sign=1))


def test_it_samples_what_training_code_samples(model: DiT, layered: Path) -> None:
    """Three guided steps of both solvers with two conditions between words and targets."""
    given = [latents_of([grid], seed).numpy() for seed, grid in enumerate((Grid(3, 5), Grid(2, 6)))]
    grids = [Grid(4, 4), Grid(2, 3), Grid(3, 5, condition=True), Grid(2, 6, condition=True)]
    wish, pipeline = Wish("a", [3, 59, 20], grids, given), LayerPipeline.load(layered)
    for settings in (SampleSettings(steps=3), SampleSettings(steps=3, guidance=1.0, solver="heun", seed=5)):
        ours = sample(model, [wish], DiffusionSettings(), settings)[0]
        found = pipeline.sample(wish, settings)
        assert [x.shape for x in found] == [(16, 16), (6, 16)]
        for mine, theirs in zip(ours, found):
            assert close(torch.from_numpy(mine), torch.from_numpy(theirs)), settings


def test_what_does_not_fit_is_told(layered: Path) -> None:
    pipeline = LayerPipeline.load(layered)
    words = pipeline.words(None)
    with pytest.raises(DataError, match="the grids have 47 cells"):
        pipeline.velocity(latents_of(SEEN)[1:], 0.5, grids=SEEN, words=words)
    with pytest.raises(DataError, match="one word at least"):
        pipeline.velocity(latents_of(SEEN), 0.5, grids=SEEN, words=words[:0])
    with pytest.raises(DataError, match="different grids"):
        pipeline.transformer.pos_embed([SEEN, SEEN[:1]], 3)
    with pytest.raises(VocabularyError, match="no tokenizer"):
        pipeline.ids("a word")


# ---- which documents stock code reproduces ----


def test_stock_places_are_those_of_the_stock_ropes() -> None:
    documents = [
        [Grid(4, 6)],
        [Grid(5, 3), Grid(1, 1), Grid(2, 7)],
        [Grid(1, 1)] * 9,
        [Grid(2, 2, frames=3), Grid(4, 4)],
        [Grid(2, 2), Grid(3, 4, frames=4)],
    ]
    for rope, layered in ((QwenEmbedRope, False), (QwenEmbedLayer3DRope, True)):
        stock = rope(theta=10000, axes_dim=[8, 12, 12], scale_rope=True)
        for grids in documents:
            shapes, found = (
                [[(g.frames, g.height, g.width) for g in grids]],
                stock_places(grids, 9, layered=layered),
            )
            if found is None:  # it fails on a condition of several frames
                with pytest.raises(RuntimeError):
                    stock(shapes, max_txt_seq_len=9)
                continue
            text, latents = found
            for places, theirs in zip((latents, text), stock(shapes, max_txt_seq_len=9)):
                turns = torch.complex(*axes_table(torch.from_numpy(places), dims=(8, 12, 12), theta=1e4))
                assert (turns - theirs).abs().max() < 1e-6, (rope, grids)
    assert stock_places([Grid(4, 4)], 4094, layered=False) is not None
    assert stock_places([Grid(4, 4)], 4095, layered=False) is None  # the table cuts the last word
    assert len(QwenEmbedRope(10000, [8, 12, 12], True)([[(1, 4, 4)]], max_txt_seq_len=4095)[1]) == 4094


def test_plans_that_stock_code_reproduces() -> None:
    """One condition needs the layered rope, none the plain one, two have no stock form."""
    said = {
        rope: {name for name, plan in TASKS.items() if reproduced_plan(plan, preset="bil", layered=rope)}
        for rope in (False, True)
    }
    without = {name for name, plan in TASKS.items() if not has_condition(plan)}
    assert said[False] == without and {"text_to_layers", "text_to_composite"} <= without
    assert {"matting", "decomposition", "background_to_composite", "removal"} <= said[True]
    assert not said[True] & {
        "matting_with_trimap",
        "recomposition",
        "lower_layers_to_top_layer",
        "text_to_layers",
    }
    for name in said[True]:
        assert sum(item.endswith("?") and item.startswith("latents") for item in TASKS[name]) == 1
    assert reproduced_plan(TASKS["matting_with_trimap"], preset="bil", sign=-1, layered=False)
    assert not reproduced_plan(TASKS["decomposition_in_two"], preset="bil", sign=-1, layered=False)
    assert not reproduced_plan(("latents:video", "latents:image"), preset="bil", layered=False)
    assert reproduced_plan(("latents:image", "latents:video"), preset="bil", layered=False)
    assert not reproduced_plan(("text", "image"), preset="bil", layered=False)
    one = [Grid(4, 4, condition=True), Grid(4, 4)]  # a condition that stands in front
    assert not reproduced(one, 3, preset="bil", layered=True)
    assert is_layered("bil", sign=1, conditions=True) and not is_layered("bil", sign=-1, conditions=True)
