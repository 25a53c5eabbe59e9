"""The report's charts as inline SVG text: plain values in, markup out, no scripts and no libraries.

Colours are CSS variables so that one drawing serves the light and the dark page; every series also differs
by a label at its end and by the shape of its held-out points, so that nothing depends on seeing colour.
Coordinates are viewBox units. All text passes through `report_style.text`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ringweave.pretrain.report_style import COLOURS, OTHER_COLOUR, duration, number, percent, short, text

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "down", "plus", "hexagon")
#: Writing on parts too pale for the default: "on-light" follows the page's ink, "on-both" stays dark.
_INK = {
    "other": "on-light",
    "padding": "on-light",
    "optimizer": "on-light",
    "audio": "on-both",
    "score": "on-both",
}
_CHAR = 6.6  # width of a character of chart text, generous for wide system fonts
_MOST_POINTS = 420
_STRIP = 34.0  # height of the strip with the names of the stages


@dataclass(frozen=True)
class Series:
    """One line. `xs` rise; `weights` (tokens) weigh the mean when points are merged; `points` are held-out
    measurements (x, y); `reference` is a level to beat."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    weights: Sequence[float] = ()
    points: Sequence[tuple[float, float]] = ()
    reference: float | None = None

    @property
    def colour(self) -> str:
        return COLOURS.get(self.name, OTHER_COLOUR)

    @property
    def shape(self) -> str:
        return SHAPES[list(COLOURS).index(self.name) % len(SHAPES)] if self.name in COLOURS else "circle"


@dataclass(frozen=True)
class Band:
    """A stage along x: its name, what goes under it, and an optional level (a median) to draw across."""

    x0: float
    x1: float
    name: str
    detail: str = ""
    level: float | None = None


@dataclass(frozen=True)
class Mark:
    """A restart at x; `label` tells the whole story on hover."""

    x: float
    label: str


@dataclass
class Plot:
    """A rectangle with scales. `parts` collects markup."""

    width: float
    height: float
    x0: float
    x1: float
    y0: float
    y1: float
    left: float = 46
    right: float = 12
    top: float = 10
    bottom: float = 34
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        inner = self.width - self.left - self.right
        return self.left + inner * (value - self.x0) / ((self.x1 - self.x0) or 1.0)

    def y(self, value: float) -> float:
        inner = self.height - self.top - self.bottom
        return self.height - self.bottom - inner * (value - self.y0) / ((self.y1 - self.y0) or 1.0)

    @property
    def floor(self) -> float:
        return self.height - self.bottom

    def add(self, *parts: str) -> None:
        self.parts.extend(parts)

    def label(self, x: float, y: float, words: str, css: str = "", anchor: str = "start") -> None:
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{text(words)}</text>')

    def path(self, xs: Sequence[float], ys: Sequence[float], css: str, colour: str, clip: str = "") -> None:
        if len(xs) == 0:
            return
        d = "M" + "L".join(f"{self.x(a):.1f} {self.y(b):.1f}" for a, b in zip(xs, ys))
        fence = f' clip-path="url(#{clip})"' if clip else ""
        self.add(f'<path class="{css}" style="--c:{colour}" d="{d}"{fence}/>')

    def axes(self, *, x_name: str, y_name: str, x_ticks: int = 6, y_ticks: int = 5, y_format=None) -> None:
        """Grid lines and labels at round numbers; the y name stands above the axis, the x name below it."""
        y_format = y_format or tick_text
        for v in nice_ticks(self.y0, self.y1, y_ticks):
            self.add(f'<path class="grid" d="M{self.left} {self.y(v):.1f}H{self.width - self.right:.1f}"/>')
            self.label(self.left - 7, self.y(v) + 4, y_format(v), anchor="end")
        self.add(f'<path class="axis" d="M{self.left} {self.floor:.1f}H{self.width - self.right:.1f}"/>')
        ticks = nice_ticks(self.x0, self.x1, x_ticks)
        for v in ticks:
            self.add(f'<path class="axis" d="M{self.x(v):.1f} {self.floor:.1f}v4"/>')
            self.label(self.x(v), self.floor + 16, short(v).strip() if v else "0", anchor="middle")
        self.label(self.width - self.right, self.floor + 30, x_name, anchor="end")
        if y_name:
            self.label(self.left, 11, y_name)

    def svg(self, description: str) -> str:
        body = "".join(self.parts)
        return (
            f'<svg class="chart" viewBox="0 0 {self.width:.0f} {self.height:.0f}" role="img" '
            f'aria-label="{text(description)}">{body}</svg>'
        )


