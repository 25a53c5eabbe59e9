"""Rotary position embedding (Su et al. 2021) in the half-split layout that Hugging Face's Llama uses."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(
    order: Tensor, *, dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [T, dim], for integer positions `order` [T]; angles are formed in fp32 or wider.

    Frequencies theta^(-2j/dim), j < dim/2, repeated over both halves.
    """
    exponent = torch.arange(0, dim, 2, dtype=dtype, device=order.device) / dim
    inverse = 1.0 / (torch.tensor(theta, dtype=dtype, device=order.device) ** exponent)
    angles = order.to(dtype)[:, None] * inverse[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, dim] by (cos, sin) [T, dim]; computed in the table's dtype, returned in x's."""
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos[:, None, :] + turned * sin[:, None, :]).to(x.dtype)


def axes_table(
    positions: Tensor, *, dims: tuple[int, ...], theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [T, sum(dims) / 2], for signed positions [T, axes]: axis a turns its own dims[a] channels.

    Frequencies theta^(-2j/dims[a]) on each axis, as in the multi-axis rope of Qwen-Image. Computed for whatever
    positions there are, so no table bounds them; angles are formed in fp32 or wider.
    """
    angles = []
    for axis, dim in enumerate(dims):
        exponent = torch.arange(0, dim, 2, dtype=dtype, device=positions.device) / dim
        inverse = 1.0 / (torch.tensor(theta, dtype=dtype, device=positions.device) ** exponent)
        angles.append(positions[:, axis].to(dtype)[:, None] * inverse[None, :])
    whole = torch.cat(angles, dim=-1)
    return whole.cos(), whole.sin()


def apply_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels (2j, 2j+1) of x [T, H, D] by (cos, sin) [T, D/2]; in the table's dtype, returned in
    x's."""
    pairs = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.complex(cos, sin)[:, None, :])
    return turned.flatten(-2).to(x.dtype)
