"""What every long proof shares: it runs, says what it found, and writes its own row of docs/proofs.md.

    with prove("data_damage", "damage is detected or changes nothing") as proof:
        proof.found(flips=2000, silent=0)
        proof.holds(silent == 0, "a flip came through")

A row holds the last result only: the claim, the figures, whether it holds, seconds, the commit and the machine.
A proof that does not hold, or fails half-way, writes that too and exits with code 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "proofs.md"
_HEAD = """# Proofs

The long proofs, whole: each script of `tests/prove/` writes its own row when it ends (`make prove` runs them all, or
`.venv/bin/python tests/prove/NAME.py` one). `make test` holds a trimmed form of each.

| proof | claim | holds | found | seconds | commit | machine | day |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


class Proof:
    """What a running proof has found so far."""

    def __init__(self, name: str, claim: str) -> None:
        self.name, self.claim = name, claim
        self.figures: dict[str, Any] = {}
        self.failures: list[str] = []

    def found(self, **figures: Any) -> None:
        """Adds figures to the row (and replaces those of the same name)."""
        self.figures |= figures

    def holds(self, condition: bool, otherwise: str) -> None:
        """The claim holds only if every condition does; `otherwise` says what went wrong."""
        if not condition:
            self.failures.append(otherwise)
            print(f"does not hold: {otherwise}", file=sys.stderr, flush=True)


@contextmanager
def prove(name: str, claim: str, *, page: Path = PAGE) -> Iterator[Proof]:
    """Runs the block, prints one JSON line, writes the row, and exits with code 1 if the claim does not hold."""
    proof, started = Proof(name, claim), time.monotonic()
    try:
        yield proof
    except Exception as error:
        traceback.print_exc()
        proof.holds(False, f"stopped by {type(error).__name__}: {error}")
    seconds = round(time.monotonic() - started)
    print(json.dumps({"proof": name, "holds": not proof.failures, **proof.figures, "seconds": seconds}))
    _write(page, name, _row(proof, seconds))
    if proof.failures:
        raise SystemExit(1)


def arguments(description: str | None, *, tiny: str) -> argparse.ArgumentParser:
    """The options that proofs share: --tiny (`tiny` says what is small then) and --page."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help=f"{tiny}; no row is written")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page the row goes to")
    return parser


@contextmanager
def prove_with(options: argparse.Namespace, name: str, claim: str) -> Iterator[Proof]:
    """`prove` as the options of `arguments` ask for it: a tiny one leaves the page alone."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "proofs.md" if options.tiny else options.page
        with prove(name, claim, page=page) as proof:
            yield proof


def _row(proof: Proof, seconds: int) -> str:
    found = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in proof.figures.items())
    if proof.failures:
        found = "; ".join([*proof.failures, found])
    cells = [
        f"`{proof.name}`", proof.claim, "no" if proof.failures else "yes", found, str(seconds), _commit(), _machine(),
        datetime.datetime.now(datetime.UTC).date().isoformat(),
    ]  # fmt: skip
    return "| " + " | ".join(re.sub(r"\s+", " ", c).replace("|", "\\|") for c in cells) + " |"


def _write(page: Path, name: str, row: str) -> None:
    """Puts the row in the place of the proof's last one, or at the end."""
    text = page.read_text(encoding="utf-8") if page.exists() else _HEAD
    lines = text.splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith(f"| `{name}` |")]
    if at:
        lines[at[0]] = row
    else:
        lines.append(row)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _commit() -> str:
    """Short commit, with `+` where the tree differs from it."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        clean = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, check=False).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head if clean else f"{head}+"


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{os.cpu_count()} x {model[1] if model else platform.machine()}, {platform.system()}"
