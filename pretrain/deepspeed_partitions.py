"""Where DeepSpeed's ZeRO keeps this rank's part of masters, moments and gradients, parameter by parameter.

Every stage flattens: rank r of the data group owns one contiguous range of each flattened parameter. Stages 1
and 2 cut the concatenation of a whole group of parameters into equal parts, so a rank may own all, some or nothing
of one; stage 3 cuts every parameter. The classes here give both the same face: `span`, `value`, `grad`.
Read from deepspeed 0.19.8 (`utils/tensor_fragment.py`, `runtime/zero/stage_1_and_2.py`, `stage3.py`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class Partitions(Protocol):
    """This rank's part of every parameter; all tensors are 1-D, fp32 and share memory with the live ones."""

    #: The flat fp32 masters, which are what the inner optimizer steps on.
    flats: list[Tensor]

    def span(self, p: nn.Parameter) -> tuple[int, int]:
        """(first, count): the elements of the flattened parameter that this rank owns; count may be 0."""
        ...

    def value(self, p: nn.Parameter, key: str | None) -> Tensor:
        """The owned elements of the master (key None) or of a moment."""
        ...

    def grad(self, p: nn.Parameter) -> Tensor:
        """The owned elements of the reduced gradient, between a backward at the boundary and the update."""
        ...

    def refresh(self) -> None:
        """Make the model's parameters those of the masters."""
        ...

    def forget(self) -> None:
        """Drop accumulated gradients."""
        ...


class GroupPartitions:
    """Stages 1 and 2, and the bf16 form of stage 1 that DeepSpeed calls BF16_Optimizer."""

    def __init__(self, zero: Any) -> None:
        self.zero, self.inner = zero, zero.optimizer
        bf16 = hasattr(zero, "fp32_groups_flat_partition")
        self.flats = zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups

    def span(self, p: nn.Parameter) -> tuple[int, int]:
        """See Partitions."""
        held: Any = getattr(p, "_hp_mapping", None)
        if held is None:
            return 0, 0
        return held.lp_fragment_address.start, held.lp_fragment_address.numel

    def value(self, p: nn.Parameter, key: str | None) -> Tensor:
        """See Partitions."""
        held: Any = getattr(p, "_hp_mapping", None)
        if held is None:
            return self.flats[0].detach()[:0]
        flat = self.flats[held.param_group_index]
        whole = flat.detach() if key is None else self.inner.state[flat][key]
        return whole.narrow(0, held.hp_fragment_address.start, held.hp_fragment_address.numel)

    def grad(self, p: nn.Parameter) -> Tensor:
        """See Partitions."""
        held: Any = getattr(p, "_hp_mapping", None)
        if held is None:
            return self.flats[0].detach()[:0]
        first, count = self.span(p)
        found: Tensor = held.get_lp_grad_fragment(p._index_in_param_group).view(-1)  # type: ignore[attr-defined]
        # BF16_Optimizer keeps whole gradients on every rank and steps on the owned part of them
        return found if found.numel() == count else found.narrow(0, first, count)

    def refresh(self) -> None:
        """See Partitions."""
        self.zero.update_lp_params()

    def forget(self) -> None:
        """See Partitions."""
        zero = self.zero
        zero.zero_grad()
        if hasattr(zero, "micro_step_id"):
            zero.micro_step_id = -1  # INITIAL_MICRO_STEP_ID: the next backward starts a sum
            for kept in (zero.averaged_gradients, zero.all_grad_tensors):
                kept.update(dict.fromkeys(kept))


class ParameterPartitions:
    """Stage 3."""

    def __init__(self, zero: Any, rank: int) -> None:
        self.zero, self.inner, self.rank = zero, zero.optimizer, rank
        self.flats = zero.fp32_partitioned_groups_flat

    def span(self, p: nn.Parameter) -> tuple[int, int]:
        """See Partitions."""
        part, whole = p.ds_tensor.ds_numel, p.ds_numel  # type: ignore[attr-defined]
        first = min(part * self.rank, whole)
        return first, min(part, whole - first)  # the last parts are padded

    def _at(self, p: nn.Parameter) -> tuple[int, int, int]:
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(p)]
        return group, offset, self.span(p)[1]

    def value(self, p: nn.Parameter, key: str | None) -> Tensor:
        """See Partitions."""
        group, offset, count = self._at(p)
        flat = self.flats[group]
        whole = flat.detach() if key is None else self.inner.state[flat][key]
        return whole.narrow(0, offset, count)

    def grad(self, p: nn.Parameter) -> Tensor:
        """See Partitions."""
        group, offset, count = self._at(p)
        if self.zero.offload_optimizer:
            return self.flats[group].grad.narrow(0, offset, count)
        number = next(i for i, other in enumerate(self.zero.fp16_groups[group]) if other is p)
        found: Tensor = self.zero.averaged_gradients[group][number]
        return found.view(-1).narrow(0, 0, count)

    @torch.no_grad()
    def refresh(self) -> None:
        """See Partitions."""
        zero = self.zero
        zero._partition_all_parameters()
        for low, high in zip(zero.fp16_partitioned_groups_flat, self.flats, strict=True):
            low.data.copy_(high.data)
        if zero.persistent_parameters:  # small ones stay gathered between steps
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def forget(self) -> None:
        """See Partitions."""
        self.zero.zero_grad()  # also restarts the sum over micro-batches


def make_partitions(zero: Any, *, stage: int, rank: int) -> Partitions:
    """The partitions of a ZeRO optimizer; `rank` is this rank's number in the data group."""
    return ParameterPartitions(zero, rank) if stage == 3 else GroupPartitions(zero)
