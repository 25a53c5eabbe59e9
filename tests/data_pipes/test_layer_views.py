"""Views of RGBA layers against exact fractions and plain loops: composites, mattes, masks and trimaps."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from ringweave.data_pipes.demo import layers as demo_layers
from ringweave.data_pipes.layer_views import (
    TOLERANCE,
    composite_error,
    mask_of,
    over,
    pictures_of,
    trimap_of,
    trimap_radius,
)
from ringweave.data_pipes.plan_items import LAYER_VIEWS
from ringweave.tokenizers.errors import DataError

U8 = np.ndarray[Any, np.dtype[np.uint8]]


def drawn(seed: int, count: int, height: int = 5, width: int = 7) -> list[U8]:
    """Layers of random colour, half of whose alphas are at the ends."""
    rng = np.random.default_rng(seed)
    layers = rng.integers(0, 256, (count, height, width, 4), dtype=np.uint8)
    ends = rng.choice(np.array([0, 255, 1, 254], np.uint8), (count, height, width))
    layers[..., 3] = np.where(rng.random((count, height, width)) < 0.5, ends, layers[..., 3])
    return list(layers)


def exact(pixels: list[U8]) -> list[Fraction]:
    """(r, g, b, a) of one pixel's layers, bottom first, as sums over what each layer lets through: no recursion."""
    covers = [Fraction(int(pixel[3]), 255) for pixel in pixels]
    through = [Fraction(1)] * len(pixels)
    for i in range(len(pixels) - 2, -1, -1):
        through[i] = through[i + 1] * (1 - covers[i + 1])
    shares = [cover * rest for cover, rest in zip(covers, through)]
    total = sum(shares, Fraction(0))
    if not total:
        return [Fraction(0)] * 4
    colour = [sum(s * int(p[c]) for s, p in zip(shares, pixels)) / total for c in range(3)]
    return [*colour, 255 * total]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_over_is_the_exact_fraction_rounded(count: int) -> None:
    layers = drawn(count, count)
    found = over(layers)
    for place in np.ndindex(5, 7):
        wanted = exact([layer[place] for layer in layers])
        for got, value in zip(found[place], wanted):
            assert abs(int(got) - value) <= Fraction(1, 2), (place, found[place], wanted)


def test_transparent_where_nothing_lies() -> None:
    loud = np.full((2, 2, 4), 200, np.uint8)
    loud[..., 3] = 0
    assert over([loud, loud]).tolist() == np.zeros((2, 2, 4), int).tolist()
    solid = np.array([[[10, 20, 30, 255]]], np.uint8)
    assert over([solid, loud[:1, :1]]).tolist() == solid.tolist()


def test_one_layer_is_itself_where_it_shows() -> None:
    [layer] = drawn(3, 1, 16, 16)
    shown = layer[..., 3:] > 0
    assert (over([layer]) == layer * shown).all()


def test_hundred_layers_add_up_whole_and_in_two() -> None:
    layers = drawn(7, 100, 4, 4)
    flat = over(layers)
    assert composite_error(layers, flat) <= 1
    assert composite_error([layers[0], over(layers[1:])], flat) <= TOLERANCE
    assert composite_error(layers[:-1], flat) > TOLERANCE


def test_error_is_that_of_the_demo_data() -> None:
    """Two programs: one lays layers over a page, the other multiplies first."""
    for seed in range(5):
        layers = drawn(seed, 3)
        changed = over(layers)
        changed[0, 0, seed % 4] ^= 16
        for flat in (over(layers), changed, over(layers[:2])):
            assert abs(composite_error(layers, flat) - demo_layers.composite_error(layers, flat)) <= 1


def test_order_and_alpha_matter() -> None:
    red, blue = (np.zeros((1, 1, 4), np.uint8) for _ in range(2))
    red[..., [0, 3]], blue[..., [2, 3]] = 255, 255
    blue[..., 3] = 51  # a fifth
    assert over([red, blue]).tolist() == [[[204, 0, 51, 255]]]
    assert over([blue, red]).tolist() == [[[255, 0, 0, 255]]]


