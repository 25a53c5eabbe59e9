"""The ring's two independent forms against each other: running merge along a plan, and published two-pass RSA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ringweave.parallel.ring import Ring, ring_attention
from ringweave.parallel.ring_layout import RingLayout
from ringweave.parallel.ring_plan import plan_ring
from ringweave.parallel.rsa import ring_self_attention
from ringweave.parallel.spawn import run_ranks


def _both() -> float:
    rank, size = dist.get_rank(), dist.get_world_size()
    ring = Ring(rank, size, dist.group.WORLD)
    documents = np.repeat(np.arange(3), [23, 7, 31])[None].astype(np.int32)
    worst = 0.0
    for kind in ("zigzag", "contiguous", "per_document"):
        for two_way in (False, True):
            prefix = np.full_like(documents, 61 if two_way else 0)
            owner = RingLayout(size, kind).owner(documents, prefix)
            where = [torch.from_numpy(np.flatnonzero(owner[0] == r)) for r in range(size)]
            row, at = torch.from_numpy(documents[0]), torch.arange(61)
            mask = (row[:, None] == row[None]) & ((at[:, None] >= at[None]) | two_way)
            g = torch.Generator().manual_seed(1)
            mine = [torch.randn(61, 4, 8, generator=g, dtype=torch.float64)[where[rank]] for _ in range(4)]
            parts = [x.requires_grad_() for x in mine[:3]]
            plan = plan_ring(documents, owner, prefix, rank=rank, ring=size)
            merged, _ = ring_attention(*parts, plan=plan, ring=ring)
            published = ring_self_attention(
                *parts, allowed=[mask[where[rank]][:, w] for w in where], ring=ring, scale=8**-0.5
            )
            pairs = zip(
                (merged, *torch.autograd.grad(merged, parts, mine[3])),
                (published, *torch.autograd.grad(published, parts, mine[3])),
                strict=True,
            )
            worst = max([worst, *(float((a - b).detach().abs().max()) for a, b in pairs)])
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_running_merge_equals_published_two_pass_form(world: int) -> None:
    assert max(run_ranks(world, _both, timeout=120)) <= 1e-12
