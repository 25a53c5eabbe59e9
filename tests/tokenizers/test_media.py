"""Hostile and odd media: the right array, or a DataError that names the place."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from media_samples import saved
from PIL import Image
from tokenizer_samples import clip, flac, mp4, picture, png, tone

from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.media import decode_audio, decode_image, decode_video

WHERE = "shard-0000.tar#key"


RGB = Image.fromarray(picture(1))
WAV = flac(tone(1, 0.3), form="WAV")
MP4 = mp4(clip(1))
KINDS: dict[str, tuple[Callable[..., object], bytes]] = {
    "png": (decode_image, saved(RGB, "PNG")),
    "jpeg": (decode_image, saved(RGB, "JPEG")),
    "webp": (decode_image, saved(RGB, "WEBP")),
    "wav": (decode_audio, WAV),
    "flac": (decode_audio, flac(tone(1, 0.3))),
    "ogg": (decode_audio, flac(tone(1, 0.3), form="OGG")),
    "mp4": (decode_video, MP4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.7, 0.97])
def test_truncated_files_are_errors(kind: str, part: float) -> None:
    decode, data = KINDS[kind]
    with pytest.raises(DataError, match="cannot decode") as caught:
        decode(data[: int(len(data) * part)], where=WHERE)
    assert caught.value.where == WHERE


@pytest.mark.parametrize("kind", KINDS)
def test_damage_gives_an_array_or_a_data_error(kind: str) -> None:
    decode, data = KINDS[kind]
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
        try:
            decode(damaged.tobytes(), where=WHERE)
        except DataError as error:
            assert error.where == WHERE
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("decode", [decode_image, decode_audio, decode_video])
@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 64, b"GIF89a" + b"\x00" * 60, b"RIFF\xff\xff\xff\xffWAVEfmt ", bytes(range(256)) * 4],
)
def test_garbage(decode: Callable[..., object], data: bytes) -> None:
    with pytest.raises(DataError):
        decode(data, where=WHERE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decode", [decode_image, decode_audio, decode_video])
def test_a_wrong_extension_is_an_error(kind: str, decode: Callable[..., object]) -> None:
    right, data = KINDS[kind]
    if decode is right:
        decode(data, where=WHERE)
    else:
        with pytest.raises(DataError):
            decode(data, where=WHERE)


def png_of(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds nothing."""
    parts = b"\x89PNG\r\n\x1a\n"
    for name, body in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ):
        parts += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return parts


def test_huge_declared_sizes_are_refused_before_decoding() -> None:
    for size in ((9000, 9000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(DataError):
            decode_image(png_of(*size), where=WHERE)
    with pytest.raises(DataError, match="limit"):
        decode_audio(WAV, where=WHERE, max_samples=100)
    with pytest.raises(DataError, match="more than 3 frames"):
        decode_video(MP4, where=WHERE, max_frames=3)
    with pytest.raises(DataError):
        decode_video(MP4, where=WHERE, max_pixels=100)


def test_playlists_cannot_open_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(MP4)
    for text in (f"#EXTM3U\n#EXTINF:1,\n{secret}\n", f"ffconcat version 1.0\nfile {secret}\n"):
        with pytest.raises(DataError, match="cannot decode"):
            decode_video(text.encode(), where=WHERE)


def test_images_keep_their_channels() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(decode_image(png(grey), where=WHERE)[..., 0], grey)
    layer = picture(2, "RGBA")
    assert np.array_equal(decode_image(png(layer), where=WHERE), layer)
    wide = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    assert decode_image(saved(wide, "PNG"), where=WHERE)[7, 7, 0] == round(63_000 / 257)


def test_transparency_of_palettes_and_keys_becomes_alpha() -> None:
    keyed = saved(Image.new("RGB", (4, 4), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    assert decode_image(keyed, where=WHERE)[..., 3].max() == 0
    palette = Image.new("P", (4, 4), 0)
    assert decode_image(saved(palette, "PNG", transparency=0), where=WHERE).shape == (4, 4, 4)


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: 90 degrees clockwise to be upright
    turned = decode_image(saved(image, "PNG", exif=exif), where=WHERE)[..., 0]
    assert np.array_equal(turned, np.rot90(np.asarray(image), -1))


def test_animations_are_refused() -> None:
    other = Image.fromarray(picture(3))
    data = saved(RGB, "PNG", save_all=True, append_images=[other])
    with pytest.raises(DataError, match="animation"):
        decode_image(data, where=WHERE)


def test_audio_keeps_its_channels() -> None:
    both = np.stack([tone(1, 0.1), -tone(2, 0.1)], axis=1)
    samples, rate = decode_audio(flac(both, 22_050), where=WHERE)
    assert rate == 22_050
    assert np.array_equal(samples, both)


def test_video_keeps_every_frame_and_its_own_time() -> None:
    times = [0, 40, 80, 400, 1000, 1040]
    frames, seconds = decode_video(mp4(clip(1, 6), times), where=WHERE)
    assert frames.shape == (6, 32, 32, 3)
    assert np.abs(seconds * 1000 - times).max() < 1


@pytest.mark.parametrize("count", [1, 2, 31, 40])
def test_no_frame_is_lost(count: int) -> None:
    still = np.repeat(clip(1, 1), count, axis=0)
    assert len(decode_video(mp4(still), where=WHERE)[0]) == count


@pytest.mark.parametrize("form", ["matroska", "avi"])
def test_other_containers(form: str) -> None:
    import av

    sink = io.BytesIO()
    with av.open(sink, "w", format=form) as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for pixels in clip(1, 5):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    frames, times = decode_video(sink.getvalue(), where=WHERE)
    assert len(frames) == 5
    assert np.allclose(np.diff(times), 0.25, atol=0.002)
    for part in (0.3, 0.7, 0.95):
        with pytest.raises(DataError):
            decode_video(sink.getvalue()[: int(len(sink.getvalue()) * part)], where=WHERE)
