"""The learned picture codec on a photograph it never saw: against what the same rate buys without learning.

Crops of 64x64 of scikit-image's astronaut; the other photographs train. f8 has 8x8 patches, f4 4x4, both 1024 codes
(10 bits). The floor is each patch's mean colour in 10 bits, drawn bilinearly (`measure.rate_floor`), the best split of
the bits for each crop. `--tiny` takes few crops, small books and few steps, and writes no row.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from _codec_checks import SECONDS, flips_that_pass, ids_by_batch, learned, threads_differ
from _harness import Proof, arguments, prove_with

from ringweave.tokenizers.conv_codecs import ConvImageCodec
from ringweave.tokenizers.learn_start import NetSizes, image_start
from ringweave.tokenizers.measure import bit_splits, psnr, rate_floor

TRAIN = (
    "brick", "camera", "chelsea", "clock_motion", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "ihc",
    "motorcycle_left", "retina", "rocket", "moon",
)  # fmt: skip
HELD_OUT, SIDE = "astronaut", 64
#: patch -> decibels over the floor, share of the codes used
BARS = {8: (1.2, 0.6), 4: (0.5, 0.0)}


def photo(name: str) -> np.ndarray:
    """uint8 [H, W, 3] of scikit-image's photograph of that name."""
    import skimage.data
    from PIL import Image

    [path] = [p for p in Path(skimage.data.__file__).parent.glob(f"{name}.*") if p.suffix != ".py"]
    with Image.open(path) as stored:
        return np.asarray(stored.convert("RGB"))


def crops(count: int) -> np.ndarray:
    """uint8 [count, SIDE, SIDE, 3] cut from the held-out photograph at random places."""
    picture, rng = photo(HELD_OUT), np.random.default_rng(0)
    places = rng.integers(0, np.array(picture.shape[:2]) - SIDE, (count, 2))
    return np.stack([picture[y : y + SIDE, x : x + SIDE] for y, x in places])


def quality(codec: ConvImageCodec, unseen: np.ndarray) -> tuple[float, float]:
    """Mean PSNR over crops in dB, and the share of the codes that occur."""
    ids = codec.encode(unseen)
    values = [psnr(a, b) for a, b in zip(unseen, codec.decode(ids), strict=True)]
    return round(float(np.mean(values)), 2), round(len(np.unique(ids)) / codec.codes, 3)


def prove_patch(proof: Proof, patch: int, options: argparse.Namespace) -> None:
    """Learns the codec of one patch size, measures it and holds it to its bars."""
    codes = 64 if options.tiny else 1024
    net = NetSizes(16, 1, 1) if options.tiny else NetSizes()
    unseen, train = crops(16 if options.tiny else 256), [photo(name) for name in options.photos]
    splits = bit_splits(codes)
    floor = round(
        float(np.mean([max(psnr(c, rate_floor(c, patch, bits)) for bits in splits) for c in unseen])), 2
    )
    closed, codec, seconds = learned(
        lambda: image_start(train, codes=codes, patch=patch, net=net), steps=options.steps
    )
    title, (found, used) = f"f{patch}", quality(codec, unseen)
    proof.found(**{f"{title}_floor_dB": floor, f"{title}_at_start": quality(closed, unseen)[0]})
    proof.found(**{f"{title}_dB": found, f"{title}_codes_used": used, f"{title}_core_seconds": seconds})
    differ, threads = ids_by_batch(codec, unseen[:64]), threads_differ(codec, "image", [photo(HELD_OUT)])
    passed = flips_that_pass(codec, "image", flips=4 if options.tiny else 50)
    proof.found(**{f"{title}_ids_by_batch": differ, f"{title}_ids_by_threads": int(threads)})
    proof.found(**{f"{title}_flips_not_found": passed})
    proof.holds(differ == 0, f"{title}: {differ} ids change with the batch")
    proof.holds(not threads, f"{title}: ids change with the threads")
    proof.holds(passed == 0, f"{title}: {passed} flipped weights load, or fail without the codec's name")
    if not options.tiny:
        over, share = BARS[patch]
        proof.holds(found >= floor + over, f"{title}: {found} dB, {floor + over:.2f} wanted")
        proof.holds(used >= share, f"{title}: {used} of the codes used, {share} wanted")
        proof.holds(seconds <= SECONDS, f"{title}: training took {seconds} s of one core, {SECONDS} allowed")


def main() -> None:
    parser = arguments(__doc__, tiny="few crops and steps")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    options.photos = TRAIN[1:4] if options.tiny else TRAIN
    if options.tiny:
        options.steps = 3
    claim = (
        "learned pictures of 10 bits a patch: f8 ≥ its floor + 1.2 dB with ≥ 60 % of the codes used, f4 ≥ its "
        "floor + 0.5 dB, held out; ids the same in any batch and thread; a flipped weight is found"
    )
    with prove_with(options, "codec_image", claim) as proof:
        for patch in BARS:
            prove_patch(proof, patch, options)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
