"""What a ring layout and a transport cost, before anything runs: pure.

Work is counted in query-key pairs (area) and tokens; per layer, attention takes 4·width·area and the linear maps
24·width²·token FLOPs forward, 2.5 and 2 times that backward. Traffic is counted in tokens whose keys and values move.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ringweave.parallel.ring_plan import Pieces, block_areas, cut_pieces, union_of, visible_blocks

Slots = NDArray[np.int32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Price:
    """areas: query-key pairs of each rank; tokens: slots of each rank; remote: tokens of others each rank needs.

    attention: max/mean of areas (ρ_attn); total: max/mean of area + 6·width·tokens (ρ_tot); traffic: remote tokens
    over what a full ring moves, (ring-1)·slots (κ).
    """

    areas: Ints
    tokens: Ints
    remote: Ints
    attention: float
    total: float
    traffic: float


def price_layout(
    documents: Slots, owner: Slots, prefix: Slots, *, ring: int, width: int, window: int | None = None
) -> Price:
    """The price of an owner map for packs, arrays [B, L]."""
    return price_pieces(cut_pieces(documents, owner, prefix, ring=ring), width=width, window=window)


def price_pieces(pieces: Pieces, *, width: int, window: int | None = None) -> Price:
    """`price_layout` for pieces that are there already."""
    ring = len(pieces.lengths)
    first, last = pieces.start - pieces.origin, pieces.stop - pieces.origin
    documents = int(pieces.doc.max(initial=-1)) + 1
    lead = np.bincount(pieces.doc, weights=(last - first) * pieces.two_way, minlength=documents).astype(
        np.int64
    )
    turn = lead[pieces.doc]
    reach = window or int(pieces.stop.max(initial=0)) + 1
    before = _limited(last, reach) - _limited(first, reach)
    behind = _limited(turn - 1 - first, reach - 1) - _limited(turn - 1 - last, reach - 1)
    areas = np.where(pieces.two_way, before + behind, before)
    by_rank = np.bincount(pieces.owner, weights=areas, minlength=ring).astype(np.int64)
    remote = _remote(pieces, turn, reach, ring)
    cost = by_rank + 6.0 * width * pieces.lengths
    moves = (ring - 1) * int(pieces.lengths.sum())
    return Price(
        by_rank, pieces.lengths, remote, _peak(by_rank), _peak(cost), float(remote.sum() / moves) if moves else 0.0
    )  # fmt: skip


def _limited(x: Ints, limit: int) -> Ints:
    """Σ_{i < x} min(i + 1, limit), 0 for x <= 0."""
    x = np.maximum(x, 0)
    ramp = np.minimum(x, limit)
    return ramp * (ramp + 1) // 2 + (x - ramp) * limit


def _remote(pieces: Pieces, turn: Ints, reach: int, ring: int) -> Ints:
    """Tokens of other ranks that each rank's queries see."""
    span = int(pieces.stop.max(initial=0)) + 1
    end = np.where(pieces.two_way, np.minimum(pieces.origin + turn, pieces.stop + reach - 1), pieces.stop)
    begin = np.maximum(pieces.origin, pieces.start - reach + 1)
    seen = union_of(np.stack([begin, end], axis=1) + pieces.owner[:, None] * span)
    total = np.bincount(seen[:, 0] // span, weights=seen[:, 1] - seen[:, 0], minlength=ring)
    own = np.bincount(pieces.owner, weights=pieces.stop - pieces.start, minlength=ring)
    return (total - own).astype(np.int64)


def _peak(values: NDArray[np.float64] | Ints) -> float:
    mean = float(values.mean())
    return float(values.max() / mean) if mean else 1.0


def hop_areas(pieces: Pieces, *, window: int | None = None) -> Ints:
    """[ring, ring]: query-key pairs of each rank at each hop."""
    ring = len(pieces.lengths)
    pairs, blocks = visible_blocks(pieces, window)
    rank = pieces.owner[pairs.query]
    hop = (rank - pieces.owner[pairs.key]) % ring
    flat = np.bincount(rank * ring + hop, weights=block_areas(blocks), minlength=ring * ring)
    return flat.reshape(ring, ring).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Link:
    """Speeds a transport is priced with: FLOP/s of attention, bytes/s and seconds of latency between ranks.

    The defaults are one H100 (half of 989 TFLOP/s bf16 dense) behind a 400 Gb/s network.
    """

    flops: float = 5e14
    bandwidth: float = 5e10
    latency: float = 1e-5


@dataclass(frozen=True, slots=True)
class TransportPrice:
    """One transport, forward pass of one layer: seconds, bytes the busiest rank receives, tokens of keys it holds."""

    name: str
    seconds: float
    bytes: int
    held: int


def price_transports(
    pieces: Pieces,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int = 2,
    link: Link | None = None,
    window: int | None = None,
) -> list[TransportPrice]:
    """Every transport that can run these pieces, cheapest first (formulas: Liu et al. 2023; USP, Fang & Zhao 2024).

    ring: hops overlap compute, Σ_t max(compute_t, keys of a rank); direct: the same with what is needed only;
    gather: everything first, then compute; ulysses: heads instead of tokens where kv_heads divide, area split evenly.
    """
    link = link or Link()
    ring = len(pieces.lengths)
    areas = hop_areas(pieces, window=window).astype(np.float64)
    compute = areas.max(0) * 4 * head_dim * heads / link.flops
    kv = 2 * kv_heads * head_dim * itemsize
    token = int(pieces.lengths.max())
    hop = token * kv / link.bandwidth + link.latency
    remote = price_pieces(pieces, width=1, window=window).remote
    needed = np.where(remote > 0, remote * kv / link.bandwidth / max(ring - 1, 1) + link.latency, 0.0)
    whole = float(areas.sum(1).max()) * 4 * head_dim * heads / link.flops
    moves = (ring - 1) * token
    found = [
        TransportPrice("ring", _overlapped(compute, hop), moves * kv, 2 * token),
        TransportPrice(
            "direct", _overlapped(compute, float(needed.max())), int(remote.max()) * kv, 2 * token
        ),
        TransportPrice(
            "gather", moves * kv / link.bandwidth + link.latency + whole, moves * kv, ring * token
        ),
    ]
    for size in range(2, ring + 1):
        if ring % size or kv_heads % size:
            continue
        found.append(_ulysses(pieces, size, areas, heads, kv_heads, head_dim, itemsize, link, window))
    return sorted(found, key=lambda p: p.seconds)


def _overlapped(compute: NDArray[np.float64], hop: float) -> float:
    """Compute of each hop beside the transfer for the next; the last hop has nothing left to receive."""
    return (
        float(np.maximum(compute[:-1], hop).sum() + compute[-1]) if len(compute) > 1 else float(compute.sum())
    )


def _ulysses(
    pieces: Pieces, size: int, areas: NDArray[np.float64], heads: int, kv_heads: int, head_dim: int, itemsize: int,
    link: Link, window: int | None,
) -> TransportPrice:  # fmt: skip
    """Ulysses over `size` neighbours (Jacobs et al. 2023), the ring over the groups with heads/size each."""
    token = int(pieces.lengths.max())
    moved = (2 * heads + 2 * kv_heads) * token * head_dim * (size - 1) // size * itemsize
    exchange = moved / link.bandwidth + 2 * link.latency
    groups = pieces.grouped(size)
    inner = hop_areas(groups, window=window).astype(np.float64)
    compute = inner.max(0) * 4 * head_dim * heads / size / link.flops
    ring = len(groups.lengths)
    kv = 2 * kv_heads // size * head_dim * itemsize * int(groups.lengths.max())
    seconds = exchange + _overlapped(compute, kv / link.bandwidth + link.latency)
    return TransportPrice(f"ulysses {size}", seconds, moved + (ring - 1) * kv, 2 * token)
