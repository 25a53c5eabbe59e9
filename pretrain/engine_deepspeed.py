"""The DeepSpeed engine: ZeRO 1, 2, 3 and CPU offload behind the protocol of `TorchEngine`.

Data, loss, clipping and grouping of parameters are those of the torch engine; DeepSpeed shards, reduces and
updates. ZeRO runs over dp and sp flattened (a ring rank sees other tokens, so it is a data rank to the
parameters); with tp, every rank hands DeepSpeed its plain local shards and an `mpu` that names the groups.
DeepSpeed (Rajbhandari et al. 2020, ZeRO) is imported only when an engine is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ringweave.parallel import watch
from ringweave.parallel.mesh import Mesh
from ringweave.pretrain.batch import Batch
from ringweave.pretrain.config import RunConfig, Stage
from ringweave.pretrain.deepspeed_model import Place, ProcessGroups, import_deepspeed, local_model
from ringweave.pretrain.deepspeed_partitions import MOMENTS, Partitions, make_partitions
from ringweave.pretrain.engine import TorchEngine
from ringweave.pretrain.errors import ConfigError
from ringweave.pretrain.models.lwm import LWMShape, initial_value


class DeepSpeedEngine(TorchEngine):
    """One rank's model under ZeRO stage `zero`, its parameters initialised from `seed` as `build_model` does.

    offload "cpu": masters, moments and their update live in host memory (DeepSpeedCPUAdam, compiled on first use;
    ConfigError where it cannot be).
    norms, recompute, transport: as `build_parts` takes them. Raises ConfigError for layouts with a pipeline, and for
    recompute under stage 3.
    """

    def __init__(
        self,
        shape: LWMShape,
        mesh: Mesh,
        *,
        seed: int,
        rope_theta: float,
        micro_batch: int,
        zero: int = 1,
        offload: str = "none",
        precision: str = "fp32",
        modality_weights: Mapping[str, float] | None = None,
        normalize: str = "modality",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        norms: str = "sequence",
        recompute: str = "none",
        transport: str = "ring",
    ) -> None:
        if mesh.sizes["pp"] > 1:
            raise ConfigError(
                f"engine deepspeed cannot run pp = {mesh.sizes['pp']}",
                where="engine.kind",
                why="DeepSpeed's pipeline engine owns its schedule and asserts ZeRO < 2; "
                "nesting it in ours is undefined",
                fix="set pp: 1, or engine.kind: torch",
            )
        if zero == 3 and recompute != "none":  # its gradients come out wrong, without an error
            raise ConfigError(
                f"engine deepspeed with zero 3 cannot run recompute = {recompute}",
                where="engine.zero",
                why="computing a layer again lets ZeRO-3 release parameters that its backward still needs",
                fix="set recompute: none, engine.zero: 2, or engine.kind: torch",
            )
        self.stage, self.offload = zero, offload
        self.deepspeed = import_deepspeed(mesh.device_mesh.device_type)
        self.groups = ProcessGroups(mesh)
        self.device = _device(mesh)
        model, self.places = local_model(
            shape, mesh, rope_theta=rope_theta, norms=norms, recompute=recompute, transport=transport
        )
        if mesh.sizes["tp"] > 1 and norms == "sequence":
            model.after_backward = self._sum_norms
        super().__init__(
            model, mesh, micro_batch=micro_batch, precision=precision, modality_weights=modality_weights,
            normalize=normalize,
        )  # fmt: skip
        settings = self._settings(precision)
        decays = {n: len(place.whole) > 1 for n, place in self.places.items()}  # ZeRO-3 hides shapes
        self._materialise(settings, seed)
        named = dict(model.named_parameters())
        optimizer = self._adamw(
            [
                {"params": [p for n, p in named.items() if decays[n]], "weight_decay": weight_decay},
                {"params": [p for n, p in named.items() if not decays[n]], "weight_decay": 0.0},
            ],
            {"lr": lr, "betas": betas, "eps": eps},
        )
        self.ds, self.zero, _, _ = self.deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=self.groups, dist_init_required=False
        )
        self.held: Partitions = make_partitions(
            self.zero, stage=zero, rank=self.groups.get_data_parallel_rank()
        )
        self.named = named
        dp, tp, sp = (mesh.sizes[axis] for axis in ("dp", "tp", "sp"))
        rows = torch.arange(dp * tp * sp).view(dp, tp, sp).transpose(0, 1).reshape(tp, dp * sp)
        self.rows = DeviceMesh(mesh.device_mesh.device_type, rows, mesh_dim_names=("tp", "dp_sp"))
        if precision == "bf16":  # the masters were copied from rounded parameters
            self._fill_masters(seed)

    # --- start -----------------------------------------------------------------------------------------

    def _settings(self, precision: str) -> dict[str, Any]:
        """DeepSpeed's config: no clipping, no printing, gradients summed where it can, reduced in fp32."""
        zero: dict[str, Any] = {"stage": self.stage, "memory_efficient_linear": False}
        if self.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        elif self.stage == 2 or (self.stage == 1 and precision == "fp32"):
            zero["compute_grad_norm"] = False  # the trainer knows the norm
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": 1,  # for the record only: the boundary is set by hand
            "gradient_clipping": 0.0,
            "steps_per_print": None,
            "communication_data_type": "fp32",
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
        }
        if precision == "bf16":
            settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        if self.stage < 3:
            settings["gradient_allreduce_op"] = "sum"  # losses are divided by global counts already
        return settings

    @property
    def _unaverage(self) -> float:
        """What a loss is multiplied by so that DeepSpeed's reduced gradient is the sum over data ranks.

        Stages 1 and 2 can sum (`gradient_allreduce_op`). Stage 3 refuses that and divides by the ranks of the data
        group, which this undoes: exactly when their number is a power of two, else to rounding.
        """
        return float(self.groups.get_data_parallel_world_size()) if self.stage == 3 else 1.0

    @torch.no_grad()
    def _materialise(self, settings: dict[str, Any], seed: int) -> None:
        """Give the meta model its memory and values; at stage 3 one layer at a time, sharded at once."""
        assert self.mesh is not None
        model = self.model
        low = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        names = {id(p): n for n, p in model.named_parameters()}
        units: list[tuple[nn.Module, dict[str, str]]] = []
        for part in (model.embed, *model.layers.values(), model.norm, model.head):
            assert part is not None
            units.append((part, {inner: names[id(p)] for inner, p in part.named_parameters()}))
        for part, inside in units:
            part.to(low).to_empty(device=self.device)
            for inner, p in part.named_parameters():
                p.copy_(self._initial(inside[inner], seed))
            if self.stage == 3:
                self.deepspeed.zero.Init(
                    module=part, data_parallel_group=self.groups.data, config_dict_or_path=settings, dtype=low,
                    mpu=self.groups,
                )  # fmt: skip

    def _initial(self, name: str, seed: int) -> Tensor:
        """This tensor-parallel rank's part of a parameter's initial fp32 value."""
        assert self.mesh is not None
        place = self.places[name]
        whole = initial_value(name, tuple(place.whole), seed=seed, layers=self.model.shape.layers)
        return place.cut(whole, self.mesh)

    @torch.no_grad()
    def _fill_masters(self, seed: int) -> None:
        for name, p in self.named.items():
            first, count = self.held.span(p)
            self.held.value(p, None).copy_(self._initial(name, seed).reshape(-1).narrow(0, first, count))
        self.held.refresh()

    def _adamw(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
        groups = [g for g in groups if g["params"]]
        if self.offload == "none":
            return torch.optim.AdamW(groups, foreach=False, **options)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            made: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        except RuntimeError as e:
            raise ConfigError(
                "engine.offload: cpu needs DeepSpeedCPUAdam, which could not be compiled",
                where="engine.offload",
                why=f"{e.__cause__ or e}".strip().splitlines()[-1],
                fix="install a C++ compiler and ninja, or set engine.offload: none",
            ) from e
        return made

    # --- a step ----------------------------------------------------------------------------------------

    def _accumulated(self, batch: Batch, terms: Tensor) -> None:
        """Micro-batches in a loop. Stage 1 reduces once, at the end; 2 and 3 must shard every time."""
        rows = batch.ids.shape[0]
        self.zero.gradient_accumulation_steps = -(-rows // self.micro_batch)
        for at in range(0, rows, self.micro_batch):
            part = slice(at, at + self.micro_batch)
            self.ds.set_gradient_accumulation_boundary(at + self.micro_batch >= rows)
            # what the backward pass will hand back to the head: it makes its gradients at once
            expected = terms[part][..., 0] * self._unaverage
            nll = self.ds(batch.ids[part], **batch.inputs(part), expected=expected)
            self.ds.backward(self._loss(nll, terms[part]) * self._unaverage, scale_wrt_gas=False)

    @torch.no_grad()
    def _sum_norms(self) -> None:
        """Add up over tp the gradients of the norms, which saw a shard of the tokens each: one collective."""
        grads = [self.held.grad(p) for n, p in self.named.items() if n.endswith("norm.weight")]
        total = torch.cat([g.reshape(-1).to(self.device) for g in grads])
        with watch.at("sum of norm gradients", "the tensor-parallel ranks"):
            dist.all_reduce(total, group=self.groups.tensor)
        for g, part in zip(grads, total.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))

    def parameters(self) -> Iterable[nn.Parameter]:
        """This rank's parameters as the model sees them; stage 3 leaves them empty between passes."""
        return self.named.values()

    def grad_squares(self) -> Tensor:
        """This rank's share of the squared global gradient norm: summed over the world, each element once."""
        assert self.mesh is not None
        total = torch.zeros((), dtype=torch.float64)
        for name, p in self.named.items():
            copies = 1 if isinstance(self.places[name].split, Shard) else self.mesh.sizes["tp"]
            total += self.held.grad(p).detach().double().square().sum().cpu() / copies
        return total

    @torch.no_grad()
    def clip(self, norm: float, limit: float) -> None:
        """Clip gradients whose global norm is `norm` to `limit` (torch.nn.utils.clip_grad_norm_'s rule)."""
        scale = limit / (norm + 1e-6)
        if limit <= 0 or scale >= 1.0:
            return
        for p in self.named.values():
            self.held.grad(p).mul_(scale)

    def step(self, lr: float) -> None:
        """One optimizer update at learning rate `lr`, then forget the gradients."""
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        self._make_moments()
        with watch.at("DeepSpeed's update of the parameters", "all data ranks"):
            self.ds.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.held.forget()

    # --- state -----------------------------------------------------------------------------------------

    def gradients(self) -> dict[str, Tensor]:
        """Reduced gradients by name as DTensors, between `forward_backward` and `step` (collective)."""
        return {name: self._as_rows(name, self.held.grad(p)) for name, p in self.named.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Masters and moments by layout-independent name (collective).

        Every tensor is a DTensor over (tp, dp·sp), split by rows over dp·sp as FSDP2 splits it, so that any layout
        of either engine reads what was saved. They are copies: after filling them, call `loaded`.
        """
        self._make_moments()
        state = {f"model.{n}": self._as_rows(n, self.held.value(p, None)) for n, p in self.named.items()}
        for key in MOMENTS:
            for name, p in self.named.items():
                state[f"optimizer.{key}.{name}"] = self._as_rows(name, self.held.value(p, key))
        return state

    @torch.no_grad()
    def loaded(self, state: Mapping[str, Tensor]) -> None:
        """Take over the contents of `tensors()` after something filled them (collective)."""
        self._make_moments()
        for name, p in self.named.items():
            first, count = self.held.span(p)
            for key, saved in ((None, f"model.{name}"), *((k, f"optimizer.{k}.{name}") for k in MOMENTS)):
                whole = self._from_rows(name, state[saved])
                self.held.value(p, key).copy_(whole.narrow(0, first, count))
        self.held.refresh()

    def set_optimizer_step(self, step: int) -> None:
        """Tell every moment how many updates it has seen (kept in the manifest, not as tensors)."""
        self._make_moments()
        for flat in self.held.flats:
            kept = self.zero.optimizer.state[flat]
            kept["step"] = torch.tensor(float(step)) if isinstance(kept["step"], Tensor) else step

    def _make_moments(self) -> None:
        """Make the moments that an optimizer would make at its first update."""
        for flat in self.held.flats:
            state = self.zero.optimizer.state[flat]
            if "exp_avg" not in state:
                state["step"] = 0 if self.offload == "cpu" else torch.zeros((), dtype=torch.float32)
                for key in MOMENTS:
                    state[key] = torch.zeros_like(flat, requires_grad=False)

    def _sum_bits(self, mine: Tensor, first: int, size: int) -> Tensor:
        """[size] fp32 from parts that ranks of the data group hold; adding integers keeps every bit, also of -0."""
        whole = torch.zeros(size, dtype=torch.float32, device=self.device)
        whole.narrow(0, first, mine.numel()).copy_(mine.reshape(-1))
        with watch.at("parameters gathered for a checkpoint", "all data ranks"):
            dist.all_reduce(whole.view(torch.int32), group=self.groups.data)
        return whole

    def _row_range(self, place: Place) -> tuple[int, int]:
        """Rows of the local shard that are this data rank's in a checkpoint (torch.chunk's rule, as FSDP2's)."""
        rows, r = place.local[0], self.groups.get_data_parallel_rank()
        each = -(-rows // self.groups.get_data_parallel_world_size())
        return min(r * each, rows), min((r + 1) * each, rows)

    @torch.no_grad()
    def _as_rows(self, name: str, mine: Tensor) -> DTensor:
        """A DTensor from this rank's flat range of a parameter-shaped tensor."""
        place = self.places[name]
        whole = self._sum_bits(mine, self.held.span(self.named[name])[0], place.local.numel())
        low, high = self._row_range(place)
        local = whole.view(place.local)[low:high].clone()  # a view would keep the whole alive
        stride = torch.empty(place.whole, device="meta").stride()
        return DTensor.from_local(
            local, self.rows, (place.split, Shard(0)), run_check=False, shape=place.whole, stride=stride
        )

    def _from_rows(self, name: str, saved: Tensor) -> Tensor:
        """The whole local shard, flat, from a DTensor of `_as_rows`."""
        assert isinstance(saved, DTensor)
        place = self.places[name]
        width = place.local.numel() // max(place.local[0], 1)
        return self._sum_bits(saved.to_local(), self._row_range(place)[0] * width, place.local.numel())


def deepspeed_engine(config: RunConfig, stage: Stage, shape: LWMShape, mesh: Mesh) -> DeepSpeedEngine:
    """The engine of a stage of a run."""
    o = config.optimizer
    return DeepSpeedEngine(
        shape, mesh, seed=config.run.seed, rope_theta=stage.rope_theta, micro_batch=stage.micro_batch,
        zero=config.engine.zero, offload=config.engine.offload, precision=config.precision,
        modality_weights=config.objective.modality_weights, normalize=config.objective.normalize,
        lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay,
        norms=stage.layout.norms, recompute=stage.recompute, transport=stage.layout.transport,
    )  # fmt: skip


def _device(mesh: Mesh) -> torch.device:
    kind = mesh.device_mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.cuda.current_device())
