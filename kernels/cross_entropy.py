"""Head and cross-entropy in one, a chunk of tokens at a time: no `[tokens, vocabulary]` tensor ever exists.

Two ways to the gradients. When the caller says beforehand what it will hand back for each token (`expected`:
in training coefficient x weight, known before the forward), the forward makes the gradients while a chunk's
logits are there: three matmuls in all, as whole logits need (Liger, Hsu et al. 2024). Otherwise, or when
something else comes back, the backward recomputes each chunk's logits from the hidden states and the saved
LSE: four matmuls (Cut Cross-Entropy, Wijmans et al. 2024). Peak memory is one chunk x V on either way.

The vocabulary may be sharded: pass this rank's rows of the head, where they start, and the two collectives;
this file itself knows no process group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Combines a tensor over the ranks that hold the other rows of the head.
Collective = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Which rows of the head these are, and how to reach the ranks that hold the others.

    gather: x -> [ranks, *x.shape], the same on every rank; add: x -> the sum over ranks, in a tensor of its own.
    Every rank of a shard group calls them in the same order, provided targets and `expected` are equal on all.
    """

    start: int
    gather: Collective
    add: Collective


class _Scores:
    """The logits of one chunk at a time, in buffers that all chunks of a pass share."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk: int, shard: VocabShard | None) -> None:
        self.hidden, self.weight, self.shard = hidden, weight, shard
        self.start = shard.start if shard else 0
        self.wide = _wide(hidden.dtype)
        shape = (min(chunk, hidden.shape[0]), weight.shape[0])
        self.buffer = torch.empty(shape, dtype=self.wide, device=hidden.device)
        # Narrow products are widened for the exponentials and narrowed again for the gradient matmuls.
        self.narrow = None if hidden.dtype == self.wide else torch.empty_like(self.buffer, dtype=hidden.dtype)

    def logits(self, h: Tensor) -> Tensor:
        """[n, V_local] in fp32 or wider, valid until the next call."""
        into = self.buffer if self.narrow is None else self.narrow
        torch.mm(h, self.weight.t(), out=into[: h.shape[0]])
        logits = self.buffer[: h.shape[0]]
        return logits if self.narrow is None else logits.copy_(self.narrow[: h.shape[0]])

    def local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets as row numbers of this shard (clamped into it), and whether they lie in it."""
        rows = targets.long() - self.start
        inside = (rows >= 0) & (rows < self.weight.shape[0])
        return rows.clamp(0, max(self.weight.shape[0] - 1, 0)), inside

    def measure(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """([2, n]: this shard's LSE and its logit of the target or 0, [n]: its largest logit).

        Turns `logits` into exp(logits - largest) on the way.
        """
        if logits.shape[1] == 0:  # a shard without rows
            stats = torch.zeros(2, logits.shape[0], dtype=self.wide, device=logits.device)
            stats[0] = float("-inf")
            return stats, stats[0]
        top = logits.amax(-1)
        at, inside = self.local(targets)
        hit = torch.where(inside, logits.gather(1, at[:, None]).squeeze(1), 0.0)
        total = logits.sub_(top[:, None]).exp_().sum(-1)
        return torch.stack([top + torch.log(total), hit]), top

    def combine(self, stats: Tensor) -> tuple[Tensor, Tensor]:
        """(LSE, target's logit), each [n], of the whole vocabulary: one collective."""
        if self.shard is None:
            return stats[0], stats[1]
        parts = self.shard.gather(stats)
        return torch.logsumexp(parts[:, 0], 0), parts[:, 1].sum(0)

    def dlogits(self, probs: Tensor, scale: Tensor, targets: Tensor, g: Tensor) -> Tensor:
        """g x (scale x probs - onehot(targets)) in the hidden states' dtype, in place of `probs`."""
        probs.mul_((scale * g)[:, None])
        if probs.shape[1]:
            at, inside = self.local(targets)
            probs.scatter_add_(1, at[:, None], torch.where(inside, -g, 0.0)[:, None])
        return probs if self.narrow is None else self.narrow[: probs.shape[0]].copy_(probs)


class _Gradients:
    """dhidden of some rows and dweight, filled chunk by chunk; None where nobody asks for it."""

    def __init__(self, scores: _Scores, rows: int, *, hidden: bool, weight: bool) -> None:
        self.weight = scores.weight
        # A sum over shards is taken in fp32; a single share is rounded at once.
        dtype = scores.wide if scores.shard else scores.hidden.dtype
        self.dhidden = self.weight.new_empty(rows, self.weight.shape[1], dtype=dtype) if hidden else None
        self.dweight = torch.zeros_like(self.weight, dtype=scores.wide) if weight else None

    def add(self, at: int, dlogits: Tensor, h: Tensor) -> None:
        """Take in the chunk whose rows begin at `at`."""
        if self.dhidden is not None:
            into = self.dhidden[at : at + h.shape[0]]
            if into.dtype == h.dtype:
                torch.mm(dlogits, self.weight, out=into)
            else:
                into.copy_(dlogits @ self.weight)
        if self.dweight is not None:
            if self.dweight.dtype == h.dtype:
                self.dweight.addmm_(dlogits.t(), h)
            else:
                self.dweight += dlogits.t() @ h

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """(dhidden of the rows, dweight in the weight's dtype)."""
        return self.dhidden, None if self.dweight is None else self.dweight.to(self.weight.dtype)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, expected, chunk, shard):  # type: ignore[override]
        scores = _Scores(hidden, weight, chunk, shard)
        rows = torch.nonzero(targets >= 0).squeeze(1)
        now = rows.new_empty(0)
        if expected is not None:  # rows whose gradients are made now come first
            wanted = expected[rows] != 0
            now = rows[wanted]
            rows = torch.cat([now, rows[~wanted]])
        lse = torch.empty(rows.shape[0], dtype=scores.wide, device=hidden.device)
        hit = torch.empty_like(lse)
        stored: tuple[Tensor | None, Tensor | None] = (None, None)
        if expected is not None:
            want_hidden, want_weight = ctx.needs_input_grad[:2]
            grads = _Gradients(scores, now.shape[0], hidden=want_hidden, weight=want_weight)
            for at in range(0, now.shape[0], chunk):
                some = now[at : at + chunk]
                part = slice(at, at + some.shape[0])
                h, t = hidden[some], targets[some]
                probs = scores.logits(h)
                stats, top = scores.measure(probs, t)
                lse[part], hit[part] = scores.combine(stats)
                grads.add(at, scores.dlogits(probs, torch.exp(top - lse[part]), t, expected[some]), h)
            stored = grads.results()
        if rows.shape[0] > now.shape[0]:  # of the others the loss alone: one collective for all of them
            later = rows[now.shape[0] :]
            stats = torch.empty(2, later.shape[0], dtype=scores.wide, device=hidden.device)
            for at in range(0, later.shape[0], chunk):
                some = later[at : at + chunk]
                stats[:, at : at + chunk] = scores.measure(scores.logits(hidden[some]), targets[some])[0]
            lse[now.shape[0] :], hit[now.shape[0] :] = scores.combine(stats)
        nll = torch.zeros(targets.shape[0], dtype=scores.wide, device=hidden.device)
        nll[rows] = lse - hit
        ctx.save_for_backward(hidden, weight, targets, expected, rows, lse, *stored)
        ctx.chunk, ctx.shard, ctx.ready = chunk, shard, now.shape[0]
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, dnll):  # type: ignore[override]
        hidden, weight, targets, expected, rows, lse, dhidden, dweight = ctx.saved_tensors
        g = None if expected is None else _common_factor(dnll[rows], expected[rows])
        if g is not None:
            rows = rows[: ctx.ready]
            if g != 1.0:
                dhidden, dweight = (None if x is None else x * g for x in (dhidden, dweight))
        else:
            dhidden = dweight = None  # lets the stored ones go, unless the graph is kept
            scores = _Scores(hidden, weight, ctx.chunk, ctx.shard)
            live = dnll[rows] != 0
            rows, lse = rows[live], lse[live]
            want_hidden, want_weight = ctx.needs_input_grad[:2]
            grads = _Gradients(scores, rows.shape[0], hidden=want_hidden, weight=want_weight)
            for at in range(0, rows.shape[0], ctx.chunk):
                some = rows[at : at + ctx.chunk]
                h = hidden[some]
                probs = scores.logits(h).sub_(lse[at : at + ctx.chunk, None]).exp_()
                one = torch.ones_like(lse[at : at + ctx.chunk])
                grads.add(at, scores.dlogits(probs, one, targets[some], dnll[some]), h)
            dhidden, dweight = grads.results()
        if dhidden is not None:
            # The only collective here, on either way, so ranks cannot fall out of step.
            whole = dhidden if ctx.shard is None else ctx.shard.add(dhidden)
            dhidden = torch.zeros_like(hidden).index_copy_(0, rows, whole.to(hidden.dtype))
        return dhidden, dweight, None, None, None, None


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int = 512,
    expected: Tensor | None = None,
    shard: VocabShard | None = None,
) -> Tensor:
    """Negative log-likelihood in nats of each token, [T] in fp32 (fp64 for fp64 inputs); 0 where targets < 0.

    hidden [T, D], weight [V, D] (or the rows of `shard`), targets [T] global ids. Rows without a target are
    never read, so what they hold (NaN too) changes nothing.

    expected [T]: the gradient that will come back for each token, or anything proportional to it. Then the
    forward makes the gradients and costs no second pass over the logits; a gradient that is not a multiple of
    it is still answered rightly, by recomputing. Needs the dtype of the result; a narrower one (a wrapper cast
    it) is not what will come back, so it is ignored.

    Raises ValueError for a chunk below 1 or shapes that do not fit.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if hidden.shape != (*targets.shape, weight.shape[1]) or (
        expected is not None and expected.shape != targets.shape
    ):
        given = None if expected is None else tuple(expected.shape)
        raise ValueError(
            f"want hidden [T, D], weight [V, D], targets [T] and expected [T] or None; got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)}, {tuple(targets.shape)} and {given}"
        )
    if expected is not None and (expected.dtype != _wide(hidden.dtype) or not torch.is_grad_enabled()):
        expected = None
    if expected is not None:
        expected = expected.detach()
    return _HeadCrossEntropy.apply(hidden, weight, targets, expected, chunk, shard)


def head_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same from whole logits: the slow truth of the tests."""
    logits = hidden @ weight.t()
    return torch.nn.functional.cross_entropy(
        logits.to(_wide(hidden.dtype)), targets.long(), ignore_index=-1, reduction="none"
    )


def _common_factor(got: Tensor, expected: Tensor) -> float | None:
    """g with got = g x expected, within the rounding of one product; None if there is none."""
    if torch.equal(got, expected):
        return 1.0
    at = expected.abs().argmax()
    g = got[at] / expected[at]
    slack = 4 * torch.finfo(got.dtype).eps * got.abs()
    fits = (got - g * expected).abs() <= slack  # false where anything is NaN, as 0/0 is
    return float(g) if bool(fits.all()) else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
