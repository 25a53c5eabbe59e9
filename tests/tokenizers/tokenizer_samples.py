"""Drawn pictures and synthesised sound, and the records made of them: no demo package needed."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ringweave.tokenizers.fit import FitSizes

U8 = NDArray[np.uint8]
SMALL = FitSizes(
    text_pieces=320,
    image_codes=96,
    rgba_alpha_codes=24,
    rgba_colour_codes=24,
    audio_books=3,
    audio_codes=32,
    audio_bins=80,
    score_books=2,
    score_codes=24,
)
#: Few colours, as a corpus of pictures has favourites: unlimited ones cannot be learned from 30 pictures.
PALETTE = [(214, 40, 40), (247, 180, 40), (40, 120, 80), (30, 60, 140), (240, 240, 235), (20, 20, 24)]
TINTS = np.array([[20, 50, 90], [80, 60, 30]])
SENTENCE = "and the light shone on the water, where three small boats lay still until the evening came."


def png(array: NDArray[np.generic]) -> bytes:
    """PNG bytes of a picture."""
    sink = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(sink, "PNG")
    return sink.getvalue()


def flac(samples: NDArray[np.int16], rate: int = 16_000, form: str = "FLAC") -> bytes:
    """Encoded audio."""
    sink = io.BytesIO()
    subtype = {"OGG": "VORBIS"}.get(form, "PCM_16")
    soundfile.write(sink, samples, rate, format=form, subtype=subtype)
    return sink.getvalue()


def mp4(frames: U8, times_ms: list[int] | None = None) -> bytes:
    """MPEG-4 video; frames at the given milliseconds (default: every 250)."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=1000)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times_ms[number] if times_ms else 250 * number
            frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return sink.getvalue()


def picture(seed: int, mode: str = "RGB", size: int = 48) -> U8:
    """Coloured discs on a gradient (RGB) or on nothing (RGBA)."""
    rng = np.random.default_rng(seed)
    if mode == "RGB":
        ramp = np.linspace(0, 160, size)[:, None, None] + TINTS[rng.integers(0, len(TINTS))]
        image = Image.fromarray(np.broadcast_to(ramp, (size, size, 3)).astype(np.uint8))
    else:
        image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, r = rng.integers(0, size, 3) * np.array([1, 1, 0.3])
        colour = PALETTE[rng.integers(0, len(PALETTE))] + ((255,) if mode == "RGBA" else ())
        draw.ellipse((x - r - 4, y - r - 4, x + r + 4, y + r + 4), fill=colour)
    return np.asarray(image)


def page(seed: int, height: int = 64, width: int = 96) -> U8:
    """Staff lines with note heads."""
    rng = np.random.default_rng(seed)
    image = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(image)
    for line in range(5):
        draw.line((8, 24 + 4 * line, width - 8, 24 + 4 * line), fill=0)
    for x in range(16, width - 12, 12):
        y = 22 + 2 * int(rng.integers(0, 9))
        draw.ellipse((x, y, x + 5, y + 4), fill=0)
        draw.line((x + 5, y + 2, x + 5, y - 10), fill=0)
    return np.asarray(image)


def tone(seed: int, seconds: float = 1.0, rate: int = 16_000) -> NDArray[np.int16]:
    """A decaying chord with a few semitones of choice."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    notes = 220 * 2 ** (rng.integers(0, 5, 2) / 6)
    wave = sum(np.sin(2 * np.pi * f * t + rng.uniform(0, 6)) for f in notes) * np.exp(-t)
    return (wave * 8000).astype(np.int16)


def prose(seed: int, words: int = 60) -> str:
    """Lines of text."""
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(rng.choice(SENTENCE.split(), 10)) for _ in range(words // 10))


def clip(seed: int, frames: int = 4, size: int = 32) -> U8:
    """A picture that slides."""
    image = picture(seed, size=size + frames)
    return np.stack([image[k : k + size, k : k + size] for k in range(frames)])


def records(start: int, count: int) -> dict[str, list[dict[str, bytes]]]:
    """Records of every source, as shards would give them."""
    seeds = range(start, start + count)
    return {
        "text": [{"txt": prose(s).encode()} for s in seeds],
        "image": [{"png": png(picture(s)), "txt": prose(s, 10).encode()} for s in seeds],
        "rgba": [
            {
                "layer0.png": png(picture(s, "RGBA")),
                "layer1.png": png(picture(s + 1, "RGBA")),
                "txt": b"discs",
            }
            for s in seeds
        ],
        "score": [{"png": png(page(s))} for s in seeds],
        "audio": [{"flac": flac(tone(s))} for s in seeds],
        "video": [{"mp4": mp4(clip(s)), "txt": b"discs slide"} for s in list(seeds)[:6]],
    }
