"""How far a predicted stack of layers is from the true one when both are looked at: over nine backgrounds, and against
the picture that was taken apart.

A stack is a list of layers, bottom first, each uint8 [H, W, 4] with straight alpha; one RGBA picture is a stack of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.pretrain.rgba_metrics import F64, U8, slide
from ringweave.tokenizers.errors import DataError

#: The backgrounds of AlphaVAE. A channel of any of them is one of three levels.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (128, 128, 128), "black": (0, 0, 0), "white": (255, 255, 255),
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
    "yellow": (255, 255, 0), "cyan": (0, 255, 255), "magenta": (255, 0, 255),
}  # fmt: skip
_LEVELS = (0, 128, 255)
#: dB. What equal pictures get instead of infinity, so that means and JSON stay numbers; nothing gets more.
PSNR_CAP = 100.0
WINDOW, SIGMA = 11, 1.5  # of SSIM, in pixels
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_AT_ONCE = 1 << 16  # pixels of a strip: SSIM needs ten times their size, and they stay in the cache


def check_layers(layers: Sequence[NDArray[Any]], *, where: str = "") -> tuple[int, int]:
    """(H, W) of a stack; DataError when it is empty, when a layer is not uint8 [H, W, 4] or has another size."""
    if not layers:
        raise DataError("a stack has at least one layer", where=where)
    size = layers[0].shape[:2]
    for number, layer in enumerate(layers):
        if layer.dtype != np.uint8 or layer.ndim != 3 or layer.shape[2] != 4 or not layer.size:
            why = f"layer {number} is {layer.dtype} {list(layer.shape)}"
            raise DataError("a layer is uint8 [H, W, 4]", where=where, why=why)
        if layer.shape[:2] != size:
            why = f"layer {number} is {list(layer.shape[:2])}, layer 0 {list(size)}"
            raise DataError("the layers of a stack have one size", where=where, why=why)
    return size


def _check_both(predicted: Sequence[U8], true: Sequence[U8], where: str) -> None:
    a, b = check_layers(predicted, where=where), check_layers(true, where=where)
    if a != b:
        raise DataError("the two stacks differ in size", where=where, why=f"predicted {a}, true {b}")


def flatten(layers: Sequence[U8]) -> tuple[F64, F64]:
    """(colour [H, W, 3] of 0 to 255 over black, share [H, W] of 0 to 1 of what lies below that shines through).

    C_i = a_i RGB_i + (1 - a_i) C_{i-1}, nothing rounded. Over a background B the stack is colour + share B.
    """
    height, width = layers[0].shape[:2]
    colour, through = np.zeros((height, width, 3)), np.ones((height, width))
    for layer in layers:
        alpha = layer[..., 3] / 255.0
        colour = layer[..., :3] * alpha[..., None] + colour * (1 - alpha)[..., None]
        through *= 1 - alpha
    return colour, through


def psnr_of(error: float) -> float:
    """dB of a mean squared error over 8-bit values, at most PSNR_CAP."""
    return PSNR_CAP if error <= 0 else min(PSNR_CAP, 10 * math.log10(255.0**2 / error))


def ssim(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Mean structural similarity of one 8-bit channel [H, W] of two pictures (Wang et al. 2004).

    Gaussian window of 11x11 pixels and sigma 1.5, biased variances, only windows that lie inside the picture. Along a
    side shorter than 11 pixels the window is the longest odd length that fits: one pixel is compared by its mean alone.
    """
    down, across = _window(a.shape[0]), _window(a.shape[1])
    rows = a.shape[0] - len(down) + 1
    strip = max(1, _AT_ONCE // a.shape[1])
    total = 0.0
    for start in range(0, rows, strip):
        piece = slice(start, min(rows, start + strip) + len(down) - 1)
        total += _ssim_sum(a[piece].astype(np.float64), b[piece].astype(np.float64), down, across)
    return total / (rows * (a.shape[1] - len(across) + 1))


def _window(side: int) -> F64:
    radius = (min(side, WINDOW) - 1) // 2
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * SIGMA**2))
    return weights / weights.sum()


