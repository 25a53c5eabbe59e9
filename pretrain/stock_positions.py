"""Which diffusion documents diffusers' own classes place as our positions do, and what they cannot say.

`QwenImageTransformer2DModel` has one of two ropes for all that it sees: the plain one counts pictures 0, 1, ..., the
layered one (`use_layer3d_rope`) too, but calls the last picture -1. A document is reproduced when the places of its
words and latents are the same; so both are computed here, and compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ringweave.data_pipes.plan_items import CLIPS, Entry, entries
from ringweave.pretrain.models.dit_positions import I32, Grid, Preset, document_positions

#: Places of the stock ropes' tables, up from 0 and down from -1; what lies beyond is cut in silence.
TABLE = 4096
#: Views of a plan with as many grids as the record has layers.
SEVERAL = ("layers", "lower")


def stock_places(grids: Sequence[Grid], words: int, *, layered: bool) -> tuple[I32, I32] | None:
    """(places of the words [words, 3], of the latents [cells, 3]) in the stock ropes; None where they have none.

    As in `QwenEmbedRope` and `QwenEmbedLayer3DRope` of diffusers, grids in the order they stand in.
    """
    parts = [np.zeros((0, 3), np.int32)]
    last, start = len(grids) - 1, 0
    for number, grid in enumerate(grids):
        condition = layered and number == last
        if condition and grid.frames > 1:
            return None
        place = np.empty((grid.frames, grid.height, grid.width, 3), np.int32)
        place[..., 0] = -1 if condition else (number + np.arange(grid.frames))[:, None, None]
        for axis, size in ((1, grid.height), (2, grid.width)):
            line = np.arange(size) - (size - size // 2)
            place[..., axis] = line[:, None] if axis == 1 else line
            start = max(start, size // 2)
        parts.append(place.reshape(-1, 3))
    start = max(start, last) if layered else start
    text = np.repeat(np.arange(start, start + words, dtype=np.int32)[:, None], 3, axis=1)
    latents = np.concatenate(parts)
    reach = [np.concatenate([text, latents])] if words or len(latents) else []
    if any(places.max() >= TABLE or places.min() < -TABLE for places in reach):
        return None
    return text, latents


def reproduced(grids: Sequence[Grid], words: int, *, preset: Preset, sign: int = 1, layered: bool) -> bool:
    """Whether the stock class with this rope gives a document of ours its velocities."""
    theirs = stock_places(grids, words, layered=layered)
    if theirs is None:
        return False
    ours = document_positions(grids, words, preset, sign=sign)
    return all(np.array_equal(mine, stock) for mine, stock in zip(ours, theirs))


def holds_latents(plan: Sequence[str]) -> bool:
    """Whether a plan makes documents of latents."""
    return any(entry.item == "latents" for entry in entries(plan))


def has_condition(plan: Sequence[str]) -> bool:
    """Whether documents of a plan hold a grid that is seen and not generated."""
    return any(entry.item == "latents" and entry.condition for entry in entries(plan))


def reproduced_plan(plan: Sequence[str], *, preset: Preset, sign: int = 1, layered: bool) -> bool:
    """Whether all documents of a plan are reproduced, whatever their record; False for a plan without latents."""
    found = list(_documents(entries(plan)))
    return bool(found) and all(
        reproduced(grids, 1, preset=preset, sign=sign, layered=layered) for grids in found
    )


def _documents(plan: Sequence[Entry]) -> Iterator[list[Grid]]:
    """Documents that stand for all of a plan: records of 1, 2 and 5 layers; targets first, as in training."""
    views = [entry for entry in plan if entry.item == "latents"]
    for layers in (1, 2, 5) if views else ():
        grids: list[Grid] = []
        for entry in sorted(views, key=lambda entry: entry.condition):
            clip = entry.argument == "video" or entry.argument.rpartition(".")[2] in CLIPS
            many = layers if entry.argument in SEVERAL else 1
            grids += [Grid(4, 4, 3 if clip else 1, entry.condition)] * many
        yield grids


def cannot_say(*, preset: Preset, sign: int, layered: bool) -> list[str]:
    """What the stock class with this rope cannot do with such a model, a sentence each."""
    said = []
    if preset == "bil" and layered:
        said.append(
            "documents with two or more conditions: the layered rope calls the last grid -1, the rest 0, 1, ..."
        )
        said.append(
            "documents without a condition: load the transformer with use_layer3d_rope=False for those"
        )
    elif preset == "bil" and sign == 1:
        said.append(
            "documents with a condition: load the transformer with use_layer3d_rope=True for one condition, last"
        )
    elif preset == "bil":
        said.append(
            "documents of two or more targets: their layers count downwards, the stock rope counts up"
        )
    if layered:
        said.append("a condition of several frames: the layered rope fails on it")
    behind = "targets" if layered else "grids"
    said.append(f"a clip with other {behind} behind it: frame 1 of the clip falls on the place of the next")
    said.append(
        f"words beyond place {TABLE - 1:,}: the table of the stock ropes ends there and cuts them in silence"
    )
    said.append("documents of different sizes in one batch: all get the places of the first")
    return said


def stock_sources(
    plans: Iterable[tuple[str, Sequence[str]]], *, preset: Preset, sign: int, layered: bool
) -> list[str]:
    """Names of the sources, of (name, plan), all of whose documents are reproduced."""
    return [name for name, plan in plans if reproduced_plan(plan, preset=preset, sign=sign, layered=layered)]
