"""Ring attention over gloo on 2 ranks, 8K causal, 8 heads x 64, forward and backward, against the package
ring-attention-pytorch on the same inputs (the faster of its plain and its striped form).

Its gradients of keys and values are wrong on a ring of two (0.5.20: `ring_pass` gives a pair, which its backward takes
for dK and dV), so the line carries every side's error; its time is that of the same arithmetic."""

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
    bucket = len(mine) if striped else 1024  # its striped mask is right for one bucket a rank only

    def step() -> tuple[torch.Tensor, ...]:
        out = ring_flash_attn(
            *parts, causal=True, ring_reduce_col=True, striped_ring_attn=striped, bucket_size=bucket
        )
        return torch.autograd.grad(out, parts, dout)

    return step, mine


def measure(tokens: int, runs: int) -> tuple[list[float], ...]:
    """Seconds of (ours, plain rival, striped rival), the last rank's; and each one's largest gradient error."""
    ours, own = ring_speed.ring_step(tokens)
    rivals = [rival_step(tokens, striped) for striped in (False, True)]
    want = [x[0].transpose(0, 1) for x in ring_speed.sdpa_step(tokens)()]
    wrong = []
    for step, mine in ((ours, own), *rivals):
        errors = [
            float((a.reshape(-1, *b.shape[1:]) - b[mine]).abs().max())
            for a, b in zip(step(), want, strict=True)
        ]
        wrong.append(max(errors))
    assert wrong[0] < 1e-3, wrong

    def timed(step) -> float:
        dist.barrier()
        started = time.perf_counter()
        step()
        dist.barrier()
        return time.perf_counter() - started

    sides = [lambda s=s: timed(s) for s, _ in ((ours, own), *rivals)]
    return *bench.paired(sides, runs=runs, warm_up=0), wrong


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    if reason := bench.missing("ring_attention_pytorch"):
        bench.skip(CLAIM, reason)
        return
    tokens = 1024 if options.tiny else 8192
    ours, plain, striped, wrong = bench.pinned_ranks(2, measure, tokens, options.runs)[0]
    faster = min(plain, striped, key=sum)
    bench.emit(
        CLAIM,
        bench.Part("time", [1 / x for x in ours], [1 / x for x in faster], "sequences/s", 6.0, "higher"),
        versions=("ring-attention-pytorch",),
        sizes={"tokens": tokens, "heads": ring_speed.HEADS, "dim": ring_speed.DIM, "ranks": 2},
        rival_form="striped" if faster is striped else "plain",
        largest_gradient_error=dict(zip(("ours", "plain", "striped"), wrong, strict=True)),
    )


if __name__ == "__main__":
    main()
