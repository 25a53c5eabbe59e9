"""Frames encoded a second, one thread: ours (the frame-wise image codec and the video codec with moves over it, closed
form and learned) beside diffusers' VQModel frame by frame at the same f8 rate, the published vq-f8 of latent-diffusion.

Ours are small codecs (see image_encode.py); the video codec searches a move for each frame and writes fewer ids.
Weights are random on both sides; no time of the networks depends on them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when numpy is loaded
sys.path.insert(0, str(Path(__file__).parent))
import _encoders
import _harness as bench

from ringweave.tokenizers.video import VideoCodec

CLAIM = "our small f8 video codecs encode at least 5 times as many frames a second as an f8 VQModel of published size"


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    if reason := bench.missing("diffusers"):
        return bench.skip(CLAIM, reason)
    import _vqgan

    bench.one_thread()
    side, count, theirs_count = (64, 3, 1) if options.tiny else (128, 16, 4)
    frames = _encoders.moving_picture(count, side)
    closed, learned = _encoders.image_codec(), _encoders.learned_image_codec()
    codecs: dict[str, Any] = {
        "frame-wise, closed form": closed,
        "frame-wise, learned": learned,
        "moves, closed form": VideoCodec(closed),
        "moves, learned": VideoCodec(learned),
    }
    rival = _vqgan.encoder(tiny=options.tiny)
    assert all(len(codec.encode(frames)) == count for codec in codecs.values())
    sides = [lambda c=codec: _encoders.rate(lambda: c.encode(frames), count) for codec in codecs.values()]
    sides.append(lambda: _encoders.rate(lambda: rival(frames[:theirs_count]), theirs_count))
    *ours, theirs = bench.paired(sides, runs=options.runs)
    parts = [bench.Part(name, runs, theirs, "frames/s", 5.0, "higher") for name, runs in zip(codecs, ours)]
    return bench.emit(
        CLAIM, *parts, versions=["diffusers"], rival_is="diffusers VQModel", pixels=[side, side]
    )


if __name__ == "__main__":
    main()
