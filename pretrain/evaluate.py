"""Held-out loss by modality of a run's newest checkpoint, beside the unigram entropy of its training tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringweave.data_pipes.corpus import Corpus
from ringweave.data_pipes.pack import Pack
from ringweave.data_pipes.planner import PackPlanner, plan_once
from ringweave.data_pipes.stream import PackStream
from ringweave.pretrain.batch import collate
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.evaluate_dit import evaluate_dit
from ringweave.pretrain.export import load_run, same_vocabulary
from ringweave.pretrain.job import open_corpus
from ringweave.pretrain.models.dit import DiT
from ringweave.pretrain.models.lwm import LWM
from ringweave.pretrain.objectives import term_sums
from ringweave.pretrain.run_folder import RunFolder
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.manifest import VocabularyManifest
from ringweave.tokenizers.segment import MODALITIES


@torch.no_grad()
def evaluate_run(
    run_dir: Path, *, max_tokens_per_source: int = 40_000, context: int | None = None
) -> dict[str, Any]:
    """{"step", "heldout": {modality: {loss, tokens, unigram_entropy}}} in nats; also logged to metrics.jsonl. Of a dit
    {modality: {loss, by_sigma}}, mean square errors at fixed noise levels.

    One process, the checkpoint's last context (or `context`). A source with more held-out tokens than
    `max_tokens_per_source` is evaluated on its first documents up to that many.
    """
    started = time.monotonic()
    torch.set_num_threads(os.cpu_count() or 1)  # alone on the machine, whatever training was told
    model, saved, config = load_run(run_dir)
    same_vocabulary(saved, Path(config.tokenizers.dir))
    manifest = VocabularyManifest.load(Path(config.tokenizers.dir) / "tokenizers.json")
    with (
        closing(open_corpus(config, manifest, heldout=True)) as heldout,
        closing(open_corpus(config, manifest)) as training,
    ):
        context = (
            context or config.stages[min(saved.manifest["cursor"]["stage"], len(config.stages) - 1)].context
        )
        if isinstance(model, DiT):
            figures: dict[str, Any] = evaluate_dit(
                model, heldout, config, context=context, most=max_tokens_per_source
            )
        else:
            figures = _figures(model, heldout, training, config, context, max_tokens_per_source)
    folder = RunFolder(run_dir)
    folder.attempt = max(0, folder.attempts() - 1)  # what is evaluated is what the last attempt left
    folder.log("eval", step=saved.step, heldout=figures)
    return {
        "step": saved.step,
        "heldout": figures,
        "context": context,
        "seconds": round(time.monotonic() - started, 1),
    }


def _figures(
    model: LWM, heldout: Corpus, training: Corpus, config: RunConfig, context: int, most: int
) -> dict[str, dict[str, float]]:
    """{modality: {loss, tokens, unigram_entropy}} of at most `most` tokens a source."""
    if not heldout.lengths:
        raise DataError(
            "no source has held-out shards", where="data.sources[].heldout", fix="name them in the config"
        )
    lengths = {n: _first(v, most) for n, v in heldout.lengths.items()}
    plans = plan_once(lengths, context=context)
    planner = PackPlanner(lengths=lengths, weights=dict.fromkeys(lengths, 1.0), seed=0, context=context)
    stream = PackStream(heldout, planner)
    packs = (stream.materialise(plan) for plan in plans)
    sums, counts = heldout_sums(model, packs, prefix=config.model.attention == "prefix")
    return {
        m: {
            "loss": float(sums[i] / counts[i]),
            "tokens": round(float(counts[i])),
            "unigram_entropy": training.unigram_entropy(m),
        }
        for i, m in enumerate(MODALITIES)
        if counts[i] > 0
    }


@torch.no_grad()
def heldout_sums(
    model: LWM, packs: Iterable[Pack], *, prefix: bool = False
) -> tuple[Tensor, NDArray[np.float64]]:
    """Σ weight·nll and Σ weight per modality over all packs, fp64 [modalities]; only their quotient is a loss.

    A mean over packs would weigh the tokens of a short last pack more than others.
    """
    sums = torch.zeros(len(MODALITIES), dtype=torch.float64)
    counts = np.zeros(len(MODALITIES))
    for pack in packs:
        batch = collate([pack], prefix=prefix)
        nll = model(batch.ids, **batch.inputs())
        sums += term_sums(nll, torch.from_numpy(batch.weights), torch.from_numpy(batch.modality))
        counts += batch.counts
    return sums, counts


def _first(lengths: np.ndarray, limit: int) -> np.ndarray:
    """`lengths` with documents beyond the first `limit` tokens set to 0 (left out)."""
    kept = lengths.copy()
    kept[np.cumsum(kept) > limit] = 0
    if not kept.any() and len(lengths):
        kept[0] = lengths[0]
    return kept
