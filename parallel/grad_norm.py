"""The global gradient norm over any mix of meshes: every parameter counted once, wherever it lives."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ringweave.parallel import watch
from ringweave.parallel.mesh import Mesh


def local_squares(parameters: Iterable[nn.Parameter], mesh: Mesh) -> Tensor:
    """This rank's share of Σ g², fp64 scalar; summed over *all* ranks of the world it is the squared norm.

    A gradient held by several ranks (replicated over an axis it is not sharded on) is divided by their number.
    Raises ValueError for a gradient that is still a partial sum.
    """
    total = torch.zeros((), dtype=torch.float64)
    for p in parameters:
        if p.grad is not None:
            square = _local(p.grad).to(torch.float64).square().sum().cpu()
            total += square / _copies(p.grad, mesh)
    return total


def local_maximum(parameters: Iterable[nn.Parameter]) -> Tensor:
    """This rank's largest |g|, fp64 scalar (0 without gradients, NaN where one is): the maximum over the world is
    the norm for p = inf."""
    total = torch.zeros((), dtype=torch.float64)
    for p in parameters:
        if p.grad is not None and _local(p.grad).numel():
            total = torch.maximum(total, _local(p.grad).abs().amax().to(torch.float64).cpu())
    return total


def gradient_norm(parameters: Iterable[nn.Parameter], mesh: Mesh, *, p: float = 2.0) -> float:
    """The global norm of all gradients of all ranks, for p = 2 or inf; a collective of the whole world.

    Raises ValueError for other p.
    """
    if p == 2.0:
        return float(world_sum(local_squares(parameters, mesh)).sqrt())
    if p != float("inf"):
        raise ValueError(f"the gradient norm is known for p = 2 and inf, got {p}")
    largest = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    largest[dist.get_rank()] = local_maximum(parameters)  # a sum hands NaN on, which a maximum may drop
    return float(world_sum(largest).amax())


def _local(grad: Tensor) -> Tensor:
    return grad.to_local().detach() if isinstance(grad, DTensor) else grad.detach()


def _copies(grad: Tensor, mesh: Mesh) -> float:
    """How many ranks hold this very part of a gradient. Pipeline ranks hold different parameters."""
    parts = mesh.sizes["pp"]
    if isinstance(grad, DTensor):
        for placement, size in zip(grad.placements, grad.device_mesh.shape, strict=True):
            if placement.is_partial():
                raise ValueError(f"a gradient is not reduced yet: {grad.placements} on {grad.device_mesh}")
            parts *= 1 if placement.is_replicate() else size
    return mesh.device_mesh.size() / parts


def clip_(parameters: Iterable[nn.Parameter], *, norm: float, limit: float) -> None:
    """Scale gradients so that their global norm is at most `limit` (torch.nn.utils.clip_grad_norm_'s rule)."""
    scale = limit / (norm + 1e-6)
    if scale >= 1.0:
        return
    for p in parameters:
        if p.grad is not None:
            _local(p.grad).mul_(scale)


def world_sum(values: Tensor) -> Tensor:
    """All-reduce (sum) over the whole world; a world of one returns its input."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        with watch.at("sum over the world", "all ranks"):
            dist.all_reduce(values)
    return values
