"""Faults other ring attentions had (ring-flash-attention, TransformerEngine, torch, Megatron …), as tests of ours.

Ranks are simulated one after the other with the plan's own blocks, so any number of them fits one process.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ringweave.data_pipes.pack import Pack
from ringweave.kernels.attention import block_backward, block_forward, dense_reference, merge_
from ringweave.parallel.ring_layout import RingLayout, rank_sizes
from ringweave.parallel.ring_plan import cut_pieces, plan_pieces
from ringweave.pretrain import verify
from ringweave.pretrain.batch import collate


def _documents(lengths: list[int]) -> np.ndarray:
    return np.concatenate([np.full(n, d) for d, n in enumerate(lengths)]).astype(np.int32)[None]


def _simulate(documents, prefix, owner, q, k, v, dout, ring: int, acc=None, window=None):
    """(out, dq, dk, dv) of every rank's blocks in the plan's order, accumulated in `acc` (fp32 unless fp64)."""
    acc = acc or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    pieces = cut_pieces(documents, owner, prefix, ring=ring)
    where = [torch.from_numpy(np.flatnonzero(owner.ravel() == r)) for r in range(ring)]
    out, scale = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype), q.shape[-1] ** -0.5
    dq, dk, dv = (torch.zeros(x.shape, dtype=acc) for x in (q, k, v))
    for r in range(ring):
        plan = plan_pieces(pieces, rank=r, ring=ring, window=window)
        own = where[r]
        o = torch.zeros(len(own), q.shape[1], v.shape[2], dtype=acc)
        wide = torch.float64 if acc == torch.float64 else torch.float32
        lse = torch.full((len(own), q.shape[1]), -torch.inf, dtype=wide)
        for back in (False, True):
            final = o.to(q.dtype)
            for hop in range(ring):
                keys = where[(r - hop) % ring]
                for b in plan.blocks(hop):
                    rows, cols = own[b.q0 : b.q1], keys[b.k0 : b.k1]
                    at = slice(b.q0, b.q1)
                    band = {"lower": b.lower, "upper": b.upper, "scale": scale, "backend": "aten_cpu"}
                    if not back:
                        merge_(o[at], lse[at], *block_forward(q[rows], k[cols], v[cols], **band))
                        continue
                    grads = block_backward(dout[rows], q[rows], k[cols], v[cols], final[at], lse[at], **band)
                    for total, part, index in zip((dq, dk, dv), grads, (rows, cols, cols), strict=True):
                        total[index] += part.to(acc)
        out[own] = o.to(q.dtype)
    return out, dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _inputs(n: int, heads: int, kv: int, dim: int, dtype=torch.float64, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, h, dim, generator=g, dtype=torch.float64).to(dtype) for h in (heads, kv, kv, heads)
    ]


def _dense(documents, prefix, q, k, v, dout):
    row, lead, at = (
        torch.from_numpy(documents[0]),
        torch.from_numpy(prefix[0]),
        torch.arange(documents.shape[1]),
    )
    start = torch.tensor([int((row == d).nonzero()[0]) for d in row])
    inside = at < start + lead
    allowed = (row[:, None] == row[None]) & (row[:, None] >= 0)
    allowed &= (at[:, None] >= at[None]) | (inside[:, None] & inside[None])
    q, k, v = (x.detach().double().clone().requires_grad_() for x in (q, k, v))
    out = dense_reference(q, k, v, allowed=allowed, scale=q.shape[-1] ** -0.5)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double()))


def _largest(ours, want) -> float:
    return max(float((a.double() - b).abs().max()) for a, b in zip(ours, want, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("ring", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", ["planned", "per_document", "zigzag", "contiguous", "chunks"])
def test_A5_transformer_engine_2186_short_documents_and_padding_halves(ring: int, kind: str) -> None:
    """The issue's lengths, documents shorter than the ring, and padding that fills whole ranks."""
    for lengths, padding in (([9, 8, 8, 12, 8, 12], 0), ([1, 1, 2, 1, 3], 0), ([5], 40)):
        documents = np.concatenate([_documents(lengths)[0], np.full(padding, -1, np.int32)])[None]
        prefix = np.zeros_like(documents)
        owner = RingLayout(ring, kind, width=8).owner(documents)
        tensors = _inputs(documents.shape[1], 4, 2, 8)
        ours = _simulate(documents, prefix, owner, *tensors, ring)
        assert _largest(ours, _dense(documents, prefix, *tensors)) <= 1e-12
        assert all(bool(torch.isfinite(x).all()) for x in ours)


@pytest.mark.parametrize("ring", [2, 3, 5])
def test_A2_diffusers_14338_heads_equal_to_sequence(ring: int) -> None:
    """A transposed key passes shape checks when heads == tokens; the numbers must not."""
    documents = _documents([4, 4])
    tensors = _inputs(8, 8, 8, 8)
    prefix = documents * 0 + 4
    owner = RingLayout(ring, "contiguous").owner(documents)
    ours = _simulate(documents, prefix, owner, *tensors, ring)
    assert _largest(ours, _dense(documents, prefix, *tensors)) <= 1e-12


