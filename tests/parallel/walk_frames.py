"""Walks the frames of a thread that is never still, for `test_watch_frames.py`; code 0: every walk was of frames.

Garbage whose finalizer lets go of the GIL, and functions of many frame sizes: without the guard of `watch.stack`
CPython 3.11 gives an object that is no frame within a few walks, or dies of SIGSEGV.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from types import FrameType
from typing import Any

from ringweave.parallel import watch

SECONDS, SIZES, DEPTH = 4.0, 40, 60
rng = random.Random(1)
functions: list[Any] = []


class Slow:
    """A cycle whose end takes a while without the GIL, as a tensor's may."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        time.sleep(0.0005)


def make(size: int) -> Any:
    """A function with `size` locals that calls another one n times deep."""
    names = "\n".join(f"    v{i} = n" for i in range(size))
    place: dict[str, Any] = {}
    exec(f"def f(n, go):\n{names}\n    return go(n - 1) if n > 0 else n\n", place)
    return place["f"]


def go(n: int) -> Any:
    """Any of the functions."""
    return rng.choice(functions)(n, go)


def main() -> int:
    """Walks while the main thread works; the number of walks."""
    functions.extend(make(2 * k) for k in range(1, SIZES))
    gc.set_threshold(30)  # more than what leads to a walk allocates, less than a walk does
    ident, until, walks = threading.get_ident(), time.monotonic() + SECONDS, []

    def walk() -> None:
        while time.monotonic() < until:
            for _ in range(rng.randrange(4)):
                Slow()
            assert all(isinstance(f, FrameType) for f, _ in watch.stack(watch.frame(ident)))
            walks.append(1)

    thread = threading.Thread(target=walk)
    thread.start()
    while thread.is_alive():
        go(rng.randrange(DEPTH))
    assert time.monotonic() >= until, "the walk ended early"
    assert gc.isenabled()
    return len(walks)


if __name__ == "__main__":
    print(main())
