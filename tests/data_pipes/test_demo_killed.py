"""The processes that build demo data end with a command that is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest


@pytest.mark.slow
def test_builders_do_not_outlive_the_command_that_started_them(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from ringweave.data_pipes.demo import build_demo; "
    code += "build_demo(Path(sys.argv[1]), workers=2)"
    command = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data")])
    family, deadline = psutil.Process(command.pid), time.monotonic() + 60
    builders: list[psutil.Process] = []
    while len(builders) < 2:
        assert command.poll() is None and time.monotonic() < deadline, "the builders did not start"
        time.sleep(0.1)
        builders = [c for c in family.children() if any("spawn_main" in part for part in c.cmdline())]
    time.sleep(3)  # past the start of each
    command.kill()
    command.wait()
    left = psutil.wait_procs(builders, timeout=20)[1]
    for process in left:
        process.kill()
    assert not left, "builders outlived their command"
