"""Ulysses: the ranks of a group swap tokens for heads before attention and back after it (Jacobs et al. 2023).

Each rank then holds all tokens of the group and its share of the heads; attention over them is local, or a ring
over groups (USP, Fang & Zhao 2024). Token counts may differ from rank to rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from ringweave.parallel import watch


@dataclass(frozen=True, slots=True)
class Ulysses:
    """The process group that splits heads, and this rank's place in it; `group` None is a group of one."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def to_heads(self, parts: Sequence[Tensor], tokens: Sequence[int]) -> list[Tensor]:
        """Tensors [T, H, D] of this rank's tokens -> [ΣT, H/size, D], the group's tokens rank after rank.

        tokens: T of every rank of the group. Raises ValueError when a head count does not divide.
        """
        if self.group is None:
            return list(parts)
        for x in parts:
            if x.shape[1] % self.size:
                raise ValueError(f"{x.shape[1]} heads do not divide over a Ulysses group of {self.size}")
        mine = [x.unflatten(1, (self.size, -1)).transpose(0, 1).flatten(1) for x in parts]
        widths = [x.shape[1] // self.size * x.shape[2] for x in parts]
        send = [tokens[self.rank] * sum(widths)] * self.size
        receive = [t * sum(widths) for t in tokens]
        flat = _swap(torch.cat(mine, dim=1).reshape(-1), send, receive, self.group)
        pieces = [x.split([t * w for w in widths]) for t, x in zip(tokens, flat.split(receive), strict=True)]
        return [
            torch.cat(
                [
                    p[i].view(t, x.shape[1] // self.size, x.shape[2])
                    for t, p in zip(tokens, pieces, strict=True)
                ]
            )
            for i, x in enumerate(parts)
        ]

    def to_tokens(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """[ΣT, h, D] of this rank's heads -> [T, h·size, D] of its tokens: the way back."""
        if self.group is None:
            return x
        width = x.shape[1] * x.shape[2]
        flat = _swap(
            x.reshape(-1), [t * width for t in tokens], [tokens[self.rank] * width] * self.size, self.group
        )
        heads = flat.view(self.size, tokens[self.rank], x.shape[1], x.shape[2])
        return heads.transpose(0, 1).flatten(1, 2)


def _swap(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    result: Tensor = torch.ops.ringweave.all_to_all(x, send, receive, group.group_name)
    return result


@torch.library.custom_op("ringweave::all_to_all", mutates_args=())
def _all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: str) -> Tensor:
    out = x.new_empty(sum(receive))
    with watch.at("heads swapped for tokens", "its Ulysses group"):
        members = _resolve_process_group(group)
        dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=members)
    return out


@_all_to_all.register_fake
def _(x, send, receive, group):
    return x.new_empty(sum(receive))


def _setup(ctx, inputs, output) -> None:
    _, ctx.send, ctx.receive, ctx.group = inputs


def _backward(ctx, grad):
    back = torch.ops.ringweave.all_to_all(grad.contiguous(), ctx.receive, ctx.send, ctx.group)
    return back, None, None, None


_all_to_all.register_autograd(_backward, setup_context=_setup)
