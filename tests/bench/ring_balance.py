"""Attention of a packed mix at 32K on a ring of 4, forward and backward: the slowest rank's time under the planned
layout against zigzag and contiguous. Each rank's blocks run alone, one rank after the other (no communication): what
is compared is the balance of the layouts, on however few cores."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import _harness as bench

from ringweave.kernels.attention import block_backward, block_forward
from ringweave.parallel.ring_layout import RingLayout
from ringweave.parallel.ring_plan import cut_pieces, plan_pieces
from ringweave.parallel.ring_price import price_layout

CLAIM = "the planned layout's slowest rank is at least 1.3 times as fast as zigzag's on a packed mix"
RING, HEADS, KV, DIM = 4, 4, 2, 64


def mix(context: int) -> tuple[np.ndarray, np.ndarray]:
    """One document of 3/8 of the context, two-way ones of 1/16, and short causal ones: [1, context] each."""
    rng = np.random.RandomState(0)
    lengths, two_way = [3 * context // 8] + [context // 16] * 3, [False, True, True, True]
    while sum(lengths) < context - 64:
        lengths.append(int(min(rng.lognormal(5.5, 1.0) + 8, context - sum(lengths))))
        two_way.append(False)
    order = rng.permutation(len(lengths))
    lengths, two_way = [lengths[i] for i in order], [two_way[i] for i in order]
    documents = np.full(context, -1, np.int32)
    documents[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
    prefix = np.zeros(context, np.int32)
    prefix[: sum(lengths)] = np.repeat(np.where(two_way, lengths, 0), lengths)
    return documents[None], prefix[None]


def slowest(kind: str, documents: np.ndarray, prefix: np.ndarray):
    """A step that runs every rank's blocks and gives the seconds of the slowest."""
    owner = RingLayout(RING, kind, width=HEADS * DIM).owner(documents, prefix)
    pieces = cut_pieces(documents, owner, prefix, ring=RING)
    plans = [plan_pieces(pieces, rank=r, ring=RING) for r in range(RING)]
    g = torch.Generator().manual_seed(0)
    tokens = documents.size // RING
    q, dout = (torch.randn(tokens, HEADS, DIM, generator=g) for _ in range(2))
    k, v = (torch.randn(tokens, KV, DIM, generator=g) for _ in range(2))
    lse = torch.full((tokens, HEADS), 10.0)

    def step() -> float:
        worst = 0.0
        for plan in plans:
            started = time.perf_counter()
            for hop in range(RING):
                for b in plan.blocks(hop):
                    rows, keys = slice(b.q0, b.q1), slice(b.k0, b.k1)
                    band = {"lower": b.lower, "upper": b.upper, "scale": 0.125, "backend": "aten_cpu"}
                    out, _ = block_forward(q[rows], k[keys], v[keys], **band)
                    block_backward(dout[rows], q[rows], k[keys], v[keys], out, lse[rows], **band)
            worst = max(worst, time.perf_counter() - started)
        return worst

    return step, price_layout(documents, owner, prefix, ring=RING, width=HEADS * DIM)


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    documents, prefix = mix(2048 if options.tiny else 32768)
    bench.one_thread()
    steps = {
        kind: slowest(kind, documents, prefix) for kind in ("planned", "zigzag", "contiguous", "per_document")
    }
    timed = dict(zip(steps, bench.paired([s for s, _ in steps.values()], runs=options.runs), strict=True))
    speed = {kind: [1 / x for x in seconds] for kind, seconds in timed.items()}
    bench.emit(
        CLAIM,
        bench.Part("beside zigzag", speed["planned"], speed["zigzag"], "packs/s", 1.3, "higher"),
        bench.Part("beside contiguous", speed["planned"], speed["contiguous"], "packs/s", 1.3, "higher"),
        sizes={"tokens": documents.size, "documents": int(documents.max()) + 1, "ring": RING},
        layouts={
            kind: {"attention": round(p.attention, 3), "traffic": round(p.traffic, 3)}
            for kind, (_, p) in steps.items()
        },
    )


if __name__ == "__main__":
    main()
