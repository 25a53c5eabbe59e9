"""The report: right numbers, final lineage, nothing loaded or run from data, every gap told."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import struct
import wave
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ringweave.pretrain import report, report_charts, report_style
from ringweave.pretrain.metrics_log import layout_name, read_metrics
from ringweave.pretrain.report import write_report
from ringweave.tokenizers.errors import UserError

MODALITIES = ("text", "image", "rgba", "video", "audio", "score")
UNIGRAM = {"text": 5.82, "image": 5.31, "rgba": 4.97, "video": 5.44, "audio": 5.06, "score": 3.71}
FLOOR = {"text": 3.35, "image": 3.92, "rgba": 2.71, "video": 3.46, "audio": 4.12, "score": 1.58}
STAGES: tuple[dict[str, Any], ...] = (
    {
        "context": 512,
        "layout": {"dp": 2, "pp": 1, "tp": 2, "sp": 1},
        "rope_theta": 1e4,
        "last": 60,
        "rate": 5200,
    },
    {
        "context": 2048,
        "layout": {"dp": 1, "pp": 2, "tp": 1, "sp": 2},
        "rope_theta": 1e5,
        "last": 110,
        "rate": 4300,
    },
    {
        "context": 8192,
        "layout": {"dp": 1, "pp": 1, "tp": 1, "sp": 4},
        "rope_theta": 1e6,
        "last": 140,
        "rate": 2900,
    },
)
LAST, KILLED, RESUMED = 140, 87, 80
STEP_TOKENS = 8192
XSS = '<script>alert("x")</script><img src=x onerror=alert(1)>'


# --- a synthetic run: three stages, killed in the second at step 87, resumed from step 80 ------------------


def _stage_of(step: int) -> int:
    return next(i for i, s in enumerate(STAGES) if step <= s["last"])


def _step(step: int, *, attempt: int, time: float) -> dict[str, Any]:
    """The record of one step: a function of the step alone, as a bit-exact resume would log it."""
    rng = random.Random(step)
    number = _stage_of(step)
    stage = STAGES[number]
    tokens = int(STEP_TOKENS * 0.965) * step
    losses = {
        m: FLOOR[m]
        + (9.2 - FLOOR[m]) * math.exp(-step / 7) * 0.62
        + (UNIGRAM[m] - FLOOR[m]) * 0.9 * math.exp(-step / 46)
        + rng.gauss(0, 0.09)
        for m in MODALITIES
    }
    shares = dict(zip(MODALITIES, (0.3, 0.2, 0.13, 0.15, 0.1, 0.12)))
    counts = {m: int(STEP_TOKENS * 0.9 * s * rng.uniform(0.8, 1.2)) for m, s in shares.items()}
    seconds = STEP_TOKENS / stage["rate"] * rng.uniform(0.94, 1.08)
    save = 0.28 if step % 10 == 0 else 0.0
    parts = {
        "data": 0.06 * seconds,
        "compute": 0.81 * seconds,
        "optimizer": 0.09 * seconds,
        "checkpoint": save,
    }
    return {
        "event": "step",
        "time": time,
        "attempt": attempt,
        "step": step,
        "stage": number,
        "context": stage["context"],
        "tokens": tokens,
        "loss": sum(losses[m] * counts[m] for m in MODALITIES) / sum(counts.values()),
        "loss_by_modality": losses,
        "tokens_by_modality": counts,
        "lr": 3e-4 * min(1, step / 20) * (0.55 + 0.45 * math.cos(math.pi * step / LAST)),
        "grad_norm": 0.7 + 3 * math.exp(-step / 8) + rng.random() * 0.25,
        "fill": (0.985, 0.962, 0.941)[number] + rng.uniform(-0.012, 0.012),
        "tokens_per_s": STEP_TOKENS * 0.965 / seconds,
        "seconds": {"step": seconds, **parts},
        "progress": step / LAST,
        "eta_s": (LAST - step) * 2.02,
    }


def _attempt(number: int, first: int, last: int, began: float, resumed: str | None) -> list[dict[str, Any]]:
    layout = STAGES[_stage_of(first)]["layout"]
    head = {
        "event": "start",
        "time": began,
        "attempt": number,
        "step": first - 1,
        "resumed_from": resumed,
        "layout": layout,
        "world": 4,
        "config_hash": "9f3c2e71a8d04b55",
        "params": 4_812_544,
        "versions": {"ringweave": "0.1.0", "torch": "2.14.1+cpu", "python": "3.11.15", "numpy": "2.4.6"},
        "host": {"cores": 2, "memory_gib": 15.6, "machine": "x86_64"},
    }
    out, time, stage = [head], began + 6.5, -1
    for step in range(first, last + 1):
        if _stage_of(step) != stage:
            stage = _stage_of(step)
            s = STAGES[stage]
            out.append(
                {
                    "event": "stage",
                    "time": time,
                    "attempt": number,
                    "step": step - 1,
                    "stage": stage,
                    "batch": STEP_TOKENS // s["context"],
                    "context": s["context"],
                    "rope_theta": s["rope_theta"],
                    "layout": s["layout"],
                    "sources": dict(zip(MODALITIES, (0.3, 0.2, 0.13, 0.15, 0.1, 0.12))),
                }
            )
        record = _step(step, attempt=number, time=time)
        time += record["seconds"]["step"] + record["seconds"]["checkpoint"]
        record["time"] = time
        out.append(record)
        if step % 10 == 0:
            out.append(
                {
                    "event": "checkpoint",
                    "time": time,
                    "attempt": number,
                    "step": step,
                    "seconds": 0.28,
                    "bytes": 57_750_528,
                    "path": f"checkpoints/step-{step:08d}",
                }
            )
        if step % 20 == 0:
            out.append({"event": "eval", "time": time, "step": step, "heldout": heldout(step)})
    return out


def heldout(step: int) -> dict[str, dict[str, float]]:
    """Held-out figures: a little above the training loss."""
    losses = _step(step, attempt=1, time=0.0)["loss_by_modality"]
    return {m: {"loss": losses[m] + 0.06, "tokens": 4096, "unigram_entropy": UNIGRAM[m]} for m in MODALITIES}


def png(width: int, height: int, pixel, *, channels: int = 3) -> bytes:
    """A PNG from `pixel(x, y) -> tuple of `channels` ints`, without an image library."""
    rows = b"".join(b"\0" + bytes(v for x in range(width) for v in pixel(x, y)) for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def _pair(x: int, y: int, *, block: int) -> tuple[int, int, int]:
    """A disc on a gradient at the left; the same, coarser, at the right of a white gutter."""
    if 64 <= x < 68:
        return (255, 255, 255)
    if x >= 68:
        x, y = (x - 68) // block * block, y // block * block
    inside = (x - 32) ** 2 + (y - 30) ** 2 < 420
    return (240, 190 - y, 60) if inside else (70 + 2 * y % 180, 120 + x, 200)


def make_run(folder: Path) -> Path:
    """A realistic run folder with every input the report knows."""
    run = folder / "demo"
    for sub in ("tokenizers/show", "samples", "export"):
        (run / sub).mkdir(parents=True)
    first = _attempt(1, 1, KILLED, 1_790_000_000.0, None)
    second = _attempt(2, RESUMED + 1, LAST, first[-1]["time"] + 9.0, f"step-{RESUMED:08d}")
    end = second[-1]["time"] + 0.4
    second.insert(
        1,
        {
            "event": "warning",
            "time": second[0]["time"],
            "attempt": 2,
            "step": RESUMED,
            "what": "passed over step-00000090.tmp: it was never committed",
        },
    )
    second.append(
        {"event": "stop", "time": end, "attempt": 2, "step": LAST, "reason": "done", "exit_code": 0}
    )
    lines = [json.dumps(r) for r in (*first, *second)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "config.yaml").write_text(
        "run: {name: demo, seed: 7, dir: runs/demo}\n"
        "tokenizers: {text: {pieces: 2048}, image: {codes: 1024}}\n"
        "data:\n  base: https://alice:hunter2@store.example/shards?X-Amz-Signature=abc123&part=1\n"
        "  hf_token: hf_abcdefghijklmnopqrstuv\n"
        "model: {kind: lwm, layers: 4, width: 256, heads: 8, kv_heads: 4}\nobjective: {next_token: 1.0}\n"
        "stages:\n  - {context: 512, tokens: 480K, rope_theta: 1e4, layout: {dp: 2, tp: 2}}\n"
        "  - {context: 2K, tokens: 400K, rope_theta: 1e5, layout: {pp: 2, sp: 2}}\n"
        "  - {context: 8K, tokens: 240K, rope_theta: 1e6, layout: {sp: 4}}\n"
    )
    _json_inputs(run)
    _media(run)
    return run


def _json_inputs(run: Path) -> None:
    layouts = ("dp4", "dp2·tp2", "pp2·sp2", "sp4", "dp2·sp2")
    rows = [
        {
            "layout": n,
            "law": 2,
            "max_rel_loss_diff": 2.1e-8 * (i + 1),
            "max_rel_grad_diff": 8.7e-7 * (i + 1),
            "holds": True,
        }
        for i, n in enumerate(layouts)
    ]
    rows += [
        {
            "law": 1,
            "layout": "packed = separate, fp64",
            "max_rel_loss_diff": 0.0,
            "max_rel_grad_diff": 2.9e-16,
            "holds": True,
        },
        {
            "law": 3,
            "layout": "died at steps 2 and 7, resumed",
            "steps": 9,
            "steps_with_other_loss": 0,
            "holds": True,
        },
        {"law": 5, "layout": "transformers LlamaForCausalLM", "max_abs_logit_diff": 8.9e-8, "holds": True},
    ]
    proof = {
        "data": {
            m: {"records": 900 - 70 * i, "tokens": 410_000 - 31_000 * i, "heldout_records": 48}
            for i, m in enumerate(MODALITIES)
        },
        "tokenizers": {
            "text_lossy_documents": 0,
            "image_psnr": 26.41,
            "image_floor_psnr": 14.2,
            "audio_si_sdr": 7.9,
        },
        "stages": [],
        "heldout": heldout(LAST),
        "resume": {"killed_at_step": KILLED, "samples_lost": 0, "samples_repeated": 0, "max_loss_diff": 0.0},
        "layouts": {"max_rel_loss_diff": 1.05e-7, "max_rel_grad_diff": 4.35e-6},
        "export": {"class": "LlamaForCausalLM", "max_abs_logit_diff": 3.1e-6},
        "seconds": 331.0,
        "peak_rss_gib": 2.37,
    }
    figures = {
        "text": {"pieces": 2048, "bytes_per_token": 2.91, "lossy_documents": 0},
        "image": {"psnr": 26.41, "floor_psnr": 14.2, "codes_used": 1011},
        "rgba": {"psnr": 24.9, "alpha_psnr": 29.3},
        "video": {"psnr": 25.02},
        "audio": {"si_sdr": 7.9},
        "score": {"ink_f1": 0.982},
    }
    files = {
        "exit.json": {"exit_code": 0, "reason": "done", "step": LAST},
        "proof.json": proof,
        "verify.json": {"holds": True, "rows": rows},
        "export/export.json": proof["export"],
        "tokenizers/figures.json": figures,
        "samples/samples.json": [
            {
                "modality": "text",
                "prompt": "In the beginning",
                "text": "In the beginning the word came unto the people,\nAnd the king said, Let us go.",
            },
            {"modality": "image", "prompt": XSS, "file": "image-0.png"},
            {
                "modality": "text",
                "prompt": "And it came to pass",
                "text": "And it came to pass that the sons were gathered <b>together</b> & said",
            },
            {"modality": "image", "prompt": "a red apple", "file": "image-1.png"},
            {
                "modality": "score",
                "prompt": "4/4, G major",
                "text": "X:1\nM:4/4\nK:G\nGABc d2 d2 | edcB A2 D2 | GABc dedc | B2 G2 G4 |]",
            },
        ],
    }
    for name, value in files.items():
        (run / name).write_text(json.dumps(value))


def _media(run: Path) -> None:
    show = run / "tokenizers/show"
    for i, name in enumerate(("image", "video", "score")):
        (show / f"{name}-0.png").write_bytes(png(132, 64, lambda x, y, b=4 + 2 * i: _pair(x, y, block=b)))
    (show / "rgba-0.png").write_bytes(
        png(132, 64, lambda x, y: (*_pair(x, y, block=4), 255 if (x + y) % 40 < 28 else 0), channels=4)
    )
    (show / "audio-0.png").write_bytes(png(400, 96, lambda x, y: (20 + (x * y) % 90, 30 + y, 90 + x % 120)))
    with wave.open(str(show / "audio-0.wav"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(i / 9))) for i in range(8000)))
    (show / "text-0.txt").write_text("original: Let there be light.\ndecoded:  Let there be light.\n")
    for i in range(2):
        (run / f"samples/image-{i}.png").write_bytes(
            png(64, 64, lambda x, y, i=i: _pair(68 * i + x % 64, y, block=5))
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


# --- the reader -------------------------------------------------------------------------------------------


def test_final_lineage_is_the_later_attempts(run: Path) -> None:
    h = read_metrics(run)
    assert [s.step for s in h.steps] == list(range(1, LAST + 1))
    assert {s.attempt for s in h.steps if s.step <= RESUMED} == {1}
    assert {s.attempt for s in h.steps if s.step > RESUMED} == {2}
    assert [s.step for s in h.superseded] == list(range(RESUMED + 1, KILLED + 1))
    assert h.repeated_loss_diff() == 0.0
    assert [a.steps_again for a in h.attempts] == [KILLED - RESUMED, 0]
    assert (h.attempts[0].stop_reason, h.attempts[1].stop_reason) == (None, "done")
    assert h.attempts[1].resumed_from == f"step-{RESUMED:08d}"
    assert not h.bad_lines
    assert not h.torn_tail


def test_steps_lost_and_not_reached_again_leave_the_lineage(tmp_path: Path) -> None:
    """Killed at 9, resumed from 4, stopped at 6: steps 7 to 9 are of no model that exists."""
    first = _attempt(0, 1, 9, 1000.0, None)
    second = _attempt(1, 5, 6, 2000.0, "step-00000004")
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(r) for r in (*first, *second)) + "\n")
    h = read_metrics(tmp_path)
    assert [s.step for s in h.steps] == [1, 2, 3, 4, 5, 6]
    assert [s.step for s in h.superseded] == [5, 6, 7, 8, 9]
    assert [s.attempt for s in h.steps] == [0, 0, 0, 0, 1, 1]
    assert len(h.repeated) == 2


def test_stage_sums_are_of_the_final_lineage(run: Path) -> None:
    h = read_metrics(run)
    assert [(s.context, s.first_step, s.last_step, s.steps) for s in h.stages] == [
        (512, 1, 60, 60),
        (2048, 61, 110, 50),
        (8192, 111, 140, 30),
    ]
    assert [s.layouts for s in h.stages] == [("dp2·tp2",), ("pp2·sp2",), ("sp4",)]
    want = sum(_step(n, attempt=1, time=0.0)["tokens_by_modality"]["text"] for n in range(61, 111))
    assert h.stages[1].tokens_by_modality["text"] == want
    assert h.stages[-1].tokens_end == h.tokens == int(STEP_TOKENS * 0.965) * LAST
    saves = sum(_step(n, attempt=1, time=0.0)["seconds"]["checkpoint"] for n in range(61, 111))
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


def test_an_evaluation_after_the_run_is_no_part_of_an_attempt(run: Path, tmp_path: Path) -> None:
    """`ringweave eval` a day later logs with any attempt number; the run's wall time stays what it was."""
    late = {"event": "eval", "time": 1_790_090_000.0, "attempt": 9, "step": LAST, "heldout": heldout(LAST)}
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + json.dumps(late) + "\n")
    h, before = read_metrics(tmp_path), read_metrics(run)
    assert [(a.number, a.ended) for a in h.attempts] == [(a.number, a.ended) for a in before.attempts]
    assert [e.step for e in h.evaluations] == [e.step for e in before.evaluations]
    assert h.evaluations[-1].time == late["time"]


