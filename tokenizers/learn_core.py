"""Learned cores in torch: the networks of a codec in float32, and how their weights become its integers."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ringweave.tokenizers.codec import Tensors
from ringweave.tokenizers.conv_codec import BASIS, decoder_shape, encoder_shape
from ringweave.tokenizers.conv_net import ACTIVATION, LIMIT, Shape, round_weights


class Net(nn.Module):
    """`conv_net.IntegerNet` in float32: x [n, C, h, w]."""

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for name, inputs, outputs, kernel in shape.layers():
            sizes = (shape.rows, shape.columns) if kernel > 1 else (1, 1)
            scale = 0.0 if name == "out" else math.sqrt(1 / (3 * inputs * kernel))
            weight = torch.randn(outputs, inputs, *sizes, generator=generator) * scale
            self.weights[_key(name)] = nn.Parameter(weight)
            self.biases[_key(name)] = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        limit = LIMIT / ACTIVATION
        hidden = self._layer("in", x.clamp(-limit, limit))
        for n in range(self.shape.blocks):
            rows, columns = self.shape.rows // 2, self.shape.columns // 2
            padded = F.pad(F.relu(hidden), (columns, columns, rows, rows), mode="replicate")
            inner = F.relu(self._layer(f"block{n}.a", padded))
            hidden = (hidden + self._layer(f"block{n}.b", inner)).clamp(-limit, limit)
        return self._layer("out", F.relu(hidden))

    def _layer(self, name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weights[_key(name)], self.biases[_key(name)])

    def rounded(self, prefix: str) -> Tensors:
        """The weights in the fixed point of `IntegerNet`."""
        out: Tensors = {}
        for name, *_ in self.shape.layers():
            weight = self.weights[_key(name)].detach().double().numpy()
            matrix = weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])
            bias = self.biases[_key(name)].detach().double().numpy()
            out[f"{prefix}{name}.weight"], out[f"{prefix}{name}.bias"] = round_weights(matrix, bias)
        return out


def fixed_point(values: Tensor, steps: float) -> NDArray[np.int32]:
    """Weights in integers of 1/`steps`, saturating."""
    whole = np.rint(values.detach().double().numpy() * steps)
    return np.clip(whole, -(2**31) + 1, 2**31 - 1).astype(np.int32)


def _key(name: str) -> str:
    return name.replace(".", "_")


class LearnedCore(nn.Module):
    """A `ConvCore` that learns. Numbers inside are in `unit`s of the core; cells [n, h, w, C] in units of a cell."""

    def __init__(self, config: dict[str, int], tensors: Tensors, *, seed: int) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        unit = float(config["unit"])
        channels, dims = tensors["project"].shape
        self.project = nn.Parameter(torch.tensor(tensors["project"] / BASIS, dtype=torch.float32))
        self.back = nn.Parameter(torch.tensor(tensors["back"] / BASIS, dtype=torch.float32))
        self.books = nn.Parameter(
            torch.tensor(tensors["codebooks"] / (config["steps"] * unit), dtype=torch.float32)
        )  # [Q, K, D]
        self.register_buffer("mean", torch.tensor(tensors["mean"] / unit, dtype=torch.float32))
        self.encoder = Net(encoder_shape(config, dims), generator)
        self.decoder = Net(decoder_shape(config, dims, channels), generator)

    def encode(self, x: Tensor) -> Tensor:
        """Cells [n, h, w, C] in units of `unit` -> [n, h, w, D]."""
        z = (x - self.mean) @ self.project
        return z + self.encoder(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Greedy residual codes of z [m, D]: [m, Q]."""
        codes = []
        for book in self.books:
            codes.append(((book * book).sum(1) - 2 * z @ book.T).argmin(1))
            z = z - book[codes[-1]]
        return torch.stack(codes, 1)

    def decode(self, q: Tensor) -> Tensor:
        """Sums of code vectors [n, h, w, D] -> cells [n, h, w, C]."""
        return q @ self.back + self.mean + self.decoder(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def rounded(self) -> Tensors:
        """Tensors of the `ConvCore` these weights make."""
        unit = float(self.config["unit"])

        return {
            "project": fixed_point(self.project, BASIS),
            "back": fixed_point(self.back, BASIS),
            "mean": fixed_point(self.mean, unit),
            "codebooks": fixed_point(self.books, self.config["steps"] * unit),
            **self.encoder.rounded("encoder."),
            **self.decoder.rounded("decoder."),
        }
