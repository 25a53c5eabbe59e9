"""Training of a small RGBA autoencoder from nothing: `learn.Training` without codes, with the losses of `rgba_vae`.

It learns on crops of layers and of opaque pictures, in two dimensions (`picture_vae`), and becomes an
`AutoencoderKLQwenImage(input_channels=4)` in a `LatentCodec`, whose latent statistics are taken over the records it
learned from. What a step sees depends on (seed, step) only; averages of the weights are what is kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ringweave.tokenizers.codec import Tensors, pad_to
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.latent_codec import FOLD, LatentCodec, shown
from ringweave.tokenizers.learn import Schedule, Training
from ringweave.tokenizers.outside_files import exactly
from ringweave.tokenizers.picture_vae import PictureVae
from ringweave.tokenizers.rgba_vae import VaeLoss, opaque_some

U8 = NDArray[np.uint8]
#: Share of the gradient that a value out of its range still gets: none would leave it there for ever.
LEAK = 0.05
#: Share of crops of layers that lie anywhere.
EMPTY = 0.1
#: Records that latent statistics are taken over, at most, and the smallest deviation they give a channel.
COUNTED, LEAST_STD = 512, 1e-3


@dataclass(frozen=True)
class VaeSchedule(Schedule):
    """See `Schedule`; there is one phase. crop: pixels a side of what a step sees; opaque: share of crops laid over a
    plain colour; pictures: share of crops that are of opaque pictures, where there are layers too; absolute, alpha,
    kl: see `VaeLoss`."""

    batch: int = 28
    rate: float = 3e-3
    ema: float = 0.99
    absolute: float = 0.02
    alpha: float = 0.02
    kl: float = 1e-6
    crop: int = 24
    opaque: float = 0.1
    pictures: float = 0.25

    @property
    def joint(self) -> int:
        """All steps."""
        return self.steps


def vae_config(*, base: int, channels: int, patch: int) -> dict[str, Any]:
    """Arguments of the stock class for cells of `patch` pixels; `channels` of the VAE, a cell has four times as many.

    One width throughout and no residual blocks between the stages: of equal time, that learned most on small layers.
    DataError unless `patch` is 4, 8, 16, 32 or 64.
    """
    stages = patch.bit_length() - 2
    if not 1 <= stages <= 5 or patch != FOLD << stages:
        raise DataError(f"cells of latents span 4, 8, 16, 32 or 64 pixels, not {patch}")
    return {
        "base_dim": base, "z_dim": channels, "dim_mult": [1] * (stages + 1), "num_res_blocks": 0,
        "attn_scales": [], "temperal_downsample": [False] * stages, "dropout": 0.0,
        "input_channels": 4, "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels,
    }  # fmt: skip


class VaeCrops:
    """Crops of layers and of opaque pictures, uint8 [H, W, 4] each, as float64 [n, side, side, 4] of 0..255.

    Layers are mostly empty: most crops are laid about a pixel that shows, the others anywhere.
    """

    def __init__(self, layers: Sequence[U8], pictures: Sequence[U8], schedule: VaeSchedule) -> None:
        self._side, self._schedule = schedule.crop, schedule
        self._layers, self._pictures = (
            [_at_least(record, schedule.crop) for record in records if record.size]
            for records in (layers, pictures)
        )
        if not self._layers and not self._pictures:
            raise DataError("there are no layers or pictures to learn latents from")
        self._shown = [np.flatnonzero(layer[..., 3]) for layer in self._layers]

    def batch(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """`count` crops, those of layers first; half are mirrored, some laid over a plain colour."""
        share = self._schedule.pictures if self._layers else 1.0
        of_pictures = round(count * share) if self._pictures else 0
        pixels = np.zeros((count, self._side, self._side, 4))
        for n, (which, where, empty, *place) in enumerate(rng.random((count, 5))):
            if n < count - of_pictures:
                number = int(which * len(self._layers))
                record, shown = self._layers[number], self._shown[number]
            else:
                record, shown = self._pictures[int(which * len(self._pictures))], np.zeros(0, np.int64)
            room = np.array(record.shape[:2]) - self._side
            corner = np.array(place) * (room + 1)
            if len(shown) and empty >= EMPTY:
                pixel = divmod(int(shown[int(where * len(shown))]), record.shape[1])
                corner = np.clip(np.array(pixel) - np.floor(np.array(place) * self._side), 0, room)
            top, left = (int(at) for at in corner)
            pixels[n] = record[top : top + self._side, left : left + self._side]
        mirrored = rng.random(count) < 0.5
        pixels[mirrored] = pixels[mirrored, :, ::-1]
        return opaque_some(pixels, self._schedule.opaque, rng)


def _at_least(record: U8, side: int) -> U8:
    """`record` [H, W, 4] with its edge drawn out to `side` pixels where it is smaller."""
    short = [(0, max(0, side - n)) for n in record.shape[:2]]
    return np.pad(record, [*short, (0, 0)], mode="edge")


class VaeTraining(Training):
    """`learn.Training` of a `PictureVae`; layers and pictures: see `VaeCrops`. config: `vae_config`."""

    schedule: VaeSchedule
    core: PictureVae
    average: PictureVae

    def __init__(
        self, config: dict[str, Any], layers: Sequence[U8], pictures: Sequence[U8], schedule: VaeSchedule
    ) -> None:
        self.config, self.schedule = config, schedule
        if schedule.crop % _patch_of(config):
            raise DataError(
                f"crops of {schedule.crop} pixels do not hold whole cells of {_patch_of(config)}",
                fix="set the schedule's `crop` to a multiple of a cell",
            )
        layers, pictures = [shown(x) for x in layers], [shown(x) for x in pictures]
        self.layers, self.pictures = len(layers), len(pictures)
        self._records = [*layers, *pictures]
        self._vae_crops = VaeCrops(layers, pictures, schedule)
        self._loss = VaeLoss(absolute=schedule.absolute, alpha=schedule.alpha, kl=schedule.kl)
        self.core = PictureVae(config, seed=schedule.seed)
        self.average = PictureVae(config, seed=schedule.seed).requires_grad_(False)
        digest = hashlib.sha256()
        for record in self._records:
            digest.update(f"{record.shape}".encode() + np.ascontiguousarray(record).tobytes())
        self._start = digest.hexdigest()
        self.step, self.loss = 0, float("nan")
        self.seen = torch.zeros(1)  # no codes
        self._optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        groups = [{"params": list(self.core.parameters()), "share": 1.0}]
        return torch.optim.AdamW(groups, lr=self.schedule.rate, betas=(0.9, 0.99), weight_decay=0.0)

    def _one_step(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        pixels, noise = self._drawn()
        mean, logvar = self.core.encode(pixels)
        found = self.core.decode(mean + (logvar * 0.5).exp() * noise)
        total = self._loss(_into_range(found), pixels, mean, logvar).sum() / self.schedule.batch
        # Shares of the sum over all ranks: nothing is left to divide.
        self.core.zero_grad()
        total.backward()
        for parameter in self.core.parameters():
            assert parameter.grad is not None
            _over_ranks(parameter.grad)
        norm = nn.utils.clip_grad_norm_(self.core.parameters(), 1.0)
        self.loss = float(_over_ranks(total.detach()))
        if not (math.isfinite(self.loss) and math.isfinite(float(norm))):
            raise DataError(
                f"training of the latents codec diverged at step {self.step}", fix="lower the learning rate"
            )
        self._optimizer.step()
        self._average()

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """This rank's share of the step's crops [n, 4, H, W] in [-1, 1], and the noise of their posteriors."""
        rng = np.random.Generator(np.random.Philox(key=[self.schedule.seed, self.step]))
        pixels = self._vae_crops.batch(rng, self.schedule.batch) / 127.5 - 1
        side = self.schedule.crop * FOLD // _patch_of(self.config)
        noise = rng.standard_normal((len(pixels), self.config["z_dim"], side, side), np.float32)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = slice(rank * len(pixels) // world, (rank + 1) * len(pixels) // world)
        return torch.tensor(pixels[mine].transpose(0, 3, 1, 2), dtype=torch.float32), torch.tensor(
            noise[mine]
        )

    def tensors(self) -> Tensors:
        """Weights of the stock class."""
        return self.average.to_stock()

    def codec(self) -> LatentCodec:
        """The averaged weights with latent statistics of what they were learned from."""
        mean, std = self.statistics()
        config = self.config | {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
        return LatentCodec(config, self.tensors())

    def statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and deviation of each channel of the VAE over at most COUNTED records, evenly spread: float32 [Z]."""
        places = np.linspace(0, len(self._records) - 1, min(COUNTED, len(self._records))).round().astype(int)
        count, total, squares = 0, np.zeros(self.config["z_dim"]), np.zeros(self.config["z_dim"])
        with exactly():
            for place in places:
                record = pad_to(self._records[place], _patch_of(self.config))
                pixels = (torch.tensor(record).float() / 127.5 - 1).movedim(-1, 0).contiguous()
                found = self.average.encode(pixels[None])[0][0].flatten(1).double().numpy()
                count += found.shape[1]
                total += found.sum(1)
                squares += np.square(found).sum(1)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, LEAST_STD**2))
        return mean.astype(np.float32), std.astype(np.float32)


def _over_ranks(value: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def _patch_of(config: dict[str, Any]) -> int:
    return int(FOLD ** len(config["dim_mult"]))


def _into_range(values: Tensor) -> Tensor:
    """Clipped to [-1, 1] as what is decoded is, with a little gradient beyond: levels of 0 and 255 are met exactly."""
    return values.clamp(-1, 1).lerp(values, LEAK)
