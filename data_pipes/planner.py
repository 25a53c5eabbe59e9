"""The plan of every pack of a job, made from document lengths alone.

Every rank runs the same `PackPlanner`, so pack number n is the same whatever the layout and nobody has to
tell anyone who reads what. Documents come from the mixture (`mixture.py`) and the order of their source
(`order.py`); they are put into packs by online best fit: a document goes to the fullest open bin it fits,
and when it fits none and no more bins may be opened, the fullest one is emitted. Only a document longer
than the context is split. The state is a small JSON object: restoring it continues the very same stream.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.mixture import Mixture
from ringweave.data_pipes.order import SourceCursor
from ringweave.data_pipes.pack import PackPlan, Piece
from ringweave.tokenizers.errors import DataError

_FORMAT = 1
_FIELDS = frozenset(
    ["format", "lengths", "seed", "context", "bins", "close_at", "weights", "index", "drawn", "sources"]
    + ["tokens", "open", "pending"]
)

#: (number of the draw, source, epoch, sample, start, end): a piece while it waits. The number of the draw
#: is what puts handed-back pieces in their original order.
_Waiting = tuple[int, str, int, int, int, int]


def lengths_digest(lengths: Mapping[str, NDArray[np.int64]]) -> str:
    """sha256 over names and lengths, in alphabetical order: what a state is checked against."""
    digest = hashlib.sha256()
    for name in sorted(lengths):
        array = np.ascontiguousarray(lengths[name], dtype="<i8")
        digest.update(f"{len(name)}:{name}:{len(array)}:".encode())
        digest.update(array.data)
    return digest.hexdigest()


class PackPlanner:
    """An endless stream of `PackPlan`s; a pure function of its arguments and of the calls of `switch`.

    lengths:  source -> int64 [n], tokens of each document (0: passed over)
    weights:  source -> share of tokens; sources without one, or with 0, are not drawn from
    context:  slots of a pack; bins: how many packs may be open at once
    close_at: share of the context from which a bin counts as full
    Raises DataError if a weighted source is unknown or empty.
    """

    def __init__(
        self,
        *,
        lengths: Mapping[str, NDArray[np.int64]],
        weights: Mapping[str, float],
        seed: int,
        context: int,
        bins: int = 8,
        close_at: float = 0.995,
    ) -> None:
        self._lengths = {name: np.asarray(lengths[name], dtype=np.int64) for name in sorted(lengths)}
        for name, array in self._lengths.items():
            if array.ndim != 1 or (array < 0).any():
                raise DataError(f"lengths of source {name!r} must be a list of numbers, 0 or above")
        self._digest = lengths_digest(self._lengths)
        self._seed, self._close_at = int(seed), float(close_at)
        self._cursors: dict[str, SourceCursor] = {}
        self._index = 0
        self._drawn = 0
        self._pending: deque[_Waiting] = deque()
        self._enter(context=context, weights=weights, bins=bins, tokens=None)

    def _enter(
        self, *, context: int, weights: Mapping[str, float], bins: int, tokens: Mapping[str, int] | None
    ) -> None:
        """Takes over the settings of a stage, with no bin open."""
        if context < 1 or bins < 1 or not 0 < self._close_at <= 1:
            raise ValueError(f"context {context} and bins {bins} must be positive, close_at in (0, 1]")
        unknown = sorted(set(weights) - set(self._lengths))
        if unknown:
            raise DataError(
                f"weights name unknown sources: {', '.join(unknown)}",
                why=f"known: {', '.join(self._lengths)}",
            )
        self._weights = {name: float(weights[name]) for name in sorted(weights)}
        self._mixture = Mixture(self._weights, tokens=tokens)
        for name in self._mixture.names:
            if name not in self._cursors:
                self._cursors[name] = self._cursor(name)
        self._active = [self._cursors[name] for name in self._mixture.names]
        self._context, self._limit = int(context), int(bins)
        self._full = math.ceil(Fraction(repr(self._close_at)) * self._context)
        # Open bins, fullest first (equal ones by their last change): free slots, and what waits in them.
        self._free: list[int] = []
        self._bins: list[list[_Waiting]] = []

    def _cursor(self, name: str, *, epoch: int = 0, position: int = 0, passed: int = 0) -> SourceCursor:
        try:
            return SourceCursor(
                name, self._lengths[name], seed=self._seed, epoch=epoch, position=position, passed=passed
            )
        except ValueError as error:
            raise DataError(
                str(error), where=f"source {name}", fix="check its shards and token caches"
            ) from None

    @property
    def index(self) -> int:
        """Number of the pack that `next` returns next."""
        return self._index

    @property
    def context(self) -> int:
        """Slots of the packs of the present stage."""
        return self._context

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens drawn in the present stage, by source."""
        return self._mixture.tokens

    @property
    def passed(self) -> dict[str, int]:
        """Documents of length 0 passed over so far, by source."""
        return {name: cursor.passed for name, cursor in sorted(self._cursors.items())}

    def next(self) -> PackPlan:
        """The next pack of the stream."""
        pending, mixture, active = self._pending, self._mixture, self._active
        while True:
            if pending:
                piece = pending.popleft()
            else:
                which = mixture.next()
                cursor = active[which]
                epoch, sample, size = cursor.draw()
                mixture.add(which, size)
                piece = (self._drawn, cursor.name, epoch, sample, 0, size)
                self._drawn += 1
            full = self._place(piece)
            if full is not None:
                return self._emit(full)

    def _place(self, piece: _Waiting) -> list[_Waiting] | None:
        """Puts a piece where it belongs; returns the pieces of a bin that is ready, if any.

        What cannot be placed yet (the rest of a long document, a piece that made room for itself) goes to
        the front of `_pending`, so one call readies at most one bin.
        """
        number, source, epoch, sample, start, end = piece
        size = end - start
        context, free, bins = self._context, self._free, self._bins
        if size > context:
            self._pending.appendleft((number, source, epoch, sample, start + context, end))
            return [(number, source, epoch, sample, start, start + context)]
        if size >= self._full:
            return [piece]  # a pack of its own: no reason to push out a half-empty bin
        at = bisect_left(free, size)
        if at < len(free):
            room, pieces = free.pop(at) - size, bins.pop(at)
            pieces.append(piece)
            if context - room >= self._full:
                return pieces
        elif len(free) < self._limit:
            room, pieces = context - size, [piece]
        else:
            self._pending.appendleft(piece)
            free.pop(0)
            return bins.pop(0)
        at = bisect_right(free, room)
        free.insert(at, room)
        bins.insert(at, pieces)
        return None

    def _emit(self, pieces: list[_Waiting]) -> PackPlan:
        plan = PackPlan(self._index, self._context, tuple(Piece(*piece[1:]) for piece in pieces))
        self._index += 1
        return plan

    def switch(
        self, *, context: int, weights: Mapping[str, float] | None = None, bins: int | None = None
    ) -> None:
        """Starts a stage. What waits in open bins is handed back in the order it was drawn and goes first.

        Mixture shares count from here on: a stage does not make up for the weights of the one before.
        Pieces keep their cuts unless they are longer than the new context.
        """
        waiting = sorted([piece for pieces in self._bins for piece in pieces] + list(self._pending))
        self._pending = deque(waiting)
        self._enter(
            context=context,
            weights=self._weights if weights is None else weights,
            bins=self._limit if bins is None else bins,
            tokens=None,
        )

    def state(self) -> dict[str, Any]:
        """Everything needed to continue, as a JSON object; `restore(state()).state()` is the same object."""
        return {
            "format": _FORMAT,
            "lengths": self._digest,
            "seed": self._seed,
            "context": self._context,
            "bins": self._limit,
            "close_at": self._close_at,
            "weights": dict(self._weights),
            "index": self._index,
            "drawn": self._drawn,
            "sources": {n: [c.epoch, c.position, c.passed] for n, c in sorted(self._cursors.items())},
            "tokens": self._mixture.tokens,
            "open": [[list(piece) for piece in pieces] for pieces in self._bins],
            "pending": [list(piece) for piece in self._pending],
        }

    @classmethod
    def restore(
        cls, state: Mapping[str, Any], *, lengths: Mapping[str, NDArray[np.int64]], seed: int | None = None
    ) -> PackPlanner:
        """The planner that `state` came from.

        Raises DataError if a field is unknown, missing or malformed, if the lengths are not those the state
        was made with, or if `seed` is given and differs.
        """
        _check_fields(state)
        if seed is not None and seed != state["seed"]:
            raise DataError(
                "the data cursor belongs to another seed",
                why=f"saved {state['seed']}, now {seed}",
                fix="resume with the saved seed or start a new run",
            )
        if state["lengths"] != lengths_digest(lengths):
            raise DataError(
                "the data changed since the checkpoint was saved",
                why="sources, shards or token lengths differ, so the saved cursor points elsewhere",
                fix="resume with the data of the checkpoint or start a new run",
            )
        try:
            return cls._restore(state, lengths)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(
                "malformed data cursor",
                why=f"{type(error).__name__}: {error}",
                fix="take an earlier checkpoint",
            ) from None

    @classmethod
    def _restore(cls, state: Mapping[str, Any], lengths: Mapping[str, NDArray[np.int64]]) -> PackPlanner:
        planner = cls(
            lengths=lengths,
            weights=state["weights"],
            seed=state["seed"],
            context=state["context"],
            bins=state["bins"],
            close_at=state["close_at"],
        )
        for name, (epoch, position, passed) in state["sources"].items():
            planner._cursors[name] = planner._cursor(name, epoch=epoch, position=position, passed=passed)
        planner._enter(
            context=state["context"], weights=state["weights"], bins=state["bins"], tokens=state["tokens"]
        )
        if set(state["tokens"]) != set(planner._mixture.names):
            raise ValueError("token counts and weights name different sources")
        planner._index, planner._drawn = int(state["index"]), int(state["drawn"])
        planner._pending = deque(planner._waiting(piece) for piece in state["pending"])
        for pieces in state["open"]:
            waiting = [planner._waiting(piece) for piece in pieces]
            planner._bins.append(waiting)
            planner._free.append(planner._context - sum(p[5] - p[4] for p in waiting))
        if planner._free != sorted(planner._free) or any(room < 0 for room in planner._free):
            raise ValueError("open bins overflow or are out of order")
        return planner

    def _waiting(self, piece: list[Any]) -> _Waiting:
        number, source, epoch, sample, start, end = piece
        if not (
            0 <= number < self._drawn
            and 0 <= start < end <= int(self._lengths[source][sample])
            and sample >= 0
        ):
            raise ValueError(f"piece {piece} lies outside its document")
        return number, source, epoch, sample, start, end

    @staticmethod
    def consumed(plans: Iterable[PackPlan]) -> Counter[Piece]:
        """How often each piece occurs in these packs."""
        return Counter(piece for plan in plans for piece in plan.pieces)


