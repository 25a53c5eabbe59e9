"""A synthetic run: three stages, killed in the second at step 87, resumed from step 80."""

from __future__ import annotations

import json
import math
import random
import struct
import wave
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ringweave.pretrain.report import write_report

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
    second.insert(
        2,
        {
            "event": "quarantine", "time": second[0]["time"], "attempt": 2, "step": RESUMED + 1, "source": "image",
            "sample": 3, "shard": "image-0001.tar", "key": "a<b>", "offset": 512, "reason": "not a PNG",
        },
    )  # fmt: skip
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


def _verify_rows() -> list[dict[str, Any]]:
    layouts = ("dp4", "dp2·tp2", "pp2·sp2", "sp4", "dp2·sp2")
    rows: list[dict[str, Any]] = [
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
    return rows


def _listed_samples() -> list[dict[str, str]]:
    return [
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
    ]


def _json_inputs(run: Path) -> None:
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
        "verify.json": {"holds": True, "rows": _verify_rows()},
        "export/export.json": proof["export"],
        "tokenizers/figures.json": figures,
        "samples/samples.json": _listed_samples(),
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


@pytest.fixture(scope="session")
def synthetic() -> SimpleNamespace:
    """What the run is made of: its numbers, and the functions that make its records and pictures."""
    return SimpleNamespace(
        LAST=LAST, KILLED=KILLED, RESUMED=RESUMED, STEP_TOKENS=STEP_TOKENS, XSS=XSS,
        step=_step, attempt=_attempt, heldout=heldout, png=png,
    )  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def html(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")
