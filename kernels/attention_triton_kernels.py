"""Triton kernels of block attention: FlashAttention-2 (Dao 2023) within a diagonal band. Needs Triton.

Launched by `attention_triton.py`, which has the shapes. Conventions of all kernels here:

- Tensors are token-major; a `stride_*t` steps one token, a `stride_*h` one head, channels are adjacent.
  Token offsets are 64-bit: a pack of a million tokens has more than 2^31 elements.
- LOWER and UPPER bound j - i (HAS_LOWER, HAS_UPPER say if they do). The launcher guarantees that every
  row sees a key, but rows of one tile may see none of the keys of another.
- Loops run in three spans: tiles crossed by the lower edge, tiles all inside the band (no mask computed),
  tiles crossed by the upper edge or the tensor's end.
- D and DV are head sizes, BLOCK_D and BLOCK_DV the next powers of two; channels beyond are loaded as 0.
- UPCAST: multiply in fp32. The interpreter needs it: its bf16 products are wrong without any error.
- `qk_scale` is scale·log2(e): exponentials are powers of two; LSE leaves here as a natural logarithm.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Not worth a compilation for each kind of value: lengths and bands differ from block to block.
_UNSPECIALISED = ("lq", "lk", "lower", "upper")

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")  # concerns fp32 only: near its precision, on tensor cores


@triton.jit
def _load(base, tokens, n_tokens, stride_t, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """[tokens, BLOCK_W] rows of one head, zeros past the end of tokens or channels."""
    channels = tl.arange(0, BLOCK_W)
    at = base + tokens.to(tl.int64)[:, None] * stride_t + channels[None, :]
    return tl.load(at, mask=(tokens[:, None] < n_tokens) & (channels[None, :] < WIDTH), other=0.0)


@triton.jit
def _store(base, tokens, n_tokens, stride_t, x, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    channels = tl.arange(0, BLOCK_W)
    at = base + tokens.to(tl.int64)[:, None] * stride_t + channels[None, :]
    inside = (tokens[:, None] < n_tokens) & (channels[None, :] < WIDTH)
    tl.store(at, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _seen(rows, keys, lk, lower, upper, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr):
    """Boolean [rows, keys] (either may be a column or a row vector already broadcastable)."""
    seen = (keys < lk) & (rows == rows)
    if HAS_LOWER:
        seen = seen & (keys - rows >= lower)
    if HAS_UPPER:
        seen = seen & (keys - rows <= upper)
    return seen


@triton.jit
def _spans(first, last, n, low, up, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, BLOCK: tl.constexpr):
    """Columns that rows first .. last see: (start, inner start, inner end, end), multiples of BLOCK but the end.

    Row i sees low <= j - i <= up of n columns. All of inner start .. inner end is seen by every row.
    """
    start = first * 0
    inner = first * 0
    end = n + first * 0
    whole = n + first * 0
    if HAS_LOWER:
        start = tl.maximum(first + low, 0) // BLOCK * BLOCK
        inner = (tl.maximum(last + low, 0) + BLOCK - 1) // BLOCK * BLOCK
    if HAS_UPPER:
        end = tl.maximum(tl.minimum(last + up + 1, n), 0)
        whole = tl.maximum(tl.minimum(first + up + 1, n), 0)
    stop = whole // BLOCK * BLOCK
    inner = tl.minimum(inner, end)
    stop = tl.maximum(stop, inner)
    return start, inner, stop, end


@triton.jit
def _forward_span(
    acc, total, top, q, k_head, v_head, rows, start, end, lk, lower, upper, qk_scale, stride_kt, stride_vt,
    MASKED: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold keys start .. end into the running (sum of exponentials, maximum, weighted values) of the rows."""
    for at in range(start, end, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        k = _load(k_head, keys, lk, stride_kt, D, BLOCK_D)
        scores = _dot(q, tl.trans(k), UPCAST) * qk_scale
        if MASKED:
            seen = _seen(rows[:, None], keys[None, :], lk, lower, upper, HAS_LOWER, HAS_UPPER)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = new_top
        if MASKED:
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
        shrink = tl.exp2(top - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v = _load(v_head, keys, lk, stride_vt, DV, BLOCK_DV)
        acc = acc * shrink[:, None] + _dot(weights.to(v.dtype), v, UPCAST)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lq, lk, lower, upper, qk_scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_lt, stride_lh,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, heads): out and lse of BLOCK_M queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q = _load(q_ptr + head * stride_qh, rows, lq, stride_qt, D, BLOCK_D)
    k_head = k_ptr + head // GROUP * stride_kh
    v_head = v_ptr + head // GROUP * stride_vh
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    last = tl.minimum(first + BLOCK_M, lq) - 1
    start, inner, stop, end = _spans(first, last, lk, lower, upper, HAS_LOWER, HAS_UPPER, BLOCK_N)
    if HAS_LOWER:
        acc, total, top = _forward_span(
            acc, total, top, q, k_head, v_head, rows, start, inner, lk, lower, upper, qk_scale, stride_kt,
            stride_vt, True, HAS_LOWER, HAS_UPPER, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, UPCAST,
        )  # fmt: skip
        # Rows of the first tiles that saw nothing carry top = -inf into the unmasked span: a finite floor
        # keeps its exponentials from -inf - -inf. Their total is 0, so it changes nothing else.
        top = tl.maximum(top, -1.0e38)
    acc, total, top = _forward_span(
        acc, total, top, q, k_head, v_head, rows, inner, stop, lk, lower, upper, qk_scale, stride_kt,
        stride_vt, False, HAS_LOWER, HAS_UPPER, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, UPCAST,
    )  # fmt: skip
    acc, total, top = _forward_span(
        acc, total, top, q, k_head, v_head, rows, stop, end, lk, lower, upper, qk_scale, stride_kt,
        stride_vt, True, HAS_LOWER, HAS_UPPER, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, UPCAST,
    )  # fmt: skip
    total = tl.where(rows < lq, total, 1.0)  # rows past the end, which are not stored
    _store(out_ptr + head * stride_oh, rows, lq, stride_ot, acc / total[:, None], DV, BLOCK_DV)
    lse_at = lse_ptr + head * stride_lh + rows.to(tl.int64) * stride_lt
    tl.store(lse_at, (top + tl.log2(total)) * LN2, mask=rows < lq)


@triton.jit(do_not_specialize=("lq",))
def delta_kernel(
    dout_ptr, out_ptr, dlse_ptr, delta_ptr, lq,
    stride_dt, stride_dh, stride_ot, stride_oh, stride_st, stride_sh,
    HAS_DLSE: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, heads): delta [H, Lq] = rowsum(dout ∘ out) - dlse, in fp32."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dout = _load(dout_ptr + head * stride_dh, rows, lq, stride_dt, DV, BLOCK_DV).to(tl.float32)
    out = _load(out_ptr + head * stride_oh, rows, lq, stride_ot, DV, BLOCK_DV).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    if HAS_DLSE:
        dlse_at = dlse_ptr + head * stride_sh + rows.to(tl.int64) * stride_st
        delta -= tl.load(dlse_at, mask=rows < lq, other=0.0).to(tl.float32)
    tl.store(delta_ptr + head * lq + rows, delta, mask=rows < lq)


@triton.jit
def _dq_span(
    dq, q, dout, lse, delta, k_head, v_head, rows, start, end, lk, lower, upper, qk_scale, stride_kt, stride_vt,
    MASKED: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for at in range(start, end, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        k = _load(k_head, keys, lk, stride_kt, D, BLOCK_D)
        v = _load(v_head, keys, lk, stride_vt, DV, BLOCK_DV)
        weights = tl.exp2(_dot(q, tl.trans(k), UPCAST) * qk_scale - lse[:, None])
        if MASKED:
            seen = _seen(rows[:, None], keys[None, :], lk, lower, upper, HAS_LOWER, HAS_UPPER)
            weights = tl.where(seen, weights, 0.0)
        dscores = weights * (_dot(dout, tl.trans(v), UPCAST) - delta[:, None])
        dq += _dot(dscores.to(k.dtype), k, UPCAST)
    return dq


@triton.jit(do_not_specialize=_UNSPECIALISED)
def dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, lq, lk, lower, upper, qk_scale, scale,
    stride_dt, stride_dh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_lt, stride_lh,
    stride_gt, stride_gh,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, heads): dq of BLOCK_M queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q = _load(q_ptr + head * stride_qh, rows, lq, stride_qt, D, BLOCK_D)
    dout = _load(dout_ptr + head * stride_dh, rows, lq, stride_dt, DV, BLOCK_DV)
    lse_at = lse_ptr + head * stride_lh + rows.to(tl.int64) * stride_lt
    lse = tl.load(lse_at, mask=rows < lq, other=float("inf")).to(tl.float32) * LOG2E  # inf: weights 0
    delta = tl.load(delta_ptr + head * lq + rows, mask=rows < lq, other=0.0)
    k_head = k_ptr + head // GROUP * stride_kh
    v_head = v_ptr + head // GROUP * stride_vh
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.minimum(first + BLOCK_M, lq) - 1
    start, inner, stop, end = _spans(first, last, lk, lower, upper, HAS_LOWER, HAS_UPPER, BLOCK_N)
    if HAS_LOWER:
        dq = _dq_span(
            dq, q, dout, lse, delta, k_head, v_head, rows, start, inner, lk, lower, upper, qk_scale, stride_kt,
            stride_vt, True, HAS_LOWER, HAS_UPPER, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, UPCAST,
        )  # fmt: skip
    dq = _dq_span(
        dq, q, dout, lse, delta, k_head, v_head, rows, inner, stop, lk, lower, upper, qk_scale, stride_kt,
        stride_vt, False, HAS_LOWER, HAS_UPPER, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, UPCAST,
    )  # fmt: skip
    dq = _dq_span(
        dq, q, dout, lse, delta, k_head, v_head, rows, stop, end, lk, lower, upper, qk_scale, stride_kt,
        stride_vt, True, HAS_LOWER, HAS_UPPER, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, UPCAST,
    )  # fmt: skip
    _store(dq_ptr + head * stride_gh, rows, lq, stride_gt, dq * scale, D, BLOCK_D)


@triton.jit
def _dkv_span(
    dk, dv, k, v, q_head, dout_head, lse_head, delta_head, keys, start, end, lq, lk, lower, upper, qk_scale,
    stride_qt, stride_dt, stride_lt,
    MASKED: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Works on transposed scores [keys, rows], so that both products have the weights on the left."""
    for at in range(start, end, BLOCK_M):
        rows = at + tl.arange(0, BLOCK_M)
        q = _load(q_head, rows, lq, stride_qt, D, BLOCK_D)
        lse = tl.load(lse_head + rows.to(tl.int64) * stride_lt, mask=rows < lq, other=float("inf"))
        lse = lse.to(tl.float32) * LOG2E  # inf past the end: weights 0
        weights = tl.exp2(_dot(k, tl.trans(q), UPCAST) * qk_scale - lse[None, :])
        if MASKED:
            seen = _seen(rows[None, :], keys[:, None], lk, lower, upper, HAS_LOWER, HAS_UPPER)
            weights = tl.where(seen, weights, 0.0)
        dout = _load(dout_head, rows, lq, stride_dt, DV, BLOCK_DV)
        dv += _dot(weights.to(dout.dtype), dout, UPCAST)
        delta = tl.load(delta_head + rows, mask=rows < lq, other=0.0)
        dscores = weights * (_dot(v, tl.trans(dout), UPCAST) - delta[None, :])
        dk += _dot(dscores.to(q.dtype), q, UPCAST)
    return dk, dv


@triton.jit(do_not_specialize=_UNSPECIALISED)
def dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, lq, lk, lower, upper, qk_scale, scale,
    stride_dt, stride_dh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_lt, stride_lh,
    stride_gt, stride_gh, stride_ht, stride_hh,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of keys, key heads): dk and dv of BLOCK_N keys, summed over the group's heads in fp32."""
    kv_head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    k = _load(k_ptr + kv_head * stride_kh, keys, lk, stride_kt, D, BLOCK_D)
    v = _load(v_ptr + kv_head * stride_vh, keys, lk, stride_vt, DV, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # Key j is seen by rows j - upper .. j - lower: the same band, mirrored. A key past the end is not seen,
    # and not stored either, so only the band's edges need a mask.
    last = tl.minimum(first + BLOCK_N, lk) - 1
    start, inner, stop, end = _spans(first, last, lq, -upper, -lower, HAS_UPPER, HAS_LOWER, BLOCK_M)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_head = q_ptr + head * stride_qh
        dout_head = dout_ptr + head * stride_dh
        lse_head = lse_ptr + head * stride_lh
        delta_head = delta_ptr + head * lq
        if HAS_UPPER:
            dk, dv = _dkv_span(
                dk, dv, k, v, q_head, dout_head, lse_head, delta_head, keys, start, inner, lq, lk, lower, upper,
                qk_scale, stride_qt, stride_dt, stride_lt, True, HAS_LOWER, HAS_UPPER, D, DV, BLOCK_M, BLOCK_D,
                BLOCK_DV, UPCAST,
            )  # fmt: skip
        dk, dv = _dkv_span(
            dk, dv, k, v, q_head, dout_head, lse_head, delta_head, keys, inner, stop, lq, lk, lower, upper,
            qk_scale, stride_qt, stride_dt, stride_lt, False, HAS_LOWER, HAS_UPPER, D, DV, BLOCK_M, BLOCK_D,
            BLOCK_DV, UPCAST,
        )  # fmt: skip
        dk, dv = _dkv_span(
            dk, dv, k, v, q_head, dout_head, lse_head, delta_head, keys, stop, end, lq, lk, lower, upper,
            qk_scale, stride_qt, stride_dt, stride_lt, True, HAS_LOWER, HAS_UPPER, D, DV, BLOCK_M, BLOCK_D,
            BLOCK_DV, UPCAST,
        )  # fmt: skip
    _store(dk_ptr + kv_head * stride_gh, keys, lk, stride_gt, dk * scale, D, BLOCK_D)
    _store(dv_ptr + kv_head * stride_hh, keys, lk, stride_ht, dv, DV, BLOCK_DV)