# --- scales -----------------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten inside [low, high], about `wanted` of them."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    rough = span / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    """A tick without trailing zeros: 0.5, 2, 12 K."""
    if abs(value) >= 1000:
        return short(value)
    return f"{value:.6g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def quantile(values: Sequence[float], q: float) -> float:
    """Linear-interpolated quantile of a non-empty sequence."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def thin(xs: Sequence[float], ys: Sequence[float], weights: Sequence[float]) -> tuple[list, list, list]:
    """At most _MOST_POINTS points: neighbours are merged into weighted means."""
    weights = weights if len(weights) else [1.0] * len(xs)
    size = max(1, math.ceil(len(xs) / _MOST_POINTS))
    out: tuple[list, list, list] = ([], [], [])
    for i in range(0, len(xs), size):
        w = sum(weights[i : i + size]) or 1.0
        out[0].append(sum(xs[i : i + size]) / len(xs[i : i + size]))
        out[1].append(sum(a * b for a, b in zip(ys[i : i + size], weights[i : i + size])) / w)
        out[2].append(w)
    return out


def smooth(ys: Sequence[float], weights: Sequence[float], reach: int) -> list[float]:
    """Centred weighted mean over `2 reach + 1` points. At the begin, where losses fall steeply, the window
    shrinks evenly and so has no bias; at the end it becomes a trailing mean, not one step's value."""
    out = []
    for i in range(len(ys)):
        part = range(i - min(reach, i), min(len(ys), i + min(reach, i) + 1))
        total = sum(weights[j] for j in part)
        out.append(sum(ys[j] * weights[j] for j in part) / total if total else ys[i])
    return out


def window(n: int) -> int:
    """Half width of the smoothing window for n points: about a 1/40 of the line to each side."""
    return 0 if n < 12 else max(1, round(min(n, _MOST_POINTS) / 40))


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


def _clip(plot: Plot, name: str) -> str:
    w, h = plot.width - plot.left - plot.right, plot.floor - plot.top
    plot.add(
        f'<clipPath id="{name}"><rect x="{plot.left}" y="{plot.top}" width="{w:.1f}" height="{h:.1f}"/>'
        "</clipPath>"
    )
    return name


def _point(plot: Plot, x: float, y: float, series: Series, size: float = 4.2) -> str:
    cx, cy, r = plot.x(x), plot.y(y), size
    a, b = f"{0.9 * r:.1f}", f"{0.75 * r:.1f}"
    d = {
        "circle": f"M{cx - r:.1f} {cy:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        "square": f"M{cx - r * 0.9:.1f} {cy - r * 0.9:.1f}h{1.8 * r:.1f}v{1.8 * r:.1f}h{-1.8 * r:.1f}z",
        "triangle": f"M{cx:.1f} {cy - 1.25 * r:.1f}l{1.2 * r:.1f} {2.1 * r:.1f}h{-2.4 * r:.1f}z",
        "down": f"M{cx:.1f} {cy + 1.25 * r:.1f}l{1.2 * r:.1f} {-2.1 * r:.1f}h{-2.4 * r:.1f}z",
        "diamond": f"M{cx:.1f} {cy - 1.35 * r:.1f}l{1.2 * r:.1f} {1.35 * r:.1f}l{-1.2 * r:.1f} {1.35 * r:.1f}"
        f"l{-1.2 * r:.1f} {-1.35 * r:.1f}z",
        "plus": f"M{cx - r * 0.45:.1f} {cy - 1.2 * r:.1f}h{a}v{b}h{b}v{a}h-{b}v{b}h-{a}v-{b}h-{b}v-{a}h{b}z",
        "hexagon": f"M{cx - r:.1f} {cy:.1f}l{r / 2:.1f} {-r * 0.87:.1f}h{r:.1f}l{r / 2:.1f} {r * 0.87:.1f}"
        f"l{-r / 2:.1f} {r * 0.87:.1f}h{-r:.1f}z",
    }[series.shape]
    return (
        f'<path class="dot" style="--c:{series.colour}" d="{d}"><title>'
        f"{text(series.name)}, held out: {number(y)} nats at {short(x)} tokens</title></path>"
    )


