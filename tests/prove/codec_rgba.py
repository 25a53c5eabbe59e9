"""The learned RGBA codec on drawings it never saw: exact alpha of whole cells, composites no worse than RGB.

Learns `rgba.conv` from the layers of the demo's drawings and, for comparison, one learned picture codec a background
from the same drawings flattened on it: same patch, `--rgb-codes` codes, as many steps. Composite PSNR is that of
`ringweave tokenizer train` (mean over drawings); RGB is measured on the flattened drawing. `--data DIR` takes the
rgba shards of a folder instead of drawing them again; `--tiny` takes few of both and writes no row.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _harness import Proof, arguments, prove_with

from ringweave.tokenizers import members as read
from ringweave.tokenizers.learn import Schedule, Training
from ringweave.tokenizers.learn_rgba import RgbaTraining
from ringweave.tokenizers.learn_start import NetSizes, image_start, rgba_start
from ringweave.tokenizers.measure import checkerboard, composite, measure, psnr
from ringweave.tokenizers.resize import resize_rgba
from ringweave.tokenizers.set import TokenizerSet

Layers = list[np.ndarray]
Members = Mapping[str, bytes]
GROUNDS = ("black", "white", "checker")
#: Decibels below RGB, alpha error, levels of a fringe, seconds of training that are allowed.
BEHIND, ALPHA_ERROR, FRINGE, SECONDS = 1.0, 0.02, 2, 600


def drawn(limit: int | None) -> tuple[list[Members], list[Members]]:
    """Records to train on and held out, drawn as `ringweave demo` draws them."""
    from ringweave.data_pipes.demo import layers

    records = [record for job in layers.plan(limit) for record in layers.render(job)]
    return [r.members for r in records if not r.heldout], [r.members for r in records if r.heldout]


def stored(folder: Path, limit: int | None) -> tuple[list[Members], list[Members]]:
    """Records of `rgba-train-*.tar` and `rgba-heldout-*.tar`."""
    from ringweave.launch.data_records import records_by_source

    train, heldout = (list(records_by_source(folder, split)["rgba"]) for split in ("train", "heldout"))
    return train[:limit], heldout[: limit and limit // 4]


def ground(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The background [H, W, 3] that `measure` has."""
    if name == "checker":
        return checkerboard(shape[0], shape[1])
    return np.full((*shape[:2], 3), 255.0 if name == "white" else 0.0)


def flattened(record: Layers, name: str) -> np.ndarray:
    """The drawing on a background, uint8 [H, W, 3]."""
    return np.rint(composite(record, ground(name, record[0].shape))).astype(np.uint8)


def rgb_psnr(train: list[Layers], heldout: list[Layers], name: str, options: argparse.Namespace) -> float:
    """Held-out PSNR of the picture codec learned from drawings on the background `name`."""
    start = image_start([flattened(r, name) for r in train], codes=options.rgb_codes, net=options.net)
    training = Training(start.config, start.tensors, start.crops, options.schedule)
    training.run()
    codec = start.codec(training.tensors())
    pictures = [flattened(record, name) for record in heldout]
    decoded = [codec.decode(codec.encode(p))[: p.shape[0], : p.shape[1]] for p in pictures]
    return float(np.mean([psnr(a, b) for a, b in zip(pictures, decoded, strict=True)]))


def wrong_alpha(codec: Any, layers: Layers) -> int:
    """Pixels of wholly opaque and wholly blank patches, and of opaque pictures, whose alpha does not come back."""
    wrong, patch = 0, codec.patch
    rng = np.random.default_rng(5)
    solid = rng.integers(0, 256, (3, 5 * patch, 4 * patch, 4), dtype=np.uint8)
    solid[..., 3] = 255
    for layer in [*layers, *solid]:
        back = codec.decode(codec.encode(layer))[: layer.shape[0], : layer.shape[1], 3]
        for top in range(0, layer.shape[0], patch):
            for left in range(0, layer.shape[1], patch):
                cut = (slice(top, top + patch), slice(left, left + patch))
                alpha = layer[cut][..., 3]
                if alpha.min() == 255 or alpha.max() == 0:
                    wrong += int((back[cut] != alpha).sum())
    return wrong


def ids_that_differ(codec: Any, layers: Layers) -> tuple[int, int]:
    """Ids changed by colour under alpha 0, and by batches of 1, 3 and 8."""
    rng = np.random.default_rng(6)
    hidden = batch = 0
    stack = np.stack([layer for layer in layers if layer.shape == layers[0].shape])
    whole = codec.encode(stack)
    noise = rng.integers(0, 256, stack.shape, dtype=np.uint8)
    noise[..., 3] = 0
    hidden += int((codec.encode(np.where(stack[..., 3:] == 0, noise, stack)) != whole).sum())
    for size in (1, 3, 8):
        parts = [codec.encode(stack[k : k + size]) for k in range(0, len(stack), size)]
        batch += int((np.concatenate(parts) != whole).sum())
    return hidden, batch


