"""Reading, checking, showing and comparing the config of a run. Imports no torch: mistakes show at once.

`load_config` raises one ConfigError that lists every problem with file, line, key and the nearest valid name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ringweave.pretrain import yaml_lines
from ringweave.pretrain.config_checks import DEFAULT_PLANS, PLAN_ITEMS, CrossFieldError
from ringweave.pretrain.config_data import DataSection, Source
from ringweave.pretrain.config_schema import (
    MODALITIES,
    CheckpointSection,
    Layout,
    LogSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    RunConfig,
    RunSection,
    Stage,
    TimeoutSection,
    TokenizersSection,
    default_ffn,
)
from ringweave.pretrain.config_suggest import nearest_keys, nearest_value
from ringweave.pretrain.errors import ConfigError, Problem, redact

__all__ = [
    "DEFAULT_PLANS",
    "MODALITIES",
    "PLAN_ITEMS",
    "CheckpointSection",
    "DataSection",
    "Difference",
    "Layout",
    "LogSection",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "RunConfig",
    "RunSection",
    "Source",
    "Stage",
    "TimeoutSection",
    "TokenizersSection",
    "config_from_dict",
    "default_ffn",
    "load_config",
    "resume_differences",
]

KeyPath = tuple[str | int, ...]
Kind = Literal["harmless", "needs --allow-change", "impossible"]
Difference = tuple[str, Any, Any, Kind]

#: A config is a page of text; anything much larger is another file given by mistake.
MAX_BYTES = 1 << 20


def load_config(path: str | Path, overrides: Sequence[str] = (), world: int | None = None) -> RunConfig:
    """The checked config of file `path` with `a.b=value` overrides applied in order.

    `world`: number of processes, when known; every stage's layout must fill it exactly.
    Raises ConfigError (exit 2): unreadable file, broken YAML, unknown keys, wrong types, impossible settings.
    """
    source = str(path)
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError("cannot read the config", where=source, why=reason, fix="check the path") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"the config is {len(raw)} bytes, more than {MAX_BYTES}", where=source)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError("the config is not UTF-8 text", where=source, why=str(error)) from error
    tree = yaml_lines.parse(text, source=source)
    if not isinstance(tree.value, dict):
        raise ConfigError(
            "the config is not a mapping of sections",
            where=source,
            fix="start from `ringweave config schema`",
        )
    origins = {_apply_override(tree.value, item): item for item in overrides}
    return _validate(tree, source=source, origins=origins, world=world)


def config_from_dict(values: dict[str, Any], *, source: str, world: int | None = None) -> RunConfig:
    """The config saved as plain values, as in a checkpoint's manifest; `source` names it in messages."""
    return _validate(yaml_lines.Tree(values), source=source, origins={}, world=world)


def _validate(
    tree: yaml_lines.Tree, *, source: str, origins: dict[KeyPath, str], world: int | None
) -> RunConfig:
    def where(path: KeyPath) -> str:
        for origin, item in reversed(origins.items()):
            if origin == path[: len(origin)] or path == origin[: len(path)]:
                return f"--set {redact(item)}"
        line = tree.line(path)
        return f"{source}:{line}" if line else source

    try:
        return RunConfig.model_validate(_by_kind(tree.value), context={"world": world})
    except CrossFieldError as error:
        problems = [
            Problem(where(p), _dotted(p), f"{_dotted(p)}: {text}", hint) for p, text, hint in error.findings
        ]
    except ValidationError as error:
        found = [item for item in error.errors(include_url=False) if item["type"] not in _CONSEQUENCES]
        deeper = {item["loc"][:-1] for item in found} | {item["loc"][:-2] for item in found}
        found = [item for item in found if item["type"] != "too_short" or item["loc"] not in deeper]
        problems = [_problem(item, where) for item in found]
    raise ConfigError.from_problems(sorted(problems, key=_by_place), source=source)


def _by_kind(values: Any) -> Any:
    """`values` with the defaults that follow from the kind of model; values of another form stay for the checks.

    The layouts of a dit have `norms: replicated`: modulation looks tokens up by document.
    """
    model, stages = (values.get(name) if isinstance(values, dict) else None for name in ("model", "stages"))
    if not isinstance(model, dict) or model.get("kind") != "dit" or not isinstance(stages, (list, tuple)):
        return values
    filled = []
    for stage in stages:
        layout = stage.get("layout", {}) if isinstance(stage, dict) else None
        if isinstance(layout, dict):
            stage = {**stage, "layout": {"norms": "replicated", **layout}}
        filled.append(stage)
    return {**values, "stages": filled}


