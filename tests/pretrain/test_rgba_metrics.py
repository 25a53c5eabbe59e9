"""Figures of alpha against values by hand, SciPy and slow plain code."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ringweave.pretrain.rgba_metrics import (
    as_unit,
    connectivity_error,
    gradient_error,
    gradient_length,
    largest_part,
    luminance,
    matting,
    mse,
    region_mask,
    sad,
    threshold_baseline,
)
from ringweave.tokenizers.errors import DataError

ALPHAS = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=12))


def row(*values: float) -> np.ndarray:
    return np.array([values], np.float64)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


# --- alpha -------------------------------------------------------------------------------------------------


def test_sad_and_mse_by_hand_and_by_region() -> None:
    predicted = np.array([[0, 255], [204, 0]], np.uint8)
    true = np.array([[0, 0], [255, 51]], np.uint8)
    whole = matting(predicted, true)
    assert (whole["region"], whole["pixels"]) == ("whole", 4)
    assert whole["sad"] == pytest.approx((1 + 0.2 + 0.2) / 1000)
    assert whole["mse"] == pytest.approx((1 + 0.04 + 0.04) / 4)
    trimap = np.array([[128, 0], [128, 255]], np.uint8)
    unknown = matting(predicted, true, region="unknown", trimap=trimap)
    assert (unknown["region"], unknown["pixels"]) == ("unknown", 2)
    assert unknown["sad"] == pytest.approx(0.2 / 1000)
    assert unknown["mse"] == pytest.approx(0.04 / 2)
    # A trimap changes nothing where the whole picture is asked for, and floating point says the same as 8 bits.
    assert matting(predicted / 255, (true / 255).astype(np.float32), trimap=trimap) == pytest.approx(whole)


def test_gradient_of_an_edge() -> None:
    """By hand: exp(-k²/3.92) and k exp(-k²/3.92) for |k| <= 4, each with a sum of squares of 1."""
    edge = np.repeat([[0.0] * 10 + [1.0] * 10], 15, axis=0)
    across = gradient_length(edge)
    assert across.max() == pytest.approx(2.662, abs=5e-4)
    assert np.allclose(across, across[:1]) and np.allclose(across, across[:, ::-1])
    assert not across[:, :6].any() and across[0, 6] > 0, "it reaches four pixels"
    assert np.allclose(gradient_length(edge.T), across.T)
    flat = np.zeros_like(edge)
    everywhere = np.ones(edge.shape, np.bool_)
    assert gradient_error(edge, flat, everywhere) == pytest.approx((across**2).sum() / 1000)
    assert gradient_error(edge, 1 - edge, everywhere) == pytest.approx(0, abs=1e-12)
    left = everywhere.copy()
    left[:, 10:] = False
    assert gradient_error(edge, flat, left) == pytest.approx((across**2).sum() / 2000)


def test_gradient_is_that_of_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    alpha = noise(1, 21, 17) / 255
    kernel = np.zeros((9, 9))
    for y, x in product(range(9), repeat=2):
        kernel[y, x] = -(x - 4) * math.exp(-((y - 4) ** 2 + (x - 4) ** 2) / (2 * 1.4**2))
    kernel /= math.sqrt((kernel**2).sum())
    across = ndimage.convolve(alpha, kernel, mode="nearest")
    down = ndimage.convolve(alpha, kernel.T, mode="nearest")
    assert np.allclose(gradient_length(alpha), np.sqrt(across**2 + down**2), atol=1e-12)
    # SciPy's own derivative of a Gaussian differs by one factor: its Gaussian has a sum of 1.
    at = np.arange(-4, 5)
    gauss = np.exp(-(at**2) / (2 * 1.4**2))
    factor = gauss.sum() ** 2 * 1.4**2 / math.sqrt((gauss**2).sum() * ((at * gauss) ** 2).sum())
    parts = [
        ndimage.gaussian_filter(alpha, 1.4, order=order, radius=4, mode="nearest")
        for order in ((0, 1), (1, 0))
    ]
    assert np.allclose(gradient_length(alpha), factor * np.hypot(*parts), atol=1e-12)


@pytest.mark.parametrize(
    ("predicted", "true", "wanted"),
    [
        (
            row(1, 1, 1, 0, 1, 1),
            row(1, 1, 1, 0, 0.5, 0.5),
            1.0,
        ),  # an island: level 0, so all its alpha counts
        (
            row(1, 1, 1, 0, 0, 0),
            row(1, 1, 1, 0, 0.1, 0.2),
            0.2,
        ),  # 0.1 beyond the level is forgiven, 0.2 is not
        (row(1, 1, 0.8), row(1, 1, 0.6), 0.2),  # connected up to 0.6
        (row(1, 1, 0.7), row(1, 1, 0.6), 0.0),
        (row(0, 0, 0), row(1, 1, 1), 3.0),  # no source region at all
        (row(1, 0, 1), row(1, 0, 1), 0.0),
    ],
)
def test_connectivity_by_hand(predicted: np.ndarray, true: np.ndarray, wanted: float) -> None:
    everywhere = np.ones(true.shape, np.bool_)
    assert connectivity_error(predicted, true, everywhere) == pytest.approx(wanted / 1000, abs=1e-12)
    assert connectivity_error(true, predicted, everywhere) == pytest.approx(wanted / 1000, abs=1e-12)
    assert connectivity_error(predicted.T, true.T, everywhere.T) == pytest.approx(wanted / 1000, abs=1e-12)
    eight = [np.rint(alpha * 255).astype(np.uint8) for alpha in (predicted, true)]
    assert matting(*eight)["conn"] == pytest.approx(wanted / 1000, abs=5e-6)


def test_connectivity_takes_its_region_from_the_whole_picture() -> None:
    """The mask chooses what is summed, not what is connected."""
    alpha, other = row(1, 1, 1, 0, 1, 1), row(1, 1, 1, 0, 0.5, 0.5)
    island = np.array([[False] * 4 + [True] * 2])
    assert connectivity_error(alpha, other, island) == pytest.approx(1 / 1000)
    assert connectivity_error(alpha, other, ~island) == 0


def parts_of(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """The 4-connected parts, by flooding, in reading order of their first pixels."""
    left = dict.fromkeys(map(tuple, np.argwhere(mask).tolist()))
    parts = []
    while left:
        todo = [next(iter(left))]
        part = set()
        while todo:
            y, x = todo.pop()
            if (y, x) in left:
                del left[y, x]
                part.add((y, x))
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        parts.append(part)
    return parts


@settings(max_examples=150, deadline=None)
@given(arrays.arrays(np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, max_side=14)))
def test_largest_part_is_that_of_flooding(mask: np.ndarray) -> None:
    found = largest_part(mask)
    parts = parts_of(mask)
    assert set(map(tuple, np.argwhere(found).tolist())) == (max(parts, key=len) if parts else set())


def test_largest_part_of_winding_shapes() -> None:
    """A spiral and a comb: labels have a long way to fall."""
    ndimage = pytest.importorskip("scipy.ndimage")
    comb = np.zeros((81, 81), np.bool_)
    comb[:, ::2] = True
    comb[-1] = True
    y, x = np.mgrid[-60:61, -60:61]
    spiral = (np.hypot(x, y) * 0.6 - np.arctan2(y, x)) % (2 * np.pi) < np.pi
    noisy = np.random.default_rng(3).random((300, 257)) < 0.58  # near where parts of all sizes meet
    for mask in (comb, comb[::-1], spiral, noisy, ~noisy):
        labels, _ = ndimage.label(mask)
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        assert (largest_part(mask) == (labels == sizes.argmax())).all()
    assert largest_part(comb).all() == comb.all()


def slow_connectivity(predicted: np.ndarray, true: np.ndarray) -> float:
    level = {}
    for step in range(1, 11):
        t = step / 10
        parts = parts_of((predicted >= t) & (true >= t))
        region = max(parts, key=len) if parts else set()
        for place in np.ndindex(true.shape):
            if place not in region:
                level.setdefault(place, (step - 1) / 10)
    total = 0.0
    for place in np.ndindex(true.shape):
        beyond = [alpha[place] - level.get(place, 1.0) for alpha in (predicted, true)]
        phi = [1 - d if d >= 0.15 else 1.0 for d in beyond]
        total += abs(phi[0] - phi[1])
    return total / 1000


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_figures_of_any_alphas(data: st.DataObject) -> None:
    true = data.draw(ALPHAS)
    predicted = data.draw(arrays.arrays(np.uint8, true.shape))
    there, back = matting(predicted, true), matting(true, predicted)
    assert there == pytest.approx(back), "no figure has a direction"
    assert all(math.isfinite(there[key]) and there[key] >= 0 for key in ("sad", "mse", "grad", "conn"))
    assert there["conn"] == pytest.approx(slow_connectivity(predicted / 255, true / 255), abs=1e-12)
    same = matting(true, true)
    assert [same[key] for key in ("sad", "mse", "grad", "conn")] == [0, 0, 0, 0]
    unknown = region_mask(true.shape, region="unknown", trimap=np.full(true.shape, 128))
    a, b = as_unit(predicted), as_unit(true)
    assert (sad(a, b, unknown), mse(a, b, unknown)) == (there["sad"], there["mse"])


def test_what_is_no_alpha_or_region_is_refused() -> None:
    alpha = np.zeros((2, 3), np.uint8)
    for wrong in (
        alpha[0], alpha[:0], alpha.astype(np.int64), np.full((2, 3), np.nan), np.full((2, 3), 1.01),
        np.full((2, 3), -0.01),
    ):  # fmt: skip
        with pytest.raises(DataError, match="alpha"):
            matting(wrong, alpha, where="here.png")
    with pytest.raises(DataError, match=r"different sizes[\s\S]*here.png[\s\S]*\[3, 2\][\s\S]*\[2, 3\]"):
        matting(alpha.T, alpha, where="here.png")
    for trimap, why in (
        (None, "needs a trimap"),
        (np.full((3, 2), 128), r"another size[\s\S]*\[3, 2\]"),
        (np.full((2, 3), 127), "no unknown pixel"),
    ):
        with pytest.raises(DataError, match=why) as caught:
            matting(alpha, alpha, region="unknown", trimap=trimap)
        assert caught.value.exit_code == 3
    with pytest.raises(DataError, match="unknown region 'hole'"):
        matting(alpha, alpha, region="hole")


# --- the constant threshold --------------------------------------------------------------------------------


def test_threshold_baseline_by_hand() -> None:
    grey = np.array([[0, 100, 200]], np.uint8)[..., None].repeat(3, axis=2)
    assert threshold_baseline([grey], [np.array([[0, 255, 255]], np.uint8)]) == (0.0, 1, "bright")
    assert threshold_baseline([grey], [np.array([[255, 255, 0]], np.uint8)]) == (0.0, 101, "dark")
    # Nothing separates these: half an alpha is lost on one pixel at best.
    found = threshold_baseline(grey[None], np.array([[[0.0, 0.5, 1.0]]]))
    assert found.sad == pytest.approx(0.5 / 1000) and (found.threshold, found.polarity) == (1, "bright")
    empty = threshold_baseline([grey], [np.zeros((1, 3), np.uint8)])
    assert empty == (0.0, 201, "bright"), "all clear is a threshold too"
    assert luminance(np.uint8([[[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]])).tolist() == [
        [255, 76, 150, 29]
    ]


@pytest.mark.parametrize("seed", range(4))
def test_threshold_baseline_is_the_best_of_all(seed: int) -> None:
    pictures, alphas = noise(seed, 3, 4, 5, 3), noise(seed + 50, 3, 4, 5)
    if seed % 2:
        alphas = (255 - pictures[..., 1]) // 2 + alphas // 2
    grey = np.stack([luminance(picture) for picture in pictures]).astype(int)
    tried = {}
    for polarity, t in product(("bright", "dark"), range(257)):
        made = grey >= t if polarity == "bright" else grey < t
        tried[polarity, t] = np.abs(made - alphas / 255).sum() / 3 / 1000
    found = threshold_baseline(pictures, alphas)
    assert found.sad == pytest.approx(min(tried.values()))
    assert found.sad == pytest.approx(tried[found.polarity, found.threshold])


def test_threshold_baseline_refuses_what_does_not_fit() -> None:
    picture, alpha = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)
    for pictures, alphas in (([], []), ([picture], []), ([picture], [alpha[:1]]), ([picture / 255], [alpha])):
        with pytest.raises(DataError, match="baseline needs"):
            threshold_baseline(pictures, alphas)
