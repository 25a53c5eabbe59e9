"""Figures of mattes against scenes as they were drawn, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ringweave.pretrain.matting_figures import matting_figures
from ringweave.pretrain.sample_dit import Made, on_checks, sheet


def _scene(where: int) -> list[np.ndarray]:
    """A dark page with a white square of 4 x 4 pixels in a picture of 10 x 10."""
    page = np.full((10, 10, 4), 40, np.uint8)
    page[..., 3] = 255
    square = np.zeros((10, 10, 4), np.uint8)
    square[where : where + 4, where : where + 4] = 255
    return [page, square]


def test_sad_over_whole_pictures_beside_a_threshold_that_knows() -> None:
    records = {"a": _scene(0), "b": _scene(5)}
    made = []
    for key, layers in records.items():
        matte = np.zeros((16, 16, 4), np.uint8)  # padded to whole cells, as a codec gives it
        matte[:10, :10] = layers[1]
        if key == "b":
            matte[0, :10, 3] = 255  # ten pixels too many
        made.append(Made("s", key, "", [], [matte], []))
    figures = matting_figures(made, records)
    assert figures["sad"] == pytest.approx(10 / 1000 / 2)
    assert figures["mse"] == pytest.approx(10 / 100 / 2)
    assert figures["baseline_sad"] == 0.0, "white on dark is parted by one threshold"
    assert figures["documents"] == 2


def test_a_sheet_shows_given_made_and_true_on_checks() -> None:
    clear, full = np.zeros((16, 16, 4), np.uint8), np.full((16, 16, 4), 255, np.uint8)
    assert set(np.unique(on_checks(clear))) == {204, 255} and (on_checks(full) == 255).all()
    red = full.copy()
    red[..., 1:3] = 0
    page = sheet([Made("s", "k", "", [red], [clear], [red]), Made("s", "l", "", [], [red], [])])
    assert page.shape[2] == 3 and (page[0, 0] == (255, 0, 0)).all()
    found = (page == (255, 0, 0)).all(-1)
    assert found.sum() == 3 * 256 and found[:16].sum() == 2 * 256
