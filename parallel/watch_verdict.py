"""Who keeps a job waiting: a pure judgement over what each rank last said of itself.

`Mark` is one rank's word about where it is, `judge` picks the culprit from all marks, `Alarm` is the verdict
that every rank then repeats. No threads, no files, no torch here; `watchdog.py` gathers and acts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

#: The parts of a step in the order a rank goes through them, and their names in messages.
PHASES = {
    "start": "start of a stage",
    "data": "data",
    "compute": "forward and backward",
    "reduce": "loss sums and gradient norm",
    "update": "optimizer update",
    "record": "metrics and ledger",
    "checkpoint": "checkpoint",
    "ended": "after its last step",
}
_ORDER = {name: i for i, name in enumerate(PHASES)}

#: How a rank looks from outside: "gone" (no process, or never heard of), "stopped" (SIGSTOP, a debugger), "silent"
#: (its marks stopped coming: stopped or cut off on another machine, or a thread holds the interpreter), "alive".
Health = Literal["gone", "stopped", "silent", "alive"]

#: What is wrong with the culprit: its health, or "failed" (it raised an error), "stuck" (busy outside any collective
#: while others wait), "behind" (waits in an earlier collective than the others), "unknown" (all wait alike).
Kind = Literal["gone", "stopped", "silent", "failed", "stuck", "behind", "unknown"]

#: Ranks listed in an alarm; a job of thousands needs no more to be understood.
MAX_LISTED = 64


@dataclass(frozen=True, slots=True)
class Mark:
    """Where one rank is.

    step: the step being made, from 1; phase: a key of PHASES; what, peer: the marked wait it is in and for whom;
    inside: the code its main thread runs; waiting: whether that is a collective or transfer; last: the last marked
    wait it entered; age: seconds without any change; beat: counts publications; place, pid, started: its process;
    token: the start of the job it belongs to.
    """

    rank: int
    step: int = 0
    phase: str = "start"
    what: str = ""
    peer: str = ""
    waiting: bool = False
    inside: str = ""
    last: str = ""
    age: float = 0.0
    beat: int = 0
    host: str = ""
    place: str = ""
    pid: int = 0
    started: str = ""
    token: str = ""

    @property
    def order(self) -> tuple[int, int]:
        """Sorts ranks by progress, the one furthest behind first."""
        return self.step, _ORDER.get(self.phase, 0)

    def doing(self) -> str:
        """`step 7, forward and backward: ring hop 2 with rank 3, in wait (ring.py:41)`."""
        text = f"step {self.step}, {PHASES.get(self.phase, self.phase)}"
        if self.what:
            text += f": {self.what}" + (f" with {self.peer}" if self.peer else "")
        if self.inside:
            text += f", in {self.inside}"
        if self.last and not self.waiting:
            text += f" (last collective: {self.last})"
        return text

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Mark:
        """Raises ValueError for anything that is no mark."""
        return _read(cls, text)


@dataclass(frozen=True, slots=True)
class Alarm:
    """Why the job ends, in the words of the rank that noticed first.

    rank: the culprit, -1 when none stands out; doing: where it was; error: what it raised (kind "failed"); found_by:
    the rank that noticed; in_vain: what that rank was doing; waited: seconds; exit_code: of every rank that ends
    because of this; ranks: how all ranks stood, as {rank, health, doing}.
    """

    kind: Kind
    rank: int
    step: int
    phase: str
    doing: str
    exit_code: int
    found_by: int
    in_vain: str = ""
    waited: float = 0.0
    error: str = ""
    host: str = ""
    place: str = ""
    pid: int = 0
    started: str = ""
    ranks: list[dict[str, Any]] = field(default_factory=list)

    def headline(self) -> str:
        """`rank 1 is stopped in step 7, forward and backward`."""
        at = f"in step {self.step}, {PHASES.get(self.phase, self.phase)}"
        says = {
            "gone": f"rank {self.rank} died {at}",
            "stopped": f"rank {self.rank} is stopped (SIGSTOP or a debugger) {at}",
            "silent": f"rank {self.rank} does not answer {at}",
            "failed": f"rank {self.rank} failed {at}: {self.error}",
            "stuck": f"rank {self.rank} hangs {at}",
            "behind": f"rank {self.rank} is behind all others {at}",
            "unknown": f"rank {self.found_by} waited in vain {at}",
        }
        return says[self.kind]

    def where(self) -> str:
        """The culprit's place in the code and in the cluster."""
        if self.rank < 0:
            return f"rank {self.found_by}: {self.in_vain}"
        process = f" (pid {self.pid} on {self.host})" if self.pid else ""
        # A rank that cannot speak any more may have got a little further than it last said.
        when = "last seen in " if self.kind in ("gone", "stopped", "silent") else ""
        return f"rank {self.rank}{process}: {when}{self.doing}"

    def why(self) -> str:
        """Who waited for what, and how the others stand."""
        if self.kind == "failed":
            return "its error ends the run on every rank"
        how = f"waited {self.waited:.0f} s" if self.waited >= 1 else "lost its connection"
        text = f"rank {self.found_by} {how} in {self.in_vain}"
        if self.kind == "unknown":
            stand = "; ".join(f"rank {r['rank']} ({r['health']}): {r['doing']}" for r in self.ranks[:8])
            text += f"; every rank is alive and waits: {stand}" if stand else ""
        return text

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Alarm:
        """Raises ValueError for anything that is no alarm."""
        return _read(cls, text)


