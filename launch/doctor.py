"""`ringweave doctor`: what this machine has, what is missing, and whether a collective works."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import Any

OLDEST_PYTHON = (3, 11)
#: Versions of torch the code is held to; others may work.
TORCH_RANGE = ((2, 14), (2, 14))

# Run in its own process: a broken torch or a hanging collective must not take the doctor with it.
_PROBE = """
import json, sys, torch, torch.distributed as dist
from ringweave.parallel.gloo import join_world
from ringweave.parallel.process import leave
out = {"torch": torch.__version__, "cuda": torch.cuda.is_available(), "gpus": []}
if out["cuda"]:
    out["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
join_world(init_method="file://" + sys.argv[1], rank=0, world_size=1)
x = torch.ones(4)
dist.all_reduce(x)
out["gloo"] = bool((x == 1).all())
dist.destroy_process_group()
import tokenizers
out["hf_tokenizers"] = hasattr(tokenizers, "Tokenizer")
print(json.dumps(out))
leave(0)
"""


def examine(folder: Path) -> dict[str, Any]:
    """{"ok", "checks": [{name, ok, level, detail, fix}], …}; not ok when a check of level "missing" fails."""
    checks = [_python(), _cores(), _memory(), _disk(folder), *_packages(), *_probe()]
    return {
        "ok": all(check["ok"] or check["level"] == "note" for check in checks),
        "ringweave": version("ringweave"),
        "platform": platform.platform(),
        "checks": checks,
    }


def _check(name: str, ok: bool, detail: str, *, fix: str = "", level: str = "missing") -> dict[str, Any]:
    return {"name": name, "ok": ok, "level": level, "detail": detail, "fix": fix}


def _python() -> dict[str, Any]:
    wanted = ".".join(map(str, OLDEST_PYTHON))
    ok = sys.version_info[:2] >= OLDEST_PYTHON
    return _check("python", ok, platform.python_version(), fix=f"use Python {wanted} or newer")


def _cores() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _check("cores", True, f"{usable} usable of {os.cpu_count()}")


def _memory() -> dict[str, Any]:
    try:
        import psutil
    except ImportError:
        return _check("memory", True, "unknown without psutil", level="note")
    memory = psutil.virtual_memory()
    detail = f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB"
    return _check(
        "memory", memory.available > 2 * 2**30, detail, fix="the demo needs about 2 GiB", level="note"
    )


def _disk(folder: Path) -> dict[str, Any]:
    free = shutil.disk_usage(folder).free
    return _check("disk", free > 2**30, f"{free / 2**30:.1f} GiB free here", fix="free 1 GiB", level="note")


def _packages() -> list[dict[str, Any]]:
    """Required packages, and those of extras as notes."""
    checks: list[dict[str, Any]] = []
    missing: dict[str, list[str]] = {}
    found: dict[str, list[str]] = {}
    for line in requires("ringweave") or []:
        spec, _, marker = line.partition(";")
        extra = marker.partition("extra ==")[2].strip(" '\"")
        name = spec.split("[")[0]
        for stop in "<>=!~ (":
            name = name.split(stop)[0]
        try:
            distribution(name)
            found.setdefault(extra, []).append(name)
        except PackageNotFoundError:
            missing.setdefault(extra, []).append(name)
    for extra in sorted({*missing, *found}):
        absent = missing.get(extra, [])
        detail = f"missing: {', '.join(absent)}" if absent else f"{len(found.get(extra, []))} installed"
        label = f"packages [{extra}]" if extra else "packages"
        target = f"'.[{extra}]'" if extra else "."
        fix = f"pip install -c constraints.txt -e {target}"
        checks.append(_check(label, not absent, detail, fix=fix, level="note" if extra else "missing"))
    return checks


def _probe() -> list[dict[str, Any]]:
    """torch, GPU, gloo and the Hugging Face tokenizers package, tried in a child process."""
    import json

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _PROBE, os.path.join(folder, "store")]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return [
                _check(
                    "torch and gloo", False, "no answer within 120 s", fix="check the network interface names"
                )
            ]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return [_check("torch and gloo", False, last, fix="pip install -c constraints.txt -e .")]
    out = json.loads(done.stdout.strip().splitlines()[-1])
    seen = tuple(int(part) for part in out["torch"].split(".")[:2])
    low, high = TORCH_RANGE
    detail = f"{out['torch']} (tested: {low[0]}.{low[1]} to {high[0]}.{high[1]})"
    gpus = ", ".join(out["gpus"]) or "none; runs use the CPU over gloo"
    shadow = "remove a top-level __init__.py from tokenizers/ (docs/decisions/0001-package-layout.md)"
    return [
        _check("torch", low <= seen <= high, detail, fix="pip install -c constraints.txt -e .", level="note"),
        _check("gpu", True, gpus),
        _check("gloo", out["gloo"], "all_reduce works" if out["gloo"] else "all_reduce gave a wrong sum"),
        _check(
            "tokenizers",
            out["hf_tokenizers"],
            "the Hugging Face package" if out["hf_tokenizers"] else "shadowed",
            fix=shadow,
        ),
    ]
