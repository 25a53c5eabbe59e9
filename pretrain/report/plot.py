"""A rectangle with axes as inline SVG text, and what lies on it: series, stages, restarts, held-out points.

Plain values in, markup out, no scripts and no libraries. Colours are CSS variables so that one drawing serves
the light and the dark page; every series also differs by a label at its end and by the shape of its held-out
points, so that nothing depends on seeing colour. Coordinates are viewBox units. All text passes through
`safe_text.text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ringweave.pretrain.report.safe_text import text
from ringweave.pretrain.report.scales import nice_ticks, tick_text
from ringweave.pretrain.report.style import COLOURS, OTHER_COLOUR
from ringweave.pretrain.report.words import number, short

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "down", "plus", "hexagon")
CHAR_WIDTH = 6.6  # width of a character of chart text, generous for wide system fonts
STRIP_HEIGHT = 34.0  # height of the strip with the names of the stages


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


def clip_path(plot: Plot, name: str) -> str:
    w, h = plot.width - plot.left - plot.right, plot.floor - plot.top
    plot.add(
        f'<clipPath id="{name}"><rect x="{plot.left}" y="{plot.top}" width="{w:.1f}" height="{h:.1f}"/>'
        "</clipPath>"
    )
    return name


def held_out_point(plot: Plot, x: float, y: float, series: Series, size: float = 4.2) -> str:
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


def draw_bands(plot: Plot, bands: Sequence[Band], *, named: bool = True) -> None:
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
            f'<rect class="{"band" if i % 2 else "strip"}" x="{left:.1f}" y="{plot.top - STRIP_HEIGHT}" '
            f'width="{right - left:.1f}" height="{STRIP_HEIGHT}"/>'
        )
        if len(b.name) * CHAR_WIDTH * 1.08 <= room:
            plot.label(left + 7, plot.top - STRIP_HEIGHT + 14, b.name, "strong")
        if len(b.detail) * CHAR_WIDTH <= room:
            plot.label(left + 7, plot.top - 6, b.detail)
        plot.add("</g>")


def draw_marks(plot: Plot, marks: Sequence[Mark], *, flags: bool = True) -> None:
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
