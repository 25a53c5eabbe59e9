"""A process that was in a process group ends with its own code, whatever gloo's threads still hold."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: A group of one that something holds when it is destroyed, and gloo's threads on a processor that is busy: they let
#: go of the last tensors when the interpreter is being torn down. Ended by `sys.exit`, 27 of 40 such processes aborted
#: ("terminate called without an active exception"; torch 2.14, Python 3.11).
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
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux lets a thread wait for an idle processor"
)
@pytest.mark.parametrize(("how", "printed"), [("leave", "worked "), ("command", "worked hooked ")])
def test_a_group_that_is_held_aborts_no_process_that_ends(how: str, printed: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS, how], capture_output=True, text=True, timeout=200)
    assert done.stderr.split() == ["3"] * 20, done.stderr
    assert done.stdout == printed * 20
