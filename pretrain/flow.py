"""Flow matching on latents: noise levels, their shift by the size of a document, noise, targets and weights.

x_s = (1 - s) x + s e, and the velocity to learn is e - x (the sign of diffusers; papers that walk from noise to data
have the other one). Levels and noise are drawn by (seed, sample, draw), never by rank or order, so any layout trains
on the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Sampler = Literal["uniform", "logit_normal", "mode"]
Shift = Literal["none", "exponential", "linear"]
Weighting = Literal["none", "bell"]
#: Levels of the validation loss: the middles of eighths.
VALIDATION_LEVELS = tuple((i + 0.5) / 8 for i in range(8))
#: Closer to 0 or 1 than this, a level tells the model nothing.
EDGE = 1e-5


@dataclass(frozen=True, slots=True)
class FlowSettings:
    """sampler with its mean, std (of the logit) or scale (of the mode); shift of levels by a document's tokens:
    exponential with mu from (tokens, mu) to (tokens, mu), linear by sqrt(tokens / base)."""

    sampler: Sampler = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29
    shift: Shift = "exponential"
    shift_from: tuple[int, float] = (256, 0.5)
    shift_to: tuple[int, float] = (8192, 0.9)
    shift_base: int = 256
    weighting: Weighting = "none"


def stream(seed: int, sample: str, draw: int, what: str) -> np.random.Generator:
    """The numbers of one draw of a sample: those of `what` ("level", "noise/2", "drop" ...) and nothing else."""
    key = hashlib.blake2b(f"{seed}/{sample}/{draw}/{what}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))


def raw_level(uniform: float, settings: FlowSettings, *, normal: float) -> float:
    """A noise level in (0, 1) before any shift, of a uniform number in [0, 1) or a normal one.

    logit_normal: sigmoid(mean + std·n); mode: 1 - u - scale (cos²(pi u / 2) - 1 + u), both of Esser et al. 2024.
    """
    if settings.sampler == "uniform":
        level = uniform
    elif settings.sampler == "logit_normal":
        level = 1.0 / (1.0 + math.exp(-(settings.mean + settings.std * normal)))
    else:
        level = 1.0 - uniform - settings.scale * (math.cos(math.pi * uniform / 2) ** 2 - 1.0 + uniform)
    return min(max(level, EDGE), 1.0 - EDGE)


def shift_of(tokens: int, settings: FlowSettings) -> float:
    """How much a document of so many latent tokens is moved to higher noise: the factor on s / (1 - s).

    exponential: e^mu, mu linear in tokens (Qwen-Image: 0.5 at 256, 0.9 at 8,192); linear: sqrt(tokens / base).
    """
    if settings.shift == "none":
        return 1.0
    if settings.shift == "linear":
        return math.sqrt(tokens / settings.shift_base)
    (low, mu_low), (high, mu_high) = settings.shift_from, settings.shift_to
    return math.exp(mu_low + (mu_high - mu_low) * (tokens - low) / (high - low))


def shifted(level: float, factor: float) -> float:
    """factor·s / (1 + (factor - 1)·s), which multiplies the odds of noise by `factor`."""
    return factor * level / (1.0 + (factor - 1.0) * level)


def level_of(seed: int, sample: str, draw: int, tokens: int, settings: FlowSettings) -> float:
    """The noise level of a document in one draw, shared by all its targets. tokens: of one of its target grids."""
    numbers = stream(seed, sample, draw, "level")
    uniform, normal = float(numbers.random()), float(numbers.standard_normal())
    return shifted(raw_level(uniform, settings, normal=normal), shift_of(tokens, settings))


def noise_of(seed: int, sample: str, draw: int, layer: int, shape: tuple[int, ...]) -> F32:
    """Normal noise of one target grid; each layer has its own."""
    return stream(seed, sample, draw, f"noise/{layer}").standard_normal(shape, dtype=np.float32)


def dropped(seed: int, sample: str, draw: int, rate: float) -> bool:
    """Whether a document goes without its text in this draw, for classifier-free guidance; each decides for itself."""
    return bool(stream(seed, sample, draw, "drop").random() < rate)


def noised(latents: F32, noise: F32, level: float) -> tuple[F32, F32]:
    """(x_s, velocity) of latents and noise of one shape."""
    s = np.float32(level)
    return (np.float32(1.0) - s) * latents + s * noise, noise - latents


def loss_weight(level: float, settings: FlowSettings) -> float:
    """Factor on the squared error at a level: 1, or a bell around the middle of the road; its mean over levels is 1."""
    if settings.weighting == "none":
        return 1.0
    return math.exp(-2.0 * ((level - 0.5) * 2.0) ** 2) / _BELL_MEAN


_BELL_MEAN = math.sqrt(math.pi / 8) * math.erf(math.sqrt(2.0))
