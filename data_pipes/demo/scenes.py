"""Scenes: one or two OpenMoji drawings on a photograph or a pattern, as RGBA layers, 64 x 64.

layer0.png is the opaque background, layer1.png (and in every third scene layer2.png) a drawing on it, flat.png all of
them over each other. Which drawing lies where, how large and on what follows from the key. Scenes that are held out
show held-out drawings on the held-out photograph or on patterns, so no other scene has any part of them.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ringweave.data_pipes.demo import openmoji
from ringweave.data_pipes.demo.common import (
    Job,
    Record,
    is_heldout,
    json_bytes,
    package_folder,
    png_bytes,
    rank,
    shuffled,
    svg_to_rgba,
    trim,
    version,
)
from ringweave.data_pipes.demo.images import PHOTO_DISTRIBUTION, PHOTOS
from ringweave.data_pipes.layer_views import over

SOURCE = "scenes"
SIZE = 64
#: Scenes to train on, and held out.
SCENES, HELDOUT = 1500, 150
#: Share of backgrounds, in 1/256, that are photographs.
PHOTOGRAPHS = 150
#: Side of the photograph that a crop is cut from, and smallest and largest side of drawings: alone, and of two.
SHORT_SIDES = (72, 96, 128, 160)
ALONE, FIRST, SECOND = (30, 56), (28, 44), (20, 32)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (204, 51, 51),
    "orange": (232, 134, 40),
    "yellow": (240, 208, 64),
    "green": (64, 150, 72),
    "teal": (48, 160, 160),
    "blue": (56, 92, 200),
    "purple": (124, 72, 168),
    "pink": (236, 140, 176),
    "brown": (128, 88, 56),
    "grey": (140, 140, 140),
    "white": (248, 248, 248),
    "black": (24, 24, 24),
}
PATTERNS = ("gradient", "stripes", "checks", "dots")
U8 = NDArray[np.uint8]


def plan(limit: int | None = None) -> list[Job]:
    """Scenes of both sides, mixed. A drawing is the main one of no second scene before all were of one."""
    sides: dict[bool, list[openmoji.Drawing]] = {False: [], True: []}
    taken: Counter[str] = Counter()
    for drawing in shuffled(openmoji.catalogue(), by=SOURCE):
        if taken[drawing.base] < 2:
            taken[drawing.base] += 1
            sides[is_heldout(f"openmoji/{drawing.base}")].append(drawing)
    hidden = shuffled(PHOTOS, by="photo-split")[0]  # as in images.py
    photos = {True: [hidden], False: [name for name in PHOTOS if name != hidden]}
    jobs = []
    for heldout, count in ((False, SCENES), (True, HELDOUT)):
        pool = sides[heldout]
        for number in range(count):
            main = pool[number % len(pool)]
            key = f"scene-{main.code}-{number // len(pool)}"
            drawings = [main]
            if rank(f"{key}/two") % 3 == 0:
                others = [other for other in pool if other.base != main.base]
                drawings.append(others[rank(f"{key}/other") % len(others)])
            photo = _chosen(photos[heldout], f"{key}/photo")
            args = (drawings, photo if rank(f"{key}/background") % 256 < PHOTOGRAPHS else "")
            jobs.append(Job(SOURCE, key, f"openmoji/{main.base}", heldout, args))
    return trim(shuffled(jobs, by="scenes-order"), limit)


def render(job: Job) -> list[Record]:
    """The record of one scene; none if a drawing shows nothing at its size."""
    drawings, photo = job.args
    ground, behind, about = _photograph(photo, job.name) if photo else _pattern(job.name)
    layers = [np.concatenate([ground, np.full((SIZE, SIZE, 1), 255, np.uint8)], axis=2)]
    places = []
    for number, drawing in enumerate(drawings):
        smallest, largest = ALONE if len(drawings) == 1 else (FIRST, SECOND)[number]
        side = smallest + rank(f"{job.name}/{number}/side") % (largest - smallest + 1)
        left, top = (rank(f"{job.name}/{number}/{way}") % (SIZE - side + 1) for way in ("left", "top"))
        layer = np.zeros((SIZE, SIZE, 4), np.uint8)
        svg = drawing.path.read_text(encoding="utf-8")
        layer[top : top + side, left : left + side] = svg_to_rgba(svg, width=side)
        layers.append(layer)
        places.append({"file": f"svg/{drawing.code}.svg", "side": side, "left": left, "top": top})
    if not all(layer[..., 3].any() for layer in layers):
        return []
    names = " and ".join(drawing.caption for drawing in drawings)
    caption = f"{'an emoji' if len(drawings) == 1 else 'emojis'} of {names} on {behind}"
    pieces = [f"openmoji/{drawing.base}" for drawing in drawings]
    licence = f"drawings: {openmoji.LICENCE}; background: {about['licence']}"
    facts = {
        "piece": job.piece,
        "pieces": [*pieces, *([f"photo/{photo}"] if photo else [])],
        "licence": licence,
        "source": "; ".join(
            [version(openmoji.DISTRIBUTION), *([version(PHOTO_DISTRIBUTION)] if photo else [])]
        ),
        "background": about,
        "drawings": places,
        "caption": caption,
    }
    members = {f"layer{i}.png": png_bytes(layer) for i, layer in enumerate(layers)}
    members |= {
        "flat.png": png_bytes(np.ascontiguousarray(over(layers)[..., :3])),
        "txt": f"{caption}\n".encode(),
        "json": json_bytes(facts),
    }
    return [Record(SOURCE, job.name, job.heldout, members)]


def _chosen(items: list[Any], key: str) -> Any:
    return items[rank(key) % len(items)]


def _photograph(name: str, key: str) -> tuple[U8, str, dict[str, Any]]:
    """(uint8 [64, 64, 3], its description, facts) of a crop of a photograph."""
    photo = _photo(name)
    short = _chosen(list(SHORT_SIDES), f"{key}/short")
    scale = short / min(photo.size)
    width, height = (max(SIZE, round(side * scale)) for side in photo.size)
    left, top = rank(f"{key}/left") % (width - SIZE + 1), rank(f"{key}/top") % (height - SIZE + 1)
    # Only what is kept is resized.
    box = tuple(value / scale for value in (left, top, left + SIZE, top + SIZE))
    inside = (box[0], box[1], min(box[2], photo.width), min(box[3], photo.height))
    pixels = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=inside))
    subject, licence = PHOTOS[name]
    about = {
        "licence": licence,
        "file": f"skimage/data/{name}",
        "crop": {"short_side": short, "left": left, "top": top},
    }
    return pixels, f"a photograph of {subject}", about


@lru_cache(maxsize=len(PHOTOS))
def _photo(name: str) -> Image.Image:
    """The whole photograph as RGB, its short side reduced to 320."""
    with Image.open(package_folder("skimage", PHOTO_DISTRIBUTION) / "data" / name) as stored:
        image = stored.convert("RGB")
    scale = 320 / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _pattern(key: str) -> tuple[U8, str, dict[str, Any]]:
    """(uint8 [64, 64, 3], its description, facts) of two colours in a pattern."""
    kind = _chosen(list(PATTERNS), f"{key}/pattern")
    one = _chosen(list(COLOURS), f"{key}/one")
    two = _chosen([name for name in COLOURS if name != one], f"{key}/two-colour")
    down, right = _chosen([(0, 1), (1, 0), (1, 1), (1, -1)], f"{key}/way")
    period = 6 + rank(f"{key}/period") % 11
    rows, columns = np.mgrid[:SIZE, :SIZE]
    along = down * rows + right * columns
    if kind == "gradient":
        share = (along - along.min()) / (along.max() - along.min())
        words = f"a gradient from {one} to {two}"
    elif kind == "stripes":
        share = (along // period % 2).astype(np.float64)
        words = f"{one} and {two} stripes"
    elif kind == "checks":
        share = ((rows // period + columns // period) % 2).astype(np.float64)
        words = f"{one} and {two} checks"
    else:
        off = (2 * (rows % period) - period + 1) ** 2 + (2 * (columns % period) - period + 1) ** 2
        share = (off < (0.7 * period) ** 2).astype(np.float64)
        words = f"{two} dots on {one}"
    colours = [np.array(COLOURS[name], np.float64) for name in (one, two)]
    pixels = np.rint(colours[0] + share[..., None] * (colours[1] - colours[0])).astype(np.uint8)
    return pixels, words, {"licence": "none needed: generated", "pattern": kind, "colours": [one, two]}
