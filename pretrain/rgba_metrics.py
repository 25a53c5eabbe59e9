"""How far a predicted alpha is from the true one: the four figures of the alpha matting benchmark, and what a
constant threshold would reach.

An alpha is uint8 [H, W] (0 to 255) or floating point in [0, 1]. Every figure is taken over a region that its result
names: "whole", all pixels, or "unknown", those where a trimap is 128. Figures of different regions say different
things and are never averaged together. `rgba_pictures.py` has the figures of colours, `rgba_matching.py` those of
stacks of layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import DataError

U8 = NDArray[np.uint8]
F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]
REGIONS = ("whole", "unknown")
UNKNOWN = 128  # of a trimap: the pixels whose alpha has to be found
SIGMA = 1.4  # of the Gaussian whose derivative gives gradients
RADIUS = 4  # pixels: where the benchmark cuts that Gaussian, ceil(SIGMA sqrt(-2 ln(0.01 SIGMA sqrt(2 pi))))
STEPS = 10  # thresholds of connectivity: 0.1, 0.2 ... 1
THETA = 0.15  # alpha that may be left over before it counts as not connected


def as_unit(alpha: NDArray[Any], *, where: str = "") -> F64:
    """float64 [H, W] in [0, 1] of an alpha; DataError for another shape, no pixels, NaN or values out of range."""
    alpha = np.asarray(alpha)
    if alpha.ndim != 2 or not alpha.size:
        raise DataError("an alpha is [H, W] with at least one pixel", where=where, why=f"{alpha.shape}")
    if alpha.dtype == np.uint8:
        return alpha / 255.0
    if not np.issubdtype(alpha.dtype, np.floating):
        raise DataError("an alpha is uint8 or floating point", where=where, why=f"it is {alpha.dtype}")
    unit = alpha.astype(np.float64)
    if not ((unit >= 0) & (unit <= 1)).all():  # NaN fails too
        raise DataError(
            "an alpha in floating point is within 0 and 1", where=where, why="it has other values"
        )
    return unit


def region_mask(
    shape: tuple[int, ...], *, region: str, trimap: NDArray[Any] | None = None, where: str = ""
) -> Mask:
    """bool [H, W] of the pixels of a region. trimap: [H, W], needed for "unknown" and ignored for "whole".

    Raises DataError without a trimap, for one of another size, and for one without an unknown pixel: an error over
    no pixels is not 0.
    """
    if region == "whole":
        return np.ones(shape, np.bool_)
    if region != "unknown":
        raise DataError(f"unknown region {region!r}", where=where, fix=f"name one of {', '.join(REGIONS)}")
    fix = "measure the whole picture, or give the trimap of this picture"
    if trimap is None:
        raise DataError("the unknown region needs a trimap", where=where, fix=fix)
    if trimap.shape != shape:
        why = f"trimap {list(trimap.shape)}, alpha {list(shape)}"
        raise DataError("the trimap has another size than the alpha", where=where, why=why, fix=fix)
    mask = trimap == UNKNOWN
    if not mask.any():
        why = f"no pixel is {UNKNOWN}"
        raise DataError("the trimap has no unknown pixel", where=where, why=why, fix=fix)
    return mask


def sad(predicted: F64, true: F64, mask: Mask) -> float:
    """Sum of absolute differences of alpha in [0, 1] over the mask, in thousands."""
    return float(np.abs(predicted - true)[mask].sum() / 1000)


def mse(predicted: F64, true: F64, mask: Mask) -> float:
    """Mean squared difference of alpha in [0, 1] over the mask."""
    return float(((predicted - true)[mask] ** 2).mean())


def gradient_error(predicted: F64, true: F64, mask: Mask) -> float:
    """Sum of squared differences of the lengths of the alphas' gradients over the mask, in thousands.

    Rhemann et al., "A perceptually motivated online benchmark for image matting" (2009), with the filter of its code;
    alphas are not stretched to 0 to 1 first, as some do, because that hides a wrong scale.
    """
    return float(((gradient_length(predicted) - gradient_length(true))[mask] ** 2).sum() / 1000)


def gradient_length(alpha: F64) -> F64:
    """[H, W]: length of the Gaussian derivative of sigma 1.4 pixels, over 9x9 pixels with repeated edges.

    Each 9x9 filter has a sum of squares of 1, the benchmark's scale: a straight edge from 0 to 1 gives 2.66, not 0.27.
    """
    at = np.arange(-RADIUS, RADIUS + 1.0)
    smooth: F64 = np.exp(-(at**2) / (2 * SIGMA**2))
    slope: F64 = at * smooth
    smooth, slope = smooth / math.sqrt((smooth**2).sum()), slope / math.sqrt((slope**2).sum())
    padded = np.pad(alpha, RADIUS, mode="edge")
    across = slide(slide(padded, smooth, axis=0), slope, axis=1)
    down = slide(slide(padded, smooth, axis=1), slope, axis=0)
    return np.hypot(across, down)


def slide(values: F64, weights: F64, *, axis: int) -> F64:
    """Weighted sums of a window along an axis of [H, W], where it fits whole: len(weights) - 1 fewer places."""
    size = values.shape[axis] - len(weights) + 1
    out = np.zeros([size if dim == axis else n for dim, n in enumerate(values.shape)])
    for start, weight in enumerate(weights):
        piece = slice(start, start + size)
        out += weight * (values[piece] if axis == 0 else values[:, piece])
    return out


def connectivity_error(predicted: F64, true: F64, mask: Mask) -> float:
    """Sum of differences of how connected pixels are, over the mask, in thousands (Rhemann et al. 2009).

    At each threshold 0.1, 0.2 ... 1 both alphas together have one source region: the largest 4-connected part, in the
    whole picture, of the pixels where both reach it. A pixel's level is the last threshold before it falls out of that
    region. Alpha beyond the level counts against the pixel once it is 0.15 or more.
    """
    level = np.ones(predicted.shape)
    inside = np.ones(predicted.shape, np.bool_)
    for step in range(1, STEPS + 1):
        reached = (predicted >= step / STEPS) & (true >= step / STEPS)
        left = inside & ~largest_part(reached)
        level[left] = (step - 1) / STEPS
        inside &= ~left
    return float(np.abs(_connected(predicted - level) - _connected(true - level))[mask].sum() / 1000)


def _connected(beyond: F64) -> F64:
    return 1 - np.where(beyond >= THETA, beyond, 0)


def largest_part(mask: Mask) -> Mask:
    """The largest 4-connected part of bool [H, W], the first in reading order among equals; nothing of nothing.

    Works on the runs of each row: a run takes the lowest label of those it touches until none falls any more.
    """
    height, width = mask.shape
    stride = width + 1  # an empty column ends the last run of each row
    flat = np.zeros(height * stride + 1, np.int8)
    flat[1:].reshape(height, stride)[:, :width] = mask
    turns = np.flatnonzero(np.diff(flat))
    starts, stops = turns[::2], turns[1::2]
    if not len(starts):
        return np.zeros(mask.shape, np.bool_)
    first = np.searchsorted(stops, starts + stride, side="right")
    touched = np.searchsorted(starts, stops + stride, side="left") - first
    upper = np.repeat(np.arange(len(starts)), touched)
    lower = np.arange(len(upper)) + np.repeat(first - (np.cumsum(touched) - touched), touched)
    label = np.arange(len(starts))
    while True:
        a, b = label[upper], label[lower]
        fallen = label.copy()
        np.minimum.at(fallen, np.maximum(a, b), np.minimum(a, b))
        while (fallen[fallen] != fallen).any():
            fallen = fallen[fallen]
        if (fallen == label).all():
            break
        label = fallen
    kept = label == np.bincount(label, weights=stops - starts).argmax()
    marks = np.zeros(height * stride, np.int8)
    marks[starts[kept]] = 1
    marks[stops[kept]] = -1
    return np.cumsum(marks, dtype=np.int8).reshape(height, stride)[:, :width] > 0


def matting(
    predicted: NDArray[Any],
    true: NDArray[Any],
    *,
    region: str = "whole",
    trimap: NDArray[Any] | None = None,
    where: str = "",
) -> dict[str, Any]:
    """{"region", "pixels", "sad", "mse", "grad", "conn"} of one picture; see the functions of these figures.

    Raises DataError for alphas of unequal size, what is no alpha (`as_unit`), and a missing region (`region_mask`).
    """
    a, b = as_unit(predicted, where=where), as_unit(true, where=where)
    if a.shape != b.shape:
        why = f"predicted {list(a.shape)}, true {list(b.shape)}"
        raise DataError("the two alphas have different sizes", where=where, why=why)
    mask = region_mask(a.shape, region=region, trimap=trimap, where=where)
    return {
        "region": region,
        "pixels": int(mask.sum()),
        "sad": sad(a, b, mask),
        "mse": mse(a, b, mask),
        "grad": gradient_error(a, b, mask),
        "conn": connectivity_error(a, b, mask),
    }


class Baseline(NamedTuple):
    """sad: mean over the pictures; threshold: 0 to 256; polarity: which side of it gets alpha 1, "bright" (luminance
    at or above it) or "dark" (below it)."""

    sad: float
    threshold: int
    polarity: str


def luminance(picture: U8) -> U8:
    """uint8 [H, W] of uint8 [H, W, 3]: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), rounded."""
    rgb = picture.astype(np.int32)
    return ((299 * rgb[..., 0] + 587 * rgb[..., 1] + 114 * rgb[..., 2] + 500) // 1000).astype(np.uint8)


def threshold_baseline(pictures: Iterable[U8], alphas: Iterable[NDArray[Any]]) -> Baseline:
    """The least mean SAD over whole pictures that one threshold on luminance reaches, the same for all pictures.

    pictures: uint8 [N, H, W, 3] or a list of [H, W, 3]; alphas: one each, see `as_unit`. All 257 thresholds of both
    polarities are tried, those that give nothing or everything alpha 1 among them; the first of equals is taken.
    Raises DataError for no pictures, unequal counts or sizes.
    """
    clear, solid, count = np.zeros(256), np.zeros(256), 0  # sums of 1 - alpha and of alpha, by luminance
    pictures, alphas = list(pictures), list(alphas)
    if not pictures or len(pictures) != len(alphas):
        raise DataError("the baseline needs one alpha a picture", why=f"{len(pictures)} and {len(alphas)}")
    for picture, alpha in zip(pictures, alphas):
        unit = as_unit(alpha)
        if picture.shape != (*unit.shape, 3) or picture.dtype != np.uint8:
            why = f"{picture.dtype} {list(picture.shape)}, alpha {list(unit.shape)}"
            raise DataError("the baseline needs uint8 pictures [H, W, 3] and alphas of their size", why=why)
        grey = luminance(picture).ravel()
        solid += np.bincount(grey, weights=unit.ravel(), minlength=256)
        clear += np.bincount(grey, weights=1 - unit.ravel(), minlength=256)
        count += 1
    # Thresholds t = 0 ... 256: alpha 1 from luminance t on costs the alpha below t and what is clear from t on.
    below = np.stack([np.concatenate([[0.0], np.cumsum(part)]) for part in (solid, clear)])
    from_on = below[:, -1:] - below
    errors = np.stack([below[0] + from_on[1], below[1] + from_on[0]])
    polarity, threshold = divmod(int(errors.argmin()), errors.shape[1])
    least = float(errors[polarity, threshold]) / count / 1000
    return Baseline(least, threshold, ("bright", "dark")[polarity])
