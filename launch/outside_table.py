"""Codecs of others that `load_outside` reads: what they are read from, their rates and licences.

Rates and licences are as noted by others and unverified; the licence that counts comes with the weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Outside:
    """A codec from outside. modality: "image", "video" or "audio"; ids: False for latents without ids."""

    modality: str
    name: str
    read_from: str
    rate: str
    licence: str
    ids: bool = True

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


_PER_FRAME = "latents, no ids: f8, 16 channels, 1 + (T-1)/4 in time"
OUTSIDE = (
    Outside("image", "aMUSEd VQGAN", "diffusers `VQModel`", "f16, 8192 codes: 256 ids at 256²", "OpenRAIL++"),
    Outside("image", "taming VQGAN", "its own names", "f16, 1024 or 16384 codes", "not noted"),
    Outside("image", "LlamaGen VQ-16", "its own names", "f16, 16384 codes: 256 ids at 256²", "MIT"),
    Outside(
        "image", "AutoencoderKL", "diffusers", "latents, no ids: by its config", "differs by model", ids=False
    ),
    Outside("rgba", "Qwen-Image VAE, 4 channels", "diffusers", _PER_FRAME, "Apache-2", ids=False),
    Outside("video", "LWM VQGAN", "its Flax tree, flattened to safetensors", "256 ids a frame", "not noted"),
    Outside("video", "Qwen-Image VAE", "diffusers", _PER_FRAME, "Apache-2", ids=False),
    Outside("video", "Wan VAE", "diffusers", "latents, no ids: 4x8x8, 16 channels", "Apache-2", ids=False),
    Outside(
        "audio", "EnCodec 24 kHz", "transformers", "75 Hz x 8 books of 1024: 6 kbit/s",
        "code MIT, weights CC-BY-NC",
    ),
    Outside("audio", "DAC 44.1 kHz", "transformers", "86 Hz x 9 books of 1024: 7.8 kbit/s", "MIT"),
    Outside("audio", "Mimi", "transformers", "12.5 Hz x 8 books of 2048: 1.1 kbit/s", "CC-BY"),
)  # fmt: skip


def outside_of(modality: str) -> list[Outside]:
    """Those that can stand for a codec of this modality, in the order of the table."""
    return [entry for entry in OUTSIDE if entry.modality == modality]
