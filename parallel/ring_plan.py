"""Which rank computes what at each hop of ring attention: pure, no tensors, no process groups.

Ring rank r holds the global slots `slots[r]` of every pack (any partition: contiguous, zigzag, uneven,
scattered). The slots of a rank fall into maximal *runs* of consecutive global slots; a run cut at document
boundaries gives *pieces*. Two pieces of one document are disjoint intervals, so under a causal mask a pair
of pieces is FULL (keys before queries), EMPTY (after) or, for a piece with itself, square CAUSAL. That is
the whole mask algebra: no block ever needs a mask tensor, whatever the layout (reference: RingAttention, Liu
et al. 2023; striped and zigzag layouts, Brandon et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


class Block(NamedTuple):
    """Queries [q0, q1) of this rank against keys [k0, k1) of the rank whose keys have arrived (local indices)."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


@dataclass(frozen=True, slots=True)
class RingPlan:
    """hops[t]: the blocks this rank computes on the keys of rank (rank - t) mod ring; lengths: tokens per rank."""

    rank: int
    hops: tuple[tuple[Block, ...], ...]
    lengths: tuple[int, ...]

    @property
    def area(self) -> int:
        """Query-key pairs this rank computes: its attention work."""
        return sum(
            (b.q1 - b.q0) * (b.q1 - b.q0 + 1) // 2 if b.causal else (b.q1 - b.q0) * (b.k1 - b.k0)
            for hop in self.hops
            for b in hop
        )


def ring_slots(context: int, ring: int, *, layout: str = "zigzag") -> list[Slots]:
    """Global slots of each ring rank, in local order; sizes differ by at most 2 when `context` does not divide.

    "contiguous": one run a rank. "zigzag": chunk r and chunk 2·ring-1-r of 2·ring, which evens causal work.
    """
    if layout == "contiguous" or ring == 1:
        edges = [context * r // ring for r in range(ring + 1)]
        return [np.arange(a, b, dtype=np.int64) for a, b in pairwise(edges)]
    if layout != "zigzag":
        raise ValueError(f"unknown ring layout {layout!r}; known: contiguous, zigzag")
    edges = [context * c // (2 * ring) for c in range(2 * ring + 1)]
    chunk = [np.arange(a, b, dtype=np.int64) for a, b in pairwise(edges)]
    return [np.concatenate([chunk[r], chunk[2 * ring - 1 - r]]) for r in range(ring)]


def plan_ring(
    documents: NDArray[np.int32], slots: Sequence[Slots], rank: int, *, causal: bool = True
) -> RingPlan:
    """The plan of one rank for packs with `documents` [B, L] (document of each slot, -1 is padding).

    Rows are flattened: row b's local tokens stand at b·len(slots[r]) on rank r. Padding belongs to no block.
    """
    ring = len(slots)
    pieces = [_pieces(documents, own) for own in slots]
    hops: list[tuple[Block, ...]] = []
    for hop in range(ring):
        source = (rank - hop) % ring
        blocks: list[Block] = []
        for name, queries in pieces[rank].items():
            for qg, q0, q1 in queries:
                for kg, k0, k1 in pieces[source].get(name, ()):
                    if kg == qg:  # the same run of slots: only a piece with itself
                        blocks.append(Block(q0, q1, k0, k1, causal))
                    elif kg < qg or not causal:
                        blocks.append(Block(q0, q1, k0, k1, False))
        hops.append(tuple(blocks))
    rows = documents.shape[0]
    return RingPlan(rank=rank, hops=tuple(hops), lengths=tuple(rows * len(own) for own in slots))


def _pieces(documents: NDArray[np.int32], own: Slots) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """(row, document) -> [(global start, local start, local end)] of one rank's slots, in slot order."""
    found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    if len(own) == 0:
        return found
    gap = np.diff(own) != 1
    for row in range(documents.shape[0]):
        docs = documents[row][own]
        cuts = np.flatnonzero((docs[1:] != docs[:-1]) | gap) + 1
        edges = np.concatenate([[0], cuts, [len(own)]])
        for a, b in pairwise(edges.tolist()):
            if docs[a] >= 0:
                base = row * len(own)
                found.setdefault((row, int(docs[a])), []).append((int(own[a]), base + a, base + b))
    return found
