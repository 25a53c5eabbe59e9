"""Layers matched in order: against all monotone matchings, plain formulas, and cases worked out by hand."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ringweave.pretrain.rgba_matching as matching
from ringweave.pretrain.rgba_matching import cheapest_path, decomposition, match_layers
from ringweave.tokenizers.errors import DataError

Span = tuple[int, int]


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def block(colour: tuple[int, int, int], rows: slice, columns: slice, *, size: int = 12) -> np.ndarray:
    """An opaque rectangle on nothing."""
    out = np.zeros((size, size, 4), np.uint8)
    out[rows, columns] = (*colour, 255)
    return out


BACK = block((10, 60, 200), slice(None), slice(None))
LEFT = block((250, 10, 10), slice(2, 9), slice(1, 5))
RIGHT = block((20, 240, 30), slice(2, 9), slice(6, 11))
DOT = block((255, 255, 0), slice(4, 6), slice(4, 8))


# --- slow and plain ----------------------------------------------------------------------------------------


def all_paths(n: int, m: int) -> list[list[tuple[int, int]]]:
    """Every way from (0, 0) to (n - 1, m - 1) by one row, one column or both."""
    if (n, m) == (1, 1):
        return [[(0, 0)]]
    before = [(n - 1, m - 1), (n - 1, m), (n, m - 1)]
    return [[*path, (n - 1, m - 1)] for a, b in before if a and b for path in all_paths(a, b)]


def slow_pair(predicted: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """(RGB L1, soft IoU) pixel by pixel."""
    low = high = weight = apart = 0
    for place in np.ndindex(true.shape[:2]):
        p, t = (list(map(int, one[place])) for one in (predicted, true))
        low, high, weight = low + min(p[3], t[3]), high + max(p[3], t[3]), weight + t[3]
        p[:3] = p[:3] if p[3] else [0, 0, 0]
        apart += t[3] * sum(abs(a - b) for a, b in zip(p[:3], t[:3]))
    return (apart / (3 * 255 * weight) if weight else 0.0), (low / high if high else 1.0)


def slow_merge(layers: list[np.ndarray]) -> np.ndarray:
    """One layer for all, by fractions, rounded to 8 bits (halves up) at each step."""
    out = layers[0].copy()
    for above in layers[1:]:
        for place in np.ndindex(out.shape[:2]):
            top, bottom = Fraction(int(above[place][3]), 255), Fraction(int(out[place][3]), 255)
            alpha = top + bottom * (1 - top)
            if not alpha:
                out[place] = 0
                continue
            mixed = [
                (top * int(a) + bottom * (1 - top) * int(b)) / alpha
                for a, b in zip(above[place][:3], out[place][:3])
            ]
            out[place] = [int(value + Fraction(1, 2)) for value in [*mixed, alpha * 255]]
    return out


def slow_match(predicted: list[np.ndarray], true: list[np.ndarray], merges: int) -> list[tuple]:
    """[(merges, cost, pairs of spans)], by the rules as they are written."""
    stacks = (predicted, true)
    memo: dict[tuple[Span, Span], float] = {}

    def cost(row: Span, column: Span) -> float:
        if (row, column) not in memo:
            rgb, iou = slow_pair(slow_merge(predicted[slice(*row)]), slow_merge(true[slice(*column)]))
            memo[row, column] = (rgb + 1 - iou) / 2
        return memo[row, column]

    def matched(spans: list[list[Span]]) -> tuple[float, list[tuple[Span, Span]]]:
        paths = [[(spans[0][i], spans[1][j]) for i, j in p] for p in all_paths(*map(len, spans))]
        best = min(paths, key=lambda p: (sum(cost(*pair) for pair in p), len(p)))
        return sum(cost(*pair) for pair in best) / len(best), best

    spans = [[(i, i + 1) for i in range(len(stack))] for stack in stacks]
    mean, pairs = matched(spans)
    found = [(0, mean, pairs)]
    while len(found) <= merges:
        trials = []
        for side in (0, 1):
            for below, above in pairwise(spans[side]) if len(spans[side]) > 2 else ():
                one = (below[0], above[1])
                after = {
                    tuple(one if s in (below, above) and k == side else s for k, s in enumerate(p))
                    for p in pairs
                }
                trial = [list(s) for s in spans]
                at = trial[side].index(below)
                trial[side][at : at + 2] = [one]
                trials.append((sum(cost(*pair) for pair in sorted(after)) / len(after), trial))
        if not trials:
            break
        spans = min(trials, key=lambda t: t[0])[1]
        mean, pairs = matched(spans)
        if mean >= found[-1][1] - 1e-9:
            break
        found.append((len(found), mean, pairs))
    return found + [found[-1]] * (merges + 1 - len(found))


# --- against them ------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda m: st.lists(st.lists(st.integers(0, 4), min_size=m, max_size=m), min_size=1, max_size=5)
    )
)
@example(
    [[1, 0, 1, 2], [0, 1, 2, 0], [1, 2, 2, 1], [1, 2, 0, 1]]
)  # going on by both first is not the shortest
def test_the_path_is_the_cheapest_of_all(costs: list[list[int]]) -> None:
    """Small whole numbers, so that many paths are equal."""
    path = cheapest_path(costs)
    every = all_paths(len(costs), len(costs[0]))
    assert path in every
    sums = [(sum(costs[i][j] for i, j in one), len(one)) for one in every]
    assert (sum(costs[i][j] for i, j in path), len(path)) == min(sums)


def test_there_are_as_many_paths_as_delannoy_says() -> None:
    assert [len(all_paths(n, n)) for n in (1, 2, 3, 4)] == [1, 3, 13, 63]


@pytest.mark.parametrize("seed", range(12))
def test_matching_is_that_of_the_plain_rules(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 5, 2)
    if seed % 3 == 0:  # what merges are for: a stack, and the same with layers split
        true = list(noise(seed, m, 4, 3, 4))
        predicted = [
            part
            for one in true
            for part in (one * (np.arange(3) < 2)[:, None], one * (np.arange(3) > 1)[:, None])
        ]
        predicted = [part.astype(np.uint8) for part in predicted][:5]
    else:
        predicted, true = list(noise(seed, n, 4, 3, 4)), list(noise(seed + 99, m, 4, 3, 4))
    for one in [*predicted, *true]:
        one[..., 3] *= rng.random((4, 3)) < 0.6
    found, wanted = match_layers(predicted, true, merges=3), slow_match(predicted, true, 3)
    assert [f.merges for f in found] == [w[0] for w in wanted]
    assert [f.cost for f in found] == pytest.approx([w[1] for w in wanted], abs=1e-12)
    assert [list(f.pairs) for f in found] == [w[2] for w in wanted]
    for one in found:
        assert one.cost == pytest.approx((one.rgb_l1 + 1 - one.alpha_iou) / 2)
    assert all(b.cost <= a.cost for a, b in pairwise(found)), "merges never make it worse"


# --- by hand -----------------------------------------------------------------------------------------------


def test_figures_of_one_pair_by_hand() -> None:
    true = np.uint8([[[100, 0, 0, 255], [0, 0, 0, 51], [7, 7, 7, 0]]])
    predicted = np.uint8([[[100, 51, 0, 51], [255, 255, 255, 0], [7, 7, 7, 102]]])
    (only,) = decomposition([predicted], [true], merges=0)
    # Colour: 51 of 3·255 at weight 255; the hidden white counts as black, which is right at weight 51.
    assert only["rgb_l1"] == pytest.approx((51 * 255) / (3 * 255 * (255 + 51)))
    assert only["alpha_iou"] == pytest.approx((51 + 0 + 0) / (255 + 51 + 102))
    assert only["cost"] == pytest.approx((only["rgb_l1"] + 1 - only["alpha_iou"]) / 2)
    assert (only["allowed"], only["taken"]) == (0, 0)


def test_equal_stacks_match_one_to_one() -> None:
    for stack in ([BACK], [BACK, LEFT, RIGHT], [BACK] * 4):
        found = match_layers(stack, stack)
        assert len(found) == 6
        for one in found:
            assert (one.merges, one.cost, one.rgb_l1, one.alpha_iou) == (0, 0.0, 0.0, 1.0)
            assert (
                [p for p, _ in one.pairs]
                == [t for _, t in one.pairs]
                == [(i, i + 1) for i in range(len(stack))]
            )


@pytest.mark.parametrize("turned", [False, True])
def test_a_split_layer_is_merged_in_either_stack(turned: bool) -> None:
    both = matching._Stacks([LEFT, RIGHT], [BACK]).layer(0, (0, 2)).planes.transpose(1, 2, 0)
    assert (both == np.maximum(LEFT, RIGHT)).all()
    split, whole = [BACK, LEFT, RIGHT, DOT], [BACK, both, DOT]
    found = match_layers(*((whole, split) if turned else (split, whole)), merges=5)
    assert [f.merges for f in found] == [0, 1, 1, 1, 1, 1]
    spans = [pair[turned] for pair in found[0].pairs]
    assert spans == [(0, 1), (1, 2), (2, 3), (3, 4)], "both halves had the whole as their partner"
    # Without a merge each half covers its share of the whole, and is black on the rest of it.
    areas = 28 / 63, 35 / 63
    assert found[0].alpha_iou == pytest.approx((1 + sum(areas) + 1) / 4)
    assert (found[1].cost, found[1].rgb_l1, found[1].alpha_iou) == (0.0, 0.0, 1.0)
    assert [pair[turned] for pair in found[1].pairs] == [(0, 1), (1, 3), (3, 4)]


def test_order_counts() -> None:
    straight = match_layers([BACK, LEFT, RIGHT], [BACK, LEFT, RIGHT], merges=0)[0]
    crossed = match_layers([BACK, RIGHT, LEFT], [BACK, LEFT, RIGHT], merges=0)[0]
    assert straight.cost == 0 < crossed.cost
    rows, columns = zip(*crossed.pairs)
    assert list(rows) == sorted(rows) and list(columns) == sorted(columns)


def test_no_stack_is_merged_into_one_layer() -> None:
    """Else two pictures that look the same would match, however they were taken apart."""
    found = match_layers([BACK, LEFT], [BACK, RIGHT], merges=5)[-1]
    assert found.merges == 0
    found = match_layers([BACK, DOT, LEFT], [BACK, RIGHT, DOT], merges=5)[-1]
    assert len({p for p, _ in found.pairs}) >= 2 and len({t for _, t in found.pairs}) >= 2


def test_layers_without_alpha_and_of_one_pixel() -> None:
    empty = np.zeros((12, 12, 4), np.uint8)
    (same,) = decomposition([empty], [empty], merges=0)
    assert (same["rgb_l1"], same["alpha_iou"], same["cost"]) == (0.0, 1.0, 0.0)
    (spill,) = decomposition([BACK], [empty], merges=0)
    assert (spill["rgb_l1"], spill["alpha_iou"], spill["cost"]) == (0.0, 0.0, 0.5)
    (missing,) = decomposition([empty], [BACK], merges=0)
    assert missing["rgb_l1"] == pytest.approx((10 + 60 + 200) / 765) and missing["alpha_iou"] == 0
    rows = decomposition([empty, BACK, empty], [BACK, empty, empty], merges=5)
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    pixel = np.uint8([[[1, 2, 3, 4]]])
    assert decomposition([pixel, pixel], [pixel], merges=2)[-1]["cost"] == 0
    hidden = pixel.copy()
    hidden[..., 3] = 0
    assert decomposition([hidden], [np.zeros_like(pixel)], merges=0)[0]["cost"] == 0


def test_inputs_are_not_written_to() -> None:
    layers = list(noise(4, 3, 5, 5, 4))
    for one in layers:
        one[:2, :, 3] = 0
    before = [one.copy() for one in layers]
    match_layers(layers, layers[::-1], merges=2)
    assert all((a == b).all() for a, b in zip(layers, before))


def test_a_hundred_layers_cost_few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair once, then only what a merge changes near the path."""
    counted = []
    real = matching._figures
    monkeypatch.setattr(matching, "_figures", lambda *a: counted.append(1) or real(*a))
    rng = np.random.default_rng(0)
    true = []
    for _ in range(100):
        y, x = rng.integers(0, 40, 2)
        true.append(block(tuple(rng.integers(0, 256, 3)), slice(y, y + 20), slice(x, x + 20), size=64))
    predicted = [one for number, one in enumerate(true) if number % 10]
    found = match_layers(predicted, true, merges=5)
    assert len(found) == 6 and len(counted) <= 90 * 100 + 6 * 700
    assert found[-1].cost <= found[0].cost


def test_stacks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="differ in size"):
        match_layers([BACK[:4]], [BACK])
    with pytest.raises(DataError, match="at least one layer"):
        match_layers([], [BACK])
    with pytest.raises(DataError, match="one size"):
        match_layers([BACK, BACK[:, :3]], [BACK])