def _by_place(problem: Problem) -> tuple[str, int]:
    """Sort key: file order, overrides last."""
    match = re.search(r":(\d+)$", problem.where)
    return ("", int(match[1])) if match else (problem.where, 0)


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def _problem(item: Any, where: Any) -> Problem:
    """One pydantic error as what was expected and what was given."""
    path: KeyPath = tuple(item["loc"])
    key, kind, given = _dotted(path), item["type"], redact(item["input"])
    context = item.get("ctx") or {}
    hint = ""
    if kind == "extra_forbidden":
        near = nearest_keys(path, RunConfig)
        hint = f"did you mean {' or '.join(near)}?" if near else "`ringweave config schema` lists the keys"
        return Problem(where(path), key, f"unknown key {key}", hint)
    if kind == "missing" and isinstance(path[-1], int):
        key = _dotted(path[:-1])
        return Problem(
            where(path[:-1]), key, f"{key}: expected a list with at least {path[-1] + 1} items, got {given}"
        )
    if kind == "missing":
        return Problem(
            where(path[:-1]),
            key,
            f"missing key {key}",
            f"add {path[-1]}: … under {key.rpartition('.')[0] or 'the top level'}",
        )
    if kind == "value_error":
        expected = str(context.get("error", item["msg"]))
        near_value = _near_word(given, expected)
        return Problem(where(path), key, f"{key}: {redact(expected)}", near_value)
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        near_word = nearest_value(given, allowed)
        hint = f"did you mean {near_word}?" if near_word else ""
        return Problem(where(path), key, f"{key}: expected {context.get('expected')}, got {given!r}", hint)
    expected = _EXPECTED.get(kind, "").format(**context) or item["msg"]
    return Problem(where(path), key, f"{key}: expected {expected}, got {_short(given)}", hint)


#: Defaults that depend on another key are not computed when that key is wrong; the key itself is reported.
_CONSEQUENCES = {"default_factory_not_called"}

_EXPECTED = {
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "dict_type": "a section of name: number",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "a list with at least {min_length} item(s)",
    "too_long": "a list with at most {max_length} items",
}


def _near_word(given: Any, expected: str) -> str:
    """A suggestion for a mistyped word of a fixed set (plan items, modalities)."""
    if isinstance(given, dict) and "modalities" in expected:
        given = next((name for name in given if name not in MODALITIES), "")
        allowed = list(MODALITIES)
    elif "plan items" in expected:
        given = expected.rpartition("got ")[2].strip("'\"").removesuffix("?")
        allowed = list(PLAN_ITEMS)
    else:
        return ""
    near = nearest_value(given, allowed)
    return f"did you mean {near}?" if near else ""


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _apply_override(values: dict[str, Any], item: str) -> KeyPath:
    """Sets one `a.b.0.c=value` in place, the value read as YAML; returns its path. Raises ConfigError."""
    name, equals, text = item.partition("=")
    shown = redact(item)
    if not equals or not re.fullmatch(r"[^\s.]+(\.[^\s.]+)*", name):
        raise ConfigError(
            "an override must look like section.key=value",
            where=f"--set {shown}",
            fix="for example --set optimizer.lr=1e-3",
        )
    value = yaml_lines.parse(text, source=f"--set {shown}").value if text.strip() else ""
    parts = name.split(".")
    node: Any = values
    path: list[str | int] = []
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(
                    f"{_dotted(tuple(path))} has {len(node)} items (0 to {len(node) - 1}), not {part!r}",
                    where=f"--set {shown}",
                )
            key: str | int = int(part)
        elif isinstance(node, dict):
            key = part
        else:
            raise ConfigError(
                f"{_dotted(tuple(path))} is a single value, it has no {part!r}", where=f"--set {shown}"
            )
        path.append(key)
        if last:
            node[key] = value
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            node = node[key]
    return tuple(path)


_HARMLESS = re.compile(
    r"(run\.(dir|name)|log(\..*)?|checkpoint(\..*)?|timeout(\..*)?|tokenizers\.dir|data\.dir|data\.sources\.\d+\.(heldout|pipe)(\..*)?"
    r"|data\.(workers|remote|cache|quarantine)(\..*)?|data\.allow_pipe"
    r"|stages\.\d+\.layout(\..*)?|stages\.\d+\.(micro_batch|recompute|recompute_memory)|model\.head_chunk|engine(\..*)?)"
)
_IMPOSSIBLE = re.compile(
    r"model\..*|data\.sources\.\d+\.(name|plan|shards)(\..*)?|run\.seed|data\.(lanes|epochs)"
)


def resume_differences(saved: dict[str, Any], now: RunConfig) -> list[Difference]:
    """What differs between a saved config (`to_dict()`) and `now`, as (key, old, new, kind).

    "harmless": where files go, logging, layouts, micro-batch. "needs --allow-change": changes the training
    that follows (optimizer, budgets, batch, mix). "impossible": saved tensors or the data cursor do not fit.
    Keys that the saved config lacks because it is older count with their defaults. A missing side is None.
    """
    try:
        old_values = config_from_dict(saved, source="saved config").to_dict()
    except ConfigError:
        old_values = saved  # written by another version: compare what is there
    old, new = _flat(old_values), _flat(now.to_dict())
    out: list[Difference] = []
    for key in [*new, *(k for k in old if k not in new)]:
        if old.get(key) != new.get(key):
            out.append((key, old.get(key), new.get(key), _kind(key)))
    return out


def _kind(key: str) -> Kind:
    if _HARMLESS.fullmatch(key):
        return "harmless"
    return "impossible" if _IMPOSSIBLE.fullmatch(key) else "needs --allow-change"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as {dotted key: scalar}."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
    if isinstance(value, (list, tuple)) and value:
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): value}


def explain_yaml(config: RunConfig) -> str:
    """The effective config with the derived numbers as comments, for the terminal."""
    lines = [config.to_yaml().rstrip()]
    for i, stage in enumerate(config.stages):
        lines.append(
            f"# stage {i}: context {stage.context}, {stage.steps} steps of {stage.tokens_per_step} slots "
            f"on {stage.layout.world} processes"
        )
    lines.append(f"# total: {config.total_steps} steps, hash {config.hash()[:12]}")
    return "\n".join(lines)
