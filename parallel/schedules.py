"""Pipeline schedules as tables: what each rank computes, in which order, for which part and micro-batch. No torch.

A model is cut into parts 0, 1, … in order of depth; a rank holds one part, or several that it visits in turn
(`holders`). `table` gives each rank's list of actions; `pretrain/pipeline.py` runs exactly these lists, and
`schedule_proof.py` executes them on paper: complete, free of deadlock, how long they take, what they keep alive.

Sources: GPipe (Huang et al. 2019); 1F1B (PipeDream-flush, Narayanan et al. 2021); interleaved 1F1B (Megatron-LM,
Narayanan et al. 2021), with micro-batches dealt to rounds as in Llama 3 (2024) when their number is no multiple
of the ranks; zero bubble ZB-H1/ZB1P and ZB-V (Qi et al. 2023). Where `torch.distributed.pipelining` takes the same
shape its tables are the same, action by action (a test compares them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: Schedules by the name they have in a config.
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv")

#: Schedules whose backward is split: gradients of inputs first, of weights when there is time.
SPLIT = ("zero_bubble", "zbv")


class Action(NamedTuple):
    """One thing a rank does: `kind` for part `part` of micro-batch `micro`.

    Computing: "F" forward; "B" backward; "I" its half that gives the gradient of the part's input; "W" the other
    half, the gradients of its weights. Moving: "SF"/"RF" send and receive the output of a forward, "SB"/"RB" the
    gradient of an input; the part is the one that sends or receives.
    """

    kind: str
    part: int
    micro: int

    def __str__(self) -> str:
        return f"{self.kind} of part {self.part}, micro-batch {self.micro}"


Table = list[list[Action]]


def check_shape(schedule: str, ranks: int, virtual: int, micro_batches: int) -> None:
    """Raise ValueError, naming the rule, for what no table exists for."""
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
    if ranks < 1 or virtual < 1 or micro_batches < 1:
        raise ValueError(
            f"ranks, virtual, micro-batches = {ranks}, {virtual}, {micro_batches}: all must be 1 or more"
        )
    if schedule in ("gpipe", "1f1b") and virtual != 1:
        raise ValueError(f"{schedule} holds one part a rank, got virtual = {virtual}")
    if schedule == "zbv" and virtual != 2:
        raise ValueError(f"zbv holds two parts a rank, got virtual = {virtual}")


def holders(schedule: str, ranks: int, virtual: int = 1) -> list[int]:
    """The rank of every part: round and round (0 1 0 1), or down and up again for "zbv" (0 1 1 0)."""
    if schedule == "zbv":
        return [*range(ranks), *reversed(range(ranks))]
    return [part % ranks for part in range(ranks * virtual)]


def parts_of_rank(schedule: str, ranks: int, virtual: int, rank: int) -> list[int]:
    """The parts that `rank` holds, by depth."""
    return [part for part, holder in enumerate(holders(schedule, ranks, virtual)) if holder == rank]


def split_layers(layers: int, parts: int, split: Sequence[int] | None = None) -> list[range]:
    """Layers of every part: `split` layers each, or evenly with the first parts taking the rest (the last one has
    the head to compute besides).

    Raises ValueError when a part would be left without a layer, or `split` does not add up.
    """
    if split is None:
        split = [layers // parts + (part < layers % parts) for part in range(parts)]
    if len(split) != parts or sum(split) != layers or min(split) < 1:
        raise ValueError(
            f"{layers} layers over {parts} parts as {list(split)}: every part needs a layer, and they must add up"
        )
    ends = [sum(split[: part + 1]) for part in range(parts)]
    return [range(end - size, end) for end, size in zip(ends, split, strict=True)]


def table(schedule: str, ranks: int, virtual: int, micro_batches: int) -> Table:
    """What each rank computes, in order: [ranks][actions]. Raises ValueError for shapes it cannot serve."""
    check_shape(schedule, ranks, virtual, micro_batches)
    if schedule == "gpipe":
        return [_gpipe(rank, micro_batches) for rank in range(ranks)]
    if schedule == "zbv":
        return [_zbv(rank, ranks, micro_batches) for rank in range(ranks)]
    # With one part a rank, interleaving is 1F1B.
    return [_interleaved(rank, ranks, virtual, micro_batches, schedule in SPLIT) for rank in range(ranks)]


def whole_backward(actions: Table) -> Table:
    """The same table without split backwards: every "I" becomes a "B" and the "W" go.

    For layers that compute activations again: with two halves they would do so once for the inputs and once more
    for each group of weights, and torch's selective checkpointing refuses the second time.
    """
    return [[a._replace(kind="B") if a.kind == "I" else a for a in row if a.kind != "W"] for row in actions]


def _gpipe(rank: int, micro_batches: int) -> list[Action]:
    """All forwards, then all backwards."""
    return [Action(kind, rank, m) for kind in ("F", "B") for m in range(micro_batches)]


def _rounds(ranks: int, micro_batches: int) -> list[range]:
    """Micro-batches that go through all parts of a rank together: about `ranks` a round, the larger rounds first."""
    return split_layers(micro_batches, max(1, micro_batches // ranks))


def _interleaved(rank: int, ranks: int, virtual: int, micro_batches: int, split: bool) -> list[Action]:
    """Warm up with forwards, then one forward and one backward in turn, then the backwards that are left.

    Warm-up: Megatron-LM's 2 actions for each rank that is nearer to the end; 1 where a split backward makes the
    way back as short as the way there. A split backward's W follows `rank` backwards later.
    """
    rounds = _rounds(ranks, micro_batches)
    own = range(rank, ranks * virtual, ranks)
    forward = [(part, m) for group in rounds for part in own for m in group]
    backward = [(part, m) for group in rounds for part in reversed(own) for m in group]
    # With one part a rank, one more forward than there are later ranks fills the way; the pair below has it.
    reach = 1 if split or virtual == 1 else 2
    warm_up = min((virtual - 1) * len(rounds[0]) + reach * (ranks - 1 - rank), len(forward))
    actions = [Action("F", *f) for f in forward[:warm_up]]
    for step, b in enumerate(backward):
        if warm_up + step < len(forward):
            actions.append(Action("F", *forward[warm_up + step]))
        actions.append(Action("I" if split else "B", *b))
        if split and step >= rank:
            actions.append(Action("W", *backward[step - rank]))
    if split:
        actions += [Action("W", *b) for b in backward[max(0, len(backward) - rank) :]]
    return actions


def _zbv(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """ZB-V: down through part `rank` and up through its mirror; made for full pipelines and then thinned out."""
    down, up = rank, 2 * ranks - 1 - rank
    enough = max(2 * ranks - 1, micro_batches)
    actions: list[Action] = []
    done = dict.fromkeys([(kind, part) for kind in "FIW" for part in (down, up)], 0)

    def add(part: int, kinds: str) -> None:
        for kind in kinds:
            actions.append(Action(kind, part, done[kind, part]))
            done[kind, part] += 1

    for _ in range(2 * (ranks - rank) - 1):
        add(down, "F")
    for _ in range(rank):
        add(up, "F")
        add(down, "F")
    for _ in range(ranks - rank):
        add(up, "FIW")
    while done["F", up] < done["F", down] or done["F", down] < enough:
        if done["F", down] < enough:
            add(down, "F")
        add(down, "IW")
        add(up, "FIW")
    for _ in range(rank):
        add(down, "I")
        add(up, "I")
    for _ in range(ranks - rank):
        add(down, "IW")
    while done["W", up] < done["I", up]:
        add(up, "W")
    while done["W", down] < done["I", down]:
        add(down, "W")
    return [a for a in actions if a.micro < micro_batches]
