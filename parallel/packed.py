"""Attention over packs of documents, on one rank or over a ring: what a model is given to call."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ringweave.parallel.ring import Ring, ring_attention
from ringweave.parallel.ring_plan import Pieces, RingPlan, cut_pieces, plan_pieces
from ringweave.parallel.ring_price import Link, price_transports
from ringweave.parallel.ulysses import Ulysses


class PackedAttention:
    """Attention over whole packs on one rank, or over ring · ulysses ranks.

    transport: how keys travel (see `plan_ring`), or "auto" to price them for each micro-batch, with `link` speeds and
    heads = (query heads, key-value heads, head dim) of the whole model.
    """

    def __init__(
        self,
        *,
        ring: Ring | None = None,
        ulysses: Ulysses | None = None,
        transport: str = "ring",
        heads: tuple[int, int, int] = (1, 1, 64),
        link: Link | None = None,
        backend: str | None = None,
    ) -> None:
        self.ring, self.ulysses = ring or Ring(), ulysses or Ulysses()
        self.transport, self.heads, self.link, self.backend = transport, heads, link, backend

    def plan(
        self,
        documents: Tensor,
        owner: Tensor | None = None,
        prefix: Tensor | None = None,
        window: int | None = None,
    ) -> RingPlan:
        """The blocks of these packs (see Attention.plan)."""
        docs = documents.cpu().numpy()
        whose = np.zeros_like(docs) if owner is None else owner.cpu().numpy()
        lead = np.zeros_like(docs) if prefix is None else prefix.cpu().numpy()
        single = cut_pieces(docs, whose, lead, ring=self.ring.size * self.ulysses.size)
        pieces = single.grouped(self.ulysses.size)
        first = self.ring.rank * self.ulysses.size
        return plan_pieces(
            pieces,
            rank=self.ring.rank,
            ring=self.ring.size,
            window=window,
            transport=self._transport(pieces, window),
            members=tuple(single.lengths[first : first + self.ulysses.size].tolist()),
        )

    def _transport(self, pieces: Pieces, window: int | None) -> str:
        if self.transport != "auto":
            return self.transport
        if self.ring.size == 1:
            return "ring"
        heads, kv_heads, head_dim = self.heads
        priced = price_transports(
            pieces, heads=heads, kv_heads=kv_heads, head_dim=head_dim, link=self.link, window=window
        )
        return next(p.name for p in priced if not p.name.startswith("ulysses"))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: RingPlan) -> Tensor:
        """See Attention."""
        return self.with_lse(q, k, v, plan)[0]

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, plan: RingPlan) -> tuple[Tensor, Tensor]:
        """Outputs and the log-sum-exp of each row's scores [T, H], both differentiable."""
        q, k, v = self.ulysses.to_heads((q, k, v), plan.members)
        out, lse = ring_attention(q, k, v, plan=plan, ring=self.ring, backend=self.backend)
        if self.ulysses.size == 1:
            return out, lse
        return self.ulysses.to_tokens(out, plan.members), self.ulysses.to_tokens(
            lse[..., None], plan.members
        ).squeeze(-1)
