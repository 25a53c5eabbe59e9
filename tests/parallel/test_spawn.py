"""Ranks on this machine: their results, their failures by name, and their end with the command that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from ringweave.parallel.spawn import WorkersFailed, run_ranks


def fall(rank: int) -> int:
    """This rank's number, but rank `rank` is killed by a signal of its own."""
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSEGV)
    return dist.get_rank()


def hold(place: str) -> None:
    """Says which process this is, and stays."""
    (Path(place) / str(os.getpid())).touch()
    time.sleep(600)


def meet(rank: int, how: str) -> None:
    """All ranks meet twice, but rank `rank` ends before the second time."""
    dist.barrier()
    if dist.get_rank() == rank:
        if how == "error":
            raise KeyError("no such thing")
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


@pytest.mark.slow
def test_a_rank_that_dies_of_a_signal_is_named_and_says_where(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkersFailed, match="rank 1 of 2:\nkilled by SIGSEGV"):
        run_ranks(2, fall, 1, timeout=100)
    printed = capfd.readouterr().err
    assert "Segmentation fault" in printed and "in fall" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"), [("signal", "killed by SIGSEGV"), ("error", "KeyError: 'no such thing'")]
)
def test_the_rank_that_failed_first_is_said_first(how: str, said: str) -> None:
    """Of a log that is cut, the first lines survive; the others only lost their peer."""
    with pytest.raises(WorkersFailed) as caught:
        run_ranks(3, meet, 2, how, timeout=100)
    first, *blocks = str(caught.value).split("\n--- rank ")
    assert first == f"3 of 3 ranks failed, rank 2 first: {said}"
    cause, *others = (block.splitlines() for block in blocks)
    assert cause[0] == "2 of 3:" and (how == "signal" or any("in meet" in line for line in cause))
    assert {lines[0] for lines in others} == {"0 of 3:", "1 of 3:"}
    assert all(len(lines) == 2 for lines in others), "one line of each that lost its peer"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a process with its parent")
def test_ranks_do_not_outlive_the_command_that_started_them(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_spawn as t; "
    code += f"t.run_ranks(2, t.hold, {str(tmp_path)!r}, timeout=600)"
    command = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while len(found := list(tmp_path.iterdir())) < 2:
        assert command.poll() is None and time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    ranks = [psutil.Process(int(path.name)) for path in found]
    command.kill()
    command.wait()
    assert not psutil.wait_procs(ranks, timeout=20)[1], "ranks outlived their command"
