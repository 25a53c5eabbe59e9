"""Where ranks leave their marks for each other: a folder all of them see, or the job's TCPStore.

Neither needs the rank that left a mark to be alive when it is read. The folder is the run's, which checkpoints
share anyway; the store lives in torchrun's agent, so it also outlives any rank (under a launcher where rank 0 holds
the store, the folder remains). `Watchdog` uses both and takes the newer word, so a job may have only one of them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch.distributed as dist


class Board(Protocol):
    """One shared place. Calls may raise OSError or RuntimeError, or block on a dead mount; `Watchdog` survives both."""

    def publish(self, rank: int, text: str) -> None:
        """Replace the mark of `rank`."""

    def marks(self) -> dict[int, str]:
        """The latest mark of every rank that left one."""

    def alarm(self) -> str | None:
        """The alarm that was raised, if any."""

    def raise_alarm(self, text: str) -> str:
        """Raise the alarm unless one stands; gives the one that stands."""


class FolderBoard:
    """`rank-R.json` and `alarm-TOKEN.json` in a folder; every write is whole or not there.

    token: tells this start of the job from earlier ones in the same folder.
    """

    def __init__(self, path: Path, *, world: int, token: str) -> None:
        self.path, self.world, self.token = path, world, token

    def publish(self, rank: int, text: str) -> None:
        """See Board. Not fsynced: a mark matters while the machine is up."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".rank-{rank}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / f"rank-{rank}.json")

    def marks(self) -> dict[int, str]:
        """See Board. A file may be of an earlier start; marks name theirs."""
        found = {}
        for rank in range(self.world):
            with contextlib.suppress(OSError):
                found[rank] = (self.path / f"rank-{rank}.json").read_text(encoding="utf-8")
        return found

    @property
    def _alarm(self) -> Path:
        return self.path / f"alarm-{self.token}.json"

    def alarm(self) -> str | None:
        """See Board."""
        try:
            return self._alarm.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def raise_alarm(self, text: str) -> str:
        """See Board. A hard link is made by one rank only, with the whole content already in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".alarm-{socket.gethostname()}-{os.getpid()}.tmp"
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, self._alarm)
        except FileExistsError:
            return self._alarm.read_text(encoding="utf-8")
        except OSError:  # no hard links here: the last writer of the same moment wins
            if not self._alarm.exists():
                os.replace(temporary, self._alarm)
            return self._alarm.read_text(encoding="utf-8")
        finally:
            temporary.unlink(missing_ok=True)
        return text

    def clear(self) -> None:
        """Remove what earlier starts left; rank 0 calls it before the others begin."""
        for pattern in ("alarm-*.json", "rank-*.json", "stack-*.txt", ".*.tmp"):
            for file in self.path.glob(pattern):
                with contextlib.suppress(OSError):
                    file.unlink()


class StoreBoard:
    """The same in a torch store. It needs a connection of its own: a client that waits blocks all its threads."""

    def __init__(self, store: dist.Store, *, world: int, token: str) -> None:
        self.store, self.world = dist.PrefixStore(f"ringweave-watch-{token}", store), world

    @classmethod
    def connect(cls, host: str, port: int, *, world: int, token: str, timeout: float = 2.0) -> StoreBoard:
        """A client of the TCPStore at host:port. Raises RuntimeError when nobody answers."""
        limit = timedelta(seconds=timeout)
        return cls(dist.TCPStore(host, port, is_master=False, timeout=limit), world=world, token=token)

    def publish(self, rank: int, text: str) -> None:
        """See Board."""
        self.store.set(f"mark-{rank}", text)

    def marks(self) -> dict[int, str]:
        """See Board."""
        keys = {rank: f"mark-{rank}" for rank in range(self.world)}
        there = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: self.store.get(key).decode() for rank, key in there.items()}

    def alarm(self) -> str | None:
        """See Board."""
        return self.store.get("alarm").decode() if self.store.check(["alarm"]) else None

    def raise_alarm(self, text: str) -> str:
        """See Board."""
        return self.store.compare_set("alarm", "", text).decode()


# --- processes of this machine -------------------------------------------------------------------------------


@functools.cache
def place() -> str:
    """Names the machine and process namespace: a pid means the same process only where this is equal."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def process_stat(pid: int) -> tuple[str, str] | None:
    """(state letter, start time) of a process from /proc; None when there is none, or no /proc."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return after_name[0], after_name[19]


def process_health(pid: int, started: str) -> str | None:
    """ "gone", "stopped" or "running" for a process of this machine; None where that cannot be told."""
    if not started:
        return None
    stat = process_stat(pid)
    if stat is None or stat[1] != started or stat[0] in "ZX":
        return "gone"
    return "stopped" if stat[0] in "Tt" else "running"


def end_process(pid: int, started: str) -> bool:
    """SIGKILL that very process, told from a later one with its pid by `started`; whether it was there."""
    stat = process_stat(pid)
    if pid == os.getpid() or stat is None or not started or stat[1] != started:
        return False
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False