def test_mask_and_trimap_rules() -> None:
    alpha = np.array([[0, 127, 128, 255]], np.uint8)
    assert mask_of(alpha).tolist() == [[0, 0, 255, 255]]
    assert trimap_of(np.array([[0, 255, 255, 0]], np.uint8), 3).tolist() == [[0, 255, 255, 0]]


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_trimap_is_a_window_around_partial_alpha(radius: int) -> None:
    rng = np.random.default_rng(radius)
    alpha = rng.choice(np.array([0, 255], np.uint8), (9, 12))
    alpha[2, 3], alpha[8, 11], alpha[0, 0] = 100, 1, 254
    found = trimap_of(alpha, radius)
    for y, x in np.ndindex(9, 12):
        near = alpha[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
        assert found[y, x] == (128 if ((near > 0) & (near < 255)).any() else alpha[y, x])


def test_trimap_radius_follows_from_the_key() -> None:
    radii = [trimap_radius(f"k{n}", 64, 128) for n in range(400)]
    assert radii == [trimap_radius(f"k{n}", 64, 128) for n in range(400)]
    assert set(radii) == {1, 2, 3, 4}
    assert min(radii.count(r) for r in range(1, 5)) > 60
    assert trimap_radius("k", 1, 1) == trimap_radius("\udcff", 5, 5) == 1
    assert max(trimap_radius(f"k{n}", 320, 320) for n in range(400)) == 20


def test_every_view_by_name() -> None:
    layers = drawn(1, 3)
    layers[0][..., 3] = 255
    found = {view: pictures_of(layers, view, key="k") for view in (*LAYER_VIEWS, "layer1")}
    named = [(f"layer{n}.png", layer) for n, layer in enumerate(layers)]
    front, flat = over(layers[1:]), over(layers)
    alpha = front[..., 3]
    wanted: dict[str, list[tuple[str, U8]]] = {
        "layers": named,
        "layer1": named[1:2],
        "composite": [("composite", flat)],
        "background": named[:1],
        "foreground": [("foreground", front)],
        "top": named[2:],
        "lower": named[:2],
        "removed": [("removed", over(layers[:2]))],
    }
    for view, values in {
        "alpha": alpha,
        "mask": mask_of(alpha),
        "trimap": trimap_of(alpha, trimap_radius("k", 5, 7)),
        "top_mask": mask_of(layers[2][..., 3]),
    }.items():
        wanted[view] = [(view, np.dstack([values, values, values, np.full_like(values, 255)]))]
    assert set(wanted) == set(found)
    for view, pictures in found.items():
        assert [name for name, _ in pictures] == [name for name, _ in wanted[view]]
        for (_, got), (_, picture) in zip(pictures, wanted[view]):
            assert got.dtype == np.uint8 and got.shape == (5, 7, 4)
            assert (got == picture).all(), view


EMPTY = np.zeros((3, 3, 4), np.uint8)
SOLID = np.full((3, 3, 4), 255, np.uint8)
FAINT = np.full((3, 3, 4), 127, np.uint8)


@pytest.mark.parametrize(
    ("layers", "view", "said"),
    [
        ([SOLID], "foreground", "a record of 1 layer has no foreground"),
        ([SOLID], "top", "1 layer has no layer on top"),
        ([SOLID], "lower", "no lower layers"),
        ([SOLID], "removed", "no lower layers"),
        ([SOLID, EMPTY, EMPTY], "foreground", "the foreground is empty"),
        ([SOLID, EMPTY], "alpha", "the foreground is empty"),
        ([SOLID, EMPTY], "trimap", "the foreground is empty"),
        ([SOLID, EMPTY], "mask", "the foreground is empty"),
        ([SOLID, FAINT], "mask", "the mask of the foreground is empty"),
        ([SOLID, EMPTY], "top_mask", "the mask of the top layer is empty"),
        ([SOLID, EMPTY], "layer2", "there is no layer 2"),
    ],
)
def test_views_a_record_cannot_give(layers: list[U8], view: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        pictures_of(layers, view, key="k")


def test_empty_layers_and_single_pixels_are_layers() -> None:
    for view in ("layers", "composite", "background", "top", "lower", "removed"):
        assert pictures_of([SOLID, EMPTY], view, key="k")
    assert (pictures_of([EMPTY, EMPTY], "composite", key="k")[0][1] == 0).all()
    dots = [layer[:1, :1] for layer in (SOLID, FAINT)]
    for view in ("foreground", "alpha", "trimap", "layers"):
        assert all(picture.shape == (1, 1, 4) for _, picture in pictures_of(dots, view, key="k"))
    assert pictures_of(dots, "trimap", key="k")[0][1].tolist() == [[[128, 128, 128, 255]]]
