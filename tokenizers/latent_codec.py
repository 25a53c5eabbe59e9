"""Continuous latents of RGBA layers: diffusers' `AutoencoderKLQwenImage(input_channels=4)` as a codec of a set.

A cell is what a diffusion transformer calls a token: 2 x 2 latents of the VAE, folded into channels in the order
(c, row, column) of `QwenImagePipeline._pack_latents`. Latents are the mode of the posterior, normalised per VAE channel
with the mean and deviation that the file holds, so an objective sees about unit variance. The codec has no ids; its
file, statistics included, is hashed into the vocabulary all the same.

A picture is encoded alone, in float32, on one thread, by the stock class: what was encoded before changes no bit of it.
So latents may be remembered, and are: many tasks show the same pictures of one record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.codec import Tensors, pack_codec, pad_to, unpack_codec
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.outside_files import (
    build,
    check_shapes,
    diffusers_config,
    exactly,
    library,
    read_weights,
    to_pixels,
)

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
CLASS = "AutoencoderKLQwenImage"
#: Latents of the VAE that one cell holds, each way.
FOLD = 2
#: Largest number of float32, of which statistics are.
LARGEST = float(np.finfo(np.float32).max)
#: Arguments of the class: whole numbers with their smallest value, and lists.
COUNTS = {"base_dim": 1, "z_dim": 1, "num_res_blocks": 0, "input_channels": 1}
LISTS = ("dim_mult", "attn_scales", "temperal_downsample", "latents_mean", "latents_std")
FIELDS = frozenset({*COUNTS, *LISTS, "dropout"})


#: Bytes of latents that a codec remembers, those asked for last: 8,000 pictures of 64 x 64, cells of 8 pixels.
REMEMBERED = 128 << 20


class _Memory:
    """Arrays by the picture they were made of, up to a number of bytes; the one not asked for longest goes first."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._held: dict[bytes, F32] = {}

    def get(self, key: bytes) -> F32 | None:
        """A copy of the array of a key, if it is held."""
        held = self._held.pop(key, None)
        if held is None:
            return None
        self._held[key] = held  # now the last
        return held.copy()

    def keep(self, key: bytes, value: F32) -> None:
        """Holds a copy."""
        if key in self._held or value.nbytes > self._limit:
            return
        self._held[key] = value.copy()
        self._bytes += value.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._held.pop(next(iter(self._held))).nbytes


