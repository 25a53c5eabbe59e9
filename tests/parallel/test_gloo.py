"""Groups of gloo have one worker thread: torch's two free the same memory (parallel/gloo.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ringweave.parallel.spawn import run_ranks

THREADS = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="threads are named under /proc only"
)


def workers() -> int:
    """Worker threads of all groups of this process."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return names.count("pt_gloo_runloop")


def make_groups() -> tuple[int, int, float, list[int], list[int]]:
    """Groups of every kind; how many there are and how many threads they have, and whether they work as torch's do."""
    half = dist.new_group([0, 1], timeout=timedelta(seconds=77))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("one", "two"))
    assert mesh["two"].get_group() is not half
    backends = [pg._get_backend(torch.device("cpu")) for pg in dist.distributed_c10d._world.pg_map]
    total = torch.full((3,), float(dist.get_rank() + 1))
    dist.all_reduce(total, group=half)
    wire, name = torch.ops._c10d_functional, half.group_name
    four = [wire.all_gather_into_tensor(torch.full((2,), float(n)), 2, name) for n in range(4)]
    gathered = [int(wire.wait_tensor(rows).sum()) for rows in four]
    seconds = [int(b.options._timeout.total_seconds()) for b in backends]
    return len(backends), workers(), float(total.sum()), gathered, sorted(seconds)


@pytest.mark.slow
@THREADS
@pytest.mark.parametrize("interface", ["", "lo"])
def test_every_group_has_one_worker(interface: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    for groups, threads, total, gathered, seconds in run_ranks(2, make_groups, timeout=100, collective=55):
        assert groups >= 3 and threads == groups
        assert total == 9.0 and gathered == [0, 4, 8, 12]
        assert 55 in seconds and 77 in seconds, "timeouts are those that were asked for"


@pytest.mark.slow
def test_all_gathers_under_way_together_kill_no_rank(
    load_script: Callable[[Path, str], ModuleType],
) -> None:
    """The trimmed form of tests/prove/gloo_workers.py; with two workers a rank dies after some ten seconds."""
    ranks = load_script(Path(__file__).parents[1] / "prove" / "_gloo_race.py", "_gloo_race")
    assert min(run_ranks(2, ranks.race, 5.0, 1, timeout=100)) >= 2000
