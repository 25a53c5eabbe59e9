"""Tensor parallelism on local tensors: what is installed around the linears, the embedding and the head of a model.

Column-parallel matrices split their outputs, row-parallel ones their inputs (Megatron-LM, Shoeybi et al. 2019).
Around each pair stand two collectives. With replicated hidden states these are an all-reduce in the forward and
one in the backward. With *token shards* (sequence parallelism, Korthikanti et al. 2022) hidden states between
blocks, and so norms and residuals, hold 1/tp of the tokens: an all-gather before the columns, a reduce-scatter
after the rows, and the other way round in the backward.

Parameters stay DTensors, so that checkpoints, FSDP2 and the gradient norm see what they know; the arithmetic runs
on their local parts, because a DTensor's dispatch costs more than a small matmul.

A token shard is `[1, n, D]`, n = ceil(tokens / tp) on every rank; the slots behind the last token are zero and
stay zero through norms, residuals and feed-forward, so any number of tokens works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from ringweave.parallel import watch

_wire = torch.ops._c10d_functional

#: The collectives as ops of our own, so that activation checkpointing can keep what they give by name and no
#: recomputation goes over the network again. `group` is a process group's name.
LIBRARY = torch.library.Library("ringweave", "FRAGMENT")
LIBRARY.define("gather_rows(Tensor x, int ranks, str group) -> Tensor")
LIBRARY.define("reduce_scatter_rows(Tensor x, int ranks, str group, bool exchange) -> Tensor")
LIBRARY.define("sum_over_ranks(Tensor x, int ranks, str group, bool exchange) -> Tensor")


def _gather_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    out: Tensor
    with watch.at("tensor-parallel all-gather", "tp ranks"):
        out = _wire.wait_tensor(_wire.all_gather_into_tensor(x.contiguous(), ranks, group))
    return out


def _reduce_scatter_rows(x: Tensor, ranks: int, group: str, exchange: bool) -> Tensor:
    x, n = x.contiguous(), x.shape[0] // ranks
    out: Tensor
    with watch.at("tensor-parallel reduce-scatter", "tp ranks"):
        if not exchange:
            out = _wire.wait_tensor(_wire.reduce_scatter_tensor(x, "sum", ranks, group))
            return out
        pieces = _wire.wait_tensor(_wire.all_to_all_single(x, [n] * ranks, [n] * ranks, group))
    return _add_up(pieces.view(ranks, n, *x.shape[1:]))


def _sum_over_ranks(x: Tensor, ranks: int, group: str, exchange: bool) -> Tensor:
    if exchange and ranks == 2:
        return _add_up(_gather_rows(x.reshape(1, -1), ranks, group)).view(x.shape)
    out: Tensor
    with watch.at("tensor-parallel all-reduce", "tp ranks"):
        out = _wire.wait_tensor(_wire.all_reduce(x.contiguous(), "sum", group))
    return out


LIBRARY.impl("gather_rows", _gather_rows, "CompositeExplicitAutograd")
LIBRARY.impl("reduce_scatter_rows", _reduce_scatter_rows, "CompositeExplicitAutograd")
LIBRARY.impl("sum_over_ranks", _sum_over_ranks, "CompositeExplicitAutograd")


def _add_up(parts: Tensor) -> Tensor:
    """The sum over dim 0, in the order of ranks."""
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


class TensorGroup:
    """The ranks that share a model's matrices, and how collectives run among them.

    exchange: sum by exchanging pieces and adding them up. gloo's reduce-scatter is a whole all-reduce, and its
    all-reduce of two ranks takes two steps; NCCL's are better.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.name: str = group.group_name
        self.exchange = dist.get_backend(group) == "gloo"

    def gather(self, x: Tensor) -> Tensor:
        """[n, D] -> [size·n, D], rank after rank."""
        out: Tensor = torch.ops.ringweave.gather_rows(x, self.size, self.name)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[size·n, D] -> the sum over ranks of this rank's [n, D]."""
        out: Tensor = torch.ops.ringweave.reduce_scatter_rows(x, self.size, self.name, self.exchange)
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each, in a tensor of its own."""
        out: Tensor = torch.ops.ringweave.sum_over_ranks(x, self.size, self.name, self.exchange)
        return out

    def gather_columns(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, size·D], rank after rank, for what computes the same on every rank."""
        out: Tensor = _GatherColumns.apply(x, self)
        return out

    def rows(self, tokens: int) -> int:
        """Slots of a token shard of so many tokens."""
        return -(-tokens // self.size)


def _padded(x: Tensor, rows: int) -> Tensor:
    """[1, T, D] -> [rows, D], zeros behind."""
    flat = x.flatten(0, -2)
    missing = rows - flat.shape[0]
    return functional.pad(flat, (0, 0, 0, missing)) if missing else flat


class _Enter(torch.autograd.Function):
    """Hidden states that every rank has, into columns: their gradients add up."""

    @staticmethod
    def forward(ctx, x: Tensor, tp: TensorGroup) -> Tensor:  # type: ignore[override]
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return ctx.tp.all_reduce(dx), None


class _Leave(torch.autograd.Function):
    """Partial sums out of rows: every rank gets their sum."""

    @staticmethod
    def forward(ctx, x: Tensor, tp: TensorGroup) -> Tensor:  # type: ignore[override]
        return tp.all_reduce(x)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return dx, None


class _Gather(torch.autograd.Function):
    """Token shards [1, n, D] -> the first `tokens` tokens [1, tokens, D] on every rank.

    summed: whether the gradient that comes back is one rank's share (the shares are added) or already the whole,
    equal on all ranks (each takes its slots).
    """

    @staticmethod
    def forward(ctx, x: Tensor, tp: TensorGroup, tokens: int, summed: bool) -> Tensor:  # type: ignore[override]
        ctx.tp, ctx.summed, ctx.rows = tp, summed, x.shape[1]
        return tp.gather(x.flatten(0, 1))[:tokens].unsqueeze(0)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        tp, rows = ctx.tp, ctx.rows
        whole = _padded(dx, tp.size * rows)
        mine = tp.reduce_scatter(whole) if ctx.summed else whole[tp.rank * rows : (tp.rank + 1) * rows]
        return mine.unsqueeze(0), None, None, None


class _Scatter(torch.autograd.Function):
    """Partial sums [B, l, D] of all tokens -> this rank's token shard [1, n, D] of their sum."""

    @staticmethod
    def forward(ctx, x: Tensor, tp: TensorGroup) -> Tensor:  # type: ignore[override]
        ctx.tp, ctx.shape = tp, x.shape
        tokens = x.shape[:-1].numel()
        return tp.reduce_scatter(_padded(x, tp.size * tp.rows(tokens))).unsqueeze(0)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        whole = ctx.tp.gather(dx.flatten(0, 1))
        return whole[: ctx.shape[:-1].numel()].view(ctx.shape), None


class _GatherColumns(torch.autograd.Function):
    """Columns [n, D] of each rank -> all of them on every rank; the gradient that comes back is the whole on each."""

    @staticmethod
    def forward(ctx, x: Tensor, tp: TensorGroup) -> Tensor:  # type: ignore[override]
        ctx.tp, ctx.width = tp, x.shape[1]
        return tp.gather(x.t().contiguous()).t()

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return dx[:, ctx.tp.rank * ctx.width : (ctx.tp.rank + 1) * ctx.width], None


def local(weight: Tensor) -> Tensor:
    """This rank's part of a parameter (its gradient is placed as the parameter is)."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class ColumnLinear(nn.Module):
    """A linear whose rows of `weight` (outputs), and bias if it has one, are split: `[..., in]` -> this rank's
    `[..., out/tp]`."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: all tokens."""
        return functional.linear(x, local(self.weight), None if self.bias is None else local(self.bias))


class RowLinear(nn.Module):
    """A linear whose columns of `weight` (inputs) are split; `leave` adds up the ranks' shares, then comes the bias,
    which every rank has whole."""

    def __init__(
        self, weight: nn.Parameter, leave: Callable[[Tensor], Tensor], bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.weight, self.leave = weight, leave
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in/tp]: all tokens -> what `leave` makes of `[..., out]`."""
        out = self.leave(functional.linear(x, local(self.weight)))
        return out if self.bias is None else out + self.bias


class VocabEmbedding(nn.Module):
    """An embedding whose rows are split as DTensor splits them; foreign ids give zeros, and `leave` adds up."""

    def __init__(self, weight: nn.Parameter, tp: TensorGroup, leave: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.leave = weight, leave
        self.start = tp.rank * -(-weight.shape[0] // tp.size)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, l] -> what `leave` makes of `[B, l, D]`."""
        table = local(self.weight)
        row = ids - self.start
        foreign = (row < 0) | (row >= table.shape[0])
        if table.shape[0] == 0:  # more ranks than rows
            found = table.sum() + table.new_zeros(*ids.shape, table.shape[1])
        else:
            found = functional.embedding(row.masked_fill(foreign, 0), table)
        return self.leave(found.masked_fill(foreign.unsqueeze(-1), 0.0))


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """How hidden states between blocks lie on the ranks of `tp`: token shards, or copies.

    The functions of this class are what stands before columns and after rows.
    """

    tp: TensorGroup
    sharded: bool

    def enter(self, x: Tensor, tokens: int | None = None) -> Tensor:
        """Hidden states as columns need them: `tokens` tokens (None: padding of the shards included)."""
        if not self.sharded:
            return _Enter.apply(x, self.tp)
        return _Gather.apply(x, self.tp, x.shape[1] * self.tp.size if tokens is None else tokens, True)

    def leave(self, x: Tensor) -> Tensor:
        """Hidden states from the shares that rows give."""
        return _Scatter.apply(x, self.tp) if self.sharded else _Leave.apply(x, self.tp)

    def whole(self, x: Tensor, tokens: int) -> Tensor:
        """All tokens for something that returns the same, whole gradient on every rank, as the head does."""
        return _Gather.apply(x, self.tp, tokens, False) if self.sharded else x

    def shape(self, rows: int, tokens: int, width: int) -> tuple[int, int, int]:
        """Of the hidden states of `rows` packs with `tokens` tokens each."""
        return (1, self.tp.rows(rows * tokens), width) if self.sharded else (rows, tokens, width)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], tp: TensorGroup) -> None:
    """Add up over tp, in place, the gradients of parameters that saw a token shard each (norms): one collective."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    for dtype in dict.fromkeys(g.dtype for g in grads):
        some = [g for g in grads if g.dtype == dtype]
        total = tp.all_reduce(torch.cat([g.reshape(-1) for g in some]))
        for g, part in zip(some, total.split([g.numel() for g in some]), strict=True):
            g.copy_(part.view_as(g))
