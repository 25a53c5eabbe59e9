"""Training tokens per second of the packed diffusion transformer against diffusers' `QwenImageTransformer2DModel`.

The same documents of 64 to 2,048 tokens, forward, backward and AdamW in fp32 on one thread, the same parameters and
noise. The rivals, with no pass that needs no gradient and gradients set to None after each update:

alone: one document a forward pass, gradients added up over the step. Each step must give the loss of ours.
padded: the documents of a pack as one batch. The stock class takes one shape for a whole batch and masks words only, so
every document is filled up with zero latents to the tokens of the largest and has that one's positions; the loss leaves
them out, the attention does not. That is the cheaper of the ways to pad (a canvas of the largest height and width has
more tokens), and its losses are not ours. Only real tokens count. "sorted" is the same in batches of four of like
length, which a loader that waits for the whole step can make; it is told, not claimed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import _dit as dit
import _harness as bench

CLAIM = "tokens/s of a packed DiT against stock diffusers, a document at a time and in padded batches"
SORTED = 4
Batches = list[dict[str, Any]]


def padded(documents: Sequence[dit.Alone]) -> dict[str, Any]:
    """A batch of the stock class, filled up to the largest; of one document it is that document, without a mask."""
    largest = max(documents, key=lambda d: len(d.latents))
    rows, cells = len(documents), len(largest.latents)
    words = max(len(d.words) for d in documents)
    latents = torch.zeros(rows, cells, largest.latents.shape[1])
    velocity, weight = torch.zeros_like(latents), torch.zeros(rows, cells)
    text = torch.zeros(rows, words, largest.words.shape[1])
    mask = torch.zeros(rows, words, dtype=torch.bool)
    for row, d in enumerate(documents):
        latents[row, : len(d.latents)], velocity[row, : len(d.latents)] = d.latents, d.velocity
        weight[row, : len(d.latents)] = 1.0
        text[row, : len(d.words)], mask[row, : len(d.words)] = d.words, True
    given = {
        "hidden_states": latents, "encoder_hidden_states": text,
        "encoder_hidden_states_mask": None if mask.all() else mask,
        "timestep": torch.tensor([d.sigma for d in documents]), "img_shapes": [[largest.grid]] * rows,
    }  # fmt: skip
    return {"given": given, "velocity": velocity, "weight": weight}


def rival_step(steps: Sequence[Batches], size: dit.Size) -> Callable[[], float]:
    """A training step of the stock class over the batches of each step; gives the loss."""
    model = dit.stock_model(size)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **dit.ADAMW)
    calls = iter(range(10**9))

    def step() -> float:
        batches, total = steps[next(calls) % len(steps)], 0.0
        targets = float(sum(b["weight"].sum() for b in batches))
        for batch in batches:
            out = model(**batch["given"], return_dict=False)[0]
            errors = (out - batch["velocity"]).square().mean(-1)
            loss = (errors * batch["weight"]).sum() / targets
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def by_length(packs: Sequence[Sequence[dit.Alone]]) -> Batches:
    """All documents of a step, the longest first, in batches of four."""
    order = sorted((d for some in packs for d in some), key=lambda d: -d.tokens)
    return [padded(order[at : at + SORTED]) for at in range(0, len(order), SORTED)]


def slots(batches: Batches) -> int:
    """Tokens that a step of the stock class computes, padding included."""
    given = [b["given"] for b in batches]
    return sum(
        g["hidden_states"].shape[0] * (g["hidden_states"].shape[1] + g["encoder_hidden_states"].shape[1])
        for g in given
    )


def measure(size: dit.Size, runs: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Tokens per second of each side in each run, and facts about the documents."""
    packs = dit.make_steps(size, runs + 1)
    batches = [dit.make_batch(some, size) for some in packs]
    documents = [dit.documents_of(some, batch) for some, batch in zip(packs, batches)]
    rivals = {
        "alone": [[padded([d]) for pack in step for d in pack] for step in documents],
        "padded": [[padded(pack) for pack in step] for step in documents],
        "sorted": [by_length(step) for step in documents],
    }
    sides = {"ours": dit.our_step(batches, size)}
    sides |= {name: rival_step(steps, size) for name, steps in rivals.items()}
    tokens = [float(batch.real_tokens) for batch in batches]
    losses: dict[str, list[float]] = {name: [] for name in sides}

    def timed(name: str) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            losses[name].append(sides[name]())
            return tokens[len(losses[name]) - 1] / (time.perf_counter() - started)

        return run

    speeds = bench.paired([timed(name) for name in sides], runs=runs)
    np.testing.assert_allclose(losses["alone"], losses["ours"], rtol=2e-5)
    sizes = [d.tokens for step in documents for pack in step for d in pack]
    facts = {
        "documents": {"a_step": len(sizes) / len(packs), "mean_tokens": round(float(np.mean(sizes)))},
        "real_share": {
            "ours": round(sum(tokens) / sum(b.slots for b in batches), 3),
            **{n: round(sum(tokens) / sum(map(slots, rivals[n])), 3) for n in ("padded", "sorted")},
        },
    }
    return dict(zip(sides, speeds, strict=True)), facts


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    reason = bench.missing("diffusers")
    if reason:
        return bench.skip(CLAIM, reason)
    bench.one_thread()
    size = dit.TINY if options.tiny else dit.Size()
    speeds, facts = measure(size, options.runs)
    ours, unit = speeds["ours"], "tokens/s"
    told = bench.Part("sorted", ours, speeds["sorted"], unit, 1.0, "higher")
    return bench.emit(
        CLAIM,
        bench.Part("a document at a time", ours, speeds["alone"], unit, 1.2, "higher"),
        bench.Part("padded, a pack's documents a batch", ours, speeds["padded"], unit, 1.5, "higher"),
        versions=("diffusers",), sizes=asdict(size), parameters=size.shape().parameters, **facts,
        beside_sorted_batches=told.to_json()["ratio"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
