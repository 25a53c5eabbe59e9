"""Images: OpenMoji drawings on white, and crops of photographs, 64 x 64 RGB with a caption."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from ringweave.data_pipes.demo import openmoji
from ringweave.data_pipes.demo.common import (
    Job,
    Record,
    is_heldout,
    json_bytes,
    on_white,
    package_folder,
    png_bytes,
    rank,
    shuffled,
    svg_to_rgba,
    trim,
    version,
)

SOURCE = "image"
SIZE = 64
DRAWINGS, CROPS = 500, 12
PHOTO_DISTRIBUTION = "scikit-image"
#: file -> (caption, licence as the docstring in skimage/data/_fetchers.py states it)
PHOTOS: dict[str, tuple[str, str]] = {
    "astronaut.png": ("astronaut", "public domain (NASA), no known copyright restrictions"),
    "brick.png": ("brick wall", "CC0"),
    "camera.png": ("cameraman", "CC0 by the photographer (Lav Varshney)"),
    "cell.png": ("cell in saline, hologram phase", "CC0"),
    "chelsea.png": ("cat", "CC0 by the photographer (Stefan van der Walt)"),
    "clock_motion.png": ("clock, motion blurred", "public domain, by the photographer (Stefan van der Walt)"),
    "coffee.png": ("coffee cup", "CC0 by the photographer (Rachel Michetti)"),
    "coins.png": ("greek coins", "no known copyright restrictions (Brooklyn Museum)"),
    "grass.png": ("grass", "CC0"),
    "gravel.png": ("gravel", "CC0"),
    "hubble_deep_field.jpg": ("galaxies, deep field", "public domain (NASA)"),
    "ihc.png": ("stained tissue", "no known copyright restrictions (CMMI)"),
    "retina.jpg": ("retina of an eye", "CC0 1.0"),
    "rocket.jpg": ("rocket launch", "public domain (SpaceX)"),
}


def plan(limit: int | None = None) -> list[Job]:
    """Drawings (at most two of a base) and photo crops, mixed."""
    jobs: list[Job] = []
    taken: Counter[str] = Counter()
    for drawing in shuffled(openmoji.catalogue(), by="image"):
        if taken[drawing.base] < 2 and len(jobs) < DRAWINGS:
            taken[drawing.base] += 1
            piece = f"openmoji/{drawing.base}"
            jobs.append(Job(SOURCE, drawing.code, piece, is_heldout(piece), ("drawing", drawing, 0)))
    hidden = shuffled(PHOTOS, by="photo-split")[0]
    for name in PHOTOS:
        for crop in range(CROPS):
            jobs.append(Job(SOURCE, f"{name} {crop}", f"photo/{name}", name == hidden, ("photo", name, crop)))
    return trim(shuffled(jobs, by="image-order"), limit)


def render(job: Job) -> list[Record]:
    """The record of one drawing or one crop."""
    kind, what, crop = job.args
    if kind == "drawing":
        pixels = on_white(svg_to_rgba(what.path.read_text(encoding="utf-8"), width=SIZE))
        key, caption, licence = f"openmoji-{what.code}", f"an emoji: {what.caption}", openmoji.LICENCE
        about: dict[str, Any] = {"source": version(openmoji.DISTRIBUTION), "file": f"svg/{what.code}.svg"}
    else:
        pixels, box = _crop(what, crop)
        subject, licence = PHOTOS[what]
        key, caption = f"photo-{what.split('.')[0]}-{crop:02d}", f"a photograph: {subject}"
        about = {"source": version(PHOTO_DISTRIBUTION), "file": f"skimage/data/{what}", "crop": box}
    about |= {"piece": job.piece, "licence": licence, "caption": caption}
    members = {"png": png_bytes(pixels), "txt": (caption + "\n").encode(), "json": json_bytes(about)}
    return [Record(SOURCE, key, job.heldout, members)]


def _crop(name: str, number: int) -> tuple[np.ndarray, dict[str, int]]:
    """Crop `number` of a photo: the photo is scaled to a short side of 80, 112 or 160, then cut.

    Returns uint8 [64, 64, 3] and {short_side, left, top} of the cut in the scaled photo.
    """
    photo = _photo(name)
    short = (80, 112, 160)[number % 3]
    scale = short / min(photo.size)
    width, height = (max(SIZE, round(side * scale)) for side in photo.size)
    small = photo.resize((width, height), Image.Resampling.LANCZOS)
    left = rank(f"{name}/{number}/left") % (width - SIZE + 1)
    top = rank(f"{name}/{number}/top") % (height - SIZE + 1)
    pixels = np.asarray(small.crop((left, top, left + SIZE, top + SIZE)))
    return pixels, {"short_side": short, "left": left, "top": top}


@lru_cache(maxsize=len(PHOTOS))
def _photo(name: str) -> Image.Image:
    """The whole photo as RGB, short side reduced to 320 once: every crop starts from there."""
    with Image.open(package_folder("skimage", PHOTO_DISTRIBUTION) / "data" / name) as stored:
        image = stored.convert("RGB")
    scale = 320 / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
