"""Pictures encoded a second, one thread: ours (closed form and learned, 10 bits a patch of 8x8) beside diffusers'
VQModel at the same rate, the published vq-f8 of latent-diffusion. All three get the same 256x256 pictures one by one.

Ours are small codecs, 5 thousand and 0.2 million weights in the encoder beside 20 million: this is what they cost, and
says nothing of what they look like. Weights are random on both sides; no time depends on them.
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

CLAIM = "our small f8 image codecs encode at least 5 times as many pictures a second as an f8 VQModel of published size"


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    if reason := bench.missing("diffusers"):
        return bench.skip(CLAIM, reason)
    import _vqgan

    bench.one_thread()
    side, count = (64, 1) if options.tiny else (256, 20)
    pictures = _encoders.moving_picture(count, side)
    codecs: dict[str, Any] = {
        "closed form": _encoders.image_codec(),
        "learned": _encoders.learned_image_codec(),
    }
    rival = _vqgan.encoder(tiny=options.tiny)
    shape = (side // _encoders.PATCH, side // _encoders.PATCH)
    assert all(codec.encode(pictures[0]).shape == shape for codec in codecs.values())
    assert rival(pictures[:1]).shape == (1, *shape)
    sides = [
        lambda c=codec: _encoders.rate(lambda: [c.encode(p) for p in pictures], count)
        for codec in codecs.values()
    ]
    sides.append(lambda: _encoders.rate(lambda: rival(pictures[:1]), 1))
    *ours, theirs = bench.paired(sides, runs=options.runs)
    parts = [bench.Part(name, runs, theirs, "pictures/s", 5.0, "higher") for name, runs in zip(codecs, ours)]
    return bench.emit(
        CLAIM, *parts, versions=["diffusers"], rival_is="diffusers VQModel", pixels=[side, side]
    )


if __name__ == "__main__":
    main()
