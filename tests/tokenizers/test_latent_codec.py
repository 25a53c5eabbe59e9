"""The codec of continuous latents: equal to diffusers' class, folded as its pipeline folds, part of a vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizer_samples import picture, png

from ringweave.launch.cli import run
from ringweave.launch.tokenizer_eval import evaluate, markdown
from ringweave.tokenizers.codec import pack_codec, sha256, unpack_codec
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.latent_codec import LatentCodec, fold, unfold, vae_shapes
from ringweave.tokenizers.manifest import VocabularyManifest
from ringweave.tokenizers.measure import GROUNDS, measure_latents, psnr, psnr_nine
from ringweave.tokenizers.outside_files import exactly
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.symbols import MidiCodec

Z = 3
CONFIG: dict[str, Any] = {
    "base_dim": 8, "z_dim": Z, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "attn_scales": [],
    "temperal_downsample": [False, True], "dropout": 0.0, "input_channels": 4,
    "latents_mean": [0.25, -0.5, 0.125], "latents_std": [0.5, 2.0, 0.3],
}  # fmt: skip


def stock(seed: int = 0, **changes: Any) -> Any:
    """diffusers' class with random weights."""
    torch.manual_seed(seed)
    return diffusers.AutoencoderKLQwenImage(**CONFIG | changes).eval()


@pytest.fixture(scope="module")
def vae() -> Any:
    return stock()


@pytest.fixture(scope="module")
def codec(vae: Any) -> LatentCodec:
    return LatentCodec.from_model(vae)


def layer(seed: int, height: int = 24, width: int = 32) -> NDArray[np.uint8]:
    """Discs on nothing, uint8 [height, width, 4]."""
    return picture(seed, "RGBA")[:height, :width]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]},
        {"dim_mult": [1, 1], "num_res_blocks": 0, "temperal_downsample": [True]},
        {"dim_mult": [3], "temperal_downsample": [], "base_dim": 10},
        {"base_dim": 6, "dim_mult": [2, 1, 3], "input_channels": 3},
    ],
)
def test_shapes_are_those_of_the_class(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        made = diffusers.AutoencoderKLQwenImage(**CONFIG | changes)
    assert vae_shapes(CONFIG | changes) == {k: tuple(v.shape) for k, v in made.state_dict().items()}


def test_cells_are_folded_as_the_pipeline_folds() -> None:
    latents = np.arange(Z * 6 * 4, dtype=np.float32).reshape(Z, 6, 4)
    cells = fold(latents)
    assert cells.shape == (3, 2, 4 * Z)
    for r, c, z, row, column in np.ndindex(3, 2, Z, 2, 2):
        assert cells[r, c, 4 * z + 2 * row + column] == latents[z, 2 * r + row, 2 * c + column]
    packed = diffusers.QwenImagePipeline._pack_latents(torch.from_numpy(latents)[None], 1, Z, 6, 4)
    assert np.array_equal(packed[0].numpy().reshape(cells.shape), cells)
    assert np.array_equal(unfold(cells), latents)


def test_latents_and_pixels_are_those_of_the_class(vae: Any, codec: LatentCodec) -> None:
    """The class called directly, its mode normalised by hand."""
    pixels = layer(1)
    values = torch.tensor(pixels).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    mean, std = (torch.tensor(CONFIG[name]) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        mode = vae.encode(values).latent_dist.mode()
        wanted = ((mode[0, :, 0].permute(1, 2, 0) - mean) / std).permute(2, 0, 1)
        back = vae.decode(mode).sample[0, :, 0].permute(1, 2, 0)
    cells = codec.encode(pixels)
    assert (codec.patch, codec.channels) == (8, 4 * Z)
    assert cells.dtype == np.float32 and cells.shape == (3, 4, 4 * Z)
    assert np.abs(cells - fold(wanted.numpy())).max() <= 1e-5
    decoded = codec.decode(cells)
    assert decoded.dtype == np.uint8 and decoded.shape == pixels.shape
    assert np.abs(decoded - ((back + 1) * 127.5).numpy().clip(0, 255)).max() <= 0.51


def test_alpha_has_a_say_and_is_given_back(codec: LatentCodec) -> None:
    pixels = layer(2)
    other = pixels.copy()
    other[..., 3] = 255 - other[..., 3]
    assert np.abs(codec.encode(other) - codec.encode(pixels)).max() > 1e-3
    assert len(np.unique(codec.decode(codec.encode(pixels))[..., 3])) > 1


def test_colour_that_nobody_sees_changes_no_bit(codec: LatentCodec) -> None:
    clear = layer(3)
    assert (clear[..., 3] == 0).any()
    painted = clear.copy()
    painted[painted[..., 3] == 0, :3] = (250, 10, 90)
    assert (codec.encode(painted) == codec.encode(clear, afresh=True)).all()
    seen = clear.copy()
    seen[seen[..., 3] > 0, 0] ^= 64
    assert (codec.encode(seen) != codec.encode(clear)).any()


def test_nothing_else_changes_a_bit(codec: LatentCodec) -> None:
    """Law 4: whatever was coded before, on however many threads, under autocast."""
    pixels = layer(3, 40, 48)
    cells = LatentCodec(codec.config, codec.tensors).encode(pixels)
    image = LatentCodec(codec.config, codec.tensors).decode(cells)
    for seed, size in ((4, 8), (5, 48), (6, 16)):
        codec.decode(codec.encode(layer(seed, size, size)))
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = codec.encode(pixels, afresh=True)
            assert np.array_equal(codec.decode(again), image)
        assert np.array_equal(again, cells)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (13, 18), (8, 9)])
