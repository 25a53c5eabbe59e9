"""Any layout = one process, over the whole matrix: axes, ring layouts, transports, schedules, copies, engines."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain import verify, verify_parallel

pytestmark = pytest.mark.slow  # minutes of several processes


def _plain(world: int) -> set[str]:
    return {
        verify.describe_layout(x)
        for x in verify_parallel.factorisations(world, heads=verify.SHAPE.heads, layers=verify.SHAPE.layers)
    }


def test_the_matrix_names_every_factorisation_and_choice() -> None:
    assert _plain(4) == {
        "dp4", "pp4", "tp4", "sp4", "dp2·pp2", "dp2·tp2", "dp2·sp2", "pp2·tp2", "pp2·sp2", "tp2·sp2",
    }  # fmt: skip
    assert {"dp2·pp2·tp2", "dp2·pp2·sp2", "dp2·tp2·sp2", "pp2·tp2·sp2"} <= _plain(8)
    assert "sp3" in _plain(3)
    rows = verify_parallel.matrix(4)
    for key, values in {
        "schedule": {"gpipe", "interleaved", "zero_bubble", "zbv"}, "replicate": {2, 4}, "ulysses": {2, 4},
        "engine": {"zero1", "zero2", "zero3"}, "recompute": {"selective", "full"}, "norms": {"replicated"},
        "transport": {"ring", "direct", "gather"}, "ring": {"zigzag", "contiguous", "per_document"},
    }.items():  # fmt: skip
        assert {r[key] for r in rows if key in r} == values, key


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_layout_equals_one_process_for_both_masks(world: int) -> None:
    """trainers.md 1, 2, 3, 21, 23: uneven masks, ranks without targets, accumulation, prime context.

    The diffusion transformer is in test_dit_laws.py for 3 and more ranks, and below for 2.
    """
    models = verify_parallel.MODELS[:2]
    result = verify_parallel.run(world=world, models=models)
    assert result["holds"], [r for r in result["rows"] if not r["holds"]]
    assert {r["model"] for r in result["rows"]} == set(models)
    assert {r["layout"] for r in result["rows"]} >= _plain(world)


def test_layouts_of_eight_processes_equal_one() -> None:
    rows = [
        {"dp": 2, "pp": 2, "tp": 2}, {"dp": 2, "tp": 2, "sp": 2}, {"pp": 2, "tp": 2, "sp": 2},
        {"dp": 2, "pp": 2, "sp": 2, "schedule": "interleaved", "virtual": 2},
        {"dp": 2, "pp": 2, "sp": 2, "replicate": 2}, {"tp": 2, "sp": 4, "ulysses": 2},
    ]  # fmt: skip
    models = verify_parallel.MODELS[:2]
    for row in run_ranks(8, verify_parallel.check_rows, rows, "fp32", models, timeout=500, collective=200)[0]:
        assert row["holds"], row


def test_the_command_runs_on_the_ranks_a_launcher_made() -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
            "ringweave.launch.cli", "verify", "parallel", "--json",
        ],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["holds"] and result["world"] == 2
    assert {r["model"] for r in result["rows"]} == set(verify_parallel.MODELS)
    assert {"layout", "model", "max_rel_loss_diff", "max_rel_grad_diff", "holds"} <= result["rows"][0].keys()
