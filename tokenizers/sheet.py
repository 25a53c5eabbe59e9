"""Contact sheets: labelled rows of pictures on white, drawn with Pillow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP, LABEL = 32, 10, 68  # pixels: around the sheet, between tiles, width of the row labels
INK, SOFT, LINE = (28, 30, 36), (108, 114, 126), (226, 229, 234)
#: Dark to light, for spectrograms (anchors of matplotlib's magma, CC0).
_MAGMA = np.array(
    [[0, 0, 4], [40, 17, 89], [114, 31, 129], [183, 55, 121], [241, 96, 93], [254, 176, 120], [252, 253, 191]]
)


@dataclass(frozen=True)
class Group:
    """Rows that belong together, under one caption: [(label, tiles uint8 [H, W, 3] or [H, W])]."""

    caption: str
    rows: list[tuple[str, list[NDArray[np.uint8]]]]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _group_size(group: Group, zoom: int) -> tuple[int, int]:
    widths = [sum(tile.shape[1] * zoom for tile in row) + GAP * (len(row) - 1) for _, row in group.rows]
    heights = [max(tile.shape[0] for tile in row) * zoom for _, row in group.rows]
    return LABEL + max(widths), 26 + sum(heights) + GAP * (len(heights) - 1)


def draw_sheet(
    path: Path, title: str, note: str, groups: list[Group], *, zoom: int = 1, columns: int = 1
) -> Path:
    """Write the groups, `columns` beside each other, to the PNG `path`; pixels are enlarged by `zoom`."""
    sizes = [_group_size(group, zoom) for group in groups]
    lines = [list(range(i, min(i + columns, len(groups)))) for i in range(0, len(groups), columns)]
    widest = max(width for width, _ in sizes)
    step = widest + 3 * GAP
    tops, top = [], MARGIN + 66
    for line in lines:
        tops.append(top)
        top += max(sizes[i][1] for i in line) + 3 * GAP
    across = max(len(line) for line in lines)
    width = max(2 * MARGIN + across * step - 3 * GAP, 2 * MARGIN + 560)
    canvas = Image.new("RGB", (width, top - 3 * GAP + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 6), title, INK, font=_font(22))
    draw.text((MARGIN, MARGIN + 24), note, SOFT, font=_font(13))
    draw.line((MARGIN, MARGIN + 50, width - MARGIN, MARGIN + 50), LINE)
    for line, y in zip(lines, tops):
        for place, i in enumerate(line):
            _draw_group(canvas, draw, groups[i], MARGIN + place * step, y, zoom)
    canvas.save(path, optimize=True)
    return path


def _draw_group(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, group: Group, left: int, top: int, zoom: int
) -> None:
    draw.text((left, top), group.caption, INK, font=_font(13))
    y = top + 26
    for label, tiles in group.rows:
        height = max(tile.shape[0] for tile in tiles) * zoom
        draw.text((left, y + height // 2 - 8), label, SOFT, font=_font(12))
        x = left + LABEL
        for tile in tiles:
            picture = Image.fromarray(tile).convert("RGB")
            if zoom > 1:
                size = (picture.width * zoom, picture.height * zoom)
                picture = picture.resize(size, Image.Resampling.NEAREST)
            canvas.paste(picture, (x, y))
            draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=LINE)
            x += picture.width + GAP
        y += height + GAP


def spectrogram(samples: NDArray[np.int16], *, height: int = 128, width: int = 440) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]: 0 to rate/4 upwards, 80 dB below full scale to full scale, dark to light."""
    size, hop = 1024, 128
    padded = np.pad(samples.astype(np.float64) / 32768, (size // 2, size))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1))[:, : size // 4] / (size / 4)
    level = np.clip((20 * np.log10(power + 1e-9) + 80) / 70, 0, 1)[:, ::-1].T
    place = level * (len(_MAGMA) - 1)
    low = np.minimum(place.astype(int), len(_MAGMA) - 2)
    colour = _MAGMA[low] + (_MAGMA[low + 1] - _MAGMA[low]) * (place - low)[..., None]
    picture = Image.fromarray(colour.astype(np.uint8))
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX))
