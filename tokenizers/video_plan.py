"""What a later frame of a video takes from the frame before it: pure functions over integer arrays.

One move for the whole frame, found by an exhaustive search, and the cells that are good enough when taken from the
moved picture. Everything is exact in integers, so the choice cannot depend on batch, chunk, threads or machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]
Move = tuple[int, int]
NEVER = np.int64(1) << 60
#: Prices of an id in squared levels that are tried, steps of sqrt(2).
PRICES = np.unique([0, *(int(2 ** (k / 2)) for k in range(60))]).astype(np.int64)


def luma(picture: U8) -> NDArray[np.float64]:
    """Brightness of [H, W, 3], whole numbers around 0: [H, W]."""
    red, green, blue = np.moveaxis(picture.astype(np.int64), -1, 0)
    return (((2 * red + 5 * green + blue) >> 3) - 128).astype(np.float64)


def shifted(picture: NDArray[Any], move: Move) -> NDArray[Any]:
    """`picture` [H, W, ...] with its content moved `move` = (down, right) pixels, edges repeated."""
    if move == (0, 0):
        return picture
    height, width = picture.shape[:2]
    rows = np.clip(np.arange(height) - move[0], 0, height - 1)
    columns = np.clip(np.arange(width) - move[1], 0, width - 1)
    return picture[rows].take(columns, axis=1)


def cell_errors(frame: U8, guess: U8, patch: int) -> I64:
    """Squared error of each cell, over the pixels that `frame` [H, W, 3] has of `guess` [p*h, p*w, 3]: [h, w]."""
    height, width = frame.shape[:2]
    rows, columns = guess.shape[0] // patch, guess.shape[1] // patch
    missed = np.zeros(guess.shape, np.int32)
    np.subtract(frame, guess[:height, :width], out=missed[:height, :width], dtype=np.int32)
    missed *= missed
    return missed.reshape(rows, patch, columns, -1).sum((1, 3), dtype=np.int64)


def move_errors(frame: U8, before: U8, reach: int) -> I64:
    """Squared error of brightness for every move within `reach`: [2*reach + 1, 2*reach + 1], (down, right) from -reach.

    frame [H, W, 3], before [>= H, >= W, 3]. |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, with a.b for all moves by Fourier
    transform; its values are whole numbers up to 2^40 with errors below 0.01, so rounding makes them exact.
    """
    now, past = luma(frame), np.pad(luma(before), reach, mode="edge")
    height, width = now.shape
    past = past[: height + 2 * reach, : width + 2 * reach]
    size = tuple(-(-n // 16) * 16 for n in past.shape)
    product = np.fft.rfft2(past, size) * np.conj(np.fft.rfft2(now, size))
    span = 2 * reach + 1
    dots = np.rint(np.fft.irfft2(product, size)[:span, :span])
    sums = np.zeros((past.shape[0] + 1, past.shape[1] + 1))
    sums[1:, 1:] = (past * past).cumsum(0).cumsum(1)
    energy = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    errors = (now * now).sum() + energy - 2 * dots
    return errors[::-1, ::-1].astype(np.int64)  # a window further down is content that moved up


def likely_moves(frame: U8, before: U8, *, reach: int, count: int) -> list[Move]:
    """The `count` moves of least error; of equals the smaller, then the first in rows and columns."""
    errors = move_errors(frame, before, reach)
    steps = np.arange(-reach, reach + 1)
    down, right = np.broadcast_arrays(steps[:, None], steps[None])
    order = np.lexsort((right.ravel(), down.ravel(), (down**2 + right**2).ravel(), errors.ravel()))
    return [(int(k) // len(steps) - reach, int(k) % len(steps) - reach) for k in order[:count]]


def cheapest(harm: I64, allowed: Bools, columns: int) -> Bools:
    """For each of PRICES the cells [n] to take that make harm + price * ids least: [prices, n].

    harm: what taking a cell adds to its squared error. A run of taken cells is one id, any other cell `columns`. By
    dynamic programming over the cells in reading order.
    """
    cells = len(harm)
    fresh, taken = np.zeros_like(PRICES), np.full_like(PRICES, NEVER)
    stay, leave = np.empty((cells, len(PRICES)), bool), np.empty((cells, len(PRICES)), bool)
    code = PRICES * columns
    for n, (more, may) in enumerate(zip(harm.tolist(), allowed.tolist())):
        start = fresh + PRICES
        stay[n], leave[n] = taken <= start, taken <= fresh
        following = np.minimum(taken, start) + more if may else np.full_like(PRICES, NEVER)
        fresh, taken = np.minimum(taken, fresh) + code, np.minimum(following, NEVER)
    out = np.empty((cells, len(PRICES)), bool)
    now = taken <= fresh
    for n in range(cells - 1, -1, -1):
        out[n] = now
        now = np.where(now, stay[n], leave[n])
    return out.T


def runs(taken: Bools, longest: int) -> list[tuple[int, int]]:
    """Runs of taken cells [n] in reading order as (first cell, length up to `longest`); 0 is "all that are left"."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], taken, [False]]).astype(np.int8)))
    out: list[tuple[int, int]] = []
    for start, stop in edges.reshape(-1, 2).tolist():
        if stop == len(taken):
            out.append((start, 0))
        else:
            out += [(at, min(longest, stop - at)) for at in range(start, stop, longest)]
    return out
