"""Pictures from strangers: the right pixels, or a DataError that names the place and the reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from media_samples import (
    CHANNELS,
    GAMMA,
    INKS,
    SRGB,
    WHERE,
    WIDE,
    chunk,
    cmyk_profile,
    grey_profile,
    icc_chunk,
    png_by_hand,
    rgb_profile,
    saved,
    srgb_of_xyz,
    xyz_of_lab,
)
from PIL import Image, ImageCms
from tokenizer_samples import picture, png

from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.media import decode_image

RNG = np.random.default_rng(5)
RGB = picture(1)


def decoded(data: bytes) -> np.ndarray:
    pixels = decode_image(data, where=WHERE)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.flags.c_contiguous
    return pixels


def refused(data: bytes, why: str) -> None:
    with pytest.raises(DataError, match=why) as caught:
        decode_image(data, where=WHERE)
    assert caught.value.where == WHERE


# sizes and depths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (3, 5), (17, 31)])
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_odd_sizes(form: str, size: tuple[int, int]) -> None:
    pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    got = decoded(saved(Image.fromarray(pixels), form, lossless=True))
    assert got.shape == pixels.shape
    if form != "JPEG":
        np.testing.assert_array_equal(got, pixels)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_16_bits_become_8_by_rounding(colour: int, interlaced: bool) -> None:
    wide = RNG.integers(0, 65536, (9, 13, CHANNELS[colour]))
    wide[0, :3, 0] = 0, 128, 129  # the border between 0 and 1
    eight = np.array([[[round(int(v) / 257) for v in pixel] for pixel in row] for row in wide])
    if colour == 4:
        eight = eight[..., [0, 0, 0, 1]]
    np.testing.assert_array_equal(decoded(png_by_hand(wide, 16, colour, b"", interlaced)), eight)


def test_every_16_bit_grey() -> None:
    wide = np.arange(65536).reshape(256, 256, 1)
    got = decoded(png_by_hand(wide, 16, 0)).reshape(-1)
    np.testing.assert_array_equal(got, [round(v / 257) for v in range(65536)])


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_are_spread(depth: int) -> None:
    grey = RNG.integers(0, 1 << depth, (5, 11, 1))
    np.testing.assert_array_equal(decoded(png_by_hand(grey, depth, 0)), grey * 255 // ((1 << depth) - 1))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colour", [0, 2])
def test_a_transparent_colour_is_compared_at_full_depth(colour: int, depth: int) -> None:
    if colour == 2 and depth < 8:
        return  # PNG has no such picture
    top = (1 << depth) - 1
    samples = RNG.integers(0, top + 1, (6, 9, CHANNELS[colour]))
    samples[2, 3] = samples[4, 4] = key = samples[0, 0].copy()
    if depth == 16:
        samples[5, 5] = key ^ 1  # 8 bits would take it for the same
    got = decoded(png_by_hand(samples, depth, colour, chunk(b"tRNS", key.astype(">u2").tobytes())))
    expected = np.where((samples == key).all(axis=2), 0, 255)
    assert expected[0, 0] == expected[2, 3] == 0
    np.testing.assert_array_equal(got[..., 3], expected)
    np.testing.assert_array_equal(got[..., :3], np.rint(np.broadcast_to(samples, (6, 9, 3)) * 255 / top))


@pytest.mark.parametrize("trns", [b"\xff\x00\x80", b"\x00", b"\xff\xff\x00"])
@pytest.mark.parametrize("depth", [2, 8])
def test_palette_with_alpha(depth: int, trns: bytes) -> None:
    colours = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
    index = RNG.integers(0, 4, (7, 5, 1))
    extra = chunk(b"PLTE", colours.tobytes()) + chunk(b"tRNS", trns)
    alpha = np.frombuffer(trns + b"\xff" * (4 - len(trns)), np.uint8)
    expected = np.concatenate([colours, alpha[:, None]], axis=1)[index[..., 0]]
    np.testing.assert_array_equal(decoded(png_by_hand(index, depth, 3, extra)), expected)
    bare = chunk(b"PLTE", colours.tobytes())
    np.testing.assert_array_equal(decoded(png_by_hand(index, depth, 3, bare)), colours[index[..., 0]])


def test_a_palette_that_is_too_short_is_refused() -> None:
    index = np.array([[[0], [1], [5]]])
    refused(png_by_hand(index, 8, 3, chunk(b"PLTE", bytes(6))), "colour 5 of a palette of 2")


def test_grey_with_alpha_and_one_bit() -> None:
    both = RNG.integers(0, 256, (4, 6, 2), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(png_by_hand(both, 8, 4)), both[..., [0, 0, 0, 1]])
    bits = RNG.integers(0, 2, (4, 9)).astype(bool)
    np.testing.assert_array_equal(decoded(png(bits))[..., 0], bits * 255)


# EXIF ----------------------------------------------------------------------------------------------------------

#: Which side of the picture as it is seen the first stored row, and the first stored column, are (EXIF 2.3, 4.6.4).
SIDES = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left",
         5: "left top", 6: "right top", 7: "right bottom", 8: "left bottom"}  # fmt: skip


def stored(seen: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels a camera held that way writes."""
    row, column = SIDES[orientation].split()
    if row in ("left", "right"):  # stored rows are columns of what is seen
        lines = [seen[:, x] for x in range(seen.shape[1])]
    else:
        lines = list(seen)
    if row in ("right", "bottom"):
        lines = lines[::-1]
    return np.stack([line[::-1] if column in ("right", "bottom") else line for line in lines])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["grey", "rgb", "rgba", "jpeg", "webp", "deep"])
