"""Block attention by PyTorch's CPU flash kernel (`aten._scaled_dot_product_flash_attention_for_cpu`).

The kernel, private but the one behind SDPA on CPU, returns the LSE, takes grouped heads and knows FULL and
square causal blocks; those go to it as they are, without a copy. Around it:

- Another band is cut into tiles (`attention_band.cut_into_tiles`), with masks only where an edge crosses one;
  tiles that share rows merge. The kernel never holds more scores than a tile of its own.
- D != Dv: the smaller side is padded with zero channels, as the kernel wants one head size.
- dlse: further channels dO' = [dO, 1], O' = [O, -dlse], V' = [V, 0] turn the kernel's own rowsum(dO'∘O')
  into delta - dlse and leave dO'V'ᵀ = dO Vᵀ alone.
- Backward of bf16 and fp16 runs in fp32: on a CPU without bf16 matrix units the kernel's own half-precision
  backward took 10 to 15 times as long (8 heads x 64, 256 queries), and its sums are coarser.
- The kernel reads rows as if their channels were adjacent (wrong numbers, no error, otherwise: torch 2.14),
  so anything else is copied first.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringweave.kernels.attention import lse_dtype, merge_
from ringweave.kernels.attention_band import Tile, band_allowed, cut_into_tiles

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run blocks of `dtype` on `device`, or None."""
    if device.type != "cpu":
        return f"it runs on CPU only, not on {device.type}"
    return None if dtype in _DTYPES else f"the kernel has no {dtype}"


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, lower: int | None, upper: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `attention.block_forward`."""
    lq, heads, dim = q.shape
    lk, _, value = v.shape
    if dim != value:
        q, k, v = _to_width(max(dim, value), q, k, v)
    q4, k4, v4 = _heads_first(q), _heads_first(k), _heads_first(v)
    if lower is None and (upper is None or (upper == 0 and lq == lk)):
        out4, lse3 = _forward(q4, k4, v4, 0.0, upper is not None, scale=scale)
        out, lse = _tokens_first(out4), lse3.squeeze(0).t()
    else:
        acc = lse_dtype(q.dtype)
        out = torch.empty(lq, heads, v.shape[2], dtype=acc)
        lse = torch.empty(lq, heads, dtype=acc)
        for tile in cut_into_tiles(lq, lk, lower, upper):
            rows, keys = tile.rows, tile.keys
            out4, lse3 = _forward(
                q4[:, :, rows],
                k4[:, :, keys],
                v4[:, :, keys],
                0.0,
                tile.causal,
                attn_mask=_tile_mask(tile, acc),
                scale=scale,
            )
            if tile.first:
                out[rows], lse[rows] = _tokens_first(out4), lse3.squeeze(0).t()
            else:
                merge_(out[rows], lse[rows], _tokens_first(out4), lse3.squeeze(0).t())
        out = out.to(q.dtype)
    return out if value >= dim else out[..., :value], lse


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
    lq, heads, dim = q.shape
    lk, kv_heads, value = v.shape
    dtype, acc = q.dtype, lse_dtype(q.dtype)
    if dtype is not acc:
        dout, q, k, v, out = (x.to(acc) for x in (dout, q, k, v, out))
    if dlse is not None:
        one = dout.new_ones(()).expand(lq, heads, 1)
        dout = torch.cat([dout, one], -1)
        out = torch.cat([out, -dlse.to(acc)[..., None]], -1)
    width = max(dim, dout.shape[2])
    if dim != value or dlse is not None:
        dout, q, k, v, out = _to_width(width, dout, q, k, v, out)
    d4, q4, k4 = _heads_first(dout), _heads_first(q), _heads_first(k)
    v4, o4 = _heads_first(v), _heads_first(out)
    lse3 = (lse if lse.dtype is acc else lse.to(acc)).t().unsqueeze(0)
    if lower is None and (upper is None or (upper == 0 and lq == lk)):
        dq, dk, dv = _backward(d4, q4, k4, v4, o4, lse3, 0.0, upper is not None, scale=scale)
        dq, dk, dv = _tokens_first(dq), _tokens_first(dk), _tokens_first(dv)
    else:
        dq = torch.zeros(lq, heads, width, dtype=acc)
        dk, dv = (torch.zeros(lk, kv_heads, width, dtype=acc) for _ in range(2))
        for tile in cut_into_tiles(lq, lk, lower, upper):
            rows, keys = tile.rows, tile.keys
            grads = _backward(
                d4[:, :, rows],
                q4[:, :, rows],
                k4[:, :, keys],
                v4[:, :, keys],
                o4[:, :, rows],
                lse3[:, :, rows],
                0.0,
                tile.causal,
                attn_mask=_tile_mask(tile, acc),
                scale=scale,
            )
            for total, at, grad in zip((dq, dk, dv), (rows, keys, keys), grads, strict=True):
                total[at] += _tokens_first(grad)
    if width != dim:
        dq, dk = dq[..., :dim], dk[..., :dim]
    if width != value:
        dv = dv[..., :value]
    return (dq, dk, dv) if dtype is acc else (dq.to(dtype), dk.to(dtype), dv.to(dtype))


def _to_width(width: int, *tensors: Tensor) -> list[Tensor]:
    """Each [L, H, d] with zero channels up to `width`."""
    return [x if x.shape[2] == width else pad(x, (0, width - x.shape[2])) for x in tensors]


def _heads_first(x: Tensor) -> Tensor:
    """[L, H, D] -> a view [1, H, L, D] the kernel reads rightly. One as_strided: half the time of two views."""
    length, heads, dim = x.shape
    row, head, channel = x.stride()
    if channel != 1 or row < dim:  # a transposed or expanded tensor
        x = x.contiguous()
        row, head = heads * dim, dim
    return x.as_strided((1, heads, length, dim), (length * row, head, row, 1))


def _tokens_first(x: Tensor) -> Tensor:
    """[1, H, L, D], a result of the kernel, -> a view [L, H, D]."""
    _, heads, length, dim = x.shape
    _, head, row, channel = x.stride()
    return x.as_strided((length, heads, dim), (row, head, channel))


def _tile_mask(tile: Tile, dtype: torch.dtype) -> Tensor | None:
    if tile.lower is None and tile.upper is None:
        return None
    lq, lk = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
    return _additive_mask(lq, lk, tile.lower, tile.upper, dtype)


@lru_cache(maxsize=32)  # tiles repeat along a band and from layer to layer; each is at most 0.5 MiB in fp32
def _additive_mask(lq: int, lk: int, lower: int | None, upper: int | None, dtype: torch.dtype) -> Tensor:
    """[1, 1, lq, lk]: 0 where a query sees a key, else -inf."""
    allowed = band_allowed(lq, lk, lower, upper, device=torch.device("cpu"))
    mask = torch.zeros(1, 1, lq, lk, dtype=dtype, device="cpu")
    return mask.masked_fill_(~allowed, float("-inf"))
