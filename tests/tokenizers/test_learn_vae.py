"""A small RGBA autoencoder that learns: equal to the stock class, repeatable, and better than it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import webdataset
from numpy.typing import NDArray
from tokenizer_samples import SMALL, picture, png, prose, records
from two_ranks import losses_of, losses_of_two_ranks

from ringweave.launch.cli import run
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.fit import fit_tokenizers
from ringweave.tokenizers.latent_codec import LatentCodec
from ringweave.tokenizers.learn import Schedule
from ringweave.tokenizers.learn_run import learn_codecs
from ringweave.tokenizers.learn_vae import VaeCrops, VaeSchedule, VaeTraining, vae_config
from ringweave.tokenizers.measure import alpha_mae, psnr_nine
from ringweave.tokenizers.picture_vae import PictureVae
from ringweave.tokenizers.set import TokenizerSet

TINY = vae_config(base=4, channels=2, patch=8)
SHORT = VaeSchedule(steps=6, batch=4, crop=16, seed=3)


def layers(count: int, start: int = 0) -> list[NDArray[np.uint8]]:
    return [picture(seed, "RGBA") for seed in range(start, start + count)]


def opaque(count: int) -> list[NDArray[np.uint8]]:
    return [np.pad(picture(seed), ((0, 0), (0, 0), (0, 1)), constant_values=255) for seed in range(count)]


def training(schedule: VaeSchedule = SHORT) -> VaeTraining:
    return VaeTraining(TINY, layers(6), opaque(3), schedule)


def codec_config(**changes: Any) -> dict[str, Any]:
    return vae_config(base=8, channels=3, patch=8) | {"dim_mult": [1, 2, 4], "num_res_blocks": 1} | changes


# ---- in two dimensions ----


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]},
        {"dim_mult": [1, 1, 1], "num_res_blocks": 0, "temperal_downsample": [True, False]},
        {"dim_mult": [2], "temperal_downsample": []},
    ],
)
def test_it_is_the_stock_class_for_a_picture(changes: dict[str, Any]) -> None:
    """Random weights everywhere, in time too: what stands before the last slice has no say."""
    config = codec_config(**changes)
    torch.manual_seed(1)
    stock = diffusers.AutoencoderKLQwenImage(**config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    flat = PictureVae(config).from_stock(stock.state_dict())
    pixels = torch.rand(2, 4, 24, 32) * 2 - 1
    with torch.no_grad():
        wanted = stock.encode(pixels[:, :, None]).latent_dist
        mean, logvar = flat.encode(pixels)
        picture_ = stock.decode(wanted.mean).sample[:, :, 0]
        found = flat.decode(mean).clamp(-1, 1)
    for ours, theirs in ((mean, wanted.mean[:, :, 0]), (logvar, wanted.logvar[:, :, 0]), (found, picture_)):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_weights_go_to_the_stock_class_and_back() -> None:
    config = codec_config(temperal_downsample=[False, True])
    flat = PictureVae(config, seed=5)
    tensors = flat.to_stock()
    again = PictureVae(config, seed=6).from_stock(tensors)
    assert all(torch.equal(a, b) for a, b in zip(flat.state_dict().values(), again.state_dict().values()))
    assert not tensors["encoder.conv_in.weight"][:, :, :2].any()
    assert tensors["encoder.conv_in.weight"][:, :, 2].any()
    assert not tensors["encoder.down_blocks.3.time_conv.weight"].any()
    stock = diffusers.AutoencoderKLQwenImage(**config)
    stock.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})


def test_a_pixel_of_nothing_has_a_gradient() -> None:
    """The norm of a vector of zeros must not make NaN of everything."""
    flat = PictureVae(codec_config())
    mean, _ = flat.encode(torch.zeros(1, 4, 8, 8))
    flat.decode(mean).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in flat.parameters())


# ---- learning ----


def test_cells_have_the_size_asked_for() -> None:
    for patch in (4, 8, 16, 32):
        config = vae_config(base=4, channels=2, patch=patch)
        codec = LatentCodec(config, PictureVae(config).to_stock())
        assert (codec.patch, codec.channels) == (patch, 8)
    for bad in (0, 2, 6, 24, 128):
        with pytest.raises(DataError, match="4, 8, 16, 32 or 64"):
            vae_config(base=4, channels=2, patch=bad)


@pytest.mark.slow
def test_it_learns() -> None:
    """Held-out layers: far better than before, and than one grey for all of them."""
    schedule = VaeSchedule(steps=60, batch=8, crop=24, rate=4e-3, seed=1)
    learner = VaeTraining(vae_config(base=8, channels=4, patch=8), layers(24), [], schedule)
    before = learner.codec()
    learner.run()
    after, seen = learner.codec(), layers(6, 500)

    def figures(codec: LatentCodec) -> tuple[float, float]:
        back = [codec.decode(codec.encode(layer)) for layer in seen]
        return alpha_mae(seen, back), float(np.mean([psnr_nine(a, b) for a, b in zip(seen, back)]))

    (alpha, quality), (alpha_before, quality_before) = figures(after), figures(before)
    assert alpha < 0.5 * alpha_before
    assert quality > quality_before + 5


def test_latent_statistics_are_those_of_what_it_learned_from() -> None:
    learner = training()
    learner.run(until=3)
    codec = learner.codec()
    cells = np.concatenate([codec.encode(record).reshape(-1, 2, 4) for record in [*layers(6), *opaque(3)]])
    assert np.abs(cells.mean((0, 2))).max() < 1e-3
    assert np.abs(cells.std((0, 2)) - 1).max() < 1e-3


def test_stopped_and_gone_on_equals_never_stopped(tmp_path: Path) -> None:
    whole = training()
    losses = losses_of(whole)
    assert len(set(losses)) == SHORT.steps
    before = training()
    before.run(until=2)
    before.save(tmp_path / "state.safetensors")
    after = training()
    after.restore(tmp_path / "state.safetensors")
    assert after.step == 2
    assert losses_of(after) == losses[2:]
    assert after.codec().to_bytes() == whole.codec().to_bytes()
    other = VaeTraining(TINY, layers(6, 1), opaque(3), SHORT)
    with pytest.raises(DataError, match="another start"):
        other.restore(tmp_path / "state.safetensors")
    with pytest.raises(DataError, match="another schedule"):
        training(VaeSchedule(steps=7, batch=4, crop=16, seed=3)).restore(tmp_path / "state.safetensors")


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns() -> None:
    assert np.allclose(losses_of_two_ranks(training), losses_of(training()), rtol=1e-4)


def test_crops_are_of_layers_and_of_opaque_pictures() -> None:
    schedule = VaeSchedule(crop=16, opaque=0.0, pictures=0.25)
    crops = VaeCrops(layers(6), opaque(3), schedule).batch(np.random.default_rng(0), 40)
    assert crops.shape == (40, 16, 16, 4)
    solid = (crops[..., 3] == 255).all((1, 2))
    assert solid[30:].all() and solid[:30].mean() < 0.5
    alone = VaeCrops([], opaque(3), schedule).batch(np.random.default_rng(0), 5)
    assert (alone[..., 3] == 255).all() and len(alone) == 5
    with pytest.raises(DataError, match="no layers or pictures"):
        VaeCrops([], [], schedule)
    with pytest.raises(DataError, match="20 pixels do not hold whole cells of 8"):
        training(VaeSchedule(steps=1, crop=20))


def test_most_crops_are_about_what_shows() -> None:
    dot = np.zeros((64, 80, 4), np.uint8)
    dot[30, 40] = (9, 8, 7, 255)
    schedule = VaeSchedule(crop=16, opaque=0.0)
    crops = VaeCrops([dot, np.zeros((3, 5, 4), np.uint8)], [], schedule).batch(np.random.default_rng(1), 800)
    seen = crops[..., 3].sum((1, 2)) == 255
    assert 0.35 < seen.mean() < 0.55  # half of the crops are of the other, and a tenth of these lie anywhere
    rows, columns = np.nonzero(crops[seen][..., 3])[1:]
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(16))


def test_a_set_gets_it_and_keeps_its_ids(tmp_path: Path) -> None:
    """The same file on one and on two threads; the ids of the others are what they were."""
    train = {"rgba": records(0, 4)["rgba"], "image": records(0, 2)["image"]}
    files, before = [], torch.get_num_threads()
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        fit_tokenizers(train, folder, sizes=SMALL)
        older = TokenizerSet.load(folder).manifest
        torch.set_num_threads(threads)
        done = learn_codecs(train, folder, names=["latents"], schedule=Schedule(steps=2), sizes=SMALL)
        torch.set_num_threads(before)
        assert done["latents"]["steps"] == 2
        loaded = TokenizerSet.load(folder)
        assert loaded.manifest.extends(older) and loaded.manifest.blocks == older.blocks
        files.append((folder / "latents.safetensors").read_bytes())
    assert files[0] == files[1]
    codec = loaded.codecs["latents"]
    assert (codec.patch, codec.channels) == (SMALL.latents_patch, 4 * SMALL.latents_channels)
    assert loaded.decode_layer(loaded.encode_layer(picture(9, "RGBA"))).shape == (48, 48, 4)
    again = learn_codecs(train, folder, names=["latents"], schedule=Schedule(steps=3), sizes=SMALL)
    assert again["latents"]["steps"] == 3  # in the place of the one before
    assert TokenizerSet.load(folder).manifest.hash != loaded.manifest.hash


def test_without_records_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no layers or pictures"):
        learn_codecs(
            {"rgba": [{"layer0.png": b"x"}]}, tmp_path, names=["latents"], schedule=Schedule(steps=2)
        )
    one = {"rgba": [{"layer0.png": png(np.zeros((1, 1, 4), np.uint8))}]}
    fit_tokenizers({"text": records(0, 4)["text"]}, tmp_path, sizes=SMALL)
    learn_codecs(one, tmp_path, names=["latents"], schedule=Schedule(steps=2), sizes=SMALL)
    loaded = TokenizerSet.load(tmp_path)
    assert loaded.encode_layer(np.zeros((1, 1, 4), np.uint8)).shape == (1, 1, 4 * SMALL.latents_channels)


def test_the_command_line_trains_measures_and_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "set"
    data.mkdir()
    for split, first in (("train", 0), ("heldout", 90)):
        with webdataset.TarWriter(str(data / f"rgba-{split}-0000.tar"), encoder=False) as writer:
            for number, members in enumerate(records(first, 6)["rgba"]):
                writer.write({"__key__": f"d{number}", **members, "txt": prose(number).encode()})
    assert run(["data", "index", str(data)]) == 0
    sizes = [f"--size={key}" for key in ("text_pieces=300", "rgba_alpha_codes=16", "rgba_colour_codes=16")]
    sizes += ["--size=latents_base=8", "--size=latents_channels=2", "--size=latents_patch=4"]
    argv = [
        "tokenizer",
        "train",
        "--data",
        str(data),
        "--out",
        str(out),
        "--learn",
        "latents",
        "--steps",
        "3",
    ]
    capsys.readouterr()
    assert run([*argv, *sizes, "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["learned"]["latents"]["steps"] == 3
    figures = made["heldout"]["latents"]
    assert figures["records"] == 6 and figures["cells_per_record"] == 2 * 144
    codec = TokenizerSet.load(out).codecs["latents"]
    assert (codec.patch, codec.channels, codec.config["base_dim"]) == (4, 8, 8)
    assert run(["tokenizer", "eval", "-t", str(out), "--data", str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["latents"]["psnr_nine"] == figures["psnr_nine"] > 5
    assert "latents" not in found["modalities"]
    seen = tmp_path / "seen"
    assert run(["tokenizer", "show", "-t", str(out), "--data", str(data), "--out", str(seen), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == 0
    assert run([*argv[:-3], "smells"]) == 2
