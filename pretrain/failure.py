"""How a rank ends when it, or another rank, cannot go on: one message, exit.json, and the exit code.

`Failure` ties the watch (parallel/watchdog.py) to a run: marks go to `RUN/ranks/` and the job's store, the first
alarm of the job decides what every rank says and returns, and the rank that raised it writes exit.json.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import threading
from typing import Any

import torch
import torch.distributed as dist

from ringweave.parallel.watch_board import Board, FolderBoard, StoreBoard
from ringweave.parallel.watch_verdict import PHASES, Alarm
from ringweave.parallel.watchdog import Watchdog
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.errors import HangError, PeerError, redact
from ringweave.pretrain.run_folder import RunFolder, write_json
from ringweave.tokenizers.errors import UserError

#: Folder, inside the run's, of marks, alarms and stacks.
RANKS = "ranks"

_NEXT = {
    "gone": "its log may say why (killed without a word: often out of memory); resume with the same command",
    "stopped": "find out who stopped it, or why its host is frozen; resume with the same command",
    "silent": "look at its host; resume with the same command",
    "stuck": "its stack is in {stack}; resume with the same command",
    "behind": "its stack is in {stack}; resume with the same command",
    "unknown": "check the network between the hosts, or raise timeout.collective; stacks are in {folder}",
    "failed": "see what that rank says; the other ranks are well",
}


class Failure:
    """One rank's way out. Without `watch()` (or with one process) it only reports what this rank raised."""

    def __init__(self, config: RunConfig, folder: RunFolder, rank: int, world: int) -> None:
        self.config, self.folder, self.rank, self.world = config, folder, rank, world
        self.attempt = 0
        self._sigterm: Any = None
        self._watch: Watchdog | None = None

    def watch(self) -> None:
        """Begin to watch, once the run folder is ours and the process group stands; every rank calls it."""
        self.attempt = self.folder.attempt
        if self.world == 1:
            return  # nobody waits for anybody
        shared = torch.tensor([secrets.randbits(62), self.attempt])
        path = self.folder.path / RANKS
        token = f"{int(shared[0]):016x}"
        if self.rank == 0:
            FolderBoard(path, world=self.world, token=token).clear()
        dist.broadcast(shared, src=0)
        token, self.attempt = f"{int(shared[0]):016x}", int(shared[1])
        boards: list[Board] = [FolderBoard(path, world=self.world, token=token)]
        with contextlib.suppress(RuntimeError, KeyError, ValueError):  # the folder alone will do
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            boards.append(StoreBoard.connect(host, port, world=self.world, token=token))
        timeout = self.config.timeout
        self._watch = Watchdog(
            rank=self.rank, world=self.world, token=token, boards=boards, timeout=timeout.collective,
            start_timeout=timeout.start, stacks=path, end=self._told,
        )  # fmt: skip
        self._watch.start()

    def done(self) -> None:
        """This rank ends in order."""
        if self._watch is not None:
            self._watch.stop()

    def shield(self) -> None:
        """Let a SIGTERM that comes after the trainer's own handling pass: this rank may have something to say.

        Launchers send one to all ranks as soon as any is gone, which must not cut off the others' verdict.
        """
        if self.world > 1 and threading.current_thread() is threading.main_thread():
            self._sigterm = signal.signal(signal.SIGTERM, lambda number, frame: None)

    def close(self) -> None:
        """Stop watching; the process ends now, however it does."""
        if self._watch is not None:
            self._watch.close()
        if self._sigterm is not None:
            signal.signal(signal.SIGTERM, self._sigterm)

    # --- ways out --------------------------------------------------------------------------------------

    def raised(self, e: UserError) -> int:
        """This rank raised `e`. Says so, tells the others, gives the exit code."""
        mine, extra = True, {}
        if self._watch is not None:
            said = f"{e.what} ({e.where})" if e.where else e.what
            alarm, mine = self._watch.failed(e, message=said, exit_code=e.exit_code)
            extra = _stand(alarm) if mine else {}
        # When another job holds the folder its exit.json is not ours to write.
        if mine and self.folder.path.is_dir() and "already in use" not in e.what:
            self._write({**e.as_dict(), "reason": e.what, "rank": self.rank, **extra})
        if self.rank == 0 or not _agreed(e):
            self._say(e)
        return e.exit_code

    def crashed(self, e: BaseException) -> None:
        """This rank raised something nobody expected: tell the others before the traceback is reported."""
        if self._watch is None:
            return
        what = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
        alarm, mine = self._watch.failed(e, message=what, exit_code=1)
        if mine:
            record = {"error": type(e).__name__, "exit_code": 1, "reason": what, "rank": self.rank}
            self._write({**record, **_stand(alarm)})

    def lost(self, e: BaseException) -> int:
        """A collective of this rank failed or timed out with `e`: name who is to blame, give the exit code."""
        if self._watch is None:
            error = HangError(
                f"rank {self.rank} waited in vain for another rank",
                why=f"the ranks did not meet within timeout.collective = {self.config.timeout.collective:.0f} s: {e}",
                fix="see which rank's log ends first; resume with the same command",
            )
            return self.raised(error)
        alarm, mine = self._watch.lost(e)
        self._told(alarm, mine)
        self._watch.end_culprit(alarm)
        return alarm.exit_code

    def _told(self, alarm: Alarm, mine: bool) -> None:
        """Say `alarm`, and write exit.json when this rank raised it (a rank that failed writes its own)."""
        error = self.verdict(alarm)
        if mine and alarm.kind != "failed":
            self._write(
                {
                    **error.as_dict(), "reason": error.what, "rank": alarm.rank, **_stand(alarm),
                    "found_by": alarm.found_by, "ranks": alarm.ranks,
                }
            )  # fmt: skip
        self._say(error)

    def verdict(self, alarm: Alarm) -> UserError:
        """`alarm` as the error that this rank ends with."""
        folder = self.folder.path / RANKS
        fix = _NEXT[alarm.kind].format(stack=folder / f"stack-{alarm.rank}.txt", folder=folder)
        parts: dict[str, Any] = {"where": alarm.where(), "why": alarm.why(), "fix": fix}
        if alarm.kind == "failed":
            return PeerError(alarm.headline(), exit_code=alarm.exit_code, **parts)
        timeout = self.config.timeout.collective
        limit = f" (timeout.collective is {timeout:g} s)" if alarm.waited > timeout / 2 else ""
        return HangError(alarm.headline(), **{**parts, "why": parts["why"] + limit})

    # --- what is left behind ---------------------------------------------------------------------------

    def _write(self, record: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            write_json(self.folder.path / "exit.json", {**redact(record), "attempt": self.attempt})

    def _say(self, e: UserError) -> None:
        print(f"error (rank {self.rank}): {redact(e.render())}", file=sys.stderr, flush=True)


def _stand(alarm: Alarm) -> dict[str, Any]:
    """What exit.json says about where the culprit was."""
    phase = PHASES.get(alarm.phase, alarm.phase)
    return {"step": alarm.step, "phase": phase, "doing": alarm.doing, "kind": alarm.kind}


def _agreed(e: UserError) -> bool:
    """Failures every rank raises alike, of which rank 0 alone need speak."""
    return type(e).__name__ in ("StorageError", "NonFiniteError", "ConfigError", "VocabularyError")
