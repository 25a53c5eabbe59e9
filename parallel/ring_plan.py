"""Which rank computes what at each hop of ring attention: pure, no tensors, no process groups.

A pack's slots fall into *pieces*: maximal runs of consecutive slots with one document, one owner, and on one side
of the document's two-way prefix. Two pieces of a document are disjoint intervals, so a pair of them is FULL (keys
before the queries, or both inside the prefix), EMPTY, or, for a piece with itself, square CAUSAL; a sliding window
adds a band. That is the whole mask algebra, whatever the layout: no mask tensor exists (RingAttention, Liu et al.
2023; zigzag and striped layouts, Brandon et al. 2023).

mask: slot i sees slot j of its document iff (j <= i or both lie in the prefix) and |i - j| < window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

#: Stands for "no limit" in tables of blocks.
FREE = np.iinfo(np.int64).max


class Block(NamedTuple):
    """Queries [q0, q1) of this rank against keys [k0, k1) of the rank whose keys have arrived (local indices).

    Query i sees key j (both counted from the block's corner) iff lower <= j - i <= upper; None is no limit.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    lower: int | None
    upper: int | None

    @property
    def kind(self) -> str:
        """FULL, CAUSAL (an upper limit only) or WINDOW."""
        if self.lower is None:
            return "FULL" if self.upper is None else "CAUSAL"
        return "WINDOW"


@dataclass(frozen=True, slots=True)
class Pieces:
    """All pieces of a batch of packs, in slot order; every array is [n].

    doc: running number of (row, document); start, stop: slots of the batch, row b at b·L; origin: the document's first;
    owner: ring rank; local: first token on the owner (rows flattened); two_way: inside the prefix. lengths:
    tokens a rank.
    """

    doc: Ints
    start: Ints
    stop: Ints
    origin: Ints
    owner: Ints
    local: Ints
    two_way: NDArray[np.bool_]
    lengths: Ints

    def __len__(self) -> int:
        return len(self.doc)

    def grouped(self, size: int) -> Pieces:
        """The same pieces where `size` neighbouring ranks hold their tokens together, one after the other (Ulysses)."""
        if size == 1:
            return self
        groups = self.lengths.reshape(-1, size)
        base = (np.cumsum(groups, axis=1) - groups).ravel()
        return Pieces(
            self.doc, self.start, self.stop, self.origin, self.owner // size, self.local + base[self.owner],
            self.two_way, groups.sum(1),
        )  # fmt: skip


def cut_pieces(
    documents: NDArray[np.int32], owner: NDArray[np.int32], prefix: NDArray[np.int32], *, ring: int
) -> Pieces:
    """The pieces of packs: documents, owner, prefix [B, L] (see parallel/ring_layout.py); -1 is padding.

    Raises ValueError when shapes differ, an owner is not a rank of the ring, or a document is not one run of slots.
    """
    if not documents.shape == owner.shape == prefix.shape:
        raise ValueError(
            f"documents {documents.shape}, owner {owner.shape} and prefix {prefix.shape} must have one shape"
        )
    if owner.size and not 0 <= owner.min() <= owner.max() < ring:
        raise ValueError(f"owners {owner.min()}..{owner.max()} are not ranks of a ring of {ring}")
    rows, context = documents.shape
    flat, whose = documents.ravel(), owner.ravel()
    size = rows * context
    edges = np.arange(0, size, context) if context else np.zeros(0, np.int64)
    begins = np.union1d(np.flatnonzero(flat[1:] != flat[:-1]) + 1, edges)
    _check_runs(flat, begins, context)
    ends = np.append(begins[1:], size)[: len(begins)]  # packs may have no slot at all
    lead = np.minimum(prefix.ravel()[begins], ends - begins)
    turns = (begins + lead)[(lead > 0) & (lead < ends - begins)]
    cuts = np.concatenate([begins, np.flatnonzero(whose[1:] != whose[:-1]) + 1, turns])
    start = np.unique(cuts)
    stop = np.append(start[1:], size)[: len(start)]
    doc = np.searchsorted(begins, start, side="right") - 1
    held = whose[start].astype(np.int64)
    local, lengths = _places(held, stop - start, ring)
    real = flat[start] >= 0
    two_way = start < (begins + lead)[doc]
    return Pieces(
        doc[real], start[real], stop[real], begins[doc][real], held[real], local[real], two_way[real], lengths
    )


def _check_runs(flat: NDArray[np.int32], begins: Ints, context: int) -> None:
    rows, names = begins // max(context, 1), flat[begins]
    seen = np.stack([rows, names])[:, names >= 0]
    if seen.shape[1] != np.unique(seen, axis=1).shape[1]:
        raise ValueError("a document of a pack is not one run of slots: number each run of slots by itself")


def _places(owner: Ints, sizes: Ints, ring: int) -> tuple[Ints, Ints]:
    """(first local token of each run on its owner, tokens of each rank)."""
    order = np.argsort(owner, kind="stable")
    lengths = np.bincount(owner, weights=sizes, minlength=ring).astype(np.int64)
    ends = np.cumsum(sizes[order])
    base = np.repeat(np.cumsum(lengths) - lengths, np.bincount(owner, minlength=ring))
    local = np.empty_like(sizes)
    local[order] = ends - sizes[order] - base
    return local, lengths


class Pairs(NamedTuple):
    """Pairs of pieces with something to compute: piece numbers, and the band in global slots."""

    query: Ints
    key: Ints


def visible_pairs(pieces: Pieces, queries: Ints, window: int | None) -> Pairs:
    """Every pair (query piece, key piece) whose block is not EMPTY, for the query pieces named by number."""
    doc = pieces.doc[queries]
    first = np.searchsorted(pieces.doc, doc, side="left")
    two_way = np.concatenate([[0], np.cumsum(pieces.two_way)])
    last_of_doc = np.searchsorted(pieces.doc, doc, side="right")
    turn = first + two_way[last_of_doc] - two_way[first]  # prefix pieces come first in a document
    low, high = first, np.where(pieces.two_way[queries], turn, queries + 1)
    if window is not None:
        reach = window - 1
        low = np.maximum(low, np.searchsorted(pieces.stop, pieces.start[queries] - reach, side="right"))
        high = np.minimum(high, np.searchsorted(pieces.start, pieces.stop[queries] - 1 + reach, side="right"))
    count = np.maximum(high - low, 0)
    total = int(count.sum())
    offset = np.repeat(np.cumsum(count) - count, count)
    key = np.arange(total, dtype=np.int64) - offset + np.repeat(low, count)
    return Pairs(np.repeat(queries, count), key)


def _blocks(pieces: Pieces, pairs: Pairs, window: int | None) -> Ints:
    """[n, 6]: q0, q1, k0, k1, lower, upper of each pair, trimmed so that no row and no key column is empty."""
    q, k = pairs
    rows, keys = pieces.stop[q] - pieces.start[q], pieces.stop[k] - pieces.start[k]
    ahead = pieces.start[k] - pieces.start[q]  # (global key - global query) - (j - i)
    lower = np.full(len(q), -FREE)
    upper = np.full(len(q), FREE)
    upper[(q == k) & ~pieces.two_way[q]] = 0
    if window is not None:
        lower = -(window - 1) - ahead
        upper = np.minimum(upper, window - 1 - ahead)
    q_skip, k_skip = np.maximum(-upper, 0), np.maximum(lower, 0)
    rows_end = np.minimum(rows, np.where(lower == -FREE, rows, keys - lower))
    keys_end = np.minimum(keys, np.where(upper == FREE, keys, rows + upper))
    q0, k0 = pieces.local[q], pieces.local[k]
    shift = k_skip - q_skip
    lower = np.where(lower == -FREE, lower, lower - shift)
    upper = np.where(upper == FREE, upper, upper - shift)
    rows, keys = rows_end - q_skip, keys_end - k_skip
    lower = np.where(lower <= -(rows - 1), -FREE, lower)
    upper = np.where(upper >= keys - 1, FREE, upper)
    q0, k0 = q0 + q_skip, k0 + k_skip
    return np.stack([q0, q0 + rows, k0, k0 + keys, lower, upper], axis=1)


def visible_blocks(pieces: Pieces, window: int | None = None) -> tuple[Pairs, Ints]:
    """Every visible pair of all ranks, and its block [n, 6] (q0, q1, k0, k1, lower, upper)."""
    pairs = visible_pairs(pieces, np.arange(len(pieces)), window)
    return pairs, _blocks(pieces, pairs, window)


def block_areas(blocks: Ints) -> Ints:
    """Query-key pairs of each block of [n, 6] (q0, q1, k0, k1, lower, upper), in closed form."""
    rows, keys = blocks[:, 1] - blocks[:, 0], blocks[:, 3] - blocks[:, 2]
    below = np.clip(blocks[:, 4], -rows, keys) - 1
    upto = np.clip(blocks[:, 5], -rows, keys)
    return _pairs_upto(rows, keys, upto) - _pairs_upto(rows, keys, below)


def _pairs_upto(rows: Ints, keys: Ints, limit: Ints) -> Ints:
    """Pairs (i, j) of a rows x keys block with j - i <= limit."""

    def triangle(x: Ints) -> Ints:
        x = np.maximum(x, 0)
        return x * (x + 1) // 2

    return triangle(limit + rows) - triangle(limit) - triangle(limit + rows - keys) + triangle(limit - keys)


def _merge(table: Ints) -> Ints:
    """Join FULL blocks of one hop that touch along the queries or along the keys; [n, 7], hop first."""
    for a0, a1, b0, b1 in ((1, 2, 3, 4), (3, 4, 1, 2)):
        order = np.lexsort((table[:, a0], table[:, b1], table[:, b0], table[:, 0]))
        table = table[order]
        full = (table[:, 5] == -FREE) & (table[:, 6] == FREE)
        same = (table[1:, [0, b0, b1]] == table[:-1, [0, b0, b1]]).all(1)
        joins = same & full[1:] & full[:-1] & (table[1:, a0] == table[:-1, a1])
        first = np.flatnonzero(np.concatenate([[True], ~joins])) if len(table) else np.zeros(0, np.int64)
        last = np.append(first[1:], len(table)) - 1
        joined = table[first]
        joined[:, a1] = table[last, a1] if len(table) else joined[:, a1]
        table = joined
    return table[np.lexsort((table[:, 3], table[:, 1], table[:, 0]))]


@dataclass(frozen=True, slots=True)
class RingPlan:
    """What one rank computes, sends and receives.

    table: [n, 7] blocks by hop (hop, q0, q1, k0, k1, lower, upper); at hop t the keys are those of rank - t. starts:
    [ring + 1] rows of `table` by hop. lengths: tokens of each rank. last: for each rank, the last hop at which someone
    needs its keys (0: nobody but itself). receives[t], sends[t]: intervals [m, 2] of the keys of rank - t that this
    rank needs, and of its own keys that rank + t needs (local indices); None for "ring". members: tokens of each
    rank whose tokens are pooled here (Ulysses).
    """

    rank: int
    ring: int
    table: Ints
    starts: Ints
    lengths: tuple[int, ...]
    last: tuple[int, ...]
    transport: str = "ring"
    receives: tuple[Ints, ...] | None = None
    sends: tuple[Ints, ...] | None = None
    members: tuple[int, ...] = ()

    def blocks(self, hop: int) -> Iterator[Block]:
        """The blocks of one hop."""
        for row in self.table[self.starts[hop] : self.starts[hop + 1], 1:].tolist():
            q0, q1, k0, k1, low, high = row
            yield Block(q0, q1, k0, k1, None if low == -FREE else low, None if high == FREE else high)

    @property
    def tokens(self) -> int:
        """Tokens this rank holds."""
        return self.lengths[self.rank]

    @property
    def area(self) -> int:
        """Query-key pairs this rank computes: its attention work."""
        return int(block_areas(self.table[:, 1:]).sum())

    def hop_areas(self) -> list[int]:
        """`area` hop by hop."""
        areas = block_areas(self.table[:, 1:])
        return [int(areas[self.starts[t] : self.starts[t + 1]].sum()) for t in range(self.ring)]

    def sent_tokens(self) -> tuple[int, int]:
        """Tokens whose keys and values, and whose key and value gradients, this rank sends in a forward and backward.

        The backward pass sends keys and values once more, as often as the forward does.
        """
        if self.ring == 1:
            return 0, 0
        if self.sends is not None and self.receives is not None:
            spans = [int((x[:, 1] - x[:, 0]).sum()) for x in self.sends[1:]]
            back = [int((x[:, 1] - x[:, 0]).sum()) for x in self.receives[1:]]
            return sum(spans), sum(back)
        passed = returned = 0
        for hop in range(self.ring):
            source = (self.rank - hop) % self.ring
            if hop < self.last[source]:
                passed += self.lengths[source]
                returned += self.lengths[source]
            elif hop == self.last[source] and hop > 0:  # its gradient goes home from here
                returned += self.lengths[source]
        return passed, returned


def plan_ring(
    documents: NDArray[np.int32],
    owner: NDArray[np.int32],
    prefix: NDArray[np.int32],
    *,
    rank: int,
    ring: int,
    ulysses: int = 1,
    window: int | None = None,
    transport: str = "ring",
) -> RingPlan:
    """The plan of ring rank `rank` of `ring` for packs (arrays [B, L], see `cut_pieces`).

    ulysses: neighbouring owners that pool their tokens (owners count ring · ulysses ranks). transport: "ring" passes
    keys round the ring as far as someone needs them; "direct" sends what is needed from its owner; "gather" sends
    everything from its owner at once.
    """
    single = cut_pieces(documents, owner, prefix, ring=ring * ulysses)
    members = tuple(single.lengths[rank * ulysses : (rank + 1) * ulysses].tolist())
    return plan_pieces(
        single.grouped(ulysses), rank=rank, ring=ring, window=window, transport=transport, members=members
    )


def plan_pieces(
    pieces: Pieces,
    *,
    rank: int,
    ring: int,
    window: int | None = None,
    transport: str = "ring",
    members: tuple[int, ...] = (),
) -> RingPlan:
    """`plan_ring` for pieces that are there already."""
    if transport not in ("ring", "direct", "gather"):
        raise ValueError(f"unknown transport {transport!r}; known: ring, direct, gather")
    mine = np.flatnonzero(pieces.owner == rank)
    pairs = visible_pairs(pieces, mine, window)
    hop = (rank - pieces.owner[pairs.key]) % ring
    table = _merge(np.concatenate([hop[:, None], _blocks(pieces, pairs, window)], axis=1))
    starts = np.searchsorted(table[:, 0], np.arange(ring + 1))
    lengths = tuple(pieces.lengths.tolist())
    last = np.zeros(ring, np.int64)
    receives: tuple[Ints, ...] | None = None
    sends: tuple[Ints, ...] | None = None
    if ring > 1:
        everyone = visible_pairs(pieces, np.arange(len(pieces)), window)
        asked, source = pieces.owner[everyone.query], pieces.owner[everyone.key]
        np.maximum.at(last, source, (asked - source) % ring)
        if transport == "gather":
            whole = [np.array([[0, n]][: n > 0], np.int64).reshape(-1, 2) for n in lengths]
            receives = tuple(whole[(rank - t) % ring] for t in range(ring))
            sends = tuple(whole[rank] for _ in range(ring))
        elif transport == "direct":
            receives = tuple(union_of(table[starts[t] : starts[t + 1], 3:5]) for t in range(ring))
            sends = _sends(pieces, everyone, rank, ring, window)
            for t in range(1, ring):
                _compact(table[starts[t] : starts[t + 1]], receives[t])
    return RingPlan(
        rank, ring, table, starts, lengths, tuple(last.tolist()), transport, receives, sends, members
    )


def union_of(spans: Ints) -> Ints:
    """The union of intervals [n, 2] as disjoint intervals in order."""
    if len(spans) == 0:
        return np.zeros((0, 2), np.int64)
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(spans[:, 1])
    new = np.concatenate([[True], spans[1:, 0] > reach[:-1]])
    first = np.flatnonzero(new)
    return np.stack([spans[first, 0], reach[np.append(first[1:], len(spans)) - 1]], axis=1)


def _sends(pieces: Pieces, everyone: Pairs, rank: int, ring: int, window: int | None) -> tuple[Ints, ...]:
    """What each other rank needs of this one's keys, by hop."""
    asked, source = pieces.owner[everyone.query], pieces.owner[everyone.key]
    sends = []
    for t in range(ring):
        chosen = (source == rank) & (asked == (rank + t) % ring)
        some = Pairs(everyone.query[chosen], everyone.key[chosen])
        sends.append(union_of(_blocks(pieces, some, window)[:, 2:4]))
    return tuple(sends)


def _compact(rows: Ints, spans: Ints) -> None:
    """Move key indices from the owner's tokens to a buffer that holds only `spans` (in place)."""
    if len(rows) == 0:
        return
    sizes = spans[:, 1] - spans[:, 0]
    shift = spans[:, 0] - (np.cumsum(sizes) - sizes)
    at = np.searchsorted(spans[:, 0], rows[:, 3], side="right") - 1
    rows[:, 3:5] -= shift[at][:, None]
