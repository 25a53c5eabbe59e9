"""DeepSpeed's own checkpoint folders, as `engine.save_checkpoint` writes them, made into one of our checkpoints.

Those files are pickles. They are read by torch's restricted unpickler (`weights_only=True`), which builds tensors
and plain containers, and knows the few DeepSpeed classes that stand among them only as inert records: nothing of
DeepSpeed, and nothing that a file names, is ever called. A file that holds anything else is refused unread.
Layout of the files: deepspeed 0.19.8, `deepspeed/utils/zero_to_fp32.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ringweave.pretrain import checkpoint
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.deepspeed_partitions import MOMENTS
from ringweave.pretrain.errors import StorageError
from ringweave.pretrain.models.lwm import LWM, LWMShape
from ringweave.pretrain.resume import cursor_at


class _Number(int):
    """Stands for DeepSpeed's enumerations."""


class _Record:
    """Stands for DeepSpeed's loss scalers and addresses: attributes, no behaviour."""


#: What DeepSpeed's checkpoints name, and what is put in its place.
ALLOWED: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Number,
    "deepspeed.utils.tensor_fragment.fragment_address": _Record,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Record,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Record,
}


def import_deepspeed(
    folder: Path,
    out: Path,
    *,
    config: RunConfig,
    vocab: int,
    vocabulary_hash: str,
    corpus_digest: str,
    tag: str | None = None,
) -> checkpoint.Saved:
    """Write the ZeRO-1, 2 or 3 checkpoint in `folder` as a checkpoint in `out`; run it in one process.

    folder: what was given to `save_checkpoint`; tag: which one (None: what its file `latest` says). out: the
    `checkpoints` folder of a run. config, vocab, vocabulary_hash, corpus_digest: of the run that will go on from it;
    the model's names and shapes must be those of the LWM that config describes. The data position is not in such a
    checkpoint: the run reads its data from the start of the stage's mix, at the learning rate of the saved step.
    Needs memory for parameters and moments in fp32. Raises StorageError (exit 6) when files are missing, hold
    anything that only executing a pickle could read, were made with tensor parallelism or another optimizer, or do
    not fit the model.
    """
    place = folder / (tag or _latest(folder))
    tensors, step = read_zero(place)
    m = config.model
    shape = LWMShape(
        vocab=vocab, layers=m.layers, width=m.width, heads=m.heads, kv_heads=m.kv_heads, ffn=m.ffn,
        norm_eps=m.norm_eps, head_chunk=m.head_chunk, window=m.window, full_every=m.full_every,
    )  # fmt: skip
    _check_names(tensors, shape, place)
    cursor, rope_theta = cursor_at(config, step)
    manifest = {
        "cursor": cursor,
        "vocabulary": vocabulary_hash,
        "corpus": corpus_digest,
        "config": config.to_dict(),
        "rope_theta": rope_theta,
        "shape": asdict(shape),
        "layout": {"dp": 1, "pp": 1, "tp": 1, "sp": 1},
        "imported_from": f"DeepSpeed {place.name}",
    }
    out.mkdir(parents=True, exist_ok=True)
    saved, _ = checkpoint.save(out, step, tensors, manifest, keep=10**6)  # removes no other
    return saved


