"""The global gradient norm over any mix of meshes: every parameter counted once, wherever it lives."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ringweave.parallel.mesh import Mesh


def local_squares(parameters: Iterable[nn.Parameter], mesh: Mesh) -> Tensor:
    """This rank's share of Σ g², fp64 scalar; summed over *all* ranks of the world it is the squared norm.

    A gradient held by several ranks (replicated over an axis it is not sharded on) is divided by their number.
    """
    total = torch.zeros((), dtype=torch.float64)
    world = mesh.device_mesh.size()
    for p in parameters:
        if p.grad is None:
            continue
        sharded = mesh.sizes["pp"]  # stages hold different parameters
        local = p.grad
        if isinstance(local, DTensor):
            placed = zip(local.placements, local.device_mesh.shape, strict=True)
            for placement, size in placed:
                sharded *= 1 if placement.is_replicate() else size
            local = local.to_local()
        square = local.detach().to(torch.float64).square().sum().cpu()
        total += square * (sharded / world)
    return total


def clip_(parameters: Iterable[nn.Parameter], *, norm: float, limit: float) -> None:
    """Scale gradients so that their global norm is at most `limit` (torch.nn.utils.clip_grad_norm_'s rule)."""
    scale = limit / (norm + 1e-6)
    if scale >= 1.0:
        return
    for p in parameters:
        if p.grad is not None:
            grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            grad.mul_(scale)


def world_sum(values: Tensor) -> Tensor:
    """All-reduce (sum) over the whole world; a world of one returns its input."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
