"""Reads `metrics.jsonl` back: one RunHistory with the lineage that led to the last checkpoint.

A run that was killed writes some steps twice: the attempt that died wrote them, then the attempt that
resumed from an older checkpoint wrote them again. The model that exists now comes from the later attempt, so
everything of an earlier attempt beyond the resume point moves to `superseded` and is averaged into nothing.
Bad lines are counted with their line number and reason; a torn last line is told apart from them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ringweave.pretrain.report.history import Attempt, Evaluation, RunHistory, StageSpan, Step, layout_name
from ringweave.pretrain.report.metric_lines import finite, integer, moment, numbers, parse_line


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
        record, problem = parse_line(line)
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
        if event == "quarantine":
            what = f"{record.get('shard')}#{record.get('key')} could not be read: {record.get('reason')}"
            self.warnings.append({**record, "what": what})
            return ""
        step = integer(record.get("step"))
        if step is None:
            return f"{event} without a step number"
        time = moment(record.get("time"))
        attempt = integer(record.get("attempt"))
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
        elif event not in ("start", "recompute", "previews"):
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
                world=integer(record.get("world")),
                start=record,
            )
        )

    def _touch(self, time: float | None) -> None:
        """The last thing heard of the current attempt. A clock that went back moves nothing."""
        current = self.attempts[-1]
        if time is not None and (current.ended is None or time > current.ended):
            current.ended = time

    def _step(self, record: dict[str, Any], step: int, time: float | None) -> None:
        number = integer(record.get("attempt"))
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
            context=integer(record.get("context")),
            tokens=integer(record.get("tokens")),
            loss=finite(record.get("loss")),
            loss_by_modality=numbers(record.get("loss_by_modality")),
            tokens_by_modality=numbers(record.get("tokens_by_modality")),
            tokens_by_source=numbers(record.get("tokens_by_source")),
            seconds=numbers(record.get("seconds")),
            **{
                k: finite(record.get(k))
                for k in ("lr", "grad_norm", "fill", "tokens_per_s", "progress", "eta_s")
            },
        )
        self.attempts[-1].last_step = step

    def _eval(self, record: dict[str, Any], step: int, time: float | None) -> None:
        heldout = record.get("heldout")
        figures = {str(k): numbers(v) for k, v in heldout.items()} if isinstance(heldout, dict) else {}
        levels = {
            str(name): {key: numbers(v[key]) for key in ("by_sigma", "untrained_by_sigma") if key in v}
            for name, v in (heldout.items() if isinstance(heldout, dict) else ())
            if isinstance(v, dict) and "by_sigma" in v
        }
        self.evaluations = [e for e in self.evaluations if e.step != step]
        self.evaluations.append(Evaluation(step=step, time=time, heldout=figures, levels=levels))

    def _stop(self, record: dict[str, Any], step: int, time: float | None) -> None:
        if self.attempts:
            code = integer(record.get("exit_code"))
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
                context=next((s.context for s in group if s.context), integer(last.get("context"))),
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
                sources=numbers(last.get("sources")),
                rope_theta=finite(last.get("rope_theta")),
                batch=last.get("batch"),
                recompute=tuple(dict.fromkeys(str(r["recompute"]) for r in mine if r.get("recompute"))),
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
