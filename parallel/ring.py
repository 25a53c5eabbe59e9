"""Ring attention: queries stay, keys and values travel (Liu et al. 2023), along any `RingPlan`.

Outputs, dQ, dK and dV are accumulated in fp32 (fp64 for fp64 inputs) and returned in the inputs' dtype. Keys of the
next hop travel while this hop is computed. A ring of one is plain packed attention, so every layout runs this code.

Forward and backward are custom operators, `ringweave::packed_attention` and its `_backward`: activation
checkpointing can then keep an operator's outputs by its name, and no key travels twice.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ringweave.kernels.attention import block_backward, block_forward, default_backend, merge_
from ringweave.parallel.ring_feed import Form, Ring, make_drain, make_feed
from ringweave.parallel.ring_plan import RingPlan

__all__ = ["Ring", "ring_attention"]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Call:
    """What an operator cannot take as an argument; it is looked up by number."""

    number: int
    plan: RingPlan
    ring: Ring
    backend: str


_calls: weakref.WeakValueDictionary[int, _Call] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register_call(plan: RingPlan, ring: Ring, backend: str) -> _Call:
    """Make plan and ring known to the operators for as long as the result lives (graphs keep it)."""
    call = _Call(next(_numbers), plan, ring, backend)
    _calls[call.number] = call
    return call


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: RingPlan,
    ring: Ring,
    backend: str | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over all keys of the ring that `plan` allows.

    q [T, H, D], k [T, Hk, D], v [T, Hk, Dv], T = plan.tokens -> out [T, H, Dv] in q's dtype and the log-sum-exp of
    each row's scores [T, H] in fp32 (fp64), both differentiable. Rows in no block (padding) give 0 and -inf and
    receive zero gradients. scale: of the scores, 1/sqrt(D) unless given. Raises ValueError when the plan is for
    other tokens or another ring.
    """
    if q.shape[0] != plan.tokens or plan.ring != ring.size or plan.rank != ring.rank:
        raise ValueError(
            f"the plan is for {plan.tokens} tokens on rank {plan.rank} of {plan.ring}, "
            f"got {q.shape[0]} tokens on rank {ring.rank} of {ring.size}"
        )
    call = register_call(plan, ring, backend or default_backend(q.device))
    out, lse = torch.ops.ringweave.packed_attention(
        q, k, v, call.number, q.shape[-1] ** -0.5 if scale is None else scale
    )
    return out, lse


@torch.library.custom_op("ringweave::packed_attention", mutates_args=())
def _packed_attention(q: Tensor, k: Tensor, v: Tensor, number: int, scale: float) -> tuple[Tensor, Tensor]:
    call = _calls[number]
    plan, acc = call.plan, _accumulator(q.dtype)
    feed = make_feed(plan, call.ring, k, v)
    alone = plan.ring == 1 and not _overlaps(plan)
    out = q.new_zeros((q.shape[0], q.shape[1], v.shape[-1]), dtype=q.dtype if alone else acc)
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=acc)
    for hop in range(plan.ring):
        kh, vh = feed.take(hop)
        for b in plan.blocks(hop):
            rows, keys = slice(b.q0, b.q1), slice(b.k0, b.k1)
            o, l = block_forward(
                q[rows], kh[keys], vh[keys], lower=b.lower, upper=b.upper, scale=scale, backend=call.backend
            )
            if alone:  # every row is in one block: nothing to merge
                out[rows], lse[rows] = o, l
            else:
                merge_(out[rows], lse[rows], o, l.to(acc))
    return out.to(q.dtype), lse


@_packed_attention.register_fake
def _(q, k, v, number, scale):
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[-1]))
    return out, q.new_empty(q.shape[:2], dtype=_accumulator(q.dtype))


@torch.library.custom_op("ringweave::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    number: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _calls[number]
    plan, acc = call.plan, _accumulator(q.dtype)
    feed = make_feed(plan, call.ring, k, v)
    drain = make_drain(plan, call.ring, Form.of(k, v), k.new_empty(0, dtype=acc))
    dq = q.new_zeros(q.shape, dtype=acc)
    for hop in range(plan.ring):
        kh, vh = feed.take(hop)
        dk, dv = drain.buffer(hop)
        for b in plan.blocks(hop):
            rows, keys = slice(b.q0, b.q1), slice(b.k0, b.k1)
            gq, gk, gv = block_backward(
                dout[rows], q[rows], kh[keys], vh[keys], out[rows], lse[rows],
                dlse=None if dlse is None else dlse[rows],
                lower=b.lower, upper=b.upper, scale=scale, backend=call.backend,
            )  # fmt: skip
            dq[rows] += gq
            dk[keys] += gk
            dv[keys] += gv
        drain.give(hop)
    dk, dv = drain.total()
    # Operators may not return their inputs or views of one buffer; `to` copies only where dtypes differ.
    return dq.to(q.dtype), dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


@_packed_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, number, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx, inputs, output) -> None:
    q, k, v, number, scale = inputs
    out, lse = output
    ctx.call, ctx.scale = _calls[number], scale
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, None, None
    dout = torch.zeros_like(out) if dout is None else dout
    grads = torch.ops.ringweave.packed_attention_backward(
        dout, dlse, q, k, v, out, lse, ctx.call.number, ctx.scale
    )
    return *grads, None, None


_packed_attention.register_autograd(_backward, setup_context=_setup)


def _overlaps(plan: RingPlan) -> bool:
    """Whether a row lies in more than one block."""
    rows = plan.table[:, 1:3]  # sorted by their first row where the ring is one rank
    return bool((rows[1:, 0] < np.maximum.accumulate(rows[:, 1])[:-1]).any())


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