def test_all_eight_orientations(kind: str, orientation: int) -> None:
    channels = {"grey": 1, "rgba": 4}.get(kind, 3)
    seen = np.repeat(np.repeat(RNG.integers(0, 256, (2, 3, channels), dtype=np.uint8), 16, 0), 16, 1)
    pixels = stored(seen, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "deep":
        data = png_by_hand(pixels.astype(int) * 257, 16, 2, chunk(b"eXIf", exif.tobytes()[6:]))
    elif kind == "jpeg":
        data = saved(Image.fromarray(pixels), "JPEG", quality=100, subsampling=0, exif=exif)
    else:
        form = "WEBP" if kind == "webp" else "PNG"
        data = saved(Image.fromarray(pixels.squeeze()), form, exif=exif, lossless=True)
    difference = decoded(data).astype(int) - seen
    assert np.abs(difference).max() <= (4 if kind == "jpeg" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_means_nothing_changes_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decoded(saved(Image.fromarray(RGB), "PNG", exif=exif)), RGB)


# colour --------------------------------------------------------------------------------------------------------


def through_wide(pixels: np.ndarray) -> np.ndarray:
    """What `rgb_profile` means in sRGB, by the formulas."""
    return srgb_of_xyz((pixels / 255) ** GAMMA @ WIDE.T)


def test_a_profile_is_carried_out() -> None:
    profile = rgb_profile()
    colours = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = through_wide(colours)
    assert np.abs(expected - colours).max() > 30
    for form in ("PNG", "WEBP"):
        got = decoded(saved(Image.fromarray(colours), form, icc_profile=profile, lossless=True))
        assert np.abs(got - expected).max() <= 1.5
    flat = Image.new("RGB", (16, 16), (30, 200, 90))
    got = decoded(saved(flat, "JPEG", icc_profile=profile, quality=100, subsampling=0))
    assert np.abs(got[8, 8] - through_wide(np.array([30, 200, 90]))).max() <= 4
    deep = png_by_hand(colours.astype(int) * 257, 16, 2, icc_chunk(profile))
    np.testing.assert_array_equal(decoded(deep), decoded(png_by_hand(colours, 8, 2, icc_chunk(profile))))


def test_alpha_and_palette_under_a_profile() -> None:
    layer = RNG.integers(0, 256, (9, 9, 4), dtype=np.uint8)
    got = decoded(saved(Image.fromarray(layer), "PNG", icc_profile=rgb_profile()))
    np.testing.assert_array_equal(got[..., 3], layer[..., 3])
    assert np.abs(got[..., :3] - through_wide(layer[..., :3])).max() <= 1.5
    colours = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
    index = RNG.integers(0, 4, (7, 5, 1))
    extra = icc_chunk(rgb_profile()) + chunk(b"PLTE", colours.tobytes())
    got = decoded(png_by_hand(index, 8, 3, extra))
    assert np.abs(got - through_wide(colours)[index[..., 0]]).max() <= 1.5


def test_grey_under_a_profile_stays_grey() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    linear = srgb_of_xyz((grey / 255)[..., None] * np.array([0.9642, 1.0, 0.8249]))[..., 1]
    got = decoded(saved(Image.fromarray(grey), "PNG", icc_profile=grey_profile()))
    assert got.shape == (16, 16, 1)
    assert np.abs(got[..., 0] - linear).max() <= 1
    # a profile of three channels on grey, which many programs write
    got = decoded(saved(Image.fromarray(grey), "PNG", icc_profile=rgb_profile()))
    assert got.shape == (16, 16, 1)
    expected = through_wide(np.repeat(grey[..., None], 3, axis=2))[..., 1]
    assert np.abs(got[..., 0] - expected).max() <= 1
    # grey with alpha, which comes back as RGBA
    both = np.stack([grey, grey.T], axis=2)
    got = decoded(png_by_hand(both, 8, 4, icc_chunk(grey_profile())))
    np.testing.assert_array_equal(got[..., 3], grey.T)
    assert np.abs(got[..., 0] - linear).max() <= 1


def through(colours: np.ndarray, profile: bytes) -> np.ndarray:
    """LittleCMS alone."""
    way = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), "RGB", "RGB"
    )
    return np.asarray(ImageCms.applyTransform(Image.fromarray(colours), way))


