"""A rank that dies, stops, hangs or fails ends all ranks within the timeout, and everything names it.

Real jobs of the local launcher over gloo, on the synthetic corpus; what goes wrong is done to them from outside (a
signal to a rank's process) or by a corpus that misbehaves on one rank.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ringweave.parallel.watch_verdict import PHASES
from ringweave.tokenizers.errors import EXIT_DATA, EXIT_HANG

TIMEOUT = 6.0
#: Seconds from the fault to the end of every process: the timeout, the watch's grace and patience, torchrun's end,
#: and a loaded machine.
LIMIT = TIMEOUT + 14

ENTRY = """
import datetime, sys, time
from pathlib import Path
from ringweave.pretrain import job
from ringweave.pretrain.config import config_from_dict
from ringweave.pretrain.synthetic import SyntheticCorpus
from ringweave.pretrain.verify import VOCAB, tiny_config
from ringweave.tokenizers.errors import DataError
import os

class Corpus(SyntheticCorpus):
    count = 0

    def document(self, piece):
        self.count += 1
        if os.environ["RANK"] == "1" and self.count == 40:
            if self.what in ("sleep", "never"):
                time.sleep(600)
            if self.what == "data":
                raise DataError("a sample cannot be read", where="text-0000.tar#17", why="bad bytes")
            if self.what == "bug":
                raise KeyError("no such thing")
        return super().document(piece)

def run(argv):
    what, place, world, layout, timeout = argv
    values = tiny_config(Path(place), "run", world=1).to_dict()
    axes = {axis[:2]: int(axis[2:]) for axis in layout.split(",")}
    values["stages"] = [{"context": 64, "batch": 4, "tokens": "100M", "layout": axes}]
    values["checkpoint"] = {"every": "1000000 steps"}
    values["timeout"] = {"collective": float(timeout), "start": 60.0, "stop": 60.0}
    if what == "never":  # collectives that never give up, as NCCL's may not
        job.timedelta = lambda seconds: datetime.timedelta(hours=1)
    corpus = Corpus(vocab=VOCAB)
    corpus.what = what
    return job.run_rank(config_from_dict(values, source="test"), lambda: (corpus, VOCAB, "0" * 64))
"""

START = """
import sys
from pathlib import Path
from ringweave.launch.local import launch_local
argv, run = sys.argv[1:], Path(sys.argv[2]) / "run"
sys.exit(launch_local(argv, nproc=int(argv[2]), run_dir=run, log_dir=run / "logs", entry="hanging_job"))
"""


class Job:
    """A started job and what it leaves."""

    def __init__(self, place: Path, what: str, world: int, layout: str) -> None:
        (place / "hanging_job.py").write_text(ENTRY)
        paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.run, self.world, self.what = place / "run", world, what
        self.pids: list[int] = []
        argv = [what, str(place), str(world), layout, str(TIMEOUT)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *argv],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def marks(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self.world):
            path = self.run / "ranks" / f"rank-{rank}.json"
            if path.exists():
                found[rank] = json.loads(path.read_text())
        return found

    def until_step(self, step: int) -> dict[int, dict[str, Any]]:
        """Wait until every rank is past `step`; gives the marks and remembers the processes."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            marks = self.marks()
            if len(marks) == self.world and all(m["step"] >= step for m in marks.values()):
                self.pids = [m["pid"] for m in marks.values()]
                return marks
            time.sleep(0.05)
        raise AssertionError(f"the job did not get to step {step}: {self.process.communicate()[0]}")

    def end(self) -> tuple[int, str, dict[str, Any], float]:
        """Exit code, everything printed, exit.json, seconds; no process may be left."""
        began = time.monotonic()
        said, _ = self.process.communicate(timeout=120)
        took = time.monotonic() - began
        alive = [p for p in self.pids if _alive(p)]
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        assert not alive, f"processes left: {alive}\n{said}"
        return self.process.returncode, said, json.loads((self.run / "exit.json").read_text()), took

    def log(self, rank: int) -> str:
        return (self.run / "logs" / "attempt-0" / f"rank-{rank}.log").read_text()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _named(said: str, record: dict[str, Any], rank: int) -> None:
    """The verdict is printed once, names the rank with step and phase, and exit.json agrees."""
    step, phase = record["step"], record["phase"]
    assert record["rank"] == rank, record
    assert phase in PHASES.values()
    assert f"in step {step}, {phase}" in said, said
    assert said.count(record["what"]) == 1, said
    assert "Traceback" not in said
    assert record["what"].startswith(f"rank {rank} ") or record["error"] == "DataError"


