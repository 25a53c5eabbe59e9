"""The diffusion transformer under the laws: packs, layouts of up to eight processes, runs that die."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import verify_dit


@pytest.mark.parametrize("streams", ["double", "single"])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_packs_equal_their_documents_alone(precision: str, streams: str) -> None:
    row = verify_dit.check_packing(precision, shape=replace(verify_dit.SHAPE, streams=streams))
    assert row["holds"], row


def test_documents_leave_each_other_bit_identical() -> None:
    row = verify_dit.check_isolation()
    assert row["holds"], row


FOUR: list[dict[str, Any]] = [
    {"dp": 4}, {"pp": 4}, {"tp": 4}, {"sp": 4}, {"dp": 2, "tp": 2}, {"pp": 2, "sp": 2}, {"tp": 2, "sp": 2},
    {"sp": 4, "ulysses": 2}, {"dp": 2, "sp": 2, "replicate": 2}, {"pp": 2, "tp": 2, "schedule": "zbv", "virtual": 2},
    {"dp": 2, "pp": 2, "schedule": "interleaved", "virtual": 2}, {"tp": 2, "sp": 2, "recompute": "full"},
    {"dp": 2, "tp": 2, "recompute": "selective"}, {"dp": 2, "tp": 2, "streams": "single"},
    {"pp": 2, "sp": 2, "streams": "single", "ring": "zigzag"},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "rows"),
    [(3, [{"sp": 3}]), (4, FOUR), (8, [{"dp": 2, "tp": 2, "sp": 2}, {"pp": 2, "tp": 2, "sp": 2}])],
)
def test_layouts_equal_one_process(world: int, rows: list[dict[str, Any]]) -> None:
    for row in run_ranks(world, verify_dit.check_rows, rows, timeout=400)[0]:
        assert row["holds"], row


@pytest.mark.slow
def test_a_run_that_dies_is_the_run_that_does_not(tmp_path: Path) -> None:
    """Over data and tensor, then pipeline and ring; with a moving average, and the words' loss in the second stage."""
    row = run_ranks(4, verify_dit.check_killed, str(tmp_path), 4, timeout=400)[0]
    assert row["holds"], row
    assert row["tensors"] > 0
