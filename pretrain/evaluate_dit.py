"""Held-out flow loss of a diffusion transformer at fixed noise levels, by modality.

One mean over all levels hides where a model learns: at low noise the loss is of detail, at high noise of layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ringweave.data_pipes.lengths import as_lengths
from ringweave.data_pipes.pack import Pack
from ringweave.data_pipes.planner import PackPlanner, plan_once
from ringweave.data_pipes.stream import Documents, PackStream
from ringweave.pretrain.backbone import diffusion_settings
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.dit_batch import DiffusionSettings, collate_diffusion
from ringweave.pretrain.flow import VALIDATION_LEVELS
from ringweave.pretrain.models.dit import DiT
from ringweave.pretrain.objectives import term_sums
from ringweave.pretrain.parallelize import build_model
from ringweave.tokenizers.segment import MODALITIES


def heldout_packs(corpus: Documents, *, context: int, most: int) -> list[Pack]:
    """The first documents of each source up to `most` tokens, packed once."""
    lengths, known = {}, as_lengths(corpus.lengths)
    for name in known.names:
        values = np.concatenate([known.of(name, shard) for shard in range(len(known.counts(name)))])
        kept = values.copy()
        kept[np.cumsum(kept) > most] = 0
        if not kept.any() and len(kept):
            kept[0] = values[0]
        lengths[name] = kept
    planner = PackPlanner(lengths=lengths, weights=dict.fromkeys(lengths, 1.0), seed=0, context=context)
    stream = PackStream(corpus, planner)
    return [stream.materialise(plan) for plan in plan_once(lengths, context=context)]


@torch.no_grad()
def loss_by_level(
    model: DiT,
    packs: Sequence[Pack],
    settings: DiffusionSettings,
    *,
    levels: Sequence[float] = VALIDATION_LEVELS,
) -> dict[str, dict[str, float]]:
    """{modality: {level: mean square error of the velocity}}; the same noise for every model, words never dropped."""
    sums = torch.zeros(len(levels), len(MODALITIES), dtype=torch.float64)
    counts = np.zeros((len(levels), len(MODALITIES)))
    for pack in packs:
        for number, level in enumerate(levels):
            batch = collate_diffusion([pack], settings, channels=model.shape.channels, levels=[level])
            losses = model(batch.ids, **batch.inputs())
            weights, modality = torch.from_numpy(batch.weights), torch.from_numpy(batch.modality)
            sums[number] += term_sums(losses, weights, modality)
            counts[number] += batch.counts
    return {
        name: {f"{level:g}": float(sums[i, m] / counts[i, m]) for i, level in enumerate(levels)}
        for m, name in enumerate(MODALITIES)
        if counts[:, m].all() and name != "text"
    }


def evaluate_dit(
    model: DiT, corpus: Documents, config: RunConfig, *, context: int, most: int
) -> dict[str, dict[str, Any]]:
    """{modality: {"loss": mean over the levels, "by_sigma": {level: loss}, "untrained_by_sigma"}} of held-out
    documents; untrained: of the same model as it was before its first step."""
    settings = diffusion_settings(config, len(config.stages) - 1)
    packs = heldout_packs(corpus, context=context, most=most)
    fresh = build_model(model.shape, None, seed=config.run.seed).eval()
    found, before = (loss_by_level(which, packs, settings) for which in (model, fresh))
    return {
        name: {
            "loss": float(np.mean(list(losses.values()))),
            "by_sigma": losses,
            "untrained_by_sigma": before[name],
        }
        for name, losses in found.items()
    }
