"""Arithmetic of a run before it starts: steps, parameters, memory. Pure, no torch; memory is an estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ringweave.pretrain.config import ModelSection, RunConfig, Stage

GIB = 1024**3
#: Used when neither a tokenizer set nor `--vocab` tells the size.
ASSUMED_VOCAB = 32_768
#: Channels of a cell of latents when no tokenizer set tells: 16 of the autoencoder, four latents a cell.
ASSUMED_CHANNELS = 64


def vocabulary_size(folder: Path) -> tuple[int, str]:
    """(size, where it comes from) of the tokenizer set in `folder`, or an assumed size when there is none."""
    manifest = folder / "tokenizers.json"
    if not manifest.is_file():
        return ASSUMED_VOCAB, f"assumed: no {manifest}"
    from ringweave.tokenizers.manifest import VocabularyManifest

    return int(VocabularyManifest.load(manifest).size), str(manifest)


def latent_channels(folder: Path) -> int:
    """Channels of the latents of the tokenizer set in `folder`, or an assumed number when there is none."""
    manifest = folder / "tokenizers.json"
    if not manifest.is_file():
        return ASSUMED_CHANNELS
    from ringweave.tokenizers.manifest import VocabularyManifest

    about = VocabularyManifest.load(manifest).preprocessing.get("latents")
    return int(about["channels"]) if isinstance(about, dict) else ASSUMED_CHANNELS


def parameter_count(
    model: ModelSection, *, vocab: int, channels: int = ASSUMED_CHANNELS, words_head: bool = False
) -> dict[str, int]:
    """Parameters by part: untied embedding and head [V, D]; per layer GQA, SwiGLU, two norms; no biases.

    Of a dit (`_dit_count`): channels of its latents; words_head: whether its words have a loss.
    """
    if model.kind == "dit":
        return _dit_count(model, vocab=vocab, channels=channels, words_head=words_head)
    width, kv_width = model.width, model.kv_heads * model.head_dim
    attention = 2 * width * width + 2 * width * kv_width
    mlp = 3 * width * model.ffn
    layer = attention + mlp + 2 * width
    ends = 2 * vocab * width + width
    return {
        "layer": layer,
        "layers": layer * model.layers,
        "ends": ends,
        "total": layer * model.layers + ends,
    }


def _dit_count(model: ModelSection, *, vocab: int, channels: int, words_head: bool) -> dict[str, int]:
    """Per block and stream: modulation, three projections in and one out, two norms of heads, MLP, all with biases;
    at the ends the words' decoder, the noise vectors, latents in and velocities out."""
    width, streams, words = model.width, 2 if model.streams == "double" else 1, model.words
    linear = width * width + width
    mlp = 2 * model.ffn * width + model.ffn + width
    layer = streams * (6 * linear + 4 * linear + 2 * model.head_dim + mlp)
    inner = max(64, round(words.width * 8 / 3 / 64) * 64)
    decoder = words.layers * (4 * words.width**2 + 3 * words.width * inner + 2 * words.width) + words.width
    ends = decoder + (2 if words_head else 1) * vocab * words.width
    ends += 256 * width + width + linear  # noise vectors
    ends += words.width + (words.width + 1) * width  # words in
    ends += (channels + 1) * width + 2 * linear + (width + 1) * channels
    return {
        "layer": layer,
        "layers": layer * model.layers,
        "ends": ends,
        "total": layer * model.layers + ends,
    }


def memory_estimate(config: RunConfig, stage: Stage, *, vocab: int) -> dict[str, float]:
    """GiB of the fullest rank. States: fp32 weights, gradients and two AdamW moments (16 bytes a parameter).

    States are cut by pp (layers), tp and, being sharded, dp·sp. Activations keep, for every token of a rank,
    about 12 widths and 3 feed-forward widths a layer (no recomputation), for as many micro-batches as the
    pipeline has in flight. Attention scores are never stored whole; the head keeps one chunk of logits.
    """
    model, layout = config.model, stage.layout
    count = _count(config, vocab=vocab)
    per_stage = -(-model.layers // layout.pp)
    ends = count["ends"] if layout.pp == 1 else count["ends"] / 2
    held = (per_stage * count["layer"] + ends) / layout.tp
    states = 16 * held / (layout.dp * layout.sp)
    # One layer at a time (or the head) is gathered whole to compute; pipeline ranks keep all gathered.
    gathered = 4 * (held if layout.pp > 1 else max(count["layer"], ends) / layout.tp)
    width = 2 if config.precision == "bf16" else 4
    tokens = stage.context / layout.sp * stage.micro_batch
    in_flight = min(layout.pp, stage.micro_batches)
    activations = in_flight * per_stage * tokens * (12 * model.width + 3 * model.ffn / layout.tp) * width
    logits = 3 * 4 * min(model.head_chunk, tokens) * vocab / layout.tp
    parts = {"states": states, "gathered": gathered, "activations": activations, "logits": logits}
    out = {f"{name}_gib": value / GIB for name, value in parts.items()}
    out["total_gib"] = sum(parts.values()) / GIB
    return out


def _count(config: RunConfig, *, vocab: int) -> dict[str, int]:
    channels = (
        latent_channels(Path(config.tokenizers.dir)) if config.model.kind == "dit" else ASSUMED_CHANNELS
    )
    head = any(stage.words_loss > 0 for stage in config.stages)
    return parameter_count(config.model, vocab=vocab, channels=channels, words_head=head)


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
    ratio = _count(config, vocab=vocab)
    if ratio["ends"] > ratio["layers"]:
        notes.append("embedding and head hold more parameters than the layers")
    notes.append("memory is an estimate from formulas (launch/plan.py), not a measurement")
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
