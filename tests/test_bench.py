"""Every benchmark runs (in small) and prints one JSON line with the agreed fields; the arithmetic behind the line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parent / "bench"
SCRIPTS = sorted(p for p in BENCH.glob("*.py") if not p.name.startswith("_"))
FIELDS = {
    "claim",
    "ours",
    "rival",
    "unit",
    "ratio",
    "target",
    "better",
    "holds",
    "runs",
    "machine",
    "versions",
}


@pytest.fixture(scope="module")
def harness(load_script: Callable[[Path, str], ModuleType]) -> ModuleType:
    return load_script(BENCH / "_harness.py", "_harness")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_benchmark_prints_its_line(script: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(script), "--tiny", "--runs", "1"], capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = run.stdout.splitlines()
    record = json.loads(line)
    if "skipped" in record:
        pytest.skip(f"{record['claim']}: {record['skipped']}")
    assert set(record) >= FIELDS, sorted(FIELDS - set(record))
    assert record["better"] in ("higher", "lower")
    for part in record.get("parts", [record]):
        good = (
            part["ratio"] >= part["target"] if part["better"] == "higher" else part["ratio"] <= part["target"]
        )
        assert part["holds"] == good
        assert part["ours"] > 0
        assert part["rival"] > 0


def test_ratio_is_the_median_of_the_pairs_and_better_gives_its_direction(harness: ModuleType) -> None:
    """The last pair ran while the machine was twice as slow, which a ratio of medians would not survive."""
    ours, rival = [1.0, 1.1, 2.4], [1.0, 1.0, 2.0]
    part = harness.Part("time", ours, rival, "s", 1.1, "lower")
    assert part.ratio == pytest.approx(1.1)
    assert part.holds
    assert not harness.Part("time", ours, rival, "s", 1.05, "lower").holds
    assert harness.Part("speed", ours, rival, "1/s", 1.05, "higher").holds
    assert part.to_json()["ours"] == 1.1
    assert part.to_json()["runs"] == 3


def test_pairs_alternate_and_warm_up_does_not_count(harness: ModuleType) -> None:
    order: list[str] = []

    def side(name: str):
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    a, b = harness.paired([side("a"), side("b")], runs=2, warm_up=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert (a, b) == ([4.0, 5.0], [3.0, 6.0])
    (timed,) = harness.paired([lambda: torch.ones(1)], runs=3)
    assert len(timed) == 3
    assert min(timed) > 0


def test_a_claim_holds_if_all_its_parts_do(harness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    good = harness.Part("time", [1.0], [2.0], "s", 1.1, "lower")
    bad = harness.Part("memory", [1.0], [2.0], "MiB", 0.1, "lower")
    harness.emit("c", good, bad)
    record = json.loads(capsys.readouterr().out)
    assert record["holds"] is False
    assert [p["holds"] for p in record["parts"]] == [True, False]
    assert record["ratio"] == 0.5
    harness.skip("c", harness.missing("no_such_rival", "json"))
    skipped = json.loads(capsys.readouterr().out)["skipped"]
    assert "no_such_rival" in skipped
    assert "json" not in skipped


_HOLDS_40_TAKES_24 = """
import _harness, torch
def prepare():
    held = torch.ones(40 * 2**18)
    def step():
        assert float(torch.ones(24 * 2**18)[0] + held[0]) == 2.0
    return step
if __name__ == "__main__":
    large = torch.ones(256 * 2**18)
    print(_harness.peak_memory(prepare))
"""


@pytest.mark.slow
def test_peak_memory_is_what_the_step_takes_above_its_inputs(tmp_path: Path) -> None:
    """Also when the measuring process is itself larger than that, at which ru_maxrss of a child would start."""
    script = tmp_path / "measure.py"
    script.write_text(_HOLDS_40_TAKES_24)
    run = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(BENCH)},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert 22 <= float(run.stdout) <= 32
