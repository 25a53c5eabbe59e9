"""Ring attention on gloo ranks against dense attention in fp64: forward and every gradient, on any layout."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ringweave.kernels.attention import dense_reference
from ringweave.parallel.packed import PackedAttention
from ringweave.parallel.ring import Ring, ring_attention
from ringweave.parallel.ring_layout import RingLayout
from ringweave.parallel.ring_plan import plan_ring
from ringweave.parallel.spawn import WorkersFailed, run_ranks
from ringweave.parallel.ulysses import Ulysses

LENGTHS = [[1, 30, 7, 41, 17], [97], [2, 2, 2, 2], [50, 3]]
#: trainers.md-style names of the masks used below: share of each document that is a two-way prefix, and a window.
MASKS = {"causal": (0.0, None), "bidirectional": (1.0, None), "prefix": (0.4, None), "window": (0.0, 9),
         "two-way window": (1.0, 6)}  # fmt: skip


def _case(lengths, heads, kv, dtype, mask="causal", dims=(8, 8), padding=5, mixed=False):
    documents = np.concatenate([np.full(n, d) for d, n in enumerate(lengths)] + [np.full(padding, -1)])
    share, window = MASKS[mask]
    prefix = np.concatenate(
        [np.full(n, round(n * (share if not mixed or d % 2 else 1.0 - share))) for d, n in enumerate(lengths)]
        + [np.zeros(padding)]
    )
    g = torch.Generator().manual_seed(sum(lengths))
    n, (d, dv) = len(documents), dims
    shapes = ((heads, d), (kv, d), (kv, dv), (heads, dv))
    tensors = [torch.randn(n, *s, generator=g, dtype=torch.float64) for s in shapes]
    dlse = torch.randn(n, heads, generator=g, dtype=torch.float64)
    return (
        documents[None].astype(np.int32), prefix[None].astype(np.int32), window,
        *(x.to(dtype) for x in tensors), dlse,
    )  # fmt: skip


def _allowed(documents, prefix, window):
    doc, lead = torch.from_numpy(documents[0]), torch.from_numpy(prefix[0])
    at = torch.arange(len(doc))
    start = torch.tensor([int((doc == d).nonzero()[0]) for d in doc])
    inside = at < start + lead
    allowed = (doc[:, None] == doc[None]) & (doc[:, None] >= 0)
    allowed &= (at[:, None] >= at[None]) | (inside[:, None] & inside[None])
    return allowed if window is None else allowed & ((at[:, None] - at[None]).abs() < window)


def _dense(allowed, q, k, v, dout, dlse=None):
    """(out, dq, dk, dv), and the LSE where its gradient is asked for."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out = dense_reference(q, k, v, allowed=allowed, scale=q.shape[-1] ** -0.5)
    target = (out * dout.double()).sum()
    if dlse is not None:
        scores = torch.einsum("qhd,khd->qhk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
        scores = (scores * q.shape[-1] ** -0.5).masked_fill(~allowed[:, None], -torch.inf)
        some = allowed.any(1)
        target = target + (torch.logsumexp(scores[some], -1) * dlse[some]).sum()
    return (out.detach(), *torch.autograd.grad(target, (q, k, v)))


def _ring() -> Ring:
    size = dist.get_world_size()
    return Ring(rank=dist.get_rank(), size=size, group=dist.group.WORLD if size > 1 else None)


def _owner(layout: str, documents, prefix, window, size: int):
    if layout == "scattered":
        return np.random.RandomState(documents.size).randint(0, size, documents.shape).astype(np.int32)
    if layout == "one rank":
        return np.full(documents.shape, size - 1, np.int32)
    return RingLayout(size, layout, width=8, window=window).owner(documents, prefix)


def _run(case, layout, backend, transport, ring, *, with_lse=False, strided=True):
    documents, prefix, window, q, k, v, dout, dlse = case
    owner = _owner(layout, documents, prefix, window, ring.size)
    plan = plan_ring(
        documents, owner, prefix, rank=ring.rank, ring=ring.size, window=window, transport=transport
    )
    mine = torch.from_numpy(np.flatnonzero(owner[0] == ring.rank))
    # transposed storage: nothing may rely on contiguous inputs (A6)
    ours = [x[mine].transpose(0, 1).contiguous().transpose(0, 1) if strided else x[mine] for x in (q, k, v)]
    ours = [x.requires_grad_() for x in ours]
    out, lse = ring_attention(*ours, plan=plan, ring=ring, backend=backend)
    assert out.dtype == q.dtype
    grads_out = [dout[mine].transpose(0, 1).contiguous().transpose(0, 1)]
    some = torch.isfinite(lse)
    outputs = [out]
    if with_lse:
        outputs.append(torch.where(some, lse, 0.0))
        grads_out.append(dlse[mine].to(lse.dtype))
    grads = torch.autograd.grad(outputs, ours, grads_out)
    assert all(g.dtype == x.dtype for g, x in zip(grads, ours, strict=True))  # A4
    return mine, (out.detach(), *grads)


def _worker(cases: list[tuple]) -> list[float]:
    ring, errors = _ring(), []
    for lengths, heads, kv, layout, mask, dtype, backend, transport, dims, with_lse in cases:
        case = _case(lengths, heads, kv, dtype, mask, dims, mixed=True)
        allowed = _allowed(case[0], case[1], case[2])
        want = _dense(allowed, *case[3:7], dlse=case[7] if with_lse else None)
        mine, got = _run(case, layout, backend, transport, ring, with_lse=with_lse)
        errors.append(
            max(float((a.double() - b[mine]).abs().max()) if len(mine) else 0.0
                for a, b in zip(got, want, strict=True))
        )  # fmt: skip
    return errors


def _matrix() -> list[tuple]:
    """Every layout, mask and transport once each with changing heads, dims and backends."""
    cases, f64 = [], torch.float64
    heads, dims = [(4, 2), (2, 1), (4, 4)], [(8, 8), (8, 4), (4, 8)]
    layouts = ["planned", "zigzag", "contiguous", "per_document", "chunks", "scattered", "one rank"]
    n = 0
    for lengths in LENGTHS:
        for layout in layouts:
            for mask in MASKS:
                n += 1
                transport = ("ring", "direct", "gather")[n % 3]
                backend = ("aten_cpu", "reference")[n % 2]
                cases.append(
                    (lengths, *heads[n % 3], layout, mask, f64, backend, transport, dims[n % 3], n % 4 == 0)
                )
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ring_equals_dense(world: int) -> None:
    """A1, A8, A10, A14, A19, dLSE: any layout, mask, length, transport; one rank may hold everything."""
    f64 = _matrix()
    f32 = [
        (n, 4, 4, "planned", "causal", torch.float32, "aten_cpu", t, (8, 8), False)
        for n in LENGTHS
        for t in ("ring", "direct")
    ]
    for errors in run_ranks(world, _worker, f64 + f32, timeout=240):
        assert max(errors[: len(f64)]) <= 1e-12, f64[int(np.argmax(errors[: len(f64)]))]
        assert max(errors[len(f64) :]) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("world", [5, 7, 8])
def test_odd_and_large_rings_equal_dense(world: int) -> None:
    """A17: P = 5, 7, 8, documents shorter than the ring included."""
    cases = [c for i, c in enumerate(_matrix()) if i % 6 == 0]
    for errors in run_ranks(world, _worker, cases, timeout=300):
        assert max(errors) <= 1e-12, cases[int(np.argmax(errors))]


class _Slow(Ring):
    """A ring whose messages are delayed at random, and whose receive buffers hold NaN until they arrive."""

    def exchange(self, sends, receives):
        time.sleep(random.Random(len(sends) * 7 + self.rank).random() * 0.01)
        for x, _ in receives:
            x.fill_(float("nan"))  # a read before arrival would show
        return super().exchange(sends, receives)


def _races() -> list[bool]:
    """The same case calm, delayed, and without overlap: bits must not differ; and twice the same (A18)."""
    size = dist.get_world_size()
    found = []
    for transport in ("ring", "direct", "gather"):
        for mask in ("causal", "bidirectional"):
            case = _case([200, 90, 310], 4, 2, torch.float32, mask, (16, 16))
            results = []
            for kind, overlap in ((Ring, True), (_Slow, True), (_Slow, False), (Ring, True)):
                ring = kind(rank=dist.get_rank(), size=size, group=dist.group.WORLD, overlap=overlap)
                results.append(_run(case, "zigzag", "aten_cpu", transport, ring)[1])
            found.append(
                all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))
            )
    return found


