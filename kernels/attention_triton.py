"""Block attention by our own Triton kernels (`attention_triton_kernels.py`): bands, grouped heads, D != Dv.

Runs on CUDA in fp32, bf16 and fp16. Products of halves accumulate in fp32; fp32 is multiplied in three TF32
products, which keep nearly all of its digits. On CPU it runs where Triton interprets (TRITON_INTERPRET=1 before
Triton is first imported): slow, for checking the kernels without a GPU. Tile sizes are chosen by hand:
autotuning needs a driver, and would time every new shape of block.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 256  # channels of a head: a tile of wider ones does not fit in shared memory


class _Tiles(NamedTuple):
    """Sizes of one kernel's tiles (queries m, keys n) and how it is scheduled on a GPU."""

    m: int
    n: int
    warps: int
    stages: int


# Of (kernel, bytes of an element): for heads of up to 64, 128 and 256 channels. The loop inside streams the
# smaller side.
_TILES = {
    ("forward", 2): (_Tiles(128, 64, 4, 3), _Tiles(128, 64, 8, 3), _Tiles(64, 32, 4, 2)),
    ("dq", 2): (_Tiles(128, 64, 8, 2), _Tiles(128, 64, 8, 2), _Tiles(64, 32, 4, 2)),
    ("dkv", 2): (_Tiles(32, 128, 8, 3), _Tiles(32, 128, 8, 3), _Tiles(32, 64, 8, 2)),
    ("forward", 4): (_Tiles(64, 32, 4, 2), _Tiles(32, 32, 4, 2), _Tiles(16, 16, 4, 1)),
    ("dq", 4): (_Tiles(64, 32, 4, 2), _Tiles(32, 32, 4, 2), _Tiles(16, 16, 4, 1)),
    ("dkv", 4): (_Tiles(32, 64, 4, 2), _Tiles(32, 32, 4, 2), _Tiles(16, 16, 4, 1)),
}
_ROOMY = 160 * 1024  # bytes of shared memory of a block from which on (A100, H100) loads can run ahead


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run blocks of `dtype` on `device`, or None."""
    if dtype not in _DTYPES:
        return f"the kernels take fp32, bf16 and fp16, not {dtype}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and _interpreted():
        return None
    return (
        f"Triton has no {device.type} device here; on CPU it only interprets, with TRITON_INTERPRET=1 set before"
        " the program starts"
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, lower: int | None, upper: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `attention.block_forward`."""
    q, k, v = _adjacent(q), _adjacent(k), _adjacent(v)
    lq, heads, dim = q.shape
    value = v.shape[2]
    out = torch.empty(lq, heads, value, dtype=q.dtype, device=q.device)
    lse = torch.empty(lq, heads, dtype=torch.float32, device=q.device)
    tiles = _tiles(dim, value, q.dtype, kind="forward")
    with _on(q.device):
        _kernels().forward_kernel[(_cdiv(lq, tiles.m), heads)](
            q, k, v, out, lse, lq, k.shape[0], lower or 0, upper or 0, scale * math.log2(math.e),
            *_steps(q, k, v, out, lse), **_constants(q, k, v, lower, upper, tiles),
        )  # fmt: skip
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
    q, k, v, out = _adjacent(q), _adjacent(k), _adjacent(v), _adjacent(out)
    dout = _adjacent(dout.to(q.dtype))
    lq, heads, dim = q.shape
    lk, kv_heads, value = v.shape
    delta = torch.empty(heads, lq, dtype=torch.float32, device=q.device)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    given = lse if dlse is None else dlse  # a kernel's pointer has to point somewhere
    numbers = (lq, lk, lower or 0, upper or 0, scale * math.log2(math.e), scale)
    tensors = (dout, q, k, v, lse, delta)
    steps = _steps(dout, q, k, v, lse)
    with _on(q.device):
        _kernels().delta_kernel[(_cdiv(lq, 64), heads)](
            dout, out, given, delta, lq, *_steps(dout, out, given),
            HAS_DLSE=dlse is not None, DV=value, BLOCK_M=64, BLOCK_DV=_channels(value),
        )  # fmt: skip
        tiles = _tiles(dim, value, q.dtype, kind="dq")
        _kernels().dq_kernel[(_cdiv(lq, tiles.m), heads)](
            *tensors, dq, *numbers, *steps, *_steps(dq), **_constants(q, k, v, lower, upper, tiles)
        )
        tiles = _tiles(dim, value, q.dtype, kind="dkv")
        _kernels().dkv_kernel[(_cdiv(lk, tiles.n), kv_heads)](
            *tensors, dk, dv, *numbers, *steps, *_steps(dk, dv), **_constants(q, k, v, lower, upper, tiles)
        )
    return dq, dk, dv


def _kernels() -> ModuleType:
    from ringweave.kernels import attention_triton_kernels  # needs triton, so not at the top

    return attention_triton_kernels


def _interpreted() -> bool:
    """Were the kernels made for Triton's interpreter? That is decided where Triton decorates them."""
    import triton

    return not isinstance(_kernels().forward_kernel, triton.JITFunction)


def _tiles(dim: int, value: int, dtype: torch.dtype, *, kind: str) -> _Tiles:
    """Tile sizes of kernel `kind` (forward, dq, dkv), such that its registers hardly spill on compute 9.0."""
    width = max(_channels(dim), _channels(value))
    if width > _WIDEST:
        raise ValueError(f"the Triton kernels take heads of up to {_WIDEST} channels, got {max(dim, value)}")
    if _interpreted():
        return _Tiles(32, 64, 1, 1) if kind == "dkv" else _Tiles(64, 32, 1, 1)
    by_width = _TILES[kind, dtype.itemsize]
    return by_width[0 if width <= 64 else 1 if width <= 128 else 2]


def _constants(
    q: Tensor, k: Tensor, v: Tensor, lower: int | None, upper: int | None, tiles: _Tiles
) -> dict[str, Any]:
    """The compile-time arguments, which the three kernels share."""
    interpreted = _interpreted()
    constants = {
        "HAS_LOWER": lower is not None,
        "HAS_UPPER": upper is not None,
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "DV": v.shape[2],
        "BLOCK_M": tiles.m,
        "BLOCK_N": tiles.n,
        "BLOCK_D": _channels(q.shape[2]),
        "BLOCK_DV": _channels(v.shape[2]),
        "UPCAST": interpreted and q.dtype != torch.float32,
    }
    if not interpreted:
        constants |= {"num_warps": tiles.warps, "num_stages": tiles.stages if _roomy(q.device) else 1}
    return constants


@cache
def _roomy(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= _ROOMY


def _channels(width: int) -> int:
    """The tile's number of channels: a power of two, at least the 16 that a Triton product needs."""
    return max(16, 1 << (width - 1).bit_length())


def _steps(*tensors: Tensor) -> list[int]:
    """Elements from one token to the next and from one head to the next, of each tensor."""
    return [step for x in tensors for step in x.stride()[:2]]


def _adjacent(x: Tensor) -> Tensor:
    """`x` with its channels next to each other in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current CUDA device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
