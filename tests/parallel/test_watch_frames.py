"""The frames of another thread can be walked while it runs: a run of weeks does that twice a second on every rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_frames_of_a_running_thread_can_be_walked() -> None:
    script = Path(__file__).parent / "walk_frames.py"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 50