def read_zero(place: Path) -> tuple[dict[str, Tensor], int]:
    """(tensors named as ours, updates made) of one tagged DeepSpeed folder. Raises StorageError."""
    models = _files(place, r"(zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt")
    optims = _files(place, r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
    if any("mp_rank_00" not in p.name for p in (*models, *optims)):
        raise _refusal(
            place,
            why="it holds tensor-parallel shards, and does not say how to put them together",
            fix="convert it with DeepSpeed's ds_to_universal and zero_to_fp32 where it was made, or train with "
            "engine.kind: deepspeed here, whose checkpoints need no import",
        )
    shapes: list[Mapping[str, torch.Size]] = _field(_read(models[0]), "param_shapes", models[0])
    ranks = [_field(_read(p), "optimizer_state_dict", p) for p in optims]
    counted = ranks[0].get("partition_count", len(ranks))
    world = max(counted) if isinstance(counted, list) else int(counted)
    if world != len(ranks):
        raise _refusal(place, why=f"{world} ranks wrote it, files of {len(ranks)} are there")
    flats, steps = zip(*(_flats(rank, place) for rank in ranks), strict=True)
    third = "fp32_flat_groups" in ranks[0]
    tensors: dict[str, Tensor] = {}
    for key in (None, *MOMENTS):
        parts = [flat[key] for flat in flats]
        wholes = (
            _whole_zero3(parts, shapes, place) if third else _whole_zero12(parts, shapes, ranks[0], place)
        )
        prefix = "model" if key is None else f"optimizer.{key}"
        tensors |= {f"{prefix}.{name}": value for name, value in wholes.items()}
    return tensors, int(steps[0])


def _flats(rank: dict[str, Any], place: Path) -> tuple[dict[str | None, list[Tensor]], float]:
    """({None: masters, moment: its values}, updates made) of one rank, each a list of flat groups."""
    third = "fp32_flat_groups" in rank
    masters: list[Tensor] = rank["fp32_flat_groups" if third else "single_partition_of_fp32_groups"]
    inner = rank.get("optimizer_state_dict" if third else "base_optimizer_state")
    states = inner.get("state") if isinstance(inner, dict) else None
    if not states or any(key not in state for state in states.values() for key in MOMENTS):
        raise _refusal(
            place,
            why="it holds no Adam moments in a form that can be taken over (another optimizer, or elastic_checkpoint)",
            fix="save it again with Adam or AdamW and elastic_checkpoint: false",
        )
    found: dict[str | None, list[Tensor]] = {None: list(masters)}
    for key in MOMENTS:
        values = [states[i][key].float().reshape(-1) for i in sorted(states)]
        found[key] = [_padded(v, m.numel()) for v, m in zip(values, masters, strict=True)]
    return found, float(states[min(states)].get("step", 0))


def _padded(flat: Tensor, size: int) -> Tensor:
    """`flat` with the padding that some versions leave out of the last rank's moments."""
    return torch.cat([flat, flat.new_zeros(size - flat.numel())]) if flat.numel() < size else flat


def _whole_zero12(
    ranks: list[list[Tensor]], shapes: list[Mapping[str, torch.Size]], first: dict[str, Any], place: Path
) -> dict[str, Tensor]:
    """Stages 1 and 2: a group's flat parts lie one behind the other, parameters (with gaps) in them."""
    gaps = first.get("param_alignment_paddings")
    wholes: dict[str, Tensor] = {}
    for number, group in enumerate(shapes):
        flat = torch.cat([rank[number] for rank in ranks])
        at = 0
        for index, (name, shape) in enumerate(group.items()):
            if at + shape.numel() > flat.numel():
                raise _refusal(place, why=f"group {number} ends within {name}")
            wholes[name] = flat[at : at + shape.numel()].view(shape).clone()
            at += shape.numel() + (gaps[number][index] if gaps else 0)
    return wholes


def _whole_zero3(
    ranks: list[list[Tensor]], shapes: list[Mapping[str, torch.Size]], place: Path
) -> dict[str, Tensor]:
    """Stage 3: every parameter is cut into equal parts, the last ones padded."""
    flats = [torch.cat([g.reshape(-1) for g in rank]) for rank in ranks]
    wholes: dict[str, Tensor] = {}
    at = 0
    for name, shape in (item for group in shapes for item in group.items()):
        part = -(-shape.numel() // len(flats))
        if at + part > flats[0].numel():
            raise _refusal(place, why=f"the flat groups end within {name}")
        whole = torch.cat([flat[at : at + part] for flat in flats])
        wholes[name] = whole[: shape.numel()].view(shape).clone()
        at += part
    return wholes


def _check_names(tensors: dict[str, Tensor], shape: LWMShape, place: Path) -> None:
    with torch.device("meta"):
        wanted = {f"model.{n}": tuple(p.shape) for n, p in LWM(shape).named_parameters()}
    found = {n: tuple(t.shape) for n, t in tensors.items() if n.startswith("model.")}
    for what, names in (
        ("lacks", sorted(wanted.keys() - found.keys())),
        ("has other", sorted(found.keys() - wanted.keys())),
        ("has another shape for", sorted(n for n in wanted.keys() & found.keys() if wanted[n] != found[n])),
    ):
        if names:
            shown = ", ".join(n.removeprefix("model.") for n in names[:4])
            raise _refusal(
                place,
                why=f"it {what} {len(names)} parameters: {shown}{' …' if len(names) > 4 else ''}",
                fix="the model section of the config must describe the model that was trained",
            )


def _read(path: Path) -> dict[str, Any]:
    """The contents of one file without executing anything in it."""
    try:
        foreign = sorted(set(get_unsafe_globals_in_checkpoint(path)) - ALLOWED.keys())
        if not foreign:
            with safe_globals([(kind, name) for name, kind in ALLOWED.items()]):
                read: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return read
    except Exception as e:  # whatever a damaged or foreign file makes the reader say
        said = str(e).strip().splitlines() or [type(e).__name__]
        raise _refusal(path, why=said[0]) from e
    raise _refusal(
        path,
        why=f"reading it would execute a pickle: it names {', '.join(foreign[:3])}",
        fix="if you trust its maker, load it in DeepSpeed where it was made and save it again without those objects "
        "(client_state, lr_scheduler)",
    )


def _field(read: dict[str, Any], key: str, path: Path) -> Any:
    if not isinstance(read, dict) or not read.get(key):
        raise _refusal(path, why=f"it has no {key}, so it is not a ZeRO checkpoint of stage 1, 2 or 3")
    return read[key]


def _files(place: Path, pattern: str) -> list[Path]:
    names = [p for p in place.iterdir() if re.fullmatch(pattern, p.name)] if place.is_dir() else []
    if not names:
        raise _refusal(place, why=f"no file named like {pattern}")
    return sorted(names, key=lambda p: [int(n) for n in re.findall(r"rank_(\d+)", p.name)])


def _latest(folder: Path) -> str:
    try:
        name = (folder / "latest").read_text().strip()
    except OSError as e:
        raise _refusal(folder, why=str(e), fix="name the tag, which is the folder inside it") from e
    if not re.fullmatch(r"[\w.-]+", name):
        raise _refusal(folder, why=f"its file latest names {name!r}", fix="name the tag")
    return name


def _refusal(
    path: Path, *, why: str, fix: str = "save it again with DeepSpeed's save_checkpoint"
) -> StorageError:
    return StorageError("the DeepSpeed checkpoint cannot be imported", where=str(path), why=why, fix=fix)
