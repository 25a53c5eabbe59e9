"""The cutting of bands into blocks and tiles, against the boolean mask counted out cell by cell."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringweave.kernels.attention_band import band_allowed, cut_into_tiles, trim_band

bound = st.none() | st.integers(-12, 12)


def allowed_by_loop(lq: int, lk: int, lower: int | None, upper: int | None) -> torch.Tensor:
    cells = [
        [(lower is None or j - i >= lower) and (upper is None or j - i <= upper) for j in range(lk)]
        for i in range(lq)
    ]
    return torch.tensor(cells, dtype=torch.bool).reshape(lq, lk)


def check_cut(lq: int, lk: int, lower: int | None, upper: int | None, whole: int, part: int) -> None:
    allowed = band_allowed(lq, lk, lower, upper)
    rows, keys, low, up = trim_band(lq, lk, lower, upper)
    if rows is None:
        rows, keys = slice(0, lq), slice(0, lk)
    outside = allowed.clone()
    outside[rows, keys] = False
    assert not outside.any(), "something that counts was trimmed away"
    inner = allowed[rows, keys]
    if inner.numel() == 0:
        return
    assert inner.any(1).all() and inner.any(0).all(), "a row or a key that does not count was left"
    assert torch.equal(band_allowed(*inner.shape, low, up), inner)
    assert (low is None) == band_allowed(*inner.shape, None, up).equal(inner), (
        "a bound that does not bind is None"
    )

    times = torch.zeros(inner.shape, dtype=torch.int)
    begun = torch.zeros(inner.shape[0], dtype=torch.bool)
    for tile in cut_into_tiles(*inner.shape, low, up, whole=whole, part=part):
        here = band_allowed(*times[tile.rows, tile.keys].shape, tile.lower, 0 if tile.causal else tile.upper)
        assert not tile.causal or here.shape[0] == here.shape[1]
        assert here.any(1).all(), "a row of a tile without a key"
        assert begun[tile.rows].all() if not tile.first else not begun[tile.rows].any()
        begun[tile.rows] = True
        times[tile.rows, tile.keys] += here.int()
    assert torch.equal(times, inner.int()), "every cell of the band in one tile, and no other"


@given(st.integers(0, 9), st.integers(0, 9), bound, bound)
@settings(max_examples=300, deadline=None)
def test_band_equals_its_definition(lq: int, lk: int, lower: int | None, upper: int | None) -> None:
    assert torch.equal(band_allowed(lq, lk, lower, upper), allowed_by_loop(lq, lk, lower, upper))


@given(st.integers(0, 9), st.integers(0, 9), bound, bound, st.sampled_from([0, 20]), st.sampled_from([0, 20]))
@settings(max_examples=600, deadline=None)
def test_small_blocks_are_cut_exactly(
    lq: int, lk: int, lower: int | None, upper: int | None, whole: int, part: int
) -> None:
    check_cut(lq, lk, lower, upper, whole, part)


@given(
    st.integers(250, 600),
    st.integers(1, 900),
    st.none() | st.integers(-600, 600),
    st.none() | st.integers(-600, 900),
    st.sampled_from([0, 1 << 15]),
    st.sampled_from([0, 1 << 17]),
)
@settings(max_examples=60, deadline=None)
def test_blocks_of_several_chunks_are_cut_exactly(
    lq: int, lk: int, lower: int | None, upper: int | None, whole: int, part: int
) -> None:
    check_cut(lq, lk, lower, upper, whole, part)


def test_masks_stay_small_and_windows_cost_about_their_area() -> None:
    """A window of 4096 in 16384 rows: masks of at most 2^17 elements, at most 10 % of work outside the band."""
    length, window = 16384, 4096
    done = 0
    for tile in cut_into_tiles(length, length, 1 - window, 0):
        area = (tile.rows.stop - tile.rows.start) * (tile.keys.stop - tile.keys.start)
        done += area
        assert (tile.lower is None and tile.upper is None) or area <= 1 << 17
    band = sum(min(i + 1, window) for i in range(length))
    assert done <= 1.1 * band


def test_a_causal_offset_needs_no_mask() -> None:
    tiles = list(cut_into_tiles(5000, 5200, None, 300))
    assert all(tile.lower is None and tile.upper is None for tile in tiles)
    assert len(tiles) == 3
