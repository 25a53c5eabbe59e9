"""The reader of metrics.jsonl: the final lineage, damage told, sums that add up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ringweave.pretrain.report.history import layout_name
from ringweave.pretrain.report.lineage import read_metrics


def test_final_lineage_is_the_later_attempts(run: Path, synthetic: SimpleNamespace) -> None:
    h = read_metrics(run)
    assert [s.step for s in h.steps] == list(range(1, synthetic.LAST + 1))
    assert {s.attempt for s in h.steps if s.step <= synthetic.RESUMED} == {1}
    assert {s.attempt for s in h.steps if s.step > synthetic.RESUMED} == {2}
    assert [s.step for s in h.superseded] == list(range(synthetic.RESUMED + 1, synthetic.KILLED + 1))
    assert h.repeated_loss_diff() == 0.0
    assert [a.steps_again for a in h.attempts] == [synthetic.KILLED - synthetic.RESUMED, 0]
    assert (h.attempts[0].stop_reason, h.attempts[1].stop_reason) == (None, "done")
    assert h.attempts[1].resumed_from == f"step-{synthetic.RESUMED:08d}"
    assert not h.bad_lines
    assert not h.torn_tail


def test_steps_lost_and_not_reached_again_leave_the_lineage(
    tmp_path: Path, synthetic: SimpleNamespace
) -> None:
    """Killed at 9, resumed from 4, stopped at 6: steps 7 to 9 are of no model that exists."""
    first = synthetic.attempt(0, 1, 9, 1000.0, None)
    second = synthetic.attempt(1, 5, 6, 2000.0, "step-00000004")
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(r) for r in (*first, *second)) + "\n")
    h = read_metrics(tmp_path)
    assert [s.step for s in h.steps] == [1, 2, 3, 4, 5, 6]
    assert [s.step for s in h.superseded] == [5, 6, 7, 8, 9]
    assert [s.attempt for s in h.steps] == [0, 0, 0, 0, 1, 1]
    assert len(h.repeated) == 2


def test_stage_sums_are_of_the_final_lineage(run: Path, synthetic: SimpleNamespace) -> None:
    h = read_metrics(run)
    assert [(s.context, s.first_step, s.last_step, s.steps) for s in h.stages] == [
        (512, 1, 60, 60),
        (2048, 61, 110, 50),
        (8192, 111, 140, 30),
    ]
    assert [s.layouts for s in h.stages] == [("dp2·tp2",), ("pp2·sp2",), ("sp4",)]
    want = sum(synthetic.step(n, attempt=1, time=0.0)["tokens_by_modality"]["text"] for n in range(61, 111))
    assert h.stages[1].tokens_by_modality["text"] == want
    assert h.stages[-1].tokens_end == h.tokens == int(synthetic.STEP_TOKENS * 0.965) * synthetic.LAST
    saves = sum(synthetic.step(n, attempt=1, time=0.0)["seconds"]["checkpoint"] for n in range(61, 111))
    assert h.stages[1].seconds["checkpoint"] == pytest.approx(saves)


def test_damaged_lines_are_counted_and_the_rest_is_read(run: Path, tmp_path: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    good = read_metrics(run)
    at = next(i for i, line in enumerate(lines) if b'"step": 12,' in line and b'"event": "step"' in line)
    lines[at] = lines[at][: len(lines[at]) // 2] + lines.pop(at + 1)  # a dying attempt's line, written on
    lines[3:3] = [
        b"\xff\xfe",
        b"[1, 2]",
        b'{"event": "step", "attempt": 1}',
        b'{"event": "juggle", "step": 2}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"event": "st')
    h = read_metrics(tmp_path)
    assert [why for _, why in h.bad_lines] == [
        "not UTF-8",
        "not a JSON object",
        "step without a step number",
        "unknown event 'juggle'",
        "an unfinished record before this one",
    ]
    assert [n for n, _ in h.bad_lines[:4]] == [4, 5, 6, 7]
    assert h.torn_tail
    assert [s.step for s in h.steps] == [s.step for s in good.steps if s.step != 12]


def test_an_evaluation_after_the_run_is_no_part_of_an_attempt(
    run: Path, tmp_path: Path, synthetic: SimpleNamespace
) -> None:
    """`ringweave eval` a day later logs with any attempt number; the run's wall time stays what it was."""
    late = {
        "event": "eval",
        "time": 1_790_090_000.0,
        "attempt": 9,
        "step": synthetic.LAST,
        "heldout": synthetic.heldout(synthetic.LAST),
    }
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + json.dumps(late) + "\n")
    h, before = read_metrics(tmp_path), read_metrics(run)
    assert [(a.number, a.ended) for a in h.attempts] == [(a.number, a.ended) for a in before.attempts]
    assert [e.step for e in h.evaluations] == [e.step for e in before.evaluations]
    assert h.evaluations[-1].time == late["time"]


def test_a_lost_start_record_is_inferred(tmp_path: Path, synthetic: SimpleNamespace) -> None:
    second = synthetic.attempt(2, 5, 6, 2000.0, "step-00000004")[1:]
    records = (*synthetic.attempt(1, 1, 7, 1000.0, None), *second)
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(r) for r in records) + "\n")
    h = read_metrics(tmp_path)
    assert [s.step for s in h.steps] == [1, 2, 3, 4, 5, 6]
    assert [a.number for a in h.attempts] == [1, 2]


def test_missing_metrics(tmp_path: Path) -> None:
    h = read_metrics(tmp_path)
    assert (h.found, h.steps, h.tokens, h.eta_check()) == (False, (), 0, None)


@pytest.mark.parametrize(("inside", "save"), [(True, 0.5), (False, 0.5), (False, 0.0)])
def test_time_split_adds_up_with_the_checkpoint_in_or_out(tmp_path: Path, inside: bool, save: float) -> None:
    parts = {"data": 0.2, "compute": 1.0, "optimizer": 0.3, "checkpoint": save}
    record = {"event": "step", "step": 1, "tokens": 8, "seconds": {"step": 1.5 + save * inside, **parts}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    step = read_metrics(tmp_path).steps[0]
    assert step.wall == pytest.approx(1.5 + save)
    assert step.time_split()["other"] == pytest.approx(0.0)


def test_layout_names() -> None:
    assert layout_name({"dp": 2, "pp": 1, "tp": 2, "sp": 1}) == "dp2·tp2"
    assert layout_name({"dp": 1, "tp": 1}) == "1 process"
    assert (layout_name("sp4"), layout_name(None)) == ("sp4", "")