def test_a_lost_start_record_is_inferred(tmp_path: Path) -> None:
    second = _attempt(2, 5, 6, 2000.0, "step-00000004")[1:]
    records = (*_attempt(1, 1, 7, 1000.0, None), *second)
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


def test_injected_data_delay_reads_as_such(tmp_path: Path) -> None:
    """Half of each step spent waiting for data must read 50 % on the page."""
    rows = [
        {
            "event": "step",
            "step": n,
            "stage": 0,
            "context": 512,
            "tokens": 500 * n,
            "loss": 2.0,
            "loss_by_modality": {"text": 2.0},
            "tokens_per_s": 500,
            "seconds": {"step": 1.0, "data": 0.5, "compute": 0.4, "optimizer": 0.1, "checkpoint": 0.0},
        }
        for n in range(1, 9)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = write_report(tmp_path).read_text()
    assert "Waiting for data took 50.0 % of step time" in page


def test_layout_names() -> None:
    assert layout_name({"dp": 2, "pp": 1, "tp": 2, "sp": 1}) == "dp2·tp2"
    assert layout_name({"dp": 1, "tp": 1}) == "1 process"
    assert (layout_name("sp4"), layout_name(None)) == ("sp4", "")


# --- the page ---------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects tags with attributes and the visible text; checks that tags close in order."""

    VOID = frozenset({"meta", "img", "br", "path", "rect", "circle"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID or tag in ("path", "rect", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_page_is_self_contained_and_well_formed(html: str) -> None:
    page = _Page(html)
    loads = [
        v
        for _, attrs in page.tags
        for k, v in attrs.items()
        if k in ("src", "href", "xlink:href", "action", "data")
    ]
    assert loads
    assert all(v.startswith(("data:", "#")) for v in loads if v)
    assert not re.search(r"(?i)(src|href)\s*=\s*[\"']?(https?:)?//", html)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert not {t for t, _ in page.tags} & {"script", "iframe", "object", "embed", "link", "form", "base"}
    assert not [k for _, attrs in page.tags for k in attrs if k.startswith("on")]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert len(html.encode()) < 3_000_000


def test_page_is_the_same_every_time(run: Path, html: str, tmp_path: Path) -> None:
    assert write_report(run, out=tmp_path / "again.html").read_text(encoding="utf-8") == html
    assert [p.name for p in tmp_path.iterdir()] == ["again.html"]


def test_captions_are_escaped_and_shown(html: str) -> None:
    assert "<script>" not in html
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in html
    assert XSS in _Page(html).said
    assert "<b>together</b> &" in _Page(html).said


def test_numbers_shown_are_those_of_the_inputs(run: Path, html: str) -> None:
    said = _Page(html).said
    for name, figures in heldout(LAST).items():
        assert f"{name} {figures['loss']:.3f} held out · unigram {figures['unigram_entropy']:.3f}" in said
    assert "Learned 6 of 6 modalities below" in said
    assert f"killed at step {KILLED}; 0 samples lost, 0 repeated; 7 steps trained twice" in said
    assert "Layouts agree 5 of 5" in said
    assert "Export agrees Δ 3.1e-6" in said
    assert "Steps 140 Tokens 1.11 M Parameters 4.81 M Context 512 → 2K → 8K" in said
    assert "Peak memory 2.37 GiB" in said
    assert "dp2·tp2 4.2e-8 1.7e-6 holds" in said
    assert "PSNR 26.41 dB" in said
    assert "text 30 % 900 410 K 48" in said
    for span in read_metrics(run).stages:
        assert span.tokens_per_s is not None
        assert report_style.short(span.tokens_per_s) in said
    assert "7 steps ran twice; the largest difference between the two losses is 0 ." in said
    assert "passed over step-00000090.tmp" in said


def test_secrets_are_redacted(html: str) -> None:
    for secret in ("hunter2", "abc123", "hf_abcdefghijklmnopqrstuv"):
        assert secret not in html
    assert "objective: {next_token: 1.0}" in html
    assert "part=1" in html


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("s3 https://u:p@h/x?sig=AA&v=1", "s3 https://[redacted]@h/x?sig=[redacted]&v=1"),
        ("?X-Amz-Credential=k/20260101&X-Amz-Date=1", "?X-Amz-Credential=[redacted]&X-Amz-Date=[redacted]"),
        ("https://h/x?token=abc", "https://h/x?token=[redacted]"),
        ("password: 12345678", "password: [redacted]"),
        ("{api_key: 'a b', lr: 3e-4}", "{api_key: [redacted], lr: 3e-4}"),
        ("Authorization: Bearer abc.def", "Authorization: [redacted]"),
        ("tokens: 400K", "tokens: 400K"),
        ("token: null", "token: null"),
        ("bos_token: <s>", "bos_token: <s>"),
    ],
)
def test_redact(line: str, want: str) -> None:
    assert report_style.redact(line) == want


def test_redacting_a_long_word_is_quick() -> None:
    assert report_style.redact("a" * 200_000) == "a" * 200_000


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    said = _Page(write_report(tmp_path).read_text()).said
    assert said.count("Not measured:") >= 8
    for claim in ("Learned", "Resumed exactly", "Layouts agree", "Export agrees"):
        assert f"not measured {claim} –" in said
    assert not re.search(r"(holds|partly|fails) (Learned|Resumed|Layouts|Export)", said)
    assert "finished" not in said


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("metrics.jsonl", "Not measured: throughput by step"),
        ("exit.json", "Not measured: end (exit.json)"),
        ("config.yaml", "Not measured: configuration"),
        ("proof.json", "Peak memory not measured"),
        ("verify.json", "Not measured: each layout against one process"),
        ("export/export.json", "export/export.json absent"),  # proof.json has the figure
        ("tokenizers/figures.json", "tokenizers/figures.json absent"),
        ("samples/samples.json", "samples/samples.json absent"),  # the files beside it are shown
        ("tokenizers/show", "Not measured: originals and decodings"),
        ("samples", "Not measured: samples"),
    ],
)
def test_each_input_may_be_missing(run: Path, tmp_path: Path, name: str, told: str) -> None:
    mine = Path(shutil.copytree(run, tmp_path / "demo"))
    (mine / name).rename(tmp_path / "taken")
    assert told in _Page(write_report(mine).read_text()).said
    if "." in name:
        assert f"{name} absent" in _Page(write_report(mine).read_text()).said


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "x",
        [],
        [1],
        {"a": 1},
        {"rows": 5, "heldout": [], "resume": 3, "layouts": "x"},
        {"holds": 1, "rows": [{"layout": 3, "law": {}}, 4]},
        [{"file": "\0"}, {"text": None}],
        {"heldout": {"text": {"loss": "a"}, "audio": 5}, "stages": {"a": 1}, "data": {"x": 1}},
    ],
)
def test_json_of_any_shape_makes_a_page(run: Path, tmp_path: Path, value: Any) -> None:
    run = Path(shutil.copytree(run, tmp_path / "demo"))
    for name in (
        "exit.json",
        "proof.json",
        "verify.json",
        "export/export.json",
        "tokenizers/figures.json",
        "samples/samples.json",
    ):
        (run / name).write_text(json.dumps(value))
    _Page(write_report(run).read_text())