@pytest.mark.slow
def test_delays_and_overlap_change_no_bit() -> None:
    """A17, A18: skewed messages, NaN in every buffer before it is filled, overlap on and off."""
    assert all(all(found) for found in run_ranks(3, _races, timeout=120))


def _transports() -> list[bool]:
    """Passing keys round, sending what is needed, and gathering all must give the same bits."""
    ring, same = _ring(), []
    for mask in MASKS:
        for layout in ("contiguous", "planned", "scattered"):
            case = _case([60, 33, 120, 5], 4, 2, torch.float32, mask, (16, 16))
            one, *others = (_run(case, layout, "aten_cpu", t, ring)[1] for t in ("ring", "direct", "gather"))
            same.append(all(torch.equal(a, b) for o in others for a, b in zip(one, o, strict=True)))
    return same


@pytest.mark.slow
def test_transports_give_the_same_bits() -> None:
    assert all(all(same) for same in run_ranks(4, _transports, timeout=120))


class _Counting(Ring):
    """Counts elements it sends."""

    counts: list[int] = []  # noqa: RUF012

    def exchange(self, sends, receives):
        _Counting.counts.extend(x.numel() for x, _ in sends)
        return super().exchange(sends, receives)


def _bytes() -> list[tuple[int, int]]:
    found, size = [], dist.get_world_size()
    ring = _Counting(rank=dist.get_rank(), size=size, group=dist.group.WORLD)
    heads, kv, d, dv = 4, 2, 8, 4
    for transport in ("ring", "direct", "gather"):
        for layout in ("contiguous", "planned", "zigzag", "per_document", "scattered"):
            for mask in MASKS:
                case = _case([60, 33, 20, 5], heads, kv, torch.float32, mask, (d, dv))
                _Counting.counts.clear()
                _run(case, layout, "aten_cpu", transport, ring)
                owner = _owner(layout, case[0], case[1], case[2], size)
                plan = plan_ring(
                    case[0], owner, case[1], rank=ring.rank, ring=size, window=case[2], transport=transport
                )
                passed, returned = plan.sent_tokens()
                found.append((sum(_Counting.counts), (2 * passed + returned) * kv * (d + dv)))
    return found


