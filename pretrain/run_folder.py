"""A run's folder: its lease (one writer), its metrics, its ledger of consumed samples, its exit record."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from ringweave.pretrain.errors import StorageError


class RunFolder:
    """Rank 0's handle on `runs/NAME`; other ranks only use the paths."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.attempt = 0
        self._lease: TextIO | None = None

    def acquire(self) -> None:
        """Make the folder and take its lease, or raise StorageError naming who holds it.

        The lease is a kernel lock (flock): it ends with its process however that dies, and trusts no clock.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            lease = open(self.path / "run.lock", "a+")  # noqa: SIM115 - held until the process ends
        except OSError as e:
            raise StorageError(
                f"cannot write the run folder: {e.strerror}",
                where=str(self.path),
                fix="choose another run.dir",
            ) from e
        try:
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            lease.seek(0)
            holder = lease.read().strip() or "another process"
            lease.close()
            raise StorageError(
                "the run folder is already in use",
                where=str(self.path),
                why=f"held by {holder}",
                fix="wait for that job, stop it, or give this one another run.dir",
            ) from e
        lease.truncate(0)
        lease.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lease.flush()
        self._lease = lease
        self.attempt = self.attempts()

    def attempts(self) -> int:
        """How often this run was started so far."""
        return sum(1 for e in read_events(self.path / "metrics.jsonl") if e.get("event") == "start")

    def release(self) -> None:
        """Give the lease back."""
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to metrics.jsonl, whole or (if the disk is full) reported by StorageError."""
        self._append(
            "metrics.jsonl",
            {"event": event, "time": round(time.time(), 3), "attempt": self.attempt, **fields},
        )

    def consumed(self, step: int, packs: Iterable[list[list[Any]]]) -> None:
        """Append what a step was trained on: per pack, its pieces [source, epoch, sample, start, end]."""
        self._append("consumed.jsonl", {"attempt": self.attempt, "step": step, "packs": list(packs)})

    def exit(self, code: int, reason: str, *, step: int) -> None:
        """Write exit.json (atomically)."""
        write_json(
            self.path / "exit.json",
            {"exit_code": code, "reason": reason, "step": step, "attempt": self.attempt},
        )

    def _append(self, name: str, record: dict[str, Any]) -> None:
        line = json.dumps(record, allow_nan=True) + "\n"
        path = self.path / name
        try:
            with open(path, "ab+") as f:
                if f.tell() and not _ends_with_newline(f):
                    f.write(b"\n")  # an earlier attempt died inside its last line
                f.write(line.encode())
        except OSError as e:
            raise StorageError(f"cannot write: {e.strerror}", where=str(path), fix="free some space") from e


def _ends_with_newline(f: Any) -> bool:
    f.seek(-1, os.SEEK_END)
    return f.read(1) == b"\n"


def read_events(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file that are whole (a killed writer may leave half a line)."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
