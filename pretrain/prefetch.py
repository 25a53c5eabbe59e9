"""`Prefetcher`: a thread that prepares the next few batches while the present one trains.

The cursor of a batch is the state after it, so batches that were prepared and not trained on are planned again after
a restart. What the thread does among ranks must be over groups of its own, and every rank must take the same number
of batches: the thread prepares at most `depth` of them ahead, and on `stop` it calls `produce` once more with the
event set, so that ranks which wait in a collective of the next batch are told.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from ringweave.parallel import watch

T = TypeVar("T")


class Stopped(Exception):
    """`next` was called after `stop`, after another rank stopped, or after the end (`limit`, or of the data)."""


class Prefetcher(Generic[T]):
    """Batches of `produce`, in order. depth 0: no thread, each is made when it is asked for.

    produce: gives the next batch, or None once stopped (`event.is_set()`), here or elsewhere, or at the end of the
    data. limit: batches in all.
    waited: seconds that the last `next` waited; waited_total and taken: over all calls.
    """

    def __init__(
        self, produce: Callable[[threading.Event], T | None], *, depth: int = 2, limit: int | None = None
    ) -> None:
        if depth < 0 or (limit is not None and limit < 0):
            raise ValueError("depth and limit must be 0 or above")
        self._produce, self._depth, self._limit = produce, depth, limit
        self._stop = threading.Event()
        self._left = False
        self._change = threading.Condition()
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self.waited = self.waited_total = 0.0
        self.taken = 0
        self._thread: threading.Thread | None = None
        if depth:
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self._thread.start()

    def next(self) -> T:
        """The next batch. Raises what `produce` raised for it, Stopped when there is none any more."""
        began = time.monotonic()
        try:
            return self._next()
        finally:
            self.waited = time.monotonic() - began
            self.waited_total += self.waited
            self.taken += 1

    def _next(self) -> T:
        if self._thread is None:
            if self._ended or self._stop.is_set() or self.taken == self._limit:
                raise Stopped
            made = self._produce(self._stop)
            if made is None:
                self._ended = True
                raise Stopped
            return made
        with self._change:
            with watch.behind(self._thread.ident):
                self._change.wait_for(lambda: self._ready or self._ended)
            if self._ready:
                batch = self._ready.popleft()
                self._change.notify_all()
                return batch
            if self._error is not None:
                raise self._error
            raise Stopped

    def _run(self) -> None:
        made = 0
        try:
            while made != self._limit:
                with self._change:
                    # A batch is on its way or ready: at most `depth` of them at any time.
                    self._change.wait_for(
                        lambda: len(self._ready) < self._depth or self._stop.is_set() or self._left
                    )
                    if self._left:
                        return
                batch = self._produce(self._stop)
                if batch is None:
                    return
                made += 1
                with self._change:
                    self._ready.append(batch)
                    self._change.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._change:
                self._ended = True
                self._change.notify_all()

    def stop(self, *, timeout: float = 30.0) -> bool:
        """Ends the thread; batches that are ready are dropped. False if it did not end within `timeout` seconds
        (a peer that is gone keeps it in a collective; it does not keep the process alive).

        All ranks must have taken the same number of batches. After an error there is nothing to agree on: see
        `abandon`.
        """
        with self._change:
            self._stop.set()
            self._change.notify_all()
        if self._thread is None:
            return True
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        with self._change:
            self._ready.clear()
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Ends the thread after the batch it is at, without a word to other ranks: this one met an error, and what
        they see of it must not look like an orderly stop."""
        with self._change:
            self._left = True
            self._change.notify_all()

    def share_waited(self, step_seconds: float) -> float:
        """Share of a step of `step_seconds` that the last `next` waited."""
        return min(1.0, self.waited / step_seconds) if step_seconds > 0 else 0.0
