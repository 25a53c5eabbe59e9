"""Block attention by release 2 of the flash-attn package (Dao 2023), where it is installed.

Bands go to the kernel as its window, nothing is cut or merged. Its LSE of an empty row is +inf; blocks come
here trimmed, so no row is empty. D != Dv is padded with zero channels; dlse takes two more channels
(`attention_sdpa.with_dlse`).
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringweave.kernels.attention_sdpa import flash_window, with_dlse

_DTYPES = (torch.bfloat16, torch.float16)
_WIDEST = 256


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot run blocks of `dtype` on `device`, or None."""
    if find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if device.type != "cuda":
        return f"flash-attn runs on CUDA only, not on {device.type}"
    if dtype not in _DTYPES:
        return f"flash-attn takes bf16 and fp16, not {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"flash-attn needs compute capability 8.0, this device has {major}.{minor}"
    try:
        _kernel("_flash_attn_forward")
    except (ImportError, AttributeError) as problem:
        return f"the installed flash-attn does not load: {problem}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, lower: int | None, upper: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `attention.block_forward`. Raises ValueError for heads of more than 256 channels."""
    width = _width(q.shape[2], v.shape[2])
    left, right = flash_window(q.shape[0], k.shape[0], lower, upper)
    found = _call(
        "_flash_attn_forward",
        *_batched(width, q, k, v),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size_left=-1 if left is None else left,
        window_size_right=-1 if right is None else right,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    # Releases up to 2.6 return (out, q, k, v, out_padded, lse, ...), later ones (out, lse, ...).
    out, lse = (found[0], found[5]) if len(found) == 8 else (found[0], found[1])
    return out[0, ..., : v.shape[2]], lse[0, :, : q.shape[0]].t()


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
    """See `attention.block_backward`. Raises as `forward` does."""
    dim, value = q.shape[2], v.shape[2]
    dout, out = dout.to(q.dtype), out.to(q.dtype)
    if dlse is not None:
        dout, out = with_dlse(dout, out, dlse)
    width = _width(dim, dout.shape[2])
    left, right = flash_window(q.shape[0], k.shape[0], lower, upper)
    tensors = _batched(width, dout, q, k, v, out)
    grads = [torch.empty_like(x) for x in tensors[1:4]]
    _call(
        "_flash_attn_backward",
        *tensors,
        lse.t().contiguous()[None],
        *grads,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size_left=-1 if left is None else left,
        window_size_right=-1 if right is None else right,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
    )
    dq, dk, dv = (x[0] for x in grads)
    return dq[..., :dim], dk[..., :dim], dv[..., :value]


@cache
def _kernel(name: str) -> Any:
    return getattr(import_module("flash_attn.flash_attn_interface"), name)


def _call(name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a kernel; releases before 2.7 have the window in one argument, those before 2.6 no softcap."""
    known = _parameters(name)
    if "window_size" in known:
        kwargs["window_size"] = (kwargs.pop("window_size_left"), kwargs.pop("window_size_right"))
    if "softcap" not in known:
        del kwargs["softcap"]
    return _kernel(name)(*args, **kwargs)


@cache
def _parameters(name: str) -> frozenset[str]:
    kernel = _kernel(name)
    return frozenset(inspect.signature(getattr(kernel, "_init_fn", kernel)).parameters)


def _width(dim: int, value: int) -> int:
    width = -(-max(dim, value) // 8) * 8
    if width > _WIDEST:
        raise ValueError(f"flash-attn takes heads of up to {_WIDEST} channels, got {max(dim, value)}")
    return width


def _batched(width: int, *tensors: Tensor) -> list[Tensor]:
    """Each [L, H, d] as a contiguous [1, L, H, width], zeros beyond d."""
    return [pad(x, (0, width - x.shape[2])).contiguous()[None] for x in tensors]
