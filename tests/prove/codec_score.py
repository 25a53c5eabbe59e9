"""The learned codec of score pages: ink-F1 at 16x16 patches and four books of 1024, on chorales it never saw.

Pages as `ringweave demo` engraves them from music21's chorales, split by piece; `--data DIR` takes the score shards of
a folder instead of engraving them again. `--tiny` takes few pages and small books, and writes no row.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from _codec_checks import SECONDS, flips_that_pass, learned, threads_differ
from _harness import Proof, arguments, prove_with

from ringweave.tokenizers import members as read
from ringweave.tokenizers.conv_codecs import ConvScoreCodec
from ringweave.tokenizers.grid import BLANK
from ringweave.tokenizers.learn_start import NetSizes, score_start
from ringweave.tokenizers.measure import ink_f1, psnr
from ringweave.tokenizers.score import ScoreCodec

Pages = list[np.ndarray]
F1 = 0.92


def pages(data: Path | None, limit: int | None) -> tuple[Pages, Pages]:
    """Grey pages to train on and held out."""
    if data is not None:
        from ringweave.launch.data_records import records_by_source

        sides = [list(records_by_source(data, split)["score"]) for split in ("train", "heldout")]
        train, heldout = sides[0][:limit], sides[1][: limit and max(2, limit // 4)]
    else:
        from ringweave.data_pipes.demo import music

        records = [record for job in music.plan(limit) for record in music.render(job)]
        scores = [record for record in records if record.source == music.SCORE]
        train = [r.members for r in scores if not r.heldout]
        heldout = [r.members for r in scores if r.heldout]
    return tuple([read.score_of(m, where="a page") for m in side] for side in (train, heldout))  # type: ignore[return-value]


def quality(codec: ConvScoreCodec | ScoreCodec, unseen: Pages) -> float:
    """Mean ink-F1 over pages."""
    back = [codec.decode(codec.encode(p))[: p.shape[0], : p.shape[1]] for p in unseen]
    return round(float(np.mean([ink_f1(a, b) for a, b in zip(unseen, back, strict=True)])), 4)


def greys(codec: ConvScoreCodec | ScoreCodec, unseen: Pages) -> tuple[float, float]:
    """Mean PSNR over pages in dB, and the share of the pixels of grey 136 to 199 that come back over 235."""
    back = [codec.decode(codec.encode(p))[: p.shape[0], : p.shape[1]] for p in unseen]
    light = [(p > 135) & (p < 200) for p in unseen]
    lost = sum(int((b[m] > 235).sum()) for b, m in zip(back, light, strict=True))
    values = [psnr(a, b) for a, b in zip(unseen, back, strict=True)]
    return round(float(np.mean(values)), 2), round(lost / sum(int(m.sum()) for m in light), 3)


def ids_by_batch(codec: ConvScoreCodec, unseen: Pages) -> int:
    """Ids of pages cut to one size that differ in batches of 1, 3 and 8, and of pages cut into halves."""
    width = min(p.shape[1] for p in unseen) // codec.patch * codec.patch
    cut = [np.ascontiguousarray(p[: unseen[0].shape[0], :width]) for p in unseen]
    ids = [codec.encode(page) for page in cut]
    differ = 0
    for size in (1, 3, 8):
        for k in range(0, len(cut), size):
            long = codec.encode(np.concatenate(cut[k : k + size]))
            differ += int((long != np.concatenate(ids[k : k + size])).sum())
    return differ


def run(proof: Proof, options: argparse.Namespace) -> None:
    train, unseen = pages(options.data, 12 if options.tiny else None)
    codes = 32 if options.tiny else 1024
    net = NetSizes(16, 0, 1) if options.tiny else NetSizes()
    proof.found(pages=len(train), held_out=len(unseen), steps=options.steps)
    plain = ScoreCodec.fit(train, books=4, codes=codes // 4, patch=16)
    closed, codec, seconds = learned(
        lambda: score_start(train, books=4, codes=codes, patch=16, net=net), steps=options.steps
    )
    found = quality(codec, unseen)
    proof.found(f1_of_closed_form_256=quality(plain, unseen), f1_at_start=quality(closed, unseen))
    # What the tone curve costs: greys, and lines lighter than mid-grey that come back as paper.
    proof.found(psnr_dB=greys(codec, unseen)[0], light_pixels_lost=greys(codec, unseen)[1])
    proof.found(psnr_of_closed_form_256=greys(plain, unseen)[0])
    proof.found(f1=found, f1_of_training_pages=quality(codec, train[:36]), core_seconds=seconds)
    marked = [codec.encode(page)[..., 0] != BLANK for page in unseen]
    proof.found(ids_a_page=round(4 * float(np.mean([m.sum() for m in marked])), 1))
    differ = ids_by_batch(codec, unseen)
    threads = threads_differ(codec, "score", unseen)
    passed = flips_that_pass(codec, "score", flips=4 if options.tiny else 50)
    proof.found(ids_by_batch=differ, ids_by_threads=int(threads), flips_not_found=passed)
    blank = np.full((64, 96), 255, np.uint8)
    proof.holds(bool((codec.decode(codec.encode(blank)) == 255).all()), "blank paper does not stay white")
    proof.holds(differ == 0, f"{differ} ids change with the batch")
    proof.holds(not threads, "ids change with the threads")
    proof.holds(passed == 0, f"{passed} flipped weights load, or fail without the codec's name")
    if not options.tiny:
        proof.holds(found >= F1, f"ink-F1 {found}, {F1} wanted")
        proof.holds(seconds <= SECONDS, f"training took {seconds} s of one core, {SECONDS} allowed")


def main() -> None:
    parser = arguments(__doc__, tiny="few pages and steps")
    parser.add_argument("--data", type=Path, help="folder with score-train-*.tar and score-heldout-*.tar")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    if options.tiny:
        options.steps = 3
    claim = (
        "score pages at 16x16 patches and 4 books: ink-F1 ≥ 0.92 held out; ids the same in any batch and on any "
        "number of threads; a flipped weight is found"
    )
    with prove_with(options, "codec_score", claim) as proof:
        run(proof, options)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
