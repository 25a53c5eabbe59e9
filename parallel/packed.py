"""Attention over packs of documents, on one rank or over a ring: what a model is given to call."""

from __future__ import annotations

from torch import Tensor

from ringweave.parallel.ring import Ring, ring_attention
from ringweave.parallel.ring_plan import RingPlan, plan_ring, ring_slots


class PackedAttention:
    """Attention over whole packs on one rank, or over a ring when given one and its slot map."""

    def __init__(
        self, *, ring: Ring | None = None, layout: str = "zigzag", backend: str | None = None
    ) -> None:
        self.ring = ring or Ring()
        self.layout = layout
        self.backend = backend

    def plan(self, documents: Tensor) -> RingPlan:
        """The blocks of these packs (see Attention.plan)."""
        slots = ring_slots(documents.shape[1], self.ring.size, layout=self.layout)
        return plan_ring(documents.cpu().numpy(), slots, self.ring.rank)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: RingPlan) -> Tensor:
        """See Attention."""
        return ring_attention(q, k, v, plan=plan, ring=self.ring, backend=self.backend)
