"""Pipeline tables executed on paper: nothing missing, nothing that waits for ever, and what it costs. No torch.

`simulate` runs what ranks compute, in time; `prove_transfers` runs the messages between them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ringweave.parallel.schedules import Action, Table

Programs = Mapping[int, Sequence[Action]]


class Deadlock(ValueError):
    """A table in which every rank waits; the message names each rank's action and what it waits for."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Time of a part's forward, of its backward's two halves ("B" is both) and of a message between ranks.

    parts: factor of each part (None: all equal), as an uneven split has.
    """

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0
    transfer: float = 0.0
    parts: tuple[float, ...] | None = None

    def of(self, action: Action) -> float:
        """Time of one action."""
        one = {"F": self.forward, "I": self.input, "W": self.weight, "B": self.input + self.weight}[
            action.kind
        ]
        return one * (self.parts[action.part] if self.parts else 1.0)


@dataclass(frozen=True, slots=True)
class Simulation:
    """When everything ran. Times are in the unit of the costs; lists have an entry a rank.

    alive: most (part, micro-batch) pairs whose activations a rank keeps at once, from the start of F to the end
    of B or W.
    """

    spans: dict[Action, tuple[float, float]]
    makespan: float
    busy: list[float]
    active: list[float]
    alive: list[int]

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they wait, while the step lasts."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)

    @property
    def stall(self) -> float:
        """Share in which the slowest rank waits between its own first and last action: the bubble of Qi et al. 2023,
        whose optimizer step does not wait for the other ranks."""
        return 1.0 - sum(self.busy) / (len(self.busy) * max(self.active))


def check_complete(actions: Table, holder: Sequence[int], micro_batches: int) -> None:
    """Raise ValueError unless each part has, on its rank, one F and one B (or one I, then one W) a micro-batch,
    the forward first."""
    for rank, row in enumerate(actions):
        place = {a: at for at, a in enumerate(row)}
        extra = [
            a
            for a, n in Counter(row).items()
            if n > 1 or holder[a.part] != rank or not 0 <= a.micro < micro_batches
        ]
        if extra:
            raise ValueError(f"rank {rank}: {extra[0]} stands twice, or is not this rank's")
        for part in (p for p, who in enumerate(holder) if who == rank):
            for m in range(micro_batches):
                found = [place.get(Action(kind, part, m)) for kind in "FBIW"]
                f, b, i, w = found
                whole = b is not None and i is None and w is None and f is not None and f < b
                halves = b is None and f is not None and i is not None and w is not None and f < i < w
                if not (whole or halves):
                    raise ValueError(
                        f"rank {rank}, part {part}, micro-batch {m}: F, B, I, W stand at {found}"
                    )


def needs(action: Action, parts: int) -> list[tuple[Action, ...]]:
    """What must have run before an action: one of each tuple (a gradient comes from a "B" or from an "I")."""
    kind, part, m = action
    if kind == "F":
        return [(Action("F", part - 1, m),)] if part > 0 else []
    if kind == "W":
        return [(Action("I", part, m),)]
    later = [(Action("B", part + 1, m), Action("I", part + 1, m))] if part < parts - 1 else []
    return [(Action("F", part, m),), *later]


def simulate(actions: Table, holder: Sequence[int], costs: Costs | None = None) -> Simulation:
    """Run the table: a rank takes its actions in order, each as soon as what it needs is there.

    Raises Deadlock when no rank can go on.
    """
    costs = costs or Costs()
    spans: dict[Action, tuple[float, float]] = {}
    at, free = [0] * len(actions), [0.0] * len(actions)

    def ready(action: Action, rank: int) -> float | None:
        when = free[rank]
        for choice in needs(action, len(holder)):
            ran = [a for a in choice if a in spans]
            if not ran:
                return None
            when = max(when, spans[ran[0]][1] + (costs.transfer if holder[ran[0].part] != rank else 0.0))
        return when

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(actions):
            while at[rank] < len(row) and (start := ready(row[at[rank]], rank)) is not None:
                free[rank] = start + costs.of(row[at[rank]])
                spans[row[at[rank]]] = (start, free[rank])
                at[rank] += 1
                moved = True
    stuck = {r: row[at[r]] for r, row in enumerate(actions) if at[r] < len(row)}
    if stuck:
        raise Deadlock(_blocked(stuck, lambda a: _missing(a, spans, len(holder))))
    active = [spans[row[-1]][1] - spans[row[0]][0] if row else 0.0 for row in actions]
    busy = [sum(costs.of(a) for a in row) for row in actions]
    return Simulation(spans, max(free), busy, active, [most_alive(row) for row in actions])


def most_alive(row: Sequence[Action], part: int | None = None) -> int:
    """Most micro-batches of a rank's parts (or of one of them) between their F and the end of their backward."""
    now = most = 0
    for a in row:
        if part is not None and a.part != part:
            continue
        now += a.kind == "F"
        most = max(most, now)
        now -= a.kind in ("B", "W")
    return most


def bubble_bound(schedule: str, ranks: int, virtual: int, micro_batches: int) -> float:
    """The closed form of the bubble when a forward and each half of a backward take equally long on all parts.

    p ranks, m micro-batches (a multiple of p where parts are visited in turn; 2p - 1 or more for zbv), v parts a
    rank: GPipe and 1F1B (p-1)/(m+p-1); interleaved (p-1)/(v·m+p-1), Narayanan et al. 2021; zero bubble
    (p-1)(F+I-W)/(3·v·m + (p-1)(F+I-W)) with F = I = W = 1, ZB-H1 of Qi et al. 2023 with parts v times thinner;
    zbv 0, counting each rank from its first to its last action (`Simulation.stall`).
    """
    p, m, v = ranks, micro_batches, virtual
    if schedule == "zbv":
        return 0.0
    if schedule == "zero_bubble":
        return (p - 1) / (3 * v * m + p - 1)
    return (p - 1) / (v * m + p - 1)


def prove_transfers(programs: Programs, holder: Sequence[int]) -> int:
    """Run programs of computing and moving actions with the strictest messages there are; gives how many were sent.

    A rank issues its transfers without waiting, but they leave and arrive one by one in that order, a send only
    when its receiver has come to the very message, whatever the direction. (One communicator on one stream, as
    NCCL may have it; gloo asks for less. What ends here ends under any weaker rule, for that has fewer edges.)

    Raises Deadlock, also for a message that meets another one: two tensors of one shape would change places.
    """
    at = dict.fromkeys(programs, 0)
    queues: dict[int, deque[Action]] = {rank: deque() for rank in programs}
    done: set[Action] = set()
    parts, sent, moved = len(holder), 0, True
    while moved:
        moved = False
        for rank, row in programs.items():
            while at[rank] < len(row) and _can_issue(row[at[rank]], done, holder):
                action = row[at[rank]]
                (queues[rank].append if len(action.kind) == 2 else done.add)(action)
                at[rank] += 1
                moved = True
        for rank in programs:
            while queues[rank] and queues[rank][0].kind[0] == "S":
                send, receive = queues[rank][0], _counterpart(queues[rank][0])
                peer = queues[holder[receive.part]] if 0 <= receive.part < parts else deque()
                if not peer or peer[0] != receive:
                    break
                done |= {queues[rank].popleft(), peer.popleft(), send}
                sent, moved = sent + 1, True
    stuck = {
        r: queues[r][0] if queues[r] else row[at[r]]
        for r, row in programs.items()
        if queues[r] or at[r] < len(row)
    }
    if stuck:
        raise Deadlock(_blocked(stuck, lambda a: _counterpart(a) if len(a.kind) == 2 else "its input"))
    return sent


def _can_issue(action: Action, done: set[Action], holder: Sequence[int]) -> bool:
    """Whether a rank may go past an action: computing waits for its inputs, a send for its tensor."""
    kind, part, m = action
    if kind[0] == "R":
        return True
    if kind[0] == "S":
        return any(Action(k, part, m) in done for k in ("F" if kind == "SF" else "BI"))
    for choice in needs(action, len(holder)):
        source = choice[0].part
        if holder[source] != holder[part]:
            choice = (Action("RF" if kind == "F" else "RB", part, m),)
        if not any(a in done for a in choice):
            return False
    return True


def _counterpart(action: Action) -> Action:
    """The receive of a send, the send of a receive."""
    kind, part, m = action
    step = 1 if kind in ("SF", "RB") else -1
    return Action(("R" if kind[0] == "S" else "S") + kind[1], part + step, m)


def _missing(action: Action, spans: Mapping[Action, object], parts: int) -> object:
    return next(choice[0] for choice in needs(action, parts) if not any(a in spans for a in choice))


def _blocked(stuck: Mapping[int, Action], missing: Callable[[Action], object]) -> str:
    return "deadlock: " + "; ".join(f"rank {r} at {a} waits for {missing(a)}" for r, a in stuck.items())