def _check_fields(state: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping):
        raise DataError("malformed data cursor", why="it is not an object")
    missing, unknown = sorted(_FIELDS - set(state)), sorted(set(state) - _FIELDS)
    if missing or unknown:
        raise DataError(
            "malformed data cursor",
            why=f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}",
            fix="take an earlier checkpoint, or the version of ringweave that wrote it",
        )
    if state["format"] != _FORMAT:
        raise DataError("data cursor of another format", why=f"format {state['format']}, known {_FORMAT}")


def plan_once(
    lengths: Mapping[str, NDArray[np.int64]], *, context: int, bins: int = 8, close_at: float = 0.995
) -> list[PackPlan]:
    """One pass over every document, in order of sources and samples, for evaluation. [] without documents."""
    names = [name for name in sorted(lengths) if (np.asarray(lengths[name]) > 0).any()]
    if not names:
        return []
    planner = PackPlanner(
        lengths=lengths,
        weights=dict.fromkeys(names, 1.0),
        seed=0,
        context=context,
        bins=bins,
        close_at=close_at,
    )
    pending = planner._pending
    for name in names:
        for sample in np.flatnonzero(planner._lengths[name]).tolist():
            pending.append((len(pending), name, 0, sample, 0, int(planner._lengths[name][sample])))
    plans = []
    while pending:
        full = planner._place(pending.popleft())
        if full is not None:
            plans.append(planner._emit(full))
    return plans + [planner._emit(pieces) for pieces in planner._bins]


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
