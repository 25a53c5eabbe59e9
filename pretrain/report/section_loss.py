"""Section "Loss by modality": training and held-out loss against the unigram entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringweave.pretrain.report.inputs import Inputs
from ringweave.pretrain.report.line_charts import loss_chart, loss_panel, value_chart
from ringweave.pretrain.report.markup import figure, missing, swatch, table
from ringweave.pretrain.report.metric_lines import finite as num
from ringweave.pretrain.report.overlays import restart_marks, stage_bands
from ringweave.pretrain.report.plot import Series
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.scales import window
from ringweave.pretrain.report.style import ordered
from ringweave.pretrain.report.words import number, percent


def _series(inputs: Inputs) -> list[Series]:
    h, heldout = inputs.history, inputs.heldout()
    names = dict.fromkeys(m for s in h.steps for m in s.loss_by_modality)
    out = []
    for name in ordered(names):
        rows = [(s.tokens, s.loss_by_modality[name], s.tokens_by_modality.get(name, 1.0)) for s in h.steps
                if s.tokens is not None and name in s.loss_by_modality]  # fmt: skip
        points = [
            (float(h.tokens_at(e.step)), e.heldout[name]["loss"])
            for e in h.evaluations
            if "loss" in e.heldout.get(name, {})
        ]
        figures = heldout.get(name, {})
        final = num(figures.get("loss"))
        if final is not None and (not points or points[-1][1] != final):
            points.append((float(h.tokens), final))
        if rows:
            xs, ys, weights = zip(*rows)
            out.append(Series(name, xs, ys, weights, points, num(figures.get("unigram_entropy"))))
    return out


def loss_section(inputs: Inputs) -> tuple[str, str]:
    h, series, heldout = inputs.history, _series(inputs), inputs.heldout()
    if not series:
        return "", missing("training loss by modality", "metrics.jsonl holds no steps.") + _heldout_table(
            heldout
        )
    bands, marks = stage_bands(h), restart_marks(h)
    reach = window(len(h.steps))
    caption = (
        (
            f"Strong lines: token-weighted mean over {2 * reach + 1} points; faint: as logged. "
            if reach
            else "Lines: as logged. "
        )
        + "Shapes: held-out loss. Shaded columns: context stages with their layout. Dashed verticals with a "
        "turning arrow: restarts; of steps trained twice only the later, final one is drawn."
    )
    body = figure(f'<div class="wide-chart">{loss_chart(series, bands, marks)}</div>', caption)
    panels = []
    for i, s in enumerate(series):
        loss = num(heldout.get(s.name, {}).get("loss"))
        told = "held out: not measured"
        if loss is not None:
            told = f"{number(loss)} held out" + (f" · unigram {number(s.reference)}" if s.reference else "")
        head = f'<div class="fig-title">{swatch(s.name)}{text(s.name)} <small>{text(told)}</small></div>'
        panels.append(f"<figure>{head}{loss_panel(s, bands, marks, ident=str(i))}</figure>")
    total = [(s.tokens, s.loss) for s in h.steps if s.tokens is not None and s.loss is not None]
    if total and len(series) > 1:
        xs, ys = zip(*total)
        chart = loss_panel(Series("the objective", xs, ys), bands, marks, ident="all")
        panels.append(
            f'<figure><div class="fig-title">objective <small>what is minimised</small></div>{chart}</figure>'
        )
    for key, title, told in (("lr", "learning rate", ""), ("grad_norm", "gradient norm", "before clipping")):
        rows = [(s.tokens, v) for s in h.steps if s.tokens is not None and (v := getattr(s, key)) is not None]
        if rows:
            xs, ys = zip(*rows)
            chart = value_chart(key, xs, ys, bands, marks, unit="", small=True)
            panels.append(
                f'<figure><div class="fig-title">{title} <small>{told}</small></div>{chart}</figure>'
            )
    return _gain(heldout), body + f'<div class="multi">{"".join(panels)}</div>'


def _gain(heldout: Mapping[str, Mapping[str, Any]]) -> str:
    """How far the held-out loss is from the unigram entropy, in words."""
    gains = {}
    for name, figures in heldout.items():
        loss, floor = num(figures.get("loss")), num(figures.get("unigram_entropy"))
        if loss is not None and floor:
            gains[name] = 1 - loss / floor
    if not gains:
        return "No held-out figures were logged; the curves are training loss only."
    low, high = min(gains, key=lambda m: gains[m]), max(gains, key=lambda m: gains[m])
    ends = [
        f"{percent(abs(gains[m]))} {'below' if gains[m] > 0 else 'above'} ({m})"
        for m in dict.fromkeys((low, high))
    ]
    return (
        f"Held-out loss ended {' to '.join(ends)} the unigram entropy: the entropy of a modality's token "
        "frequencies, which is as far as counting tokens gets."
    )


def _heldout_table(heldout: Mapping[str, Mapping[str, Any]]) -> str:
    if not heldout:
        return missing("held-out loss")
    rows = [
        (
            swatch(m) + text(m),
            number(num(heldout[m].get("loss"))),
            number(num(heldout[m].get("unigram_entropy"))),
        )
        for m in ordered(heldout)
    ]
    return table(("Modality", "Held-out loss, nats", "Unigram entropy, nats"), rows, css="narrow")