@pytest.mark.slow
def test_bytes_on_the_wire_are_the_plans() -> None:
    for counted in run_ranks(4, _bytes, timeout=120):
        assert [a for a, _ in counted] == [b for _, b in counted]


def _large_messages() -> float:
    """Messages above 4 MiB on an odd ring (A17)."""
    case = _case([9000], 2, 2, torch.float32, "causal", (64, 64), padding=0)
    started = time.monotonic()
    _run(case, "zigzag", "aten_cpu", "ring", _ring())
    return time.monotonic() - started


@pytest.mark.slow
def test_large_messages_pass() -> None:
    assert max(run_ranks(3, _large_messages, timeout=120, collective=20)) < 60


def _ulysses(shape: tuple[int, int]) -> float:
    ring_size, pool = shape
    rank = dist.get_rank()
    rings = [dist.new_group([g * pool + u for g in range(ring_size)]) for u in range(pool)]
    pools = [dist.new_group([g * pool + u for u in range(pool)]) for g in range(ring_size)]
    ring = Ring(rank // pool, ring_size, rings[rank % pool] if ring_size > 1 else None)
    heads = Ulysses(rank % pool, pool, pools[rank // pool])
    worst = 0.0
    for n, lengths in enumerate(LENGTHS):
        for mask in MASKS:
            case = _case(lengths, 8, 4, torch.float64, mask, (8, 4), mixed=True)
            documents, prefix, window, q, k, v, dout, dlse = case
            owner = _owner(("planned", "scattered")[n % 2], documents, prefix, window, ring_size * pool)
            attention = PackedAttention(ring=ring, ulysses=heads, transport=("ring", "direct")[n % 2])
            as_tensor = [torch.from_numpy(x) for x in (documents, owner, prefix)]
            plan = attention.plan(*as_tensor, window)
            mine = torch.from_numpy(np.flatnonzero(owner[0] == rank))
            ours = [x[mine].requires_grad_() for x in (q, k, v)]
            out, lse = attention.with_lse(*ours, plan)
            grads = torch.autograd.grad(
                (out, torch.where(torch.isfinite(lse), lse, 0.0)), ours, (dout[mine], dlse[mine])
            )
            want = _dense(_allowed(documents, prefix, window), q, k, v, dout, dlse)
            pairs = zip((out.detach(), *grads), want, strict=True)
            worst = max([worst, *(float((a - b[mine]).abs().max()) for a, b in pairs if len(mine))])
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (1, 4)])
def test_ulysses_and_ulysses_rings_equal_dense(shape: tuple[int, int]) -> None:
    assert max(run_ranks(shape[0] * shape[1], _ulysses, shape, timeout=120)) <= 1e-12


def test_a_plan_for_another_layout_is_refused() -> None:
    """yunchang 53 (A16): a layout travels as an object, a mismatch raises."""
    documents = np.zeros((1, 8), np.int32)
    owner = RingLayout(2, "zigzag").owner(documents)
    plan = plan_ring(documents, owner, np.zeros_like(documents), rank=0, ring=2)
    x = torch.zeros(8, 1, 4)
    with pytest.raises(ValueError, match="the plan is for 4 tokens on rank 0 of 2"):
        ring_attention(x, x, x, plan=plan, ring=Ring())


@pytest.mark.slow
def test_gradcheck_of_the_ring_operator() -> None:
    """yunchang 149 (A15): as many gradients as inputs, and right ones, in out and LSE."""
    documents = np.array([[0, 0, 0, 1, 1, 1, 1, -1]], np.int32)
    prefix = np.array([[0, 0, 0, 2, 2, 2, 2, 0]], np.int32)
    plan = plan_ring(documents, np.zeros_like(documents), prefix, rank=0, ring=1)
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(8, h, d, generator=g, dtype=torch.float64).requires_grad_()
        for h, d in ((4, 3), (2, 3), (2, 5))
    )

    def some(q, k, v):
        out, lse = ring_attention(q, k, v, plan=plan, ring=Ring())
        return out, lse[:7]

    assert torch.autograd.gradcheck(some, (q, k, v), fast_mode=False)


def _one_rank_dies() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("this rank was told to fail")
    dist.barrier()


@pytest.mark.slow
def test_a_failing_rank_is_named() -> None:
    with pytest.raises(WorkersFailed, match=r"rank 1 of 2:[\s\S]*told to fail"):
        run_ranks(2, _one_rank_dies, timeout=60, collective=5)
