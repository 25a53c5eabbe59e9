"""Attention of one block of queries against one block of keys, and the merge of such blocks.

A block backend returns the normalised output and the log-sum-exp (LSE) of its scores, so that blocks
computed anywhere, in any order, merge into exact softmax attention (Rabe & Staats 2021; Liu et al. 2023,
RingAttention). Layouts here are token-major, as packs are flat:

    q [Lq, H, D], k [Lk, Hk, D], v [Lk, Hk, Dv]  ->  out [Lq, H, Dv], lse [Lq, H]

`Hk` divides `H` (grouped-query attention). A block is either FULL or square and CAUSAL; masks of packs are
cut into such blocks by the plan (`parallel/ring_plan.py`), so no backend ever sees a mask tensor.

Backends: "reference" (plain maths, any device and dtype), "aten_cpu" (PyTorch's CPU flash kernel).
"""

from __future__ import annotations

import torch
from torch import Tensor

BACKENDS = ("reference", "aten_cpu")


def default_backend(device: torch.device) -> str:
    """The backend used when none is named: the CPU flash kernel on CPU, plain maths elsewhere."""
    return "aten_cpu" if device.type == "cpu" else "reference"


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention of `q` over `k`, `v`: (out [Lq, H, Dv] in q's dtype, lse [Lq, H] fp32, fp64 for fp64 inputs).

    `causal` needs Lq == Lk: query i sees keys 0..i.
    """
    if causal and q.shape[0] != k.shape[0]:
        raise ValueError(f"a causal block is square, got {q.shape[0]} queries and {k.shape[0]} keys")
    if backend == "aten_cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q), _heads_first(k), _heads_first(v), 0.0, causal, scale=scale
        )
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)
    if backend != "reference":
        raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join(BACKENDS)}")
    scores = _scores(q, k, causal=causal, scale=scale)
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.exp(scores - lse[..., None])
    out = torch.einsum("hqk,khd->qhd", probs, _expand(v, q.shape[1]).to(probs.dtype))
    return out.to(q.dtype), lse.transpose(0, 1)


def block_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block given the *final* out and lse of its queries (after all merges).

    P = exp(s·QKᵀ - lse), dV = PᵀdO, dS = P∘(dO Vᵀ - rowsum(dO∘O)), dQ = s·dS·K, dK = s·dSᵀQ; with grouped
    heads dK and dV are summed over the group (FlashAttention-2, Dao 2023, algorithm 2).
    """
    if backend == "aten_cpu":
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(dout),
            _heads_first(q),
            _heads_first(k),
            _heads_first(v),
            _heads_first(out),
            lse.transpose(0, 1)[None],
            0.0,
            causal,
            scale=scale,
        )
        return dq[0].transpose(0, 1), dk[0].transpose(0, 1), dv[0].transpose(0, 1)
    heads, kv_heads = q.shape[1], k.shape[1]
    scores = _scores(q, k, causal=causal, scale=scale)
    acc = scores.dtype
    probs = torch.where(torch.isinf(scores), 0.0, torch.exp(scores - lse.transpose(0, 1)[..., None].to(acc)))
    do, o = dout.to(acc), out.to(acc)
    dv = torch.einsum("hqk,qhd->khd", probs, do)
    dprobs = torch.einsum("qhd,khd->hqk", do, _expand(v, heads).to(acc))
    delta = (do * o).sum(-1).transpose(0, 1)[..., None]
    dscores = probs * (dprobs - delta) * scale
    dq = torch.einsum("hqk,khd->qhd", dscores, _expand(k, heads).to(acc))
    dk = torch.einsum("hqk,qhd->khd", dscores, q.to(acc))
    group = heads // kv_heads
    dk = dk.unflatten(1, (kv_heads, group)).sum(2)
    dv = dv.unflatten(1, (kv_heads, group)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def merge_(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Fold block (out_b, lse_b) into the running (out, lse), in place.

    Safe where one side or both have seen no key (lse = -inf): such rows keep out = 0, lse = -inf instead of
    turning into NaN, which the usual `a - logsigmoid(a - b)` form does.
    """
    top = torch.maximum(lse, lse_b)
    base = torch.where(torch.isinf(top), 0.0, top)
    wa, wb = torch.exp(lse - base), torch.exp(lse_b - base)
    total = wa + wb
    inverse = 1.0 / total.clamp_min(torch.finfo(total.dtype).tiny)
    out.mul_((wa * inverse)[..., None]).add_(out_b.to(out.dtype) * (wb * inverse)[..., None])
    lse.copy_(base + torch.log(total))


def dense_reference(q: Tensor, k: Tensor, v: Tensor, *, allowed: Tensor, scale: float) -> Tensor:
    """Softmax attention under an explicit boolean mask `allowed` [Lq, Lk]: the slow truth of the tests.

    A row without any allowed key gives zeros.
    """
    heads = q.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, _expand(k, heads)) * scale
    scores = scores.masked_fill(~allowed, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(torch.isinf(top), 0.0, top))
    total = weights.sum(-1, keepdim=True)
    probs = weights / torch.where(total == 0, 1.0, total)
    return torch.einsum("hqk,khd->qhd", probs, _expand(v, heads))


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


def _expand(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor, *, causal: bool, scale: float) -> Tensor:
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("qhd,khd->hqk", q.to(acc), _expand(k, q.shape[1]).to(acc)) * scale
    if causal:
        n = q.shape[0]
        scores = scores.masked_fill(
            ~torch.ones(n, n, dtype=torch.bool, device=q.device).tril(), float("-inf")
        )
    return scores
