"""Block attention on a CUDA device: every backend against fp64, and the Triton kernels against SDPA's kernels.

Run with `pytest tests/gpu -m gpu -s`; the last test prints times.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ringweave.kernels.attention import (
    BACKENDS,
    block_backward,
    block_forward,
    dense_reference,
    merge_,
    why_unavailable,
)
from ringweave.kernels.attention_band import band_allowed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = torch.device("cuda")
INF = float("inf")
# Largest error over the largest wanted value or 1.
TOLERANCE = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BANDS = {
    "full": (257, 391, None, None),
    "causal": (513, 513, None, 0),
    "causal_with_offset": (300, 450, None, 130),
    "window": (700, 700, -149, 0),
    "both_sides": (333, 777, -50, 300),
    "lower_only": (500, 450, -200, None),
    "empty_rows": (420, 300, -250, -100),
}
SHAPES = {
    "mha": (4, 4, 64, 64),
    "gqa": (8, 2, 128, 128),
    "mqa": (6, 1, 64, 64),
    "uneven_heads": (4, 2, 80, 80),
    "wide_value": (4, 2, 64, 128),
    "narrow_value": (4, 4, 96, 32),
    "tiny_heads": (2, 2, 16, 8),
    "wide_heads": (2, 1, 192, 256),
}
# Every band and every shape, not every pair: Triton compiles four kernels for most pairs and dtypes.
CASES = [(band, shape) for i, band in enumerate(BANDS) for j, shape in enumerate(SHAPES) if (i + j) % 4 == 0]


def inputs(
    lq: int, lk: int, heads: int, kv: int, dim: int, value: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """q, k, v, dout, dlse."""
    g = torch.Generator(CUDA).manual_seed(lq * 1000 + lk)
    shapes = ((lq, heads, dim), (lk, kv, dim), (lk, kv, value), (lq, heads, value), (lq, heads))
    q, k, v, dout, dlse = (torch.randn(s, generator=g, device=CUDA) for s in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype), dout.to(dtype), dlse


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    error = ((got.double() - want).abs().max() / max(1.0, want.abs().max().item())).item()
    assert error <= tolerance, f"{what}: error {error:.2e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize(("band", "shape"), CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_conforms_on_cuda(backend: str, dtype: torch.dtype, band: str, shape: str) -> None:
    reason = why_unavailable(backend, CUDA, dtype)
    if reason is not None:
        pytest.skip(f"{backend} with {dtype}: {reason}")
    lq, lk, lower, upper = BANDS[band]
    heads, kv, dim, value = SHAPES[shape]
    if backend == "flash_attn" and max(dim, value) > 248:
        pytest.skip("flash_attn: the gradient of the LSE takes two more channels than its 256")
    q, k, v, dout, dlse = inputs(lq, lk, heads, kv, dim, value, dtype)
    scale = dim**-0.5
    options = {"lower": lower, "upper": upper, "scale": scale, "backend": backend}
    allowed = band_allowed(lq, lk, lower, upper, device=CUDA)
    rows = allowed.any(1)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want = dense_reference(*exact, allowed=allowed, scale=scale)
    scores = torch.einsum("qhd,khd->hqk", exact[0][rows], exact[1].repeat_interleave(heads // kv, 1)) * scale
    want_lse = scores.masked_fill(~allowed[rows], -INF).logsumexp(-1).T

    out, lse = block_forward(q, k, v, **options)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    close(out, want, TOLERANCE[dtype], "out")
    close(lse[rows], want_lse, 5e-5 if dtype == torch.float32 else 1e-3, "lse")
    assert (lse[~rows] == -INF).all()
    assert not out[~rows].any()
    for with_dlse in (False, True):
        loss = (want * dout.double()).sum()
        if with_dlse:
            loss = loss + (want_lse * dlse.double()[rows]).sum()
        wanted = torch.autograd.grad(loss, exact, retain_graph=True)
        got = block_backward(dout, q, k, v, out, lse, dlse=dlse if with_dlse else None, **options)
        for name, mine, theirs in zip(("dq", "dk", "dv"), got, wanted, strict=True):
            assert mine.dtype == dtype
            close(mine, theirs, TOLERANCE[dtype], f"{name}, dlse {with_dlse}")


def test_strided_inputs_and_expanded_dout_on_cuda() -> None:
    q, k, v, *_ = inputs(300, 300, 4, 2, 64, 64, torch.bfloat16)
    band = {"upper": 0, "scale": 0.125, "backend": "triton"}
    far = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v)]
    out, lse = block_forward(q, k, v, **band)
    for a, b in zip(block_forward(*far, **band), (out, lse), strict=True):
        assert torch.equal(a, b)
    ones = torch.ones((), dtype=torch.bfloat16, device=CUDA)
    got = block_backward(ones.expand(out.shape), *far, out, lse, **band)
    want = block_backward(torch.ones_like(out), q, k, v, out, lse, **band)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_no_buffer_of_queries_times_keys_on_cuda() -> None:
    """64K x 64K multi-query: one byte a pair would be 4 GiB; forward and backward may take 256 MiB."""
    n = 65536
    q, k, v, dout, dlse = inputs(n, n, 2, 1, 64, 64, torch.bfloat16)
    band = {"lower": -40000, "upper": 0, "scale": 0.125, "backend": "triton"}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse = block_forward(q, k, v, **band)
    grads = block_backward(dout, q, k, v, out, lse, dlse=dlse, **band)
    torch.cuda.synchronize()
    assert all(x.isfinite().all() for x in (out, lse, *grads))
    assert torch.cuda.max_memory_allocated() - before < 256 << 20


def test_offsets_beyond_two_to_the_31_elements() -> None:
    """The last tokens of a tensor of 2^31 + elements, as a pack of a million tokens has; a window keeps it cheap."""
    tokens, heads, dim = (1 << 17) + 77, 128, 128
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    big = torch.randn(tokens, heads, dim, dtype=torch.bfloat16, device=CUDA)
    assert big.numel() > 1 << 31
    k = big[:, :1]
    band = {"scale": 0.1, "backend": "triton", "upper": 0}
    out, lse = block_forward(big, k, k, lower=-63, **band)
    tail = 200
    want, want_lse = block_forward(
        big[-tail:], k[-tail - 63 :], k[-tail - 63 :], lower=0, **(band | {"upper": 63})
    )
    close(out[-tail:], want.double(), 2e-2, "out")
    close(lse[-tail:], want_lse.double(), 1e-4, "lse")


def milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Median time of `run` on the device, after two runs to warm up."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("length", "heads", "kv", "dim"), [(4096, 16, 16, 64), (8192, 32, 8, 128), (16384, 16, 2, 128)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_triton_equals_sdpa_and_prints_times(
    dtype: torch.dtype, length: int, heads: int, kv: int, dim: int, causal: bool
) -> None:
    """Sizeable blocks against torch's fused SDPA, itself in half precision: both within rounding of each other."""
    q, k, v, dout, _ = inputs(length, length, heads, kv, dim, dim, dtype)
    band = {"upper": 0 if causal else None, "scale": dim**-0.5}
    rivals = [x.transpose(0, 1)[None].detach().requires_grad_() for x in (q, k, v)]

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(
            *rivals, is_causal=causal, scale=band["scale"], enable_gqa=heads != kv
        )

    want = sdpa()
    douts = dout.transpose(0, 1)[None]
    wanted = torch.autograd.grad(want, rivals, douts, retain_graph=True)
    out, lse = block_forward(q, k, v, backend="triton", **band)
    got = block_backward(dout, q, k, v, out, lse, backend="triton", **band)
    close(out, want[0].transpose(0, 1).double(), TOLERANCE[dtype], "out")
    for name, mine, theirs in zip(("dq", "dk", "dv"), got, wanted, strict=True):
        close(mine, theirs[0].transpose(0, 1).double(), TOLERANCE[dtype], name)

    # 4 D operations a pair and head forward, 2.5 times that backward (FlashAttention-2's count).
    operations = 4 * dim * heads * (length * (length + 1) // 2 if causal else length * length)
    names = [name for name in BACKENDS if name != "reference" and not why_unavailable(name, CUDA, dtype)]
    for name in ("torch", *names):
        if name == "torch":
            forward = milliseconds(sdpa)
            backward = milliseconds(lambda: torch.autograd.grad(want, rivals, douts, retain_graph=True))
        else:
            forward = milliseconds(lambda name=name: block_forward(q, k, v, backend=name, **band))
            backward = milliseconds(
                lambda name=name: block_backward(dout, q, k, v, out, lse, backend=name, **band)
            )
        row = {
            "attention": name, "device": torch.cuda.get_device_name(), "dtype": str(dtype), "causal": causal,
            "length": length, "heads": f"{heads}:{kv}", "dim": dim,
            "forward_ms": round(forward, 3), "forward_tflops": round(operations / forward / 1e9, 1),
            "backward_ms": round(backward, 3), "backward_tflops": round(2.5 * operations / backward / 1e9, 1),
        }  # fmt: skip
        print(json.dumps(row))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_blocks_of_a_ring_merge_into_one_shot_attention(dtype: torch.dtype) -> None:
    """Four ranks' keys one after the other, as a ring brings them, accumulated in fp32."""
    length, ranks = 4096, 4
    q, k, v, dout, _ = inputs(length, length, 8, 2, 128, 128, dtype)
    scale, step = 128**-0.5, length // ranks
    want, want_lse = block_forward(q, k, v, upper=0, scale=scale, backend="triton")
    wanted = block_backward(dout, q, k, v, want, want_lse, upper=0, scale=scale, backend="triton")
    out = torch.zeros(length, 8, 128, device=CUDA)
    lse = torch.full((length, 8), -INF, device=CUDA)
    parts = [slice(a, a + step) for a in range(0, length, step)]
    for part in parts:
        band = {"upper": -part.start, "scale": scale, "backend": "triton"}
        merge_(out, lse, *block_forward(q, k[part], v[part], **band))
    close(out, want.double(), TOLERANCE[dtype], "out")
    close(lse, want_lse.double(), 1e-3, "lse")
    dq, dk, dv = (torch.zeros(x.shape, device=CUDA) for x in (q, k, v))
    for part in parts:
        band = {"upper": -part.start, "scale": scale, "backend": "triton"}
        grads = block_backward(dout, q, k[part], v[part], out, lse, **band)
        for total, grad in zip((dq, dk[part], dv[part]), grads, strict=True):
            total += grad
    for name, mine, theirs in zip(("dq", "dk", "dv"), (dq, dk, dv), wanted, strict=True):
        close(mine, theirs.double(), TOLERANCE[dtype], name)
