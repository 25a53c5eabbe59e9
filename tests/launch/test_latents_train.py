"""`tokenizer train --learn latents` on sources of any name: what it learns from, and the vocabulary it speaks of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("data_pipes", "tokenizers")]

from token_fixtures import write_shard
from tokenizer_samples import mp4, picture, png, records

from ringweave.launch.cli import run
from ringweave.launch.data_records import latents_of_config, records_by_modality
from ringweave.tokenizers.fit import FitSizes
from ringweave.tokenizers.latent_codec import LatentCodec
from ringweave.tokenizers.learn import Schedule
from ringweave.tokenizers.learn_run import learn_codecs
from ringweave.tokenizers.learn_vae import vae_config
from ringweave.tokenizers.measure import measure_latents, psnr_nine
from ringweave.tokenizers.members import Members, latent_pictures_of
from ringweave.tokenizers.picture_vae import PictureVae
from ringweave.tokenizers.set import TokenizerSet

SIZES = {"latents_base": 4, "latents_channels": 2, "latents_patch": 4, "text_pieces": 300}
#: Frames of a clip.
CLIP = [picture(70 + n) for n in range(4)]


def drawings(first: int, count: int) -> list[dict[str, bytes]]:
    """Records of two layers, with words and another picture beside them."""
    made = records(first, count)["rgba"]
    return [
        {**some, "photo.png": png(picture(first + n)), "txt": b"a disc or two"} for n, some in enumerate(made)
    ]


def layers_in(some: list[Any]) -> int:
    return sum(name.startswith("layer") for members in some for name in members)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, first in (("train", 0), ("heldout", 40)):
        write_shard(folder / f"drawings-{split}-0000.tar", drawings(first, 4))
        write_shard(folder / f"cartoons-{split}-0000.tar", drawings(first + 10, 3))
        write_shard(folder / f"photos-{split}-0000.tar", [{"png": png(picture(first + n))} for n in range(2)])
        write_shard(
            folder / f"notes-{split}-0000.tar", [{"txt": b"words and nothing else, eight of them here"}] * 9
        )
        write_shard(folder / f"score-{split}-0000.tar", records(first, 3)["score"])
    write_shard(folder / "films-train-0000.tar", [{"mp4": mp4(np.stack(CLIP))}])
    assert run(["data", "index", str(folder)]) == 0
    return folder


def train(capsys: pytest.CaptureFixture[str], out: Path, *more: str) -> dict[str, Any]:
    sizes = [f"--size={name}={value}" for name, value in SIZES.items()]
    argv = [
        "tokenizer",
        "train",
        "--out",
        str(out),
        "--learn",
        "latents",
        "--steps",
        "2",
        *more,
        *sizes,
        "--json",
    ]
    capsys.readouterr()
    assert run(argv) == 0, capsys.readouterr().err
    made: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return made


def test_every_source_of_layers_or_pictures_is_learned_from(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = train(capsys, tmp_path / "set", "--data", str(data))
    both = [*drawings(10, 3), *drawings(0, 4)]
    assert made["learned"]["latents"]["layers"] == layers_in(both)
    assert made["learned"]["latents"]["pictures"] == 2, "pages of music have a codec of their own"
    # The same codec as from the layers themselves, sources in order of name.
    learn_codecs(
        {"rgba": both, "image": [{"png": png(picture(n))} for n in range(2)]}, tmp_path / "set", names=["latents"],
        schedule=Schedule(steps=2), sizes=FitSizes(**SIZES),
    )  # fmt: skip
    again = TokenizerSet.load(tmp_path / "set")
    # What was printed and measured is the set as it is on disk, autoencoder included.
    assert made["fitted"]["hash"] == again.manifest.hash
    assert made["fitted"]["vocabulary"] == again.manifest.size
    assert made["heldout"]["latents"]["records"] == 7
    in_turn = [x for pair in zip(drawings(50, 3), drawings(40, 3)) for x in pair] + drawings(43, 1)
    assert made["heldout"]["latents"] == measure_latents(again, in_turn, limit=50)
    capsys.readouterr()
    assert run(["tokenizer", "eval", "-t", str(tmp_path / "set"), "--data", str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["latents"]["psnr_nine"] == made["heldout"]["latents"]["psnr_nine"]


def test_names_alone_need_not_tell(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without any source that is named after a modality."""
    (tmp_path / "data").mkdir()
    for path in data.glob("drawings-*"):
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    made = train(capsys, tmp_path / "set", "--data", str(tmp_path / "data"))
    assert set(made["fitted"]["seconds"]) == {"text", "rgba"}
    assert made["learned"]["latents"]["layers"] == layers_in(drawings(0, 4))


