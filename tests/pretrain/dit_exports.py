"""Small models and codecs to export, and what stock classes make of the folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import QwenImageTransformer2DModel
from transformers import LlamaModel

from ringweave.pretrain.models.dit import DiT, DiTShape
from ringweave.pretrain.models.dit_positions import Grid
from ringweave.pretrain.models.lwm import LWMShape
from ringweave.tokenizers.latent_codec import LatentCodec

BOUND = 5e-5
WORDS = LWMShape(vocab=60, layers=2, width=24, heads=4, kv_heads=4, ffn=40, head_chunk=16)
SHAPE = DiTShape(layers=2, heads=4, axes=(8, 12, 12), channels=16, out=16, text=24, words=WORDS, head=True)
VAE: dict[str, Any] = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "attn_scales": [],
    "temperal_downsample": [False], "dropout": 0.0, "input_channels": 4,
    "latents_mean": [0.25, -0.5, 0.125, 0.0], "latents_std": [0.5, 2.0, 0.3, 1.0],
}  # fmt: skip
SEEN = [Grid(4, 4), Grid(3, 5), Grid(4, 4, condition=True)]  # two targets and a condition, last


def random(shape: DiTShape = SHAPE, seed: int = 1) -> DiT:
    """Weights of std 0.2, so that no path is hidden by a small initialisation."""
    model, generator = DiT(shape).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model


def vae_codec() -> LatentCodec:
    torch.manual_seed(3)
    return LatentCodec.from_model(diffusers.AutoencoderKLQwenImage(**VAE).eval())


def latents_of(grids: list[Grid], seed: int = 0) -> torch.Tensor:
    return torch.randn(sum(g.cells for g in grids), 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stock_velocity(
    folder: Path, grids: list[Grid], ids: torch.Tensor, sigma: float, **change: Any
) -> torch.Tensor:
    """By nothing but stock classes."""
    encoder = LlamaModel.from_pretrained(folder / "text_encoder")
    theirs = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", **change).eval()
    words = encoder(ids[None]).last_hidden_state
    return theirs(
        latents_of(grids)[None], words, timestep=torch.tensor([sigma]),
        img_shapes=[[(g.frames, g.height, g.width) for g in grids]], return_dict=False,
    )[0][0]  # fmt: skip


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= BOUND * theirs.abs().max())
