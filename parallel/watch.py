"""Where this rank is, for the others to read when one of them waits in vain.

    watch.begin("data", step=7)                          # which part of which step this rank is in
    with watch.at("ring hop 2", peer=3): work.wait()     # a wait for other ranks

Both only replace a tuple in this process (less than a microsecond); `watchdog.py` publishes it from a thread
of its own. The state is the process's, as a logger is: the waits are deep inside autograd functions that know no
trainer.
"""

from __future__ import annotations

import gc
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

import torch


class State(NamedTuple):
    """What `begin` and `at` leave: a count of changes, the step, its part, and the wait this rank is in."""

    changes: int = 0
    step: int = 0
    phase: str = "start"
    what: str = ""
    peer: int | str | None = None
    last: str = ""


#: A plain tuple with State's fields, and no clock in it: making a State or reading the time costs more than the rest.
_state: tuple[int, int, str, str, int | str | None, str] = (0, 0, "start", "", None, "")


def here() -> State:
    """Where this process is."""
    return State(*_state)


def begin(phase: str, *, step: int | None = None) -> None:
    """Enter a part of a step (a key of `watch_verdict.PHASES`); `step` counts from 1 and stays until given again."""
    global _state
    s = _state
    _state = (s[0] + 1, s[1] if step is None else step, phase, "", None, s[5])


class at:
    """A wait for other ranks: what for, and the rank (or a word for the ranks) waited for. May be nested.

    Left by an exception it stays as it is, so that what failed can still be named.
    """

    __slots__ = ("before", "peer", "what")

    def __init__(self, what: str, peer: int | str | None = None) -> None:
        self.what, self.peer = what, peer

    def __enter__(self) -> None:
        global _state
        s = self.before = _state
        _state = (s[0] + 1, s[1], s[2], self.what, self.peer, self.what)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        global _state
        if kind is None:
            s = self.before
            _state = (_state[0] + 1, s[1], s[2], s[3], s[4], self.what)


class behind:
    """The main thread waits for work of another thread of this process: where that one is, this rank is."""

    __slots__ = ("before", "thread")

    def __init__(self, thread: int | None) -> None:
        self.thread = thread

    def __enter__(self) -> None:
        global _thread
        self.before, _thread = _thread, self.thread

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        global _thread
        _thread = self.before


#: The thread the main one waits for, if any.
_thread: int | None = None


_walking = threading.Lock()


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection while another thread's frames are made into objects.

    `f_back` allocates, which in CPython 3.11 may collect; a finalizer that lets go of the GIL (a tensor's does) lets
    the other thread leave the very frame, and the object is then written into memory that is no frame any more: the
    walk, or anything else later, dies of SIGSEGV. CPython 3.12 collects between instructions only.
    """
    with _walking:
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                gc.enable()


def frame(main: int | None) -> FrameType | None:
    """The innermost frame of the thread that tells where this rank is: thread `main`, or the one it waits for."""
    with _uncollected():
        frames = sys._current_frames()
    return frames.get(_thread or 0) or frames.get(main or 0)


# --- what the main thread runs --------------------------------------------------------------------------------

_TORCH = str(Path(torch.__file__).parent)
_STDLIB = sysconfig.get_path("stdlib")
_WAITING_FILES = ("distributed_c10d.py", "_functional_collectives.py", "_fsdp_collectives.py")
_WAITING_WORDS = ("wait", "recv", "send", "barrier")
_WRAPPERS = ("c10d_logger.py", "contextlib.py", "_contextlib.py")


def look(frames: Iterable[tuple[FrameType, int]]) -> tuple[bool, str]:
    """(whether it is a collective of torch, where) for the (frame, line) pairs of a stack, innermost first.

    For waits that no `at` marks: FSDP's, DTensor's and the pipeline schedules' collectives.
    """
    inner, caller = "", ""
    waiting = False
    for frame, line in frames:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        base = os.path.basename(file)
        if base in _WRAPPERS:
            continue
        ours = not (file.startswith((_TORCH, _STDLIB, "<")) or "site-packages" in file)
        if not inner:
            inner = name
            distributed = f"torch{os.sep}distributed{os.sep}" in file
            waiting = distributed and (base in _WAITING_FILES or any(word in name for word in _WAITING_WORDS))
        if ours:
            caller = f"{base}:{line} {name}"
            break
    return waiting, f"{inner} called at {caller}" if waiting else caller or inner


def stack(frame: FrameType | None) -> list[tuple[FrameType, int]]:
    """What `frame` runs, innermost first."""
    with _uncollected():
        return list(traceback.walk_stack(frame)) if frame is not None else []


def raised_at(trace: TracebackType | None) -> list[tuple[FrameType, int]]:
    """Where an exception came from, innermost first."""
    return list(reversed(list(traceback.walk_tb(trace))))