def fringe() -> float:
    """Largest difference in levels of a resized red sprite on transparent green, laid over backgrounds, from the
    resized sprite laid over them before: what compositing in one pass gives."""
    from PIL import Image

    sprite = np.zeros((96, 96, 4), np.uint8)
    sprite[..., 1] = 255
    y, x = np.mgrid[:96, :96]
    sprite[(y - 48) ** 2 + (x - 40) ** 2 < 900] = (255, 0, 0, 255)
    worst = 0.0
    for how, box in (("box", Image.Resampling.BOX), ("lanczos", Image.Resampling.LANCZOS)):
        for side in (24, 31, 64, 150):
            small = resize_rgba(sprite, side, side, how=how)
            for level in (0.0, 255.0):
                over = composite([sprite], np.full((96, 96, 3), level))
                planes = [
                    Image.fromarray(over[..., k].astype(np.float32)).resize((side, side), box)
                    for k in range(3)
                ]
                wanted = np.clip(np.stack([np.asarray(p) for p in planes], -1), 0, 255)
                found = composite([small], np.full((side, side, 3), level))
                worst = max(worst, float(np.abs(found - wanted).max()))
    return worst


def run(proof: Proof, options: argparse.Namespace) -> None:
    limit = 24 if options.tiny else None
    train, heldout = stored(options.data, limit) if options.data else drawn(limit)
    layered = [read.layers_of(m, where="a drawing") for m in train]
    unseen = [read.layers_of(m, where="a drawing") for m in heldout]
    flat, apart = [x for r in layered for x in r], [x for r in unseen for x in r]
    sizes = {"books": 2, "alpha_codes": 256, "colour_codes": 512}
    start = rgba_start(flat, **sizes, net=options.net)
    proof.found(drawings=len(train), held_out=len(heldout), steps=options.schedule.steps)
    wrong_at_start = wrong_alpha(start.codec(start.tensors), apart)
    began = time.monotonic()
    schedule = replace(options.schedule, commit=start.commit)
    training = RgbaTraining(start.config, start.tensors, start.crops, schedule)
    training.run()
    seconds = round(time.monotonic() - began)
    codec = start.codec(training.tensors())
    figures = measure(TokenizerSet({"rgba": codec}), {"rgba": heldout})["rgba"]
    proof.found(training_seconds=seconds, tokens=figures["tokens_per_record"], alpha_mae=figures["alpha_mae"])
    wrong, (hidden, batches) = wrong_alpha(codec, apart), ids_that_differ(codec, apart)
    worst = fringe()
    proof.found(wrong_alpha_at_start=wrong_at_start, wrong_alpha=wrong, ids_by_hidden_colour=hidden)
    proof.found(ids_by_batch=batches, fringe_levels=round(worst, 2))
    proof.holds(wrong_at_start == wrong == 0, "alpha of whole cells does not come back exactly")
    proof.holds(hidden == 0, f"{hidden} ids change with colour under alpha 0")
    proof.holds(batches == 0, f"{batches} ids change with the batch")
    proof.holds(worst <= FRINGE, f"a resized sprite has a fringe of {worst:.2f} levels")
    for name in GROUNDS:
        rgb = rgb_psnr(layered, unseen, name, options)
        proof.found(**{name: figures[f"psnr_{name}"], f"rgb_{name}": round(rgb, 2)})
        if not options.tiny:
            behind = rgb - figures[f"psnr_{name}"]
            proof.holds(behind <= BEHIND, f"on {name} {behind:.2f} dB behind RGB, {BEHIND} allowed")
    if not options.tiny:
        proof.holds(figures["alpha_mae"] <= ALPHA_ERROR, f"alpha is off by {figures['alpha_mae']}")
        proof.holds(seconds <= SECONDS, f"training took {seconds} s, {SECONDS} allowed")


def main() -> None:
    parser = arguments(__doc__, tiny="few drawings and steps")
    parser.add_argument("--data", type=Path, help="folder with rgba-train-*.tar and rgba-heldout-*.tar")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument(
        "--rgb-codes", type=int, default=1024, help="codes of the picture codec compared with"
    )
    options = parser.parse_args()
    options.net = NetSizes(16, 1, 1) if options.tiny else NetSizes()
    if options.tiny:
        options.steps, options.rgb_codes = 12, 64
    options.schedule = Schedule(steps=options.steps, batch=4 if options.tiny else 24)
    claim = (
        "the learned RGBA codec is within 1 dB of RGB on black, white and checker; alpha MAE ≤ 0.02, whole cells "
        "exact; hidden colour changes no id; a resized sprite has no fringe"
    )
    with prove_with(options, "codec_rgba", claim) as proof:
        run(proof, options)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