def test_records_of_any_shape_make_a_page(tmp_path: Path) -> None:
    """Every field of every record replaced by junk, one kind of junk at a time."""
    rng = random.Random(0)
    records = [r for r in (*_attempt(1, 1, 12, 1000.0, None), *_attempt(2, 11, 14, 900.0, "x"))]
    junks: list[Any] = [None, -1, 1e400, math.nan, "text", [], {"a": "b"}, 10**400]
    for junk in junks:
        lines = []
        for r in records:
            r = dict(r)
            for key in rng.sample(sorted(r), 3):
                if key != "event":
                    r[key] = junk
            lines.append(json.dumps(r))
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        _Page(write_report(tmp_path).read_text())


def test_failures_are_told(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "demo"))
    proof = json.loads((run / "proof.json").read_text())
    proof["heldout"]["audio"]["loss"] = 6.5
    proof["resume"] |= {"samples_repeated": 3, "max_loss_diff": 0.25}
    (run / "proof.json").write_text(json.dumps(proof))
    verify = json.loads((run / "verify.json").read_text())
    verify["rows"][2] |= {"holds": False, "max_rel_loss_diff": 0.5}
    (run / "verify.json").write_text(json.dumps(verify))
    (run / "export/export.json").write_text(
        json.dumps({"class": "LlamaForCausalLM", "max_abs_logit_diff": 0.7})
    )
    (run / "exit.json").write_text(json.dumps({"exit_code": 4, "reason": "non-finite"}))
    states = {c.title: c.state for c in report.judge(report.load_inputs(run))}
    assert states == {
        "Learned": "warn",
        "Resumed exactly": "bad",
        "Layouts agree": "bad",
        "Export agrees": "bad",
    }
    said = _Page(write_report(run).read_text()).said
    assert "The run failed (loss or gradient not finite) after 140 steps" in said
    assert "audio did not fall below the unigram entropy" in said
    assert "5 of 6" in said
    assert "0 samples lost, 3 repeated" in said
    assert "4 of 5" in said


