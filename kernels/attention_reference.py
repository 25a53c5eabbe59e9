"""Block attention in plain maths: any device, any dtype, the whole score matrix at once.

Accumulates in fp32 (fp64 for fp64). The formulas are those of FlashAttention-2 (Dao 2023, algorithms 1 and
2) without the tiling; see `attention.py` for shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringweave.kernels.attention_band import band_allowed, expand_heads


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: plain maths runs anywhere, for any floating dtype."""
    return None if dtype.is_floating_point else f"attention of {dtype} has no meaning"


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, lower: int | None, upper: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `attention.block_forward`."""
    scores = _scores(q, k, lower, upper, scale)
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.exp(scores - lse[..., None])
    out = torch.einsum("hqk,khd->qhd", probs, expand_heads(v, q.shape[1]).to(probs.dtype))
    return out.to(q.dtype), lse.transpose(0, 1)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `attention.block_backward`."""
    heads, kv_heads = q.shape[1], k.shape[1]
    scores = _scores(q, k, lower, upper, scale)
    acc = scores.dtype
    probs = torch.exp(scores - lse.to(acc).transpose(0, 1)[..., None])
    do = dout.to(acc)
    delta = (do * out.to(acc)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(acc)
    dv = torch.einsum("hqk,qhd->khd", probs, do)
    dprobs = torch.einsum("qhd,khd->hqk", do, expand_heads(v, heads).to(acc))
    dscores = probs * (dprobs - delta.transpose(0, 1)[..., None]) * scale
    dq = torch.einsum("hqk,khd->qhd", dscores, expand_heads(k, heads).to(acc))
    dk = torch.einsum("hqk,qhd->khd", dscores, q.to(acc))
    group = heads // kv_heads
    dk = dk.unflatten(1, (kv_heads, group)).sum(2)
    dv = dv.unflatten(1, (kv_heads, group)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, lower: int | None, upper: int | None, scale: float) -> Tensor:
    """[H, Lq, Lk], -inf outside the band."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("qhd,khd->hqk", q.to(acc), expand_heads(k, q.shape[1]).to(acc)) * scale
    if lower is None and upper is None:
        return scores
    allowed = band_allowed(q.shape[0], k.shape[0], lower, upper, device=q.device)
    return scores.masked_fill_(~allowed, float("-inf"))
