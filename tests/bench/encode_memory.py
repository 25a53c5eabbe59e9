"""Memory that encoding takes, codec included, in a process of its own: ten minutes of sound beside one, 2,000 frames of
video beside 500 (over the first 400 the heap settles). As streams, whose input is made piece by piece and whose codes
are dropped, and as whole arrays, which were there before and do not count, but whose codes do. The rival is the shorter
clip."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _encoders
import _harness as bench

from ringweave.tokenizers.audio import AudioCodec
from ringweave.tokenizers.codec import kind_of
from ringweave.tokenizers.conv_codecs import ConvAudioCodec, ConvImageCodec
from ringweave.tokenizers.image import ImageCodec
from ringweave.tokenizers.video import VideoCodec

CLAIM = (
    "the memory of encoding is flat: ten minutes of sound take what one takes, and 2,000 frames what 500 take"
)
RATE = 16_000
AUDIO = {
    "rate": RATE,
    "hop": 640,
    "bins": 160,
    "books": 8,
    "codes": 256,
}  # sizes of `ringweave tokenizer train`
SIDE = 64
KINDS: dict[str, Any] = {c.kind: c for c in (AudioCodec, ConvAudioCodec, ImageCodec, ConvImageCodec)}
Step = Callable[[], object]


def audio_stream(seconds: int, codec: Path) -> Step:
    """Push a clip into a stream, an eighth of a block at a time."""

    def step() -> None:
        stream = _load(codec).stream()
        for first in range(0, seconds * RATE, _encoders.PIECE):
            stream.push(_encoders.music(min(_encoders.PIECE, seconds * RATE - first), RATE, first=first))
        stream.flush()

    return _ready(step)


def audio_whole(seconds: int, codec: Path) -> Step:
    """Encode a clip at once."""
    samples = _encoders.music(seconds * RATE, RATE)
    return _ready(lambda: _load(codec).encode(samples))


def video_stream(frames: int, codec: Path) -> Step:
    """Push frames into the video codec, ten at a time."""

    def step() -> None:
        stream = VideoCodec(_load(codec)).stream()
        for first in range(0, frames, 10):
            stream.push(_encoders.moving_picture(min(10, frames - first), SIDE, first=first))

    return _ready(step)


def frames_whole(frames: int, codec: Path) -> Step:
    """Encode frames one by one as pictures, all at once."""
    clip = _encoders.moving_picture(frames, SIDE)
    return _ready(lambda: _load(codec).encode(clip))


def _load(path: Path) -> Any:
    data = path.read_bytes()
    return KINDS[kind_of(data)].from_bytes(data, where=str(path))


def _ready(step: Step) -> Step:
    """What making the input left free goes back to the system, or the step would use it unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return step


def _write_codecs(folder: Path) -> dict[str, Path]:
    """A file of each codec."""
    codecs: dict[str, Any] = {
        "sound, closed form": _encoders.audio_codec(**AUDIO),
        "sound, learned": _encoders.learned_audio_codec(**AUDIO),
        "frames, closed form": _encoders.image_codec(),
        "frames, learned": _encoders.learned_image_codec(),
    }
    for name, codec in codecs.items():
        (folder / name).write_bytes(codec.to_bytes())
    return {name: folder / name for name in codecs}


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__, runs=3)
    # glibc keeps freed blocks of up to 32 MiB for reuse; given back at once, what is resident is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)
    os.environ["OMP_NUM_THREADS"] = "1"
    lengths = (
        {"sound": (20, 10), "frames": (20, 10)}
        if options.tiny
        else {"sound": (600, 60), "frames": (2000, 500)}
    )
    cases: list[tuple[str, Callable[[int, Path], Step], str]] = [
        ("as a stream", audio_stream, "sound, closed form"),
        ("as a stream", audio_stream, "sound, learned"),
        ("as a whole", audio_whole, "sound, closed form"),
        ("as a whole", audio_whole, "sound, learned"),
        ("as a whole", frames_whole, "frames, closed form"),
        ("as a whole", frames_whole, "frames, learned"),
        ("as a stream of moves", video_stream, "frames, closed form"),
    ]
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        files = _write_codecs(Path(folder))
        for how, prepare, name in cases[::3] if options.tiny else cases:
            counts = lengths[name.partition(",")[0]]
            sides = [lambda n=n, p=prepare, c=files[name]: bench.peak_memory(p, n, c) for n in counts]
            long, short = bench.paired(sides, runs=options.runs, warm_up=0)
            parts.append(bench.Part(f"{name}, {how}", long, short, "MiB", 1.1, "lower"))
    bench.emit(
        CLAIM, *parts, lengths={"sound_s": lengths["sound"], "frames": lengths["frames"]}, pixels=[SIDE, SIDE]
    )


if __name__ == "__main__":
    main()
