"""Lanes: independent streams of packs, each with its own share of every source, its mixture and its open packs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from ringweave.data_pipes.bins import Bins, Waiting
from ringweave.data_pipes.lengths import Lengths
from ringweave.data_pipes.mixture import Mixture
from ringweave.data_pipes.order import Orders, SourceCursor

#: Highly composite numbers: whatever divides the ranks of a job is likely to divide its lanes.
LANES = (1, 2, 4, 6, 12, 24, 36, 48, 60, 120, 180, 240)
#: Samples that a lane should have.
_SAMPLES = 256

_drawn_order = itemgetter(0, 4)  # number of the draw, start: the order in which pieces were cut


def auto_lanes(lengths: Lengths) -> int:
    """The largest of `LANES` that leaves every lane 256 samples, or one shard of a source read by whole shards."""
    shares = 0
    for name in lengths.names:
        counts = lengths.counts(name)
        shares += int((counts > 0).sum()) if lengths.whole(name) else int(counts.sum()) // _SAMPLES
    return max((v for v in LANES if v <= shares), default=1)


@dataclass(slots=True, eq=False)
class Snapshot:
    """A lane at one moment. The lists are copies; `text` is filled when somebody asks for it.

    cursors: source -> (epoch, block, offset, passed, ended), for the sources drawn from so far
    tokens:  source -> tokens drawn in the present stage, for the sources of its mixture
    packs:   open packs, fullest first; pending: pieces that wait to be placed, in the order of the draw
    drawn:   documents drawn so far
    """

    cursors: dict[int, tuple[int, int, int, int, bool]]
    tokens: dict[int, int]
    packs: list[list[Waiting]]
    pending: list[Waiting]
    drawn: int
    text: str | None = field(default=None)


class Lane:
    """Lane `number` of the job. Sources are known by their number in `orders`."""

    def __init__(self, number: int, orders: Orders) -> None:
        self.number, self._orders = number, orders
        self.cursors: dict[int, SourceCursor] = {}
        self.pending: deque[Waiting] = deque()
        self.drawn = 0
        self._snapshot: Snapshot | None = None

    def enter(
        self, mixture: Mixture, sources: Sequence[int], *, context: int, bins: int, close_at: float
    ) -> None:
        """Starts a stage with no pack open; `sources` are those of `mixture.names`, by index."""
        self.mixture, self.sources = mixture, list(sources)
        for source in self.sources:
            self.cursor(source)
        self._draws = [self.cursors[source].draw for source in self.sources]
        for at, source in enumerate(self.sources):
            if self.cursors[source].ended:
                mixture.close(at)
        self.bins = Bins(context=context, limit=bins, close_at=close_at, pending=self.pending)
        self._snapshot = None

    def cursor(self, source: int) -> SourceCursor:
        """The lane's cursor in a source, at its start if there was none."""
        cursor = self.cursors.get(source)
        if cursor is None:
            cursor = self.cursors[source] = SourceCursor(self._orders.get(source), self.number)
        return cursor

    def next(self) -> list[Waiting] | None:
        """The pieces of the lane's next pack; None when its data has ended and nothing waits."""
        self._snapshot = None
        pending, mixture, place = self.pending, self.mixture, self.bins.place
        draws, sources = self._draws, self.sources
        while True:
            if pending:
                piece = pending.popleft()
            else:
                at = mixture.next()
                if at < 0:
                    return self.bins.flush()
                document = draws[at]()
                if document is None:
                    mixture.close(at)
                    continue
                block, offset, size = document
                mixture.add(at, size)
                piece = (self.drawn, sources[at], block, offset, 0, size)
                self.drawn += 1
            full = place(piece)
            if full is not None:
                return full

    def hand_back(self, packs: Sequence[list[Waiting]]) -> None:
        """Puts what is drawn but not emitted (open packs and these) before all new draws, in the order of the draw."""
        waiting = [piece for pack in [*self.bins.packs, *packs] for piece in pack]
        waiting = sorted([*waiting, *self.pending], key=_drawn_order)
        self.pending.clear()
        self.pending.extend(waiting)
        self.bins.refill([])
        self._snapshot = None

    def snapshot(self) -> Snapshot:
        """The lane as it is now; the same object until it moves on."""
        if self._snapshot is None:
            cursors = {
                s: (c.epoch, c.number, c.offset, c.passed, c.ended) for s, c in sorted(self.cursors.items())
            }
            tokens = dict(zip(self.sources, self.mixture.tokens.values()))
            packs = [list(p) for p in self.bins.packs]
            self._snapshot = Snapshot(cursors, tokens, packs, list(self.pending), self.drawn)
        return self._snapshot

    def stand(self, snapshot: Snapshot) -> None:
        """Keeps the snapshot that the lane has just been made from."""
        self._snapshot = snapshot