CASES = [
    pytest.param(2, "dp2", 1, id="dp2"),
    pytest.param(2, "sp2", 0, id="sp2, rank 0", marks=pytest.mark.slow),
    pytest.param(4, "pp2,tp2", 3, id="pp2·tp2", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout", "rank"), CASES)
def test_a_stopped_rank_is_named(tmp_path: Path, world: int, layout: str, rank: int) -> None:
    job = Job(tmp_path, "ok", world, layout)
    marks = job.until_step(3)
    os.kill(marks[rank]["pid"], signal.SIGSTOP)
    code, said, record, took = job.end()
    assert code == record["exit_code"] == EXIT_HANG, said
    assert took < LIMIT
    _named(said, record, rank)
    assert record["kind"] == "stopped"
    assert record["error"] == "HangError"
    assert record["step"] >= marks[rank]["step"]
    # The one that waited says for what, and how long.
    assert f"rank {record['found_by']} waited " in record["why"], record
    assert re.search(r"in step \d+, .*(\.py:\d+ \w+|sum over the world)", record["why"]), record
    assert f"timeout.collective is {TIMEOUT:g} s" in said


@pytest.mark.slow
def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    job = Job(tmp_path, "ok", 2, "dp2")
    marks = job.until_step(3)
    os.kill(marks[1]["pid"], signal.SIGKILL)
    code, said, record, took = job.end()
    assert code == record["exit_code"] == 128 + signal.SIGKILL, said
    assert took < LIMIT
    _named(said, record, 1)
    assert (record["kind"], record["signal"]) == ("gone", "SIGKILL")
    assert "rank 1 was killed by SIGKILL" in said


@pytest.mark.slow
def test_a_rank_stuck_in_its_data_is_named_with_its_line(tmp_path: Path) -> None:
    job = Job(tmp_path, "sleep", 2, "dp2")
    job.until_step(1)
    code, said, record, took = job.end()
    assert code == record["exit_code"] == EXIT_HANG, said
    assert took < 2 * LIMIT
    _named(said, record, 1)
    assert (record["kind"], record["phase"]) == ("stuck", "data")
    assert "hanging_job.py" in record["where"] and "document" in record["where"]
    assert "sum over the world" in record["where"], "the last collective it entered"
    stack = (job.run / "ranks" / "stack-1.txt").read_text()
    assert "hanging_job.py" in stack and "in document" in stack


@pytest.mark.slow
def test_a_collective_that_never_returns_is_ended_from_outside(tmp_path: Path) -> None:
    job = Job(tmp_path, "never", 2, "dp2")
    job.until_step(1)
    code, said, record, took = job.end()
    assert code == record["exit_code"] == EXIT_HANG, said
    assert took < 2 * LIMIT
    _named(said, record, 1)
    assert record["phase"] == "data"
    assert "all_reduce" in record["ranks"][0]["doing"]
    stack = (job.run / "ranks" / "stack-0.txt").read_text()
    assert "all_reduce" in stack or "in lost" in stack, "in its wait, or just out of it by the other's end"


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_others_with_its_words(tmp_path: Path) -> None:
    job = Job(tmp_path, "data", 2, "dp2")
    job.until_step(1)
    code, said, record, took = job.end()
    assert code == record["exit_code"] == EXIT_DATA, said
    assert took < LIMIT
    assert (record["rank"], record["phase"], record["error"]) == (1, "data", "DataError")
    assert "rank 1 failed in step" in said and "a sample cannot be read (text-0000.tar#17)" in said
    assert "hanging_job.py" in record["doing"]
    assert "text-0000.tar#17" in job.log(1)
    assert said.count("error (rank 0)") == 1 and "Traceback" not in said


@pytest.mark.slow
def test_an_unexpected_exception_names_its_rank_too(tmp_path: Path) -> None:
    job = Job(tmp_path, "bug", 2, "dp2")
    job.until_step(1)
    code, said, record, _ = job.end()
    assert code == record["exit_code"] == 1, said
    assert record["rank"] == 1
    assert "rank 1 failed in step" in said and "KeyError" in said