def _ssim_sum(a: F64, b: F64, down: F64, across: F64) -> float:
    """Sum over all windows."""

    def blur(values: F64) -> F64:
        return slide(slide(values, across, axis=1), down, axis=0)

    mean_a, mean_b = blur(a), blur(b)
    product, squares = mean_a * mean_b, mean_a * mean_a + mean_b * mean_b
    covariance = blur(a * b) - product
    variances = blur(a * a + b * b) - squares  # of both together
    likeness = (2 * product + _C1) * (2 * covariance + _C2)
    return float((likeness / ((squares + _C1) * (variances + _C2))).sum())


def reconstruction(predicted: Sequence[U8], true: Sequence[U8], *, where: str = "") -> dict[str, Any]:
    """{"psnr", "ssim", "backgrounds": {name: {"psnr", "ssim"}}}: means over the nine backgrounds, and each of them.

    Both stacks are laid over the background, rounded to 8 bits once, and compared: PSNR over all pixels and channels,
    at most PSNR_CAP; SSIM as the mean of the channels'. Raises DataError for stacks that differ in size.
    """
    _check_both(predicted, true, where)
    (colour_a, through_a), (colour_b, through_b) = flatten(predicted), flatten(true)
    error: dict[tuple[int, int], float] = {}
    alike: dict[tuple[int, int], float] = {}
    for channel in range(3):
        for level in _LEVELS:
            a = np.rint(colour_a[..., channel] + level * through_a)
            b = np.rint(colour_b[..., channel] + level * through_b)
            error[channel, level] = float(((a - b) ** 2).mean())
            alike[channel, level] = ssim(a, b)
    figures = {
        name: {
            "psnr": psnr_of(sum(error[place] for place in enumerate(levels)) / 3),
            "ssim": sum(alike[place] for place in enumerate(levels)) / 3,
        }
        for name, levels in BACKGROUNDS.items()
    }
    means = {key: sum(f[key] for f in figures.values()) / len(figures) for key in ("psnr", "ssim")}
    return {**means, "backgrounds": figures}


def composite_consistency(
    layers: Sequence[U8], picture: NDArray[Any], *, where: str = ""
) -> dict[str, float | int]:
    """{"l1", "psnr", "alpha_l1", "pixels"}: whether a stack gives back the picture that was taken apart.

    picture: uint8 [H, W, 3], or [H, W, 4] with straight alpha. Both are laid over black and rounded to 8 bits. l1
    (0 to 1) and psnr are over the `pixels` where the picture or the stack has alpha above 0, so neither holes nor what
    spills over goes unseen; alpha_l1 (0 to 1) is over all pixels. Raises DataError for another size or kind of picture.
    """
    size = check_layers(layers, where=where)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (3, 4):
        why = f"{picture.dtype} {list(picture.shape)}"
        raise DataError("the composite is a uint8 picture [H, W, 3 or 4]", where=where, why=why)
    if picture.shape[:2] != size:
        why = f"composite {list(picture.shape[:2])}, layers {list(size)}"
        raise DataError("the composite has another size than the layers", where=where, why=why)
    colour, through = flatten(layers)
    wanted = picture[..., 3] / 255.0 if picture.shape[2] == 4 else np.ones(size)
    seen = (wanted > 0) | (through < 1)
    given = np.rint(picture[..., :3] * wanted[..., None])
    apart = (np.rint(colour) - given)[seen]
    pixels = int(seen.sum())
    return {
        "l1": float(np.abs(apart).mean() / 255) if pixels else 0.0,
        "psnr": psnr_of(float((apart**2).mean()) if pixels else 0.0),
        "alpha_l1": float(np.abs(1 - through - wanted).mean()),
        "pixels": pixels,
    }
