"""A small diffusion transformer learns on OpenMoji scenes on two cores in 15 minutes: mattes, drawings, losses.

Scenes as `ringweave demo` builds them, split by drawing and by photograph; the autoencoder of layers is learned first,
outside the 15 minutes. Mattes: mean SAD over held-out scenes against the best constant threshold on luminance, which
knows the answers. Drawings of held-out words: mean alpha neither empty nor full. `--tiny` trains a few steps and writes
no row; `--keep DIR` leaves run and pictures there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _harness import Proof, arguments, prove_with

from ringweave.launch import demo_dit

#: Seconds of training at most, and the share of the baseline's SAD that mattes may have.
SECONDS, SHARE = 900, 0.5
#: What differs from the demo's recipe, which has a tenth of the time.
LONGER = ("model.width=128", "model.heads=4", "optimizer.lr=3e-3", "optimizer.ema=0.995")
#: A drawing's mean alpha lies between these, in every one that is made.
EMPTY, FULL = 0.01, 0.99


def build(place: Path, options: argparse.Namespace) -> None:
    """Scenes and a tokenizer set of text and latents in `place`."""
    from ringweave.data_pipes.demo import build_demo
    from ringweave.launch.data_records import records_by_source
    from ringweave.tokenizers.fit import fit_tokenizers
    from ringweave.tokenizers.learn_run import learn_codecs
    from ringweave.tokenizers.learn_vae import VaeSchedule

    build_demo(place / "data", limit=40 if options.tiny else None, only=("text", "rgba", "scenes"))
    records = {name: list(some) for name, some in records_by_source(place / "data", "train").items()}
    fit_tokenizers({"text": records["text"]}, place / "tokenizers")
    layers = [*records["rgba"], *records["scenes"][:600]]
    schedule = VaeSchedule(steps=3 if options.tiny else options.vae_steps)
    learn_codecs({"rgba": layers}, place / "tokenizers", names=["latents"], schedule=schedule)


def train(place: Path, options: argparse.Namespace) -> float:
    """Seconds that training by the demo's recipe took, with all scenes and more tokens."""
    shards = "scenes-train-{0000..0003}.tar"
    sets = [
        *demo_dit.settings(place), f"stages.0.tokens={8000 if options.tiny else options.tokens}",
        f"data.sources.0.shards={shards}", "checkpoint.every=500 steps", *LONGER,
    ]  # fmt: skip
    argv = [sys.executable, "-m", "ringweave.launch.cli", "train", str(demo_dit.RECIPE)]
    argv += [part for item in sets for part in ("--set", item)]
    from ringweave.pretrain.config import load_config
    from ringweave.pretrain.job import open_corpus
    from ringweave.tokenizers.manifest import VocabularyManifest

    config = load_config(demo_dit.RECIPE, sets)
    manifest = VocabularyManifest.load(place / "tokenizers" / "tokenizers.json")
    for heldout in (False, True):  # encoding is not training
        open_corpus(config, manifest, heldout=heldout, tokens=True).close()
    started = time.monotonic()
    subprocess.run(argv, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.monotonic() - started


def measure(proof: Proof, place: Path, options: argparse.Namespace) -> None:
    """The three claims, from what the run left."""
    from PIL import Image

    from ringweave.pretrain.evaluate import evaluate_run
    from ringweave.pretrain.matting_figures import matting_of_run
    from ringweave.pretrain.sample_dit import sample_diffusion, sheet

    run = place / "dit"
    found = evaluate_run(run, max_tokens_per_source=2000 if options.tiny else 8000)["heldout"]["rgba"]
    after, before = found["by_sigma"], found["untrained_by_sigma"]
    falls = sum(after[level] < before[level] for level in after)
    proof.found(levels_where_the_loss_falls=f"{falls} of {len(after)}")
    proof.found(loss_by_sigma=", ".join(f"{level}: {loss:.3f}" for level, loss in after.items()))
    figures, made = matting_of_run(run, source="scenes/matting", count=4 if options.tiny else 150)
    Image.fromarray(sheet(made[:8])).save(place / "matting.png")
    share = figures["sad"] / figures["baseline_sad"]
    proof.found(sad=round(figures["sad"], 4), baseline_sad=round(figures["baseline_sad"], 4))
    proof.found(share=round(share, 3), documents=figures["documents"])
    count = 2 if options.tiny else 16
    drawn = sample_diffusion(run, (), place / "drawn", sources=["scenes/text_to_foreground"], count=count)
    files = sorted((place / "drawn" / "scenes-text_to_foreground" / "made").rglob("layer0.png"))
    alphas = [float(np.asarray(Image.open(f).convert("RGBA"))[..., 3].mean() / 255) for f in files]
    proof.found(drawings=len(drawn["samples"][0]["words"]), least_alpha=round(min(alphas), 3))
    proof.found(most_alpha=round(max(alphas), 3))
    if options.tiny:
        return
    proof.holds(falls == len(after), f"the loss falls at {falls} of {len(after)} levels")
    proof.holds(share <= SHARE, f"SAD is {share:.2f} of the best threshold's, {SHARE} wanted")
    proof.holds(min(alphas) > EMPTY and max(alphas) < FULL, "a drawing is empty or full")


def main() -> None:
    parser = arguments(__doc__, tiny="a few records and steps")
    parser.add_argument("--tokens", default="7M", help="packed slots to train on")
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--keep", type=Path, help="folder that data, run and pictures are left in")
    options = parser.parse_args()
    claim = (
        "after 15 minutes on two cores mattes of held-out drawings have at most half the SAD of the best constant "
        "threshold, drawings of words are neither empty nor full, and the held-out loss falls at all 8 levels"
    )
    with prove_with(options, "dit_matting", claim) as proof, tempfile.TemporaryDirectory() as folder:
        place = options.keep or Path(folder)
        build(place, options)
        seconds = train(place, options)
        facts: dict[str, Any] = {"training_seconds": round(seconds)}
        proof.found(**facts)
        if not options.tiny:
            proof.holds(seconds <= SECONDS, f"training took {seconds:.0f} s, {SECONDS} allowed")
        measure(proof, place, options)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
