"""A small residual convolution network in integers: what a learned codec runs, in numpy, without torch.

Weights and activations are integers in fixed point, products run as float64 matmuls of integers, and every sum
stays below 2**53, so it is exact: the result cannot depend on batch, chunk, threads or machine. Training works on
the same network in torch and float32 (`learn.py`) and rounds it at the end.

    h = conv1x1(x);  per block: h = h + conv1x1(relu(conv(relu(h))));  y = conv1x1(relu(h))
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Steps per unit of an activation and of a weight.
ACTIVATION, WEIGHT = 256, 4096
#: Activations are clipped to +-LIMIT steps (128 units); weights to +-WEIGHT_LIMIT steps (32 units).
LIMIT, WEIGHT_LIMIT = 1 << 15, 1 << 17
EXACT = 2.0**53
CELLS = 2048  # cells convolved at a time: bounds memory, changes nothing else

F64 = NDArray[np.float64]
Tensors = dict[str, NDArray[np.int32]]


@dataclass(frozen=True)
class Shape:
    """inputs, width, outputs: channels; blocks: residual blocks; rows, columns: the odd size of their kernels."""

    inputs: int
    width: int
    outputs: int
    blocks: int
    rows: int = 3
    columns: int = 3

    @property
    def radius(self) -> int:
        """Cells to the left and right that an output depends on."""
        return self.blocks * (self.columns // 2)

    def layers(self) -> list[tuple[str, int, int, int]]:
        """(name, inputs, outputs, kernel cells) of every layer, in order."""
        out = [("in", self.inputs, self.width, 1)]
        for n in range(self.blocks):
            out += [
                (f"block{n}.a", self.width, self.width, self.rows * self.columns),
                (f"block{n}.b", self.width, self.width, 1),
            ]
        return [*out, ("out", self.width, self.outputs, 1)]


def round_weights(weight: F64, bias: F64) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Real weights [kernel * inputs, outputs] and bias [outputs] in fixed point, saturating."""
    fixed = np.clip(np.rint(weight * WEIGHT), -WEIGHT_LIMIT, WEIGHT_LIMIT)
    offset = np.clip(np.rint(bias * WEIGHT * ACTIVATION), -(2**31) + 1, 2**31 - 1)
    return fixed.astype(np.int32), offset.astype(np.int32)


class IntegerNet:
    """The network of `shape` with weights `{prefix}{layer}.weight` [kernel*inputs, outputs] and `.bias` [outputs]."""

    def __init__(self, shape: Shape, tensors: Tensors, *, prefix: str) -> None:
        self.shape = shape
        self._layers: dict[str, tuple[F64, F64]] = {}
        for name, inputs, outputs, kernel in shape.layers():
            weight, bias = tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.bias"]
            if weight.shape != (kernel * inputs, outputs) or bias.shape != (outputs,):
                raise ValueError(f"{prefix}{name} is {weight.shape}, expected {(kernel * inputs, outputs)}")
            largest = float(np.abs(weight.astype(np.float64)).sum(0).max()) * LIMIT
            if largest + float(np.abs(bias.astype(np.float64)).max()) >= EXACT:
                raise ValueError(f"{prefix}{name} has weights too large to be exact")
            self._layers[name] = (weight.astype(np.float64), bias.astype(np.float64))

    def __call__(self, x: F64) -> F64:
        """Integers [n, h, w, inputs] in steps of 1/ACTIVATION -> integers [n, h, w, outputs] in the same steps."""
        x = np.clip(x, -LIMIT, LIMIT)
        hidden = self._one("in", x)
        for n in range(self.shape.blocks):
            inner = self._spread(f"block{n}.a", np.maximum(hidden, 0))
            hidden = np.clip(hidden + self._one(f"block{n}.b", np.maximum(inner, 0)), -LIMIT, LIMIT)
        return self._one("out", np.maximum(hidden, 0))

    def _one(self, name: str, x: F64) -> F64:
        """A 1x1 convolution, rounded half up to steps and clipped."""
        weight, bias = self._layers[name]
        return _settle(x @ weight + bias)

    def _spread(self, name: str, x: F64) -> F64:
        """A convolution over the cells around each; the edge is repeated beyond the border."""
        weight, bias = self._layers[name]
        rows, columns = self.shape.rows, self.shape.columns
        n, height, width, _ = x.shape
        edge = [(0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)]
        padded = np.pad(x, edge, mode="edge")
        out = np.empty((n, height, width, weight.shape[1]))
        lines = max(1, CELLS // width)
        for k in range(n):
            for top in range(0, height, lines):
                stop = min(height, top + lines)
                parts = [
                    padded[k, top + r : stop + r, c : c + width] for r in range(rows) for c in range(columns)
                ]
                out[k, top:stop] = _settle(np.concatenate(parts, axis=-1) @ weight + bias)
        return out


def _settle(total: F64) -> F64:
    """A sum in steps of 1/(WEIGHT * ACTIVATION) to steps of 1/ACTIVATION, half up, clipped. Overwrites it."""
    total *= 1 / WEIGHT  # a power of two: exact
    total += 0.5
    return np.clip(np.floor(total, out=total), -LIMIT, LIMIT, out=total)
