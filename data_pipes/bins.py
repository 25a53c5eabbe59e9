"""Online best fit: a document goes to the fullest open pack it fits, and a pack closes when it is nearly full."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from fractions import Fraction
from typing import TypeAlias

from ringweave.data_pipes.order import Block

#: (number of the draw in its lane, source, block, offset in the block, start, end): a piece while it waits. The
#: number of the draw is what puts handed-back pieces in their original order.
Waiting: TypeAlias = tuple[int, int, Block, int, int, int]

#: Draws of its lane that an open pack may last before it goes first. Among documents of like size a pack can be just
#: too full for all of them and never the fullest, and its documents would wait for epochs. Mixes stay far below.
OVERDUE = 4096


def auto_bins(context: int) -> int:
    """Packs a lane holds open: 32 up to 4K, where documents are large beside a pack, and 8 above."""
    return 32 if context <= 4096 else 8


class Bins:
    """The open packs of one lane.

    What cannot be placed yet (the rest of a document longer than the context, a piece that made room for itself)
    goes to the front of `pending`, so one call of `place` readies at most one pack.
    """

    def __init__(self, *, context: int, limit: int, close_at: float, pending: deque[Waiting]) -> None:
        """context: slots of a pack; limit: packs open at once; close_at: share of the slots that counts as full."""
        if context < 1 or limit < 1 or not 0 < close_at <= 1:
            raise ValueError(f"context {context} and bins {limit} must be positive, close_at in (0, 1]")
        self.context, self.limit = int(context), int(limit)
        self._full = math.ceil(Fraction(repr(float(close_at))) * self.context)
        self._pending = pending
        # Fullest first (equal ones by their last change): free slots, and what waits in them.
        self.free: list[int] = []
        self.packs: list[list[Waiting]] = []

    def place(self, piece: Waiting) -> list[Waiting] | None:
        """Puts a piece where it belongs; returns the pieces of a pack that is ready, if any.

        Only a document longer than the context is split. When a piece fits nowhere and no more packs may be open,
        the fullest one is ready, or the oldest if it is overdue.
        """
        number, source, block, offset, start, end = piece
        size = end - start
        context, free, packs = self.context, self.free, self.packs
        if size > context:
            self._pending.appendleft((number, source, block, offset, start + context, end))
            return [(number, source, block, offset, start, start + context)]
        if size >= self._full:
            return [piece]  # a pack of its own: no reason to push out a half-empty one
        at = bisect_left(free, size)
        if at < len(free):
            room, pieces = free.pop(at) - size, packs.pop(at)
            pieces.append(piece)
            if context - room >= self._full:
                return pieces
        elif len(free) < self.limit:
            room, pieces = context - size, [piece]
        else:
            self._pending.appendleft(piece)
            oldest = min(range(len(packs)), key=lambda i: packs[i][0][0])
            at = oldest if number - packs[oldest][0][0] > OVERDUE else 0
            free.pop(at)
            return packs.pop(at)
        at = bisect_right(free, room)
        free.insert(at, room)
        packs.insert(at, pieces)
        return None

    def flush(self) -> list[Waiting] | None:
        """The fullest open pack, at the end of the data; None when none is open."""
        if not self.packs:
            return None
        self.free.pop(0)
        return self.packs.pop(0)

    def refill(self, packs: list[list[Waiting]]) -> None:
        """Opens the packs of a saved state. Raises ValueError if they cannot have been open together."""
        self.packs = packs
        self.free = [self.context - sum(p[5] - p[4] for p in pieces) for pieces in packs]
        if self.free != sorted(self.free) or any(not 0 < room <= self.context for room in self.free):
            raise ValueError("open packs overflow or are out of order")
        if len(packs) > self.limit:
            raise ValueError(f"{len(packs)} open packs, at most {self.limit} may be")
