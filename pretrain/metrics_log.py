"""Reads `metrics.jsonl` back: one RunHistory with the lineage that led to the last checkpoint.

A run that was killed writes some steps twice: the attempt that died wrote them, then the attempt that
resumed from an older checkpoint wrote them again. The model that exists now comes from the later attempt, so
everything of an earlier attempt beyond the resume point moves to `superseded` and is averaged into nothing.

The file is append-only text written by processes that may die at any byte. Bad lines are counted with their
line number and reason, a torn last line is told apart from them, and a line that a dying attempt left
unfinished and the next one wrote on is read from where the new record begins. No numpy, no torch.
"""

from __future__ import annotations

import bisect
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

TIME_PARTS: tuple[str, ...] = ("data", "compute", "optimizer", "checkpoint")
_RECORD_START = '{"event"'


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
    """Held-out figures at a step: {modality: {"loss", "tokens", "unigram_entropy"}}, in nats."""

    step: int
    time: float | None
    heldout: dict[str, dict[str, float]]


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


def read_metrics(run_dir: Path) -> RunHistory:
    """Read `run_dir/metrics.jsonl`. A missing file gives an empty history with `found` False; damaged content
    raises nothing, it is counted in `bad_lines` and `torn_tail`."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return RunHistory(path=path, found=False)
    builder = _Builder()
    raw = path.read_bytes().split(b"\n")
    tail_open = raw[-1] != b""
    lines = raw if tail_open else raw[:-1]
    torn = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record, problem = _parse(line)
        if problem and record is None and tail_open and number == len(lines):
            torn = True
            continue
        if problem:
            builder.bad.append((number, problem))
        if record is not None:
            reason = builder.add(record)
            if reason:
                builder.bad.append((number, reason))
    return builder.history(path, lines=len(lines), torn=torn)


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """(record or None, problem or ""). Both are set when a record follows the remains of a torn one."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return None, "not UTF-8"
    record = _object(text)
    if record is not None:
        return record, ""
    cut = text.rfind(_RECORD_START)
    record = _object(text[cut:]) if cut > 0 else None
    return record, "an unfinished record before this one" if record else "not a JSON object"


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def finite(value: Any) -> float | None:
    """A finite number, or None (NaN and infinities are not drawn and not averaged)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _integer(value: Any) -> int | None:
    number = finite(value)
    return None if number is None else int(number)


def _numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a mapping; anything else is left out."""
    if not isinstance(value, dict):
        return {}
    return {str(k): n for k, v in value.items() if (n := finite(v)) is not None}


