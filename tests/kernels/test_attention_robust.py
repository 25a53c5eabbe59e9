"""What has broken attention elsewhere: strides, empty rows, huge logits, square shapes, S x S buffers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ringweave.kernels.attention import (
    BACKENDS,
    available_backends,
    block_backward,
    block_forward,
    dense_reference,
    why_unavailable,
)
from ringweave.kernels.attention_band import band_allowed

CPU = torch.device("cpu")
INF = float("inf")
FP32 = available_backends(CPU, torch.float32)
FP64 = available_backends(CPU, torch.float64)


def random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def both(q, k, v, dout, dlse, backend, **band):
    """(out, lse, dq, dk, dv) of one block."""
    out, lse = block_forward(q, k, v, scale=0.25, backend=backend, **band)
    grads = block_backward(dout, q, k, v, out, lse, dlse=dlse, scale=0.25, backend=backend, **band)
    return out, lse, *grads


LAYOUTS = {
    "heads_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last_but_far_apart": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "every_second_channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "a_slice_of_a_longer_pack": lambda x: torch.cat([x, x, x])[x.shape[0] : 2 * x.shape[0]],
    "a_part_of_a_fused_projection": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FP32)
def test_strides_do_not_matter(backend: str, layout: str) -> None:
    tensors = random((33, 2, 16), (41, 1, 16), (41, 1, 16), (33, 2, 16), (33, 2))
    want = both(*tensors, backend, lower=-20, upper=10)
    strange = [LAYOUTS[layout](x) if x.dim() == 3 else x.t().contiguous().t() for x in tensors]
    assert all(torch.equal(a, b) for a, b in zip(strange, tensors, strict=True))
    got = both(*strange, backend, lower=-20, upper=10)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", FP32)
def test_expanded_inputs_and_dout_equal_their_copies(backend: str) -> None:
    """out.sum().backward() hands over a dout of stride 0; one key for all tokens or heads is expanded likewise."""
    q, k, v, dout, dlse = (
        torch.tensor(0.7).expand(33, 2, 16),
        random((1, 2, 16))[0].expand(41, 2, 16),
        random((41, 1, 16))[0].expand(41, 2, 16),
        torch.tensor(1.0).expand(33, 2, 16),
        torch.tensor(0.5).expand(33, 2),
    )
    got = both(q, k, v, dout, dlse, backend, upper=8)
    want = both(*(x.contiguous() for x in (q, k, v, dout, dlse)), backend, upper=8)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", FP32)
def test_as_many_heads_as_tokens_as_channels(backend: str) -> None:
    """With every size equal, swapped dimensions go unnoticed by shape checks; only numbers tell."""
    n = 16
    q, k, v, dout = random((n, n, n), (n, n, n), (n, n, n), (n, n, n))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want = dense_reference(*exact, allowed=band_allowed(n, n, None, 0), scale=0.25)
    wanted = torch.autograd.grad(want, exact, dout.double())
    out, _, *grads = both(q, k, v, dout, None, backend, upper=0)
    assert (out - want).abs().max() < 2e-5
    for a, b in zip(grads, wanted, strict=True):
        assert (a - b).abs().max() < 2e-5


@pytest.mark.parametrize(("lower", "upper"), [(None, -5), (20, None), (-30, -25), (5, 8)])
@pytest.mark.parametrize("backend", FP32)
def test_gradients_with_empty_rows_equal_deleting_them(
    backend: str, lower: int | None, upper: int | None
) -> None:
    """Whatever stands in the empty rows: another block's finite out and lse, an untouched row's -inf, or NaN."""
    lq, lk = 40, 24
    q, k, v, dout, dlse = random((lq, 2, 16), (lk, 1, 16), (lk, 1, 16), (lq, 2, 16), (lq, 2))
    keep = band_allowed(lq, lk, lower, upper).any(1)
    first = int(keep.nonzero()[0])
    assert not keep.all()
    band = {"lower": lower, "upper": upper, "scale": 0.25, "backend": backend}
    out, lse = block_forward(q, k, v, **band)
    assert not out[~keep].any()
    assert (lse[~keep] == -INF).all()

    shifted = {
        "lower": None if lower is None else lower + first,
        "upper": None if upper is None else upper + first,
    }
    wanted = block_backward(
        dout[keep], q[keep], k, v, out[keep], lse[keep], dlse=dlse[keep], **(band | shifted)
    )
    for garbage in (0.0, -INF, 3.0, float("nan")):
        for x in (out, lse, dout, dlse):
            x[~keep] = garbage
        dq, dk, dv = block_backward(dout, q, k, v, out, lse, dlse=dlse, **band)
        assert not dq[~keep].any()
        assert torch.equal(dq[keep], wanted[0])
        assert torch.equal(dk, wanted[1])
        assert torch.equal(dv, wanted[2])


@pytest.mark.parametrize(
    ("lq", "lk", "upper"), [(0, 5, None), (5, 0, None), (0, 0, 0), (3, 4, -7), (4, 4, -4)]
)
@pytest.mark.parametrize("backend", FP32)
def test_blocks_without_any_pair(backend: str, lq: int, lk: int, upper: int | None) -> None:
    q, k, v, dout, dlse = random((lq, 4, 8), (lk, 2, 8), (lk, 2, 5), (lq, 4, 5), (lq, 4))
    out, lse, dq, dk, dv = both(q, k, v, dout, dlse, backend, upper=upper)
    assert out.shape == (lq, 4, 5) and not out.any()
    assert lse.shape == (lq, 4) and (lse == -INF).all()
    for grad, x in ((dq, q), (dk, k), (dv, v)):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", FP32)
def test_logits_of_ten_thousand_stay_finite(backend: str, dtype: torch.dtype) -> None:
    """Scores of ±1e4: exp of any of them overflows or vanishes unless the maximum is taken off first."""
    if why_unavailable(backend, CPU, dtype):
        pytest.skip(f"{backend}: {why_unavailable(backend, CPU, dtype)}")
    q = torch.full((20, 2, 16), 50.0, dtype=dtype)
    k = torch.full((24, 1, 16), 50.0, dtype=dtype)
    k[::2] *= -1.0  # scores 16 * 2500 / 4 = 1e4 for odd keys, -1e4 for even ones
    v, dout, dlse = random((24, 1, 16), (20, 2, 16), (20, 2), dtype=dtype)
    out, lse, *grads = both(q, k, v, dout, dlse.float(), backend, lower=-8, upper=8)
    assert all(x.isfinite().all() for x in (out, lse, *grads))
    assert (out[0] - v[1:9:2].double().mean(0)).abs().max() < 0.02
    assert (lse[0] - 1e4 - torch.tensor(4.0).log()).abs().max() < 2e-3
    only_low = both(q[:1], k[:1], v[:1], dout[:1], dlse[:1].float(), backend)
    assert all(x.isfinite().all() for x in only_low)
    assert (only_low[1] + 1e4).abs().max() < 2e-3


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, band):  # type: ignore[override]
        out, lse = block_forward(q, k, v, **band)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.band = band
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):  # type: ignore[override]
        return *block_backward(dout, *ctx.saved_tensors, dlse=dlse, **ctx.band), None


@pytest.mark.parametrize(("lower", "upper"), [(None, None), (None, 1), (-2, 1)])
@pytest.mark.parametrize("backend", FP64)
def test_gradcheck_of_out_and_lse(backend: str, lower: int | None, upper: int | None) -> None:
    tensors = random((4, 2, 3), (5, 1, 3), (5, 1, 2), dtype=torch.float64)
    band = {"lower": lower, "upper": upper, "scale": 0.5, "backend": backend}
    assert torch.autograd.gradcheck(lambda *x: _Block.apply(*x, band), [x.requires_grad_() for x in tensors])


def test_an_unknown_backend_names_the_known_ones() -> None:
    q, k, v = random((2, 2, 4), (2, 2, 4), (2, 2, 4))
    with pytest.raises(
        ValueError, match=r"unknown attention backend 'fash'; known: reference, aten_cpu, .*triton"
    ):
        block_forward(q, k, v, scale=1.0, backend="fash")


def test_a_backend_that_cannot_run_here_says_why_and_what_can() -> None:
    q, k, v = random((2, 2, 4), (2, 2, 4), (2, 2, 4))
    found = 0
    for backend in BACKENDS:
        for dtype in (torch.float32, torch.float64):
            reason = why_unavailable(backend, CPU, dtype)
            if reason is None:
                continue
            found += 1
            with pytest.raises(
                RuntimeError, match=r"cannot run here: .*; those that can: reference, aten_cpu"
            ):
                block_forward(q.to(dtype), k.to(dtype), v.to(dtype), scale=1.0, backend=backend)
            assert backend not in available_backends(CPU, dtype)
    assert found, "flash_attn never runs on CPU"


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((5, 4, 8), (5, 3, 8), (5, 3, 8)),
        ((5, 4, 8), (5, 4, 6), (5, 4, 8)),
        ((5, 4, 8), (5, 4, 8), (6, 4, 8)),
        ((5, 4, 8), (5, 2, 8), (5, 4, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q: tuple, k: tuple, v: tuple) -> None:
    with pytest.raises(ValueError, match=r"do not fit: q \[5, 4, 8\]"):
        block_forward(*random(q, k, v), scale=1.0, backend="aten_cpu")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_attention_needs_no_triton() -> None:
    printed = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from ringweave.kernels.attention import available_backends, block_forward, why_unavailable\n"
        "x = torch.ones(3, 2, 4)\n"
        "print(block_forward(x, x, x, upper=0, scale=1.0, backend='aten_cpu')[0].sum().item())\n"
        "cpu = torch.device('cpu')\n"
        "print('triton' in available_backends(cpu, x.dtype), why_unavailable('triton', cpu, x.dtype))\n"
    )
    assert printed.split("\n")[:2] == ["24.0", "False the package triton is not installed"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_no_buffer_of_queries_times_keys() -> None:
    """Multi-query blocks of 8192 x 8192, forward and backward: peak memory grows by less than one byte a pair.

    The smallest such buffer, a boolean mask, would be 64 MiB; the fp32 scores of one head would be 256 MiB.
    """
    printed = run_python(
        "import torch\n"
        "from ringweave.kernels.attention import block_backward, block_forward\n"
        "torch.set_num_threads(1)\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))\n"
        "def run(n, backend, lower, upper):\n"
        "    q, k = torch.randn(n, 2, 16), torch.randn(n, 1, 16)\n"
        "    band = dict(lower=lower, upper=upper, scale=0.25, backend=backend)\n"
        "    out, lse = block_forward(q, k, k, **band)\n"
        "    block_backward(out, q, k, k, out, lse, dlse=lse, **band)\n"
        "for backend in ('aten_cpu', 'sdpa'):\n"
        "    run(512, backend, -256, 10)\n"
        "    before = peak()\n"
        "    for lower, upper in ((None, None), (None, 0), (-4096, 10)):\n"
        "        run(8192, backend, lower, upper)\n"
        "    print(backend, peak() - before)\n"
    )
    grown = {line.split()[0]: int(line.split()[1]) for line in printed.splitlines()}
    print(grown)
    assert set(grown) == {"aten_cpu", "sdpa"}
    assert all(kib < 64 * 1024 for kib in grown.values()), grown
