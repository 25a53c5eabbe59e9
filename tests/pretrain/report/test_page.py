"""The page: right numbers, nothing loaded or run from data, every gap told."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ringweave.pretrain.report import write_report
from ringweave.pretrain.report.inputs import load_inputs
from ringweave.pretrain.report.lineage import read_metrics
from ringweave.pretrain.report.verdict import judge
from ringweave.pretrain.report.words import short
from ringweave.pretrain.report.write import LARGEST
from ringweave.tokenizers.errors import UserError


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


def test_captions_are_escaped_and_shown(html: str, synthetic: SimpleNamespace) -> None:
    assert "<script>" not in html
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in html
    assert synthetic.XSS in _Page(html).said
    assert "<b>together</b> &" in _Page(html).said


def test_numbers_shown_are_those_of_the_inputs(run: Path, html: str, synthetic: SimpleNamespace) -> None:
    said = _Page(html).said
    for name, figures in synthetic.heldout(synthetic.LAST).items():
        assert f"{name} {figures['loss']:.3f} held out · unigram {figures['unigram_entropy']:.3f}" in said
    assert "Learned 6 of 6 modalities below" in said
    assert f"killed at step {synthetic.KILLED}; 0 samples lost, 0 repeated; 7 steps trained twice" in said
    assert "Layouts agree 5 of 5" in said
    assert "Export agrees Δ 3.1e-6" in said
    assert "Steps 140 Tokens 1.11 M Parameters 4.81 M Context 512 → 2K → 8K" in said
    assert "Peak memory 2.37 GiB" in said
    assert "dp2·tp2 4.2e-8 1.7e-6 holds" in said
    assert "PSNR 26.41 dB" in said
    assert "text 30 % 900 410 K 48" in said
    for span in read_metrics(run).stages:
        assert span.tokens_per_s is not None
        assert short(span.tokens_per_s) in said
    assert "7 steps ran twice; the largest difference between the two losses is 0 ." in said
    assert "passed over step-00000090.tmp" in said
    assert "image-0001.tar#a<b> could not be read: not a PNG" in said


def test_secrets_are_redacted(html: str) -> None:
    for secret in ("hunter2", "abc123", "hf_abcdefghijklmnopqrstuv"):
        assert secret not in html
    assert "objective: {next_token: 1.0}" in html
    assert "part=1" in html


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


def test_records_of_any_shape_make_a_page(tmp_path: Path, synthetic: SimpleNamespace) -> None:
    """Every field of every record replaced by junk, one kind of junk at a time."""
    rng = random.Random(0)
    records = [
        r for r in (*synthetic.attempt(1, 1, 12, 1000.0, None), *synthetic.attempt(2, 11, 14, 900.0, "x"))
    ]
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
    states = {c.title: c.state for c in judge(load_inputs(run))}
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


def test_a_proof_that_the_log_contradicts_does_not_hold(
    run: Path, tmp_path: Path, synthetic: SimpleNamespace
) -> None:
    """proof.json says bit-equal; the repeated steps in metrics.jsonl differ."""
    run = Path(shutil.copytree(run, tmp_path / "demo"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for r in lines:
        if r["event"] == "step" and r["attempt"] == 2 and r["step"] == synthetic.KILLED:
            r["loss"] += 0.01
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    claim = judge(load_inputs(run))[1]
    assert (claim.state, claim.figure) == ("bad", "Δ 0.010")


def test_media_from_outside_or_of_another_type_is_named_not_embedded(
    run: Path, tmp_path: Path, synthetic: SimpleNamespace
) -> None:
    run = Path(shutil.copytree(run, tmp_path / "demo"))
    (tmp_path / "private.txt").write_text("do not show this")
    (run / "samples/link.png").symlink_to(tmp_path / "private.txt")
    (run / "samples/fake.png").write_text("<svg onload=alert(1)>")
    (run / "samples/big.png").write_bytes(synthetic.png(8, 8, lambda x, y: (0, 0, 0)) + b"\0" * 2_400_000)
    names = ("../../private.txt", "link.png", "fake.png", "big.png", "gone.png")
    (run / "samples/samples.json").write_text(json.dumps([{"modality": "text", "file": n} for n in names]))
    html = write_report(run).read_text()
    said = _Page(html).said
    assert "do not show this" not in said
    assert "onload" not in html
    assert said.count("is absent or lies outside the run folder") == 3
    assert "fake.png is not a PNG, JPEG, WAV, FLAC or OGG file" in said
    assert "big.png left out (2,400 kB)" in said


def test_many_pictures_stay_within_the_size(run: Path, tmp_path: Path, synthetic: SimpleNamespace) -> None:
    run = Path(shutil.copytree(run, tmp_path / "demo"))
    noise = random.Random(1).randbytes
    for i in range(40):
        rows = [noise(3 * 200) for _ in range(200)]
        (run / f"samples/noise-{i:02d}.png").write_bytes(
            synthetic.png(200, 200, lambda x, y, r=rows: r[y][3 * x : 3 * x + 3])
        )
    (run / "samples/samples.json").unlink()
    page = write_report(run)
    assert page.stat().st_size < LARGEST
    assert "the page would grow too large" in page.read_text()


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such run folder"):
        write_report(tmp_path / "nowhere")


def test_a_diffusion_part_is_shown_and_only_where_there_is_one(run: Path, html: str, tmp_path: Path) -> None:
    assert 'id="layers"' not in html
    mine = Path(shutil.copytree(run, tmp_path / "demo"))
    proof = json.loads((mine / "proof.json").read_text())
    proof["dit"] = {
        "val_loss_by_sigma": {"0.0625": 0.7, "0.9375": 0.5}, "untrained_loss_by_sigma": {"0.0625": 1.4, "0.9375": 2.0},
        "matting": {"sad": 0.41, "baseline_sad": 0.55},
        "export": {"class": "QwenImageTransformer2DModel", "max_rel_output_diff": 3e-7},
    }  # fmt: skip
    (mine / "proof.json").write_text(json.dumps(proof))
    said = _Page(write_report(mine).read_text()).said
    assert "0.0625 0.700 1.400 50 %" in said and "0.9375 0.500 2.000 25 %" in said
    assert "mattes, SAD 0.410 best threshold, SAD 0.550" in said and "QwenImageTransformer2DModel" in said


def test_the_run_of_a_dit_shows_its_last_evaluation(tmp_path: Path) -> None:
    heldout = {"video": {"loss": 0.6, "by_sigma": {"0.5": 0.6, "x": "y"}, "untrained_by_sigma": {"0.5": 1.2}}}
    event = {"event": "eval", "step": 3, "time": 1.0, "heldout": heldout}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    assert (
        "video Noise level Held out Untrained Left 0.5 0.600 1.200 50 %"
        in _Page(write_report(tmp_path).read_text()).said
    )


def test_checks_of_one_law_stand_in_tables_without_empty_columns(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "demo"))
    told: dict[str, Any] = json.loads((run / "verify.json").read_text())
    told["rows"] = [
        {"law": 1, "layout": "packed", "max_rel_loss_diff": 1e-9, "max_rel_grad_diff": 0.0, "holds": True},
        {"law": 1, "layout": "one changed", "others_changed": 0, "seen": 44, "holds": True},
        {"law": 2, "layout": "dp2", "max_rel_loss_diff": 1e-9, "rel_norm_diff": 0.0, "holds": True},
        {"law": 2, "layout": "dit dp2", "model": "dit", "max_rel_loss_diff": 1e-9, "rel_norm_diff": 0.0, "holds": True},
    ]  # fmt: skip
    (run / "verify.json").write_text(json.dumps(told))
    html = write_report(run).read_text()
    tables = re.findall(r"<table.*?</table>", html[html.index("Any layout = one process") :], re.S)[:3]
    rows = [[re.sub(r"<[^>]*>", "", r).strip() for r in re.findall(r"<tr>.*?</tr>", t, re.S)] for t in tables]
    assert rows == [
        ["LayoutLoss differenceNorm difference", "dp21e-90 holds", "dit dp21e-90 holds"],
        ["CheckLoss differenceGradient difference", "packed1e-90 holds"],
        ["Checkothers changedseen", "one changed044 holds"],
    ]