def _seconds(value: Any) -> float | None:
    """Seconds since the epoch from a number or an ISO 8601 text."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except (ValueError, OverflowError):
            return None
    return finite(value)


class _Builder:
    """Replays the records in file order. File order, not the clock, decides what is later."""

    def __init__(self) -> None:
        self.bad: list[tuple[int, str]] = []
        self.attempts: list[Attempt] = []
        self.steps: dict[int, Step] = {}
        self.superseded: list[Step] = []
        self.evaluations: list[Evaluation] = []
        self.stage_records: list[dict[str, Any]] = []
        self.checkpoints: list[dict[str, Any]] = []
        self.warnings: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> str:
        """Take one record; returns why it cannot be used, or ""."""
        event = record.get("event")
        if not isinstance(event, str):
            return "no event name"
        if event == "warning":
            self.warnings.append(record)
            return ""
        step = _integer(record.get("step"))
        if step is None:
            return f"{event} without a step number"
        time = _seconds(record.get("time"))
        attempt = _integer(record.get("attempt"))
        if event == "start":
            self._start(record, number=attempt, step=step, time=time)
        elif event == "eval":
            pass  # may be logged long after the run by another process: neither starts nor extends an attempt
        elif attempt is not None and (not self.attempts or attempt > self.attempts[-1].number):
            # Its start record was lost: the first thing it reports tells where it resumed.
            self._start({}, number=attempt, step=step - (event == "step"), time=time)
        if self.attempts and event != "eval":
            self._touch(time)
        handler = {"step": self._step, "eval": self._eval, "stop": self._stop}.get(event)
        if handler:
            handler(record, step, time)
        elif event == "stage":
            self.stage_records.append(record)
        elif event == "checkpoint":
            self.checkpoints.append(record)
        elif event != "start":
            return f"unknown event {event[:40]!r}"
        return ""

    def _start(self, record: dict[str, Any], *, number: int | None, step: int, time: float | None) -> None:
        lost = [s for s in self.steps.values() if s.step > step]
        self.superseded += sorted(lost, key=lambda s: s.step)
        self.steps = {k: s for k, s in self.steps.items() if k <= step}
        self.evaluations = [e for e in self.evaluations if e.step <= step]
        resumed = record.get("resumed_from")
        number = number if number is not None else (self.attempts[-1].number + 1 if self.attempts else 1)
        self.attempts.append(
            Attempt(
                number=number,
                resumed_from=resumed if isinstance(resumed, str) else None,
                start_step=step,
                began=time,
                ended=time,
                layout=layout_name(record.get("layout")),
                world=_integer(record.get("world")),
                start=record,
            )
        )

    def _touch(self, time: float | None) -> None:
        """The last thing heard of the current attempt. A clock that went back moves nothing."""
        current = self.attempts[-1]
        if time is not None and (current.ended is None or time > current.ended):
            current.ended = time

    def _step(self, record: dict[str, Any], step: int, time: float | None) -> None:
        number = _integer(record.get("attempt"))
        if number is None:
            number = self.attempts[-1].number if self.attempts else 1
        if not self.attempts:
            self._start({}, number=number, step=step - 1, time=time)
        if step in self.steps:
            self.superseded.append(self.steps[step])
        self.steps[step] = Step(
            step=step,
            attempt=number,
            time=time,
            stage=str(record.get("stage", "")),
            context=_integer(record.get("context")),
            tokens=_integer(record.get("tokens")),
            loss=finite(record.get("loss")),
            loss_by_modality=_numbers(record.get("loss_by_modality")),
            tokens_by_modality=_numbers(record.get("tokens_by_modality")),
            tokens_by_source=_numbers(record.get("tokens_by_source")),
            seconds=_numbers(record.get("seconds")),
            **{
                k: finite(record.get(k))
                for k in ("lr", "grad_norm", "fill", "tokens_per_s", "progress", "eta_s")
            },
        )
        self.attempts[-1].last_step = step

    def _eval(self, record: dict[str, Any], step: int, time: float | None) -> None:
        heldout = record.get("heldout")
        figures = {str(k): _numbers(v) for k, v in heldout.items()} if isinstance(heldout, dict) else {}
        self.evaluations = [e for e in self.evaluations if e.step != step]
        self.evaluations.append(Evaluation(step=step, time=time, heldout=figures))

    def _stop(self, record: dict[str, Any], step: int, time: float | None) -> None:
        if self.attempts:
            code = _integer(record.get("exit_code"))
            reason = str(record.get("reason", "stopped"))
            self.attempts[-1].stop_reason, self.attempts[-1].exit_code = reason, code

    def history(self, path: Path, *, lines: int, torn: bool) -> RunHistory:
        steps = tuple(self.steps[k] for k in sorted(self.steps))
        kept: dict[int, int] = {}
        for s in steps:
            kept[s.attempt] = max(s.step, kept.get(s.attempt, s.step))
        for a in self.attempts:
            a.kept_step = kept.get(a.number)
        return RunHistory(
            path=path,
            found=True,
            lines=lines,
            bad_lines=tuple(self.bad),
            torn_tail=torn,
            steps=steps,
            superseded=tuple(self.superseded),
            attempts=tuple(self.attempts),
            stages=_stages(steps, self.stage_records),
            evaluations=tuple(sorted(self.evaluations, key=lambda e: e.step)),
            checkpoints=tuple(self.checkpoints),
            warnings=tuple(self.warnings),
        )


def _stages(steps: tuple[Step, ...], records: list[dict[str, Any]]) -> tuple[StageSpan, ...]:
    groups: dict[str, list[Step]] = {}
    for s in steps:
        groups.setdefault(s.stage, []).append(s)
    spans: list[StageSpan] = []
    begin = 0
    for key, group in groups.items():
        mine = [r for r in records if str(r.get("stage", "")) == key]
        last = mine[-1] if mine else {}
        names = dict.fromkeys(name for r in mine if (name := layout_name(r.get("layout"))))
        end = max((s.tokens for s in group if s.tokens is not None), default=begin)
        spans.append(
            StageSpan(
                number=len(spans) + 1,
                key=key,
                context=next((s.context for s in group if s.context), _integer(last.get("context"))),
                layouts=tuple(names),
                first_step=group[0].step,
                last_step=group[-1].step,
                steps=len(group),
                tokens_begin=begin,
                tokens_end=end,
                tokens_per_s=_median(s.tokens_per_s for s in group),
                step_seconds=_median(s.seconds.get("step") for s in group),
                fill=_fill(group, begin),
                seconds=_total(s.time_split() for s in group),
                tokens_by_modality=_total(s.tokens_by_modality for s in group),
                tokens_by_source=_total(s.tokens_by_source for s in group),
                sources=_numbers(last.get("sources")),
                rope_theta=finite(last.get("rope_theta")),
                batch=last.get("batch"),
            )
        )
        begin = end
    return tuple(spans)


def _fill(group: list[Step], begin: int) -> float | None:
    """Tokens over slots of the group: sum(tokens) / sum(tokens / fill), not the mean of the ratios."""
    tokens = slots = 0.0
    for s in group:
        if s.tokens is not None and s.fill:
            tokens += s.tokens - begin
            slots += (s.tokens - begin) / s.fill
        begin = s.tokens if s.tokens is not None else begin
    return tokens / slots if slots > 0 else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def _total(mappings: Iterable[dict[str, float]]) -> dict[str, float]:
    out: dict[str, float] = {}
    for mapping in mappings:
        for k, v in mapping.items():
            out[k] = out.get(k, 0.0) + v
    return out
