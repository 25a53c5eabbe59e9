"""Nearest valid names for a mistyped config key, walked from the models themselves."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

Path = tuple[str | int, ...]

#: Names other trainers use, and ours.
ALIASES = {
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr_ratio",
    "warmup_steps": "optimizer.warmup",
    "lr_scheduler": "optimizer.schedule",
    "scheduler": "optimizer.schedule",
    "wd": "optimizer.weight_decay",
    "grad_clip": "optimizer.clip",
    "max_grad_norm": "optimizer.clip",
    "batch_size": "stages.N.batch",
    "global_batch_size": "stages.N.batch",
    "micro_batch_size": "stages.N.micro_batch",
    "seq_len": "stages.N.context",
    "seq_length": "stages.N.context",
    "sequence_length": "stages.N.context",
    "max_seq_len": "stages.N.context",
    "context_length": "stages.N.context",
    "theta": "stages.N.rope_theta",
    "rope_base": "stages.N.rope_theta",
    "data_parallel": "stages.N.layout.dp",
    "tensor_parallel": "stages.N.layout.tp",
    "pipeline_parallel": "stages.N.layout.pp",
    "context_parallel": "stages.N.layout.sp",
    "cp": "stages.N.layout.sp",
    "hidden_size": "model.width",
    "dim": "model.width",
    "d_model": "model.width",
    "n_layers": "model.layers",
    "num_layers": "model.layers",
    "num_hidden_layers": "model.layers",
    "n_heads": "model.heads",
    "num_heads": "model.heads",
    "num_attention_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads",
    "n_kv_heads": "model.kv_heads",
    "intermediate_size": "model.ffn",
    "dtype": "precision",
    "mixed_precision": "precision",
    "save_every": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "log_interval": "log.every",
    "output_dir": "run.dir",
    "work_dir": "run.dir",
    "path": "data.dir",
}


def _models_in(annotation: Any) -> Iterator[tuple[bool, type[BaseModel]]]:
    """(is it a list?, model) for each model class inside a field's annotation."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _models_in(typing.get_args(annotation)[0])
    elif origin in (tuple, list):
        for inner in typing.get_args(annotation):
            yield from ((True, model) for _, model in _models_in(inner))
    elif origin in (typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from _models_in(inner)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield False, annotation


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key below `model`; an item of a list is written `N`: `stages.N.layout.dp`."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        for is_list, inner in _models_in(info.annotation):
            yield from dotted_keys(inner, f"{prefix}{name}.{'N.' if is_list else ''}")


def key_table(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, type, default) of every key below `model` that holds a value, for `ringweave config schema`."""
    for name, info in model.model_fields.items():
        inner = list(_models_in(info.annotation))
        if inner:
            for is_list, section in inner:
                yield from key_table(section, f"{prefix}{name}.{'N.' if is_list else ''}")
            continue
        if info.is_required():
            default = "required"
        elif info.default_factory is not None:
            default = _COMPUTED.get(name, "empty")
        else:
            default = str(info.default)
        yield f"{prefix}{name}", _type_name(info.annotation), default


_COMPUTED = {"kv_heads": "heads", "ffn": "multiple of 64 nearest 8/3·width", "modality_weights": "1.0 each"}
_WORDS = {
    "int": "whole number",
    "float": "number",
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
}


def _type_name(annotation: Any) -> str:
    """A field's type in words: `whole number`, `cosine | constant`, `list of text`."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(inner[0])
    if origin is typing.Literal:
        return " | ".join(str(word) for word in inner)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(part) for part in inner)
    if origin in (tuple, list):
        return f"list of {_type_name(inner[0])}"
    if origin is dict:
        return f"{_type_name(inner[0])}: {_type_name(inner[1])}"
    return _WORDS.get(annotation.__name__, annotation.__name__)


def generic(path: Path) -> str:
    """`("stages", 0, "lr")` as `stages.N.lr`."""
    return ".".join("N" if isinstance(part, int) else part for part in path)


def _concrete(key: str, path: Path) -> str:
    """Fills `N` in `key` with the indices of `path` as far as both run in parallel."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        if i >= len(path):
            break
        if part == "N" and isinstance(path[i], int):
            parts[i] = str(path[i])
        elif part != path[i]:
            break
    return ".".join(parts)


def nearest_keys(path: Path, root: type[BaseModel], *, limit: int = 3) -> list[str]:
    """Up to `limit` valid dotted keys that an unknown key at `path` may have meant, best first.

    Close siblings first, then the same name in another section, then known synonyms, then looser matches.
    """
    keys = list(dotted_keys(root))
    leaf, parent = str(path[-1]), generic(path[:-1])
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == parent}
    leaves: dict[str, list[str]] = {}
    for key in keys:
        leaves.setdefault(key.rpartition(".")[2], []).append(key)
    folded = leaf.lower().replace("-", "_")

    found: list[str] = []
    found += [siblings[name] for name in difflib.get_close_matches(folded, siblings, n=2, cutoff=0.75)]
    found += leaves.get(folded, [])
    found += [ALIASES[folded]] if folded in ALIASES else []
    found += [siblings[name] for name in difflib.get_close_matches(folded, siblings, n=2, cutoff=0.5)]
    found += [
        key for name in difflib.get_close_matches(folded, leaves, n=2, cutoff=0.7) for key in leaves[name]
    ]
    return [_concrete(key, path) for key in dict.fromkeys(found)][:limit]


def nearest_value(value: Any, allowed: list[str]) -> str | None:
    """The allowed word closest to `value`, or None."""
    close = difflib.get_close_matches(str(value).lower(), allowed, n=1, cutoff=0.5)
    return close[0] if close else None
