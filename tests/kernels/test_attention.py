"""Block attention, its gradients and the merge, against torch's own attention in fp64 and a dense mask."""

from __future__ import annotations

import pytest
import torch

from ringweave.kernels.attention import block_backward, block_forward, dense_reference, merge_

CASES = [(7, 7, True), (5, 11, False), (1, 1, True), (33, 33, True), (16, 3, False)]


def _inputs(
    lq: int, lk: int, *, heads: int = 4, kv: int = 2, dim: int = 8, value: int = 8, dtype=torch.float64
):
    g = torch.Generator().manual_seed(lq * 100 + lk)
    return (
        torch.randn(lq, heads, dim, generator=g, dtype=dtype),
        torch.randn(lk, kv, dim, generator=g, dtype=dtype),
        torch.randn(lk, kv, value, generator=g, dtype=dtype),
    )


@pytest.mark.parametrize("backend", ["reference", "aten_cpu"])
@pytest.mark.parametrize(("lq", "lk", "causal"), CASES)
def test_block_equals_sdpa_and_logsumexp(lq: int, lk: int, causal: bool, backend: str) -> None:
    q, k, v = _inputs(lq, lk)
    out, lse = block_forward(q, k, v, upper=0 if causal else None, scale=0.3, backend=backend)
    kk, vv = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
    want = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), kk, vv, is_causal=causal, scale=0.3
    ).transpose(0, 1)
    scores = torch.einsum("qhd,hkd->hqk", q, kk) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(lq, lk).triu(1).bool(), float("-inf"))
    assert (out - want).abs().max() < 1e-12
    assert (lse - scores.logsumexp(-1).T).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["reference", "aten_cpu"])
@pytest.mark.parametrize(("lq", "lk", "causal"), CASES)
def test_block_gradients_equal_autograd(lq: int, lk: int, causal: bool, backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in _inputs(lq, lk))
    allowed = torch.ones(lq, lk).tril().bool() if causal else torch.ones(lq, lk).bool()
    want = dense_reference(q, k, v, allowed=allowed, scale=0.3)
    dout = torch.randn_like(want)
    grads = torch.autograd.grad(want, (q, k, v), dout)
    with torch.no_grad():
        out, lse = block_forward(q, k, v, upper=0 if causal else None, scale=0.3, backend=backend)
        ours = block_backward(
            dout, q, k, v, out, lse, upper=0 if causal else None, scale=0.3, backend=backend
        )
    for a, b in zip(ours, grads, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_reference_takes_value_dim_other_than_head_dim() -> None:
    q, k, v = _inputs(5, 9, dim=8, value=3)
    out, _ = block_forward(q, k, v, scale=0.5, backend="reference")
    want = dense_reference(q, k, v, allowed=torch.ones(5, 9).bool(), scale=0.5)
    assert (out - want).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["reference", "aten_cpu"])
@pytest.mark.parametrize(
    "band", [(None, 2), (-3, None), (-3, 2), (-2, 0), (None, -4), (9, None), (-600, -300)]
)
def test_bands_equal_the_dense_mask_with_empty_rows(band, backend: str) -> None:
    """A7: a row that sees no key gives 0 and -inf, and no gradient."""
    lq, lk = (700, 400) if band == (-600, -300) else (13, 11)
    q, k, v = (x.requires_grad_() for x in _inputs(lq, lk, value=5))
    lower, upper = band
    ahead = torch.arange(lk)[None] - torch.arange(lq)[:, None]
    allowed = (ahead >= (-(10**9) if lower is None else lower)) & (
        ahead <= (10**9 if upper is None else upper)
    )
    want = dense_reference(q, k, v, allowed=allowed, scale=0.3)
    dout = torch.randn_like(want)
    grads = torch.autograd.grad(want, (q, k, v), dout)
    with torch.no_grad():
        out, lse = block_forward(q, k, v, lower=lower, upper=upper, scale=0.3, backend=backend)
        ours = block_backward(dout, q, k, v, out, lse, lower=lower, upper=upper, scale=0.3, backend=backend)
    assert (out - want).abs().max() < 1e-12
    assert torch.equal(torch.isneginf(lse).all(1), ~allowed.any(1))
    for a, b in zip(ours, grads, strict=True):
        assert (a - b).abs().max() < 1e-11


def test_merge_of_pieces_equals_whole_and_survives_rows_without_keys() -> None:
    q, k, v = _inputs(6, 12)
    whole, whole_lse = block_forward(q, k, v, scale=0.3, backend="reference")
    out = torch.zeros_like(whole)
    lse = torch.full((6, 4), float("-inf"), dtype=torch.float64)
    for a, b in ((0, 5), (5, 6), (6, 12)):
        merge_(out, lse, *block_forward(q, k[a:b], v[a:b], scale=0.3, backend="reference"))
    assert (out - whole).abs().max() < 1e-12
    assert (lse - whole_lse).abs().max() < 1e-12
    empty, none = torch.zeros(2, 4, 8), torch.full((2, 4), float("-inf"))
    merge_(empty, none, torch.zeros(2, 4, 8), torch.full((2, 4), float("-inf")))
    assert torch.equal(empty, torch.zeros(2, 4, 8))
    assert torch.isneginf(none).all()


def test_merge_of_huge_logits_stays_finite() -> None:
    out, lse = torch.ones(1, 1, 2), torch.tensor([[1e4]])
    merge_(out, lse, torch.zeros(1, 1, 2), torch.tensor([[-1e4]]))
    assert torch.equal(out, torch.ones(1, 1, 2))
    assert lse.item() == 1e4
