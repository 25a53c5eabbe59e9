"""Starting the ranks of a job, waiting for them with a limit, and killing them and their workers by process id."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).resolve().parent))
from _resume_job import Job, run_rank

#: Seconds without a sign of life after which a job hangs; seconds in which workers must follow their ranks.
HANG, FOLLOW = 150.0, 15.0
_TICK = 0.002
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch.distributed", "ringweave.pretrain.batch_reader", "ringweave.pretrain.prefetch", "PIL.Image"]
)
_jobs = iter(range(10**9))


class Ranks:
    """A running job. killed_first: the others ended by themselves after one rank was killed."""

    def __init__(self, job: Job) -> None:
        self.job = replace(job, rendezvous=str(Path(job.out) / f"rendezvous-{next(_jobs)}"))
        self.out = Path(job.out)
        self.processes = [_CONTEXT.Process(target=run_rank, args=(r, self.job)) for r in range(job.world)]
        self.workers: dict[int, psutil.Process] = {}
        for process in self.processes:
            process.start()

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Waits for a condition; False if all ranks ended well before. Raises RuntimeError, with what each rank
        printed last, if one failed or nothing happened for too long."""
        deadline, seen = time.monotonic() + HANG, self._signs()
        while not condition():
            codes = [p.exitcode for p in self.processes]
            if all(code == 0 for code in codes):
                return False
            if any(code not in (None, 0) for code in codes):
                time.sleep(1.0)  # let the others say why
                raise RuntimeError(self._report("a rank failed"))
            signs = self._signs()
            if signs != seen:
                deadline, seen = time.monotonic() + HANG, signs
            if time.monotonic() > deadline:
                for process in self.processes:  # each prints where its threads are
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid or 0, signal.SIGABRT)
                time.sleep(2.0)
                raise RuntimeError(self._report(f"the job hangs: nothing happened for {HANG:.0f} s"))
            time.sleep(_TICK)
        return True

    def _signs(self) -> tuple[int, int]:
        path = self.out / "steps.jsonl"
        size = path.stat().st_size if path.exists() else 0
        return size, sum(p.exitcode is not None for p in self.processes)

    def _report(self, what: str) -> str:
        tails = [f"{what}: {self.job}"]
        for rank, process in enumerate(self.processes):
            path = self.out / f"rank-{rank}.log"
            text = path.read_text(errors="replace")[-2500:] if path.exists() else ""
            tails.append(f"=== rank {rank}, exit code {process.exitcode}:\n{text}")
        return "\n".join(tails)

    # --- killing -----------------------------------------------------------------------------------------------

    def kill(self, how: str, rng: random.Random) -> bool:
        """Kills the job. how: "all" (ranks and workers at once), "ranks" (workers have to follow), "one" (one rank,
        and the rest a little later). Gives whether the others had ended by themselves by then."""
        alone = False
        if how == "one":
            victim = rng.choice(self.processes)
            self._freeze([victim])
            victim.kill()
            others = [p for p in self.processes if p is not victim]
            deadline = time.monotonic() + rng.uniform(0.0, 2.0)
            while time.monotonic() < deadline and any(p.is_alive() for p in others):
                time.sleep(0.01)
            alone = bool(others) and not any(p.is_alive() for p in others)
        self._freeze(self.processes)
        for process in self.processes:
            process.kill()
        if how == "all":
            for worker in self.workers.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
        return alone

    def _freeze(self, processes: list[multiprocessing.process.BaseProcess] | list) -> None:  # type: ignore[type-arg]
        """Stops ranks where they are and lists their workers, so that none is missed."""
        for process in processes:
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGSTOP)
                self.workers |= {c.pid: c for c in psutil.Process(process.pid).children(recursive=True)}

    def gone(self) -> int:
        """Waits for the end of all ranks and workers; gives the number of workers there were. Raises RuntimeError if
        a worker outlives its rank."""
        for process in self.processes:
            process.join(FOLLOW)
        deadline = time.monotonic() + FOLLOW
        while left := [pid for pid, worker in self.workers.items() if _lives(worker)]:
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise RuntimeError(self._report(f"workers {left} outlive their ranks"))
            time.sleep(_TICK)
        return len(self.workers)


def _lives(process: psutil.Process) -> bool:
    """Whether it still runs; one that only waits to be buried does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