def test_a_proof_that_the_log_contradicts_does_not_hold(run: Path, tmp_path: Path) -> None:
    """proof.json says bit-equal; the repeated steps in metrics.jsonl differ."""
    run = Path(shutil.copytree(run, tmp_path / "demo"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for r in lines:
        if r["event"] == "step" and r["attempt"] == 2 and r["step"] == KILLED:
            r["loss"] += 0.01
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    claim = report.judge(report.load_inputs(run))[1]
    assert (claim.state, claim.figure) == ("bad", "Δ 0.010")


def test_media_from_outside_or_of_another_type_is_named_not_embedded(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "demo"))
    (tmp_path / "private.txt").write_text("do not show this")
    (run / "samples/link.png").symlink_to(tmp_path / "private.txt")
    (run / "samples/fake.png").write_text("<svg onload=alert(1)>")
    (run / "samples/big.png").write_bytes(png(8, 8, lambda x, y: (0, 0, 0)) + b"\0" * 2_400_000)
    names = ("../../private.txt", "link.png", "fake.png", "big.png", "gone.png")
    (run / "samples/samples.json").write_text(json.dumps([{"modality": "text", "file": n} for n in names]))
    html = write_report(run).read_text()
    said = _Page(html).said
    assert "do not show this" not in said
    assert "onload" not in html
    assert said.count("is absent or lies outside the run folder") == 3
    assert "fake.png is not a PNG, JPEG, WAV, FLAC or OGG file" in said
    assert "big.png left out (2,400 kB)" in said


def test_many_pictures_stay_within_the_size(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "demo"))
    noise = random.Random(1).randbytes
    for i in range(40):
        rows = [noise(3 * 200) for _ in range(200)]
        (run / f"samples/noise-{i:02d}.png").write_bytes(
            png(200, 200, lambda x, y, r=rows: r[y][3 * x : 3 * x + 3])
        )
    (run / "samples/samples.json").unlink()
    page = write_report(run)
    assert page.stat().st_size < report.LARGEST
    assert "the page would grow too large" in page.read_text()


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such run folder"):
        write_report(tmp_path / "nowhere")


