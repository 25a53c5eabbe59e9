"""AdaLN modulation and gates looked up by segment, run by run: no table row is copied to its tokens.

Tokens of one segment stand together, so a run of them shares one row of shifts, scales or gates. The plain forms, which
gather a row a token, stand beside; a test compares them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: (start, stop, row) of consecutive tokens with one row.
Runs = tuple[tuple[int, int, int], ...]


def runs_of(segment: Tensor) -> Runs:
    """Runs of equal values in segment [n]."""
    rows, counts = torch.unique_consecutive(segment, return_counts=True)
    out, at = [], 0
    for row, count in zip(rows.tolist(), counts.tolist()):
        out.append((at, at + count, row))
        at += count
    return tuple(out)


def modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, segment: Tensor) -> Tensor:
    """x [n, D] · (1 + scale[segment]) + shift[segment], with tables [S, D]."""
    return x * (1 + scale[segment]) + shift[segment]


def gate_reference(x: Tensor, gate: Tensor, y: Tensor, segment: Tensor) -> Tensor:
    """x [n, D] + gate[segment] · y [n, D], with a table [S, D]."""
    return x + gate[segment] * y


def modulate(x: Tensor, shift: Tensor, scale: Tensor, runs: Runs) -> Tensor:
    """`modulate_reference` by runs."""
    out: Tensor = _Modulate.apply(x, shift, scale, runs)
    return out


def gated(x: Tensor, gate: Tensor, y: Tensor, runs: Runs) -> Tensor:
    """`gate_reference` by runs."""
    out: Tensor = _Gated.apply(x, gate, y, runs)
    return out


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor, runs: Runs) -> Tensor:  # type: ignore[override]
        factor, out = 1 + scale, torch.empty_like(x)
        for start, stop, row in runs:
            torch.addcmul(shift[row], x[start:stop], factor[row], out=out[start:stop])
        ctx.save_for_backward(x, factor)
        ctx.runs = runs
        return out

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, factor = ctx.saved_tensors
        dx, dshift, dscale = torch.empty_like(dy), torch.zeros_like(factor), torch.zeros_like(factor)
        for start, stop, row in ctx.runs:
            here = dy[start:stop]
            torch.mul(here, factor[row], out=dx[start:stop])
            dshift[row] += here.sum(0)
            dscale[row] += (here * x[start:stop]).sum(0)
        return dx, dshift, dscale, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, y: Tensor, runs: Runs) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(x)
        for start, stop, row in runs:
            torch.addcmul(x[start:stop], gate[row], y[start:stop], out=out[start:stop])
        ctx.save_for_backward(gate, y)
        ctx.runs = runs
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gate, y = ctx.saved_tensors
        dy, dgate = torch.empty_like(y), torch.zeros_like(gate)
        for start, stop, row in ctx.runs:
            here = dout[start:stop]
            torch.mul(here, gate[row], out=dy[start:stop])
            dgate[row] += (here * y[start:stop]).sum(0)
        return dout, dgate, dy, None
