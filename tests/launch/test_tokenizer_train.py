"""`tokenizer train` with sizes, and over the ranks of torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from ringweave.launch.cli import run
from ringweave.tokenizers.set import TokenizerSet

SMALL = [
    "--size=text_pieces=400", "--size=score_codes=16", "--size=text_model=unigram", "--size=image_codes=32",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and pages with strokes."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("heldout", 4)):
        with webdataset.TarWriter(str(folder / f"text-{split}-0000.tar"), encoder=False) as writer:
            for i in range(count):
                words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(60)]
                writer.write({"__key__": f"t{i}", "txt": " ".join(words).encode()})
        with webdataset.TarWriter(str(folder / f"score-{split}-0000.tar"), encoder=False) as writer:
            for i in range(count):
                page = np.full((64, 96), 255, np.uint8)
                for row in rng.integers(0, 62, 6):
                    page[row : row + 2] = 0
                path = folder / "page.png"
                Image.fromarray(page).save(path)
                writer.write({"__key__": f"s{i}", "png": path.read_bytes()})
    (folder / "page.png").unlink()
    assert run(["data", "index", str(folder)]) == 0
    return folder


def test_sizes_reach_the_codecs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["tokenizer", "train", "--data", str(data), "--out", str(tmp_path / "set"), *SMALL, "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["heldout"]) == {"text", "score"}
    made = TokenizerSet.load(tmp_path / "set")
    assert made.manifest.block("score.q0").size == 16
    assert made.codecs["text"].size == 400
    assert (
        run(
            [
                "tokenizer",
                "train",
                "--data",
                str(data),
                "--out",
                str(tmp_path / "x"),
                "--size",
                "score_code=1",
            ]
        )
        == 2
    )
    assert "did you mean score_codes" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_of_torchrun_learn_one_codec(data: Path, tmp_path: Path) -> None:
    """One of them speaks, and what they learn is what one process learns, to rounding."""
    command = [
        "tokenizer",
        "train",
        "--data",
        str(data),
        "--learn",
        "score",
        "--steps",
        "12",
        *SMALL,
        "--json",
    ]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for name, start in (("two", torchrun), ("one", [])):
        argv = [sys.executable, *start, "-m", "ringweave.launch.cli", *command, "--out", str(tmp_path / name)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == 1
        assert json.loads(lines[0])["learned"]["score"]["steps"] == 12
    codecs = [TokenizerSet.load(tmp_path / name).codecs["score"] for name in ("one", "two")]
    books = [codec.tensors["codebooks"].astype(float) for codec in codecs]
    assert codecs[0].kind == "score.conv"
    assert np.abs(books[0] - books[1]).max() <= 1e-3 * np.abs(books[0]).max()