def test_an_srgb_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    colours = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        decoded(saved(Image.fromarray(colours), "PNG", icc_profile=profile)), colours
    )
    other = rgb_profile(SRGB + 0.0001, 0)  # by another name, and not to the last digit
    apart = through(colours, other).astype(int) - colours
    assert np.abs(apart).max() == 1
    np.testing.assert_array_equal(decoded(saved(Image.fromarray(colours), "PNG", icc_profile=other)), colours)
    grey = Image.fromarray(colours[..., 0])
    np.testing.assert_array_equal(decoded(saved(grey, "PNG", icc_profile=profile))[..., 0], colours[..., 0])


def test_profiles_that_cannot_be_used_are_refused() -> None:
    image = Image.fromarray(RGB)
    good = rgb_profile()
    for bad in (b"no profile", good[:200], b"\0" * 300, good.replace(b"acsp", b"pcsa")):
        for form in ("PNG", "JPEG", "WEBP"):
            refused(saved(image, form, icc_profile=bad), "colour profile")
    refused(saved(image, "PNG", icc_profile=good.replace(b"RGB ", b"HLS ")), "colour profile")
    refused(saved(image, "PNG", icc_profile=grey_profile()), "for grey, its pixels are coloured")
    refused(saved(image, "PNG", icc_profile=cmyk_profile()), "for CMYK, its pixels are not")
    refused(png_by_hand(RGB, 8, 2, icc_chunk(good, damage=True)), "colour profile is damaged")
    refused(saved(image, "WEBP", icc_profile=good + bytes(5 << 20)), "colour profile has 5243")
    long = saved(image, "JPEG", icc_profile=good + bytes(100_000))
    second = long.index(b"ICC_PROFILE\0", long.index(b"ICC_PROFILE\0") + 1) - 4
    cut = long[:second] + long[second + 2 + int.from_bytes(long[second + 2 : second + 4], "big") :]
    refused(cut, "colour profile is damaged")
    refused(png_by_hand(RGB, 8, 2, icc_chunk(bytes(64 << 20))), "too large")


CMYK = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (60, 120, 180, 40)]


@pytest.mark.parametrize("inks", CMYK)
def test_cmyk_without_a_profile(inks: tuple[int, int, int, int]) -> None:
    data = saved(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100)
    expected = [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]
    assert np.abs(decoded(data)[8, 8] - expected).max() <= 2


