"""Section "Throughput and time": tokens per second, where the time went, the stages, the estimate."""

from __future__ import annotations

from ringweave.pretrain.report.bar_charts import stacked_bars
from ringweave.pretrain.report.history import TIME_PARTS, RunHistory, layout_name
from ringweave.pretrain.report.inputs import Inputs, mappings
from ringweave.pretrain.report.line_charts import value_chart
from ringweave.pretrain.report.markup import figure, missing, table
from ringweave.pretrain.report.metric_lines import finite as num
from ringweave.pretrain.report.overlays import legend, restart_marks, stage_bands
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.words import context_name, count, duration, percent, short

_PARTS = {p: f"var(--p-{p})" for p in (*TIME_PARTS, "other")}


def speed_section(inputs: Inputs) -> tuple[str, str]:
    h = inputs.history
    rows = [
        (s.tokens, s.tokens_per_s) for s in h.steps if s.tokens is not None and s.tokens_per_s is not None
    ]
    if not rows:
        told = _stages_of_proof(inputs)
        return "", missing("throughput by step", "metrics.jsonl holds no steps.") + told
    xs, ys = zip(*rows)
    left = figure(
        value_chart("tokens_per_s", xs, ys, stage_bands(h, levels=True), restart_marks(h), unit="tokens/s"),
        "Faint: each step; strong: median of the stage.",
        title="Tokens per second",
    )
    split = [(f"{context_name(s.context)}\n{' → '.join(s.layouts)}", s.seconds) for s in h.stages]
    bars = stacked_bars(split, _PARTS, description="Share of step time by stage", unit=duration)
    right = figure(legend(_PARTS) + bars, "Percent of step time.", title="Where the time went")
    total = {k: sum(s.seconds.get(k, 0.0) for s in h.stages) for k in _PARTS}
    whole = sum(total.values())
    lede = (
        f"Waiting for data took {percent(total['data'] / whole, 1)} of step time and saving checkpoints "
        f"{percent(total['checkpoint'] / whole, 1)}."
        if whole
        else ""
    )
    return lede, f'<div class="cols">{left}{right}</div>{_stage_table(h)}{_estimate(h)}'


def _stages_of_proof(inputs: Inputs) -> str:
    """The stages as proof.json has them, "" without any: for a run whose log is gone."""
    proof = mappings(inputs.get("proof.json").get("stages"))
    if not proof:
        return ""
    rows = [
        (
            context_name(int(num(s.get("context")) or 0)),
            text(layout_name(s.get("layout"))),
            count(num(s.get("steps"))),
            short(num(s.get("tokens"))),
            short(num(s.get("tokens_per_s"))),
        )
        for s in proof
    ]
    return table(("Context", "Layout", "Steps", "Tokens", "Tokens/s"), rows, left=(0, 1))


def _stage_table(h: RunHistory) -> str:
    head = ["Stage", "Context", "Layout", "Steps", "Tokens", "Batch", "RoPE θ", "Median step", "Tokens/s"]
    rows = [
        [
            str(s.number),
            context_name(s.context),
            text(" → ".join(s.layouts) or "–"),
            f"{count(s.steps)}",
            short(s.tokens_end - s.tokens_begin),
            text("–" if s.batch is None else s.batch),
            short(s.rope_theta),
            duration(s.step_seconds),
            short(s.tokens_per_s),
        ]
        for s in h.stages
    ]
    if any(kind != "none" for s in h.stages for kind in s.recompute):
        head.insert(3, "Recompute")
        for row, s in zip(rows, h.stages, strict=True):
            row.insert(3, text(" → ".join(s.recompute) or "–"))
    return table(head, rows, left=(0, 1, 2))


def _estimate(h: RunHistory) -> str:
    """What the time left was said to be and what it came to; "" before the run's end."""
    eta = h.eta_check()
    if not eta:
        return ""
    progress, said, true = eta
    return (
        f'<p class="note">The time left given at {percent(progress)} of the run was {duration(said)}; '
        f"the steps then took {duration(true)} ({(said - true) / true * 100:+.0f} %).</p>"
    )
