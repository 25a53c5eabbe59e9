"""A VAE that a run exports, read as a codec from outside: the latents and layers of the set's own codec."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizer_samples import picture

from ringweave.launch.cli import run
from ringweave.tokenizers.latent_codec import LatentCodec, fold
from ringweave.tokenizers.learn_vae import VaeSchedule, VaeTraining, vae_config
from ringweave.tokenizers.outside_latents import Latents, OutsideLatents
from ringweave.tokenizers.outside_load import load_outside
from ringweave.tokenizers.set import TokenizerSet

#: Of the largest latent of a layer.
CLOSE = 1e-6


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    """Learned a little, with statistics of its own."""
    layers = [picture(seed, "RGBA") for seed in range(4)]
    training = VaeTraining(
        vae_config(base=8, channels=3, patch=8), layers, [], VaeSchedule(steps=3, batch=4, crop=16, rate=1e-2)
    )
    training.run(until=3)
    return training.codec()


@pytest.fixture(scope="module")
def exported(codec: LatentCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pretrain/export_dit.py` writes it."""
    folder = tmp_path_factory.mktemp("export") / "vae"
    codec.save_diffusers(folder)
    return folder


def test_latents_and_layers_are_those_of_the_set(codec: LatentCodec, exported: Path) -> None:
    outside = load_outside(exported)
    assert isinstance(outside, OutsideLatents)
    assert (outside.kind, outside.group, outside.channels) == ("latents.qwenimage", 1, 4)
    assert (outside.patch, outside.dim) == (codec.patch // 2, codec.channels // 4)
    assert np.array_equal(outside.mean.numpy(), codec.mean[:, 0, 0])
    assert np.array_equal(outside.std.numpy(), codec.std[:, 0, 0])
    worst = 0.0
    for seed, (height, width) in enumerate([(48, 48), (40, 32), (24, 48)]):
        layer = picture(20 + seed, "RGBA")[:height, :width].copy()
        clear = layer[..., 3] == 0
        assert clear.any() and not clear.all()
        layer[clear, :3] = 77  # nobody sees it
        cells, latents = codec.encode(layer), outside.encode(layer)
        assert latents.values.shape == (1, height // 4, width // 4, outside.dim)
        theirs = fold(np.ascontiguousarray(latents.values[0].transpose(2, 0, 1)))
        worst = max(worst, float(np.abs(theirs - cells).max() / np.abs(cells).max()))
        assert np.array_equal(outside.decode(latents)[0], codec.decode(theirs))
    assert worst <= CLOSE, worst


def test_frames_are_pictures(exported: Path) -> None:
    """Nothing is folded in time: any number of frames, each as it would be alone."""
    outside = OutsideLatents.load(exported, surplus="refuse")
    frames = np.stack([picture(30 + n, "RGBA")[:16, :24] for n in range(3)])
    found = outside.encode(frames)
    assert found.values.shape == (3, 4, 6, outside.dim) and found.frames == 3
    for n, frame in enumerate(frames):
        assert np.array_equal(found.values[n], outside.encode(frame).values[0])
    back = outside.decode(found)
    assert back.shape == frames.shape
    assert np.array_equal(back[1:2], outside.decode(Latents(found.values[1:2], 1, 16, 24)))


def test_the_command_adds_it_as_it_was(
    codec: LatentCodec, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit the codec of the set that was exported, and so the same file and hash."""
    TokenizerSet({"latents": codec}).save(tmp_path / "first")
    argv = ["tokenizer", "add", f"latents={exported}", "--out", str(tmp_path / "again"), "--json"]
    assert run(argv) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    first, again = (TokenizerSet.load(tmp_path / name) for name in ("first", "again"))
    assert said["hash"] == first.manifest.hash == again.manifest.hash
    assert again.codecs["latents"].to_bytes() == codec.to_bytes()
    layer = picture(40, "RGBA")
    assert np.array_equal(again.encode_layer(layer), first.encode_layer(layer))
    # The folder of the whole export says which part is meant.
    assert run([*argv[:2], f"latents={exported.parent}", "--out", str(tmp_path / "no")]) != 0
    assert "vae" in capsys.readouterr().err
