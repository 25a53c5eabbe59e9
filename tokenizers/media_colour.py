"""Embedded colour profiles (ICC) to sRGB, by LittleCMS.

Relative colorimetric with black point compensation. A profile that moves no colour of a probe by more than one
step of 255 is sRGB by another name, and changes nothing. Any other one may come out a step apart under another version
of LittleCMS, as pixels of a JPEG may under another libjpeg.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from ringweave.tokenizers.media_error import Damage

U8 = NDArray[np.uint8]
_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
_SAME = 1
MAX_BYTES = 1 << 22  # of a profile; those of printers have up to 3 MiB


def to_srgb(pixels: U8, profile: bytes) -> U8:
    """uint8 [H, W, 1 | 3 | 4] under `profile` -> the same shape in sRGB; alpha stays. Damage for a bad profile.

    A grey picture stays grey: under a profile of three channels its greys are neutral colours.
    """
    if space_of(profile) == "CMYK":
        raise Damage("its colour profile is for CMYK, its pixels are not")
    alpha, colour = pixels[..., 3:], pixels[..., :3]
    if space_of(profile) == "GRAY" and not (colour == colour[..., :1]).all():
        raise Damage("its colour profile is for grey, its pixels are coloured")
    if pixels.shape[2] == 1 or space_of(profile) == "GRAY":
        table = _grey_table(profile)
        return pixels if table is None else np.concatenate([table[colour], alpha], axis=2)
    transform = _transform(profile)
    if transform is None:
        return pixels
    return np.concatenate([_apply(transform, colour), alpha], axis=2)


def cmyk_to_srgb(image: Image.Image, profile: bytes) -> U8:
    """uint8 [H, W, 3] of a CMYK picture under its profile."""
    if space_of(profile) != "CMYK":
        raise Damage(f"its colour profile is for {space_of(profile)}, its pixels are CMYK")
    return np.asarray(ImageCms.applyTransform(image, _build(profile)))


@lru_cache(maxsize=8)
def space_of(profile: bytes) -> str:
    """GRAY, RGB or CMYK; Damage for a profile that cannot be read or is for something else."""
    if len(profile) > MAX_BYTES:
        raise Damage(f"its colour profile has {len(profile)} bytes, limit {MAX_BYTES}")
    try:
        space = str(ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space).strip()
    except Exception as error:
        raise Damage(f"its colour profile cannot be read: {error}") from error
    if space not in _MODES:
        raise Damage(f"its colour profile is for {space}")
    return space


@lru_cache(maxsize=8)
def _build(profile: bytes, exact: bool = False) -> Any:
    """`exact` goes through the profile's curves for each pixel: slow, and LittleCMS's table for grey is off by ten."""
    mode = _MODES[space_of(profile)]
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=flags | ImageCms.Flags.NOOPTIMIZE if exact else flags,
        )
    except Exception as error:
        raise Damage(f"its colour profile gives no way to sRGB: {error}") from error


def _apply(transform: Any, colour: U8) -> U8:
    return np.asarray(ImageCms.applyTransform(Image.fromarray(np.ascontiguousarray(colour)), transform))


@lru_cache(maxsize=8)
def _transform(profile: bytes) -> Any:
    """The transform of an RGB profile, or None when it is sRGB."""
    steps = np.linspace(0, 255, 18).astype(np.uint8)
    probe = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(18, -1, 3)
    moved = _apply(_build(profile), probe).astype(int) - probe
    return _build(profile) if np.abs(moved).max() > _SAME else None


@lru_cache(maxsize=8)
def _grey_table(profile: bytes) -> U8 | None:
    """uint8 [256]: sRGB grey of each grey under the profile, or None when they are the same."""
    ramp = np.arange(256, dtype=np.uint8)[None]
    if space_of(profile) == "RGB":
        ramp = np.repeat(ramp[..., None], 3, axis=2)
    table = _apply(_build(profile, exact=True), ramp)[0, :, 1]
    same = np.abs(table.astype(int) - np.arange(256)).max() <= _SAME
    return None if same else table
