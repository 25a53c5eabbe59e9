"""`tokenizer add`, `compare` and `remap`: vocabularies that grow, and checkpoints that follow them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import yaml
from safetensors.torch import load_file

from ringweave.data_pipes.index import build_index, write_index
from ringweave.launch.cli import run
from ringweave.launch.commands_vocabulary import parse_codec, vocabulary_at
from ringweave.launch.tokenizer_sizes import parse_sizes
from ringweave.pretrain.errors import ConfigError
from ringweave.pretrain.remap_checkpoint import move_rows, source_rows
from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.fit import FitSizes
from ringweave.tokenizers.manifest import CONTROL, VocabularyManifest
from ringweave.tokenizers.midi_file import Note, write
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.text import TextCodec

A, B, C, D = (letter * 64 for letter in "abcd")


def manifest(*names: str, control: dict[str, int] | None = None) -> VocabularyManifest:
    """Blocks of fixed weights in the given order; `image2` is `image` with other weights."""
    known = {
        "text": ("text", 300, "text", "text", A),
        "image": ("image", 64, "image", "image", B),
        "image2": ("image", 64, "image", "image", C),
        "score": ("score.q0", 32, "score", "score", D),
    }
    return VocabularyManifest.build(
        [known[n] for n in names], text_pieces=A, preprocessing={}, control=control
    )


def test_rows_follow_their_meaning() -> None:
    """By hand: text 256..555 and image 640..703 change places, score is new, and pad stays pad."""
    older, newer = manifest("text", "image"), manifest("image", "text", "score")
    sources, counts = source_rows(older, newer)
    assert sources[0] == 0
    assert sources[256:320].tolist() == list(range(640, 704))
    assert sources[384:684].tolist() == list(range(256, 556))
    assert (sources[684:] == -1).all()
    assert counts == {"kept": len(CONTROL) + 364, "new": 32, "dropped": 0}
    rows = torch.arange(older.size, dtype=torch.float32)[:, None].repeat(1, 2)
    moved = move_rows(rows, sources, fill="mean")
    assert moved[256, 0] == 640 and moved[384, 1] == 256
    kept = sources[sources >= 0]
    assert torch.allclose(moved[768:800], torch.tensor(kept.mean(), dtype=torch.float32))
    assert (move_rows(rows, sources, fill="zero")[768:800] == 0).all()


def test_retrained_blocks_are_dropped_and_new_control_ids_start_anew() -> None:
    older = manifest("text", "image", control={n: i for n, i in CONTROL.items() if i < 18})
    sources, counts = source_rows(older, manifest("text", "image2"))
    assert counts == {"kept": 17 + 300, "new": 64 + 5, "dropped": 64}
    assert (sources[18:22] == -1).all() and sources[17] == 17
    with pytest.raises(VocabularyError, match="no block of the old vocabulary"):
        source_rows(manifest("image"), manifest("image2"))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("symbolic", ("symbolic", None, {})),
        ("midi,velocity_bins=8", ("midi", None, {"velocity_bins": 8})),
        ("audio=a/b,books=4,channels=downmix", ("audio", Path("a/b"), {"books": 4, "channels": "downmix"})),
    ],
)
def test_codecs_on_the_command_line(text: str, wanted: Any) -> None:
    assert parse_codec(text) == wanted


@pytest.mark.parametrize(
    "text", ["smell", "audio", "symbolic=x", "image=x,books=3", "midi,velocity_bins", ""]
)
def test_bad_codecs_are_named(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_codec(text)


def command(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    code = run([*argv, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


def text_set(folder: Path, *, size: int = 300) -> Path:
    TokenizerSet({"text": TextCodec.fit([f"some words {i} of" for i in range(50)], size=size)}).save(folder)
    return folder


def test_add_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = text_set(tmp_path / "old")
    new = tmp_path / "new"
    code, found, _ = command(
        capsys, "tokenizer", "add", "symbolic", "midi,velocity_bins=8", "-t", str(old), "--out", str(new)
    )
    assert code == 0
    assert [block["name"] for block in found["added"]] == ["symbolic", "midi"]
    assert found["hash"] == TokenizerSet.load(new).manifest.hash
    code, found, _ = command(capsys, "tokenizer", "compare", str(old), str(new))
    assert (code, found["equal"], found["extends"]) == (0, False, True)
    assert found["blocks"] == [{"block": "text", "size": 300, "kept": 300, "start": 256, "now": 256}]
    code, found, _ = command(capsys, "tokenizer", "compare", str(old), str(old))
    assert found["equal"] and found["difference"] is None
    code, found, _ = command(
        capsys, "tokenizer", "add", "midi", "-t", str(new), "--out", str(tmp_path / "again")
    )
    assert code == 3 and "already has a codec for midi" in found["what"]
    code, found, _ = command(capsys, "tokenizer", "compare", str(old), str(tmp_path))
    assert code == 3 and found["what"] == "no vocabulary here"


def config(tmp_path: Path, name: str, tokenizers: Path, plan: list[str]) -> Path:
    values = {
        "run": {"name": name, "dir": str(tmp_path / name)},
        "tokenizers": {"dir": str(tokenizers)},
        "data": {"dir": str(tmp_path), "sources": [{"name": "songs", "shards": "songs-0.tar", "plan": plan}]},
        "model": {"layers": 1, "width": 16, "heads": 1, "kv_heads": 1},
        "optimizer": {"lr": 1e-3},
        "stages": [
            {"context": 128, "tokens": 128 * 2 * (4 if name == "first" else 6), "batch": 2, "layout": {}}
        ],
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_a_run_goes_on_with_a_grown_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on text, then on text and notes: old rows are carried over, and the new run trains from step 4."""
    with webdataset.TarWriter(str(tmp_path / "songs-0.tar"), encoder=False) as writer:
        for i in range(40):
            song = write([Note(0, 200_000, 40 + i, 64, 0, False)])
            writer.write({"__key__": f"k{i}", "txt": f"some words {i} of songs".encode() * 3, "mid": song})
    write_index(tmp_path / "songs-0.tar", build_index(tmp_path / "songs-0.tar"))
    old = text_set(tmp_path / "old")
    assert command(capsys, "tokenizer", "add", "midi", "-t", str(old), "--out", str(tmp_path / "new"))[0] == 0
    first = config(tmp_path, "first", old, ["text"])
    second = config(tmp_path, "second", tmp_path / "new", ["text?", "midi"])
    train(first)
    source = tmp_path / "first" / "checkpoints" / "step-00000004"
    assert vocabulary_at(source) == TokenizerSet.load(old).manifest
    code, found, err = command(capsys, "tokenizer", "remap", str(source), "--config", str(second))
    assert code == 0, err
    midi = TokenizerSet.load(tmp_path / "new").manifest.block("midi")
    assert (found["kept"], found["new"], found["dropped"]) == (len(CONTROL) + 300, midi.size, 0)
    before, after = (tensors(path) for path in (source, Path(found["path"])))
    assert after["model.embed.weight"].shape[0] == TokenizerSet.load(tmp_path / "new").manifest.size
    assert torch.equal(after["model.embed.weight"][:556], before["model.embed.weight"][:556])
    assert torch.equal(
        after["optimizer.exp_avg.head.weight"][:556], before["optimizer.exp_avg.head.weight"][:556]
    )
    assert (after["optimizer.exp_avg_sq.head.weight"][midi.start : midi.stop] == 0).all()
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    train(second)
    lines = (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()
    steps = [entry["step"] for entry in map(json.loads, lines) if "loss" in entry]
    assert steps == [5, 6], lines
    code, found, _ = command(capsys, "tokenizer", "remap", str(source), "--config", str(second))
    assert code == 2 and "already has checkpoints" in found["what"]


def train(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ringweave.launch.cli", "train", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def tensors(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    assert np.isfinite(found["model.embed.weight"].numpy()).all()
    return found


def test_sizes_of_the_command_line() -> None:
    sizes = parse_sizes(["image_codes=4096", "text_model=unigram", "max_characters=2M", "video=true"])
    assert (sizes.image_codes, sizes.text_model, sizes.max_characters, sizes.video) == (
        4096,
        "unigram",
        2_000_000,
        True,
    )
    assert sizes.score_codes == FitSizes().score_codes


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("image_code=9", "did you mean image_codes"),
        ("image_codes", "no setting 'image_codes'|did you mean"),
        ("audio_books=many", "whole number above 0"),
        ("audio_books=0", "whole number above 0"),
        ("video=yes", "true or false"),
        ("text_model=words", "one of bpe, unigram"),
        ("audio_order=random", "frame-major, coarse-first, delay"),
    ],
)
def test_bad_sizes_are_named(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_sizes([setting])
