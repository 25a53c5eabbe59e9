"""Resizing of RGBA layers without fringes.

Averaging straight colour mixes in what lies under alpha 0, often another colour than the sprite's: it shows as a
fringe along the edge. So colour is premultiplied, everything is resized in floats, and colour is divided by alpha
again. Pixels that end with alpha 0 get the colour of those around, so that a viewer that interpolates straight colour
sees no fringe either.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ringweave.tokenizers.errors import DataError

U8 = NDArray[np.uint8]
FILTERS = {
    name.lower(): getattr(Image.Resampling, name) for name in ("BOX", "BILINEAR", "BICUBIC", "LANCZOS")
}


def resize_rgba(layer: U8, width: int, height: int, *, how: str = "lanczos") -> U8:
    """Straight-alpha uint8 [H, W, 4] -> [height, width, 4]. DataError for another array, size or `how`."""
    if layer.dtype != np.uint8 or layer.ndim != 3 or layer.shape[2] != 4 or 0 in layer.shape:
        raise DataError(f"a layer must be uint8 [H, W, 4], got {layer.dtype} {list(layer.shape)}")
    if width < 1 or height < 1:
        raise DataError(f"a layer cannot be resized to {width} x {height}", fix="give at least 1 x 1")
    if how not in FILTERS:
        raise DataError(f"there is no filter {how!r}", fix=f"use one of {', '.join(FILTERS)}")
    planes = layer.astype(np.float32)
    planes[..., :3] *= planes[..., 3:] / 255
    small = np.stack([_plane(planes[..., k], width, height, how) for k in range(4)], axis=-1)
    alpha = np.clip(small[..., 3:], 0, 255)
    # Lanczos swings beyond: no colour may be brighter than its alpha allows.
    light = np.clip(small[..., :3], 0, alpha)
    out = np.empty((height, width, 4), np.uint8)
    out[..., 3:] = np.rint(alpha)
    out[..., :3] = np.rint(light * 255 / np.maximum(alpha, 1e-6))
    return bleed(out)


def bleed(layer: U8) -> U8:
    """`layer` [H, W, 4] with what lies under alpha 0 replaced by the mean colour of the nearest block that shows."""
    shown = layer[..., 3:] > 0
    if not shown.any():
        return np.zeros_like(layer)
    # Sums of colour and counts over blocks twice as large each time, then back down into what is still empty.
    sums = np.where(shown, layer[..., :3], 0).astype(np.int64)
    pyramid = [(sums, shown.astype(np.int64))]
    while not (pyramid[-1][1] > 0).all():
        pyramid.append((_halved(pyramid[-1][0]), _halved(pyramid[-1][1])))
    sums, counts = pyramid.pop()
    colour = sums // counts
    for sums, counts in reversed(pyramid):
        above = colour.repeat(2, axis=0).repeat(2, axis=1)[: sums.shape[0], : sums.shape[1]]
        colour = np.where(counts > 0, sums // np.maximum(counts, 1), above)
    return np.concatenate([colour.astype(np.uint8), layer[..., 3:]], axis=-1)


def _plane(values: NDArray[np.float32], width: int, height: int, how: str) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(values).resize((width, height), FILTERS[how]), np.float32)


def _halved(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums over blocks of 2 x 2; an odd edge has blocks of its own."""
    height, width = values.shape[:2]
    even = np.pad(values, [(0, height % 2), (0, width % 2), (0, 0)])
    return even[0::2, 0::2] + even[1::2, 0::2] + even[0::2, 1::2] + even[1::2, 1::2]
