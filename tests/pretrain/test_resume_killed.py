"""A job killed with SIGKILL and resumed on other ranks and workers: the trimmed form of tests/prove/data_resume.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROOF = Path(__file__).parents[1] / "prove" / "data_resume.py"


@pytest.mark.slow
def test_a_killed_job_reads_what_an_unbroken_one_reads() -> None:
    """Around the stage change, at an epoch end, with open packs and while the cursor is written; four kills."""
    done = subprocess.run(
        [sys.executable, str(PROOF), "--tiny"], capture_output=True, text=True, timeout=550, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["holds"] is True
    assert found["kills"] == 4
    assert (found["different"], found["lost"], found["repeated"]) == (0, 0, 0)
    assert found["steps"] > 100
    assert found["at the stage change"] > 0
    assert found["at an epoch end"] > 0
