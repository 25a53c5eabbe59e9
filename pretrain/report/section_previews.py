"""Previews of a diffusion run, stage by stage: part of the section "Samples"."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ringweave.pretrain.report.inputs import Inputs, mappings
from ringweave.pretrain.report.markup import figure
from ringweave.pretrain.report.media import media
from ringweave.pretrain.report.metric_lines import finite
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.words import context_name, count, short

#: Stages shown, and pictures of each.
MOST_STAGES, MOST_PICTURES = 16, 12


def previews(inputs: Inputs) -> str:
    """A heading and the pictures of each stage in `samples/stage-K`; "" without any."""
    folder, parts = inputs.run_dir / "samples", ""
    numbers = sorted(
        int(match[1])
        for p in (folder.iterdir() if folder.is_dir() else ())
        if (match := _STAGE.fullmatch(p.name))
    )
    for number in numbers[:MOST_STAGES]:
        items = _listed(inputs, number)
        if items:
            pictures = "".join(_picture(inputs, number, item) for item in items[:MOST_PICTURES])
            parts += (
                f'<h3 class="sub">{text(_title(number, items[0]))}</h3><div class="samples">{pictures}</div>'
            )
    return parts


_STAGE = re.compile(r"stage-([1-9][0-9]{0,5})")


def _listed(inputs: Inputs, number: int) -> list[Mapping[str, Any]]:
    file = inputs.run_dir / "samples" / f"stage-{number}" / "samples.json"
    try:
        return mappings(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return []


def _title(number: int, item: Mapping[str, Any]) -> str:
    """`Stage 2 · context 2K · step 400 · 800K tokens seen`."""
    context, step, tokens = (finite(item.get(name)) for name in ("context", "step", "tokens"))
    told = [f"Stage {number}" + (", so far" if item.get("ended") is False else "")]
    if context:
        told.append(f"context {context_name(int(context))}")
    if step is not None:
        told.append(f"step {count(step)}")
    if tokens is not None:
        told.append(f"{short(tokens)} tokens seen")
    if item.get("averaged") is True:
        told.append("moving average")
    return " · ".join(told)


def _picture(inputs: Inputs, number: int, item: Mapping[str, Any]) -> str:
    name = str(item.get("source") or "rgba")
    path = inputs.run_dir / "samples" / f"stage-{number}" / str(item.get("file") or "-")
    shown = media(inputs, path, alt=f"stage {number}: {name}, given, made, true", room=400)
    return f'<article class="card">{figure(shown, str(item.get("prompt") or name)[:600])}</article>'
