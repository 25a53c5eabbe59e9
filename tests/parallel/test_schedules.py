"""Pipeline tables: complete, free of deadlock, as long as the closed forms say, and the same as torch's."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from ringweave.parallel.schedule_proof import (
    Costs,
    Deadlock,
    bubble_bound,
    check_complete,
    most_alive,
    prove_transfers,
    simulate,
)
from ringweave.parallel.schedules import (
    SCHEDULES,
    SPLIT,
    Action,
    Table,
    holders,
    parts_of_rank,
    split_layers,
    table,
    whole_backward,
)

RANKS, VIRTUAL, MICRO = range(1, 9), range(1, 5), range(1, 25)


def parts_a_rank(schedule: str, wanted: int) -> int:
    """The number nearest to `wanted` that the schedule takes."""
    return {"gpipe": 1, "1f1b": 1, "zbv": 2}.get(schedule, wanted)


def torch_table(actions: Table) -> dict[int, list[torch_schedules._Action]]:
    return {
        rank: [torch_schedules._Action.from_str(f"{a.part}{a.kind}{a.micro}") for a in row]
        for rank, row in enumerate(actions)
    }


def with_messages(actions: Table, holder: list[int]) -> dict[int, list[Action]]:
    """The programs that torch's own lowering makes of a table."""
    lowered = torch_schedules._add_send_recv(torch_table(actions), holder.__getitem__, len(holder))
    short = {"SEND_F": "SF", "RECV_F": "RF", "SEND_B": "SB", "RECV_B": "RB"}
    return {
        rank: [
            Action(
                short.get(a.computation_type.value, a.computation_type.value),
                a.stage_index,
                a.microbatch_index,
            )
            for a in row
        ]
        for rank, row in lowered.items()
    }


shapes = given(
    schedule=st.sampled_from(SCHEDULES),
    ranks=st.sampled_from(RANKS),
    virtual=st.sampled_from(VIRTUAL),
    micro=st.sampled_from(MICRO),
)


@settings(max_examples=300, deadline=None)
@shapes
def test_every_table_is_complete_and_ends(schedule: str, ranks: int, virtual: int, micro: int) -> None:
    virtual = parts_a_rank(schedule, virtual)
    actions, holder = table(schedule, ranks, virtual, micro), holders(schedule, ranks, virtual)
    for form in (actions, whole_backward(actions)):
        check_complete(form, holder, micro)
        ran = simulate(form, holder, Costs(transfer=0.25))
        for (kind, part, m), (start, _) in ran.spans.items():
            if kind in "BI":
                assert start >= ran.spans[Action("F", part, m)][1]
    assert any(a.kind == "W" for row in actions for a in row) == (schedule in SPLIT)


@settings(max_examples=150, deadline=None)
@shapes
def test_no_order_of_messages_can_block(schedule: str, ranks: int, virtual: int, micro: int) -> None:
    """Interleaved schedules send both ways between the same two ranks; one wrong order and all of them wait."""
    virtual = parts_a_rank(schedule, virtual)
    actions, holder = table(schedule, ranks, virtual, micro), holders(schedule, ranks, virtual)
    borders = sum(a != b for a, b in itertools.pairwise(holder))
    assert prove_transfers(with_messages(actions, holder), holder) == 2 * borders * micro


@settings(max_examples=200, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    ranks=st.sampled_from(RANKS),
    virtual=st.sampled_from(VIRTUAL),
    rounds=st.integers(2, 4),
)
def test_bubbles_equal_the_closed_forms(schedule: str, ranks: int, virtual: int, rounds: int) -> None:
    virtual, micro = parts_a_rank(schedule, virtual), rounds * ranks
    ran = simulate(table(schedule, ranks, virtual, micro), holders(schedule, ranks, virtual))
    measured = ran.stall if schedule == "zbv" else ran.bubble
    assert measured == pytest.approx(bubble_bound(schedule, ranks, virtual, micro), abs=1e-12)


