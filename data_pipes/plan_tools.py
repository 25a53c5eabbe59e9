"""Plans beside the stream: one pass for evaluation, and the comparison of two streams."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

import numpy as np

from ringweave.data_pipes.bins import Bins, Waiting
from ringweave.data_pipes.lengths import Arrays, Lengths, as_lengths
from ringweave.data_pipes.order import Block
from ringweave.data_pipes.pack import PackPlan, Piece


def plan_once(
    lengths: Lengths | Arrays, *, context: int, bins: int = 8, close_at: float = 0.995
) -> list[PackPlan]:
    """One pass over every document, in order of sources and samples, for evaluation. [] without documents."""
    table = as_lengths(lengths)
    pending: deque[Waiting] = deque()
    names = sorted(table.names)
    for source, name in enumerate(names):
        parts = [np.asarray(table.of(name, shard)) for shard in range(len(table.counts(name)))]
        sizes = np.concatenate([np.zeros(0, np.int64), *parts])
        block = Block(0, 0, np.arange(len(sizes)), sizes, 0)
        for at in np.flatnonzero(sizes).tolist():
            pending.append((len(pending), source, block, at, 0, int(sizes[at])))
    open_ = Bins(context=context, limit=bins, close_at=close_at, pending=pending)
    packs = []
    while pending:
        full = open_.place(pending.popleft())
        if full is not None:
            packs.append(full)
    return [
        PackPlan(
            index, context, tuple(Piece(names[s], 0, at, start, end) for _, s, _, at, start, end in pieces)
        )
        for index, pieces in enumerate([*packs, *open_.packs])
    ]


def audit(
    plans_consumed: Iterable[tuple[int, list[Piece]]], reference: Iterable[tuple[int, list[Piece]]]
) -> dict[str, int]:
    """Compares two streams of (pack number, pieces) as multisets of pieces.

    Both are taken as they are: leave out the steps that a restart rolled back before calling.
    A sample counts as lost (repeated) as often as the piece of it that is missing (surplus) most often.
    """
    ours = Counter(piece for _, pieces in plans_consumed for piece in pieces)
    theirs = Counter(piece for _, pieces in reference for piece in pieces)
    return {"samples_lost": _samples(theirs - ours), "samples_repeated": _samples(ours - theirs)}


def _samples(pieces: Counter[Piece]) -> int:
    most: dict[tuple[str, int, int], int] = {}
    for piece, count in pieces.items():
        key = (piece.source, piece.epoch, piece.sample)
        most[key] = max(most.get(key, 0), count)
    return sum(most.values())
