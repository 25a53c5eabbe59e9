"""Seconds of sound encoded a second, one thread: ours (closed form and learned) beside transformers' EncodecModel in
its published sizes at 6 kbit/s. All at 24 kHz, 75 frames a second, 8 books of 1,024: the same tokens, the same bits.

Ours are small codecs over the lowest half of an MDCT, 0.1 million weights in the learned encoder beside 7 million: this
is what they cost, and says nothing of how they sound. Weights are random on both sides; no time depends on them.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when numpy is loaded
import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
import _encoders
import _harness as bench

CLAIM = "our small audio codecs encode at least 5 times as much sound a second as an EncodecModel of equal token rate"
RATE, HOP, BINS, BOOKS = 24_000, 320, 160, 8


def encodec(*, tiny: bool) -> Callable[[NDArray[np.int16]], NDArray[np.int64]]:
    """A function from int16 [T] to codes [frames, 8]. tiny: an eighth of the channels."""
    warnings.simplefilter("ignore")
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    config = EncodecConfig(num_filters=4, hidden_size=16) if tiny else EncodecConfig()
    model: Any = EncodecModel(config).eval()

    def encode(samples: NDArray[np.int16]) -> NDArray[np.int64]:
        with torch.inference_mode():
            wave = torch.from_numpy(samples).float()[None, None] / 32768
            return model.encode(wave, bandwidth=6.0).audio_codes[0, 0].T.numpy()

    return encode


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    bench.one_thread()
    codes, seconds = (64, 1) if options.tiny else (1024, 10)
    sizes = {"rate": RATE, "hop": HOP, "bins": BINS, "books": BOOKS, "codes": codes}
    codecs: dict[str, Any] = {
        "closed form": _encoders.audio_codec(**sizes), "learned": _encoders.learned_audio_codec(**sizes),
    }  # fmt: skip
    rival, samples = encodec(tiny=options.tiny), _encoders.music(seconds * RATE, RATE)
    for codec in codecs.values():  # one frame more at our edge
        assert codec.encode(samples).shape == (seconds * 75 + 1, BOOKS)
    assert rival(samples).shape == (seconds * 75, BOOKS)
    encoders = [*(codec.encode for codec in codecs.values()), rival]
    sides = [lambda e=encode: _encoders.rate(lambda: e(samples), seconds) for encode in encoders]
    *ours, theirs = bench.paired(sides, runs=options.runs)
    parts = [
        bench.Part(name, runs, theirs, "seconds of sound/s", 5.0, "higher")
        for name, runs in zip(codecs, ours)
    ]
    bench.emit(
        CLAIM,
        *parts,
        versions=["transformers"],
        rival_is="transformers EncodecModel",
        tokens_per_second=75 * BOOKS,
    )


if __name__ == "__main__":
    main()
