"""The torch engine: forward and backward of a step's packs, clipping and the update, on any mesh.

A trainer sees four calls: `forward_backward`, `grad_norm`, `clip`, `step`; and `tensors` for checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ringweave.parallel.grad_norm import clip_, local_squares, world_sum
from ringweave.parallel.mesh import Mesh
from ringweave.parallel.tensor import local
from ringweave.pretrain.batch import Batch
from ringweave.pretrain.models.dit import DiT
from ringweave.pretrain.models.lwm import LWM
from ringweave.pretrain.objectives import coefficients, term_sums
from ringweave.pretrain.parallelize import DTYPES
from ringweave.pretrain.pipeline import PipelineRunner

#: The backbones.
Model = LWM | DiT


class TorchEngine:
    """One rank's model and optimizer. `mesh` None runs in a single process without any wrapper.

    parts: the model, or this rank's parts of it as `build_parts` gives them for the same `schedule`; micro_batch:
    packs in one forward pass; modality_weights, normalize: see `objectives.coefficients`; ema: how much of the moving
    average of the parameters a step keeps (0: there is none), sharded as they are; split_backward: whether a schedule
    that wants it may run a backward in two halves.
    """

    def __init__(
        self,
        parts: Model | Sequence[Model],
        mesh: Mesh | None,
        *,
        micro_batch: int,
        precision: str = "fp32",
        modality_weights: Mapping[str, float] | None = None,
        normalize: str = "modality",
        optimizer: torch.optim.Optimizer | None = None,
        ema: float = 0.0,
        schedule: str = "1f1b",
        split_backward: bool = True,
    ) -> None:
        self.parts: list[Model] = [parts] if isinstance(parts, nn.Module) else list(parts)
        self.mesh, self.micro_batch, self.optimizer = mesh, micro_batch, optimizer
        self.dtype = DTYPES[precision]
        self.modality_weights = dict(modality_weights or {})
        self.normalize = normalize
        self.sums = torch.zeros(0)
        self.ema, self._average = ema, dict[str, Tensor]()
        self.start_average()
        self.pipeline: PipelineRunner | None = None
        if mesh is not None and mesh.sizes["pp"] > 1:
            self.pipeline = PipelineRunner(
                self.parts, mesh, schedule=schedule, micro_batch=micro_batch, dtype=self.dtype, loss=self._loss,
                split_backward=split_backward,
            )  # fmt: skip

    @property
    def model(self) -> Model:
        """The first of this rank's parts: the model, where a rank holds one part."""
        return self.parts[0]

    @property
    def last_stage(self) -> bool:
        """Whether this rank computes losses."""
        return self.parts[-1].is_last

    def global_counts(self, batch: Batch) -> NDArray[np.float64]:
        """Target counts per modality over all data ranks."""
        counts = torch.from_numpy(batch.counts.copy())
        if self.mesh and self.mesh.sizes["dp"] > 1:
            dist.all_reduce(counts, group=self.mesh.group("dp"))
        return counts.numpy()

    def forward_backward(self, batch: Batch) -> tuple[Tensor, NDArray[np.float64]]:
        """Accumulate gradients of the whole batch's loss.

        Gives this rank's share of Σ weight·nll per modality (fp64; sum over the world for the whole) and the
        global counts.
        """
        counts = self.global_counts(batch)
        scale = coefficients(counts, self.modality_weights, normalize=self.normalize)
        self.sums = torch.zeros(len(counts), dtype=torch.float64)
        terms = batch.terms(scale, torch.float64 if self.dtype == torch.float64 else torch.float32)
        if self.pipeline is not None:
            self.pipeline.run(batch, terms)
        else:
            self._accumulated(batch, terms)
        for part in self.parts:
            part.after_backward()
        share = self.sums
        if self.mesh:  # tensor-parallel ranks compute the same sums: one of them counts
            share = share / self.mesh.sizes["tp"]
        return share, counts

    def _loss(self, nll: Tensor, terms: Tensor) -> Tensor:
        self.sums += term_sums(nll.detach(), terms[..., 1], terms[..., 2]).cpu()
        return (nll * terms[..., 0]).sum()

    def _accumulated(self, batch: Batch, terms: Tensor) -> None:
        rows = batch.ids.shape[0]
        for at in range(0, rows, self.micro_batch):
            part = slice(at, at + self.micro_batch)
            if isinstance(self.model, FSDPModule):
                last = at + self.micro_batch >= rows
                self.model.set_requires_gradient_sync(last)
            expected = terms[part][..., 0]  # what `_loss` hands back: the head makes its gradients at once
            nll = self.model(batch.ids[part], **batch.inputs(part), expected=expected)
            self._loss(nll, terms[part]).backward()

    def parameters(self) -> Iterable[nn.Parameter]:
        """This rank's parameters."""
        return chain.from_iterable(part.parameters() for part in self.parts)

    def grad_squares(self) -> Tensor:
        """This rank's share of the squared global gradient norm (see parallel/grad_norm.py)."""
        if self.mesh is None:
            return sum(
                (p.grad.double().square().sum() for p in self.parameters() if p.grad is not None),
                torch.zeros((), dtype=torch.float64),
            )
        return local_squares(self.parameters(), self.mesh)

    def clip(self, norm: float, limit: float) -> None:
        """Clip gradients whose global norm is `norm` to `limit`; a limit of 0 or less clips nothing."""
        if limit > 0:
            clip_(self.parameters(), norm=norm, limit=limit)

    def step(self, lr: float) -> None:
        """One optimizer update at learning rate `lr`, then forget the gradients."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._move_average()
        self.zero_grad()

    def start_average(self) -> None:
        """Let the moving average begin at the parameters as they are."""
        if self.ema:
            self._average = {name: p.detach().clone() for name, p in self.named_parameters()}

    @torch.no_grad()
    def _move_average(self) -> None:
        if self.ema:
            for name, p in self.named_parameters():
                local(self._average[name]).lerp_(local(p.detach()), 1.0 - self.ema)

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """This rank's parameters with their names."""
        return chain.from_iterable(part.named_parameters() for part in self.parts)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, moments and moving averages by layout-independent name, sharing memory with the live ones."""
        state: dict[str, Tensor] = {}
        for name, p in chain.from_iterable(part.named_parameters() for part in self.parts):
            state[f"model.{name}"] = p.detach() if not isinstance(p, nn.Parameter) else p.data
            if self.optimizer is not None:
                moments = self._moments(p)
                state |= {f"optimizer.{key}.{name}": value for key, value in moments.items()}
        state |= {f"ema.{name}": value for name, value in self._average.items()}
        return state

    def _moments(self, p: nn.Parameter) -> dict[str, Tensor]:
        assert self.optimizer is not None
        state = self.optimizer.state[p]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(p, requires_grad=False)
        return {key: state[key] for key in ("exp_avg", "exp_avg_sq")}

    def set_optimizer_step(self, step: int) -> None:
        """Tell every moment how many updates it has seen (kept in the manifest, not as tensors)."""
        assert self.optimizer is not None
        for p in self.parameters():
            self._moments(p)
            self.optimizer.state[p]["step"] = torch.tensor(float(step))


def make_adamw(
    parts: nn.Module | Sequence[nn.Module],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over all parts of a rank, with decay on matrices only, never on norms."""
    parts = [parts] if isinstance(parts, nn.Module) else parts
    everything = [p for part in parts for p in part.parameters()]
    matrices = [p for p in everything if p.ndim > 1]
    vectors = [p for p in everything if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # foreach=False: tensors of one group may live on different meshes.
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, foreach=False)


def world_loss(
    sums: Tensor, counts: NDArray[np.float64], modality_weights: Mapping[str, float], *, normalize: str
) -> float:
    """The loss from world-summed sums and global counts (nats)."""
    return float((coefficients(counts, modality_weights, normalize=normalize) * sums.numpy()).sum())


__all__ = ["TorchEngine", "make_adamw", "world_loss", "world_sum"]
