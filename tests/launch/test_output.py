"""What a command prints cannot change what it does: full disks, closed streams and readers that went away."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from ringweave.parallel.process import LossyStream

pytestmark = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="there is no device that is always full"
)
COMMAND = [sys.executable, "-m", "ringweave.launch.cli"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_that_cannot_be_written_is_no_success_and_no_bug(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 120
    assert done.stderr == "warning: what is printed is lost: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("place", ["full", "closed"])
def test_an_error_that_cannot_be_said_keeps_its_exit_code(place: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "train", "nothere.yaml"],
            stdout=subprocess.PIPE,
            stderr=full,
            timeout=60,
            preexec_fn=None if place == "full" else lambda: os.close(2),
        )
    assert done.returncode == 2


def test_a_closed_stdout_is_nobodys_loss() -> None:
    done = subprocess.run([*COMMAND, "--version"], timeout=60, preexec_fn=lambda: os.close(1))
    assert done.returncode == 0


#: A rank whose log is full, or whose reader is gone, and what it was to do.
RANK = """
import os, sys
from ringweave.launch import worker
from ringweave.parallel.process import leave

class Job:
    def run(self, argv):
        for step in range(3):
            print("step", step, flush=True)
            print("step", step, file=sys.stderr, flush=True)
        open(argv[0], "w").write("three steps")
        return 75

sys.modules["job"] = Job()
leave(worker.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("lost", ["full", "reader"])
def test_a_log_that_cannot_be_written_ends_no_job(lost: str, tmp_path) -> None:
    if lost == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, out = os.pipe()
        os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", RANK, str(tmp_path), "job", str(tmp_path / "did")],
        stdout=out,
        stderr=out,
        timeout=60,
        env=os.environ | {"RANK": "0"},
    )
    os.close(out)
    assert (tmp_path / "did").read_text() == "three steps"
    assert done.returncode == 75


def test_a_stream_is_written_as_before_and_tells_once_what_it_lost() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            if "lost" in text:
                raise OSError(28, "No space left on device")
            return super().write(text)

    told, inner = io.StringIO(), Full()
    stream = LossyStream(inner, told=told)
    for text in ("one ", "lost", "two ", "lost", "three"):
        print(text, end="", file=stream)
    assert inner.getvalue() == "one two three"
    assert told.getvalue().count("warning") == 1
    assert isinstance(stream.lost, OSError)
    with pytest.raises(TypeError):
        stream.write(b"no text")  # type: ignore[arg-type]
