"""What torchrun starts on each rank: own log file, death with the parent, then the ordinary command line.

    python -m ringweave.launch.worker LOG_DIR ringweave.launch.cli train CONFIG …

Rank 0 keeps the terminal. Other ranks write to `LOG_DIR/rank-R.log`. Every rank that ends in Python leaves
`LOG_DIR/exit-rank-R.json`, from which the launcher names the first one that failed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from ringweave.parallel.process import die_with_parent, leave, print_on


def rank_log(log_dir: Path, rank: int) -> Path:
    """Where rank `rank` writes its output."""
    return log_dir / f"rank-{rank}.log"


def exit_note(log_dir: Path, rank: int) -> Path:
    """Where rank `rank` leaves its exit code."""
    return log_dir / f"exit-rank-{rank}.json"


def redirect_output(path: Path) -> None:
    """Sends stdout and stderr, also of C code, to `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def main(argv: list[str]) -> int:
    """Runs one rank; returns the exit code. `argv`: log folder, module with `run(argv)`, command line."""
    die_with_parent(signal.SIGKILL)
    log_dir, rank = Path(argv[0]), int(os.environ["RANK"])
    log_dir.mkdir(parents=True, exist_ok=True)
    if rank != 0:
        redirect_output(rank_log(log_dir, rank))
    print_on(log=True)  # a full log, or a reader that went away, is no reason to lose a job
    faulthandler.enable()
    code = 1
    try:
        code = importlib.import_module(argv[1]).run(argv[2:])
    finally:
        note = {"rank": rank, "exit_code": code, "time": time.time()}
        with contextlib.suppress(OSError):
            exit_note(log_dir, rank).write_text(json.dumps(note), encoding="utf-8")
    return code


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
