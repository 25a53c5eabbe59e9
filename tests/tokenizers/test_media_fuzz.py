"""300 damaged copies of a small file of every kind: legal values or a DataError, nothing else, and soon."""

from __future__ import annotations

import io
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from media_samples import WHERE, icc_chunk, movie, png_by_hand, rgb_profile, saved, sound
from PIL import Image
from tokenizer_samples import clip, mp4, picture, png, tone

from ringweave.tokenizers import lmx, midi_events, midi_file
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.media import decode_audio, decode_image, decode_video
from ringweave.tokenizers.midi_file import Note

COPIES = 300
SECONDS = 5.0  # for one of them; the slowest takes well under one

NOTE = (
    "<note><pitch><step>{}</step><octave>4</octave></pitch><duration>1</duration><type>quarter</type></note>"
)
SCORE = (
    "<?xml version='1.0' encoding='UTF-8'?><score-partwise><part-list><score-part id='P1'/></part-list>"
    "<part id='P1'><measure number='1'><attributes><divisions>1</divisions><key><fifths>1</fifths></key>"
    "<time><beats>4</beats><beat-type>4</beat-type></time><clef><sign>G</sign><line>2</line></clef></attributes>"
    + "".join(map(NOTE.format, "CDEF"))
    + "</measure></part></score-partwise>"
).encode()


def packed() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("score.musicxml", SCORE)
    return sink.getvalue()


def h264() -> bytes:
    luma, chroma = picture(1, size=32)[..., 0], [np.full((16, 16), level, np.uint8) for level in (90, 150)]
    planes = [[np.roll(luma, k, 1), *chroma] for k in range(6)]
    return movie(planes, "yuv420p", codec="libx264", options={"bf": "2"})


def image_is_legal(pixels: Any) -> bool:
    return bool(
        pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4) and pixels.size
    )


def audio_is_legal(value: Any) -> bool:
    samples, rate = value
    return bool(samples.dtype == np.int16 and samples.ndim == 2 and samples.size and 1000 <= rate <= 768_000)


def video_is_legal(value: Any) -> bool:
    frames, times = value
    rising = bool((np.diff(times) > 0).all())
    return bool(
        rising and frames.dtype == np.uint8 and frames.shape[0] == len(times) and frames.shape[3:] == (3,)
    )


def ids_are_legal(ids: Any, size: int) -> bool:
    return bool(
        ids.dtype == np.int32 and ids.ndim == 1 and (not len(ids) or 0 <= ids.min() <= ids.max() < size)
    )


def lmx_is_legal(ids: Any) -> bool:
    return ids_are_legal(ids, lmx.SIZE)


def midi_is_legal(ids: Any) -> bool:
    return ids_are_legal(ids, midi_events.size())


RGB = picture(1)
DEEP = png_by_hand(RGB.astype(int) * 257, 16, 2, icc_chunk(rgb_profile()))
CMYK = saved(Image.fromarray(RGB).convert("CMYK"), "JPEG")
SONG = midi_file.write(
    [Note(k * 200_000, k * 200_000 + 150_000, 60 + k, 80, k % 3, False) for k in range(12)]
)
KINDS: dict[str, tuple[Callable[..., Any], Callable[[Any], bool], Callable[[], bytes]]] = {
    "png": (decode_image, image_is_legal, lambda: png(RGB)),
    "png-deep": (decode_image, image_is_legal, lambda: DEEP),
    "jpeg": (decode_image, image_is_legal, lambda: saved(Image.fromarray(RGB), "JPEG", icc_profile=rgb_profile())),
    "jpeg-cmyk": (decode_image, image_is_legal, lambda: CMYK),
    "jpeg-progressive": (decode_image, image_is_legal, lambda: saved(Image.fromarray(RGB), "JPEG", progressive=True)),
    "webp": (decode_image, image_is_legal, lambda: saved(Image.fromarray(RGB), "WEBP")),
    "webp-lossless": (decode_image, image_is_legal, lambda: saved(Image.fromarray(RGB), "WEBP", lossless=True)),
    "wav": (decode_audio, audio_is_legal, lambda: sound(tone(1, 0.05), 16_000, "WAV", "PCM_16")),
    "wav-float": (decode_audio, audio_is_legal, lambda: sound(tone(1, 0.05) / 9e3, 16_000, "WAV", "FLOAT")),
    "flac": (decode_audio, audio_is_legal, lambda: sound(tone(1, 0.2), 16_000, "FLAC", "PCM_16")),
    "ogg": (decode_audio, audio_is_legal, lambda: sound(tone(1, 0.2), 16_000, "OGG", "VORBIS")),
    "opus": (decode_audio, audio_is_legal, lambda: sound(tone(1, 0.2), 16_000, "OGG", "OPUS")),
    "mp3": (decode_audio, audio_is_legal, lambda: sound(tone(1, 0.2), 16_000, "MP3", "MPEG_LAYER_III")),
    "mp4": (decode_video, video_is_legal, lambda: mp4(clip(1, 4))),
    "mkv-h264": (decode_video, video_is_legal, h264),
    "avi": (decode_video, video_is_legal, lambda: movie([[RGB]] * 3, "bgr24", codec="rawvideo", form="avi")),
    "musicxml": (lmx.encode, lmx_is_legal, lambda: SCORE),
    "mxl": (lmx.encode, lmx_is_legal, packed),
    "midi": (midi_events.encode, midi_is_legal, lambda: SONG),
}  # fmt: skip


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A fifth is cut short, the others have one to eight bytes changed, half of them near the start."""
    if rng.random() < 0.2:
        return data[: int(rng.integers(len(data)))]
    copy = np.frombuffer(data, np.uint8).copy()
    reach = min(len(data), 200) if rng.random() < 0.5 else len(data)
    count = int(rng.integers(1, 9))
    copy[rng.integers(0, reach, count)] = rng.integers(0, 256, count)
    return copy.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_damage(kind: str) -> None:
    decode, is_legal, make = KINDS[kind]
    data = make()
    assert is_legal(decode(data, where=WHERE))
    rng = np.random.default_rng(sorted(KINDS).index(kind))
    seen: Counter[str] = Counter()
    for _ in range(COPIES):
        broken = damaged(data, rng)
        begun = time.monotonic()
        try:
            value = decode(broken, where=WHERE)
        except DataError as error:
            assert error.where.startswith(WHERE)
            assert error.why
            seen["refused"] += 1
        else:
            assert is_legal(value)
            seen["read"] += 1
        assert time.monotonic() - begun < SECONDS
    assert seen["refused"] > COPIES / 5
