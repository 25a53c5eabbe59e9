"""Previews: pictures by the model of each stage's end, the checkpoints kept for them, and the page that shows them."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path += [str(Path(__file__).parents[1] / name) for name in ("data_pipes", "tokenizers")]
from token_fixtures import write_shard
from tokenizer_samples import SMALL, records

from ringweave.launch.cli import run as command
from ringweave.pretrain import checkpoint, job, verify_dit
from ringweave.pretrain.config import RunConfig, config_from_dict, load_config
from ringweave.pretrain.errors import ConfigError
from ringweave.pretrain.report import write_report
from ringweave.pretrain.run_folder import read_events
from ringweave.tokenizers.fit import fit_tokenizers
from ringweave.tokenizers.learn_run import learn_codecs
from ringweave.tokenizers.learn_vae import VaeSchedule

ROOT = Path(__file__).resolve().parents[2]
DIT = str(ROOT / "launch" / "recipes" / "demo_dit.yaml")
HOSTILE = '<script>alert("x")</script>'


def _config(place: Path) -> RunConfig:
    """Two stages of three steps on a handful of layered records, a checkpoint every step, the newest kept."""
    train = {name: records(0, 4)[name] for name in ("text", "rgba")}
    fit_tokenizers(train, place / "tokenizers", sizes=SMALL)
    learn_codecs(train, place / "tokenizers", names=["latents"], schedule=VaeSchedule(steps=1), sizes=SMALL)
    for name, start in (("train-0000.tar", 0), ("heldout-0000.tar", 20)):
        write_shard(place / name, [{**r, "txt": HOSTILE.encode()} for r in records(start, 4)["rgba"]])
    stage = {"context": 128, "tokens": 128 * 2 * 3, "batch": 2}
    return config_from_dict(
        {
            "run": {"name": "previews", "seed": 3, "dir": str(place / "run")},
            "tokenizers": {"dir": str(place / "tokenizers")},
            "data": {
                "dir": str(place), "workers": {"count": 0},
                "sources": [
                    {
                        "name": "discs", "shards": "train-0000.tar", "heldout": "heldout-0000.tar",
                        "tasks": ["matting_with_text"],
                    }
                ],
            },
            "model": {
                "kind": "dit", "layers": 1, "width": 32, "heads": 2, "words": {"layers": 0, "width": 16, "heads": 2},
            },
            "optimizer": {"lr": 3e-2, "ema": 0.5},
            "stages": [stage, {**stage, "context": 256, "tokens": 256 * 2 * 3}],
            "checkpoint": {"every": "1 steps", "keep": 1},
            "log": {"every": 1000, "tensorboard": False, "previews": 2},
        },
        source="test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, list[list[str]]]:
    """(the run's folder, its config, names of the checkpoints whenever one had been saved)."""
    config = _config(tmp_path_factory.mktemp("previews"))
    seen: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        retire = checkpoint.retire

        def watched(root: Path, *args: Any, **more: Any) -> None:
            retire(root, *args, **more)
            seen.append(sorted(p.name for p in root.iterdir()))

        patch.setattr(checkpoint, "retire", watched)
        assert job.main(config) == 0
    return Path(config.run.dir), config, seen


def _name(*steps: int) -> list[str]:
    return [checkpoint.checkpoint_name(step) for step in steps]


@pytest.mark.slow
def test_each_stage_has_pictures_of_its_own(trained: tuple[Path, RunConfig, list[list[str]]]) -> None:
    run, _, _ = trained
    listed = [json.loads((run / "samples" / f"stage-{k}" / "samples.json").read_text()) for k in (1, 2)]
    (first,), (second,) = listed
    assert [(e["stage"], e["step"], e["context"], e["ended"]) for e in (first, second)] == [
        (0, 3, 128, True), (1, 6, 256, True),
    ]  # fmt: skip
    steps = {e["step"]: e["tokens"] for e in read_events(run / "metrics.jsonl") if e["event"] == "step"}
    assert (first["tokens"], second["tokens"]) == (steps[3], steps[6])

    def layer(k: int, which: str) -> np.ndarray[Any, Any]:
        return np.asarray(
            Image.open(
                run
                / "samples"
                / f"stage-{k}"
                / "discs-matting_with_text"
                / which
                / "heldout-0000-0"
                / "layer0.png"
            )
        )

    assert (layer(1, "true") == layer(2, "true")).all()
    assert (layer(1, "made") != layer(2, "made")).any()
    (logged,) = [e for e in read_events(run / "metrics.jsonl") if e["event"] == "previews"]
    assert (logged["stages"], logged["documents"], logged["step"]) == ([0, 1], 2, 6)


@pytest.mark.slow
def test_checkpoints_of_stage_ends_wait_for_their_pictures(
    trained: tuple[Path, RunConfig, list[list[str]]], tmp_path: Path
) -> None:
    _, _, seen = trained
    # keep: 1. The first stage ends with step 3, the run with step 6, and then there are pictures.
    assert seen == [_name(1), _name(2), _name(3), _name(3, 4), _name(3, 5), _name(3, 6), _name(6)]


@pytest.mark.slow
def test_the_report_shows_them_and_runs_nothing(
    trained: tuple[Path, RunConfig, list[list[str]]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    page = write_report(run).read_text()
    tokens = [json.loads((run / f"samples/stage-{k}/samples.json").read_text())[0]["tokens"] for k in (1, 2)]
    said = [f"{n / 1000:.3g} K" if n >= 1000 else str(n) for n in tokens]
    for k, context, step in ((1, 128, 3), (2, 256, 6)):
        assert (
            f"Stage {k} · context {context} · step {step} · {said[k - 1]} tokens seen · moving average"
            in page
        )
        picture = (run / f"samples/stage-{k}/discs-matting_with_text.png").read_bytes()
        assert base64.b64encode(picture).decode() in page
    assert "<script" not in page and "&lt;script&gt;" in page  # the caption of every record
    listed = run / "samples/stage-2/samples.json"
    listed.write_text(json.dumps([{"file": "../../../outside.png", "prompt": HOSTILE, "context": HOSTILE}]))
    (tmp_path / "outside.png").write_bytes(picture)
    page = write_report(run).read_text()
    assert "<script" not in page and base64.b64encode(picture).decode() not in page
    listed.write_text("[")
    assert "Stage 2 ·" not in write_report(run).read_text()


@pytest.mark.slow
def test_by_stage_draws_what_is_missing_only(
    trained: tuple[Path, RunConfig, list[list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    ask = ["sample", str(run), "--by-stage", "--count", "2", "--json"]
    assert command(ask) == 0
    printed = capsys.readouterr()
    assert "drawing" not in printed.err  # both are there, though the first stage's checkpoint is gone
    before = (run / "samples/stage-2/discs-matting_with_text.png").read_bytes()
    shutil.rmtree(run / "samples/stage-2")
    assert command(ask) == 0
    printed = capsys.readouterr()
    assert "drawing previews of stage 2 (step 6)" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["samples"][0]["file"].startswith("stage-2/")
    assert (run / "samples/stage-2/discs-matting_with_text.png").read_bytes() == before
    assert command(["sample", str(run), "--step", "4"]) == 6  # no such checkpoint any more
    assert command(["sample", str(run), "--by-stage", "--prompt", "x"]) == 2
    assert "leave them out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_without_the_means_to_draw_ends_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Synthetic latents: no tokenizers to decode with. The run says so, ends with 0 and keeps the checkpoints."""
    from ringweave.pretrain.synthetic import SyntheticLatents

    values = verify_dit.tiny_config(tmp_path, "x", world=1).to_dict()
    values["log"]["previews"] = 1
    values["data"]["sources"][0]["heldout"] = "none"
    values["checkpoint"]["keep"] = 1
    config = config_from_dict(values, source="test")
    code = job.run_rank(config, lambda: (SyntheticLatents(vocab=64, channels=8), 64, "0" * 64), channels=8)
    assert code == 0
    run, steps = Path(config.run.dir), [s.steps for s in config.stages]
    events = read_events(run / "metrics.jsonl")
    assert "previews were not drawn" in events[-1]["what"]
    assert "ringweave sample" in capsys.readouterr().out
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == _name(steps[0], sum(steps))
    assert json.loads((run / "exit.json").read_text())["exit_code"] == 0


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["log.previews=2", "data.sources.0.heldout=null"], "no source has held-out shards"),
        (["log.previews=-1"], "at least 0"),
    ],
)
def test_previews_that_cannot_be(sets: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(DIT, sets)


def test_previews_are_pictures_of_a_dit() -> None:
    with pytest.raises(ConfigError, match="with kind: lwm"):
        load_config(ROOT / "launch" / "recipes" / "demo.yaml", ["log.previews=2"])
