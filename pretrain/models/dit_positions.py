"""Places of a diffusion document's tokens: (layer, frame, row, column) for latents, and where its text begins.

Rows and columns are centred: row r of h stands at r - (h - h // 2), as in Qwen-Image. Layers are signed: targets count
0, 1, ... upwards and conditions -1, -2, ... downwards, the two-way layer axis of OmniAlpha that
`bil` names. The rope has three axes, of which the first says layer or frame, or four, which keep the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]
Preset = Literal["msrope", "layer3d", "bil"]
PRESETS: tuple[Preset, ...] = ("msrope", "layer3d", "bil")


@dataclass(frozen=True, slots=True)
class Grid:
    """Latents of one picture, layer or clip: frames x height x width cells; `condition`: seen, not generated."""

    height: int
    width: int
    frames: int = 1
    condition: bool = False

    @property
    def cells(self) -> int:
        """Number of tokens."""
        return self.frames * self.height * self.width


def layers_of(grids: Sequence[Grid], preset: Preset, *, sign: int = 1) -> list[int]:
    """The layer of each grid, in the order in which they stand in the document.

    msrope: 0, 1, ...; layer3d: the same, but -1 for the last; bil: targets 0, 1, ..., conditions -1, -2, .... sign -1
    turns the axis round. ValueError for an unknown preset or sign.
    """
    if preset not in PRESETS or sign not in (1, -1):
        raise ValueError(
            f"layers need a preset of {', '.join(PRESETS)} and a sign of 1 or -1, got {preset!r}, {sign}"
        )
    if preset == "bil":
        numbers, up, down = [], 0, 0
        for grid in grids:
            up, down = (up, down + 1) if grid.condition else (up + 1, down)
            numbers.append(-down if grid.condition else up - 1)
    else:
        numbers = list(range(len(grids)))
        if preset == "layer3d" and grids:
            numbers[-1] = -1
    return [sign * number for number in numbers]


def coordinates(grids: Sequence[Grid], preset: Preset, *, sign: int = 1) -> I32:
    """int32 [cells, 4] = (layer, frame, row, column) of all grids, one after the other, each frame by frame."""
    parts = [np.zeros((0, 4), np.int32)]
    for grid, layer in zip(grids, layers_of(grids, preset, sign=sign)):
        place = np.empty((grid.frames, grid.height, grid.width, 4), np.int32)
        place[..., 0] = layer
        place[..., 1] = np.arange(grid.frames)[:, None, None]
        place[..., 2] = (np.arange(grid.height) - (grid.height - grid.height // 2))[None, :, None]
        place[..., 3] = (np.arange(grid.width) - (grid.width - grid.width // 2))[None, None, :]
        parts.append(place.reshape(-1, 4))
    return np.concatenate(parts)


def three_axes(grids: Sequence[Grid], places: I32) -> I32:
    """int32 [cells, 3] = (layer or frame, row, column) of `coordinates`.

    Frames of a clip follow each other on the axis of layers. Where a grid has several, the layers beyond it move
    outwards by as many, so that no two grids share a place (in Qwen-Image frame 1 falls on the next picture).
    """
    out = places[:, 1:].copy()
    at, reach = 0, {1: 0, -1: 0}  # where the next layer begins, upwards and (below 0) downwards
    for grid in grids:
        span = slice(at, at + grid.cells)
        layer = int(places[at, 0])
        way = 1 if layer >= 0 else -1
        first = max(reach[way], abs(layer) - (way < 0))
        out[span, 0] = way * (first + places[span, 1]) - (way < 0)
        reach[way] = first + grid.frames
        at += grid.cells
    return out


def text_start(grids: Sequence[Grid], preset: Preset) -> int:
    """Where the first word stands, on all axes: beyond every row, column and, where layers have signs, layer.

    Qwen-Image: the largest half side; its layered form, and bil with a condition: also the number of targets.
    """
    start = max((max(grid.height // 2, grid.width // 2) for grid in grids), default=0)
    signed = preset == "layer3d" or (preset == "bil" and any(grid.condition for grid in grids))
    if not signed:
        return start
    targets = len(grids) - 1 if preset == "layer3d" else sum(not grid.condition for grid in grids)
    return max(start, targets)


def document_positions(
    grids: Sequence[Grid], words: int, preset: Preset, *, axes: int = 3, sign: int = 1
) -> tuple[I32, I32]:
    """(places of the words [words, axes], places of the latents [cells, axes])."""
    places = coordinates(grids, preset, sign=sign)
    latents = places if axes == 4 else three_axes(grids, places)
    start = text_start(grids, preset)
    text = np.repeat(np.arange(start, start + words, dtype=np.int32)[:, None], axes, axis=1)
    return text, latents
