"""Records as the tokenizers see them: the members of a sample (extension -> bytes) to arrays and text.

Conversions are in integers, so the arrays, and the ids made from them, are the same on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.media import decode_audio, decode_image, decode_video

Members = Mapping[str, bytes]
PICTURES = ("png", "jpg", "jpeg", "webp")
SOUNDS = ("flac", "wav", "ogg", "mp3")
CLIPS = ("mp4", "mkv", "webm", "mov", "avi")
_LAYER = re.compile(r"layer(\d+)\.png")


def as_rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 1 | 3 | 4] -> [H, W, 3]; transparency lies on white."""
    if image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] == 3:
        return image
    colour, alpha = image[..., :3].astype(np.uint32), image[..., 3:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def as_rgba(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 1 | 3 | 4] -> [H, W, 4], opaque where no alpha is stored."""
    if image.shape[2] == 4:
        return image
    return np.concatenate([as_rgb(image), np.full((*image.shape[:2], 1), 255, np.uint8)], axis=2)


def as_grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 1 | 3 | 4] -> [H, W]: luma of ITU-R 601 in 16-bit fixed point."""
    if image.shape[2] == 1:
        return image[..., 0]
    rgb = as_rgb(image).astype(np.uint32)
    luma = rgb[..., 0] * 19595 + rgb[..., 1] * 38470 + rgb[..., 2] * 7471 + 0x8000
    return (luma >> 16).astype(np.uint8)


def as_mono(samples: NDArray[np.int16]) -> NDArray[np.int16]:
    """[T, channels] -> [T]: the mean, rounded down."""
    return (samples.sum(axis=1, dtype=np.int64) // samples.shape[1]).astype(np.int16)


def _one(members: Members, wanted: tuple[str, ...], where: str) -> bytes:
    for extension in wanted:
        if extension in members:
            return members[extension]
    raise DataError(f"the record has no member {' or '.join(wanted)}", where=where)


def text_of(members: Members, *, where: str) -> str:
    """The txt member."""
    try:
        return _one(members, ("txt",), where).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("text is not UTF-8", where=where, why=str(error)) from error


def image_of(members: Members, *, where: str) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] of the picture."""
    return as_rgb(decode_image(_one(members, (*PICTURES, "flat.png"), where), where=where))


def score_of(members: Members, *, where: str) -> NDArray[np.uint8]:
    """uint8 [H, W], the grey page."""
    return as_grey(decode_image(_one(members, PICTURES, where), where=where))


def layers_of(members: Members, *, where: str) -> list[NDArray[np.uint8]]:
    """uint8 [H, W, 4] of layer0.png, layer1.png …: bottom first."""
    names = sorted((name for name in members if _LAYER.fullmatch(name)), key=lambda name: int(name[5:-4]))
    if not names:
        raise DataError("the record has no member layer0.png", where=where)
    return [as_rgba(decode_image(members[name], where=f"{where}:{name}")) for name in names]


def is_layer(name: str) -> bool:
    """Whether a member of this name is a layer."""
    return _LAYER.fullmatch(name) is not None


def has_layers(members: Members) -> bool:
    """Whether a record holds layers."""
    return any(map(is_layer, members))


def latent_pictures_of(members: Members, *, where: str) -> list[NDArray[np.uint8]]:
    """uint8 [H, W, 4] of what latents read of a record: its layers, bottom first; where it has none its picture, or
    the first and the middle frame of its clip, opaque."""
    if has_layers(members):
        return layers_of(members, where=where)
    if any(name in members for name in CLIPS) and not any(
        name in members for name in (*PICTURES, "flat.png")
    ):
        frames, _ = video_of(members, where=where)
        return [as_rgba(frames[0]), as_rgba(frames[len(frames) // 2])]
    return [as_rgba(image_of(members, where=where))]


def audio_of(members: Members, *, where: str) -> tuple[NDArray[np.int16], int]:
    """(int16 [T] mono, rate)."""
    samples, rate = decode_audio(_one(members, SOUNDS, where), where=where)
    return as_mono(samples), rate


def video_of(members: Members, *, where: str) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """(uint8 [T, H, W, 3], seconds [T])."""
    return decode_video(_one(members, CLIPS, where), where=where)
