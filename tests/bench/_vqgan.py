"""The rival of pictures and video: diffusers' VQModel in the published sizes of latent-diffusion's vq-f8, random
weights. Three halvings, 128·(1, 2, 2, 4) channels, two residual blocks each, one attention in the middle; with a
codebook of 1,024 and not 16,384, so that an id is 10 bits on both sides."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

CHANNELS = (128, 256, 256, 512)


def encoder(*, tiny: bool) -> Callable[[NDArray[np.uint8]], NDArray[np.int64]]:
    """A function from uint8 [n, H, W, 3] to ids [n, H/8, W/8]. tiny: a quarter of the channels."""
    warnings.simplefilter("ignore")
    from diffusers import VQModel

    torch.manual_seed(0)
    model: Any = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(c // 4 for c in CHANNELS) if tiny else CHANNELS,
        layers_per_block=2,
        latent_channels=4,
        num_vq_embeddings=1024,
        vq_embed_dim=4,
    ).eval()

    def encode(images: NDArray[np.uint8]) -> NDArray[np.int64]:
        with torch.inference_mode():
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents = model.encode(pixels).latents
            ids = model.quantize(latents)[2][2]
            return ids.reshape(latents.shape[0], *latents.shape[2:]).numpy()

    return encode
