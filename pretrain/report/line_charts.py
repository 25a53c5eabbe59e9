"""Charts of a quantity over tokens: the losses together, one loss, one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringweave.pretrain.report.plot import (
    CHAR_WIDTH,
    STRIP_HEIGHT,
    Band,
    Mark,
    Plot,
    Series,
    clip_path,
    draw_bands,
    draw_marks,
    held_out_point,
)
from ringweave.pretrain.report.scales import quantile, smooth, thin, window
from ringweave.pretrain.report.words import number, short


@dataclass(frozen=True)
class _Line:
    series: Series
    xs: list[float]
    raw: list[float]
    ys: list[float]


def _lines(series: Sequence[Series]) -> list[_Line]:
    out = []
    for s in series:
        xs, raw, weights = thin(s.xs, s.ys, s.weights)
        out.append(_Line(s, xs, raw, smooth(raw, weights, window(len(raw)))))
    return out


def _loss_range(lines: Sequence[_Line], x0: float, x1: float, *, references: bool) -> tuple[float, float]:
    """y range that the steep first steps cannot squash: from 4 % of the tokens on, plus what must be seen."""
    begin = x0 + 0.04 * (x1 - x0)
    settled = [y for ln in lines for x, y in zip(ln.xs, ln.ys) if x >= begin] or [
        y for ln in lines for y in ln.raw
    ]
    must = [y for ln in lines for _, y in ln.series.points]
    must += [ln.series.reference for ln in lines if references and ln.series.reference is not None]
    low, high = min([*settled, *must]), max([quantile(settled, 0.995), *must])
    pad = 0.06 * (high - low) or 0.5
    return (0.0 if 0 <= low < 0.25 * high else low - pad), high + pad


def loss_chart(series: Sequence[Series], bands: Sequence[Band], marks: Sequence[Mark]) -> str:
    """All modalities over tokens: faint every step, strong the smoothed line, shapes the held-out points."""
    lines = [ln for ln in _lines(series) if ln.xs]
    x1 = max(ln.xs[-1] for ln in lines)
    y0, y1 = _loss_range(lines, 0.0, x1, references=False)
    plot = Plot(920, 440, 0.0, x1, y0, y1, left=40, right=142, top=20 + STRIP_HEIGHT, bottom=40)
    draw_bands(plot, bands)
    plot.axes(x_name="tokens trained", y_name="loss, nats a token", y_ticks=6, x_ticks=7)
    clip = clip_path(plot, "clip-loss")
    for ln in lines:
        plot.path(ln.xs, ln.raw, "raw", ln.series.colour, clip)
    for ln in lines:
        plot.path(ln.xs, ln.ys, "line", ln.series.colour, clip)
    draw_marks(plot, marks)
    plot.add(*(held_out_point(plot, x, y, ln.series) for ln in lines for x, y in ln.series.points))
    start = max(ln.raw[0] for ln in lines)
    if start > y1:
        inside = max((x for ln in lines for x, y in zip(ln.xs, ln.ys) if y > y1), default=0.0)
        plot.label(plot.x(inside) + 14, plot.top + 17, f"▲ first step: up to {start:.1f}", "halo")
    _end_labels(plot, lines)
    return plot.svg("Training loss by modality over tokens, with stages, restarts and held-out points")


def _end_labels(plot: Plot, lines: Sequence[_Line]) -> None:
    """Name, shape and last value beside each line's end, pushed apart so that none overlap, with leaders."""
    gap = 21.0
    ends = sorted(lines, key=lambda ln: plot.y(ln.ys[-1]))
    places = [min(max(plot.y(ln.ys[-1]), plot.top), plot.floor) for ln in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    over = (places[-1] - plot.floor) if places else 0
    if over > 0:
        places[-1] -= over
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - gap)
    edge = plot.width - plot.right
    for ln, y in zip(ends, places):
        true = min(max(plot.y(ln.ys[-1]), plot.top), plot.floor)
        plot.add(
            f'<path class="lead" style="--c:{ln.series.colour}" '
            f'd="M{edge + 2:.1f} {true:.1f}L{edge + 16:.1f} {y:.1f}"/>'
        )
        flat = Plot(plot.width, plot.height, 0, 1, 0, 1, left=0, right=0, top=0, bottom=0)
        plot.add(
            held_out_point(flat, (edge + 23) / plot.width, 1 - y / plot.height, ln.series).split("<title>")[0]
            + "</path>"
        )
        plot.label(edge + 33, y + 4, ln.series.name, "strong big")
        plot.label(plot.width, y + 4, number(ln.ys[-1], 2), "big", "end")


