"""Hangs and deaths with a name: whoever waits in vain reads where the others are, and ends the job with a verdict.

Each rank publishes its mark (`watch.py`) now and then from a thread of its own, so a stopped or killed rank is known
by its silence. When a wait fails or lasts too long anywhere, that rank judges all marks (`watch_verdict.judge`) and
raises an alarm; the first alarm stands, and every rank ends with it, also one stuck in code that never returns.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ringweave.parallel import watch
from ringweave.parallel.watch_board import Board, end_process, place, process_health, process_stat
from ringweave.parallel.watch_verdict import Alarm, Health, Mark, judge

EXIT_HANG = 5
#: Seconds between an alarm and the end of a rank whose main thread did not notice by itself.
LEAVE = 1.5


class _Seen:
    """The latest mark of another rank and when (on this process's clock) it last changed."""

    __slots__ = ("changed", "mark", "moved")

    def __init__(self, mark: Mark, now: float) -> None:
        self.mark, self.changed, self.moved = mark, now, False


class Watchdog:
    """Publishes this rank's marks, hears alarms, and ends the process when nothing moves any more.

    token: names this start of the job; boards: shared places, the most trusted first; timeout: seconds a wait may
    last; grace: seconds more before the process is ended from outside its main thread; interval: seconds between
    publications; start_timeout: as timeout, for the phase "start"; end(alarm, mine): called in the watching thread
    before `os._exit(alarm.exit_code)`, `mine` when this rank raised it; stacks: folder for `stack-R.txt`, the stacks
    of a rank that ends by an alarm.

    Compute without a wait has no limit of its own: it is the ranks that wait for it which give the alarm. A process
    that was suspended as a whole (a debugger, a job scheduler) does not count the time it was away.
    """

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        token: str,
        boards: Sequence[Board],
        timeout: float,
        end: Callable[[Alarm, bool], None],
        grace: float | None = None,
        start_timeout: float | None = None,
        interval: float | None = None,
        stacks: Path | None = None,
    ) -> None:
        self.rank, self.world, self.boards, self.timeout, self.end = rank, world, list(boards), timeout, end
        self.grace = min(max(0.1 * timeout, 1.0), 5.0) if grace is None else grace
        self.start_timeout = max(timeout, start_timeout or 0.0)
        self.interval = min(max(timeout / 30, 0.2), 2.0) if interval is None else interval
        # Ranks write about a hundred files a second together, however many they are.
        self.patience = 4 * max(self.interval, world / 100)
        self.stacks = stacks
        self._alarm: Alarm | None = None
        self._mine = self._leaving = self._curious = False
        self._seen: dict[int, _Seen] = {}
        self._beat = 0
        self._failed: Mark | None = None  # frozen when the main thread's wait has failed
        self._age, self._key = 0.0, (0, "")
        self._heard = self._left = 0.0  # seconds since an alarm, and since the main thread began to leave
        self._mishaps: set[str] = set()
        self._stopped = threading.Event()
        self._wake = [threading.Event() for _ in self.boards]
        self._main = threading.main_thread().ident
        stat = process_stat(os.getpid())
        self._who: dict[str, Any] = {
            "host": place().partition("/")[0], "place": place(), "pid": os.getpid(),
            "started": stat[1] if stat else "", "token": token,
        }  # fmt: skip

    def start(self) -> None:
        """Begin to publish and to watch, in daemon threads."""
        for board, wake in zip(self.boards, self._wake, strict=True):
            threading.Thread(target=self._serve, args=(board, wake), name="watch board", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def stop(self) -> None:
        """This rank is done: say so, and watch no more."""
        watch.begin("ended")
        self.close()
        self._beat += 1
        text = self.mark().to_json()
        for board in self.boards:
            _bounded(functools.partial(board.publish, self.rank, text), 2.0)

    def close(self) -> None:
        """Watch no more, without a word to the others: what follows is the end of the process."""
        self._stopped.set()
        for wake in self._wake:
            wake.set()

    # --- said by the main thread -----------------------------------------------------------------------

    def lost(self, error: BaseException) -> tuple[Alarm, bool]:
        """A wait of this rank failed with `error`: the verdict, and whether it is this rank's own.

        Takes up to `patience` seconds where the others' processes cannot be seen from here.
        """
        self._leaving = True
        waited = self._age
        self._failed = self.mark(frames=watch.raised_at(error.__traceback__), waiting=True)
        self._write_stack(error)
        return self._conclude(self._failed, waited)

    def failed(self, error: BaseException, *, message: str, exit_code: int) -> tuple[Alarm, bool]:
        """This rank raised `error`, its own: tell the others. Gives the alarm that stands and whose it is."""
        self._leaving = True
        me = self.mark(frames=watch.raised_at(error.__traceback__), waiting=False)
        alarm = Alarm(
            kind="failed", rank=self.rank, step=me.step, phase=me.phase, doing=me.doing(), error=message,
            exit_code=exit_code, found_by=self.rank,
            host=me.host, place=me.place, pid=me.pid, started=me.started,
        )  # fmt: skip
        return self._raise(alarm)

    def end_culprit(self, alarm: Alarm) -> None:
        """End a culprit that cannot end itself, when it is on this machine. The last thing to do: launchers notice."""
        if alarm.kind in ("stopped", "silent") and alarm.place == place():
            end_process(alarm.pid, alarm.started)

    # --- marks -----------------------------------------------------------------------------------------

    def mark(
        self, *, frames: Sequence[tuple[FrameType, int]] | None = None, waiting: bool | None = None
    ) -> Mark:
        """This rank's mark, with where its main thread is."""
        if self._failed is not None:
            return replace(self._failed, beat=self._beat)
        s = watch.here()
        if frames is None:
            frames = watch.stack(watch.frame(self._main))
        collective, inside = watch.look(frames)
        peer = f"rank {s.peer}" if isinstance(s.peer, int) else s.peer or ""
        last = s.last or (inside if collective else "")
        return Mark(
            rank=self.rank, step=s.step, phase=s.phase, what=s.what, peer=peer, inside=inside, last=last,
            waiting=bool(s.what) or collective if waiting is None else waiting,
            age=round(self._age, 1), beat=self._beat, **self._who,
        )  # fmt: skip

    def _serve(self, board: Board, wake: threading.Event) -> None:
        """The thread of one board. It may hang on a dead mount; nothing else waits for it."""
        every = max(self.interval, self.world / 100)
        while not self._stopped.is_set():
            with self._going_on(), contextlib.suppress(OSError, RuntimeError, ValueError):
                self._beat += 1
                board.publish(self.rank, self.mark().to_json())
                text = board.alarm()
                if text:
                    self._hear(Alarm.from_json(text))
                if self._curious:
                    self._take(board.marks())
            wake.wait(min(every, 0.2) if self._curious else every)
            wake.clear()

    def _take(self, texts: dict[int, str]) -> None:
        now = time.monotonic()
        for rank, text in texts.items():
            mark, seen = Mark.from_json(text), self._seen.get(rank)
            if mark.token != self._who["token"]:
                continue  # left by an earlier start
            if seen is None:
                self._seen[rank] = _Seen(mark, now)
            elif mark.beat > seen.mark.beat:
                seen.mark, seen.changed, seen.moved = mark, now, True

    def _hear(self, alarm: Alarm) -> None:
        if self._alarm is None:
            self._alarm = alarm

    # --- judging ---------------------------------------------------------------------------------------

    def _health(self, since: float) -> dict[int, Health | None]:
        """How every other rank looks; None while that is not decided. `since`: when looking began."""
        now = time.monotonic()
        out: dict[int, Health | None] = {}
        for rank in range(self.world):
            if rank == self.rank:
                continue
            seen = self._seen.get(rank)
            if seen is None:
                out[rank] = "gone" if now - since > self.patience else None
                continue
            state = process_health(seen.mark.pid, seen.mark.started) if seen.mark.place == place() else None
            if state in ("gone", "stopped"):
                out[rank] = state  # type: ignore[assignment]
            elif now - seen.changed > self.patience:
                out[rank] = "silent"
            else:
                out[rank] = "alive" if seen.moved else None
        return out

    def _conclude(self, me: Mark, waited: float) -> tuple[Alarm, bool]:
        """Look at the others until each is decided, and raise the alarm; or take the one that was raised."""
        self._curious = True
        began = time.monotonic()
        for wake in self._wake:
            wake.set()
        while True:
            if self._alarm is not None:
                return self._alarm, self._mine
            health = self._health(began)
            known = {r: h for r, h in health.items() if h is not None}
            decided = len(known) == len(health) or any(h in ("gone", "stopped") for h in known.values())
            # A little time in any case: the alarm of the rank at fault itself says more than its silence.
            late = time.monotonic() - began
            if (decided and late > min(0.5, self.patience)) or late > self.patience + 1:
                break
            time.sleep(0.05)
        ended = {r for r, seen in self._seen.items() if seen.mark.phase == "ended"}
        known = {r: h for r, h in known.items() if r not in ended}
        marks = {r: seen.mark for r, seen in self._seen.items()}
        return self._raise(judge(me, marks, known, waited=waited, exit_code=EXIT_HANG))

    def _raise(self, alarm: Alarm) -> tuple[Alarm, bool]:
        """Make `alarm` the job's, unless another stands; gives the one that stands and whether it is `alarm`."""
        if self._alarm is not None:
            return self._alarm, self._mine
        text, standing = alarm.to_json(), ""
        for board in self.boards:
            got = _bounded(functools.partial(board.raise_alarm, standing or text), 2.0)
            standing = standing or got or ""
        try:
            first = Alarm.from_json(standing) if standing else alarm
        except ValueError:
            first = alarm
        if self._alarm is None:
            self._alarm = first
        # The thread of a board may have heard this very alarm meanwhile: it is this rank's all the same.
        self._mine = self._alarm == alarm
        return self._alarm, self._mine

    # --- the watching thread ---------------------------------------------------------------------------

    def _limit(self, state: watch.State, waiting: bool) -> float | None:
        if state.phase == "compute" and not waiting:
            return None
        return (self.start_timeout if state.phase == "start" else self.timeout) + self.grace

    def _watch(self) -> None:
        tick = min(self.interval, 0.5)
        before = time.monotonic()
        while not self._stopped.wait(tick):
            now = time.monotonic()
            passed, before = min(now - before, 3 * tick), now
            with self._going_on():
                self._look(passed)

    def _look(self, passed: float) -> None:
        """One look at this rank, `passed` seconds after the last; ends the process when that is due."""
        if self._leaving:  # the main thread is on its way out; it must not take forever
            self._left += passed
            if self._left > self.patience + 10:
                os._exit(self._alarm.exit_code if self._alarm else EXIT_HANG)
        elif self._alarm is not None:
            self._heard += passed
            if self._heard > LEAVE:
                self._leave(self._alarm, self._mine)
        else:
            limit = self._aged(passed)
            self._curious = limit is not None and self._age > limit / 3
            if limit is not None and self._age > limit:
                self._leave(*self._conclude(self.mark(), self._age))

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """A fault of the watch itself is said once and does not end its thread: a rank without one hangs unnamed."""
        try:
            yield
        except Exception as error:
            kind = f"{type(error).__name__}: {error}"
            if kind not in self._mishaps:
                self._mishaps.add(kind)
                said = f"warning (rank {self.rank}): the watch met a fault, and goes on\n{traceback.format_exc()}"
                with contextlib.suppress(OSError):
                    os.write(2, said.encode())  # `print` may wait for a lock of the very thread that is stuck

    def _aged(self, passed: float) -> float | None:
        """Add `passed` to the time without any change, or begin anew; gives the limit of the present state."""
        frame = watch.frame(self._main)
        waiting, inside = watch.look(watch.stack(frame))
        # A loop of short waits looks the same from outside; the frame and its position tell it from one long wait.
        state = watch.here()
        key = (state.changes, f"{inside} {id(frame)} {frame.f_lasti if frame else 0}")
        self._age = self._age + passed if key == self._key else 0.0
        self._key = key
        return self._limit(state, waiting or bool(state.what))

    def _leave(self, alarm: Alarm, mine: bool) -> None:
        """End this process, whatever its main thread is stuck in."""
        _bounded(self._write_stack, 2.0)
        _bounded(lambda: self.end(alarm, mine), 3.0)
        _bounded(lambda: self.end_culprit(alarm), 3.0)
        os._exit(alarm.exit_code)

    def _write_stack(self, error: BaseException | None = None) -> None:
        """Leave the stacks of all threads, or the traceback of `error`, in `stacks/stack-R.txt`."""
        if self.stacks is None:
            return
        with contextlib.suppress(OSError):
            self.stacks.mkdir(parents=True, exist_ok=True)
            with open(self.stacks / f"stack-{self.rank}.txt", "w", encoding="utf-8") as file:
                if error is not None:
                    traceback.print_exception(error, file=file)
                else:
                    faulthandler.dump_traceback(file=file, all_threads=True)


def _bounded(action: Callable[[], Any], seconds: float) -> Any:
    """The result of `action`, or None when it fails or takes longer (it may be stuck on a dead mount)."""
    box: list[Any] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            box.append(action())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return box[0] if box else None


#: What gloo, the store and NCCL say when a peer is gone or late.
_SIGNS = (
    "timed out", "connection closed by peer", "connection reset by peer", "broken pipe", "socket timeout",
    "connection refused", "nccl",
)  # fmt: skip


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` (or what caused it) is a failed collective rather than a mistake in the code."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return False
        if isinstance(seen, torch.distributed.DistError):
            return True
        if isinstance(seen, RuntimeError) and any(sign in str(seen).lower() for sign in _SIGNS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
