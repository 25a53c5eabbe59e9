"""Tokenizers, pictures and sound for the benchmarks of encoding. Codecs whose books and weights are random integers:
they are of the default sizes, and no time or memory of encoding depends on what the numbers are."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.audio import SAMPLES, AudioCodec, mdct_basis
from ringweave.tokenizers.conv_codec import BASIS, decoder_shape, encoder_shape
from ringweave.tokenizers.conv_codecs import ConvAudioCodec, ConvImageCodec
from ringweave.tokenizers.conv_net import WEIGHT
from ringweave.tokenizers.image import ImageCodec
from ringweave.tokenizers.learn_start import NetSizes

I16 = NDArray[np.int16]
U8 = NDArray[np.uint8]
PATCH, DIMS, IMAGE_CODES = 8, 24, 1024
PIECE = SAMPLES // 8  # samples pushed into a stream at a time


def rate(work: Callable[[], object], count: float) -> float:
    """`count` units by the seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def moving_picture(frames: int, side: int, *, first: int = 0, seed: int = 0) -> U8:
    """Frames `first` and on of a smooth, grained picture that drifts a pixel each: uint8 [frames, side, side, 3]."""
    rng = np.random.default_rng(seed)
    grain = rng.normal(0, 6, (side, side, 3))
    waves = np.linspace(0, 9, side)
    smooth = 128 + 80 * np.sin(waves)[:, None] * np.cos(0.7 * waves + rng.uniform(0, 6))[None]
    picture = (smooth[..., None] * rng.uniform(0.5, 1.2, 3) + grain).clip(0, 255).astype(np.uint8)
    return np.stack([np.roll(picture, n, axis=1) for n in range(first, first + frames)])


def music(samples: int, rate: int, *, first: int = 0) -> I16:
    """`samples` samples from `first` on of three tones and a little noise."""
    seconds = np.arange(first, first + samples) / rate
    tones = sum(np.sin(2 * np.pi * hertz * seconds) for hertz in (220.0, 277.2, 329.6))
    noise = np.random.default_rng(first).normal(0, 0.05, samples)
    return ((tones + noise) * 6000).astype(np.int16)


def image_codec() -> ImageCodec:
    """The closed form: 10 bits a patch of 8x8."""
    return ImageCodec.fit(list(moving_picture(4, 256)), codes=IMAGE_CODES, patch=PATCH, dims=DIMS)


def learned_image_codec() -> ConvImageCodec:
    """The learned one at the default sizes of its networks."""
    closed = image_codec()
    basis = closed.tensors["basis"]
    config = _config(1, IMAGE_CODES, steps=256, unit=64, reach=2048, beam=1, rows=3) | {"patch": PATCH}
    tensors = {"project": basis, "back": basis.T.copy(), "mean": closed.tensors["mean"]}
    tensors |= {"codebooks": closed.tensors["codebook"]}
    return ConvImageCodec(config, tensors | _networks(config, DIMS, len(basis)))


def audio_codec(*, rate: int, hop: int, bins: int, books: int, codes: int) -> AudioCodec:
    """The closed form."""
    tensors = {"basis": mdct_basis(hop, bins), "codebooks": _books(books, codes, bins, reach=8000)}
    return AudioCodec({"rate": rate, "hop": hop, "beam": 4}, tensors)


def learned_audio_codec(*, rate: int, hop: int, bins: int, books: int, codes: int) -> ConvAudioCodec:
    """The learned one at the default sizes of its networks."""
    config = _config(books, codes, steps=1, unit=1 << 15, reach=1 << 20, beam=4, rows=1)
    same = np.eye(bins, dtype=np.int32) * BASIS
    tensors = {"basis": mdct_basis(hop, bins), "project": same, "back": same.copy()}
    tensors |= {"mean": np.zeros(bins, np.int32), "codebooks": _books(books, codes, bins, reach=1000)}
    return ConvAudioCodec(config | {"rate": rate, "hop": hop}, tensors | _networks(config, bins, bins))


def _books(books: int, codes: int, dims: int, *, reach: int) -> NDArray[np.int32]:
    """[books, codes, dims], each book half as long as the one before, its code 0 the zero vector."""
    out = np.random.default_rng(1).integers(-reach, reach + 1, (books, codes, dims))
    out = out >> np.arange(books)[:, None, None]
    out[:, 0] = 0
    return out.astype(np.int32)


def _config(
    books: int, codes: int, *, steps: int, unit: int, reach: int, beam: int, rows: int
) -> dict[str, int]:
    net = NetSizes()
    return {
        "books": books, "codes": codes, "beam": beam, "steps": steps, "unit": unit, "reach": reach,
        "width": net.width, "encoder_blocks": net.encoder_blocks, "decoder_blocks": net.decoder_blocks,
        "rows": rows, "columns": 3,
    }  # fmt: skip


def _networks(config: dict[str, int], dims: int, channels: int) -> dict[str, Any]:
    """Random weights of both networks."""
    rng = np.random.default_rng(2)
    shapes = {"encoder.": encoder_shape(config, dims), "decoder.": decoder_shape(config, dims, channels)}
    out = {}
    for prefix, shape in shapes.items():
        for name, inputs, outputs, kernel in shape.layers():
            weight = rng.integers(-WEIGHT // 8, WEIGHT // 8, (kernel * inputs, outputs))
            out[f"{prefix}{name}.weight"] = weight.astype(np.int32)
            out[f"{prefix}{name}.bias"] = np.zeros(outputs, np.int32)
    return out
