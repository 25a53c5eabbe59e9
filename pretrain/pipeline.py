"""The pipeline at work: this rank's parts of the model, run by the tables of `parallel/schedules.py`.

torch's pipelining runtime executes the tables: it adds the messages, the gathering of sharded parameters and one
reduction of gradients a part and step. What it is about to run is proven on paper first (`parallel/schedule_proof.py`),
so a table that cannot end is an error, not a hang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

from ringweave.parallel.mesh import Mesh
from ringweave.parallel.schedule_proof import check_complete, most_alive, prove_transfers
from ringweave.parallel.schedules import Action, Table, holders, parts_of_rank, table, whole_backward
from ringweave.pretrain.batch import Batch
from ringweave.pretrain.models.dit import DiT
from ringweave.pretrain.models.lwm import LWM

Loss = Callable[[Tensor, Tensor], Tensor]

_KINDS = {
    "F": _ComputationType.FORWARD,
    "B": _ComputationType.FULL_BACKWARD,
    "I": _ComputationType.BACKWARD_INPUT,
    "W": _ComputationType.BACKWARD_WEIGHT,
    "SF": _ComputationType.SEND_F,
    "RF": _ComputationType.RECV_F,
    "SB": _ComputationType.SEND_B,
    "RB": _ComputationType.RECV_B,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}

#: Micro-batches whose head gradients, each of the size of the head, may wait for their backward.
HEADS_KEPT = 2


class TableSchedule(_PipelineScheduleRuntime):
    """torch's runtime with a table of ours in place of the one its schedule classes make.

    Theirs are the same where they exist (a test compares them), but refuse some numbers of micro-batches.
    """

    def __init__(
        self,
        stages: list[PipelineStage],
        micro_batches: int,
        actions: Table,
        holder: Sequence[int],
        *,
        loss: Loss,
    ) -> None:
        super().__init__(stages, micro_batches, loss_fn=loss, scale_grads=False)  # type: ignore[arg-type]
        self.pipeline_order = {
            rank: [_Action(a.part, _KINDS[a.kind], a.micro) for a in row] for rank, row in enumerate(actions)
        }
        check_complete(actions, holder, micro_batches)
        self._prepare_schedule_with_comms(self.pipeline_order)
        prove_transfers(self.programs(), holder)

    def programs(self) -> dict[int, list[Action]]:
        """What torch runs on every rank, computing and moving, in our words."""
        return {
            rank: [
                Action(_NAMES[a.computation_type], a.stage_index, a.microbatch_index)
                for a in row
                if a.computation_type in _NAMES and a.microbatch_index is not None
            ]
            for rank, row in self.pipeline_order_with_comms.items()
        }


class PipelineRunner:
    """Runs a step's micro-batches through the parts of all pipeline ranks.

    parts: this rank's, by depth, as `build_parts` gives them for the same `schedule`; micro_batch: packs in one
    pass; dtype: of the hidden states that travel; loss: (nll, terms) of a micro-batch -> the scalar whose gradient
    is wanted; split_backward: False runs every backward whole, whatever the schedule.
    """

    def __init__(
        self,
        parts: Sequence[LWM | DiT],
        mesh: Mesh,
        *,
        schedule: str,
        micro_batch: int,
        dtype: torch.dtype,
        loss: Loss,
        split_backward: bool = True,
    ) -> None:
        self.parts, self.mesh, self.loss = list(parts), mesh, loss
        self.schedule, self.micro_batch, self.dtype = schedule, micro_batch, dtype
        self.split_backward = split_backward
        self._ready: dict[tuple[int, int, int], tuple[TableSchedule, bool]] = {}

    def run(self, batch: Batch, terms: Tensor) -> None:
        """Accumulate the gradients of the batch's loss in the parts; terms [n, l, 3]: see `Batch.terms`.

        Every part gets the metadata of its packs (`Batch.inputs`). Raises ValueError when the packs do not fill
        whole micro-batches.
        """
        packs, slots = batch.ids.shape
        schedule, expects = self._prepared(packs, slots, self.parts[0].extra_rows(slots, batch.segments))
        inputs = batch.inputs()
        if expects:
            inputs["expected"] = terms[..., 0]
        schedule.step(
            *([batch.ids] if self.parts[0].is_first else []),
            target=terms if self.parts[-1].is_last else None,
            return_outputs=False,
            **inputs,
        )

    def _prepared(self, packs: int, slots: int, extra: int) -> tuple[TableSchedule, bool]:
        """The schedule for batches of this shape, and whether the head may make its gradients in the forward."""
        key = packs, slots, extra
        if key not in self._ready:
            if packs % self.micro_batch:
                raise ValueError(f"{packs} packs are no multiple of micro_batch = {self.micro_batch}")
            self._ready[key] = self._prepare(packs // self.micro_batch, slots, extra)
        return self._ready[key]

    def _prepare(self, micro_batches: int, slots: int, extra: int) -> tuple[TableSchedule, bool]:
        ranks, virtual = self.mesh.sizes["pp"], len(self.parts)
        holder = holders(self.schedule, ranks, virtual)
        actions = table(self.schedule, ranks, virtual, micro_batches)
        if not self.split_backward:
            actions = whole_backward(actions)
        numbers = parts_of_rank(self.schedule, ranks, virtual, self.mesh.rank_on["pp"])
        stages = [
            self._stage(part, n, len(holder), slots, extra)
            for part, n in zip(self.parts, numbers, strict=True)
        ]
        schedule = TableSchedule(stages, micro_batches, actions, holder, loss=self.loss)
        heads = most_alive(actions[holder[-1]], len(holder) - 1)
        return schedule, heads <= HEADS_KEPT

    def _stage(self, part: LWM | DiT, number: int, parts: int, slots: int, extra: int) -> PipelineStage:
        """torch's stage of a part. Shapes are given, none is probed: slots are static however full packs are.

        extra: rows a pack that travel beside the hidden states of its slots.
        """
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        shape = (self.micro_batch, slots)

        def like(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

        states = part.hidden_shape(self.micro_batch, slots + extra, part.shape.width)
        ids, hidden = like(shape, torch.int64), like(states, self.dtype)
        return PipelineStage(
            part,
            number,
            parts,
            next(part.parameters()).device,
            input_args=(ids if number == 0 else hidden,),
            output_args=(like(shape, wide) if number == parts - 1 else hidden,),
            group=self.mesh.group("pp"),
        )
