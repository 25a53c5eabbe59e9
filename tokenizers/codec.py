"""What all codecs share: their file format, and patches of images.

A codec is a few integer tensors and a small JSON config in one safetensors file. Every codec quantises in
integer arithmetic: pixels and samples are integers, bases and codebooks are rounded to integers when they
are fitted, and the products run as float64 matmuls of integers, which are exact below 2**53 whatever the
order of summation. So ids cannot depend on the batch, the chunking, the number of threads or the machine.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as _load
from safetensors.numpy import save as _save

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.manifest import canonical_json

#: Integer steps per unit of a codebook (pixel level, sample level).
SCALE = 16
Tensors = dict[str, NDArray[Any]]


def pack_codec(kind: str, config: dict[str, int], tensors: Tensors) -> bytes:
    """The bytes of a codec file."""
    meta = {"ringweave": canonical_json({"kind": kind, "config": config})}
    return _save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata=meta)


def unpack_codec(data: bytes, kind: str, *, where: str) -> tuple[dict[str, int], Tensors]:
    """(config, tensors) of a codec file of `kind`; VocabularyError on anything else."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        meta = json.loads(header["__metadata__"]["ringweave"])
        if meta["kind"] != kind:
            raise VocabularyError(f"this is a codec of kind {meta['kind']!r}, not {kind!r}", where=where)
        return dict(meta["config"]), _load(data)
    except VocabularyError:
        raise
    except Exception as error:  # safetensors raises its own exception type on damage
        raise VocabularyError(
            f"not a readable {kind} codec", where=where, why=f"{type(error).__name__}: {error}"
        ) from error


def kind_of(data: bytes) -> str:
    """What kind of codec a file holds; "" when it does not say."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return str(json.loads(header["__metadata__"]["ringweave"])["kind"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def pad_to(image: NDArray[Any], patch: int, *, mode: str = "edge", value: int = 0) -> NDArray[Any]:
    """`image` [..., H, W, C] padded below and right to multiples of `patch`, by its edge or by `value`."""
    height, width = image.shape[-3:-1]
    bottom, right = -height % patch, -width % patch
    if not (bottom or right):
        return image
    widths = [(0, 0)] * (image.ndim - 3) + [(0, bottom), (0, right), (0, 0)]
    if mode == "edge":
        return np.pad(image, widths, mode="edge")
    return np.pad(image, widths, constant_values=value)


def to_patches(image: NDArray[Any], patch: int) -> NDArray[Any]:
    """[..., H, W, C] -> [..., H/p, W/p, p*p*C]; H and W are multiples of `patch`."""
    *lead, height, width, channels = image.shape
    rows, columns = height // patch, width // patch
    split = image.reshape(*lead, rows, patch, columns, patch, channels)
    return np.moveaxis(split, -4, -3).reshape(*lead, rows, columns, patch * patch * channels)


def from_patches(patches: NDArray[Any], patch: int, channels: int) -> NDArray[Any]:
    """Inverse of `to_patches`."""
    *lead, rows, columns, _ = patches.shape
    split = patches.reshape(*lead, rows, columns, patch, patch, channels)
    return np.moveaxis(split, -4, -3).reshape(*lead, rows * patch, columns * patch, channels)


def to_uint8(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Rounded and clipped to 0..255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
