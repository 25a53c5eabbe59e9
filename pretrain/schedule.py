"""The learning rate of a step: pure."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, schedule: str, min_ratio: float
) -> float:
    """Rate of the update that makes step `step` (1-based): linear warm-up, then "cosine" to peak·min_ratio or flat."""
    if step <= warmup:
        return peak * step / max(warmup, 1)
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(total - warmup, 1))
    return peak * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * done)))
