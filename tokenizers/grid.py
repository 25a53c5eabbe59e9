"""Grids of cells as runs of ids, and back: pure functions over arrays, no codec and no vocabulary.

A grid is written row by row with an end-of-line mark after each row, so its shape can be read back from the
ids. A cell is one id per column of its codec (an image has one column, a score page one per book), or the
single `blank`.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median_low

import numpy as np
from numpy.typing import NDArray

MISSING, BLANK = -1, -2
I32 = NDArray[np.int32]


def write_grid(
    ids: I32, *, eol: int, blank: int, time: int = 0, layer: int = 0
) -> tuple[I32, NDArray[np.int32]]:
    """ids [h, w, k] (MISSING: not written; BLANK in column 0: one `blank`) -> (ids [n], positions [n, 4]).

    All ids of a cell share its position; the end of a line stands one column after its last cell.
    """
    height, width, columns = ids.shape
    ids = ids.copy()
    empty = ids[..., 0] == BLANK
    ids[empty] = MISSING
    ids[empty, 0] = blank
    lines = np.concatenate(
        [ids.reshape(height, width * columns), np.full((height, 1), eol, np.int32)], axis=1
    )
    place = np.zeros((height, width * columns + 1, 4), np.int32)
    place[..., 0], place[..., 3] = time, layer
    place[..., 1] = np.arange(height)[:, None]
    place[..., 2] = np.append(np.repeat(np.arange(width), columns), width)[None]
    written = lines != MISSING
    return lines[written].astype(np.int32), place[written]


class GridReader:
    """Collects the rows of one grid. `whole` turns False at the first thing a writer would not have written.

    columns: ids of a full cell; skip_on: the id of column 0 after which only the last column follows
    (an opaque RGBA cell), or None.
    """

    def __init__(self, columns: int, *, skip_on: int | None = None) -> None:
        self.columns, self.skip_on = columns, skip_on
        self.rows: list[list[list[int]]] = []
        self.whole = True
        self._row: list[list[int]] = []
        self._next = 0  # column expected next; 0: between cells

    def _close_cell(self) -> None:
        if self._next:
            self.whole, self._next = False, 0

    def put(self, column: int, code: int) -> None:
        """The id `code` of `column`."""
        if column == 0:
            self._close_cell()
        if self._next == 0:
            self._row.append([MISSING] * self.columns)
        if column < self._next:
            self.whole = False
            return
        self.whole &= column == self._next
        self._row[-1][column] = code
        if column == 0 and code == self.skip_on:
            self._next = self.columns - 1
        else:
            self._next = column + 1
        self._next %= self.columns

    def blank(self) -> None:
        """A blank cell."""
        self._close_cell()
        self._row.append([BLANK] * self.columns)

    def line(self) -> None:
        """The end of a row; a row without cells is dropped."""
        self._close_cell()
        if self._row:
            self.rows.append(self._row)
        else:
            self.whole = False
        self._row = []

    def finish(self) -> None:
        """The end of the grid; an open row counts, but makes the grid incomplete."""
        self._close_cell()
        if self._row:
            self.whole = False
            self.rows.append(self._row)
            self._row = []
        self.whole &= bool(self.rows)


def stack_grids(grids: Iterable[GridReader], columns: int) -> tuple[I32, bool]:
    """Grids of one size int32 [g, h, w, columns] from what was read, and whether nothing was out of place.

    Height and width are medians, so that a broken row cannot inflate the result: it has at most four cells
    for each one read. What is missing is MISSING, what is too much is cut.
    """
    grids = list(grids)
    filled = [grid for grid in grids if grid.rows]
    whole = len(filled) == len(grids) and all(grid.whole for grid in grids)
    if not filled:
        return np.full((1, 1, 1, columns), MISSING, np.int32), False
    height = median_low([len(grid.rows) for grid in filled])
    width = median_low([len(row) for grid in filled for row in grid.rows])
    out = np.full((len(filled), height, width, columns), MISSING, np.int32)
    for g, grid in enumerate(filled):
        whole &= len(grid.rows) == height
        for y, row in enumerate(grid.rows[:height]):
            whole &= len(row) == width
            out[g, y, : min(width, len(row))] = row[:width]
    return out, whole
