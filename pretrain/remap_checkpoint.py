"""A checkpoint for another vocabulary: rows of embedding and head move to where their meaning went.

Blocks may have moved, been added or dropped (`tokenizers.manifest.remap` finds each id's counterpart by the weights of
its codec). A row without a counterpart starts as the mean of the kept ones, its moments at zero. What comes of it is
where a new run starts, in its own folder; the place in the data starts anew, since other ids make another corpus.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringweave.pretrain import checkpoint
from ringweave.pretrain.config import RunConfig, resume_differences
from ringweave.pretrain.deepspeed_partitions import MOMENTS
from ringweave.pretrain.errors import ConfigError
from ringweave.pretrain.models.lwm import LWM, LWMShape
from ringweave.pretrain.resume import cursor_at, vocabulary_of, vocabulary_record
from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.manifest import CONTROL_SIZE, VocabularyManifest, remap

#: Parameters with a row for every id.
ROWS = ("embed.weight", "head.weight")


def remap_checkpoint(
    source: Path,
    config: RunConfig,
    newer: VocabularyManifest,
    *,
    corpus_digest: str,
    older: VocabularyManifest | None = None,
) -> tuple[checkpoint.Saved, dict[str, int]]:
    """Write the checkpoint `source` (a step folder) for `newer` into the run folder of `config`; in one process.

    older: the vocabulary it was trained on, for a checkpoint that does not hold it. Gives the new checkpoint and
    {"kept": rows, "new": rows, "dropped": rows}, each counted by ids that mean something. Raises VocabularyError when
    the old vocabulary is not known or nothing of it is left, ConfigError for another model or a run folder that has
    checkpoints, StorageError for damage.
    """
    manifest = checkpoint.verify(source)
    older = _older(manifest, older, source)
    shape = LWMShape(**manifest["shape"])
    if older.size != shape.vocab:
        raise VocabularyError(
            f"the vocabulary has {older.size} ids, the checkpoint's model {shape.vocab}", where=str(source)
        )
    out = Path(config.run.dir) / "checkpoints"
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(
            "the run folder already has checkpoints", where=str(out), fix="choose another run.dir"
        )
    impossible = [d for d in resume_differences(manifest["config"], config) if d[0].startswith("model.")]
    if impossible:
        what = "; ".join(f"{key}: {a} -> {b}" for key, a, b, _ in impossible)
        raise ConfigError("the config describes another model than the checkpoint", where=what)
    sources, counts = source_rows(older, newer)
    tensors = _read(checkpoint.Saved(source, manifest), shape)
    for name in ROWS:
        tensors[f"model.{name}"] = move_rows(tensors[f"model.{name}"], sources, fill="mean")
        for moment in MOMENTS:
            key = f"optimizer.{moment}.{name}"
            tensors[key] = move_rows(tensors[key], sources, fill="zero")
    step = int(manifest["step"])
    cursor, rope_theta = cursor_at(config, step)
    record = {
        **vocabulary_record(newer),
        "cursor": cursor,
        "rope_theta": rope_theta,
        "layout": manifest["layout"],
        "corpus": corpus_digest,
        "config": config.to_dict(),
        "shape": {**manifest["shape"], "vocab": newer.size},
        "imported_from": f"{source.name} of another vocabulary ({older.hash[:12]})",
    }
    out.mkdir(parents=True, exist_ok=True)
    saved, _ = checkpoint.save(out, step, tensors, record, keep=10**6)  # removes no other
    return saved, counts


def _older(manifest: dict[str, Any], given: VocabularyManifest | None, source: Path) -> VocabularyManifest:
    found = vocabulary_of(manifest, where=str(source))
    digest = found if isinstance(found, str) else found.hash
    if given is not None and given.hash != digest:
        raise VocabularyError(
            "these are not the tokenizers the checkpoint was trained with",
            where=str(source),
            why=f"their vocabulary is {given.hash[:12]}, the checkpoint's {digest[:12]}",
        )
    if given is None and isinstance(found, str):
        raise VocabularyError(
            "the checkpoint holds the hash of its vocabulary only",
            where=str(source),
            fix="give the tokenizers it was trained with: --from TOKENIZERS",
        )
    if given is not None:
        return given
    assert not isinstance(found, str)
    return found


def source_rows(
    older: VocabularyManifest, newer: VocabularyManifest
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """int64 [newer.size]: the old row each new row comes from, -1 for none; and how many ids were kept, are new and
    were dropped. VocabularyError when no block is left."""
    table = remap(older, newer)
    sources = np.full(newer.size, -1, np.int64)
    old = np.flatnonzero(table >= 0)
    sources[table[old]] = old
    # A reserved control id was never trained: one that has got a name since starts as a new row.
    sources[[number for name, number in newer.control.items() if name not in older.control]] = -1
    was, now = _meaningful(older), _meaningful(newer)
    kept = int((now & (sources >= 0)).sum())
    if not (sources[CONTROL_SIZE:] >= 0).any():
        raise VocabularyError(
            "no block of the old vocabulary is in the new one",
            why=older.difference(newer, mine="the old one", theirs="the new one") or "",
            fix="train a new model: nothing but the control ids would be kept",
        )
    counts = {"kept": kept, "new": int(now.sum()) - kept, "dropped": int((was & (table < 0)).sum())}
    return sources, counts


def _meaningful(manifest: VocabularyManifest) -> NDArray[np.bool_]:
    """Ids that mean something: of blocks, and control ids with a name."""
    out = np.zeros(manifest.size, bool)
    out[list(manifest.control.values())] = True
    for block in manifest.blocks:
        out[block.start : block.stop] = True
    return out


def move_rows(values: Tensor, sources: NDArray[np.int64], *, fill: str) -> Tensor:
    """values [old, D] -> [new, D]; a row without a source is the mean of the moved ones, or zero."""
    index = torch.from_numpy(sources)
    kept = index >= 0
    moved = values[index.clamp(min=0)].clone()
    moved[~kept] = moved[kept].double().mean(0).to(values.dtype) if fill == "mean" else 0.0
    return moved


def _read(saved: checkpoint.Saved, shape: LWMShape) -> dict[str, Tensor]:
    """All parameters and moments, on the CPU in the types they are stored in."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LWM(shape).named_parameters()}
    tensors = {f"model.{name}": torch.empty(size) for name, size in shapes.items()}
    tensors |= {f"optimizer.{m}.{name}": torch.empty(size) for m in MOMENTS for name, size in shapes.items()}
    checkpoint.load(saved, tensors)
    return tensors
