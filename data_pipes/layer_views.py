"""Views of a record's RGBA layers: composites, mattes, masks and trimaps, as a diffusion transformer is given them.

Layers are straight alpha, uint8 [H, W, 4], bottom first. "Over" is Porter and Duff's (1984): with coverage a = A / 255,

    premultiplied:  out = a * colour + (1 - a) * below,    a_out = a + (1 - a) * a_below,

layer after layer in float64; colour is divided by coverage and both are rounded (half to even) once, at the end. Only
single additions and multiplications of IEEE doubles are used, so every machine makes the same pixels. Where nothing
lies, all four channels are 0.

| view       | pictures                                                                              | needs      |
|------------|---------------------------------------------------------------------------------------|------------|
| layers     | each layer, bottom first                                                              | a layer    |
| layerN     | that layer                                                                            | it         |
| composite  | all layers over each other                                                            | a layer    |
| background | the bottom layer                                                                      | a layer    |
| foreground | all layers above the bottom one over each other                                       | a foreground |
| alpha      | the foreground's alpha, as opaque grey                                                | a foreground |
| trimap     | 0, 128 (unknown) or 255 from the foreground's alpha, as opaque grey                   | a foreground |
| mask       | 255 where the foreground's alpha is 128 or more, else 0, as opaque grey               | one there  |
| top        | the uppermost layer                                                                   | two layers |
| top_mask   | as mask, of the uppermost layer                                                       | one there  |
| lower      | each layer below the uppermost one, bottom first                                      | two layers |
| removed    | those over each other: the composite without the uppermost layer                      | two layers |

A foreground is there if a layer lies above the bottom one and shows somewhere.

Trimap: unknown is every pixel within r rows and r columns of one with 0 < alpha < 255; the others are 0 or 255 as
their alpha is. r is 1 to max(1, min(H, W) // 16), drawn by the sample's key. A matte without partial alpha has no
unknown pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.plan_items import LAYER_VIEWS, ONE_LAYER
from ringweave.tokenizers.errors import DataError

U8 = NDArray[np.uint8]
F64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
#: Largest difference between composite and stored picture that rounding explains, in 1/255.
TOLERANCE = 2
UNKNOWN = 128


def premultiplied(layers: Sequence[U8]) -> tuple[F64, F64]:
    """(colour times coverage [H, W, 3] in 0..255, coverage [H, W, 1] in 0..1) of the layers over each other."""
    colour = np.zeros((*layers[0].shape[:2], 3))
    cover = np.zeros((*layers[0].shape[:2], 1))
    for layer in layers:
        own = layer[..., 3:].astype(np.float64) / 255
        colour = layer[..., :3] * own + colour * (1 - own)
        cover = own + cover * (1 - own)
    return colour, cover


def over(layers: Sequence[U8]) -> U8:
    """The layers over each other, uint8 [H, W, 4] straight alpha; transparent where nothing lies."""
    colour, cover = premultiplied(layers)
    straight = np.divide(colour, cover, out=np.zeros_like(colour), where=cover > 0)
    whole = np.rint(np.concatenate([straight, cover * 255], axis=-1))
    return np.clip(whole, 0, 255).astype(np.uint8)


def composite_error(layers: Sequence[U8], flat: U8) -> int:
    """Largest difference, in 1/255, between the layers and `flat` [H, W, 4], rounded, over black and over white."""
    worst = 0.0
    (ours, cover), (theirs, flat_cover) = premultiplied(layers), premultiplied([flat])
    for page in (0.0, 255.0):
        mine, wanted = ours + page * (1 - cover), theirs + page * (1 - flat_cover)
        worst = max(worst, float(np.abs(np.rint(mine) - np.rint(wanted)).max()))
    return int(worst)


def grey(values: NDArray[np.integer]) -> U8:
    """[H, W] in 0..255 as an opaque grey picture [H, W, 4]."""
    picture = np.full((*values.shape, 4), 255, np.uint8)
    picture[..., :3] = values[..., None]
    return picture


def mask_of(alpha: U8) -> U8:
    """uint8 [H, W]: 255 where alpha is 128 or more, else 0."""
    return np.where(alpha >= 128, 255, 0).astype(np.uint8)


def trimap_of(alpha: U8, radius: int) -> U8:
    """uint8 [H, W]: 128 within `radius` rows and columns of partial alpha, else alpha (0 or 255)."""
    unknown = _dilated((alpha > 0) & (alpha < 255), radius)
    return np.where(unknown, UNKNOWN, alpha).astype(np.uint8)


def trimap_radius(key: str, height: int, width: int) -> int:
    """1 to max(1, shorter side // 16), by the key alone."""
    digest = blake2b(b"trimap/" + key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "big") % max(1, min(height, width) // 16)


def _dilated(mask: Bool, radius: int) -> Bool:
    """True within `radius` rows and columns of a True: sums over windows, along one axis after the other."""
    for _ in range(2):
        counts = np.pad(np.cumsum(mask, axis=0), [(radius + 1, radius), (0, 0)], mode="edge")
        counts[: radius + 1] = 0
        mask = (counts[2 * radius + 1 :] > counts[: len(mask)]).T
    return mask


# ---- views by name ----


def pictures_of(layers: Sequence[U8], view: str, *, key: str) -> list[tuple[str, U8]]:
    """[(name in messages, uint8 [H, W, 4])] of a view of one sample's layers, all of one size.

    key: the sample's. DataError, without saying where, if the layers do not have what the view needs.
    """
    if (one := ONE_LAYER.fullmatch(view)) is not None:
        number = int(one[1])
        if number >= len(layers):
            raise DataError(f"there is no layer {number}", why=f"the record has {_count(layers)}")
        return [(f"layer{number}.png", layers[number])]
    return _VIEWS[view](layers, key)


def _count(layers: Sequence[U8]) -> str:
    return f"{len(layers)} layer{'s'[: len(layers) != 1]}"


def _named(layers: Sequence[U8]) -> list[tuple[str, U8]]:
    return [(f"layer{number}.png", layer) for number, layer in enumerate(layers)]


def _several(layers: Sequence[U8], what: str) -> None:
    if len(layers) < 2:
        raise DataError(
            f"a record of {_count(layers)} has no {what}",
            fix="give it layers above the bottom one, or another task",
        )


def _foreground(layers: Sequence[U8]) -> U8:
    _several(layers, "foreground")
    picture = over(layers[1:])
    if not picture[..., 3].any():
        raise DataError(
            "the foreground is empty",
            why=f"alpha is 0 everywhere in all of the {_count(layers[1:])} above the bottom one",
            fix="leave the record out, or give it another task: there is nothing to cut out",
        )
    return picture


def _mask(alpha: U8, what: str) -> U8:
    mask = mask_of(alpha)
    if not mask.any():
        raise DataError(
            f"the mask of the {what} is empty",
            why=f"its alpha is at most {int(alpha.max())}, the mask shows where it is 128 or more",
            fix="leave the record out, or give it a task without a mask",
        )
    return grey(mask)


def _trimap(layers: Sequence[U8], key: str) -> U8:
    alpha = _foreground(layers)[..., 3]
    return grey(trimap_of(alpha, trimap_radius(key, *alpha.shape)))


def _top(layers: Sequence[U8]) -> U8:
    _several(layers, "layer on top of others")
    return layers[-1]


def _lower(layers: Sequence[U8]) -> Sequence[U8]:
    _several(layers, "lower layers")
    return layers[:-1]


_VIEWS: dict[str, Callable[[Sequence[U8], str], list[tuple[str, U8]]]] = {
    "layers": lambda layers, key: _named(layers),
    "composite": lambda layers, key: [("composite", over(layers))],
    "background": lambda layers, key: _named(layers[:1]),
    "foreground": lambda layers, key: [("foreground", _foreground(layers))],
    "alpha": lambda layers, key: [("alpha", grey(_foreground(layers)[..., 3]))],
    "trimap": lambda layers, key: [("trimap", _trimap(layers, key))],
    "mask": lambda layers, key: [("mask", _mask(_foreground(layers)[..., 3], "foreground"))],
    "top": lambda layers, key: [(f"layer{len(layers) - 1}.png", _top(layers))],
    "top_mask": lambda layers, key: [("top_mask", _mask(_top(layers)[..., 3], "top layer"))],
    "lower": lambda layers, key: _named(_lower(layers)),
    "removed": lambda layers, key: [("removed", over(_lower(layers)))],
}
assert tuple(_VIEWS) == LAYER_VIEWS