def test_odd_sizes_are_padded_by_their_edge(codec: LatentCodec, height: int, width: int) -> None:
    pixels = layer(7)[10 : 10 + height, 10 : 10 + width]
    padded = np.pad(pixels, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    cells = codec.encode(pixels)
    assert cells.shape[:2] == (-(-height // 8), -(-width // 8))
    assert np.array_equal(cells, codec.encode(padded))


def test_what_is_not_a_layer_or_its_cells_is_named(codec: LatentCodec) -> None:
    for bad in (
        np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 4), np.uint8), np.zeros((8, 8, 4), np.float32),
        np.zeros((1, 8, 8, 4), np.uint8),
    ):  # fmt: skip
        with pytest.raises(DataError, match=r"uint8 \[H, W, 4\]"):
            codec.encode(bad)
    cells = np.zeros((2, 2, 4 * Z), np.float32)
    for wrong in (
        cells[..., :-1],
        cells[0],
        cells[:0],
        cells.astype(np.float64),
        np.full_like(cells, np.nan),
    ):
        with pytest.raises(DataError, match="cells must be finite float32"):
            codec.decode(wrong)


# ---- files ----


def test_bytes_come_back(codec: LatentCodec) -> None:
    data = codec.to_bytes()
    again = LatentCodec.from_bytes(data, where="x")
    assert again.to_bytes() == data
    assert again.config == codec.config and again.config["latents_std"] == CONFIG["latents_std"]
    assert np.array_equal(again.encode(layer(8)), codec.encode(layer(8)))


Change = Callable[[dict[str, Any], dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c, t: c.pop("latents_std"), "lacks or does not know: latents_std"),
        (lambda c, t: c.update(zdim=3), "lacks or does not know: zdim"),
        (lambda c, t: c.update(latents_mean=[0.0]), "do not fit 3 channels"),
        (lambda c, t: c.update(latents_std=[1.0, 0.0, 1.0]), "above 0"),
        (lambda c, t: c.update(latents_std=[1.0, 1e-60, 1.0]), "above 0"),
        (lambda c, t: c.update(latents_mean=[0.0, None, 0.0]), "do not fit"),
        (lambda c, t: c.update(latents_mean=3), "must be a list"),
        (lambda c, t: c.update(base_dim="8"), "base_dim must be a whole number"),
        (lambda c, t: c.update(base_dim=16), "other shape"),
        (lambda c, t: c.update(dim_mult=[]), "dim_mult"),
        (lambda c, t: c.update(temperal_downsample=[True]), "1 entries for 3 stages"),
        (lambda c, t: c.update(attn_scales=[0.5]), "attn_scales"),
        (lambda c, t: c.update(num_res_blocks=0), "changes the width"),
        (lambda c, t: c.update(input_channels=3), "3 channels, and RGBA has 4"),
        (lambda c, t: t.pop("quant_conv.bias"), "missing: quant_conv.bias"),
        (lambda c, t: t.update(more=t["quant_conv.bias"]), "not expected: more"),
        (lambda c, t: t.update({"quant_conv.bias": np.full(6, np.inf, np.float32)}), "not finite float32"),
        (lambda c, t: t.update({"quant_conv.bias": np.zeros(6)}), "not finite float32"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_refused(codec: LatentCodec, change: Change, match: str) -> None:
    config, tensors = dict(codec.config), dict(codec.tensors)
    change(config, tensors)
    with pytest.raises(VocabularyError, match=match):
        LatentCodec.from_bytes(pack_codec(LatentCodec.kind, config, tensors), where="x")


def test_damage_and_other_kinds_are_refused(codec: LatentCodec) -> None:
    data = codec.to_bytes()
    for bad in (b"", data[:50], data[:-4], pack_codec("image", {}, {})):
        with pytest.raises(VocabularyError):
            LatentCodec.from_bytes(bad, where="x")


def test_the_stock_class_loads_what_is_saved(codec: LatentCodec, tmp_path: Path) -> None:
    codec.save_diffusers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = diffusers.AutoencoderKLQwenImage.from_pretrained(tmp_path).eval()
    assert (loaded.config.latents_mean, loaded.config.latents_std) == (
        CONFIG["latents_mean"], CONFIG["latents_std"],
    )  # fmt: skip
    values = torch.tensor(layer(9)).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with torch.no_grad():
        mode, ours = (model.encode(values).latent_dist.mode() for model in (loaded, codec.model))
        assert torch.equal(mode, ours)
        assert torch.equal(loaded.decode(mode).sample, codec.model.decode(ours).sample)
    assert LatentCodec.from_diffusers(tmp_path).to_bytes() == codec.to_bytes()


def test_a_folder_of_diffusers_is_read(tmp_path: Path) -> None:
    """Of three channels it becomes one of four: the same latents for opaque pictures, alpha 255 back."""
    rgb = stock(3, input_channels=3)
    rgb.save_pretrained(tmp_path)
    codec = LatentCodec.from_diffusers(tmp_path)
    pixels = picture(11)[:16, :16]
    values = torch.tensor(pixels).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with exactly():
        mode = rgb.encode(values.contiguous()).latent_dist.mode()[0, :, 0].numpy()
    opaque = np.concatenate([pixels, np.full((16, 16, 1), 255, np.uint8)], -1)
    mean, std = (np.array(CONFIG[n], np.float32)[:, None, None] for n in ("latents_mean", "latents_std"))
    assert np.array_equal(codec.encode(opaque), fold((mode - mean) / std))
    assert (codec.decode(codec.encode(opaque))[..., 3] == 255).all()


def test_a_folder_without_statistics_is_refused(vae: Any, tmp_path: Path) -> None:
    """The class would fill in those of Qwen-Image's own VAE."""
    vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["latents_std"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VocabularyError, match="does not state latents_std"):
        LatentCodec.from_diffusers(tmp_path)


# ---- in a set ----


@pytest.fixture(scope="module")
def with_latents(tokenizers: TokenizerSet, codec: LatentCodec) -> TokenizerSet:
    return tokenizers.extended({"latents": codec})


def test_a_set_has_it_without_an_id(
    tokenizers: TokenizerSet, with_latents: TokenizerSet, codec: LatentCodec, tmp_path: Path
) -> None:
    before, after = tokenizers.manifest, with_latents.manifest
    assert "latents" not in before.preprocessing
    assert after.blocks == before.blocks and after.size == before.size
    assert after.extends(before) and after.hash != before.hash
    assert after.preprocessing["latents"] == {
        "patch": 8, "channels": 4 * Z, "kind": "latents.rgba", "sha256": sha256(codec.to_bytes()), "pad": "edge",
        "alpha": "straight", "hidden": "black",
    }  # fmt: skip
    without = {k: v for k, v in after.preprocessing.items() if k != "latents"}
    assert VocabularyManifest(after.blocks, after.text_pieces, without).hash == before.hash
    with_latents.save(tmp_path)
    loaded = TokenizerSet.load(tmp_path)
    assert loaded.manifest.hash == after.hash
    cells = loaded.encode_layer(layer(12))
    assert np.array_equal(cells, codec.encode(layer(12)))
    assert np.array_equal(loaded.decode_layer(cells), codec.decode(cells))
    # Further codecs still come after, and the text says the same.
    more = loaded.extended({"midi": MidiCodec(velocity_bins=8)}).manifest
    assert more.extends(after) and more.blocks[-1].name == "midi"
    ids = loaded.text_segment("as before").ids
    assert np.array_equal(ids, tokenizers.text_segment("as before").ids)


def test_a_set_of_latents_alone(codec: LatentCodec, tmp_path: Path) -> None:
    TokenizerSet({"latents": codec}).save(tmp_path)
    loaded = TokenizerSet.load(tmp_path)
    assert (loaded.manifest.blocks, loaded.manifest.size) == ((), 256)
    assert np.array_equal(loaded.encode_layer(layer(1)), codec.encode(layer(1)))


def test_a_set_without_it_says_how_to_get_one(tokenizers: TokenizerSet) -> None:
    for call in (
        lambda: tokenizers.encode_layer(layer(1)),
        lambda: tokenizers.decode_layer(np.zeros((1, 1, 4))),
    ):
        with pytest.raises(VocabularyError, match="no latents codec") as caught:
            call()
        assert "--learn latents" in str(caught.value)


def test_other_statistics_or_weights_are_refused_by_hash(
    with_latents: TokenizerSet, codec: LatentCodec, tmp_path: Path
) -> None:
    with_latents.save(tmp_path)
    path = tmp_path / "latents.safetensors"
    config, tensors = unpack_codec(path.read_bytes(), LatentCodec.kind, where="x")
    moved: dict[str, Any] = dict(config) | {"latents_mean": [0.25, -0.5, 0.1251]}
    bent = dict(tensors) | {"quant_conv.bias": tensors["quant_conv.bias"] * np.float32(1.001)}
    for data in (pack_codec(LatentCodec.kind, moved, tensors), pack_codec(LatentCodec.kind, config, bent)):
        path.write_bytes(data)
        LatentCodec.from_bytes(data, where="x")  # sound in itself
        with pytest.raises(VocabularyError, match="the latents codec is not the one"):
            TokenizerSet.load(tmp_path)
    path.unlink()
    with pytest.raises(VocabularyError, match="the latents codec is missing"):
        TokenizerSet.load(tmp_path)


@pytest.mark.parametrize(
    ("about", "match"),
    [
        (None, "does not state the hash"),
        ({"patch": 8}, "does not state the hash"),
        ({"sha256": "0" * 64}, "is not the one"),
        ({"patch": 16}, "does not describe the codecs"),
    ],
)
def test_a_manifest_that_lies_about_it_is_refused(
    with_latents: TokenizerSet, tmp_path: Path, about: Any, match: str
) -> None:
    with_latents.save(tmp_path)
    path = tmp_path / "tokenizers.json"
    manifest = json.loads(path.read_text())
    true = manifest["preprocessing"]["latents"]
    manifest["preprocessing"]["latents"] = about if match.startswith("does not state") else true | about
    path.write_text(json.dumps(manifest))
    with pytest.raises(VocabularyError, match=match):
        TokenizerSet.load(tmp_path)


def test_the_command_line_adds_one(
    vae: Any, codec: LatentCodec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae.save_pretrained(tmp_path / "vae")
    out = tmp_path / "set"
    assert run(["tokenizer", "add", "midi", f"latents={tmp_path / 'vae'}", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [block["name"] for block in found["added"]] == ["midi"]
    assert found["hash"] == TokenizerSet.load(out).manifest.hash
    assert (out / "latents.safetensors").read_bytes() == codec.to_bytes()
    assert run(["tokenizer", "add", "latents", "--out", str(out)]) == 2


def test_it_is_measured(with_latents: TokenizerSet, codec: LatentCodec) -> None:
    layers = [layer(n, 48, 48) for n in (20, 21)]
    records = [{"layer0.png": png(layers[0]), "layer1.png": png(layers[1])}, {"layer0.png": b"no"}]
    figures = measure_latents(with_latents, records, limit=9)
    decoded = [codec.decode(codec.encode(part)) for part in layers]
    by_hand = []
    for part, back in zip(layers, decoded):
        for colour in GROUNDS.values():
            flat = []
            for pixels in (part, back):
                alpha = pixels[..., 3:] / 255
                flat.append(np.rint(pixels[..., :3] * alpha + np.array(colour) * (1 - alpha)))
            by_hand.append(psnr(*flat))
    errors = [np.abs(a[..., 3].astype(int) - b[..., 3]).mean() / 255 for a, b in zip(layers, decoded)]
    assert figures == {
        "records": 1, "skipped": 1, "psnr_nine": pytest.approx(np.mean(by_hand), abs=1e-4),
        "alpha_mae": pytest.approx(np.mean(errors), abs=1e-4), "cells_per_record": 72.0,
        "numbers_per_pixel": pytest.approx(4 * Z / 64, abs=1e-3),
    }  # fmt: skip
    assert psnr_nine(layers[0], layers[0]) == 100.0
    hidden = layers[0].copy()
    hidden[hidden[..., 3] == 0] = (9, 99, 199, 0)
    assert psnr_nine(layers[0], hidden) == 100.0
    facts = evaluate(with_latents, {"rgba": records[:1]}, limit=5, progress=lambda *_: None)  # type: ignore[arg-type]
    assert set(facts["modalities"]) == {"rgba"}
    assert facts["latents"]["sha256"] == sha256(codec.to_bytes())
    assert "Latents of RGBA layers" in markdown(facts) and "over nine grounds" in markdown(facts)


def test_weights_in_half_precision_are_widened(vae: Any, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    halves = {name: value.half() for name, value in load_file(file).items()}
    save_file(halves, file, metadata={"format": "pt"})
    codec = LatentCodec.from_diffusers(tmp_path)
    assert all(np.array_equal(codec.tensors[name], value.float().numpy()) for name, value in halves.items())
