"""Memory of a run before it starts: parameters and states by formulas, and what this machine has. No torch."""

from __future__ import annotations

from pathlib import Path

from ringweave.parallel.schedule_proof import most_alive
from ringweave.parallel.schedules import table
from ringweave.pretrain.config import ModelSection, RunConfig, Stage

GIB = 1024**3
#: Channels of a cell of latents when no tokenizer set tells: 16 of the autoencoder, four latents a cell.
ASSUMED_CHANNELS = 64


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
    decoder += (2 if words_head else 1) * vocab * words.width
    text = words.given or words.width
    ends = 0 if words.given else decoder
    ends += 256 * width + width + linear  # noise vectors
    ends += text + (text + 1) * width  # words in
    ends += (channels + 1) * width + 2 * linear + (width + 1) * channels
    return {
        "layer": layer,
        "layers": layer * model.layers,
        "ends": ends,
        "total": layer * model.layers + ends,
    }


def memory_estimate(
    config: RunConfig, stage: Stage, *, vocab: int, channels: int | None = None
) -> dict[str, float]:
    """GiB of the fullest rank. States: fp32 weights, gradients and two AdamW moments (16 bytes a parameter), and the
    moving average where there is one (4 more).

    States are cut by pp (layers), tp and, being sharded, dp·sp / replicate. Activations keep, for every token of a
    rank, about 12 widths and 3 feed-forward widths a layer (no recomputation), for as many micro-batches as the
    pipeline has in flight. Attention scores are never stored whole; the head keeps one chunk of logits. channels: of
    the latents of a dit, where the tokenizers' folder does not tell.
    """
    model, layout = config.model, stage.layout
    count = run_parameters(config, vocab=vocab, channels=channels)
    per_stage = -(-model.layers // layout.pp)
    ends = count["ends"] if layout.pp == 1 else count["ends"] / 2
    held = (per_stage * count["layer"] + ends) / layout.tp
    states = (20 if config.optimizer.ema else 16) * held * layout.replicate / (layout.dp * layout.sp)
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


def run_parameters(config: RunConfig, *, vocab: int, channels: int | None = None) -> dict[str, int]:
    """`parameter_count` of a run. channels: as in `memory_estimate`."""
    if channels is None:
        dit = config.model.kind == "dit"
        channels = latent_channels(Path(config.tokenizers.dir)) if dit else ASSUMED_CHANNELS
    head = any(stage.words_loss > 0 for stage in config.stages)
    return parameter_count(config.model, vocab=vocab, channels=channels, words_head=head)


def layers_alive(stage: Stage, *, layers: int) -> int:
    """Layers whose activations the fullest rank keeps at once: by its pipeline's table, micro-batch by micro-batch."""
    layout = stage.layout
    if layout.pp == 1:
        return layers
    actions = table(layout.schedule, layout.pp, layout.virtual, stage.micro_batches)
    alive = max(most_alive(row) for row in actions)
    return alive * max(layout.split or (-(-layers // layout.parts),))


def memory_limit(*, device: str, ranks: int) -> tuple[int, str]:
    """(bytes a rank may use, where they come from): a GPU's memory, or what is free here among `ranks` of them."""
    if device == "cuda":
        import torch

        _, total = torch.cuda.mem_get_info()
        return int(total), "of the GPU"
    import psutil

    free, where = int(psutil.virtual_memory().available), "free on this machine"
    left = cgroup_left()
    if left is not None and left < free:
        free, where = left, "left by the cgroup's limit"
    return free // ranks, where if ranks == 1 else f"{where}, {free / GIB:.2f} GiB among {ranks} ranks"


def cgroup_left(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process's cgroup may still take (files it can drop count as free); None without a limit."""
    forms = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    )
    for limit, used, droppable in forms:
        try:
            most = (root / limit).read_text().strip()
            now = int((root / used).read_text())
            stat = (root / used).with_name("memory.stat").read_text().split()
        except (OSError, ValueError):
            continue
        if not most.isdigit() or int(most) >= 2**60:  # "max", or no limit as version 1 writes it
            continue
        files = int(stat[stat.index(droppable) + 1]) if droppable in stat else 0
        return max(0, int(most) - now + files)
    return None
