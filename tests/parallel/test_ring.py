"""Ring attention on gloo ranks against dense attention in fp64: forward and every gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ringweave.kernels.attention import dense_reference
from ringweave.parallel.ring import Ring, ring_attention
from ringweave.parallel.ring_plan import plan_ring, ring_slots
from ringweave.parallel.spawn import WorkersFailed, run_ranks

LENGTHS = [[1, 30, 7, 41, 17], [97], [2, 2, 2, 2], [50, 3]]


def _case(lengths: list[int], heads: int, kv: int, dtype: torch.dtype):
    documents = np.concatenate([np.full(n, d) for d, n in enumerate(lengths)] + [np.full(5, -1)]).astype(
        np.int32
    )
    g = torch.Generator().manual_seed(sum(lengths))
    n = len(documents)
    q = torch.randn(n, heads, 8, generator=g, dtype=torch.float64)
    k, v = (torch.randn(n, kv, 8, generator=g, dtype=torch.float64) for _ in range(2))
    dout = torch.randn(n, heads, 8, generator=g, dtype=torch.float64)
    return documents[None], *(x.to(dtype) for x in (q, k, v, dout))


def _dense(documents: np.ndarray, q, k, v, dout, causal: bool):
    doc = torch.from_numpy(documents[0])
    allowed = (doc[:, None] == doc[None, :]) & (doc[:, None] >= 0)
    if causal:
        allowed &= torch.ones_like(allowed).tril()
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out = dense_reference(q, k, v, allowed=allowed, scale=8**-0.5)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double()))


def _worker(cases: list[tuple]) -> list[float]:
    rank, size = dist.get_rank(), dist.get_world_size()
    ring = Ring(rank=rank, size=size, group=dist.group.WORLD if size > 1 else None)
    errors = []
    for lengths, heads, kv, layout, causal, dtype, backend in cases:
        documents, q, k, v, dout = _case(lengths, heads, kv, dtype)
        want = _dense(documents, q, k, v, dout, causal)
        slots = ring_slots(documents.shape[1], size, layout=layout)
        plan = plan_ring(documents, slots, rank, causal=causal)
        mine = torch.from_numpy(slots[rank])
        # transposed storage: nothing may rely on contiguous inputs
        ours = [x[mine].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
        out = ring_attention(*ours, plan=plan, ring=ring, backend=backend)
        assert out.dtype == dtype
        grads = torch.autograd.grad(out, ours, dout[mine])
        errors.append(
            max(float((a.double() - b[mine]).abs().max()) for a, b in zip((out, *grads), want, strict=True))
        )
    return errors


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ring_equals_dense(world: int) -> None:
    f64 = [
        (lengths, heads, kv, layout, causal, torch.float64, backend)
        for lengths in LENGTHS
        for heads, kv in ((4, 2), (2, 1))
        for layout in ("zigzag", "contiguous")
        for causal in (True, False)
        for backend in ("aten_cpu", "reference")
    ]
    f32 = [(n, 4, 4, "zigzag", True, torch.float32, "aten_cpu") for n in LENGTHS]
    for errors in run_ranks(world, _worker, f64 + f32, timeout=120):
        assert max(errors[: len(f64)]) <= 1e-12
        assert max(errors[len(f64) :]) <= 2e-5


def test_wrong_plan_is_refused() -> None:
    documents = np.zeros((1, 8), np.int32)
    plan = plan_ring(documents, ring_slots(8, 2), 0)
    x = torch.zeros(8, 1, 4)
    with pytest.raises(ValueError, match="plan is for"):
        ring_attention(x, x, x, plan=plan, ring=Ring())


def _one_rank_dies() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("this rank was told to fail")
    dist.barrier()


def test_a_failing_rank_is_named() -> None:
    with pytest.raises(WorkersFailed, match=r"rank 1 of 2:[\s\S]*told to fail"):
        run_ranks(2, _one_rank_dies, timeout=60, collective=5)
