"""Continuous latents brought from outside: diffusers' AutoencoderKL, AutoencoderKLQwenImage and AutoencoderKLWan.

Needs the extra ``outside`` (diffusers). Latents are the mean of the posterior, normalised per channel with the
statistics of the VAE's config, so that a flow or diffusion objective sees unit variance. One picture or clip at a
time, float32, one thread (`outside_files.exactly`).

The video classes encode frame 0 alone and then whole groups of four; frames left over vanish without an error.
Here they are either made a whole group by repeating the last frame, with the true count kept beside the latents,
or refused. A video class that folds no frames (as `ringweave export` writes it) is one of pictures: each frame is
encoded alone. Colour under alpha 0 changes no latent, as in `LatentCodec`: both give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.codec import pad_to
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.latent_codec import LARGEST, shown
from ringweave.tokenizers.outside_files import (
    Weights,
    build,
    diffusers_config,
    exactly,
    library,
    read_weights,
    to_pixels,
)
from ringweave.tokenizers.outside_layouts import modern

if TYPE_CHECKING:
    import torch

CLASSES = {
    "AutoencoderKL": "latents.kl",
    "AutoencoderKLQwenImage": "latents.qwenimage",
    "AutoencoderKLWan": "latents.wan",
}
#: Frames the video classes take at a time after frame 0; the number is fixed in their code.
GROUP = 4


@dataclass(frozen=True, eq=False)
class Latents:
    """values: float32 [t, h, w, Z], normalised; frames, height, width: of what was encoded, in pixels."""

    values: NDArray[np.float32]
    frames: int
    height: int
    width: int


class OutsideLatents:
    """uint8 [T, H, W, C] (or [H, W, C]) <-> `Latents`.

    kind: "latents.kl", "latents.qwenimage" or "latents.wan"; channels: of a picture, 3 or 4 (straight alpha);
    dim: latent channels; patch: pixels a latent cell spans; group: frames it spans after the first, 1 or 4;
    sha256: identity of weights and config; mean, std: float32 [Z].
    """

    def __init__(self, model: Any, weights: Weights, *, kind: str, surplus: str, device: str) -> None:
        self.model, self.kind, self.surplus, self.device = model, kind, surplus, device
        config = model.config
        if kind == "latents.kl":
            self.group, self.patch, self.dim = (
                1,
                2 ** (len(config.block_out_channels) - 1),
                config.latent_channels,
            )
            self.channels = config.in_channels
        else:
            self.group = 2 ** sum(map(bool, config.temperal_downsample))
            fold = getattr(config, "patch_size", None) or 1
            self.patch, self.dim = 2 ** (len(config.dim_mult) - 1) * fold, config.z_dim
            self.channels = (
                config.input_channels if kind == "latents.qwenimage" else config.in_channels // fold**2
            )
            if self.group not in (1, GROUP):
                raise VocabularyError(
                    f"this VAE folds {self.group} frames into one, and its class always takes {GROUP} at a time",
                    where=weights.where,
                    why="frames would be lost or made up",
                )
        self.sha256 = weights.identity(kind, {"under alpha 0": "black"} if self.channels == 4 else {})
        self.mean, self.std = _statistics(config, self.dim, weights.where)

    @classmethod
    def load(cls, path: Path, *, surplus: str = "repeat", device: str = "cpu") -> OutsideLatents:
        """Read a folder or .safetensors file with its config.json (`read_weights`).

        surplus: what happens to a clip whose length is not 1 + 4k: "repeat" the last frame up to the next such
        length (`decode` cuts it off again), or "refuse" it with a DataError.
        """
        weights = read_weights(path)
        name = weights.config.get("_class_name")
        if name not in CLASSES:
            raise VocabularyError(
                f"config.json names the class {name!r}, not one of {', '.join(CLASSES)}", where=weights.where
            )
        if surplus not in ("repeat", "refuse"):
            raise VocabularyError(
                f"surplus must be 'repeat' or 'refuse', got {surplus!r}", where=weights.where
            )
        vae = library("diffusers", name, extra="outside")
        config = diffusers_config(weights, vae)
        tensors = modern(weights.tensors) if name == "AutoencoderKL" else weights.tensors
        model = build(lambda: vae(**config), tensors, where=weights.where, device=device)
        return cls(model, weights, kind=CLASSES[name], surplus=surplus, device=device)

    def encode(self, frames: NDArray[np.uint8]) -> Latents:
        """Latents of a picture uint8 [H, W, C] or a clip [T, H, W, C], edge-padded to whole patches."""
        import torch

        frames = np.asarray(frames)
        clip = frames[None] if frames.ndim == 3 else frames
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != self.channels or 0 in clip.shape:
            raise DataError(
                f"frames must be uint8 [T, H, W, {self.channels}] or one of them, "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        count, height, width = clip.shape[:3]
        clip = shown(clip) if self.channels == 4 else clip
        padded = pad_to(self._whole_groups(clip), self.patch)
        with exactly(self.device):
            values = torch.tensor(padded).to(self.device).float() / 127.5 - 1
            values = values.movedim(-1, 1)  # [T, C, H, W]
            if self.group == 1:
                found = torch.cat([self._mode(frame[None]) for frame in values])
            else:
                found = self._mode(values.movedim(0, 1)[None])[0].movedim(1, 0)
            normal = (found.movedim(1, -1) - self.mean.to(self.device)) / self.std.to(self.device)
        asked = [1 + (len(padded) - 1) // self.group, *(n // self.patch for n in padded.shape[1:3]), self.dim]
        if list(normal.shape) != asked or not normal.isfinite().all():
            raise DataError(
                f"the encoder gave latents {list(normal.shape)} where finite {asked} were due",
                where=self.kind,
            )
        return Latents(normal.cpu().numpy(), count, height, width)

    def _whole_groups(self, clip: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`clip` with its last frame repeated until 1 + 4k frames are there."""
        short = (1 - len(clip)) % self.group
        if not short:
            return clip
        if self.surplus == "refuse":
            raise DataError(
                f"a clip of {len(clip)} frames is not 1 + {self.group} k frames",
                where=self.kind,
                why=f"the encoder would drop the last {self.group - short} frames without a word",
                fix="cut or repeat frames, or load the codec with surplus='repeat'",
            )
        return np.concatenate([clip, np.repeat(clip[-1:], short, axis=0)])

    def _mode(self, values: torch.Tensor) -> torch.Tensor:
        """[1, Z, h, w] of a picture [1, C, H, W], [1, Z, t, h, w] of a clip [1, C, T, H, W]."""
        if self.kind != "latents.kl" and values.ndim == 4:
            return self._mode(values[:, :, None])[:, :, 0]
        return self.model.encode(values).latent_dist.mode()

    def _pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """The way back."""
        if self.kind != "latents.kl" and latents.ndim == 4:
            return self._pixels(latents[:, :, None])[:, :, 0]
        return self.model.decode(latents).sample

    def decode(self, latents: Latents) -> NDArray[np.uint8]:
        """uint8 [T, H, W, C]: as many frames and pixels as were encoded. DataError on latents of another shape."""
        import torch

        grid = np.asarray(latents.values, np.float32)
        room = (1 + self.group * (len(grid) - 1), *(n * self.patch for n in grid.shape[1:3]))
        size = (latents.frames, latents.height, latents.width)
        if grid.ndim != 4 or grid.shape[-1] != self.dim or 0 in grid.shape or not np.isfinite(grid).all():
            raise DataError(
                f"latents must be finite [t, h, w, {self.dim}], got {list(grid.shape)}", where=self.kind
            )
        if min(size) < 1 or any(n > most for n, most in zip(size, room)):
            raise DataError(
                f"latents {list(grid.shape)} do not hold {list(size)} frames and pixels", where=self.kind
            )
        with exactly(self.device):
            values = torch.from_numpy(grid).to(self.device) * self.std.to(self.device) + self.mean.to(
                self.device
            )
            values = values.movedim(-1, 1)  # [t, Z, h, w]
            if self.group == 1:
                frames = torch.cat([self._pixels(one[None]) for one in values])
            else:
                frames = self._pixels(values.movedim(0, 1)[None])[0].movedim(1, 0)
            pixels = to_pixels((frames.movedim(1, -1) + 1) * 127.5, what=self.kind)
        if len(pixels) < latents.frames:
            raise DataError(f"{latents.frames} frames were due and {len(pixels)} came back", where=self.kind)
        return pixels[: size[0], : size[1], : size[2]]


