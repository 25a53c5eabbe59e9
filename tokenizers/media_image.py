"""Pictures from bytes: PNG, JPEG and WebP by Pillow, checked by `image_files.py`.

- EXIF orientation is applied; a colour profile is carried out (sRGB comes back), an unreadable one is an error.
- A palette becomes colour; a transparent colour (tRNS) or palette entry becomes alpha, compared at full depth.
- 16 bits become 8 by rounding v / 257, alpha too; 1, 2 and 4 bits are spread over 0 to 255.
- CMYK under a profile goes by the profile, without one by (255 - C)(255 - K) / 255. A CMYK JPEG without Adobe's mark
  is an error, because nothing says whether it is inverted.
- An animation is an error: which of its frames is "the picture" nobody said, and dropping the others would be silent.
  One with a single frame is that frame. The further pictures of a multi-picture JPEG (MPO: previews, depth, gain maps)
  are no frames, and the first one is taken.
- Other formats (GIF, TIFF, HEIC ...) are errors that name them. gAMA and cHRM of a PNG are not applied.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ringweave.tokenizers import image_files
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.image_files import GREY, GREY_ALPHA, Stated
from ringweave.tokenizers.media_colour import cmyk_to_srgb, to_srgb
from ringweave.tokenizers.media_error import Damage, refuse

MAX_PIXELS = 1 << 26  # of one image: 64 megapixels
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112
U8 = NDArray[np.uint8]


def decode_image(data: bytes, *, where: str, max_pixels: int = MAX_PIXELS) -> U8:
    """uint8 [H, W, C] in sRGB: C is 1 (grey), 3 (RGB) or 4 (straight alpha), as stored; upright.

    The rules stand at the top of this module. Raises DataError for other formats, animations and damage.
    """
    try:
        stated = image_files.inspect(data)
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            _check_size(image, max_pixels)
            if stated.profile and not image.info.get("icc_profile"):
                raise Damage("its colour profile is damaged")
            image.load()
            pixels = upright(_pixels(image, stated, data), int(image.getexif().get(_ORIENTATION, 1)))
            return np.ascontiguousarray(pixels)
    except DataError:
        raise
    except Damage as error:
        raise refuse("image", where, str(error), error.fix) from error
    except Exception as error:
        raise refuse("image", where, f"{type(error).__name__}: {error}") from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    """Before anything is decoded."""
    if image.width < 1 or image.height < 1:
        raise Damage(f"it is {image.width}x{image.height}")
    if image.width * image.height > max_pixels:
        raise Damage(f"{image.width}x{image.height} is more than {max_pixels} pixels")
    frames = int(getattr(image, "n_frames", 1))
    if frames > 1 and image.format != "MPO":
        raise Damage(f"it is an animation of {frames} frames", "store its frames as video")


def _pixels(image: Image.Image, stated: Stated, data: bytes) -> U8:
    """uint8 [H, W, C] in sRGB, not yet upright."""
    profile = image.info.get("icc_profile") or b""
    if image.mode == "CMYK":
        if not stated.adobe:
            raise Damage("CMYK without Adobe's mark: nothing says whether it is inverted")
        return cmyk_to_srgb(image, profile) if profile else np.asarray(image.convert("RGB"))
    if stated.depth == 16:
        pixels = _deep(image, stated, data)
    elif stated.key:
        pixels = _keyed(_plain(image, "L" if stated.colour == GREY else "RGB"), stated)
    else:
        pixels = _shallow(image)
    return to_srgb(pixels, profile) if profile else pixels


def _plain(image: Image.Image, mode: str) -> U8:
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _shallow(image: Image.Image) -> U8:
    """Up to 8 bits a sample."""
    if image.mode == "P" and image.palette is not None:
        entries, highest = len(image.palette.palette) // len(image.palette.mode), np.asarray(image).max()
        if highest >= entries:
            raise Damage(f"a pixel names colour {highest} of a palette of {entries}")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        return _plain(image, "RGBA")
    return _plain(image, "L" if image.mode in ("1", "L") else "RGB")


def _keyed(colour: NDArray[np.integer], stated: Stated) -> U8:
    """[H, W, 1 | 3] at the depth of the file, or spread to 8 bits -> uint8 [H, W, 4] without its transparent colour."""
    top = (1 << stated.depth) - 1
    key = np.frombuffer(stated.key, ">u2").astype(np.int64) & top
    if stated.depth < 8:
        key = key * 255 // top
    alpha = np.where((colour == key).all(axis=2, keepdims=True), 0, 255).astype(np.uint8)
    eight = _to_8_bits(colour) if stated.depth == 16 else colour.astype(np.uint8)
    return np.concatenate([np.broadcast_to(eight, (*eight.shape[:2], 3)), alpha], axis=2)


def _to_8_bits(wide: NDArray[np.integer]) -> U8:
    """v / 257, rounded; there are no ties."""
    return ((wide.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _deep(image: Image.Image, stated: Stated, data: bytes) -> U8:
    """A PNG of 16 bits. Pillow keeps the high bytes of all but grey; the low ones are read by a second pass."""
    wide: NDArray[np.integer]
    if stated.colour == GREY:
        wide = np.asarray(image)[..., None]
    elif stated.colour == GREY_ALPHA:  # four bytes a pixel, as if they were 8-bit RGBA
        both = np.ascontiguousarray(_read_as(data, "RGBA")).view(">u2")
        return _to_8_bits(both[..., [0, 0, 0, 1]])
    else:
        low = _read_as(data, f"{image.mode};16L")  # little endian: it takes the other byte
        wide = np.asarray(image).astype(np.uint16) << 8 | low
    return _keyed(wide, stated) if stated.key else _to_8_bits(wide)


def _read_as(data: bytes, raw: str) -> U8:
    """The pixels of a PNG, unpacked by another of Pillow's raw modes than the one it chose."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.tile = [tile._replace(args=raw) for tile in image.tile]
        return np.asarray(image)


def upright(pixels: U8, orientation: int) -> U8:
    """[H, W, C] as its EXIF orientation (1 to 8) says it is to be seen; other values mean nothing."""
    if 5 <= orientation <= 8:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
