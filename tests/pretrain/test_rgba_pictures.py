"""Figures of looks against values by hand, scikit-image and slow plain code."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringweave.pretrain.rgba_pictures import (
    BACKGROUNDS,
    composite_consistency,
    flatten,
    psnr_of,
    reconstruction,
    ssim,
)
from ringweave.tokenizers.errors import DataError


def layer(colour: tuple[int, int, int], alpha: np.ndarray | list) -> np.ndarray:
    """uint8 [H, W, 4] of one colour."""
    alpha = np.atleast_2d(np.asarray(alpha, np.uint8))
    return np.concatenate([np.broadcast_to(np.uint8(colour), (*alpha.shape, 3)), alpha[..., None]], axis=2)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


# --- backgrounds -------------------------------------------------------------------------------------------


def test_composites_are_exact_in_8_bits() -> None:
    """Every alpha with every value over every level, against fractions."""
    alpha, value = np.mgrid[:256, :256].astype(np.uint8)
    colour, through = flatten([np.stack([value, value, value, alpha], axis=2)])
    a, v = alpha.astype(np.int64), value.astype(np.int64)
    for level in (0, 128, 255):
        wanted = (2 * (a * v + (255 - a) * level) + 255) // 510
        assert (np.rint(colour[..., 1] + level * through) == wanted).all()
    assert {level for ground in BACKGROUNDS.values() for level in ground} == {0, 128, 255}
    assert len(set(BACKGROUNDS.values())) == 9


def test_reconstruction_by_hand() -> None:
    red, nothing = layer((255, 0, 0), [255]), layer((9, 9, 9), [0])
    found = reconstruction([red], [nothing])
    wanted = {
        name: psnr_of(sum((a - b) ** 2 for a, b in zip((255, 0, 0), ground)) / 3)
        for name, ground in BACKGROUNDS.items()
    }
    assert {name: f["psnr"] for name, f in found["backgrounds"].items()} == pytest.approx(wanted)
    assert found["backgrounds"]["black"]["psnr"] == pytest.approx(10 * math.log10(3))
    assert found["backgrounds"]["red"] == {"psnr": 100.0, "ssim": 1.0}
    assert found["psnr"] == pytest.approx(sum(wanted.values()) / 9)
    # One pixel is compared by its mean: 2·0·255 + C1 over 255² + C1, and 1 for the two equal channels.
    c1 = (0.01 * 255) ** 2
    assert found["backgrounds"]["black"]["ssim"] == pytest.approx((2 + c1 / (255**2 + c1)) / 3)


def test_reconstruction_is_that_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    true = noise(5, 33, 26, 4)
    true[8:20, 5:18, 3] = 255
    predicted = np.clip(
        true.astype(int) + np.random.default_rng(6).integers(-40, 40, true.shape), 0, 255
    ).astype(np.uint8)
    found = reconstruction([predicted], [true])
    for name, ground in BACKGROUNDS.items():
        a, b = (
            (
                (
                    2
                    * (
                        p[..., :3].astype(int) * p[..., 3:]
                        + (255 - p[..., 3:].astype(int)) * np.array(ground)
                    )
                    + 255
                )
                // 510
            ).astype(np.uint8)
            for p in (predicted, true)
        )
        wanted = metrics.structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=2,
        )
        assert found["backgrounds"][name]["ssim"] == pytest.approx(wanted, abs=1e-12)
        assert found["backgrounds"][name]["psnr"] == pytest.approx(
            metrics.peak_signal_noise_ratio(b, a, data_range=255)
        )
    for key in ("psnr", "ssim"):
        assert found[key] == pytest.approx(np.mean([f[key] for f in found["backgrounds"].values()]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 13), (2, 40), (5, 17), (11, 11), (12, 30), (900, 200)])
def test_ssim_of_any_size(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = noise(7, *shape), noise(8, *shape)
    whole = ssim(a, b)
    monkeypatch.setattr("ringweave.pretrain.rgba_pictures._AT_ONCE", 1)
    assert ssim(a, b) == pytest.approx(whole, abs=1e-12), "strips do not show"
    assert ssim(a, a) == 1.0 and ssim(a, b) == ssim(b, a)
    if a.size > 400:
        return
    sides = [min(11, n - (n + 1) % 2) for n in shape]
    weights = [np.exp(-((np.arange(n) - n // 2) ** 2) / 4.5) for n in sides]
    kernel = np.outer(*(w / w.sum() for w in weights))
    values = []
    for y, x in product(range(shape[0] - sides[0] + 1), range(shape[1] - sides[1] + 1)):
        p, q = (c[y : y + sides[0], x : x + sides[1]].astype(float) for c in (a, b))
        mp, mq = (kernel * p).sum(), (kernel * q).sum()
        vp, vq = (kernel * (p - mp) ** 2).sum(), (kernel * (q - mq) ** 2).sum()
        cov = (kernel * (p - mp) * (q - mq)).sum()
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert whole == pytest.approx(np.mean(values), abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 14), st.integers(1, 14))
def test_equal_looks_are_equal(seed: int, depth: int, height: int, width: int) -> None:
    """What alpha 0 hides changes nothing, and a layer without alpha is no layer."""
    layers = list(noise(seed, depth, height, width, 4))
    for one in layers:
        one[..., 3] *= noise(seed + 1, height, width) > 100
    other = [one.copy() for one in layers]
    for one in other:
        one[one[..., 3] == 0, :3] ^= 255
    other.insert(seed % (depth + 1), layer((1, 2, 3), np.zeros((height, width))))
    found = reconstruction(other, layers)
    assert (found["psnr"], found["ssim"]) == (100.0, 1.0)
    colour, through = flatten(layers)
    picture = composite_consistency(other, np.rint(colour).astype(np.uint8))
    assert picture["l1"] == 0 and picture["psnr"] == 100.0 and picture["pixels"] == height * width
    assert picture["alpha_l1"] == pytest.approx(through.mean()), "the picture is opaque"


# --- composite ---------------------------------------------------------------------------------------------


def test_composite_by_hand() -> None:
    bottom, top = layer((200, 100, 0), [[255, 255]]), layer((255, 255, 255), [[51, 0]])
    picture = np.uint8([[[211, 131, 51], [200, 100, 0]]])  # 0.2·255 + 0.8·200 = 211 and so on
    assert composite_consistency([bottom, top], picture) == {
        "l1": 0.0,
        "psnr": 100.0,
        "alpha_l1": 0.0,
        "pixels": 2,
    }
    picture[0, 1, 2] = 51
    off = composite_consistency([bottom, top], picture)
    assert off["l1"] == pytest.approx(0.2 / 6) and off["psnr"] == pytest.approx(psnr_of(51**2 / 6))
    assert composite_consistency([top, bottom], picture)["l1"] > off["l1"], "order counts"


def test_composite_sees_holes_and_spills() -> None:
    clear, white = layer((255, 255, 255), [[0, 0]]), layer((255, 255, 255), [[255, 255]])
    hole = composite_consistency([clear], white[..., :3])
    assert (hole["l1"], hole["alpha_l1"], hole["pixels"], hole["psnr"]) == (1.0, 1.0, 2, 0.0)
    spill = composite_consistency([white], clear)
    assert (spill["l1"], spill["alpha_l1"], spill["pixels"]) == (1.0, 1.0, 2)
    nothing = composite_consistency([clear], clear)
    assert nothing == {"l1": 0.0, "psnr": 100.0, "alpha_l1": 0.0, "pixels": 0}
    half = composite_consistency([layer((9, 9, 9), [[0, 128]])], layer((9, 9, 9), [[0, 128]]))
    assert (half["l1"], half["pixels"]) == (0.0, 1), "only where there is alpha"


def test_stacks_that_do_not_fit_are_refused() -> None:
    good, other = noise(1, 2, 3, 4), noise(1, 3, 2, 4)
    for layers, why in (
        ([], "at least one layer"),
        ([good[..., :3]], r"\[H, W, 4\]"),
        ([good / 255], r"\[H, W, 4\]"),
        ([good[:0]], r"\[H, W, 4\]"),
        ([good, other], "one size"),
    ):
        with pytest.raises(DataError, match=why):
            reconstruction(layers, [good])
        with pytest.raises(DataError, match=why):
            composite_consistency(layers, good)
    with pytest.raises(DataError, match="differ in size"):
        reconstruction([other], [good])
    for picture in (other, good[..., 0], good[..., :2], good / 255):
        with pytest.raises(DataError, match="composite"):
            composite_consistency([good], picture)


def test_psnr_of_small_errors_is_capped() -> None:
    assert psnr_of(0.0) == psnr_of(1e-9) == 100.0 > psnr_of(1e-5) > 90
    assert psnr_of(255.0**2) == 0.0
