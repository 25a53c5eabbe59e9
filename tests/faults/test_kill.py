"""A real job of two processes, killed by SIGKILL between two checkpoints, started again by the same command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ringweave.launch.demo import _kill_tree
from ringweave.launch.demo_proof import final_steps, ideal_stream, resume_proof
from ringweave.pretrain.config import load_config
from ringweave.pretrain.job import open_corpus
from ringweave.pretrain.run_folder import read_events
from ringweave.tokenizers.manifest import VocabularyManifest


def _start(config: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "ringweave.launch.cli", "train", config],
            start_new_session=True,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def _finish(process: subprocess.Popen[bytes], run: Path, log: Path, seconds: float = 300.0) -> None:
    """Wait for the end of a run, with code 0. One that does not end is stopped, and says how far it came."""
    try:
        code: int | None = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        code = None
        _kill_tree(process)
    steps = _steps(run)
    text = log.read_text(errors="replace")[-3000:]
    ended = f"did not end in {seconds:.0f} s" if code is None else f"ended with code {code}"
    assert code == 0, (
        f"the run {ended}; {len(steps)} steps, the last {max(steps, default=0)}; it printed:\n{text}"
    )


def _steps(run: Path) -> list[int]:
    return [e["step"] for e in read_events(run / "metrics.jsonl") if e["event"] == "step"]


@pytest.mark.slow
def test_sigkill_loses_and_repeats_nothing(job) -> None:
    job.values["stages"] = [
        {"context": 128, "batch": 2, "tokens": "2K", "layout": {"dp": 2}},
        {"context": 256, "batch": 2, "tokens": "35K", "layout": {"sp": 2}},
    ]
    # From step 41 to the end, 34 steps, none is written: a kill that comes late on a busy machine still falls between.
    job.values["checkpoint"] = {"every": "40 steps"}
    path = job.config()
    config = load_config(path)
    log = job.place / "printed.txt"
    process = _start(path, log)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None and max(_steps(job.run), default=0) < 42:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    _kill_tree(process)
    assert not psutil.wait_procs(workers, timeout=10)[1], "processes outlived the kill"
    killed_at = max(_steps(job.run))
    assert 42 <= killed_at < min(80, config.total_steps)
    assert not (job.run / "exit.json").exists()
    _finish(_start(path, log), job.run, log)
    manifest = VocabularyManifest.load(Path(config.tokenizers.dir) / "tokenizers.json")
    corpus = open_corpus(config, manifest)
    proof = resume_proof(job.run, config, corpus, killed_at)
    assert proof["steps_trained_twice"] >= 1
    assert {k: proof[k] for k in ("samples_lost", "samples_repeated", "max_loss_diff")} == {
        "samples_lost": 0, "samples_repeated": 0, "max_loss_diff": 0.0,
    }  # fmt: skip
    assert sorted(final_steps(job.run)) == list(range(1, config.total_steps + 1))
    # The proof itself: a ledger with a step missing or doubled must be seen.
    lines = (job.run / "consumed.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["packs"] = [last["packs"][0], last["packs"][0]]
    (job.run / "consumed.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    broken = resume_proof(job.run, config, corpus, killed_at)
    assert broken["samples_lost"] > 0
    assert broken["samples_repeated"] > 0
    assert len(ideal_stream(config, corpus)) == sum(s.steps * s.batch for s in config.stages)