# --- the charts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1.11e6), (1.4, 7.2), (0, 3.3e-4), (-2, 7), (0, 17)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = report_charts.nice_ticks(low, high, 5)
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-9 <= t <= high * (1 + 1e-9) for t in ticks)
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-6


def test_first_steps_do_not_squash_the_loss_chart() -> None:
    xs = [float(i) for i in range(1, 201)]
    ys = [9.0 * math.exp(-i / 2) + 2.0 + 0.5 * math.exp(-i / 60) for i in range(200)]
    chart = report_charts.loss_chart([report_charts.Series("text", xs, ys)], [], [])
    ticks = [float(v) for v in re.findall(r'text-anchor="end">([\d.]+)</text>', chart)]
    assert max(ticks) < 4
    assert "first step: up to 11.5" in chart


def test_long_runs_are_drawn_with_few_points() -> None:
    n = 50_000
    chart = report_charts.loss_chart(
        [report_charts.Series("text", range(1, n + 1), [3.0 + i % 7 for i in range(n)])], [], []
    )
    assert len(chart) < 30_000


def test_smoothing_keeps_a_constant_and_the_first_value() -> None:
    assert report_charts.smooth([2.0] * 30, [1.0] * 30, 4) == pytest.approx([2.0] * 30)
    falling = [10.0 - i for i in range(10)]
    assert report_charts.smooth(falling, [1.0] * 10, 3)[0] == 10.0


@pytest.mark.parametrize(
    ("value", "want"),
    [(0, "0"), (3.1e-6, "3.1e-6"), (1e-6, "1e-6"), (4.3561, "4.356"), (None, "–"), (-2.5, "-2.500")],
)
def test_number(value: float | None, want: str) -> None:
    assert report_style.number(value) == want


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (950, "950"),
        (1000, "1 K"),
        (999_900, "1 M"),
        (1_105_860, "1.11 M"),
        (4_812_544, "4.81 M"),
        (12.34, "12.3"),
    ],
)
def test_short(value: float, want: str) -> None:
    assert report_style.short(value) == want


def test_context_names() -> None:
    assert [report_style.context_name(n) for n in (512, 4096, 1 << 20, 1000, None)] == [
        "512",
        "4K",
        "1M",
        "1000",
        "?",
    ]