def test_plans_say_what_is_learned_from(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tasks over the same shards count once; named members and clips are read as the plan reads them."""
    sources = [
        {"name": "a", "shards": "drawings-train-0000.tar", "heldout": "drawings-heldout-0000.tar",
         "tasks": {"matting": 1, "text_to_layers": 1, "removal": 1}},
        {"name": "b", "shards": "cartoons-train-0000.tar", "plan": ["latents:photo.png?", "latents:layer0"]},
        {"name": "c", "shards": "cartoons-train-0000.tar", "plan": ["latents:photo.png"]},
        {"name": "d", "shards": "films-train-0000.tar", "plan": ["latents:video"]},
        {"name": "e", "shards": "score-train-0000.tar", "plan": ["score"]},
    ]  # fmt: skip
    values = {
        "run": {"name": "r", "dir": str(tmp_path / "run")}, "tokenizers": {"dir": str(tmp_path / "set")},
        "data": {"dir": str(data), "sources": sources}, "optimizer": {"lr": 1e-3},
        "model": {"kind": "dit", "layers": 1, "width": 32, "heads": 2},
        "stages": [{"context": 256, "tokens": 256, "batch": 1}],
    }  # fmt: skip
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(values))
    found = {name: list(group) for name, group in latents_of_config(config).items()}
    assert {name: len(group) for name, group in found.items()} == {"a/text_to_layers": 4, "b": 6, "d": 1}
    assert found["b"][0] == {"png": drawings(10, 1)[0]["photo.png"]} and layers_in(found["b"][3:]) > 0
    assert next(iter(records_by_modality(config)["image"]))["png"] == found["b"][0]["png"]
    made = train(capsys, tmp_path / "set", "--config", str(config))
    wanted = layers_in(drawings(0, 4)) + layers_in(drawings(10, 3))
    assert made["learned"]["latents"]["layers"] == wanted
    assert made["learned"]["latents"]["pictures"] == 3 + 2
    assert made["fitted"]["hash"] == TokenizerSet.load(tmp_path / "set").manifest.hash
    assert made["heldout"]["latents"]["records"] == 4


def test_what_latents_read_of_a_record() -> None:
    clip: Members = {"mp4": mp4(np.stack(CLIP))}
    first, middle = latent_pictures_of(clip, where="r")
    assert first.shape == middle.shape == (48, 48, 4) and (first[..., 3] == 255).all()
    assert (
        abs(first[..., :3].astype(int) - CLIP[0]).mean()
        < 12
        > abs(middle[..., :3].astype(int) - CLIP[2]).mean()
    )
    (one,) = latent_pictures_of({"flat.png": png(picture(1)), **clip}, where="r")
    assert (one[..., :3] == picture(1)).all()


def test_eval_and_show_have_latents_of_any_source(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A set of latents alone, on held-out drawings: its figures, a section of the page and a sheet."""
    config = vae_config(base=4, channels=2, patch=4)
    codec = LatentCodec(config, PictureVae(config).to_stock())
    tokenizers = TokenizerSet({"latents": codec})
    tokenizers.save(tmp_path / "set")
    argv = ["-t", str(tmp_path / "set"), "--data", str(data), "--json"]
    capsys.readouterr()
    assert run(["tokenizer", "eval", *argv, "--limit", "2"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert found["modalities"] == {} and found["latents"]["records"] == 2
    sha = tokenizers.manifest.preprocessing["latents"]["sha256"][:12]
    assert f"| `latents.rgba`, file {sha} | cells of 4 pixels" in captured.err
    assert run(["tokenizer", "show", *argv, "--out", str(tmp_path / "seen"), "--per-source", "9"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["shown"], said["failed"]) == (9, 0), "seven drawings and two photos"
    assert said["files"] == [str(tmp_path / "seen" / "latents.png")]
    page = (tmp_path / "seen" / "index.html").read_text()
    assert f"Continuous latents <small>latents.rgba, file {sha}" in page
    layer = latent_pictures_of(drawings(50, 1)[0], where="r")
    decoded = [codec.decode(codec.encode(part))[: part.shape[0], : part.shape[1]] for part in layer]
    nine = np.mean([psnr_nine(a, b) for a, b in zip(layer, decoded)])
    assert f"<dt>PSNR over nine grounds</dt><dd>{nine:.1f} dB</dd>" in page
