"""Run a function on N gloo processes of this machine, with a timeout and failures named by rank.

For tests and `ringweave verify`; training is launched by torchrun.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import os
import queue
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ringweave.parallel.gloo import join_world
from ringweave.parallel.process import die_with_parent, leave
from ringweave.parallel.watchdog import is_lost_peer

#: Seconds for the other ranks to end after one has failed.
GRACE = 5.0


class WorkersFailed(RuntimeError):
    """One or more ranks failed or did not finish. The message names the rank nearest the cause first, with its
    traceback."""


class _Callable:
    """A module-level function by file and name, so that workers find it even where its module is not on sys.path."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.module, self.name = fn.__module__, fn.__qualname__
        self.file = sys.modules[fn.__module__].__file__

    def load(self) -> Callable[..., Any]:
        """Import the module (by name, else from its file) and give the function."""
        if self.module not in sys.modules:
            try:
                importlib.import_module(self.module)
            except ImportError:
                spec = importlib.util.spec_from_file_location(self.module, str(self.file))
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                sys.modules[self.module] = module
                spec.loader.exec_module(module)
        fn: Callable[..., Any] = getattr(sys.modules[self.module], self.name)
        return fn


@dataclass(frozen=True, slots=True)
class _Failure:
    """text: the traceback, or how the process ended; order: of what to look at first (smaller is nearer the cause);
    short: what is worth saying of it when another rank is nearer."""

    text: str
    order: int
    short: str


def _failure(error: BaseException) -> _Failure:
    """An exception of a rank, as it is being handled. What a lost peer brings about is no cause."""
    lost = isinstance(error, Exception) and is_lost_peer(error)
    text = traceback.format_exc().rstrip()
    return _Failure(text, order=2 if lost else 1, short=text.splitlines()[-1] if lost else text)


def _worker(
    rank: int,
    world: int,
    store: str,
    timeout: float,
    fn: _Callable,
    args: tuple[Any, ...],
    out: Any,
    parent: int,
) -> None:
    die_with_parent(signal.SIGKILL, parent)  # else ranks of a killed command compute on, for minutes
    faulthandler.enable()  # a rank killed by a signal of its own says where
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    code = 0
    try:
        join_world(
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        out.put((rank, True, fn.load()(*args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        out.put((rank, False, _failure(error)))
        code = 1
    out.close()
    out.join_thread()  # what was put is on its way
    leave(code)


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, timeout: float = 240.0, collective: float = 60.0
) -> list[Any]:
    """`fn(*args)` on `world` ranks; the results in rank order. `fn` must be importable (a module-level function).

    timeout: seconds for the whole; collective: seconds for any one collective. Raises WorkersFailed.
    """
    context = mp.get_context("spawn")
    out = context.Queue()
    with tempfile.TemporaryDirectory() as place:
        store = str(Path(place) / "store")
        workers = [
            context.Process(
                target=_worker,
                args=(r, world, store, collective, _Callable(fn), args, out, os.getpid()),
                daemon=True,
            )
            for r in range(world)
        ]
        for w in workers:
            w.start()
        try:
            return _collect(workers, out, time.monotonic() + timeout)
        finally:
            for w in workers:
                w.join(timeout=5)
                if w.is_alive():
                    w.kill()


def _ending(code: int | None) -> _Failure:
    if code is None:
        return _Failure("did not finish", 3, "did not finish")
    text = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    return _Failure(text, 0, text)


def _collect(workers: list[Any], out: Any, deadline: float) -> list[Any]:
    world = len(workers)
    results: dict[int, Any] = {}
    failures: dict[int, _Failure] = {}
    while len(results.keys() | failures.keys()) < world:  # a rank can fail after it gave its result
        dead = {r: w.exitcode for r, w in enumerate(workers) if w.exitcode not in (None, 0)}
        try:
            rank, fine, value = out.get(timeout=0.5)
            (results if fine else failures)[rank] = value
        except queue.Empty:
            # What ended before this wait has nothing to say; a rank that fails in Python has.
            failures |= {r: _ending(code) for r, code in dead.items() if r not in failures}
            if time.monotonic() > deadline:
                for r in set(range(world)) - results.keys() - failures.keys():
                    failures[r] = _ending(workers[r].exitcode)
                break
        if failures and time.monotonic() + GRACE < deadline:
            deadline = time.monotonic() + GRACE  # the others are probably waiting for the failed one
    if failures:
        raise WorkersFailed(_say(failures, world))
    return [results[r] for r in range(world)]


def _say(failures: dict[int, _Failure], world: int) -> str:
    """Cause first, in the order in which failures came; of ranks that only lost a peer, one line each."""
    rows = sorted(failures.items(), key=lambda item: item[1].order)
    (first, cause), *others = rows
    blocks = [f"--- rank {first} of {world}:\n{cause.text}"]
    blocks += [f"--- rank {rank} of {world}:\n{failure.short}" for rank, failure in others]
    last = cause.text.splitlines()[-1]
    return "\n".join([f"{len(failures)} of {world} ranks failed, rank {first} first: {last}", *blocks])
