"""What every benchmark here shares: paired runs, peak memory, pinned ranks, and the one JSON line.

A script measures one claim against a rival in the same run on the same machine:

    {"claim", "ours", "rival", "unit", "ratio", "target", "better": "higher"|"lower", "holds", "runs",
     "machine", "versions"}

`ours` and `rival` are medians; `ratio` is the median of each pair's ours / rival, so that a machine that slows
down half-way moves both sides of a pair. A claim of several parts (time and memory, one process and two) lists
them under "parts", shows the first, and holds if all do. A rival that is missing gives {"claim", "skipped"}.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ringweave.parallel.spawn import run_ranks

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """One measured quantity: its runs, paired in order, and the ratio ours / rival that is claimed."""

    name: str
    ours: Sequence[float]
    rival: Sequence[float]
    unit: str
    target: float
    better: Literal["higher", "lower"]

    @property
    def ratio(self) -> float:
        """Median over the pairs of ours / rival."""
        return statistics.median(a / b for a, b in zip(self.ours, self.rival, strict=True))

    @property
    def holds(self) -> bool:
        """Whether the ratio is on the claimed side of the target."""
        return self.ratio >= self.target if self.better == "higher" else self.ratio <= self.target

    def to_json(self) -> dict[str, Any]:
        """The fields of a line that are this part's own."""
        return {
            "ours": _short(statistics.median(self.ours)),
            "rival": _short(statistics.median(self.rival)),
            "unit": self.unit,
            "ratio": _short(self.ratio),
            "target": _short(self.target),
            "better": self.better,
            "holds": self.holds,
            "runs": len(self.ours),
        }


def arguments(description: str | None, *, runs: int = 5) -> argparse.Namespace:
    """The options of every script: --runs, and --tiny for sizes that only show that it works."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=int, default=runs, help="paired runs (at least 5 for a claim)")
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes: a check of the script, not of the claim"
    )
    return parser.parse_args()


def paired(sides: Sequence[Callable[[], object]], *, runs: int, warm_up: int = 1) -> tuple[list[float], ...]:
    """Run all sides in turn, `warm_up` rounds for nothing and `runs` that count; each side's measurements.

    A side that returns a float is measured by that, any other in seconds of wall time. Every other round runs
    backwards, so that no side is always the one after.
    """
    results: tuple[list[float], ...] = tuple([] for _ in sides)
    for turn in range(warm_up + runs):
        order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
        for i in order:
            started = time.perf_counter()
            value = sides[i]()
            seconds = time.perf_counter() - started
            if turn >= warm_up:
                results[i].append(value if isinstance(value, float) else seconds)
    return results


def emit(claim: str, *parts: Part, versions: Sequence[str] = (), **facts: Any) -> None:
    """Print the claim's line. versions: packages whose versions matter beside torch's; facts: further fields."""
    line: dict[str, Any] = {"claim": claim, **parts[0].to_json()}
    if len(parts) > 1:
        line["holds"] = all(p.holds for p in parts)
        line["parts"] = [{"part": p.name, **p.to_json()} for p in parts]
    line |= facts
    line["machine"] = machine()
    packages = ("torch", "numpy", *versions)
    line["versions"] = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }
    print(json.dumps(line), flush=True)


def skip(claim: str, reason: str) -> None:
    """Print that the claim was not measured, and why. The script then ends with exit code 0."""
    print(json.dumps({"claim": claim, "skipped": reason}), flush=True)


def missing(*modules: str) -> str | None:
    """Why a rival cannot run, or None: modules that are not installed."""
    absent = [m for m in modules if importlib.util.find_spec(m) is None]
    return f"not installed: {', '.join(absent)} (pip install -e '.[bench]')" if absent else None


def machine() -> dict[str, Any]:
    """The machine in a few words, and how busy it was: above 1 (and what a script itself uses) timings lie."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        model = found[1]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "load_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def one_thread(core: int = 0) -> None:
    """Make this process one thread on one core, the `core`-th of those it may use (counted round)."""
    torch.set_num_threads(1)
    mine = cores()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {mine[core % len(mine)]})


def pinned_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 1800.0) -> list[Any]:
    """`fn(*args)` on `world` gloo ranks, each one thread on a core of its own (shared where there are fewer cores).

    The results in rank order; they and `args` are pickled, so no tensors. `fn` is a module-level function.
    """
    return run_ranks(world, _on_its_core, fn, args, timeout=timeout, collective=timeout)


def _on_its_core(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    one_thread(torch.distributed.get_rank())
    return fn(*args)


def peak_memory(prepare: Callable[..., Callable[[], object]], *args: Any, timeout: float = 600.0) -> float:
    """MiB that a step takes above what its inputs take, in a fresh process of one thread.

    `prepare(*args)` (a module-level function) makes the inputs and gives the step; what is resident then is the
    baseline, and the peak is read after the step. Raises RuntimeError if the process fails or overruns.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measure_peak, args=(theirs, prepare, args), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise RuntimeError(f"no peak memory after {timeout} s")
        return ours.recv()
    except EOFError:
        raise RuntimeError("the measured process failed; its traceback is above") from None
    finally:
        child.kill()
        child.join()


def _measure_peak(out: Any, prepare: Callable[..., Callable[[], object]], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    step = prepare(*args)
    baseline = _forget_peak()
    step()
    out.send((_peak_bytes() - baseline) / MIB)


def _forget_peak() -> int:
    """Bytes resident now; where Linux allows it the peak starts again from here, else it stands where it was."""
    status = Path("/proc/self/status")
    if not status.exists():
        return _peak_bytes()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak_bytes()
    return _kib("VmRSS") * 1024


def _peak_bytes() -> int:
    """The most bytes ever resident. Not ru_maxrss on Linux: that of a child starts at its parent's."""
    if Path("/proc/self/status").exists():
        return _kib("VmHWM") * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _kib(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def _short(value: float) -> float:
    return float(f"{value:.4g}")