def fold(latents: F32) -> F32:
    """[Z, h, w] -> cells [h/2, w/2, 4 Z]."""
    z, height, width = latents.shape
    split = latents.reshape(z, height // FOLD, FOLD, width // FOLD, FOLD)
    return np.ascontiguousarray(split.transpose(1, 3, 0, 2, 4)).reshape(height // FOLD, width // FOLD, -1)


def unfold(cells: F32) -> F32:
    """Inverse of `fold`."""
    rows, columns, channels = cells.shape
    split = cells.reshape(rows, columns, channels // FOLD**2, FOLD, FOLD)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1, 4)).reshape(-1, rows * FOLD, columns * FOLD)


def shown(layer: U8) -> U8:
    """The layer [H, W, 4] with black where it is clear: colour that nobody sees must not change a latent."""
    return np.where(layer[..., 3:] == 0, np.uint8(0), layer)


class LatentCodec:
    """uint8 [H, W, 4] (straight alpha) <-> cells float32 [h, w, channels].

    config: arguments of the class, latents_mean and latents_std (of each of its z_dim channels) among them; tensors:
    its weights. patch: pixels a cell spans each way. VocabularyError when config and tensors do not fit each other.
    """

    kind = "latents.rgba"

    def __init__(self, config: Mapping[str, Any], tensors: Tensors, *, where: str = "latents.rgba") -> None:
        self.where = where
        self.config = _checked(config, where)
        asked = vae_shapes(self.config)
        check_shapes(asked, {name: value.shape for name, value in tensors.items()}, where=where)
        for name, value in tensors.items():
            if value.dtype != np.float32 or not np.isfinite(value).all():
                raise VocabularyError(f"{name} is not finite float32", where=where)
        self.tensors = tensors
        self.patch = FOLD * 2 ** (len(self.config["dim_mult"]) - 1)
        self.channels = FOLD**2 * int(self.config["z_dim"])
        self._memory = _Memory(REMEMBERED)
        #: Of the VAE's channels, float32 [z_dim, 1, 1].
        self.mean, self.std = (
            np.array(self.config[name], np.float32)[:, None, None] for name in ("latents_mean", "latents_std")
        )

    @cached_property
    def model(self) -> Any:
        """The stock class with these weights, made when it is first needed: diffusers is slow to import."""
        import torch

        vae = library("diffusers", CLASS, extra="")
        tensors = {name: torch.tensor(value) for name, value in self.tensors.items()}
        return build(lambda: vae(**self.config), tensors, where=self.where, device="cpu")

    def encode(self, layer: U8, *, afresh: bool = False) -> F32:
        """Cells float32 [h, w, channels] of one layer uint8 [H, W, 4], padded by its edge to whole cells.

        Those of a picture that was encoded lately are remembered. afresh: they are not looked up, to measure time.
        """
        layer = np.asarray(layer)
        if layer.dtype != np.uint8 or layer.ndim != 3 or layer.shape[-1] != 4 or 0 in layer.shape:
            raise DataError(
                f"a layer must be uint8 [H, W, 4], got {layer.dtype} {list(layer.shape)}", where=self.kind
            )
        layer = np.ascontiguousarray(shown(layer))
        key = hashlib.blake2b(repr(layer.shape).encode() + layer.tobytes(), digest_size=32).digest()
        cells = None if afresh else self._memory.get(key)
        if cells is None:
            cells = self._encoded(layer)
            self._memory.keep(key, cells)
        return cells

    def _encoded(self, layer: U8) -> F32:
        """`encode`, of a layer as it is shown."""
        import torch

        with exactly():
            pixels = torch.tensor(pad_to(layer, self.patch)).float() / 127.5 - 1
            values = pixels.movedim(-1, 0).contiguous()[None, :, None]  # [1, 4, 1, H, W]
            mode = self.model.encode(values).latent_dist.mode()[0, :, 0].numpy()
        normal = (mode - self.mean) / self.std
        if not np.isfinite(normal).all():
            raise DataError("the encoder gave latents that are not finite", where=self.kind)
        return fold(normal)

    def decode(self, cells: F32) -> U8:
        """uint8 [h * patch, w * patch, 4] of cells [h, w, channels]; who padded crops. DataError unless finite."""
        import torch

        cells = np.asarray(cells)
        right = cells.ndim == 3 and cells.shape[-1] == self.channels and 0 not in cells.shape
        if not right or cells.dtype != np.float32 or not np.isfinite(cells).all():
            raise DataError(
                f"cells must be finite float32 [h, w, {self.channels}], got {cells.dtype} {list(cells.shape)}",
                where=self.kind,
            )
        latents = unfold(cells) * self.std + self.mean
        with exactly():
            pixels = self.model.decode(torch.from_numpy(latents)[None, :, None]).sample[0, :, 0]
            return to_pixels((pixels.movedim(0, -1) + 1) * 127.5, what=self.kind)

    def to_bytes(self) -> bytes:
        """The codec file: weights, and config with statistics in its metadata."""
        config: Any = self.config
        return pack_codec(self.kind, config, self.tensors)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> LatentCodec:
        """Load `to_bytes`; VocabularyError when it is something else."""
        config, tensors = unpack_codec(data, cls.kind, where=where)
        return cls(config, tensors, where=where)

    # ---- diffusers ----

    @classmethod
    def from_model(cls, vae: Any, *, where: str = "latents.rgba") -> LatentCodec:
        """Of an `AutoencoderKLQwenImage` with 4 channels, its statistics in its config."""
        config = {name: vae.config[name] for name in FIELDS}
        tensors = {name: value.detach().cpu().float().numpy() for name, value in vae.state_dict().items()}
        return cls(config, {name: value.copy() for name, value in tensors.items()}, where=where)

    @classmethod
    def from_diffusers(cls, folder: Path) -> LatentCodec:
        """Read a `vae/` folder of diffusers; one of 3 channels becomes 4 by `rgba_vae.from_rgb`.

        VocabularyError for another class, weights that do not fit, and a config without statistics: diffusers would
        fill in those of Qwen-Image's own VAE.
        """
        weights = read_weights(Path(folder))
        vae = library("diffusers", CLASS, extra="")
        config = diffusers_config(weights, vae)
        missing = [name for name in ("latents_mean", "latents_std") if config.get(name) is None]
        if missing:
            raise VocabularyError(
                f"config.json does not state {' and '.join(missing)}", where=weights.where,
                why="latents are normalised with them, and those of another VAE would pass unseen",
                fix="take them over a sample of layers and put them into config.json",
            )  # fmt: skip
        model: Any = build(lambda: vae(**config), weights.tensors, where=weights.where, device="cpu")
        if model.config.input_channels == 3:
            from ringweave.tokenizers.rgba_vae import from_rgb

            model = from_rgb(model)
        return cls.from_model(model, where=weights.where)

    def save_diffusers(self, folder: Path) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors, which the stock class loads."""
        self.model.save_pretrained(Path(folder))


def _checked(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`config` with plain lists; VocabularyError unless the class runs on it and its statistics can be used."""
    unknown = sorted(set(config) ^ FIELDS)
    if unknown:
        raise VocabularyError(f"the config lacks or does not know: {', '.join(unknown[:4])}", where=where)
    out = dict(config) | {name: _listed(config[name], name, where) for name in LISTS}
    for name, least in COUNTS.items():
        if type(out[name]) is not int or not least <= out[name] <= 1 << 16:
            raise VocabularyError(
                f"{name} must be a whole number from {least}, got {out[name]!r}", where=where
            )
    stages = len(out["dim_mult"])
    why = ""
    if out["input_channels"] != 4:
        why = f"it takes {out['input_channels']} channels, and RGBA has 4"
    elif not 1 <= stages <= 8 or not all(type(n) is int and 1 <= n <= 1 << 10 for n in out["dim_mult"]):
        why = f"dim_mult is {out['dim_mult']}"
    elif len(out["temperal_downsample"]) != stages - 1:
        why = f"temperal_downsample has {len(out['temperal_downsample'])} entries for {stages} stages"
    elif not all(type(flag) is bool for flag in out["temperal_downsample"]):
        why = "temperal_downsample holds other things than true and false"
    elif not out["num_res_blocks"] and set(out["dim_mult"]) != {1}:
        why = "without residual blocks nothing changes the width from stage to stage"
    elif out["attn_scales"]:
        why = "attn_scales is not empty, and the class of diffusers fails on that"
    elif type(out["dropout"]) not in (int, float) or not 0 <= out["dropout"] < 1:
        why = f"dropout is {out['dropout']!r}"
    if why:
        raise VocabularyError("the config is not of a VAE of RGBA pictures", where=where, why=why)
    numbers = [*out["latents_mean"], *out["latents_std"]]
    sound = all(type(n) in (int, float) and -LARGEST <= n <= LARGEST for n in numbers)
    lengths = len(out["latents_mean"]), len(out["latents_std"])
    if not sound or set(lengths) != {out["z_dim"]} or not all(np.float32(n) > 0 for n in out["latents_std"]):
        raise VocabularyError(
            f"the latent statistics do not fit {out['z_dim']} channels", where=where,
            why=f"{lengths[0]} means, {lengths[1]} deviations; all have to be finite, deviations above 0",
        )  # fmt: skip
    return out


def _listed(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise VocabularyError(f"{name} must be a list, got {value!r}", where=where)
    return list(value)


# ---- the tensors of the class ----

Shaped = Iterator[tuple[str, tuple[int, ...]]]


def vae_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the stock class, without importing it."""
    return dict(_encoder(config)) | dict(_decoder(config))


def _conv(name: str, inputs: int, outputs: int, *kernel: int) -> Shaped:
    yield f"{name}.weight", (outputs, inputs, *kernel)
    yield f"{name}.bias", (outputs,)


def _residual(name: str, inputs: int, outputs: int) -> Shaped:
    yield f"{name}.norm1.gamma", (inputs, 1, 1, 1)
    yield from _conv(f"{name}.conv1", inputs, outputs, 3, 3, 3)
    yield f"{name}.norm2.gamma", (outputs, 1, 1, 1)
    yield from _conv(f"{name}.conv2", outputs, outputs, 3, 3, 3)
    if inputs != outputs:
        yield from _conv(f"{name}.conv_shortcut", inputs, outputs, 1, 1, 1)


def _middle(name: str, dim: int) -> Shaped:
    for n in (0, 1):
        yield from _residual(f"{name}.resnets.{n}", dim, dim)
    yield f"{name}.attentions.0.norm.gamma", (dim, 1, 1)
    yield from _conv(f"{name}.attentions.0.to_qkv", dim, 3 * dim, 1, 1)
    yield from _conv(f"{name}.attentions.0.proj", dim, dim, 1, 1)


def _encoder(config: Mapping[str, Any]) -> Shaped:
    base, double = config["base_dim"], 2 * config["z_dim"]
    dim, number = base, 0
    yield from _conv("encoder.conv_in", config["input_channels"], base, 3, 3, 3)
    for stage, many in enumerate(config["dim_mult"]):
        for _ in range(config["num_res_blocks"]):
            yield from _residual(f"encoder.down_blocks.{number}", dim, base * many)
            dim, number = base * many, number + 1
        dim = base * many
        if stage < len(config["dim_mult"]) - 1:
            name = f"encoder.down_blocks.{number}"
            yield from _conv(f"{name}.resample.1", dim, dim, 3, 3)
            if config["temperal_downsample"][stage]:
                yield from _conv(f"{name}.time_conv", dim, dim, 3, 1, 1)
            number += 1
    yield from _middle("encoder.mid_block", dim)
    yield "encoder.norm_out.gamma", (dim, 1, 1, 1)
    yield from _conv("encoder.conv_out", dim, double, 3, 3, 3)
    yield from _conv("quant_conv", double, double, 1, 1, 1)


def _decoder(config: Mapping[str, Any]) -> Shaped:
    z, widths = config["z_dim"], [config["base_dim"] * many for many in reversed(config["dim_mult"])]
    inputs = widths[0]
    yield from _conv("post_quant_conv", z, z, 1, 1, 1)
    yield from _conv("decoder.conv_in", z, inputs, 3, 3, 3)
    yield from _middle("decoder.mid_block", inputs)
    for stage, dim in enumerate(widths):
        name = f"decoder.up_blocks.{stage}"
        for number in range(config["num_res_blocks"] + 1):
            yield from _residual(f"{name}.resnets.{number}", inputs, dim)
            inputs = dim
        if stage < len(widths) - 1:
            yield from _conv(f"{name}.upsamplers.0.resample.1", dim, dim // 2, 3, 3)
            if config["temperal_downsample"][-1 - stage]:
                yield from _conv(f"{name}.upsamplers.0.time_conv", dim, 2 * dim, 3, 1, 1)
            # The class halves the width of the stage before; resampling halves that of this one.
            inputs = widths[stage] // 2
    yield "decoder.norm_out.gamma", (inputs, 1, 1, 1)
    yield from _conv("decoder.conv_out", inputs, config["input_channels"], 3, 3, 3)
