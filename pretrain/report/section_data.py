"""Section "Packing and data mix": fill of the packs, modalities, sources and their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ringweave.pretrain.report.bar_charts import stacked_bars
from ringweave.pretrain.report.history import RunHistory
from ringweave.pretrain.report.inputs import Inputs
from ringweave.pretrain.report.markup import figure, missing, swatch, table
from ringweave.pretrain.report.metric_lines import finite as num
from ringweave.pretrain.report.overlays import legend
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.style import COLOURS, OTHER_COLOUR, ordered
from ringweave.pretrain.report.words import context_name, count, percent, short


def data_section(inputs: Inputs) -> tuple[str, str]:
    h, corpus = inputs.history, inputs.get("proof.json", "data")
    body = ""
    filled = [
        (
            f"{context_name(s.context)}\n{' → '.join(s.layouts)}",
            {"tokens": s.fill, "padding": max(0.0, 1 - s.fill)},
        )
        for s in h.stages
        if s.fill is not None
    ]
    lede = ""
    if filled:
        colours = {"tokens": "var(--p-compute)", "padding": "var(--pad)"}
        bars = stacked_bars(filled, colours, description="Packing fill by stage", unit=percent, digits=1)
        body += figure(
            legend(colours) + bars, "Slots of a pack that hold a token, percent.", title="Packing fill"
        )
        low = min(parts["tokens"] for _, parts in filled)
        lede = f"Packs were at least {percent(low, 1)} full in every stage."
    mixed = [
        (
            f"{context_name(s.context)}\n{short(sum(s.tokens_by_modality.values()))} targets",
            s.tokens_by_modality,
        )
        for s in h.stages
        if s.tokens_by_modality
    ]
    if mixed:
        names = ordered(dict.fromkeys(m for _, parts in mixed for m in parts))
        colours = {m: COLOURS.get(m, OTHER_COLOUR) for m in names}
        bars = stacked_bars(mixed, colours, description="Target tokens by modality and stage")
        body += figure(legend(colours) + bars, "Tokens that carried loss, percent.", title="Mix by modality")
    body = f'<div class="cols">{body}</div>' if body else missing("packing fill and mix")
    sources = dict.fromkeys([*(n for s in h.stages for n in (*s.sources, *s.tokens_by_source)), *corpus])
    if not sources:
        return lede, body + missing("sources and their sizes")
    return lede, body + _source_table(h, corpus, list(sources))


def _source_table(h: RunHistory, corpus: Mapping[str, Any], sources: Sequence[str]) -> str:
    """Weights (one number, or how it changed over the stages) and sizes of the sources."""
    rows, logged = [], any(s.tokens_by_source for s in h.stages)
    for name in sources:
        found = corpus.get(name)
        size = found if isinstance(found, Mapping) else {}
        weights = list(dict.fromkeys(percent(_share(s.sources, name)) for s in h.stages))
        seen = sum(s.tokens_by_source.get(name, 0.0) for s in h.stages)
        rows.append(
            (
                swatch(name) + text(name),
                " → ".join(weights) or "–",
                *([short(seen)] if logged else []),
                count(num(size.get("records"))),
                short(num(size.get("tokens"))),
                count(num(size.get("heldout_records"))),
            )
        )
    head = (
        "Source",
        "Weight",
        *(["Tokens trained"] * logged),
        "Records",
        "Corpus tokens",
        "Held-out records",
    )
    return table(head, rows)


def _share(weights: Mapping[str, float], name: str) -> float | None:
    total = sum(weights.values())
    return weights.get(name, 0.0) / total if total else None