def loss_panel(series: Series, bands: Sequence[Band], marks: Sequence[Mark], *, ident: str) -> str:
    """One modality against its unigram entropy, with its own y range. `ident` is unique on the page."""
    lines = _lines([series])
    x1 = lines[0].xs[-1]
    y0, y1 = _loss_range(lines, 0.0, x1, references=True)
    plot = Plot(300, 168, 0.0, x1, y0, y1, left=32, right=8, top=8, bottom=22)
    draw_bands(plot, bands, named=False)
    plot.axes(x_name="", y_name="", x_ticks=3, y_ticks=4)
    clip = clip_path(plot, f"clip-{ident}")
    if series.reference is not None:
        y = plot.y(series.reference)
        plot.add(
            f'<path class="ref" style="--c:var(--ink)" d="M{plot.left} {y:.1f}H{plot.width - plot.right}"/>'
        )
        above = y - plot.top > 18
        plot.label(plot.width - plot.right - 3, y - 5 if above else y + 14, "unigram entropy", "halo", "end")
    plot.path(lines[0].xs, lines[0].raw, "raw", series.colour, clip)
    plot.path(lines[0].xs, lines[0].ys, "line", series.colour, clip)
    draw_marks(plot, marks, flags=False)
    plot.add(*(held_out_point(plot, x, y, series, 3.8) for x, y in series.points))
    return plot.svg(f"Loss of {series.name} over tokens against its unigram entropy")


def value_chart(
    name: str,
    xs: Sequence[float],
    ys: Sequence[float],
    bands: Sequence[Band],
    marks: Sequence[Mark],
    *,
    unit: str,
    small: bool = False,
) -> str:
    """One quantity over tokens, from zero; a band's `level` is drawn across it with its value."""
    x1 = xs[-1]
    levels = [b.level for b in bands if b.level is not None]
    top_value = max([quantile(ys, 0.99), *levels]) * (1.2 if levels else 1.12) or 1.0
    plot = Plot(450, 200, 0.0, x1, 0.0, top_value, left=46, right=8, top=20, bottom=38)
    if small:
        plot = Plot(300, 168, 0.0, x1, 0.0, top_value, left=32, right=8, top=8, bottom=22)
    draw_bands(plot, bands, named=False)
    x_ticks = 3 if small else 5
    plot.axes(x_name="" if small else "tokens trained", y_name=unit, x_ticks=x_ticks, y_ticks=4)
    clip = clip_path(plot, f"clip-{name}")
    thin_x, thin_y, _ = thin(xs, ys, ())
    plot.path(thin_x, thin_y, "raw" if levels else "line", "var(--accent)", clip)
    draw_marks(plot, marks, flags=not small)
    for b in bands:
        if b.level is not None:
            plot.path([b.x0, b.x1], [b.level, b.level], "line", "var(--accent)")
            words = short(b.level)
            if len(words) * CHAR_WIDTH < plot.x(b.x1) - plot.x(b.x0):
                plot.label(
                    (plot.x(b.x0) + plot.x(b.x1)) / 2, plot.y(b.level) - 7, words, "strong halo", "middle"
                )
    return plot.svg(f"{name} over tokens")
