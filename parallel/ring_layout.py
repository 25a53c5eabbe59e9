"""Ring layouts: which ring rank owns which slot of a pack. Pure, no tensors, no process groups.

A layout is an *owner map*: the ring rank of every global slot. Any map is legal; the ones made here give every
rank the same number of slots in every pack (± 1 where the ring does not divide the context), because activations
have one static shape, so ranks differ in attention work only. Within a rank, slots stand in ascending global order.

contiguous    rank r holds the r-th part of the pack
zigzag        chunks r and 2·ring-1-r of 2·ring: even work for one long causal document
per_document  every document dealt in zigzag (its two-way prefix in equal parts): even work, most keys travel
chunks        fixed-size chunks dealt by cost, dearest first, to the rank with least work
planned       the best of the above and of mixes that keep short documents whole, priced for each pack
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ringweave.parallel.ring_price import Price, price_layout

Owner = NDArray[np.int32]
Slots = NDArray[np.int32]
Ints = NDArray[np.int64]

KINDS = ("planned", "zigzag", "contiguous", "per_document", "chunks")

#: A document longer than this share of a rank's slots is dealt over the ring; shorter ones stay whole.
SHARES = (1.0, 0.5, 0.25, 0.125)
#: Chunks a rank holds in the candidates of "chunks".
CHUNKS = (4, 16)


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents of one pack: first slot, length, two-way prefix of each; padding counts as one without work."""

    start: Ints
    size: Ints
    lead: Ints
    real: NDArray[np.bool_]

    @classmethod
    def of(cls, documents: Slots, prefix: Slots) -> Documents:
        """From the arrays [L] of a pack."""
        start = np.concatenate([[0], np.flatnonzero(documents[1:] != documents[:-1]) + 1]).astype(np.int64)
        size = np.diff(np.append(start, len(documents)))
        return cls(start, size, np.minimum(prefix[start], size).astype(np.int64), documents[start] >= 0)

    def area(self) -> Ints:
        """Query-key pairs of each document."""
        rest = self.size - self.lead
        return np.where(self.real, self.lead**2 + rest * self.lead + rest * (rest + 1) // 2, 0)


def rank_sizes(context: int, ring: int) -> Ints:
    """Slots of each ring rank, [ring]: context/ring, the remainder spread evenly."""
    return np.diff(np.arange(ring + 1, dtype=np.int64) * context // ring)


@dataclass(frozen=True, slots=True)
class RingLayout:
    """A rule that deals packs to `ring` ranks (see above).

    width: of the model, weighs attention against linear work; window: of its attention, None is none. traffic: what
    "planned" pays for sending every key everywhere, as a share of the compute time: communication mostly hides behind
    compute, so at most this much balance is given up to save it.
    """

    ring: int = 1
    kind: str = "planned"
    width: int = 4096
    window: int | None = None
    traffic: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown ring layout {self.kind!r}; known: {', '.join(KINDS)}")
        if self.ring < 1:
            raise ValueError(f"a ring has at least one rank, got {self.ring}")

    def owner(self, documents: Slots, prefix: Slots | None = None) -> Owner:
        """The owner map of packs: documents [B, L] (-1 is padding), prefix [B, L] or None -> int32 [B, L]."""
        if self.ring == 1 or documents.shape[1] == 0:
            return np.zeros(documents.shape, np.int32)
        lead = np.zeros_like(documents) if prefix is None else prefix
        return np.stack([self._row(row, lead[b]) for b, row in enumerate(documents)])

    def _row(self, documents: Slots, prefix: Slots) -> Owner:
        if self.kind in _RULES:
            return _RULES[self.kind](documents, prefix, self.ring)
        if self.kind == "chunks":
            return _chunks(documents, prefix, self.ring, count=CHUNKS[-1])
        return self.choose(documents, prefix)[1]

    def choose(self, documents: Slots, prefix: Slots) -> tuple[str, Owner, Price]:
        """The cheapest candidate for one pack [L]: (its name, its owner map, its price)."""
        best: tuple[float, str, Owner, Price] | None = None
        for name, rule in candidates(self.ring).items():
            owner = rule(documents, prefix)
            price = price_layout(
                documents[None],
                owner[None],
                prefix[None],
                ring=self.ring,
                width=self.width,
                window=self.window,
            )
            cost = price.total + self.traffic * price.traffic
            if best is None or cost < best[0]:
                best = (cost, name, owner, price)
        assert best is not None
        return best[1:]


def candidates(ring: int) -> dict[str, Callable[[Slots, Slots], Owner]]:
    """What "planned" chooses from, by name."""
    found: dict[str, Callable[[Slots, Slots], Owner]] = {}
    for name, rule in _RULES.items():
        found[name] = partial(_bound, rule, ring)
    for share in SHARES:
        found[f"whole up to {share:g}"] = partial(_whole, ring=ring, share=share)
    for count in CHUNKS:
        found[f"{count} chunks a rank"] = partial(_chunks, ring=ring, count=count)
    return found


def _bound(rule: Callable[[Slots, Slots, int], Owner], ring: int, documents: Slots, prefix: Slots) -> Owner:
    return rule(documents, prefix, ring)


def _contiguous(documents: Slots, prefix: Slots, ring: int) -> Owner:
    return np.repeat(np.arange(ring, dtype=np.int32), rank_sizes(len(documents), ring))


def _zigzag(documents: Slots, prefix: Slots, ring: int) -> Owner:
    """Brandon et al. 2023; ring-flash-attention's zigzag."""
    sizes = rank_sizes(len(documents), ring)
    first = (sizes + 1) // 2
    ranks = np.arange(ring, dtype=np.int32)
    return np.concatenate([np.repeat(ranks, first), np.repeat(ranks[::-1], (sizes - first)[::-1])])


def _per_document(documents: Slots, prefix: Slots, ring: int) -> Owner:
    docs = Documents.of(documents, prefix)
    owner = np.zeros(len(documents), np.int32)
    _deal(owner, docs, np.arange(len(docs.size)), ring)
    return _level(owner, ring)


def _deal(owner: Owner, docs: Documents, chosen: Ints, ring: int) -> None:
    """Write the owners of the chosen documents: prefix and padding in `ring` parts, the rest in zigzag."""
    ranks = np.arange(ring, dtype=np.int32)
    lead = np.where(docs.real, docs.lead, docs.size)[chosen]
    rest = docs.size[chosen] - lead
    # Remainders of one document must not fall on the ranks the last one's fell on.
    turn = (np.arange(len(chosen)) * 7919) % ring
    flat = _parts(lead, ring)
    zigzag = _parts(rest, 2 * ring)
    sizes = np.concatenate([flat, zigzag], axis=1).ravel()
    order = np.concatenate([ranks, ranks, ranks[::-1]])
    whose = (order[None, :] + turn[:, None]) % ring
    runs = np.repeat(whose.ravel(), sizes).astype(np.int32)
    at = docs.start[chosen]
    total = docs.size[chosen]
    slots = np.arange(int(total.sum())) - np.repeat(np.cumsum(total) - total, total) + np.repeat(at, total)
    owner[slots] = runs


def _parts(sizes: Ints, parts: int) -> Ints:
    """[n, parts]: each size cut into near-equal parts."""
    edges = sizes[:, None] * np.arange(parts + 1)[None, :] // parts
    return np.diff(edges, axis=1)


def _whole(documents: Slots, prefix: Slots, *, ring: int, share: float) -> Owner:
    """Documents up to `share` of a rank's slots stay whole, dearest first to the rank with least work that has room."""
    docs = Documents.of(documents, prefix)
    sizes = rank_sizes(len(documents), ring)
    area = docs.area()
    owner = np.full(len(documents), -1, np.int32)
    long = np.flatnonzero((docs.size > share * sizes.min()) & docs.real)
    _deal(owner, docs, long, ring)
    room = sizes - np.bincount(owner[owner >= 0], minlength=ring)
    short = np.setdiff1d(np.flatnonzero(docs.real), long)
    work = [(0, r) for r in range(ring)]
    for d in short[np.argsort(-area[short], kind="stable")].tolist():
        full: list[tuple[int, int]] = []
        need, place = int(docs.size[d]), -1
        while work:
            done, r = heapq.heappop(work)
            if room[r] >= need:
                place = r
                heapq.heappush(work, (done + int(area[d]), r))
                break
            full.append((done, r))
        for item in full:
            heapq.heappush(work, item)
        if place >= 0:
            owner[docs.start[d] : docs.start[d] + need] = place
            room[place] -= need
    return _fill(owner, room)


def _chunks(documents: Slots, prefix: Slots, ring: int, *, count: int) -> Owner:
    """`count` chunks a rank of equal size, dearest first to the rank with least work (as MagiAttention's dispatch)."""
    context = len(documents)
    edges = np.arange(ring * count + 1, dtype=np.int64) * context // (ring * count)
    docs = Documents.of(documents, prefix)
    done = np.concatenate([[0], np.cumsum(docs.area())])
    at = np.searchsorted(docs.start, edges, side="right") - 1
    inside = np.minimum(edges - docs.start[at], docs.size[at])
    lead = docs.lead[at]
    after = np.maximum(inside - lead, 0)
    upto = np.minimum(inside, lead) * lead + after * lead + after * (after + 1) // 2
    area = np.diff(done[at] + np.where(docs.real[at], upto, 0))
    work, left, whose = [(0, r) for r in range(ring)], [count] * ring, np.zeros(ring * count, np.int32)
    for c in np.argsort(-area, kind="stable").tolist():
        total, r = heapq.heappop(work)
        whose[c] = r
        left[r] -= 1
        if left[r]:
            heapq.heappush(work, (total + int(area[c]), r))
    return _level(np.repeat(whose, np.diff(edges)), ring)


def _fill(owner: Owner, room: Ints) -> Owner:
    """Give slots nobody owns (-1) to the ranks with room, the roomiest first, in long runs."""
    ring = len(room)
    if (room < 0).any():
        owner[owner < 0] = 0
        return _level(owner, ring)
    free = np.flatnonzero(owner < 0)
    order = np.argsort(-room, kind="stable")
    owner[free] = np.repeat(order, room[order])
    return owner


def _level(owner: Owner, ring: int) -> Owner:
    """Move as few slots as needed, from the ends of long runs, so that every rank holds its exact share."""
    excess = np.bincount(owner, minlength=ring) - rank_sizes(len(owner), ring)
    takers = np.repeat(np.arange(ring), np.maximum(-excess, 0))
    if len(takers) == 0:
        return owner
    given = 0
    start = np.concatenate([[0], np.flatnonzero(owner[1:] != owner[:-1]) + 1])
    stop = np.append(start[1:], len(owner))
    whose = owner[start]
    for r in np.flatnonzero(excess > 0):
        runs = np.flatnonzero(whose == r)
        for run in runs[np.argsort(start[runs] - stop[runs], kind="stable")]:
            some = min(int(excess[r]), int(stop[run] - start[run]))
            owner[stop[run] - some : stop[run]] = takers[given : given + some]
            given += some
            excess[r] -= some
            if excess[r] == 0:
                break
    return owner


_RULES: dict[str, Callable[[Slots, Slots, int], Owner]] = {
    "contiguous": _contiguous,
    "zigzag": _zigzag,
    "per_document": _per_document,
}
