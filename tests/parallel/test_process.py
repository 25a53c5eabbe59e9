"""A process that was in a process group ends with its own code, whatever gloo's threads still hold."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys

import pytest

from ringweave.parallel.spawn import run_ranks

#: A group of one that something holds when it is destroyed, and gloo's threads on a processor that is busy: they let
#: go of the last tensors when the interpreter is being torn down. Ended by `sys.exit`, 27 of 40 such processes aborted
#: ("terminate called without an active exception"; torch 2.14, Python 3.11).
LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux lets a thread wait for an idle processor"
)
ENDS = """
import atexit, os, sys
import torch, torch.distributed as dist
from ringweave.launch import cli
from ringweave.parallel.process import leave

def work(argv):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    globals()["held"] = dist.group.WORLD
    core = min(os.sched_getaffinity(0))
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, {core})
        if thread != os.getpid():
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    for _ in range(5):
        dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()
    print("worked", end=" ")
    return 3

torch.set_num_threads(1)
codes = []
for trial in range(20):
    if (child := os.fork()) == 0:
        if sys.argv[1] == "leave":
            leave(work(()))
        atexit.register(print, "hooked", end=" ")
        cli.run = work
        cli.main()
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(*codes, file=sys.stderr)
"""


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize(("how", "printed"), [("leave", "worked "), ("command", "worked hooked ")])
def test_a_group_that_is_held_aborts_no_process_that_ends(how: str, printed: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS, how], capture_output=True, text=True, timeout=200)
    assert done.stderr.split() == ["3"] * 20, done.stderr
    assert done.stdout == printed * 20


def hook() -> None:
    """A rank that says so if its interpreter is torn down."""
    atexit.register(os.write, 2, b"torn down")


@pytest.mark.slow
def test_ranks_leave_without_a_teardown(capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(2, hook, timeout=100)
    assert "torn down" not in capfd.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
@pytest.mark.parametrize(("code", "ends"), [(0, 120), (3, 3)])
def test_what_cannot_be_written_out_is_no_success(code: int, ends: int) -> None:
    said = f"from ringweave.parallel.process import leave; print('done'); leave({code})"
    with open("/dev/full", "w") as full:
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run([sys.executable, "-c", said], stdout=full, env=buffered, timeout=60)
    assert done.returncode == ends
