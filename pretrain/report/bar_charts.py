"""Charts of bars: shares of a whole by row, and attempts over wall-clock time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ringweave.pretrain.report.plot import CHAR_WIDTH, Plot
from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.scales import nice_ticks, tick_text
from ringweave.pretrain.report.words import duration, percent, short

#: Writing on parts too pale for the default: "on-light" follows the page's ink, "on-both" stays dark.
_INK = {
    "other": "on-light",
    "padding": "on-light",
    "optimizer": "on-light",
    "audio": "on-both",
    "score": "on-both",
}


def stacked_bars(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    colours: Mapping[str, str],
    *,
    description: str,
    unit: Callable[[float], str] = short,
    digits: int = 0,
) -> str:
    """Each row a bar of 100 %, parts in the order of `colours`, shares written in the parts that have room;
    `unit` words the absolute amount shown on hover."""
    row_height, bar = 34.0, 22.0
    plot = Plot(450, row_height * len(rows) + 22, 0.0, 1.0, 0.0, 1.0, left=104, right=4, top=2, bottom=20)
    for i, (name, parts) in enumerate(rows):
        y = plot.top + i * row_height
        head, _, rest = name.partition("\n")
        plot.label(0, y + (10 if rest else 15), head, "strong")
        if rest:
            plot.label(0, y + 23, rest)
        total = sum(parts.get(k, 0.0) for k in colours)
        at = 0.0
        for key, colour in colours.items():
            share = parts.get(key, 0.0) / total if total else 0.0
            if share <= 0:
                continue
            left, wide = plot.x(at), plot.x(at + share) - plot.x(at)
            plot.add(
                f'<g><title>{text(key)}: {percent(share, 1)} ({unit(parts[key])})</title><rect class="cell" '
                f'x="{left:.1f}" y="{y}" width="{wide:.1f}" height="{bar}" style="fill:{colour}"/>'
            )
            words = f"{share * 100:.{digits}f}"
            if wide > len(words) * 7.4 + 5:
                plot.label(left + wide / 2, y + 15, words, _INK.get(key, "on-dark"), "middle")
            plot.add("</g>")
            at += share
    for v in (0.0, 0.25, 0.5, 0.75, 1.0):
        plot.label(
            plot.x(v),
            plot.height - 4,
            f"{v * 100:.0f}",
            anchor="middle" if 0 < v < 1 else ("start" if v == 0 else "end"),
        )
    return plot.svg(description)


@dataclass(frozen=True)
class Bar:
    """One attempt on the clock, seconds from the run's begin. `again_from`: when the lost work began."""

    name: str
    outcome: str
    began: float
    first_step: float
    ended: float
    again_from: float | None = None
    killed: bool = False
    checkpoints: Sequence[float] = ()


def timeline(bars: Sequence[Bar]) -> str:
    """Attempts one under the other over wall-clock time: start-up pale, training solid, lost work hatched."""
    span = max(b.ended for b in bars) or 1.0
    scale, unit = next(
        ((s, u) for s, u in ((86400, "days"), (3600, "hours"), (60, "minutes")) if span >= 3 * s),
        (1, "seconds"),
    )
    row = 52.0
    plot = Plot(920, row * len(bars) + 44, 0.0, span / scale, 0.0, 1.0, left=4, right=16, top=4, bottom=40)
    plot.add(
        '<pattern id="again" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="6" height="6" style="fill:var(--panel)"/>'
        '<path d="M0 0V6" style="stroke:var(--bad);stroke-width:3.4"/></pattern>'
    )
    for v in nice_ticks(0.0, span / scale, 8):
        plot.add(f'<path class="grid" d="M{plot.x(v):.1f} {plot.top}V{plot.floor:.1f}"/>')
        anchor = "start" if v == 0 else "middle"
        plot.label(plot.x(v), plot.floor + 16, tick_text(v), anchor=anchor)
    plot.label(plot.width - plot.right, plot.floor + 31, f"{unit} since the first start", anchor="end")
    for i, b in enumerate(bars):
        _attempt(plot, b, plot.top + i * row, scale)
    return plot.svg("Attempts over wall-clock time, with kills, resumes and steps trained twice")


def _attempt(plot: Plot, b: Bar, y: float, scale: float) -> None:
    at = lambda seconds: plot.x(seconds / scale)  # noqa: E731
    rect = lambda a, z, fill, extra="": (  # noqa: E731
        f'<rect x="{at(a):.1f}" y="{y + 21}" width="{max(at(z) - at(a), 1.0):.1f}" height="16" '
        f'style="fill:{fill}"{extra}/>'
    )
    room = plot.width - len(b.name + b.outcome) * CHAR_WIDTH * 1.22 - 12  # narrow pages write larger
    left = max(plot.left, min(at(b.began), room))
    plot.add(
        f'<text x="{left:.1f}" y="{y + 14:.1f}"><tspan class="strong">{text(b.name)}</tspan>'
        f'<tspan dx="8">{text(b.outcome)}</tspan></text>'
    )
    end = b.ended if b.again_from is None else min(b.again_from, b.ended)
    plot.add(f"<g><title>{text(b.name)}: {text(b.outcome)}, {duration(b.ended - b.began)}</title>")
    plot.add(rect(b.began, b.first_step, "var(--pad)"), rect(b.first_step, end, "var(--p-compute)"))
    if b.again_from is not None:
        plot.add(rect(end, b.ended, "url(#again)", ' stroke="var(--bad)"'))
    plot.add("</g>")
    for c in b.checkpoints:
        plot.add(
            f'<path d="M{at(c):.1f} {y + 38}l3.6 6h-7.2z" style="fill:var(--soft)">'
            "<title>checkpoint</title></path>"
        )
    if b.killed:
        x = at(b.ended) + 7
        plot.add(
            f'<path class="died" d="M{x - 3.6:.1f} {y + 25.4}l7.2 7.2M{x + 3.6:.1f} {y + 25.4}l-7.2 7.2"/>'
        )