def test_the_bubbles_by_hand() -> None:
    """p = 4, m = 8, two parts a rank where the schedule has them; unit: a forward of all layers of a rank."""
    found = {}
    for schedule in SCHEDULES:
        virtual = parts_a_rank(schedule, 2)
        ran = simulate(table(schedule, 4, virtual, 8), holders(schedule, 4, virtual))
        found[schedule] = (ran.makespan / virtual, ran.alive)
    assert found == {
        "gpipe": (33.0, [8, 8, 8, 8]),  # 24 of work + 3 · 3
        "1f1b": (33.0, [4, 3, 2, 1]),
        "interleaved": (28.5, [11, 9, 7, 5]),  # 24 + 3 · 3 / 2, of half the size
        "zero_bubble": (25.5, [8, 8, 8, 8]),
        "zbv": (25.5, [8, 8, 8, 8]),  # ranks begin and end at other times, but none waits in between
    }


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_activations_in_flight_do_not_grow_with_the_batch(ranks: int) -> None:
    for schedule, most in (
        ("1f1b", ranks),
        ("interleaved", 3 * ranks - 1),
        ("zero_bubble", 2 * ranks),
        ("zbv", 2 * ranks),
    ):
        virtual = parts_a_rank(schedule, 2)
        alive = [
            simulate(table(schedule, ranks, virtual, m * ranks), holders(schedule, ranks, virtual)).alive
            for m in (8, 16)
        ]
        assert max(alive[0]) == max(alive[1]) <= most, (schedule, alive)
    assert most_alive(table("gpipe", ranks, 1, 32)[0]) == 32


SINGLE = {"gpipe": torch_schedules.ScheduleGPipe, "1f1b": torch_schedules.Schedule1F1B}
MULTI = {
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
}


class RecordingStage:
    """Stands for a torch stage: notes what a schedule has it compute, and has no messages."""

    submod = None
    group_rank = 0

    def __init__(self, part: int, parts: int, ranks: int) -> None:
        self.stage_index, self.num_stages, self.group_size = part, parts, ranks
        self.is_first, self.is_last = part == 0, part == parts - 1
        self.ran: list[str] = []

    def forward_one_chunk(self, micro: int, *args: object, **kwargs: object) -> None:
        self.ran.append(f"{self.stage_index}F{micro}")

    def backward_one_chunk(self, micro: int, **kwargs: object) -> None:
        self.ran.append(f"{self.stage_index}B{micro}")

    def perform_reduce_grad(self, scale: int) -> None:
        pass

    def no_messages(self, micro: int) -> list[object]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_messages


def orders_of_torch(schedule: str, ranks: int, virtual: int, micro: int) -> dict[int, list[str]] | None:
    """What torch's own class runs on each rank; None where it refuses the shape.

    Classes with one part a rank have their order in code (the table they show is for drawing, and wrong on the
    last rank of 1F1B in torch 2.14), so they are run on stand-ins; the others execute the table they make.
    """
    holder = holders(schedule, ranks, virtual)
    try:
        if schedule in MULTI:
            own = parts_of_rank(schedule, ranks, virtual, 0)
            made = MULTI[schedule]([RecordingStage(part, len(holder), ranks) for part in own], micro)
            return {r: [str(a) for a in row if a is not None] for r, row in made.pipeline_order.items()}
        stages = [RecordingStage(part, ranks, ranks) for part in range(ranks)]
        for stage in stages:
            run = SINGLE[schedule](stage, micro)
            run._initialize_stage = lambda *args: None
            run._step_microbatches([()] * micro, [{}] * micro)
        return {rank: stage.ran for rank, stage in enumerate(stages)}
    except ValueError:
        return None


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_torchs_own_wherever_torch_has_one(schedule: str) -> None:
    compared, refused = 0, 0
    # With one part a rank torch's interleaved class warms up twice as long as 1F1B for nothing; ours is 1F1B then.
    virtuals = {"gpipe": (1,), "1f1b": (1,), "interleaved": (2, 3), "zero_bubble": (1, 2, 3), "zbv": (2,)}[
        schedule
    ]
    for ranks, virtual, micro in itertools.product((2, 3, 4, 8), virtuals, (2, 3, 4, 6, 8, 9, 10, 16, 21)):
        theirs = orders_of_torch(schedule, ranks, virtual, micro)
        if theirs is None:
            refused += 1
            continue
        ours = {
            r: [str(a) for a in row] for r, row in torch_table(table(schedule, ranks, virtual, micro)).items()
        }
        assert ours == theirs, (ranks, virtual, micro)
        compared += 1
    assert compared >= 20
    assert refused == 0 or schedule in ("1f1b", "interleaved", "zero_bubble")


def test_a_table_that_waits_for_ever_is_named() -> None:
    actions = table("1f1b", 2, 1, 3)
    actions[1] = [Action(kind, 1, m) for m in (2, 0, 1) for kind in "FB"]  # rank 0 begins 2 only after B of 0
    with pytest.raises(
        Deadlock, match=r"rank 0 at B of part 0, micro-batch 0 waits for B of part 1, micro-batch 0"
    ) as e:
        simulate(actions, [0, 1])
    assert "rank 1 at F of part 1, micro-batch 2 waits for F of part 0, micro-batch 2" in str(e.value)


