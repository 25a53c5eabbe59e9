"""The contact sheet as one PNG, drawn with the same tool as the tokenizers' sheets."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ringweave.launch.data_sheet import U8, Card, envelope, shrink
from ringweave.tokenizers.errors import printable
from ringweave.tokenizers.members import as_rgb
from ringweave.tokenizers.sheet import Group, draw_sheet

_SIDE, _COLUMNS = 160, 3


def draw(out: Path, title: str, cards: dict[str, list[Card]], totals: dict[str, int]) -> Path:
    """Writes the sheet: for each source its samples, three beside each other."""
    groups = [
        Group(f"{source} · {printable(card.key)}"[:46], [("", _tiles(card))])
        for source, row in cards.items()
        for card in row
    ]
    note = ", ".join(f"{source} {len(row)} of {totals[source]:,}" for source, row in cards.items())
    if not groups:
        groups = [Group("no samples", [("", [_words("no samples")])])]
    return draw_sheet(out, printable(title), note, groups, columns=_COLUMNS)


def _tiles(card: Card) -> list[U8]:
    tiles = [as_rgb(shrink(picture, _SIDE)) for _, picture in card.pictures[:3]]
    tiles += [shrink(frame, _SIDE // 2) for frame in card.strip[:4]]
    tiles += [_wave(samples) for _, samples, _ in card.sounds[:1]]
    words = "\n".join([*card.problems, *(value for _, value in card.texts)])
    if words or not tiles:
        tiles.append(_words(words or "nothing to show"))
    return tiles


def _words(words: str) -> U8:
    """Text on a tile of 200 x 120."""
    lines = textwrap.wrap(printable(words), 32)[:8]
    image = Image.new("RGB", (200, 120), "white")
    ImageDraw.Draw(image).multiline_text(
        (6, 4), "\n".join(lines), (60, 64, 72), font=ImageFont.load_default(11), spacing=2
    )
    return np.asarray(image)


def _wave(samples: np.ndarray) -> U8:
    picture = np.full((80, 240, 3), 255, np.uint8)
    for x, (low, high) in enumerate(envelope(samples, 240)):
        picture[int(39 - 38 * high) : int(40 - 38 * low) + 1, x] = (189, 130, 0)
    return picture
