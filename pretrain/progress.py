"""What rank 0 shows while training: one line now and then, and TensorBoard. Neither can stop a run."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from ringweave.data_pipes.pack import PackPlan


def human(n: float) -> str:
    """1234567 -> '1.2M'."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return f"{n:.0f}"


def context_name(context: int) -> str:
    """2048 -> '2K', 512 -> '512', 1048576 -> '1M'."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if context % size == 0:
            return f"{context // size}{unit}"
    return str(context)


def duration(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    s = round(max(seconds, 0))
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"


def step_line(record: dict[str, Any], *, total: int, stages: int, layout: str) -> str:
    """The progress line of one step record (see docs/metrics.md for its fields)."""
    losses = "  ".join(f"{name} {value:.2f}" for name, value in record["loss_by_modality"].items())
    width = len(str(total))
    waited = f"  data wait {record['data_wait']:.0%}" if record["data_wait"] >= 0.05 else ""
    return (
        f"step {record['step']:>{width}}/{total}  stage {record['stage'] + 1}/{stages} "
        f"{context_name(record['context'])} {layout}  loss {record['loss']:.3f}  [{losses}]  "
        f"{human(record['tokens_per_s'])} tok/s  |g| {record['grad_norm']:.2f}{waited}  eta {duration(record['eta_s'])}"
    )


class Clock:
    """Seconds spent in each named part of a step."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._at = time.monotonic()
        self._start = self._at

    def lap(self, part: str) -> None:
        """The time since the last lap was spent in `part`."""
        now = time.monotonic()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._at
        self._at = now

    def total(self) -> dict[str, float]:
        """Every part and "step", the whole, rounded to 0.1 ms."""
        return {k: round(v, 4) for k, v in {"step": time.monotonic() - self._start, **self.parts}.items()}


class Board:
    """TensorBoard scalars; a failure is said once on stderr and never again matters."""

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self._writer: Any = None
        if enabled:
            self._guard(lambda: self._open(folder))

    def _open(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def step(self, record: dict[str, Any]) -> None:
        """Write the scalars of one step record."""
        if self._writer is None:
            return
        scalars = {"loss/all": record["loss"], "lr": record["lr"], "grad_norm": record["grad_norm"]}
        scalars |= {
            "tokens_per_s": record["tokens_per_s"],
            "fill": record["fill"],
            "data_wait": record["data_wait"],
            "context": record["context"],
        }
        scalars |= {f"loss/{k}": v for k, v in record["loss_by_modality"].items()}

        def write() -> None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, record["step"])

        self._guard(write)

    def close(self) -> None:
        """Flush what is buffered."""
        if self._writer is not None:
            self._guard(self._writer.close)

    def _guard(self, action: Any) -> None:
        try:
            action()
        except Exception as e:  # a metrics sink must never stop training
            self._writer = None
            print(f"TensorBoard is off: {type(e).__name__}: {e}", file=sys.stderr)


def tokens_by_source(plans: list[PackPlan]) -> dict[str, int]:
    """Tokens of each source in these packs."""
    tokens: dict[str, int] = {}
    for plan in plans:
        for p in plan.pieces:
            tokens[p.source] = tokens.get(p.source, 0) + p.end - p.start
    return tokens


def environment() -> dict[str, Any]:
    """Versions and host, for the start event."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "host": {
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "machine": platform.machine(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }
