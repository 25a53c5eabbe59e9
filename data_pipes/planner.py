"""The plan of every pack of a job, made from document lengths alone.

Every rank runs the same `PackPlanner`, so pack number n is the same whatever the layout and nobody has to
tell anyone who reads what. V lanes (`lanes.py`) each draw documents by mixture (`mixture.py`) in the order of their
sources (`order.py`) and put them into packs by online best fit (`bins.py`); raw pack n comes from lane n mod V. A
balancing window (`balance.py`) then orders raw packs so that those of one step cost alike.

The state is a JSON object: the lanes as they stood at an *anchor* and how many packs were emitted since. Restoring it
plans those few packs again and continues the very same stream.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ringweave.data_pipes.balance import CostModel, arrange, auto_window
from ringweave.data_pipes.bins import Bins, Waiting, auto_bins
from ringweave.data_pipes.cursor_codec import decode, encode, load
from ringweave.data_pipes.lanes import Lane, Snapshot, auto_lanes
from ringweave.data_pipes.lengths import Arrays, Lengths, as_lengths, lengths_digest
from ringweave.data_pipes.mixture import Mixture, integer_weights, tempered
from ringweave.data_pipes.order import Orders
from ringweave.data_pipes.pack import PackPlan, Piece
from ringweave.data_pipes.plan_tools import audit, plan_once
from ringweave.tokenizers.errors import DataError

__all__ = ["EndOfData", "PackPlanner", "audit", "lengths_digest", "plan_once"]

_FORMAT = 2
#: Arguments that a state repeats as they were given, and all its fields.
_SETTINGS = (
    "seed",
    "context",
    "batch",
    "bins",
    "close_at",
    "weights",
    "temperature",
    "lanes",
    "run",
    "block",
) + (
    "epochs",
    "window",
)
_FIELDS = frozenset([*_SETTINGS, "format", "lengths", "cost", "index", "raw", "turn", "done", "cursors"])
#: Documents drawn between two anchors (an anchor is where a window begins): what a restart plans again.
_ANCHOR = 20_000


class EndOfData(Exception):
    """Every source was read as often as asked for and every pack is emitted."""


class PackPlanner:
    """A stream of `PackPlan`s; a pure function of its arguments and of the calls of `switch`."""

    def __init__(
        self,
        *,
        lengths: Lengths | Arrays,
        weights: Mapping[str, float],
        seed: int,
        context: int,
        batch: int = 1,
        bins: int | None = None,
        close_at: float = 0.995,
        lanes: int | None = None,
        window: int | None = 0,
        cost: CostModel | None = None,
        temperature: float = 1.0,
        epochs: int | None = None,
        run: int | None = None,
        block: int | None = None,
    ) -> None:
        """lengths:  token lengths by source (0: passed over)
        weights:     source -> share of tokens; sources without one, or with 0, are not drawn from
        context:     slots of a pack; batch: packs of a step
        bins:        packs a lane holds open, by context if None (`auto_bins`)
        close_at:    share of the context from which a pack counts as full
        lanes:       V, by the number of samples if None (`auto_lanes`); fixed for the whole run
        window:      packs that are sorted by `cost`, a multiple of `batch`; 0 for none, None for `auto_window`
        temperature: shares are weight^(1/temperature)
        epochs:      how often each source is read; for ever if None
        run, block:  samples of a run, runs of a block (`order.py`); by rule if None
        Raises DataError if a weighted source is unknown or empty, ValueError for numbers out of range.
        """
        self._lengths = as_lengths(lengths)
        self._names = sorted(self._lengths.names)
        self._digest = self._lengths.digest
        self._seed, self._close_at = int(seed), float(close_at)
        for what, value in [("lanes", lanes), ("epochs", epochs), ("run", run), ("block", block)]:
            if value is not None and value < 1:
                raise ValueError(f"{what} {value} must be positive")
        self._run, self._block, self._epochs = run, block, epochs
        lanes = lanes or auto_lanes(self._lengths)
        self._orders = Orders(
            self._lengths, seed=self._seed, lanes=lanes, run=run, block=block, epochs=epochs
        )
        self._lanes = [Lane(n, self._orders) for n in range(lanes)]
        self._index = self._raw = self._turn = self._done = 0
        self._ready: deque[tuple[int, list[Waiting]]] = deque()  # (lane, pieces) of packs of the window
        self._settings(
            context=context, weights=weights, bins=bins, batch=batch, window=window,
            cost=cost or CostModel(), temperature=temperature,
        )  # fmt: skip
        self._enter([None] * len(self._lanes))

    # --- stages ----------------------------------------------------------------------------------------------

    def _settings(
        self, *, context: int, weights: Mapping[str, float], bins: int | None, batch: int, window: int | None,
        cost: CostModel, temperature: float,
    ) -> None:  # fmt: skip
        """Takes over the settings of a stage; nothing is changed if they are refused."""
        unknown = sorted(set(weights) - set(self._names))
        if unknown:
            raise DataError(
                f"weights name unknown sources: {', '.join(unknown)}", why=f"known: {', '.join(self._names)}"
            )
        drawn = list(integer_weights(tempered(weights, temperature)))
        if batch < 1 or (window is not None and (window < 0 or window % batch)):
            raise ValueError(f"window {window} must be a multiple of batch {batch}, which must be positive")
        Bins(context=context, limit=auto_bins(context) if bins is None else bins, close_at=self._close_at,
             pending=deque())  # fmt: skip
        for name in drawn:
            self._orders.get(self._names.index(name))
        self._context, self._weights = int(context), {n: float(weights[n]) for n in sorted(weights)}
        self._bins, self._batch, self._window = bins, int(batch), window
        self._cost, self._temperature = cost, float(temperature)
        self._window_packs = auto_window(self._context, self._batch) if window is None else int(window)

    def _enter(self, saved: Iterable[Snapshot | None]) -> None:
        """Starts the stage in every lane, or goes on with it where a lane has a saved state."""
        weights = tempered(self._weights, self._temperature)
        limit = auto_bins(self._context) if self._bins is None else self._bins
        for lane, snapshot in zip(self._lanes, saved, strict=True):
            tokens = {self._names[s]: t for s, t in snapshot.tokens.items()} if snapshot else None
            mixture = Mixture(weights, tokens=tokens)
            sources = [self._names.index(name) for name in mixture.names]
            if snapshot and list(snapshot.tokens) != sources:
                raise ValueError("token counts and weights name different sources")
            lane.enter(mixture, sources, context=self._context, bins=limit, close_at=self._close_at)
            if snapshot:
                lane.bins.refill([list(pieces) for pieces in snapshot.packs])
                lane.stand(snapshot)
        self._anchor()

    def switch(
        self,
        *,
        context: int,
        weights: Mapping[str, float] | None = None,
        bins: int | None = None,
        batch: int | None = None,
        window: int | Literal["auto"] | None = None,
        cost: CostModel | None = None,
        temperature: float | None = None,
    ) -> None:
        """Starts a stage of other settings; what is not given stays (automatic numbers are made anew).

        window: "auto" for `auto_window`.

        Pieces drawn but not emitted (in open packs and in the window) come first in the new stage, lane by lane, in
        the order in which they were drawn: nothing is lost, nothing occurs twice. Lanes, seed and the number of the
        next pack stay. Token counts start anew.
        """
        self._settings(
            context=context,
            weights=self._weights if weights is None else weights,
            bins=self._bins if bins is None else bins,
            batch=self._batch if batch is None else batch,
            window=self._window if window is None else None if window == "auto" else window,
            cost=self._cost if cost is None else cost,
            temperature=self._temperature if temperature is None else temperature,
        )
        back: dict[int, list[list[Waiting]]] = {}
        for number, pieces in self._ready:
            back.setdefault(number, []).append(pieces)
        self._ready.clear()
        for lane in self._lanes:
            lane.hand_back(back.get(lane.number, []))
        self._enter([None] * len(self._lanes))

    # --- packs -----------------------------------------------------------------------------------------------

    def _anchor(self) -> None:
        """From here on a restart plans again."""
        self._start = (self._raw, self._turn, [lane.snapshot() for lane in self._lanes])
        self._done = self._since = 0

    def _draw(self) -> tuple[int, list[Waiting]] | None:
        """The next raw pack with its lane, lanes in turn; None when all have ended."""
        for _ in self._lanes:
            lane = self._lanes[self._turn]
            self._turn = (self._turn + 1) % len(self._lanes)
            before = lane.drawn
            pieces = lane.next()
            self._since += lane.drawn - before
            if pieces is not None:
                self._raw += 1
                return lane.number, pieces
        return None

    def _fill(self) -> None:
        """Makes at least one pack ready. Raises EndOfData."""
        first = self._raw
        packs: list[tuple[int, list[Waiting]]] = []
        while len(packs) < max(1, self._window_packs) and (pack := self._draw()) is not None:
            packs.append(pack)
        if self._window_packs:
            costs = [self._cost.pack([p[5] - p[4] for p in pieces]) for _, pieces in packs]
            packs = [packs[at] for at in arrange(costs, self._batch, self._seed, "window", first)]
        if not packs:
            raise EndOfData("every source was read as often as asked for")
        self._ready.extend(packs)

    def next(self) -> PackPlan:
        """The next pack of the stream. Raises EndOfData when finite data has been emitted whole."""
        if not self._ready:
            if self._since >= _ANCHOR:
                self._anchor()
            self._fill()
        _, pieces = self._ready.popleft()
        self._done += 1
        return self._emit(pieces)

    def _emit(self, pieces: Iterable[Waiting]) -> PackPlan:
        names = self._names
        plan = PackPlan(
            self._index,
            self._context,
            tuple(
                Piece(names[source], block.epoch, block.samples.item(offset), start, end)
                for _, source, block, offset, start, end in pieces
            ),
        )
        self._index += 1
        return plan

    def plans(self, count: int) -> list[PackPlan] | None:
        """The next `count` packs; None after the end.

        At the end of finite data packs without pieces fill the last batch up, so all ranks end on the same step.
        """
        plans: list[PackPlan] = []
        try:
            for _ in range(count):
                plans.append(self.next())
        except EndOfData:
            if not plans:
                return None
            plans += [self._emit(()) for _ in range(count - len(plans))]
        return plans

    # --- what it can tell ------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The settings of the present stage as they were given: arguments of `switch` (window: None for "auto")."""
        return {
            "context": self._context, "weights": dict(self._weights), "batch": self._batch, "window": self._window,
            "cost": self._cost, "temperature": self._temperature,
        }  # fmt: skip

    @property
    def index(self) -> int:
        """Number of the pack that `next` returns next."""
        return self._index

    @property
    def context(self) -> int:
        """Slots of the packs of the present stage."""
        return self._context

    @property
    def lanes(self) -> int:
        """V, the number of lanes."""
        return len(self._lanes)

    @property
    def window(self) -> int:
        """Packs of the balancing window of the present stage; 0 for none."""
        return self._window_packs

    @property
    def batch(self) -> int:
        """Packs of a step of the present stage."""
        return self._batch

    def waiting(self) -> list[Piece]:
        """What is drawn but not emitted: pieces of the window, of open packs, and those that wait for a place."""
        groups = [pieces for _, pieces in self._ready]
        groups += [list(pieces) for lane in self._lanes for pieces in [*lane.bins.packs, lane.pending]]
        return [self._piece(piece) for pieces in groups for piece in pieces]

    def _piece(self, piece: Waiting) -> Piece:
        _, source, block, offset, start, end = piece
        return Piece(self._names[source], block.epoch, block.samples.item(offset), start, end)

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens drawn in the present stage, by source (those that wait in open packs and the window too)."""
        total: Counter[str] = Counter()
        for lane in self._lanes:
            total.update(lane.mixture.tokens)
        return {name: total[name] for name in self._lanes[0].mixture.names}

    @property
    def passed(self) -> dict[str, int]:
        """Documents of length 0 passed over so far, by source."""
        total: Counter[int] = Counter()
        for lane in self._lanes:
            total.update({source: cursor.passed for source, cursor in lane.cursors.items()})
        return {self._names[source]: total[source] for source in sorted(total)}

    def shares(self) -> dict[str, tuple[float, float]]:
        """source -> (target, drawn), shares of the tokens of the present stage."""
        whole, drawn = integer_weights(tempered(self._weights, self._temperature)), self.tokens
        weights, tokens = sum(whole.values()), max(1, sum(drawn.values()))
        return {name: (weight / weights, drawn[name] / tokens) for name, weight in whole.items()}

    # --- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything needed to continue, as a JSON object; `restore(state()).state()` is the same object."""
        raw, turn, snapshots = self._start
        return {
            "format": _FORMAT, "lengths": self._digest, "seed": self._seed, "context": self._context,
            "batch": self._batch, "bins": self._bins, "close_at": self._close_at, "weights": dict(self._weights),
            "temperature": self._temperature, "lanes": len(self._lanes), "run": self._run, "block": self._block,
            "epochs": self._epochs, "window": self._window, "cost": self._cost.to_json(), "index": self._index,
            "raw": raw, "turn": turn, "done": self._done, "cursors": [encode(s) for s in snapshots],
        }  # fmt: skip

    @classmethod
    def restore(
        cls, state: Mapping[str, Any], *, lengths: Lengths | Arrays, seed: int | None = None
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
        lengths = as_lengths(lengths)
        if state["lengths"] != lengths.digest:
            raise DataError(
                "the data changed since the checkpoint was saved",
                why="sources, shards or token lengths differ, so the saved cursor points elsewhere",
                fix="resume with the data of the checkpoint or start a new run",
            )
        try:
            return cls._restore(state, lengths)
        except (TypeError, ValueError, KeyError, IndexError, OverflowError, EndOfData) as error:
            raise DataError(
                "malformed data cursor",
                why=f"{type(error).__name__}: {error}",
                fix="take an earlier checkpoint",
            ) from None

    @classmethod
    def _restore(cls, state: Mapping[str, Any], lengths: Lengths) -> PackPlanner:
        cost = CostModel.from_json(state["cost"])
        planner = cls(lengths=lengths, cost=cost, **{name: state[name] for name in _SETTINGS})
        lanes, done = planner._lanes, state["done"]
        if len(state["cursors"]) != len(lanes) or not 0 <= state["turn"] < len(lanes):
            raise ValueError(
                f"{len(state['cursors'])} cursors and turn {state['turn']} for {len(lanes)} lanes"
            )
        if any(type(state[n]) is not int or state[n] < 0 for n in ("index", "raw", "turn", "done")):
            raise ValueError("index, raw, turn and done must be numbers of 0 or above")
        if done > state["index"]:
            raise ValueError(f"{done} packs since the anchor of {state['index']} in all")
        planner._lanes = [Lane(n, planner._orders) for n in range(len(lanes))]
        snapshots = []
        for lane, text in zip(planner._lanes, state["cursors"], strict=True):
            snapshot, blocks = decode(text, lane.number, planner._orders)
            load(lane, snapshot, blocks)
            snapshots.append(snapshot)
        planner._raw, planner._turn = state["raw"], state["turn"]
        planner._enter(snapshots)
        for _ in range(done):
            if not planner._ready:
                planner._fill()
            planner._ready.popleft()
        planner._done, planner._index = done, state["index"]
        return planner

    @staticmethod
    def consumed(plans: Iterable[PackPlan]) -> Counter[Piece]:
        """How often each piece occurs in these packs."""
        return Counter(piece for plan in plans for piece in plan.pieces)


def _check_fields(state: Mapping[str, Any]) -> None:
    """Refuses what no planner of this format wrote."""
    if not isinstance(state, Mapping):
        raise DataError("malformed data cursor", why="it is not an object")
    if state.get("format", _FORMAT) != _FORMAT:
        raise DataError(
            "data cursor of another format",
            why=f"format {state['format']!r}, known {_FORMAT}",
            fix="resume with the version of ringweave that wrote it, or start a new run",
        )
    missing, unknown = sorted(_FIELDS - set(state)), sorted(set(state) - _FIELDS)
    if missing or unknown:
        raise DataError(
            "malformed data cursor",
            why=f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}",
            fix="take an earlier checkpoint, or the version of ringweave that wrote it",
        )
