"""Pictures by the model as it was at the end of each stage, drawn from the checkpoints that a run keeps of them.

Drawn when training is over, by the process that ends the run, never while other ranks wait; `ringweave sample RUN
--by-stage` does the same at any time. Noise is that of the run's seed in every stage, so pictures differ by the model
alone. They lie in `RUN/samples/stage-K` (K from 1), as `sample_diffusion` writes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ringweave.pretrain import checkpoint
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.dit_sample import SampleSettings
from ringweave.pretrain.errors import StorageError
from ringweave.pretrain.run_folder import RunFolder, read_events, write_json
from ringweave.tokenizers.errors import printable

#: What tells a process its place among others; who draws is alone.
_PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def draw_by_stage(
    run_dir: Path, *, count: int, settings: SampleSettings | None = None, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Draw `count` held-out documents of each source for every stage whose end has a checkpoint, and for the newest
    checkpoint within a stage. Gives the entries of the pictures, stage by stage.

    Pictures that are there of the same checkpoint, count and settings stay. Raises StorageError for a run without
    checkpoints, ConfigError for one of another kind.
    """
    from ringweave.pretrain.sample_dit import sample_diffusion

    out = []
    with _alone():
        for stage, step, manifest in _ends(run_dir / "checkpoints"):
            folder = run_dir / "samples" / f"stage-{stage + 1}"
            about = _about(stage, step, manifest, count, settings)
            entries = _there(folder / "samples.json", about)
            if entries is None:
                say(f"drawing previews of stage {stage + 1} (step {step})")
                made = sample_diffusion(run_dir, (), folder, count=count, settings=settings, step=step)
                entries = [{**entry, **about} for entry in made["samples"]]
                write_json(folder / "samples.json", entries)  # last: a folder without `about` is drawn again
            out += [{**entry, "file": f"stage-{stage + 1}/{entry['file']}"} for entry in entries]
    return out


def draw_at_end(config: RunConfig, folder: RunFolder) -> None:
    """What `log.previews` asks for, when training is over. A failure is a warning of the run, never its end.

    When all are drawn, checkpoints of stages' ends beyond `checkpoint.keep` go.
    """
    step = max((int(e.get("step", 0)) for e in read_events(folder.path / "metrics.jsonl")), default=0)
    try:
        entries = draw_by_stage(folder.path, count=config.log.previews)
        newest = checkpoint.find(folder.checkpoints, warn=print)
        if newest is not None:
            checkpoint.retire(folder.checkpoints, newest, config.checkpoint.keep)
    except Exception as e:  # the run is complete without its pictures
        what = f"previews were not drawn: {type(e).__name__}: {e}"[:400]
        folder.log("warning", step=step, what=what)
        print(
            f"warning: {printable(what)}; draw them with: ringweave sample {folder.path} --by-stage",
            flush=True,
        )
        return
    stages = sorted({entry["stage"] for entry in entries})
    folder.log("previews", step=step, stages=stages, documents=config.log.previews)


def _ends(root: Path) -> list[tuple[int, int, dict[str, Any]]]:
    """(stage, step, manifest) of the checkpoints to draw, in order; each is verified when it is loaded."""
    newest = checkpoint.find(root, warn=print)
    if newest is None:
        raise StorageError(
            "the run has no checkpoint", where=str(root), fix="train it first: ringweave train CONFIG"
        )
    steps = checkpoint.at_stage_ends(root)
    if newest.step not in steps.values():
        steps[int(newest.manifest["cursor"]["stage"])] = newest.step
    found = []
    for stage, step in sorted(steps.items()):
        path = root / checkpoint.checkpoint_name(step)
        found.append((stage, step, json.loads((path / "manifest.json").read_text())))
    return found


def _about(
    stage: int, step: int, manifest: dict[str, Any], count: int, settings: SampleSettings | None
) -> dict[str, Any]:
    """What a stage's entries say beside the picture. stage: from 0; tokens: seen, without padding."""
    stages = manifest["config"]["stages"]
    how = settings or SampleSettings(seed=int(manifest["config"]["run"]["seed"]))
    return {
        "stage": stage, "step": step, "tokens": int(manifest["cursor"]["tokens"]),
        "context": int(stages[min(stage, len(stages) - 1)]["context"]),
        "ended": int(manifest["cursor"]["stage"]) > stage, "count": count,
        "averaged": bool(manifest["config"]["optimizer"].get("ema")), "sampling": repr(how),
    }  # fmt: skip


def _there(listed: Path, about: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The entries of a stage that was drawn from this checkpoint already, if its pictures are still there."""
    try:
        entries = json.loads(listed.read_text())
        same = all(entry[key] == value for entry in entries for key, value in about.items())
        files = all((listed.parent / entry["file"]).is_file() for entry in entries)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entries if entries and same and files else None


@contextmanager
def _alone() -> Iterator[None]:
    """This process is no rank of anything while it draws: it reads whole shards, not its part of them."""
    before = {name: os.environ.pop(name) for name in _PLACES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
