"""Every attention backend that runs here does the same: out, LSE and gradients against dense fp64 maths.

The truth is a dense mask in fp64 (`dense_reference`, itself held against torch's SDPA) and autograd through it.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ringweave.kernels.attention import (
    BACKENDS,
    available_backends,
    block_backward,
    block_forward,
    default_backend,
    dense_reference,
    merge_,
    why_unavailable,
)
from ringweave.kernels.attention_band import band_allowed

CPU = torch.device("cpu")
INF = float("inf")
SCALE = 0.3
# Largest error, over the largest wanted value or 1.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
# Name: (Lq, Lk, lower, upper). No length is a multiple of a tile's.
BANDS = {
    "full": (37, 53, None, None),
    "causal": (70, 70, None, 0),
    "causal_with_offset": (50, 75, None, 20),
    "window": (70, 70, -14, 0),
    "both_sides": (60, 90, -20, 30),
    "empty_rows": (70, 60, -35, -25),
}
# Blocks so large that the CPU backend cuts them into tiles: by chunks, at both edges, and without any mask.
LARGE_BANDS = {
    "large_causal_with_offset": (300, 310, None, 60),
    "large_more_rows_than_keys": (310, 200, None, 25),
    "large_lower_only": (280, 300, 25, None),
    "large_window": (300, 300, -149, 0),
    "large_both_sides": (290, 700, -100, 450),
    "large_empty_rows": (320, 200, -230, -60),
}
# Name: (heads, key heads, D, Dv).
SHAPES = {
    "mha": (2, 2, 16, 16),
    "gqa": (4, 2, 16, 16),
    "mqa": (3, 1, 16, 16),
    "mha_wide_value": (2, 2, 12, 20),
    "gqa_narrow_value": (4, 2, 20, 8),
    "mqa_wide_value": (2, 1, 8, 33),
}
CASES = [*itertools.product(BANDS, SHAPES), *itertools.product(LARGE_BANDS, ("gqa", "mqa_wide_value"))]


def inputs(
    lq: int, lk: int, heads: int, kv: int, dim: int, value: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """q, k, v, dout, dlse."""
    g = torch.Generator().manual_seed(lq * 1000 + lk)
    shapes = ((lq, heads, dim), (lk, kv, dim), (lk, kv, value), (lq, heads, value), (lq, heads))
    q, k, v, dout, dlse = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return q.to(dtype), k.to(dtype), v.to(dtype), dout.to(dtype), dlse.to(exact)


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse [Lq, H]) in fp64, through which autograd is safe: rows without a key stay out of logsumexp."""
    q, k, v = q.double(), k.double(), v.double()
    out = dense_reference(q, k, v, allowed=allowed, scale=SCALE)
    rows = allowed.any(1)
    scores = torch.einsum("qhd,khd->hqk", q[rows], k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * SCALE
    some = scores.masked_fill(~allowed[rows], -INF).logsumexp(-1).T
    return out, torch.full(q.shape[:2], -INF, dtype=torch.float64).index_put((rows.nonzero()[:, 0],), some)


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, what
    if want.numel():
        error = (got.double() - want).abs().max() / max(1.0, want.abs().max().item())
        assert error <= tolerance, f"{what}: error {error:.2e}, allowed {tolerance:.0e}"


def skip_unless_runs(backend: str, dtype: torch.dtype) -> None:
    reason = why_unavailable(backend, CPU, dtype)
    if reason is not None:
        pytest.skip(f"{backend} with {dtype}: {reason}")


def interpreted_subset(band: str, shape: str, dtype: torch.dtype) -> bool:
    """One case in six, with every band, every shape and every dtype among them: each takes a second."""
    if band not in BANDS:
        return False
    place = list(BANDS).index(band) + list(SHAPES).index(shape)
    return place % 6 == {torch.float32: 0, torch.float16: 2, torch.bfloat16: 4}.get(dtype, 0)


@pytest.mark.parametrize(("band", "shape"), CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_conforms(backend: str, dtype: torch.dtype, band: str, shape: str) -> None:
    skip_unless_runs(backend, dtype)
    if backend == "triton" and not interpreted_subset(band, shape, dtype):
        pytest.skip("triton: interpreted here, so only every sixth of the small bands; a GPU runs the rest")
    lq, lk, lower, upper = (BANDS | LARGE_BANDS)[band]
    q, k, v, dout, dlse = inputs(lq, lk, *SHAPES[shape], dtype)
    options = {"lower": lower, "upper": upper, "scale": SCALE, "backend": backend}
    allowed = band_allowed(lq, lk, lower, upper)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = dense(*exact, allowed)

    out, lse = block_forward(q, k, v, **options)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(out, want, TOLERANCE[dtype], "out")
    rows = allowed.any(1)
    assert (lse[~rows] == -INF).all()
    assert not out[~rows].any()
    lse_tolerance = 1e-12 if dtype == torch.float64 else 2e-5 if dtype == torch.float32 else 3e-4
    close(lse[rows], want_lse[rows], lse_tolerance, "lse")

    for with_dlse in (False, True):
        loss = (want * dout.double()).sum()
        if with_dlse:
            loss = loss + (want_lse[rows] * dlse.double()[rows]).sum()
        wanted = torch.autograd.grad(loss, exact, retain_graph=True)
        got = block_backward(dout, q, k, v, out, lse, dlse=dlse if with_dlse else None, **options)
        for name, mine, theirs in zip(("dq", "dk", "dv"), got, wanted, strict=True):
            assert mine.dtype == dtype
            close(mine, theirs, TOLERANCE[dtype], f"{name}, dlse {with_dlse}")


@pytest.mark.parametrize("backend", available_backends(CPU, torch.float32))
def test_lse_is_the_natural_logarithm_of_the_sum_of_exponentials(backend: str) -> None:
    """One query, keys 0: LSE is ln(number of keys seen); kernels that work in powers of two get this wrong."""
    q, k = torch.zeros(3, 2, 16), torch.zeros(7, 2, 16)
    _, lse = block_forward(q, k, k, lower=-1, upper=4, scale=1.0, backend=backend)
    close(lse, torch.tensor([[5.0], [6.0], [6.0]]).expand(3, 2).double().log(), 1e-6, "lse")


@pytest.mark.parametrize(("lq", "lk", "causal"), [(7, 7, True), (5, 11, False), (1, 1, True), (33, 33, True)])
def test_the_truth_of_these_tests_equals_torchs_sdpa(lq: int, lk: int, causal: bool) -> None:
    q, k, v, *_ = inputs(lq, lk, 4, 2, 8, 6, torch.float64)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=causal, scale=SCALE, enable_gqa=True
    ).transpose(0, 1)
    out, _ = dense(q, k, v, band_allowed(lq, lk, None, 0 if causal else None))
    close(out, want, 1e-12, "out")


@pytest.mark.parametrize("backend", available_backends(CPU, torch.float64))
def test_blocks_of_a_row_merge_into_the_whole(backend: str) -> None:
    """Three blocks of keys, merged in a shuffled order; each block's backward with the merged out and lse."""
    lq, lk = 40, 60
    q, k, v, dout, dlse = inputs(lq, lk, 4, 2, 8, 12, torch.float64)
    exact = [x.requires_grad_() for x in (q, k, v)]
    want, want_lse = dense(*exact, band_allowed(lq, lk, None, 20))
    wanted = torch.autograd.grad((want * dout).sum() + (want_lse * dlse).sum(), exact)
    q, k, v = (x.detach() for x in exact)
    out, lse = torch.zeros(lq, 4, 12, dtype=torch.float64), torch.full((lq, 4), -INF, dtype=torch.float64)
    blocks = ((55, 60), (0, 30), (30, 55))  # the first is empty for all but the last rows
    for a, b in blocks:
        merge_(out, lse, *block_forward(q, k[a:b], v[a:b], upper=20 - a, scale=SCALE, backend=backend))
    close(out, want, 1e-12, "out")
    close(lse, want_lse, 1e-12, "lse")
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for a, b in blocks:
        parts = block_backward(
            dout, q, k[a:b], v[a:b], out, lse, dlse=dlse, upper=20 - a, scale=SCALE, backend=backend
        )
        for total, part in zip((dq, dk[a:b], dv[a:b]), parts, strict=True):
            total += part
    for name, mine, theirs in zip(("dq", "dk", "dv"), (dq, dk, dv), wanted, strict=True):
        close(mine, theirs, 1e-12, name)


def test_merge_survives_rows_that_saw_no_key() -> None:
    out, lse = torch.zeros(2, 4, 8), torch.full((2, 4), -INF)
    merge_(out, lse, torch.zeros(2, 4, 8), torch.full((2, 4), -INF))
    assert torch.equal(out, torch.zeros(2, 4, 8))
    assert torch.isneginf(lse).all()


def test_merge_of_huge_logits_stays_finite() -> None:
    out, lse = torch.ones(1, 1, 2), torch.tensor([[1e4]])
    merge_(out, lse, torch.zeros(1, 1, 2), torch.tensor([[-1e4]]))
    assert torch.equal(out, torch.ones(1, 1, 2))
    assert lse.item() == 1e4


def test_default_backend_runs_here() -> None:
    for dtype in TOLERANCE:
        assert default_backend(CPU) in available_backends(CPU, dtype)
    assert default_backend(torch.device("cuda")) == "triton"


def test_interpreted_subset_has_every_band_shape_and_dtype() -> None:
    cases = itertools.product(BANDS, SHAPES, (torch.float32, torch.float16, torch.bfloat16))
    kept = [case for case in cases if interpreted_subset(*case)]
    assert len(kept) == 18
    for part, names in enumerate((BANDS, SHAPES, (torch.float32, torch.float16, torch.bfloat16))):
        assert {case[part] for case in kept} == set(names)
