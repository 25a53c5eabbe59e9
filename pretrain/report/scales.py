"""Scales of the charts and what is done to points before they are drawn: ticks, thinning, smoothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ringweave.pretrain.report.words import short

MOST_POINTS = 420


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
    """At most MOST_POINTS points: neighbours are merged into weighted means."""
    weights = weights if len(weights) else [1.0] * len(xs)
    size = max(1, math.ceil(len(xs) / MOST_POINTS))
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
    return 0 if n < 12 else max(1, round(min(n, MOST_POINTS) / 40))