def _statistics(config: Any, dim: int, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) [Z] such that (z - mean) / std is what diffusers' pipelines feed their transformers.

    Newer VAEs state `latents_mean` and `latents_std`; older ones a `shift_factor` and a `scaling_factor`, and
    SDXL-like ones both, multiplied.
    """
    import torch

    mean: Any = getattr(config, "latents_mean", None)
    std: Any = getattr(config, "latents_std", None)
    if (mean is None) != (std is None):
        raise VocabularyError("config.json gives only one of latents_mean and latents_std", where=where)
    if mean is None:
        mean, std = [getattr(config, "shift_factor", None) or 0.0] * dim, [1.0] * dim
    scale = getattr(config, "scaling_factor", None) or 1.0
    listed = (
        isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple)) and len(mean) == len(std) == dim
    )
    numbers = [*mean, *std, scale] if listed else []
    sound = listed and all(type(n) in (int, float) and -LARGEST <= n <= LARGEST for n in numbers)
    if not sound or not all(np.float32(s) > 0 for s in (*std, scale)):
        counts = [len(some) if isinstance(some, (list, tuple)) else "no list of" for some in (mean, std)]
        raise VocabularyError(
            f"the latent statistics of config.json do not fit {dim} channels",
            where=where,
            why=f"{counts[0]} means, {counts[1]} deviations (all have to be above 0), scale {scale!r:.40}",
            fix="state latents_mean and latents_std of this VAE: left out, diffusers takes those of another one",
        )
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32) / scale
