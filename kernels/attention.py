"""Attention of one block of queries against one block of keys, and the merge of such blocks.

A block backend returns the normalised output and the log-sum-exp (LSE) of its scores, so that blocks
computed anywhere, in any order, merge into exact softmax attention (Rabe & Staats 2021; Liu et al. 2023,
RingAttention). Layouts here are token-major, as packs are flat:

    q [Lq, H, D], k [Lk, Hk, D], v [Lk, Hk, Dv]  ->  out [Lq, H, Dv], lse [Lq, H]

`Hk` divides `H` (grouped-query attention; Hk = 1 is multi-query). A block sees a diagonal band of its
score matrix: query i, counted from 0 within the block, sees key j iff `lower <= j - i <= upper`, where None
leaves a side open. (None, None) is a FULL block, (None, 0) on a square block is plain causal, (1 - w, 0) is
a causal window of w. Masks of packs are cut into such blocks by the plan (`parallel/ring_plan.py`), so no
backend is ever handed a mask tensor.

Rows and keys outside the band are cut away here, once for all backends: a backend gets a block in which
every row sees a key and every key is seen, and whatever its own convention for an empty row is (0, +inf or
-inf, they differ), it never shows. Backends live in `attention_<name>.py` and are imported on first use, so
importing this file needs neither Triton nor a GPU:

    reference    plain maths; any device and dtype, the whole score matrix at once
    aten_cpu     PyTorch's CPU flash kernel; the default on CPU
    sdpa         what PyTorch ships for any device; the CUDA flash kernels in half precision
    triton       our own kernels; the default on CUDA
    flash_attn   the flash-attn package, if it is installed
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from ringweave.kernels.attention_band import expand_heads, trim_band

_MODULES = {
    "reference": "ringweave.kernels.attention_reference",
    "aten_cpu": "ringweave.kernels.attention_cpu",
    "sdpa": "ringweave.kernels.attention_sdpa",
    "triton": "ringweave.kernels.attention_triton",
    "flash_attn": "ringweave.kernels.attention_flash",
}
BACKENDS = tuple(_MODULES)


class _Backend(Protocol):
    """What a module `attention_<name>.py` offers. Its blocks are trimmed: no row without a key."""

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run there, or None."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, lower: int | None, upper: int | None, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
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
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def default_backend(device: torch.device) -> str:
    """The backend used when none is named: the CPU flash kernel on CPU, Triton on CUDA, else plain maths."""
    return {"cpu": "aten_cpu", "cuda": "triton"}.get(device.type, "reference")


def available_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the backends that can run blocks of `dtype` on `device`, in the order of BACKENDS."""
    return [name for name in BACKENDS if why_unavailable(name, device, dtype) is None]


def why_unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why `backend` cannot run blocks of `dtype` on `device`; None if it can.

    Raises ValueError for a name that is no backend.
    """
    module = _load(backend)
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    return module.unavailable(device, dtype)


def block_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lower: int | None = None,
    upper: int | None = None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention of `q` [Lq, H, D] over `k` [Lk, Hk, D], `v` [Lk, Hk, Dv] within the band (lower, upper).

    Returns (out [Lq, H, Dv] in q's dtype, lse [Lq, H] fp32, fp64 for fp64 inputs). A row that sees no key gets
    out 0 and lse -inf. Raises ValueError for shapes that do not fit or an unknown backend, RuntimeError for
    a backend that cannot run on this device or dtype.
    """
    module = _resolve(backend, q.device, q.dtype)
    lq, lk = _lengths(q, k, v)
    rows, keys, lower, upper = trim_band(lq, lk, lower, upper)
    if rows is None:
        return module.forward(q, k, v, lower=lower, upper=upper, scale=scale)
    out = q.new_zeros(lq, q.shape[1], v.shape[2])
    lse = torch.full(q.shape[:2], float("-inf"), dtype=lse_dtype(q.dtype), device=q.device)
    if rows.stop > rows.start:
        out[rows], lse[rows] = module.forward(
            q[rows], k[keys], v[keys], lower=lower, upper=upper, scale=scale
        )
    return out, lse


def block_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    lower: int | None = None,
    upper: int | None = None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of one block, in the dtypes of q, k, v.

    `out` [Lq, H, Dv] and `lse` [Lq, H] are the *final* ones of these queries, after all merges; `dout` and
    `dlse` [Lq, H] are the gradients of those, dlse None where nothing depends on the LSE. With
    P = exp(s·QKᵀ - lse): dV = PᵀdO, dS = P∘(dO Vᵀ - delta), delta = rowsum(dO∘O) - dlse, dQ = s·dS·K,
    dK = s·dSᵀQ; with grouped heads dK and dV are summed over the group (FlashAttention-2, Dao 2023,
    algorithm 2). Rows that see no key in this block give nothing, whatever their out, lse, dout and dlse.
    Raises as `block_forward` does.
    """
    module = _resolve(backend, q.device, q.dtype)
    lq, lk = _lengths(q, k, v)
    rows, keys, lower, upper = trim_band(lq, lk, lower, upper)
    if rows is None:
        return module.backward(dout, q, k, v, out, lse, dlse=dlse, lower=lower, upper=upper, scale=scale)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    if rows.stop > rows.start:
        dq[rows], dk[keys], dv[keys] = module.backward(
            dout[rows],
            q[rows],
            k[keys],
            v[keys],
            out[rows],
            lse[rows],
            dlse=None if dlse is None else dlse[rows],
            lower=lower,
            upper=upper,
            scale=scale,
        )
    return dq, dk, dv


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
    scores = torch.einsum("qhd,khd->hqk", q, expand_heads(k, heads)) * scale
    scores = scores.masked_fill(~allowed, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(torch.isinf(top), 0.0, top))
    total = weights.sum(-1, keepdim=True)
    probs = weights / torch.where(total == 0, 1.0, total)
    return torch.einsum("hqk,khd->qhd", probs, expand_heads(v, heads))


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the LSE of blocks of `dtype` is kept: fp32, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def _load(backend: str) -> _Backend:
    if backend not in _MODULES:
        raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join(BACKENDS)}")
    return import_module(_MODULES[backend])  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _resolve(backend: str, device: torch.device, dtype: torch.dtype) -> _Backend:
    reason = why_unavailable(backend, device, dtype)
    if reason is not None:
        others = ", ".join(available_backends(device, dtype)) or "none"
        raise RuntimeError(
            f"attention backend {backend!r} cannot run here: {reason}; those that can: {others}"
        )
    return _load(backend)


def _lengths(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """(Lq, Lk), after checking that the three shapes fit each other."""
    lq, heads, dim = q.shape
    lk, kv_heads, k_dim = k.shape
    if k_dim != dim or v.shape[:2] != (lk, kv_heads) or not kv_heads or heads % kv_heads:
        raise ValueError(
            "q [Lq, H, D], k [Lk, Hk, D], v [Lk, Hk, Dv] with Hk dividing H do not fit: "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    return lq, lk
