"""Head and cross-entropy in one, a chunk of tokens at a time: no `[tokens, vocabulary]` tensor ever exists.

The backward pass recomputes each chunk's logits from the hidden states and the saved LSE (as Cut
Cross-Entropy, Wijmans et al. 2024, and Liger do), so peak memory is one chunk x V whatever the context is.

The vocabulary may be sharded: pass this rank's rows of the head, where they start, and the two reductions;
this file itself knows no process group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, vocab_start, reduce_max, reduce_sum):  # type: ignore[override]
        rows = torch.nonzero(targets >= 0).squeeze(1)
        nll = torch.zeros(targets.shape[0], dtype=_wide(hidden.dtype), device=hidden.device)
        lse_rows = torch.empty(rows.shape[0], dtype=nll.dtype, device=hidden.device)
        for at in range(0, rows.shape[0], chunk):
            some = rows[at : at + chunk]
            logits = (hidden[some] @ weight.t()).to(nll.dtype)
            top = reduce_max(logits.amax(-1))
            local, inside = _local(targets[some], vocab_start, weight.shape[0])
            hit = torch.where(inside, logits.gather(1, local[:, None]).squeeze(1), 0.0)
            both = reduce_sum(torch.stack([torch.exp(logits - top[:, None]).sum(-1), hit]))
            lse = top + torch.log(both[0])
            lse_rows[at : at + chunk] = lse
            nll[some] = lse - both[1]
        ctx.save_for_backward(hidden, weight, targets, rows, lse_rows)
        ctx.chunk, ctx.vocab_start, ctx.reduce_sum = chunk, vocab_start, reduce_sum
        return nll

    @staticmethod
    def backward(ctx, dnll):  # type: ignore[override]
        hidden, weight, targets, rows, lse_rows = ctx.saved_tensors
        dhidden = torch.zeros_like(hidden, dtype=lse_rows.dtype)
        dweight = torch.zeros_like(weight, dtype=lse_rows.dtype)
        for at in range(0, rows.shape[0], ctx.chunk):
            some = rows[at : at + ctx.chunk]
            h = hidden[some]
            probs = torch.exp((h @ weight.t()).to(lse_rows.dtype) - lse_rows[at : at + ctx.chunk, None])
            local, inside = _local(targets[some], ctx.vocab_start, weight.shape[0])
            probs.scatter_add_(1, local[:, None], -inside.to(probs.dtype)[:, None])
            probs.mul_(dnll[some][:, None])
            probs = probs.to(hidden.dtype)
            dhidden[some] = (probs @ weight).to(dhidden.dtype)
            dweight += probs.t() @ h
        dhidden = ctx.reduce_sum(dhidden)
        return dhidden.to(hidden.dtype), dweight.to(weight.dtype), None, None, None, None, None


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int = 512,
    vocab_start: int = 0,
    reduce_max: Reduce = _same,
    reduce_sum: Reduce = _same,
) -> Tensor:
    """Negative log-likelihood in nats of each token, [T] in fp32 (fp64 for fp64 inputs); 0 where targets < 0.

    hidden [T, D], weight [V_local, D] (rows vocab_start..vocab_start + V_local of the head), targets [T] global
    ids. `reduce_max` and `reduce_sum` combine a tensor over the ranks that hold the other rows.
    """
    return _HeadCrossEntropy.apply(hidden, weight, targets, chunk, vocab_start, reduce_max, reduce_sum)


def head_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same from whole logits: the slow truth of the tests."""
    logits = hidden @ weight.t()
    return torch.nn.functional.cross_entropy(
        logits.to(_wide(hidden.dtype)), targets.long(), ignore_index=-1, reduction="none"
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _local(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Targets as row numbers of this shard, and whether they lie in it."""
    local = targets.long() - start
    inside = (local >= 0) & (local < size)
    return local.clamp(0, size - 1), inside
