"""Latents from outside: equal to diffusers' own classes, and not a frame lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_samples import clip, picture

from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.outside_latents import Latents, OutsideLatents

diffusers = pytest.importorskip("diffusers")

DIM = 4
STATISTICS = {"latents_mean": [-0.7, 0.2, 0.1, 1.5], "latents_std": [2.8, 1.4, 0.6, 3.1]}
VIDEO = {"base_dim": 8, "z_dim": DIM, "dim_mult": [1, 1, 1], "num_res_blocks": 1,
         "temperal_downsample": [True, True], **STATISTICS}  # fmt: skip
IMAGE = {"block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 4,
         "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": DIM}  # fmt: skip
#: name -> (class, config, channels of a picture, pixels a latent spans)
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "kl": ("AutoencoderKL", {**IMAGE, "scaling_factor": 0.5, "shift_factor": 0.3}, 3, 2),
    "kl-sdxl": ("AutoencoderKL", {**IMAGE, "scaling_factor": 0.5, **STATISTICS}, 3, 2),
    "qwen": ("AutoencoderKLQwenImage", VIDEO, 3, 4),
    "qwen-rgba": ("AutoencoderKLQwenImage", {**VIDEO, "input_channels": 4}, 4, 4),
    "wan": ("AutoencoderKLWan", VIDEO, 3, 4),
    "wan-folded": (
        "AutoencoderKLWan",
        {**VIDEO, "patch_size": 2, "in_channels": 12, "out_channels": 12},
        3,
        8,
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case, written by the library."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            kind, config, _, _ = CASES[name]
            made[name] = tmp_path_factory.mktemp(name)
            getattr(diffusers, kind)(**config).save_pretrained(made[name])
        return made[name]

    return save


def frames_of(count: int, channels: int = 3, size: int = 16) -> np.ndarray[Any, Any]:
    """uint8 [count, size, size, channels], every frame another."""
    rng = np.random.default_rng(count)
    base = clip(1)[0][:size, :size].astype(int)
    moving = base[None] + rng.integers(-60, 60, (count, size, size, 3))
    alpha = rng.integers(0, 256, (count, size, size, 1))
    return np.concatenate([moving, alpha], -1)[..., :channels].clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", list(CASES))
def test_latents_and_pixels_are_those_of_the_class(saved: Callable[[str], Path], name: str) -> None:
    """The formulas of diffusers' pipelines, written out, around the class called directly."""
    kind, config, channels, patch = CASES[name]
    codec = OutsideLatents.load(saved(name))
    frames = frames_of(5, channels)
    model = getattr(diffusers, kind).from_pretrained(saved(name)).eval()
    mean, std = (
        torch.tensor(config.get(key, fill)) for key, fill in (("latents_mean", 0.0), ("latents_std", 1.0))
    )
    mean, std = (
        v.expand(DIM) for v in (mean + config.get("shift_factor", 0.0), std / config.get("scaling_factor", 1))
    )
    seen = frames.copy()
    if channels == 4:
        seen[frames[..., 3] == 0] = 0  # what nobody sees changes no latent
    values = torch.tensor(seen).float() / 127.5 - 1
    with torch.no_grad():
        if name.startswith("kl"):
            raw = model.encode(values.movedim(-1, 1)).latent_dist.mode()
            pixels = model.decode(raw).sample.movedim(1, -1)
            raw = raw.movedim(1, -1)
        else:
            raw = model.encode(values.movedim(-1, 0)[None]).latent_dist.mode()
            pixels = model.decode(raw).sample[0].movedim(0, -1)
            raw = raw[0].movedim(0, -1)
    latents = codec.encode(frames)
    assert (codec.channels, codec.dim, codec.patch) == (channels, DIM, patch)
    assert latents.values.dtype == np.float32
    assert latents.values.shape == (5 if codec.group == 1 else 2, 16 // patch, 16 // patch, DIM)
    assert np.abs(latents.values - ((raw - mean) / std).numpy()).max() <= 1e-5
    assert np.abs(codec.decode(latents) - ((pixels + 1) * 127.5).clamp(0, 255).numpy()).max() <= 0.51


@pytest.mark.parametrize("name", ["qwen", "wan"])
def test_every_frame_comes_back(saved: Callable[[str], Path], name: str) -> None:
    codec, strict = (OutsideLatents.load(saved(name), surplus=s) for s in ("repeat", "refuse"))
    whole = codec.encode(frames_of(9, size=8)).values
    for count in (1, 2, 3, 4, 5, 8, 9, 17, 40):
        frames = frames_of(count, size=8)
        latents = codec.encode(frames)
        assert len(latents.values) == 1 + -(-(count - 1) // 4)
        assert codec.decode(latents).shape == frames.shape
        if count % 4 == 1:
            assert np.array_equal(strict.encode(frames).values, latents.values)
        else:
            with pytest.raises(DataError, match=f"{count} frames is not 1 \\+ 4 k"):
                strict.encode(frames)
    # The last frame is looked at: with it changed the last latent changes, and no other one.
    frames = frames_of(9, size=8)
    frames[-1] = 255 - frames[-1]
    other = codec.encode(frames).values
    assert np.array_equal(other[:-1], whole[:-1])
    assert np.abs(other[-1] - whole[-1]).max() > 1e-3
    frames = frames_of(7, size=8)
    by_hand = np.concatenate([frames, frames[-1:], frames[-1:]])
    assert np.array_equal(codec.encode(frames).values, strict.encode(by_hand).values)


def test_the_class_alone_loses_frames(saved: Callable[[str], Path]) -> None:
    """31 frames in, 29 out (Wan-Video/Wan2.1#448): what the codec guards against."""
    model = diffusers.AutoencoderKLWan.from_pretrained(saved("wan")).eval()
    with torch.no_grad():
        found = model.decode(model.encode(torch.zeros(1, 3, 31, 8, 8)).latent_dist.mode()).sample
    assert found.shape[2] == 29


@pytest.mark.parametrize("name", ["kl", "qwen", "wan"])
def test_threads_batch_and_autocast_change_nothing(saved: Callable[[str], Path], name: str) -> None:
    codec = OutsideLatents.load(saved(name))
    frames = frames_of(5, size=32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    two = codec.encode(frames).values
    torch.set_num_threads(threads)
    assert np.array_equal(two, codec.encode(frames).values)
    first = codec.encode(frames[0])
    assert first.frames == 1
    assert np.abs(first.values - two[:1]).max() <= (0 if name == "kl" else 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(codec.encode(frames).values, two)


def test_odd_sizes_come_back(saved: Callable[[str], Path]) -> None:
    codec = OutsideLatents.load(saved("qwen"))
    image = picture(2)[:13, :18]
    latents = codec.encode(image)
    assert latents.values.shape == (1, 4, 5, DIM)
    padded = np.pad(image, ((0, 3), (0, 2), (0, 0)), mode="edge")
    assert np.array_equal(latents.values, codec.encode(padded).values)
    assert np.array_equal(codec.decode(latents)[0], codec.decode(codec.encode(padded))[0, :13, :18])


def test_wrong_input_is_named(saved: Callable[[str], Path]) -> None:
    codec = OutsideLatents.load(saved("qwen-rgba"))
    for bad in (frames_of(1, 3), np.zeros((0, 8, 8, 4), np.uint8), np.zeros((8, 8, 4), np.float32)):
        with pytest.raises(DataError, match=r"uint8 \[T, H, W, 4\]"):
            codec.encode(bad)
    values = np.zeros((2, 2, 2, DIM), np.float32)
    for latents in (
        Latents(values[..., :3], 5, 8, 8),
        Latents(values * np.nan, 5, 8, 8),
        Latents(values, 6, 8, 8),
        Latents(values, 5, 9, 8),
        Latents(values, 0, 8, 8),
        Latents(values[0], 5, 8, 8),
    ):
        with pytest.raises(DataError, match="latents"):
            codec.decode(latents)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"latents_mean": None, "latents_std": None}, ""),
        ({"latents_mean": [0.0]}, "do not fit 4 channels"),
        ({"latents_std": [1.0, 1.0, 0.0, 1.0]}, "above 0"),
        ({"latents_std": None}, "only one of"),
        ({"temperal_downsample": [False, True]}, "not those the config describes"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"zdim": 4}, "does not know: zdim"),
        ({"z_dim": "four"}, "does not describe a model"),
        ({"base_dim": 10**7}, "other shape: .*and .* more"),
        ({"num_res_blocks": 2}, "missing: decoder"),
    ],
)
def test_a_config_that_is_wrong_is_refused(
    saved: Callable[[str], Path], tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    source = saved("wan")
    config = json.loads((source / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(
        (source / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    if match:
        with pytest.raises(VocabularyError, match=match):
            OutsideLatents.load(tmp_path)
    else:
        assert OutsideLatents.load(tmp_path).std.tolist() == [1.0] * DIM


def test_another_stride_in_time_is_refused(tmp_path: Path) -> None:
    config = VIDEO | {"temperal_downsample": [False, True]}
    diffusers.AutoencoderKLWan(**config).save_pretrained(tmp_path)
    with pytest.raises(VocabularyError, match="folds 2 frames into one"):
        OutsideLatents.load(tmp_path)


def test_older_names_of_attention_load(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Stable Diffusion's published VAEs say query, key, value and proj_attn."""
    state = load_file(saved("kl") / "diffusion_pytorch_model.safetensors")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in state.items():
        for new, word in older.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{word}.")
        old[name] = tensor
    assert len(old.keys() - state.keys()) == 16
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved("kl") / "config.json").read_bytes())
    codec = OutsideLatents.load(tmp_path)
    assert np.array_equal(
        codec.encode(frames_of(2)).values, OutsideLatents.load(saved("kl")).encode(frames_of(2)).values
    )
    save_file({k: v.clone() for k, v in (old | state).items()}, tmp_path / "model.safetensors")
    with pytest.raises(VocabularyError, match=r"not expected: .*attentions\.0\.key"):
        OutsideLatents.load(tmp_path)


def test_statistics_left_out_are_not_those_of_another_vae(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """The class fills in Wan 2.1's sixteen numbers for whatever VAE."""
    source = saved("wan")
    config = json.loads((source / "config.json").read_text())
    del config["latents_mean"], config["latents_std"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(source / "diffusion_pytorch_model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(VocabularyError, match="16 means"):
        OutsideLatents.load(tmp_path)
