"""Ring self-attention as first published (Li et al. 2021, "Sequence Parallelism"): a second, plain reference.

Keys go round once and every rank fills its rows of the score matrix, [T, S] in full; the softmax is taken; then values
go round. Memory grows with T·S, which is what RingAttention's running merge avoids; here it buys simplicity: autograd
differentiates it, and it shares no code with `parallel/ring.py` but the messages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringweave.parallel.ring_feed import Ring, wait


class _Rotate(torch.autograd.Function):
    """To the right neighbour; gradients come back from it."""

    @staticmethod
    def forward(ctx, x, rows: int, ring: Ring):  # type: ignore[override]
        ctx.ring, ctx.shape = ring, x.shape
        return _pass(x, (rows, *x.shape[1:]), ring, 1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return _pass(grad, ctx.shape, ctx.ring, -1), None, None


def _pass(x: Tensor, shape: Sequence[int], ring: Ring, step: int) -> Tensor:
    incoming = x.new_empty(shape)
    wait(ring.exchange([(x.contiguous(), ring.rank + step)], [(incoming, ring.rank - step)]))
    return incoming


def ring_self_attention(
    q: Tensor, k: Tensor, v: Tensor, *, allowed: Sequence[Tensor], ring: Ring, scale: float
) -> Tensor:
    """Attention of this rank's rows over all ranks' keys: q [T, H, D], k and v [T, H, D] -> [T, H, D].

    allowed: for each rank the boolean mask [T, T of that rank] between these queries and its keys. Every query must
    see a key. Ranks may hold different numbers of tokens.
    """
    scores: list[Tensor] = []
    order = [(ring.rank - hop) % ring.size for hop in range(ring.size)]
    for hop, source in enumerate(order):
        if hop:
            k = _Rotate.apply(k, allowed[source].shape[1], ring)
        part = torch.einsum("qhd,khd->hqk", q, k) * scale
        scores.append(part.masked_fill(~allowed[source], float("-inf")))
    weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1).split([s.shape[-1] for s in scores], dim=-1)
    out = torch.einsum("hqk,khd->qhd", weights[0], v)
    for hop, source in enumerate(order[1:], start=1):
        v = _Rotate.apply(v, allowed[source].shape[1], ring)
        out = out + torch.einsum("hqk,khd->qhd", weights[hop], v)
    return out
