"""What the demo proves, computed from what a run left on disk. Pure but for reading files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ringweave.data_pipes.pack import Piece
from ringweave.data_pipes.planner import audit
from ringweave.parallel.mesh import describe_layout
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.run_folder import read_events
from ringweave.pretrain.stage_plan import ideal_plans


def final_steps(run: Path) -> dict[int, dict[str, Any]]:
    """The step records that made the final model: of a step trained twice, the later attempt's."""
    return {e["step"]: e for e in read_events(run / "metrics.jsonl") if e.get("event") == "step"}


def stage_proof(run: Path, config: RunConfig) -> list[dict[str, Any]]:
    """[{context, layout, steps, tokens, tokens_per_s, fill}] of the final lineage."""
    steps = list(final_steps(run).values())
    rows = []
    for number, stage in enumerate(config.stages):
        mine = [s for s in steps if s["stage"] == number]
        layout = {axis: getattr(stage.layout, axis) for axis in ("dp", "pp", "tp", "sp")}
        tokens = sum(sum(s["tokens_by_source"].values()) for s in mine)
        rows.append(
            {
                "context": stage.context,
                "layout": describe_layout(layout),
                "steps": len(mine),
                "tokens": tokens,
                "tokens_per_s": round(tokens / sum(s["seconds"]["step"] for s in mine), 1),
                "fill": round(sum(s["fill"] for s in mine) / len(mine), 4),
            }
        )
    return rows


def resume_proof(run: Path, config: RunConfig, corpus: Any, killed_at: int) -> dict[str, Any]:
    """Lost and repeated samples of the final lineage against a fresh plan, and losses of steps trained twice."""
    events = [e for e in read_events(run / "metrics.jsonl") if e.get("event") == "step"]
    seen: dict[int, float] = {}
    differences = []
    for e in events:
        if e["step"] in seen:
            differences.append(abs(seen[e["step"]] - e["loss"]))
        seen[e["step"]] = e["loss"]
    consumed: dict[int, list[list[Piece]]] = {}
    for record in _ledger(run):
        consumed[record["step"]] = [[Piece(*p) for p in pack] for pack in record["packs"]]
    ours = [(step, piece) for step in sorted(consumed) for piece in consumed[step]]
    counts = audit(ours, ideal_stream(config, corpus))
    if not differences:
        raise ValueError("no step was trained twice: the run was not killed between checkpoints")
    return {
        "killed_at_step": killed_at,
        "steps_trained_twice": len(differences),
        "samples_lost": counts["samples_lost"],
        "samples_repeated": counts["samples_repeated"],
        "max_loss_diff": max(differences),
    }


def ideal_stream(config: RunConfig, corpus: Any) -> list[tuple[int, list[Piece]]]:
    """Every pack of the whole run as a planner that never stopped makes them."""
    return [
        (step, list(plan.pieces)) for step, plans in ideal_plans(config, corpus.lengths) for plan in plans
    ]


def tokenizer_proof(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Held-out figures of every codec as one flat table; rgba_psnr is the worst over its backgrounds."""
    flat = {f"{name}_{key}": value for name, numbers in figures.items() for key, value in numbers.items()}
    over = [v for k, v in figures["rgba"].items() if k.startswith("psnr_")]
    return {**flat, "rgba_psnr": min(over)}


def layout_proof(verified: dict[str, Any]) -> dict[str, Any]:
    """The largest differences over the layouts that `ringweave verify` compared with one process."""
    return {
        "max_rel_loss_diff": verified["max_rel_loss_diff"],
        "max_rel_grad_diff": verified["max_rel_grad_diff"],
        "compared": [r["layout"] for r in verified["rows"] if r["law"] == 2],
    }


def _ledger(run: Path) -> list[dict[str, Any]]:
    records = []
    for line in (run / "consumed.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # the line an attempt died in; the step is trained again
    return records
