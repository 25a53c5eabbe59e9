"""Ring attention on 2 ranks of one thread each, 16K causal, 8 heads x 64, forward and backward: work per core and
second against one process of one thread running torch's scaled_dot_product_attention on the same inputs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import _harness as bench

from ringweave.parallel.ring import Ring, ring_attention
from ringweave.parallel.ring_layout import RingLayout
from ringweave.parallel.ring_plan import plan_ring

CLAIM = "ring attention does at least 0.95 of one-thread SDPA's work per core and second"
HEADS, DIM = 8, 64


def inputs(tokens: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, [tokens, heads, dim]; equal on every rank."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, HEADS, DIM, generator=g) for _ in range(4)]


def ring_step(tokens: int):
    """Forward and backward of this rank's part; gives (step, gradients' getter)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    documents = np.zeros((1, tokens), np.int32)
    owner = RingLayout(size, "zigzag").owner(documents)
    plan = plan_ring(documents, owner, documents, rank=rank, ring=size)
    ring = Ring(rank, size, dist.group.WORLD)
    mine = torch.from_numpy(np.flatnonzero(owner[0] == rank))
    q, k, v, dout = (x[mine] for x in inputs(tokens))
    parts = [x.requires_grad_() for x in (q, k, v)]

    def step() -> tuple[torch.Tensor, ...]:
        out, _ = ring_attention(*parts, plan=plan, ring=ring)
        return torch.autograd.grad(out, parts, dout)

    return step, mine


def sdpa_step(tokens: int):
    """The whole sequence in torch's own kernel."""
    q, k, v, dout = (x.transpose(0, 1)[None].contiguous() for x in inputs(tokens))
    parts = [x.requires_grad_() for x in (q, k, v)]

    def step() -> tuple[torch.Tensor, ...]:
        out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        return torch.autograd.grad(out, parts, dout)

    return step


def measure(tokens: int, runs: int) -> tuple[list[float], ...]:
    """Sequences per core and second of (ring, SDPA while the other core rests, SDPA on both), as rank 0 sees them."""
    ours, mine = ring_step(tokens)
    rival = sdpa_step(tokens)
    cores = dist.get_world_size()
    if tokens <= 2048:
        for a, b in zip(ours(), rival(), strict=True):
            assert (a - b[0].transpose(0, 1)[mine]).abs().max() < 1e-3

    def both() -> float:
        dist.barrier()
        started = time.perf_counter()
        ours()
        dist.barrier()
        return 1 / (time.perf_counter() - started) / cores

    def sdpa(everywhere: bool) -> float:
        dist.barrier()
        started = time.perf_counter()
        if everywhere or dist.get_rank() == 0:
            rival()
        alone = time.perf_counter() - started
        dist.barrier()
        return 1 / (time.perf_counter() - started if everywhere else alone)

    return bench.paired([both, lambda: sdpa(False), lambda: sdpa(True)], runs=runs)


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    tokens = 1024 if options.tiny else 16384
    ours, alone, busy = bench.pinned_ranks(2, measure, tokens, options.runs)[0]
    unit = "sequences/s/core"
    bench.emit(
        CLAIM,
        bench.Part("beside SDPA with the other core at rest", ours, alone, unit, 0.95, "higher"),
        bench.Part("beside SDPA on every core at once", ours, busy, unit, 0.95, "higher"),
        sizes={"tokens": tokens, "heads": HEADS, "dim": DIM, "ranks": 2},
    )


if __name__ == "__main__":
    main()
