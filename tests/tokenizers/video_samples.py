"""Clips of drawn pictures: standing still, panning, and cut."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tokenizer_samples import picture

from ringweave.tokenizers.video import VideoFrame

U8 = NDArray[np.uint8]


def still(frames: int, size: int = 40) -> U8:
    return np.repeat(picture(7, size=size)[None], frames, 0)


def pan(frames: int, size: int = 40, step: tuple[int, int] = (1, 2)) -> U8:
    """A window that slides over a larger picture."""
    large = picture(8, size=size + frames * max(step))
    return np.stack([large[k * step[0] :, k * step[1] :][:size, :size] for k in range(frames)])


def cuts(frames: int, size: int = 40) -> U8:
    """Another picture every third frame, noise on all."""
    rng = np.random.default_rng(0)
    shown = np.stack([picture(k // 3, size=size) for k in range(frames)])
    return np.clip(shown + rng.normal(0, 3, shown.shape), 0, 255).astype(np.uint8)


def same(one: list[VideoFrame], two: list[VideoFrame]) -> bool:
    return len(one) == len(two) and all(
        a.move == b.move and np.array_equal(a.codes, b.codes) for a, b in zip(one, two)
    )