def _read(cls: Any, text: str) -> Any:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    known = {f.name for f in fields(cls)}
    try:
        return cls(**{k: v for k, v in value.items() if k in known})
    except TypeError as e:
        raise ValueError(str(e)) from e


def judge(
    me: Mark, marks: Mapping[int, Mark], health: Mapping[int, Health], *, waited: float, exit_code: int
) -> Alarm:
    """The verdict of rank `me.rank`, which waited `waited` seconds in vain.

    marks, health: by rank, of every other rank; a rank without a mark is one that never said anything. Suspects in
    order: processes that are gone, stopped, silent; then ranks busy outside any collective; then, when all wait,
    the one that waits in an earlier place than all others. Among equals the one furthest behind.
    """
    everyone = {**marks, me.rank: me}
    kind, culprit = _suspect(me, everyone, health)
    mark = everyone.get(culprit) or (me if culprit < 0 else Mark(culprit))
    listed = [
        {"rank": r, "health": health.get(r, "alive"), "doing": everyone[r].doing() if r in everyone else ""}
        for r in sorted({*everyone, *health})[:MAX_LISTED]
    ]
    return Alarm(
        kind=kind, rank=culprit, step=mark.step, phase=mark.phase, doing=mark.doing(), exit_code=exit_code,
        found_by=me.rank, in_vain=me.doing(), waited=round(waited, 1), host=mark.host, place=mark.place,
        pid=mark.pid, started=mark.started, ranks=listed,
    )  # fmt: skip


def _suspect(me: Mark, everyone: Mapping[int, Mark], health: Mapping[int, Health]) -> tuple[Kind, int]:
    def furthest_behind(ranks: list[int]) -> int:
        return min(ranks, key=lambda r: (everyone[r].order if r in everyone else (-1, 0), r))

    ended = {r for r, m in everyone.items() if m.phase == "ended"}
    for kind in ("gone", "stopped", "silent"):
        found = [r for r, h in health.items() if h == kind and r not in ended]
        if found:
            return kind, furthest_behind(found)  # type: ignore[return-value]
    running = [r for r in everyone if r not in ended]
    busy = [r for r in running if not everyone[r].waiting]
    if busy:
        return "stuck", furthest_behind(busy)
    last = furthest_behind(running)
    if all(everyone[r].order > everyone[last].order for r in running if r != last) and len(running) > 1:
        return "behind", last
    return "unknown", -1