def _bands(plot: Plot, bands: Sequence[Band], *, named: bool = True) -> None:
    """Stages as alternating background; with `named` also a strip above the plot that holds name and detail
    where they fit (they are there on hover in any case)."""
    for i, b in enumerate(bands):
        left, right = plot.x(b.x0), plot.x(b.x1)
        if i % 2 == 0:
            plot.add(
                f'<rect class="band" x="{left:.1f}" y="{plot.top}" width="{right - left:.1f}" '
                f'height="{plot.floor - plot.top:.1f}"/>'
            )
        if not named:
            continue
        room = right - left - 10
        plot.add(
            f"<g><title>{text(b.name)}: {text(b.detail)}</title>"
            f'<rect class="{"band" if i % 2 else "strip"}" x="{left:.1f}" y="{plot.top - _STRIP}" '
            f'width="{right - left:.1f}" height="{_STRIP}"/>'
        )
        if len(b.name) * _CHAR * 1.08 <= room:
            plot.label(left + 7, plot.top - _STRIP + 14, b.name, "strong")
        if len(b.detail) * _CHAR <= room:
            plot.label(left + 7, plot.top - 6, b.detail)
        plot.add("</g>")


def _marks(plot: Plot, marks: Sequence[Mark], *, flags: bool = True) -> None:
    """Restarts: a dashed line, with `flags` a turning arrow at its top."""
    for m in marks:
        x, y = plot.x(m.x), plot.top
        line = f'<title>{text(m.label)}</title><path class="mark" d="M{x:.1f} {plot.top}V{plot.floor:.1f}"/>'
        if not flags:
            plot.add(f"<g>{line}</g>")
            continue
        plot.add(
            f'<g>{line}<circle class="flag" cx="{x:.1f}" cy="{y:.1f}" r="7"/>'
            f'<path class="glyph" d="M{x + 3:.1f} {y - 1.6:.1f}a3.4 3.4 0 1 0 .3 2.6'
            f'M{x + 3.4:.1f} {y - 4:.1f}v2.6h-2.6"/></g>'
        )


# --- charts -----------------------------------------------------------------------------------------------


def loss_chart(series: Sequence[Series], bands: Sequence[Band], marks: Sequence[Mark]) -> str:
    """All modalities over tokens: faint every step, strong the smoothed line, shapes the held-out points."""
    lines = [ln for ln in _lines(series) if ln.xs]
    x1 = max(ln.xs[-1] for ln in lines)
    y0, y1 = _loss_range(lines, 0.0, x1, references=False)
    plot = Plot(920, 440, 0.0, x1, y0, y1, left=40, right=142, top=20 + _STRIP, bottom=40)
    _bands(plot, bands)
    plot.axes(x_name="tokens trained", y_name="loss, nats a token", y_ticks=6, x_ticks=7)
    clip = _clip(plot, "clip-loss")
    for ln in lines:
        plot.path(ln.xs, ln.raw, "raw", ln.series.colour, clip)
    for ln in lines:
        plot.path(ln.xs, ln.ys, "line", ln.series.colour, clip)
    _marks(plot, marks)
    plot.add(*(_point(plot, x, y, ln.series) for ln in lines for x, y in ln.series.points))
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
            _point(flat, (edge + 23) / plot.width, 1 - y / plot.height, ln.series).split("<title>")[0]
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
    _bands(plot, bands, named=False)
    plot.axes(x_name="", y_name="", x_ticks=3, y_ticks=4)
    clip = _clip(plot, f"clip-{ident}")
    if series.reference is not None:
        y = plot.y(series.reference)
        plot.add(
            f'<path class="ref" style="--c:var(--ink)" d="M{plot.left} {y:.1f}H{plot.width - plot.right}"/>'
        )
        above = y - plot.top > 18
        plot.label(plot.width - plot.right - 3, y - 5 if above else y + 14, "unigram entropy", "halo", "end")
    plot.path(lines[0].xs, lines[0].raw, "raw", series.colour, clip)
    plot.path(lines[0].xs, lines[0].ys, "line", series.colour, clip)
    _marks(plot, marks, flags=False)
    plot.add(*(_point(plot, x, y, series, 3.8) for x, y in series.points))
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
    _bands(plot, bands, named=False)
    x_ticks = 3 if small else 5
    plot.axes(x_name="" if small else "tokens trained", y_name=unit, x_ticks=x_ticks, y_ticks=4)
    clip = _clip(plot, f"clip-{name}")
    thin_x, thin_y, _ = thin(xs, ys, ())
    plot.path(thin_x, thin_y, "raw" if levels else "line", "var(--accent)", clip)
    _marks(plot, marks, flags=not small)
    for b in bands:
        if b.level is not None:
            plot.path([b.x0, b.x1], [b.level, b.level], "line", "var(--accent)")
            words = short(b.level)
            if len(words) * _CHAR < plot.x(b.x1) - plot.x(b.x0):
                plot.label(
                    (plot.x(b.x0) + plot.x(b.x1)) / 2, plot.y(b.level) - 7, words, "strong halo", "middle"
                )
    return plot.svg(f"{name} over tokens")


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
    room = plot.width - len(b.name + b.outcome) * _CHAR * 1.22 - 12  # narrow pages write larger
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