def test_messages_that_would_meet_the_wrong_ones_are_named() -> None:
    """Two tensors of one shape in the wrong order arrive without an error, in each other's place."""
    programs = with_messages(table("gpipe", 2, 1, 2), [0, 1])
    first, second = (programs[1].index(Action("RF", 1, m)) for m in (0, 1))
    programs[1][first], programs[1][second] = programs[1][second], programs[1][first]
    with pytest.raises(Deadlock, match="SF of part 0, micro-batch 0 waits for RF of part 1, micro-batch 0"):
        prove_transfers(programs, [0, 1])


def test_ranks_that_all_send_before_they_receive_are_named() -> None:
    """Right for buffered messages, a deadlock for messages that wait for their receiver."""
    holder = [0, 1, 0]
    programs = {
        0: [Action("F", 0, 0), Action("SF", 0, 0), Action("F", 0, 1), Action("SF", 0, 1), Action("RF", 2, 0)],
        1: [Action("RF", 1, 0), Action("F", 1, 0), Action("SF", 1, 0), Action("RF", 1, 1)],
    }
    with pytest.raises(Deadlock, match="rank 1 at SF of part 1"):
        prove_transfers(programs, holder)
    programs[0][3], programs[0][4] = programs[0][4], programs[0][3]
    assert prove_transfers(programs, holder) == 3


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([Action("F", 0, 0)], "stand at"),
        ([Action("B", 0, 0), Action("F", 0, 0)], "stand at"),
        ([Action("F", 0, 0), Action("I", 0, 0)], "stand at"),
        ([Action("F", 0, 0), Action("B", 0, 0), Action("B", 0, 0)], "twice"),
        ([Action("F", 0, 0), Action("B", 0, 0), Action("F", 1, 0)], "not this rank's"),
    ],
)
def test_incomplete_tables_are_refused(row: list[Action], why: str) -> None:
    other = [Action("F", 1, 0), Action("B", 1, 0)]
    with pytest.raises(ValueError, match=why):
        check_complete([row, other], [0, 1], 1)


def test_messages_and_uneven_parts_cost_what_they_take() -> None:
    one = simulate(table("gpipe", 2, 1, 1), [0, 1], Costs(forward=1, input=2, weight=3, transfer=0.5))
    assert one.makespan == 1 + 0.5 + 1 + 5 + 0.5 + 5
    slow = simulate(table("gpipe", 2, 1, 1), [0, 1], Costs(parts=(1.0, 3.0)))
    assert slow.makespan == 3 * (1 + 3)
    assert slow.busy == [3, 9]
    local = simulate(table("zbv", 1, 2, 1), [0, 0], Costs(transfer=100.0))
    assert local.makespan == 6, "parts of one rank hand over without a message"


@pytest.mark.parametrize(
    ("layers", "parts", "split", "sizes"),
    [(8, 4, None, [2, 2, 2, 2]), (9, 4, None, [3, 2, 2, 2]), (7, 2, [2, 5], [2, 5]), (3, 3, None, [1, 1, 1])],
)
def test_layers_are_split_without_gap(
    layers: int, parts: int, split: list[int] | None, sizes: list[int]
) -> None:
    ranges = split_layers(layers, parts, split)
    assert [len(r) for r in ranges] == sizes
    assert [i for r in ranges for i in r] == list(range(layers))


@pytest.mark.parametrize(
    ("layers", "parts", "split"), [(3, 4, None), (4, 2, [1, 2]), (4, 2, [4, 0]), (4, 2, [1, 1, 2])]
)
def test_splits_that_leave_a_part_or_a_layer_out_are_refused(
    layers: int, parts: int, split: list[int] | None
) -> None:
    with pytest.raises(ValueError, match="every part needs a layer"):
        split_layers(layers, parts, split)


def test_parts_lie_in_loops_and_in_a_v() -> None:
    assert holders("interleaved", 3, 2) == [0, 1, 2, 0, 1, 2]
    assert holders("zbv", 3, 2) == [0, 1, 2, 2, 1, 0]
    assert parts_of_rank("zbv", 4, 2, 1) == [1, 6]
    assert parts_of_rank("zero_bubble", 4, 3, 1) == [1, 5, 9]


@pytest.mark.parametrize(
    ("schedule", "virtual", "why"),
    [
        ("gpipe", 2, "one part"),
        ("1f1b", 2, "one part"),
        ("zbv", 1, "two parts"),
        ("zb2p", 1, "unknown"),
        ("1f1b", 0, "1 or more"),
    ],
)
def test_shapes_without_a_table_are_refused(schedule: str, virtual: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        table(schedule, 2, virtual, 4)
