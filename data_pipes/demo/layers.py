"""RGBA layers: OpenMoji drawings taken apart into their named groups (color, skin, hair, line, ...), 64 x 64.

Each layer is rendered alone, bottom first. A drawing is kept only if its layers, put on top of each other,
give the drawing back to 2/255.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.demo import openmoji
from ringweave.data_pipes.demo.common import (
    Job,
    Record,
    is_heldout,
    json_bytes,
    png_bytes,
    shuffled,
    svg_to_rgba,
    trim,
    version,
)

SOURCE = "rgba"
SIZE = 64
MAX_LAYERS = 4
#: Half of the drawings have skin or hair, so that more than colour and line is seen.
DRAWINGS = 250
TOLERANCE = 2


def plan(limit: int | None = None) -> list[Job]:
    """One job a drawing, at most two of a base; every second one from those that show people."""
    taken: Counter[str] = Counter()
    people: list[Job] = []
    others: list[Job] = []
    for drawing in shuffled(openmoji.catalogue(), by="rgba"):
        if taken[drawing.base] >= 2 or min(len(people), len(others)) >= DRAWINGS // 2:
            continue
        names = {group.get("id") for group in openmoji.groups(drawing.path)[1]}
        if len(names) < 2:
            continue
        taken[drawing.base] += 1
        piece = f"openmoji/{drawing.base}"
        job = Job(SOURCE, drawing.code, piece, is_heldout(piece), (drawing,))
        (people if names & {"skin", "hair"} else others).append(job)
    jobs = people[: DRAWINGS // 2] + others[: DRAWINGS - DRAWINGS // 2]
    return trim(shuffled(jobs, by="rgba-order"), limit)


def render(job: Job) -> list[Record]:
    """The record of one drawing; none when fewer than two layers show or they do not add up to it."""
    (drawing,) = job.args
    root, groups = openmoji.groups(drawing.path)
    parts = [[group] for group in groups]
    images = [svg_to_rgba(openmoji.svg_of(root, part), width=SIZE) for part in parts]
    shown = [i for i, image in enumerate(images) if image[..., 3].any()]
    parts, images = [parts[i] for i in shown], [images[i] for i in shown]
    while len(parts) > MAX_LAYERS:
        # Merge the two neighbours that cover least together, drawing them as one.
        cover = [int((image[..., 3] > 0).sum()) for image in images]
        at = min(range(len(parts) - 1), key=lambda i: (cover[i] + cover[i + 1], i))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        images[at : at + 2] = [svg_to_rgba(openmoji.svg_of(root, parts[at]), width=SIZE)]
    flat = svg_to_rgba(drawing.path.read_text(encoding="utf-8"), width=SIZE)
    error = composite_error(images, flat)
    if len(images) < 2 or error > TOLERANCE:
        return []
    names = ["+".join(str(group.get("id")) for group in part) for part in parts]
    about = {
        "piece": job.piece,
        "licence": openmoji.LICENCE,
        "source": version(openmoji.DISTRIBUTION),
        "file": f"svg/{drawing.code}.svg",
        "layers": names,
        "composite_error": error,
        "caption": f"layers of an emoji: {drawing.caption}",
    }
    members = {f"layer{i}.png": png_bytes(image) for i, image in enumerate(images)}
    members |= {
        "flat.png": png_bytes(flat),
        "txt": f"{about['caption']}\n".encode(),
        "json": json_bytes(about),
    }
    return [Record(SOURCE, f"openmoji-{drawing.code}", job.heldout, members)]


def composite(layers: Sequence[NDArray[np.uint8]], *, background: float) -> NDArray[np.float64]:
    """Straight-alpha layers [H, W, 4], bottom first, over an opaque grey -> RGB float [H, W, 3] in 0..255.

    Porter-Duff 'over', one layer after another.
    """
    page = np.full((*layers[0].shape[:2], 3), background, dtype=np.float64)
    for layer in layers:
        alpha = layer[..., 3:].astype(np.float64) / 255
        page = layer[..., :3] * alpha + page * (1 - alpha)
    return page


def composite_error(layers: Sequence[NDArray[np.uint8]], flat: NDArray[np.uint8]) -> int:
    """Largest difference, in 1/255, between the rounded composite and `flat`, over black and over white."""
    if not layers:
        return 255
    worst = 0.0
    for background in (0.0, 255.0):
        ours, theirs = composite(layers, background=background), composite([flat], background=background)
        worst = max(worst, float(np.abs(np.rint(ours) - np.rint(theirs)).max()))
    return int(worst)
