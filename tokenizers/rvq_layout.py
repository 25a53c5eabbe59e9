"""Orders in which the codes of several books are written, each with an exact inverse: pure functions.

Codes are int32 [T, Q]: T frames of Q books, book 0 the coarsest (residual quantisation). MISSING (-1) is a cell
without a code.

| layout       | shape          | at step s                            | steps     |
|--------------|----------------|--------------------------------------|-----------|
| flatten      | [T * Q]        | book s % Q of frame s // Q           | T * Q     |
| coarse_first | [Q * T]        | book s // T of frame s % T           | T * Q     |
| delay        | [T + Q - 1, Q] | book q of frame s - q, for every q   | T + Q - 1 |
| parallel     | [T, Q]         | all books of frame s                 | T         |

A row of the last two is one step of a model that sums Q embeddings and has Q heads. delay is MusicGen's pattern
(Copet et al., 2023): book q comes q steps late, so a head sees the coarser books of its own frame; the cells
outside it are MISSING, and `mask` says which ones hold codes.

Readers are built for model output. They never raise: what is cut off or negative is MISSING, what lies outside
the pattern is ignored, and `complete` is then False.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.grid import MISSING

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Read(NamedTuple):
    """codes int32 [T, Q]; complete: every cell was there and nothing else was."""

    codes: I32
    complete: bool


def _codes(codes: I32) -> I32:
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] < 1 or codes.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers [T, Q] with Q >= 1, got {codes.dtype} {list(codes.shape)}")
    return codes.astype(np.int32)


def _clean(found: I64, *, whole: bool) -> Read:
    missing = found < 0
    return Read(np.where(missing, MISSING, found).astype(np.int32), whole and not bool(missing.any()))


def _stream(stream: I32) -> I64:
    return np.asarray(stream).reshape(-1).astype(np.int64)


def _rows(grid: I32, books: int) -> tuple[I64, bool]:
    """`grid` with `books` columns, cut or filled with MISSING; whether it had them."""
    grid = np.asarray(grid).astype(np.int64)
    if grid.ndim != 2:
        grid = grid.reshape(-1, 1)
    out = np.full((len(grid), books), MISSING, np.int64)
    width = min(books, grid.shape[1])
    out[:, :width] = grid[:, :width]
    return out, grid.shape[1] == books or not grid.size


def _frames(found: I64, frames: int | None) -> tuple[I64, bool]:
    """Rows cut or filled with MISSING to `frames`; whether there were as many."""
    if frames is None or len(found) == frames:
        return found, True
    out = np.full((frames, found.shape[1]), MISSING, np.int64)
    out[: len(found)] = found[:frames]
    return out, False


# ---- flatten ----


def flatten(codes: I32) -> I32:
    """[T, Q] -> [T * Q], frame by frame."""
    return _codes(codes).reshape(-1)


def unflatten(stream: I32, *, books: int, frames: int | None = None) -> Read:
    """Inverse of `flatten`; a last frame that is not whole counts. frames: T, if it is known."""
    given = _stream(stream)
    rows = -(-len(given) // books)
    found = np.full(rows * books, MISSING, np.int64)
    found[: len(given)] = given
    cells, whole = _frames(found.reshape(rows, books), frames)
    return _clean(cells, whole=whole)


# ---- coarse first ----


def coarse_first(codes: I32) -> I32:
    """[T, Q] -> [Q * T], book by book."""
    return np.ascontiguousarray(_codes(codes).T).reshape(-1)


def from_coarse_first(stream: I32, *, books: int, frames: int | None = None) -> Read:
    """Inverse of `coarse_first`. Without `frames` a stream cut short cannot be told from a shorter one.

    It is then read as T = ceil(n / Q) frames, so a writer that may be cut short should say T first.
    """
    given = _stream(stream)
    rows = -(-len(given) // books) if frames is None else frames
    found = np.full(books * rows, MISSING, np.int64)
    found[: len(given)] = given[: books * rows]
    return _clean(found.reshape(books, rows).T, whole=len(given) <= books * rows)


# ---- delay ----


def delay_mask(frames: int, books: int) -> Mask:
    """Which cells of a delayed grid hold codes, bool [T + Q - 1, Q] ([0, Q] for no frames)."""
    frame = np.arange(delay_steps(frames, books))[:, None] - np.arange(books)[None]
    return (frame >= 0) & (frame < frames)


def delay(codes: I32) -> I32:
    """[T, Q] -> [T + Q - 1, Q]: cell (s, q) is book q of frame s - q, MISSING outside `delay_mask`."""
    codes = _codes(codes)
    out = np.full((delay_steps(*codes.shape), codes.shape[1]), MISSING, np.int32)
    for book in range(codes.shape[1] if len(codes) else 0):
        out[book : book + len(codes), book] = codes[:, book]
    return out


def undelay(grid: I32, *, books: int, frames: int | None = None) -> Read:
    """Inverse of `delay`. Without `frames`, the last frame is the last of which any book is there."""
    cells, whole = _rows(grid, books)
    steps = len(cells)
    found = np.full((steps, books), MISSING, np.int64)
    for book in range(min(books, steps)):
        found[: steps - book, book] = cells[book:, book]
    if frames is None:
        present = np.flatnonzero((found >= 0).any(axis=1))
        frames = int(present[-1]) + 1 if len(present) else 0
    inside = delay_mask(frames, books)
    whole &= inside.shape == cells.shape and not bool((cells[~inside] >= 0).any())
    return _clean(_frames(found, frames)[0], whole=whole)


# ---- parallel ----


def parallel(codes: I32) -> I32:
    """[T, Q] -> [T, Q], a copy."""
    return _codes(codes).copy()


def unparallel(grid: I32, *, books: int, frames: int | None = None) -> Read:
    """Inverse of `parallel`."""
    cells, columns = _rows(grid, books)
    cells, rows = _frames(cells, frames)
    return _clean(cells, whole=columns and rows)


# ---- all of them ----


def flat_steps(frames: int, books: int) -> int:
    """Steps of `flatten` and `coarse_first`."""
    return frames * books


def delay_steps(frames: int, books: int) -> int:
    """Steps of `delay`."""
    return frames + books - 1 if frames else 0


def parallel_steps(frames: int, books: int) -> int:
    """Steps of `parallel`."""
    return frames


@dataclass(frozen=True, slots=True)
class Layout:
    """write: codes -> stream or grid; read: its inverse (books=, frames=); steps: first axis of what `write` gives.

    columns: whether a step holds one cell of every book (a grid) or a single code (a stream).
    """

    write: Callable[[I32], I32]
    read: Callable[..., Read]
    steps: Callable[[int, int], int]
    columns: bool

    def mask(self, frames: int, books: int) -> Mask:
        """Which cells of what `write` gives for [T, Q] codes hold codes."""
        return self.write(np.zeros((frames, books), np.int32)) != MISSING


LAYOUTS: dict[str, Layout] = {
    "flatten": Layout(flatten, unflatten, flat_steps, columns=False),
    "coarse_first": Layout(coarse_first, from_coarse_first, flat_steps, columns=False),
    "delay": Layout(delay, undelay, delay_steps, columns=True),
    "parallel": Layout(parallel, unparallel, parallel_steps, columns=True),
}
