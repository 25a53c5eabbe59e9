"""Ring attention over gloo on 2 ranks, 8K causal, 8 heads x 64, forward and backward, against the package
ring-attention-pytorch on the same inputs (the faster of its plain and its striped form)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import _harness as bench
import ring_speed

CLAIM = "ring attention is at least 6 times as fast as ring-attention-pytorch over gloo"


def rival_step(tokens: int, striped: bool):
    """The package's ring on this rank's part of the sequence."""
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

    rank, size = dist.get_rank(), dist.get_world_size()
    mine = torch.arange(rank, tokens, size) if striped else torch.arange(tokens).chunk(size)[rank]
    q, k, v, dout = (x[mine][None].contiguous() for x in ring_speed.inputs(tokens))
    parts = [x.requires_grad_() for x in (q, k, v)]

    def step() -> tuple[torch.Tensor, ...]:
        out = ring_flash_attn(*parts, causal=True, ring_reduce_col=True, striped_ring_attn=striped)
        return torch.autograd.grad(out, parts, dout)

    return step, mine


def measure(tokens: int, runs: int) -> tuple[list[float], ...]:
    """Seconds of (ours, plain rival, striped rival), the last rank's."""
    ours, own = ring_speed.ring_step(tokens)
    rivals = [rival_step(tokens, striped) for striped in (False, True)]
    want = ring_speed.sdpa_step(tokens)()
    for step, mine in ((ours, own), *rivals):  # all of them right, or there is nothing to compare
        for a, b in zip(step(), want, strict=True):
            flat = a if a.dim() == 3 else a[0]
            assert (flat - b[0].transpose(0, 1)[mine]).abs().max() < 1e-3

    def timed(step) -> float:
        dist.barrier()
        started = time.perf_counter()
        step()
        dist.barrier()
        return time.perf_counter() - started

    return bench.paired([lambda s=s: timed(s) for s, _ in ((ours, own), *rivals)], runs=runs, warm_up=0)


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    if reason := bench.missing("ring_attention_pytorch"):
        bench.skip(CLAIM, reason)
        return
    tokens = 1024 if options.tiny else 8192
    ours, plain, striped = bench.pinned_ranks(2, measure, tokens, options.runs)[0]
    faster = min(plain, striped, key=sum)
    bench.emit(
        CLAIM,
        bench.Part("time", [1 / x for x in ours], [1 / x for x in faster], "sequences/s", 6.0, "higher"),
        versions=("ring-attention-pytorch",),
        sizes={"tokens": tokens, "heads": ring_speed.HEADS, "dim": ring_speed.DIM, "ranks": 2},
        rival_form="striped" if faster is striped else "plain",
    )


if __name__ == "__main__":
    main()
