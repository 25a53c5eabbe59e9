"""Ring attention on a 16K-token bidirectional pack, 2 and 4 ranks of one thread each, forward and backward: work per
core and second against one process of one thread running torch's scaled_dot_product_attention on each document.

Two packs: one document that fills it, and four of uneven sizes (as a picture of six layers at 640², one of 1024², and
smaller ones have), which the planned layout deals. Where ranks are more than cores they share them, and a second of a
core counts once. The rival runs while the other cores rest, which flatters it (see ring_speed), and on all of them.
"""

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
from ringweave.pretrain.models.dit import whole_documents

CLAIM = (
    "ring attention over bidirectional packs does at least 0.8 of one-thread SDPA's work per core and second"
)
HEADS, DIM, TARGET = 2, 64, 0.8  # keys that travel and work both grow with the heads
PACKS = {"one document": (1.0,), "four documents": (0.586, 0.25, 0.1, 0.064)}


def lengths(tokens: int, pack: str) -> list[int]:
    """Tokens of each document."""
    sizes = [round(share * tokens) for share in PACKS[pack]]
    return [*sizes[:-1], tokens - sum(sizes[:-1])]


def inputs(tokens: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, [tokens, heads, dim]; equal on every rank."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, HEADS, DIM, generator=g) for _ in range(4)]


def ring_step(sizes: list[int]):
    """Forward and backward of this rank's part; gives (step, this rank's slots)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    documents = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[None]
    prefix = whole_documents(torch.from_numpy(documents)).numpy()
    owner = RingLayout(size).owner(documents, prefix)
    plan = plan_ring(documents, owner, prefix, rank=rank, ring=size)
    ring = Ring(rank, size, dist.group.WORLD)
    mine = torch.from_numpy(np.flatnonzero(owner[0] == rank))
    q, k, v, dout = (x[mine] for x in inputs(sum(sizes)))
    parts = [x.requires_grad_() for x in (q, k, v)]

    def step() -> tuple[torch.Tensor, ...]:
        out, _ = ring_attention(*parts, plan=plan, ring=ring)
        return torch.autograd.grad(out, parts, dout)

    return step, mine


def sdpa_step(sizes: list[int]):
    """Every document in torch's own kernel; gives the gradients [tokens, heads, dim]."""
    spans = [[y.transpose(0, 1)[None].contiguous() for y in x.split(sizes)] for x in inputs(sum(sizes))]
    documents = [(*(x.requires_grad_() for x in (q, k, v)), dout) for q, k, v, dout in zip(*spans)]

    def step() -> list[tuple[torch.Tensor, ...]]:
        found = []
        for q, k, v, dout in documents:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            found.append(torch.autograd.grad(out, (q, k, v), dout))
        return found

    return step


def measure(tokens: int, cores: int, runs: int) -> dict[str, tuple[list[float], ...]]:
    """Of each pack what `measure_pack` says."""
    return {pack: measure_pack(lengths(tokens, pack), cores, runs) for pack in PACKS}


def measure_pack(sizes: list[int], cores: int, runs: int) -> tuple[list[float], ...]:
    """Packs per core and second of (ring, SDPA while other cores rest, SDPA on all of them), as rank 0 sees them.

    cores: those that the ranks use; ranks 0 to cores - 1 are on one each.
    """
    ours, mine = ring_step(sizes)
    rival = sdpa_step(sizes)
    if sum(sizes) <= 2048:
        for a, b in zip(ours(), zip(*rival()), strict=True):
            whole = torch.cat([x[0].transpose(0, 1) for x in b])
            assert (a - whole[mine]).abs().max() < 1e-4

    def both() -> float:
        dist.barrier()
        started = time.perf_counter()
        ours()
        dist.barrier()
        return 1 / (time.perf_counter() - started) / cores

    def sdpa(processes: int) -> float:
        dist.barrier()
        started = time.perf_counter()
        if dist.get_rank() < processes:
            rival()
        dist.barrier()
        return 1 / (time.perf_counter() - started)

    return bench.paired([both, lambda: sdpa(1), lambda: sdpa(cores)], runs=runs)


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    tokens = 1024 if options.tiny else 16384
    available, unit, parts = len(bench.cores()), "packs/s/core", []
    for ranks in (2,) if options.tiny else (2, 4):
        cores = min(ranks, available)
        (found, *_) = bench.pinned_ranks(ranks, measure, tokens, cores, options.runs)
        for pack, (ours, alone, busy) in found.items():
            for beside, rival in (("the other cores at rest", alone), ("every core busy with it", busy)):
                name = f"{pack}, {ranks} ranks, SDPA with {beside}"
                parts.append(bench.Part(name, ours, rival, unit, TARGET, "higher"))
    bench.emit(
        CLAIM, *parts, cores_used=available,
        sizes={"tokens": tokens, "heads": HEADS, "dim": DIM, "packs": {p: lengths(tokens, p) for p in PACKS}},
    )  # fmt: skip


if __name__ == "__main__":
    main()