def test_A3_ring_flash_42_huge_logits_stay_finite_and_right() -> None:
    documents = _documents([40, 24])
    q, k, v, dout = _inputs(64, 2, 2, 8)
    tensors = [q * 100, k * 100, v, dout]
    prefix = np.zeros_like(documents)
    owner = RingLayout(4, "zigzag").owner(documents)
    ours = _simulate(documents, prefix, owner, *(x.float() for x in tensors), 4)
    assert all(bool(torch.isfinite(x).all()) for x in ours)
    exact = _simulate(documents, prefix, owner, *tensors, 4)
    assert _largest(exact, _dense(documents, prefix, *tensors)) <= 1e-9  # gradients are of the order of 1e3


def _relative(ours: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, want, strict=True))


@pytest.mark.slow
def test_A3_error_in_bf16_does_not_grow_with_the_ring() -> None:
    """P = 32 at most 1.1 times P = 2 with fp32 accumulation; accumulation in bf16, as elsewhere, grows."""
    documents = _documents([1500, 548])
    prefix = np.zeros_like(documents)
    tensors = _inputs(2048, 2, 1, 32, torch.bfloat16)
    want = _dense(documents, prefix, *tensors)
    errors, narrow = {}, {}
    for ring in (2, 8, 32):
        owner = RingLayout(ring, "zigzag").owner(documents)
        errors[ring] = _relative(_simulate(documents, prefix, owner, *tensors, ring), want)
        narrow[ring] = _relative(_simulate(documents, prefix, owner, *tensors, ring, torch.bfloat16), want)
    assert errors[32] <= 1.1 * errors[2], errors
    assert narrow[32] > 1.5 * narrow[2] > 1.5 * errors[2], (narrow, errors)


def test_A11_megatron_5243_positions_travel_with_their_tokens() -> None:
    """Two documents of four on two ranks: rank 0 owns slots 0, 3, 4, 7 and must see positions 0, 3, 0, 3."""
    documents = _documents([4, 4])
    owner = RingLayout(2, "per_document").owner(documents)
    assert np.flatnonzero(owner[0] == owner[0, 0]).tolist() in ([0, 3, 4, 7], [0, 3, 5, 6])
    packs = verify.make_packs()
    for kind in ("planned", "per_document", "zigzag", "contiguous"):
        for rank in range(3):
            ring = RingLayout(3, kind, width=32)
            batch = collate(packs, ring=ring, rank=rank)
            mine = ring.owner(np.stack([p.doc for p in packs])) == rank
            for field in ("ids", "order", "targets"):
                whole = np.stack([getattr(p, field) for p in packs])
                assert np.array_equal(getattr(batch, field).numpy().ravel(), whole[mine])


def test_A12_megatron_4495_no_label_crosses_a_document() -> None:
    """The target of a slot is the next token of its own document, on any rank, for odd lengths."""
    packs: list[Pack] = verify.make_packs()[1:]
    for pack in packs:
        for slot in np.flatnonzero(pack.targets[:-1] >= 0):
            if pack.doc[slot + 1] == pack.doc[slot]:
                assert pack.targets[slot] == pack.ids[slot + 1]
            else:  # the document goes on in another pack
                assert pack.plan.pieces[pack.doc[slot]].end > 0


def test_A16_every_layout_deals_each_slot_once_and_evenly() -> None:
    rng = np.random.RandomState(0)
    for _ in range(60):
        lengths = rng.randint(1, 60, rng.randint(1, 12)).tolist()
        documents = np.concatenate([_documents(lengths)[0], np.full(rng.randint(0, 30), -1, np.int32)])[None]
        ring = int(rng.randint(1, 9))
        prefix = np.where(documents % 2 == 0, 7, 0).astype(np.int32)
        for kind in ("planned", "per_document", "zigzag", "contiguous", "chunks"):
            owner = RingLayout(ring, kind, width=16).owner(documents, prefix)
            held = np.bincount(owner.ravel(), minlength=ring)
            assert np.array_equal(held, rank_sizes(documents.shape[1], ring)), (kind, ring)


def test_A20_torchtitan_3368_window_and_full_layers_share_one_layout() -> None:
    documents = _documents([50, 31])
    prefix = np.zeros_like(documents)
    tensors = _inputs(81, 2, 2, 8)
    owner = RingLayout(3, "planned", width=8, window=7).owner(documents)
    full = _simulate(documents, prefix, owner, *tensors, 3)
    assert _largest(full, _dense(documents, prefix, *tensors)) <= 1e-12
    narrow = _simulate(documents, prefix, owner, *tensors, 3, window=7)
    one = _simulate(documents, prefix, np.zeros_like(owner), *tensors, 1, window=7)
    assert _largest(narrow, [x.double() for x in one]) <= 1e-12
    assert _largest(narrow, full) > 1e-2
