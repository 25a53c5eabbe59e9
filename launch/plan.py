"""Arithmetic of a run before it starts: steps, parameters, memory. Pure, no torch; memory is an estimate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringweave.pretrain.config import RunConfig, Stage
from ringweave.pretrain.memory import latent_channels, memory_estimate, parameter_count, run_parameters

if TYPE_CHECKING:
    from ringweave.pretrain.recompute_table import Table

__all__ = ["make_plan", "memory_estimate", "parameter_count", "recompute_tables", "vocabulary_size"]

#: Used when neither a tokenizer set nor `--vocab` tells the size.
ASSUMED_VOCAB = 32_768


def vocabulary_size(folder: Path) -> tuple[int, str]:
    """(size, where it comes from) of the tokenizer set in `folder`, or an assumed size when there is none."""
    manifest = folder / "tokenizers.json"
    if not manifest.is_file():
        return ASSUMED_VOCAB, f"assumed: no {manifest}"
    from ringweave.tokenizers.manifest import VocabularyManifest

    return int(VocabularyManifest.load(manifest).size), str(manifest)


def describe_layout(stage: Stage) -> str:
    """`dp2·tp2`; axes of size 1 are left out."""
    layout = stage.layout
    sizes = (("dp", layout.dp), ("pp", layout.pp), ("tp", layout.tp), ("sp", layout.sp))
    return "·".join(f"{name}{size}" for name, size in sizes if size > 1) or "1 process"


def make_plan(config: RunConfig, *, vocab: int) -> dict[str, Any]:
    """JSON-ready table of the run: one entry a stage, totals, and notes on what looks unintended."""
    stages, notes = [], []
    for i, stage in enumerate(config.stages):
        stages.append(
            {
                "stage": i,
                "context": stage.context,
                "layout": describe_layout(stage),
                "steps": stage.steps,
                "tokens": stage.steps * stage.tokens_per_step,
                "tokens_per_step": stage.tokens_per_step,
                "micro_batches": stage.micro_batches,
                "rope_theta": stage.rope_theta,
                "sources": config.stage_weights(i),
                "memory": memory_estimate(config, stage, vocab=vocab),
            }
        )
        if stage.tokens < stage.tokens_per_step:
            notes.append(
                f"stage {i}: the budget of {stage.tokens} is less than one step of {stage.tokens_per_step}; "
                "one step is made"
            )
    if config.optimizer.warmup >= config.total_steps:
        notes.append(
            f"warm-up of {config.optimizer.warmup} steps is longer than the run's {config.total_steps} steps"
        )
    ratio = run_parameters(config, vocab=vocab)
    if ratio["ends"] > ratio["layers"]:
        notes.append("embedding and head hold more parameters than the layers")
    notes.append("memory is an estimate from formulas (pretrain/memory.py), not a measurement")
    return {
        "name": config.run.name,
        "world": config.world,
        "vocab": vocab,
        "parameters": ratio["total"],
        "total_steps": config.total_steps,
        "total_tokens": sum(s["tokens"] for s in stages),
        "stages": stages,
        "notes": notes,
        "config_hash": config.hash(),
    }


def recompute_tables(config: RunConfig, *, vocab: int, limit: int | None = None) -> list[Table]:
    """For each stage what recomputation costs and saves, measured here, in this process. Imports torch.

    limit: bytes a rank may use; unless given what the stage says, or what is free here, shared by all ranks.
    """
    from ringweave.pretrain.backbone import shape_of
    from ringweave.pretrain.recompute_table import stage_table

    channels = latent_channels(Path(config.tokenizers.dir)) if config.model.kind == "dit" else 0
    shape = shape_of(config, vocab=vocab, channels=channels)
    return [
        stage_table(config, number, shape, limit=limit, ranks=config.world)
        for number in range(len(config.stages))
    ]
