"""Block attention by what PyTorch ships everywhere: its fused CUDA flash kernels, or SDPA and row-wise maths.

For two uses: CUDA without Triton (its own FlashAttention-2 kernels, in half precision, with their windows),
and a second opinion that shares no code with the other backends on any device. `scaled_dot_product_attention`
returns no LSE, so where the flash kernels do not run (CPU, fp32, fp64, wide heads) out comes from SDPA and
the LSE and the gradients from plain maths over a few query rows at a time: memory grows with the number of keys,
not with the whole block, but it is slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ringweave.kernels.attention_band import band_allowed, expand_heads

_SCORES = 1 << 20  # scores held at once by the plain maths, over all heads
_WIDEST = 256  # channels of a head in the flash kernels
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run blocks of `dtype` on `device`, or None."""
    return None if dtype in _DTYPES else f"SDPA takes fp64, fp32, bf16 and fp16, not {dtype}"


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, lower: int | None, upper: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `attention.block_forward`."""
    if _flash_runs(q, v, 0):
        return _flash_forward(q, k, v, lower, upper, scale)
    heads = q.shape[1]
    acc = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape[0], heads, v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], heads, dtype=acc, device=q.device)
    for rows, keys, allowed in _strips(q, k, lower, upper):
        q_, k_, v_ = q[rows], expand_heads(k[keys], heads), expand_heads(v[keys], heads)
        q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q_, k_, v_))
        found = scaled_dot_product_attention(q4, k4, v4, attn_mask=allowed, scale=scale)
        out[rows] = found[0].transpose(0, 1)
        lse[rows] = _scores(q_.to(acc), k_.to(acc), allowed, scale).logsumexp(-1).t()
    return out, lse


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
    if _flash_runs(q, v, 0 if dlse is None else 2):
        return _flash_backward(dout, q, k, v, out, lse, dlse, lower, upper, scale)
    acc = torch.promote_types(q.dtype, torch.float32)
    heads, kv_heads = q.shape[1], k.shape[1]
    delta = (dout.to(acc) * out.to(acc)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(acc)
    dq = torch.empty(q.shape, dtype=acc, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (k, v))
    for rows, keys, allowed in _strips(q, k, lower, upper):
        do, q_ = dout[rows].to(acc).transpose(0, 1), q[rows].to(acc)  # do [H, rows, Dv]
        k_, v_ = expand_heads(k[keys], heads).to(acc), expand_heads(v[keys], heads).to(acc)
        probs = (_scores(q_, k_, allowed, scale) - lse[rows].to(acc).t()[..., None]).exp_()
        dscores = do @ v_.permute(1, 2, 0)
        dscores.sub_(delta[rows].t()[..., None]).mul_(probs).mul_(scale)
        dq[rows] = (dscores @ k_.transpose(0, 1)).transpose(0, 1)
        for total, part in ((dv, probs.mT @ do), (dk, dscores.mT @ q_.transpose(0, 1))):
            total[keys] += part.unflatten(0, (kv_heads, heads // kv_heads)).sum(1).transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _strips(
    q: Tensor, k: Tensor, lower: int | None, upper: int | None
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Strips of rows, the keys they see, and the boolean mask [rows, keys] of the strip if it needs one."""
    lq, lk = q.shape[0], k.shape[0]
    step = max(1, _SCORES // (q.shape[1] * lk))
    for at in range(0, lq, step):
        stop = min(lq, at + step)
        first = 0 if lower is None else max(0, at + lower)
        last = lk if upper is None else min(lk, stop + upper)
        allowed = None
        if lower is not None or upper is not None:
            shift = at - first
            allowed = band_allowed(
                stop - at,
                last - first,
                None if lower is None else lower + shift,
                None if upper is None else upper + shift,
                device=q.device,
            )
        yield slice(at, stop), slice(first, last), allowed


def _scores(q: Tensor, k: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """[H, rows, keys], -inf where not allowed; q and k with the same heads."""
    scores = (q.transpose(0, 1) @ k.permute(1, 2, 0)).mul_(scale)
    return scores if allowed is None else scores.masked_fill_(~allowed, float("-inf"))


def _flash_runs(q: Tensor, v: Tensor, extra: int) -> bool:
    """Can PyTorch's CUDA flash kernels take these blocks, with `extra` more channels in v?"""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    wide = max(q.shape[2], v.shape[2] + extra) <= _WIDEST
    return wide and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, lower: int | None, upper: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    width = _rounded(max(q.shape[2], v.shape[2]))
    left, right = flash_window(q.shape[0], k.shape[0], lower, upper)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *_batched(width, q, k, v), None, None, q.shape[0], k.shape[0], 0.0, False, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out[0, ..., : v.shape[2]], lse[0, :, : q.shape[0]].t()


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dim, value = q.shape[2], v.shape[2]
    dout, out = dout.to(q.dtype), out.to(q.dtype)
    if dlse is not None:
        dout, out = with_dlse(dout, out, dlse)
    width = _rounded(max(dim, dout.shape[2]))
    left, right = flash_window(q.shape[0], k.shape[0], lower, upper)
    unused = torch.empty(
        2, dtype=torch.uint64, device=q.device
    )  # the state of dropout, which there is none of
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *_batched(width, dout, q, k, v, out), lse.t().contiguous()[None], None, None, q.shape[0], k.shape[0],
        0.0, False, unused, unused, scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return dq[0, ..., :dim], dk[0, ..., :dim], dv[0, ..., :value]


def flash_window(lq: int, lk: int, lower: int | None, upper: int | None) -> tuple[int | None, int | None]:
    """(left, right) of FlashAttention's window for a trimmed block; None: open.

    There query i sees keys i + lk - lq - left .. i + lk - lq + right: the band is anchored at the last row and
    key. In a trimmed block (`attention_band.trim_band`) neither is negative, which would mean "open".
    """
    shift = lk - lq
    return None if lower is None else shift - lower, None if upper is None else upper - shift


def with_dlse(dout: Tensor, out: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """dout and out [L, H, Dv + 2] whose rowsum(dout ∘ out) is that of the given ones minus dlse.

    Where v has zeros in the two channels, a kernel that computes delta itself so takes in the gradient of the
    LSE. Two channels, as a half holds dlse to 8 or 11 bits only: the second carries the rest.
    """
    high = (-dlse).to(out.dtype)
    low = (-dlse - high).to(out.dtype)
    ones = torch.ones(*dlse.shape, 2, dtype=dout.dtype, device=dout.device)
    return torch.cat([dout, ones], -1), torch.cat([out, torch.stack([high, low], -1)], -1)


def _batched(width: int, *tensors: Tensor) -> list[Tensor]:
    """Each [L, H, d] as a contiguous [1, L, H, width], zeros beyond d."""
    return [pad(x, (0, width - x.shape[2])).contiguous()[None] for x in tensors]


def _rounded(width: int) -> int:
    """The next multiple of 8 channels, which the flash kernels ask for."""
    return math.ceil(width / 8) * 8
