"""What `metrics.jsonl` says about a run, as values: its steps, attempts and stages. No numpy, no torch."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIME_PARTS: tuple[str, ...] = ("data", "compute", "optimizer", "checkpoint")


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step. `tokens` is cumulative and without padding; `seconds` has "step" and TIME_PARTS."""

    step: int
    attempt: int
    time: float | None
    stage: str
    context: int | None
    tokens: int | None
    loss: float | None
    loss_by_modality: dict[str, float]
    tokens_by_modality: dict[str, float]
    tokens_by_source: dict[str, float]
    seconds: dict[str, float]
    lr: float | None = None
    grad_norm: float | None = None
    fill: float | None = None
    tokens_per_s: float | None = None
    progress: float | None = None
    eta_s: float | None = None

    def time_split(self) -> dict[str, float]:
        """Seconds of TIME_PARTS and "other", which together are the wall time of the step.

        Whether `seconds["step"]` holds the checkpoint is told by the numbers: not when the parts exceed it.
        """
        parts = {p: self.seconds.get(p, 0.0) for p in TIME_PARTS}
        step = self.seconds.get("step", 0.0)
        if step < sum(parts.values()):
            step += parts["checkpoint"]
        return {**parts, "other": max(0.0, step - sum(parts.values()))}

    @property
    def wall(self) -> float:
        """Wall time of the step in seconds, its checkpoint included."""
        return sum(self.time_split().values())


@dataclass(slots=True)
class Attempt:
    """One process group from start to stop or death, filled as its records are read. Times are seconds since
    the epoch."""

    number: int
    resumed_from: str | None
    start_step: int
    began: float | None
    ended: float | None = None
    last_step: int | None = None
    kept_step: int | None = (
        None  # last of its steps in the final lineage; below last_step when some ran again
    )
    stop_reason: str | None = None  # None: it left no stop record (killed, or still running)
    exit_code: int | None = None
    layout: str = ""
    world: int | None = None
    start: dict[str, Any] = field(default_factory=dict)

    @property
    def steps_again(self) -> int:
        """How many of its steps a later attempt trained again."""
        if self.last_step is None:
            return 0
        return max(0, self.last_step - (self.start_step if self.kept_step is None else self.kept_step))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out figures at a step: {modality: {"loss", "tokens", "unigram_entropy"}}, in nats; of a dit {"loss"}, a mean
    square error, and levels {modality: {"by_sigma" or "untrained_by_sigma": {noise level: loss}}}."""

    step: int
    time: float | None
    heldout: dict[str, dict[str, float]]
    levels: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageSpan:
    """What the final lineage did in one context stage. Sums are over its steps; `number` counts from 1."""

    number: int
    key: str
    context: int | None
    layouts: tuple[str, ...]
    first_step: int
    last_step: int
    steps: int
    tokens_begin: int
    tokens_end: int
    tokens_per_s: float | None  # median of the steps
    step_seconds: float | None  # median of the steps
    fill: float | None  # 0..1, tokens over slots
    seconds: dict[str, float]  # TIME_PARTS and "other"
    tokens_by_modality: dict[str, float]
    tokens_by_source: dict[str, float]
    sources: dict[str, float]
    rope_theta: float | None = None
    batch: Any = None
    recompute: tuple[str, ...] = ()  # kinds of recomputation, in order of use


@dataclass(frozen=True, slots=True)
class RunHistory:
    """Everything metrics.jsonl says. `steps` is the final lineage, in step order, each step once."""

    path: Path
    found: bool
    lines: int = 0
    bad_lines: tuple[tuple[int, str], ...] = ()
    torn_tail: bool = False
    steps: tuple[Step, ...] = ()
    superseded: tuple[Step, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    stages: tuple[StageSpan, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    checkpoints: tuple[dict[str, Any], ...] = ()
    warnings: tuple[dict[str, Any], ...] = ()

    @property
    def tokens(self) -> int:
        """Cumulative tokens (no padding) after the last step."""
        return next((s.tokens for s in reversed(self.steps) if s.tokens is not None), 0)

    @property
    def repeated(self) -> tuple[tuple[Step, Step], ...]:
        """(earlier, final) of every step that was trained in more than one attempt."""
        final = {s.step: s for s in self.steps}
        return tuple((old, final[old.step]) for old in self.superseded if old.step in final)

    def repeated_loss_diff(self) -> float | None:
        """Largest |loss difference| between two trainings of a step; None if no step was repeated."""
        diffs = [abs(a.loss - b.loss) for a, b in self.repeated if a.loss is not None and b.loss is not None]
        return max(diffs) if diffs else None

    def tokens_at(self, step: int) -> int:
        """Cumulative tokens after `step` (or the last step before it) of the final lineage; 0 before all."""
        at = bisect.bisect_right(self.steps, step, key=lambda s: s.step)
        return next((s.tokens for s in reversed(self.steps[:at]) if s.tokens is not None), 0)

    def wasted_seconds(self) -> float:
        """Step time of the steps that were trained again."""
        return sum(s.wall for s in self.superseded)

    def eta_check(self) -> tuple[float, float, float] | None:
        """(progress, predicted s, true s) of the first estimate from 20 % on; None before the run's end.

        The truth is the step time that followed in the final lineage, without downtime between attempts.
        """
        if not self.steps or (self.steps[-1].progress or 0.0) < 0.999:
            return None
        for i, s in enumerate(self.steps):
            if s.progress is not None and s.progress >= 0.2 and s.eta_s is not None:
                rest = sum(later.wall for later in self.steps[i + 1 :])
                return (s.progress, s.eta_s, rest) if rest > 0 else None
        return None


def layout_name(layout: Any) -> str:
    """`{"dp": 2, "pp": 1, "tp": 2}` -> "dp2·tp2"; all ones -> "1 process"; text stays; else ""."""
    if isinstance(layout, str):
        return layout
    if not isinstance(layout, dict):
        return ""
    axes = [f"{k}{v}" for k, v in layout.items() if isinstance(v, int) and not isinstance(v, bool) and v > 1]
    return "·".join(axes) or "1 process"
