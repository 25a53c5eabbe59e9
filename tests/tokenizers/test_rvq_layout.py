"""Every layout of residual codes has an exact inverse, and reads broken streams without raising."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ringweave.tokenizers.grid import MISSING
from ringweave.tokenizers.rvq_layout import (
    LAYOUTS,
    coarse_first,
    delay,
    delay_mask,
    flatten,
    from_coarse_first,
    parallel,
    undelay,
    unflatten,
    unparallel,
)


def numbered(frames: int, books: int) -> np.ndarray:
    """Codes that differ in every cell."""
    return np.arange(frames * books, dtype=np.int32).reshape(frames, books)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_size_comes_back(name: str) -> None:
    """T from 0 to 64, Q from 1 to 9, all of them, with T known and not."""
    layout = LAYOUTS[name]
    for frames in range(65):
        for books in range(1, 10):
            codes = numbered(frames, books)
            written = layout.write(codes)
            assert written.dtype == np.int32
            assert len(written) == layout.steps(frames, books)
            assert (written.shape[1:] == (books,)) is layout.columns
            mask = layout.mask(frames, books)
            assert (mask == (written != MISSING)).all()
            assert sorted(written[mask].tolist()) == list(range(frames * books))
            for known in (None, frames):
                found = layout.read(written, books=books, frames=known)
                assert found.complete
                assert found.codes.dtype == np.int32
                assert found.codes.shape == codes.shape
                assert (found.codes == codes).all()


def test_the_orders() -> None:
    """Written out by hand: 3 frames of 2 books."""
    codes = np.array([[10, 20], [11, 21], [12, 22]], np.int32)
    assert flatten(codes).tolist() == [10, 20, 11, 21, 12, 22]
    assert coarse_first(codes).tolist() == [10, 11, 12, 20, 21, 22]
    assert delay(codes).tolist() == [[10, MISSING], [11, 20], [12, 21], [MISSING, 22]]
    assert delay_mask(3, 2).tolist() == [[True, False], [True, True], [True, True], [False, True]]
    assert parallel(codes).tolist() == codes.tolist()
    assert parallel(codes) is not codes


def test_delay_lets_a_head_see_coarser_books_of_its_frame_only() -> None:
    """Before step s, book q of frame s - q has books 0..q-1 of that frame behind it, and no finer one."""
    frames, books = 12, 5
    step = np.full((frames, books), -1)
    grid = delay(numbered(frames, books))
    for s, q in np.argwhere(grid != MISSING):
        step[tuple(divmod(int(grid[s, q]), books))] = s
    assert (np.diff(step, axis=1) == 1).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_truncation_gives_what_is_there(name: str) -> None:
    layout = LAYOUTS[name]
    for frames, books in ((7, 4), (3, 9), (5, 1)):
        codes = numbered(frames, books)
        written = layout.write(codes)
        for steps in range(len(written)):
            found = layout.read(written[:steps], books=books, frames=frames)
            there = set(written[:steps][written[:steps] != MISSING].tolist())
            assert not found.complete
            assert found.codes.shape == codes.shape
            assert ((found.codes == codes) | (found.codes == MISSING)).all()
            assert set(found.codes[found.codes != MISSING].tolist()) == there


def test_truncation_without_the_number_of_frames() -> None:
    codes = numbered(6, 3)
    found = unflatten(flatten(codes)[:-2], books=3)
    assert found.codes.tolist()[-1] == [15, MISSING, MISSING] and not found.complete
    # The delayed grid shows by its lower triangle that it was cut.
    found = undelay(delay(codes)[:-1], books=3)
    assert (found.codes[:5] == codes[:5]).all() and not found.complete
    assert found.codes[5].tolist() == [15, 16, MISSING]
    # Whole frames less are a shorter clip; nothing is out of place.
    assert unflatten(flatten(codes)[:-3], books=3).complete
    assert unparallel(parallel(codes)[:-1], books=3).complete
    assert not from_coarse_first(coarse_first(codes)[:-1], books=3).complete


@pytest.mark.parametrize("name", LAYOUTS)
def test_too_much_and_too_little_is_not_complete(name: str) -> None:
    layout = LAYOUTS[name]
    written = layout.write(numbered(6, 3))
    assert not layout.read(np.concatenate([written, written[-1:]]), books=3, frames=6).complete
    assert not layout.read(written, books=3, frames=5).complete
    assert not layout.read(written, books=3, frames=7).complete
    for at in np.argwhere(written != MISSING):
        holed = written.copy()
        holed[tuple(at)] = MISSING
        found = layout.read(holed, books=3, frames=6)
        assert not found.complete and (found.codes == MISSING).sum() == 1


def test_codes_outside_the_delay_pattern() -> None:
    codes = numbered(6, 3)
    for at in np.argwhere(~delay_mask(6, 3)):
        grid = delay(codes)
        grid[tuple(at)] = 99
        found = undelay(grid, books=3, frames=6)
        assert not found.complete and (found.codes == codes).all()
    assert not undelay(delay(codes)[:, :2], books=3).complete
    assert undelay(np.zeros((0, 3), np.int32), books=3).codes.shape == (0, 3)


def test_missing_cells_keep_their_place() -> None:
    """A codec may leave cells out: with T known they come back as they were."""
    codes = numbered(5, 3)
    codes[1, 2] = codes[4] = MISSING
    for layout in LAYOUTS.values():
        found = layout.read(layout.write(codes), books=3, frames=5)
        assert (found.codes == codes).all() and not found.complete


def test_model_output_never_raises() -> None:
    cells = hnp.arrays(np.int64, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6))

    @settings(max_examples=150, deadline=None)
    @given(cells, st.integers(1, 5), st.none() | st.integers(0, 7))
    def check(output: np.ndarray, books: int, frames: int | None) -> None:
        output = output % (1 << 20) - 5
        for layout in LAYOUTS.values():
            found = layout.read(output, books=books, frames=frames)
            assert found.codes.ndim == 2 and found.codes.shape[1] == books
            assert frames is None or len(found.codes) == frames
            assert found.codes.size == 0 or found.codes.min() >= MISSING
            assert not found.complete or bool((found.codes >= 0).all())

    check()


@pytest.mark.parametrize("bad", [np.zeros(3, np.int32), np.zeros((3, 0), np.int32), np.zeros((3, 2))])
def test_codes_of_another_shape_are_refused(bad: np.ndarray) -> None:
    for layout in LAYOUTS.values():
        with pytest.raises(ValueError, match="codes must be integers"):
            layout.write(bad)