@pytest.mark.parametrize("corner", INKS)
def test_cmyk_under_a_profile(corner: tuple[int, int, int, int]) -> None:
    image = Image.new("CMYK", (16, 16), tuple(255 * ink for ink in corner))
    got = decoded(saved(image, "JPEG", quality=100, icc_profile=cmyk_profile()))[8, 8]
    assert np.abs(got - srgb_of_xyz(xyz_of_lab(INKS[corner]))).max() <= 3
    refused(saved(image, "JPEG", icc_profile=rgb_profile()), "for RGB, its pixels are CMYK")


def test_adobe_stores_cmyk_inverted_and_without_its_mark_nobody_knows() -> None:
    data = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    at = data.index(b"Adobe") - 4
    bare = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    refused(bare, "without Adobe's mark")


def test_hdr_is_refused() -> None:
    for transfer in (16, 18):
        refused(png_by_hand(RGB, 8, 2, chunk(b"cICP", bytes([9, transfer, 0, 1]))), "HDR")
    np.testing.assert_array_equal(decoded(png_by_hand(RGB, 8, 2, chunk(b"cICP", bytes([1, 13, 0, 1])))), RGB)


# animations and other formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_animations(form: str) -> None:
    first, second = Image.fromarray(RGB), Image.fromarray(picture(3))
    refused(saved(first, form, save_all=True, append_images=[second]), "an animation of 2 frames")
    one = saved(first, form, save_all=True, lossless=True)
    np.testing.assert_array_equal(decoded(one), RGB)


def test_the_first_picture_of_several_in_a_jpeg() -> None:
    first, second = Image.new("RGB", (16, 16), (200, 10, 10)), Image.new("RGB", (8, 8), (10, 10, 200))
    data = saved(first, "MPO", save_all=True, append_images=[second], quality=100)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    got = decoded(data)
    assert got.shape == (16, 16, 3)
    assert np.abs(got[8, 8].astype(int) - (200, 10, 10)).max() <= 3


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "ICO", "JPEG2000", "AVIF"])
def test_other_formats_are_named(form: str) -> None:
    name = {"JPEG2000": "JPEG 2000"}.get(form, form)
    refused(saved(Image.fromarray(RGB), form), f"it is a {name} file")


# damage and size -----------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_png_is_seen_wherever_it_is() -> None:
    data = png(RGB)
    rng = np.random.default_rng(0)
    for at in [*range(8, 60), *rng.integers(60, len(data), 300)]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(DataError):
            decode_image(bytes(damaged), where=WHERE)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_every_cut_is_seen(form: str) -> None:
    data = saved(Image.fromarray(RGB), form)
    for end in range(0, len(data), 9):
        with pytest.raises(DataError):
            decode_image(data[:end], where=WHERE)
    with pytest.raises(DataError):
        decode_image(data[:-1], where=WHERE)


def test_what_follows_a_picture_is_no_part_of_it() -> None:
    for form in ("PNG", "JPEG"):
        data = saved(Image.fromarray(RGB), form)
        np.testing.assert_array_equal(decoded(data + b"\xff\xda film of the moment"), decoded(data))


def test_no_pixels_and_very_many() -> None:
    for size in ((0, 0), (0, 5), (5, 0)):
        refused(png_by_hand(np.zeros((size[1], size[0], 3)), 8, 2), f"it is {size[0]}x{size[1]}")
    jpeg = bytearray(saved(Image.fromarray(RGB), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = bytes(4)
    refused(bytes(jpeg), "cannot decode this image")
    line = RNG.integers(0, 256, (1, 100_000, 1), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(png(line[..., 0])), line)
    np.testing.assert_array_equal(decoded(png(line[0])), line.reshape(-1, 1, 1))


def test_bombs() -> None:
    blank = zlib.compress(bytes(1 << 20))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", blank * 8) + chunk(b"IEND", b"")
    refused(bomb, "more than 67108864 pixels|DecompressionBomb")
    slow = saved(Image.fromarray(RGB), "JPEG", progressive=True)
    last = slow.rindex(b"\xff\xda")
    assert decoded(slow).shape == RGB.shape
    refused(slow[:-2] + slow[last:-2] * 100 + slow[-2:], "scans, limit 64")
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(32 << 20)))
    refused(png_by_hand(RGB, 8, 2, text), "too large")
