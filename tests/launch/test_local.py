"""The local launcher over real torchrun processes: exit codes, logs, signals, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringweave.launch.local import launch_local, read_exit
from ringweave.launch.worker import rank_log

# What the ranks run instead of a training: small, no torch, and as ill-behaved as each test needs.
STUB = """
import json, os, signal, sys, time
from pathlib import Path

def write(folder, code, reason):
    record = {"exit_code": code, "reason": reason, "step": 3, "attempt": 0}
    (folder / "exit.json").write_text(json.dumps(record))

def run(argv):
    what, folder = argv[0], Path(argv[1])
    rank = int(os.environ["RANK"])
    print(f"hello from rank {rank}", flush=True)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if what == "ok":
        return 0
    if what == "data" and rank == 1:
        return 3
    if what == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hidden":
        time.sleep(0.2 if rank else 0)
        if rank == 0:
            write(folder, 4, "NaN")
        return 1
    count = [0]
    def stop(number, frame):
        count[0] += 1
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    (folder / f"ready-{rank}").touch()
    until = time.time() + 60
    while not count[0] and time.time() < until:
        time.sleep(0.05)
    time.sleep(1.0)
    (folder / f"signals-{rank}").write_text(str(count[0]))
    if rank == 0:
        write(folder, 75, "SIGTERM")
    return 75
"""

START = """
import sys
from pathlib import Path
from ringweave.launch.local import launch_local
folder = Path(sys.argv[2])
argv = [sys.argv[1], str(folder)]
sys.exit(launch_local(argv, nproc=2, run_dir=folder, log_dir=folder / "logs", entry="rank_stub"))
"""


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """Environment in which `rank_stub` can be imported."""
    (tmp_path / "rank_stub.py").write_text(STUB)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def start(what: str, folder: Path, env: dict[str, str]) -> int:
    return launch_local(
        [what, str(folder)], nproc=2, run_dir=folder, log_dir=folder / "logs", env=env, entry="rank_stub"
    )


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition, *, seconds: float = 40.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_success_and_one_log_for_each_other_rank(tmp_path: Path, stub: dict[str, str]) -> None:
    assert start("ok", tmp_path, stub) == 0
    assert rank_log(tmp_path / "logs" / "attempt-0", 1).read_text().strip() == "hello from rank 1"
    assert start("ok", tmp_path, stub) == 0
    assert (tmp_path / "logs" / "attempt-1" / "rank-1.log").exists()


@pytest.mark.slow
def test_exit_code_of_the_first_failing_rank_and_its_log(
    tmp_path: Path, stub: dict[str, str], capsys
) -> None:
    # An exit.json of an earlier attempt must not decide.
    (tmp_path / "exit.json").write_text(
        json.dumps({"exit_code": 75, "reason": "old", "step": 1, "attempt": 0})
    )
    assert start("data", tmp_path, stub) == 3
    said = capsys.readouterr().err
    assert "rank 1 failed first, exit code 3" in said
    assert str(tmp_path / "logs" / "attempt-0" / "rank-1.log") in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_killed_rank_is_named(tmp_path: Path, stub: dict[str, str], capsys) -> None:
    assert start("killed", tmp_path, stub) == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL" in capsys.readouterr().err


def test_exit_json_tells_what_torchrun_hides(tmp_path: Path, stub: dict[str, str], capsys) -> None:
    assert start("hidden", tmp_path, stub) == 4
    assert read_exit(tmp_path) == {"exit_code": 4, "reason": "NaN", "step": 3, "attempt": 0}
    assert "why:   NaN" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_reaches_every_rank_once(tmp_path: Path, stub: dict[str, str], number: int) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", START, "wait", str(tmp_path)], env=stub)
    assert wait_for(lambda: all((tmp_path / f"ready-{r}").exists() for r in (0, 1)))
    launcher.send_signal(number)
    assert launcher.wait(timeout=40) == 75
    assert [(tmp_path / f"signals-{r}").read_text() for r in (0, 1)] == ["1", "1"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux")
def test_nothing_outlives_a_killed_launcher(tmp_path: Path, stub: dict[str, str]) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", START, "wait", str(tmp_path)], env=stub)
    assert wait_for(lambda: all((tmp_path / f"ready-{r}").exists() for r in (0, 1)))
    pids = [int((tmp_path / f"pid-{r}").read_text()) for r in (0, 1)]
    assert all(alive(pid) for pid in pids)
    launcher.kill()
    launcher.wait()
    assert wait_for(lambda: not any(alive(pid) for pid in pids)), "workers outlived the launcher"
    # It was an orderly stop: torchrun passed its parent-death SIGTERM on, and the ranks could save.
    assert (tmp_path / "signals-0").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux")
@pytest.mark.slow
def test_nothing_outlives_a_killed_torchrun(tmp_path: Path, stub: dict[str, str]) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", START, "wait", str(tmp_path)], env=stub)
    assert wait_for(lambda: all((tmp_path / f"ready-{r}").exists() for r in (0, 1)))
    pids = [int((tmp_path / f"pid-{r}").read_text()) for r in (0, 1)]
    status = Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()
    os.kill(int(status[1]), signal.SIGKILL)
    assert wait_for(lambda: not any(alive(pid) for pid in pids), seconds=10)
    assert launcher.wait(timeout=20) == 1
