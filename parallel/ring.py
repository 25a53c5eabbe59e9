"""Ring attention: keys and values travel round the ring, queries stay (Liu et al. 2023).

One autograd function follows a `RingPlan`. Outputs, dQ, dK and dV are accumulated in fp32 (fp64 for fp64
inputs) and returned in the inputs' dtype. Keys and values of the next hop are received while this hop is
computed, always into a buffer of their own: a buffer shared by send and receive corrupts silently on gloo.
A ring of one is plain packed attention, so every layout runs this code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ringweave.kernels.attention import block_backward, block_forward, default_backend, merge_
from ringweave.parallel.ring_plan import RingPlan


@dataclass(frozen=True, slots=True)
class Ring:
    """The process group of one ring and this rank's place in it; `group` None is a ring of one."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def exchange(self, send: Tensor, receive: Tensor) -> list[dist.Work]:
        """Start sending to the right neighbour and receiving from the left; wait on the result before use."""
        if self.group is None:
            raise ValueError("a ring of one exchanges nothing")
        right = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        left = dist.get_global_rank(self.group, (self.rank - 1) % self.size)
        return dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, send, right, self.group),
                dist.P2POp(dist.irecv, receive, left, self.group),
            ]
        )


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, plan: RingPlan, ring: Ring, backend: str | None = None
) -> Tensor:
    """Attention of this rank's queries over all keys of the ring that `plan` allows.

    q [T, H, D], k [T, Hk, D], v [T, Hk, Dv], T = plan.lengths[rank] -> [T, H, Dv] in q's dtype. Rows in no block
    (padding) give zeros and receive zero gradients.
    """
    if q.shape[0] != plan.lengths[ring.rank] or len(plan.hops) != ring.size:
        raise ValueError(
            f"plan is for {plan.lengths} tokens on {len(plan.hops)} ranks, got {q.shape[0]} tokens on rank "
            f"{ring.rank} of {ring.size}"
        )
    return _RingAttention.apply(q, k, v, plan, ring, backend or default_backend(q.device))


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan: RingPlan, ring: Ring, backend: str):  # type: ignore[override]
        scale = q.shape[-1] ** -0.5
        acc = _accumulator(q.dtype)
        out = torch.zeros(q.shape[0], q.shape[1], v.shape[-1], dtype=acc, device=q.device)
        lse = torch.full(q.shape[:2], float("-inf"), dtype=acc, device=q.device)
        held = _pack(k, v) if ring.size > 1 else None
        for hop in range(ring.size):
            held, incoming, work = _start_exchange(held, hop, plan, ring, k, v)
            kh, vh = (k, v) if held is None else _unpack(held, k, v)
            for b in plan.hops[hop]:
                o, l = block_forward(
                    q[b.q0 : b.q1],
                    kh[b.k0 : b.k1],
                    vh[b.k0 : b.k1],
                    causal=b.causal,
                    scale=scale,
                    backend=backend,
                )
                merge_(out[b.q0 : b.q1], lse[b.q0 : b.q1], o, l.to(acc))
            _wait(work)
            held = incoming if incoming is not None else held
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.plan, ctx.ring, ctx.backend, ctx.scale = plan, ring, backend, scale
        return result

    @staticmethod
    def backward(ctx, dout):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        plan, ring = ctx.plan, ctx.ring
        acc = _accumulator(q.dtype)
        dout = dout.contiguous()
        dq = torch.zeros(q.shape, dtype=acc, device=q.device)
        held = _pack(k, v) if ring.size > 1 else None
        grad_in: Tensor | None = None
        grad_work: list[dist.Work] = []
        grad = torch.zeros(0)
        for hop in range(ring.size):
            held, incoming, work = _start_exchange(held, hop, plan, ring, k, v)
            kh, vh = (k, v) if held is None else _unpack(held, k, v)
            grad = torch.zeros(_packed_size(kh.shape[0], k, v), dtype=acc, device=q.device)
            dk, dv = _unpack(grad, k, v)
            for b in plan.hops[hop]:
                qs, ks = slice(b.q0, b.q1), slice(b.k0, b.k1)
                gq, gk, gv = block_backward(
                    dout[qs], q[qs], kh[ks], vh[ks], out[qs], lse[qs],
                    causal=b.causal, scale=ctx.scale, backend=ctx.backend,
                )  # fmt: skip
                dq[qs] += gq
                dk[ks] += gk
                dv[ks] += gv
            # dK and dV of a rank travel with its keys, one hop behind, and come home after the last hop.
            _wait(grad_work)
            if grad_in is not None:
                grad += grad_in
            _wait(work)
            if ring.size > 1:
                left = (ring.rank - hop - 1) % ring.size
                grad_in = torch.empty(_packed_size(plan.lengths[left], k, v), dtype=acc, device=q.device)
                grad_work = ring.exchange(grad, grad_in)
            held = incoming if incoming is not None else held
        _wait(grad_work)
        dk, dv = _unpack(grad if grad_in is None else grad_in, k, v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _start_exchange(
    held: Tensor | None, hop: int, plan: RingPlan, ring: Ring, k: Tensor, v: Tensor
) -> tuple[Tensor | None, Tensor | None, list[dist.Work]]:
    """Begin the transfer for the next hop, if there is one: (held, buffer being filled, work)."""
    if held is None or hop == ring.size - 1:
        return held, None, []
    coming = (ring.rank - hop - 1) % ring.size
    incoming = torch.empty(_packed_size(plan.lengths[coming], k, v), dtype=held.dtype, device=held.device)
    return held, incoming, ring.exchange(held, incoming)


def _wait(work: list[dist.Work]) -> None:
    for w in work:
        w.wait()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values of one rank as one flat message: [T·Hk·D | T·Hk·Dv]."""
    return torch.cat([k.reshape(-1), v.reshape(-1)])


def _packed_size(tokens: int, k: Tensor, v: Tensor) -> int:
    return tokens * (k.shape[1] * k.shape[2] + v.shape[1] * v.shape[2])


def _unpack(flat: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The message back as (keys [T, Hk, D], values [T, Hk, Dv]), as views."""
    tokens = flat.numel() // (k.shape[1] * k.shape[2] + v.shape[1] * v.shape[2])
    cut = tokens * k.shape[1] * k.shape[2]
    return flat[:cut].view(tokens, k.shape[1], k.shape[2]), flat[cut:].view(tokens, v.shape[1], v.shape[2])
