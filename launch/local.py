"""Starts a run's processes on this machine through torchrun and waits for them.

The chain is launcher → torchrun → one worker a rank. If the launcher is killed, torchrun gets SIGTERM and
stops the workers in order; if torchrun is killed, the kernel kills the workers. So nothing is left behind.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from ringweave.launch.worker import exit_note, rank_log
from ringweave.parallel.process import die_with_parent
from ringweave.pretrain.run_folder import write_json
from ringweave.tokenizers.errors import EXIT_RESUMABLE

#: Seconds that ranks get after SIGTERM or Ctrl-C to write a last checkpoint, unless told otherwise.
GRACE = 60.0

# torchrun's own lines: "E1125 01:45:12.3 77 torch/distributed/elastic/… failed (exitcode: 3) local_rank: 1 …"
_AGENT_LINE = re.compile(r"^[EWI]\d{4} .*torch/distributed/(elastic|run)")
_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")


def launch_local(
    argv: Sequence[str],
    *,
    nproc: int,
    run_dir: Path | None,
    log_dir: Path,
    env: Mapping[str, str] | None = None,
    grace: float = GRACE,
    entry: str = "ringweave.launch.cli",
) -> int:
    """Runs `ringweave ARGV…` on `nproc` local processes; returns the run's exit code.

    argv: command line without the program name, as ["train", "run.yaml"].
    run_dir: folder whose `exit.json` (written by the trainer) tells the exit code that torchrun hides.
    log_dir: `attempt-K/rank-R.log` is written there for every rank but 0, whose output comes to the terminal.
    env: environment of the processes; this process's when None. OMP_NUM_THREADS is 1 unless set.
    grace: seconds between a forwarded signal and SIGKILL.
    entry: module whose `run(argv)` each rank calls.

    The code is that of the first rank that failed (128 + n if signal n killed it), unless `exit.json`
    knows better.
    """
    attempt_dir = _new_attempt(log_dir)
    before = _fingerprint(run_dir)
    watch = _Watch(attempt_dir / "torchrun.log")
    process = subprocess.Popen(
        _command([entry, *argv], nproc=nproc, attempt_dir=attempt_dir),
        env=_environment(env, grace=grace),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches only the launcher, which forwards it once
        preexec_fn=functools.partial(_tie_to_parent, os.getpid()),
    )
    assert process.stderr is not None
    pump = threading.Thread(target=watch.pump, args=(process.stderr,), daemon=True)
    pump.start()
    with _forwarding(process, grace=grace) as forwarded:
        status = process.wait()
    pump.join(timeout=5)
    return _verdict(
        status,
        nproc=nproc,
        attempt_dir=attempt_dir,
        run_dir=run_dir,
        before=before,
        watch=watch,
        stopped=bool(forwarded),
    )


def _command(argv: Sequence[str], *, nproc: int, attempt_dir: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(nproc),
        "-m",
        "ringweave.launch.worker",
        str(attempt_dir.resolve()),
        *argv,
    ]


def _environment(env: Mapping[str, str] | None, *, grace: float) -> dict[str, str]:
    out = dict(os.environ if env is None else env)
    out.setdefault("OMP_NUM_THREADS", "1")
    # torchrun kills workers 30 s after it forwarded a signal; a checkpoint may take longer.
    out.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(max(1, int(grace))))
    return out


def _tie_to_parent(launcher: int) -> None:
    """Runs in the child before torchrun: SIGTERM when the launcher dies, even if it died in between."""
    die_with_parent(signal.SIGTERM, launcher)


def _new_attempt(log_dir: Path) -> Path:
    """Makes `log_dir/attempt-K` with the next free K, from 0."""
    log_dir.mkdir(parents=True, exist_ok=True)
    numbers = [int(p.name[8:]) for p in log_dir.glob("attempt-*") if p.name[8:].isdigit()]
    number = max(numbers, default=-1) + 1
    while True:
        try:
            (log_dir / f"attempt-{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return log_dir / f"attempt-{number}"


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[bytes], *, grace: float) -> Iterator[list[int]]:
    """Forwards the first SIGTERM or SIGINT to torchrun, which passes it to each worker; kills after `grace`.

    Yields the list of forwarded signals. Only the main thread can catch signals; elsewhere nothing is done.
    """
    seen: list[int] = []
    timers: list[threading.Timer] = []

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the workers follow by their parent-death signal

    def forward(number: int, _frame: FrameType | None) -> None:
        if seen:
            return
        seen.append(number)
        print(
            f"received {signal.Signals(number).name}; the ranks have {grace:g} s to stop",
            file=sys.stderr,
            flush=True,
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        # A little longer than torchrun's own limit, so that it gets the chance to name who did not stop.
        timer = threading.Timer(grace + 5, kill)
        timer.daemon = True
        timer.start()
        timers.append(timer)

    old: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        for timer in timers:
            timer.cancel()
        if process.poll() is None:  # leaving through an exception
            kill()
            process.wait()


@dataclass
class _Watch:
    """Passes torchrun's stderr (rank 0's is in it) on to ours, keeps its chatter in a file, remembers the failure."""

    log: Path
    failure: tuple[int, int] | None = None  # (rank, exit code; negative is a signal)
    told: bool = False  # whether a rank said what went wrong, here on the terminal
    _ended: bool = field(default=False, repr=False)

    def pump(self, stream: IO[bytes]) -> None:
        """Reads `stream` to its end, line by line."""
        with open(self.log, "w", encoding="utf-8") as log:
            for raw in iter(stream.readline, b""):
                line = raw.decode("utf-8", errors="replace")
                if self._is_chatter(line):
                    log.write(line)
                    log.flush()
                else:
                    self.told = self.told or line.startswith("error (rank ")
                    sys.stderr.write(line)
                    sys.stderr.flush()

    def _is_chatter(self, line: str) -> bool:
        if _AGENT_LINE.match(line):
            match = _FAILED.search(line)
            if match and self.failure is None:
                self.failure = (int(match[2]), int(match[1]))
            return True
        # After a failure or a signal torchrun ends with its own traceback, which tells the user nothing.
        if self.failure is not None and line.startswith("Traceback (most recent call last)"):
            self._ended = True
        return self._ended


def _fingerprint(run_dir: Path | None) -> tuple[int, int] | None:
    """Identity of `exit.json`, to tell one written now from one of an earlier attempt without clocks."""
    if run_dir is None:
        return None
    try:
        status = (run_dir / "exit.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def read_exit(run_dir: Path) -> dict[str, Any] | None:
    """`exit.json` of a run, {"exit_code", "reason", "step", "attempt"}; None when missing or unreadable."""
    try:
        value = json.loads((run_dir / "exit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("exit_code"), int) else None


def _notes(attempt_dir: Path, nproc: int) -> list[dict[str, Any]]:
    """What ranks left about their end, earliest first."""
    found = []
    for rank in range(nproc):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(exit_note(attempt_dir, rank).read_text(encoding="utf-8")))
    return sorted(found, key=lambda note: note["time"])


def _verdict(
    status: int,
    *,
    nproc: int,
    attempt_dir: Path,
    run_dir: Path | None,
    before: tuple[int, int] | None,
    watch: _Watch,
    stopped: bool,
) -> int:
    """The exit code of the run, and on failure a message naming the first rank that failed and its log."""
    fresh = None
    if run_dir is not None and _fingerprint(run_dir) not in (None, before):
        fresh = read_exit(run_dir)
    notes = _notes(attempt_dir, nproc)
    if status == 0:
        return 0
    bad = next((note for note in notes if note["exit_code"] != 0), None)
    # A rank that died without a word (signal, abort in C) is seen only by torchrun; its view comes first.
    rank, code = watch.failure or ((bad["rank"], bad["exit_code"]) if bad else (None, 1))
    first = 128 - code if code < 0 else code
    # When a rank fails, torchrun asks the others to stop, and theirs may be the exit.json: an orderly stop
    # (75) that nobody but torchrun asked for is not the outcome.
    if fresh is not None and (
        stopped or fresh["exit_code"] not in (0, EXIT_RESUMABLE) or first == EXIT_RESUMABLE
    ):
        final = int(fresh["exit_code"])
    else:
        final = first
    if fresh is not None and code < 0 and (fresh.get("kind"), fresh.get("rank")) == ("gone", rank):
        # The others only saw it gone; which signal it was is known here.
        final = first
        with contextlib.suppress(OSError):
            assert run_dir is not None
            write_json(run_dir / "exit.json", {**fresh, "exit_code": final, "signal": _signal_name(code)})
    # Ranks that stopped in order (75) have not failed.
    if final not in (0, EXIT_RESUMABLE):
        _tell_failure(rank, code, attempt_dir=attempt_dir, record=fresh or {}, told=watch.told)
    return final


def _signal_name(code: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _tell_failure(
    rank: int | None, code: int, *, attempt_dir: Path, record: Mapping[str, Any], told: bool
) -> None:
    """The verdict, once: what exit.json says unless a rank said it on the terminal, who failed first, the logs.

    record: the run's exit.json, or empty.
    """
    lines = []
    culprit = record.get("rank") if isinstance(record.get("rank"), int) else rank
    if "what" in record and not told:
        lines.append(f"error: {record['what']}")
        lines += [
            f"  {part + ':':<6} {record[part]}" for part in ("where", "why", "next") if record.get(part)
        ]
    elif "what" not in record and rank is None:
        lines.append("error: the run failed")
    if code < 0 and rank is not None and (culprit == rank and record.get("kind", "gone") == "gone"):
        lines.append(f"error: rank {rank} was killed by {_signal_name(code)}")
    elif "what" not in record and rank is not None:
        lines.append(f"error: rank {rank} failed first, exit code {code}")
    if "what" not in record and record.get("reason"):
        lines.append(f"  why:   {record['reason']}")
    log = rank_log(attempt_dir, culprit) if culprit is not None and culprit >= 0 else attempt_dir
    where = str(log) if log.exists() else "its output is above"
    lines.append(f"  logs:  {where}; torchrun's own in {attempt_dir / 'torchrun.log'}")
    print("\n".join(lines), file=sys.stderr, flush=True)
