"""What the report is made from: the small files of a run folder, each of them optional.

Inputs: metrics.jsonl · exit.json · config.yaml · proof.json · verify.json · export/export.json ·
tokenizers/figures.json · tokenizers/show/* · samples/*.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringweave.pretrain.report.history import RunHistory
from ringweave.pretrain.report.lineage import read_metrics
from ringweave.pretrain.report.words import plural

MEDIA_BUDGET = 2_300_000  # of them for pictures and sound, as base64


@dataclass
class Inputs:
    """What the run folder holds. `notes`: (file, what was found) of every input; `media_left`: bytes."""

    run_dir: Path
    history: RunHistory
    files: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)
    config: str = ""
    media_left: int = MEDIA_BUDGET

    def get(self, name: str, *keys: str) -> dict[str, Any]:
        """The mapping at `keys` of a JSON input; {} when the file or a key is absent or of another type."""
        value = self.files.get(name)
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return dict(value) if isinstance(value, Mapping) else {}

    def heldout(self) -> dict[str, dict[str, Any]]:
        """Held-out figures by modality: proof.json's, else those of the last evaluation."""
        proof = {k: dict(v) for k, v in self.get("proof.json", "heldout").items() if isinstance(v, Mapping)}
        if proof or not self.history.evaluations:
            return proof
        return dict(self.history.evaluations[-1].heldout)


def load_inputs(run_dir: Path) -> Inputs:
    """Read everything small. Damaged JSON becomes a note on the page, not an exception."""
    inputs = Inputs(run_dir=run_dir, history=read_metrics(run_dir))
    h = inputs.history
    found = f"{plural(h.lines, 'line')}, {plural(len(h.bad_lines), 'bad line')}" + (
        ", last line torn" * h.torn_tail
    )
    inputs.notes.append(("metrics.jsonl", found if h.found else "absent"))
    names = (
        "exit.json",
        "proof.json",
        "verify.json",
        "export/export.json",
        "tokenizers/figures.json",
        "samples/samples.json",
    )
    for name in names:
        try:
            inputs.files[name] = json.loads((run_dir / name).read_text(encoding="utf-8"))
            inputs.notes.append((name, "read"))
        except FileNotFoundError:
            inputs.notes.append((name, "absent"))
        except (OSError, ValueError, RecursionError) as error:
            inputs.notes.append((name, f"unreadable: {type(error).__name__}"))
    try:
        inputs.config = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
        inputs.notes.append(("config.yaml", "read"))
    except OSError:
        inputs.notes.append(("config.yaml", "absent"))
    return inputs


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; [] for anything else."""
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list) else []
