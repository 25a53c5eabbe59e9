"""Everything that spreads a model over a mesh, in one place and one fixed order.

1. keep this rank's parts of the pipeline, 2. tensor parallel, 3. ring attention over sp, 4. recomputation, 5. FSDP2
over dp and sp together (a ring rank sees other tokens, so it is a data rank to the parameters), 6. materialise and
initialise. The model itself knows none of this.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ringweave.parallel.mesh import Mesh
from ringweave.parallel.packed import PackedAttention
from ringweave.parallel.schedules import check_shape, parts_of_rank, split_layers
from ringweave.pretrain.models.dit import DiT, DiTShape
from ringweave.pretrain.models.lwm import LWM, LWMShape
from ringweave.pretrain.parallelize_tensor import tensor_parallel
from ringweave.pretrain.recompute import recompute_activations

# FSDP warns that in-place changes of a view it returns would lose its hooks; the model makes none.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")

#: Below this many parameters a stage is gathered and reduced whole: latency, not memory, is what costs.
UNIT = 2**24

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def new_model(shape: LWMShape | DiTShape, *, rope_theta: float) -> LWM | DiT:
    """The backbone of a shape. rope_theta: of an LWM; a DiT has its own."""
    return DiT(shape) if isinstance(shape, DiTShape) else LWM(shape, rope_theta=rope_theta)


@overload
def build_model(shape: LWMShape, mesh: Mesh | None, *, seed: int, **options: Any) -> LWM: ...
@overload
def build_model(shape: DiTShape, mesh: Mesh | None, *, seed: int, **options: Any) -> DiT: ...
@overload
def build_model(shape: LWMShape | DiTShape, mesh: Mesh | None, *, seed: int, **options: Any) -> LWM | DiT: ...
def build_model(
    shape: LWMShape | DiTShape,
    mesh: Mesh | None,
    *,
    seed: int,
    **options: Any,
) -> LWM | DiT:
    """The model of a rank that holds one part of it: `build_parts` with a part a pipeline rank."""
    (model,) = build_parts(shape, mesh, seed=seed, **options)
    return model


def build_parts(
    shape: LWMShape | DiTShape,
    mesh: Mesh | None,
    *,
    seed: int,
    rope_theta: float = 1e4,
    precision: str = "fp32",
    device: torch.device | None = None,
    unit: int = UNIT,
    norms: str = "sequence",
    recompute: str = "none",
    transport: str = "ring",
    schedule: str = "1f1b",
    virtual: int = 1,
    split: Sequence[int] | None = None,
) -> list[LWM] | list[DiT]:
    """This rank's parts of the model by depth, under `mesh` (None: one process, nothing applied), from `seed`.

    Parameters are kept in fp32 (fp64 for precision "fp64"); "bf16" computes in bf16 and reduces in fp32.
    unit: parameters below which a part is sharded as one unit instead of a unit a layer. norms: what tensor-parallel
    ranks hold between blocks, "sequence" (a shard of the tokens) or "replicated". recompute: "none", "selective" or
    "full", see `pretrain/recompute.py`. schedule, virtual, split: which parts, see `parallel/schedules.py`; with one
    pipeline rank the whole model is one part whatever they say.
    Raises ValueError when the layers cannot be split so.
    """
    device = device or torch.device("cpu")
    keep = torch.float64 if precision == "fp64" else torch.float32
    ranks = 1 if mesh is None else mesh.sizes["pp"]
    mine, layers = [0], [range(shape.layers)]
    if mesh is not None and ranks > 1:
        check_shape(schedule, ranks, virtual, 1)
        mine = parts_of_rank(schedule, ranks, virtual, mesh.rank_on["pp"])
        layers = split_layers(shape.layers, ranks * virtual, split)
    parts: list[Any] = []
    for number in mine:
        with torch.device("meta"):
            part = new_model(shape, rope_theta=rope_theta).to(keep)
        part.keep_part(layers[number], first=number == 0, last=number == len(layers) - 1)
        if mesh is not None:
            tensor_parallel(part, mesh, norms)
            part.attention = ring_attention_of(shape, mesh, transport)
            if isinstance(part, DiT) and part.words is not None:
                part.words.attention = ring_attention_of(part.words.shape, mesh, transport)
        recompute_activations(part, recompute)
        if mesh is not None:
            _shard(part, mesh, precision, unit)
        part.to_empty(device=device)
        initialise(part, seed=seed)
        parts.append(part)
    return parts


def ring_attention_of(shape: LWMShape | DiTShape, mesh: Mesh, transport: str) -> PackedAttention:
    """Attention over the mesh's ring; transport: see `plan_ring`, or "auto" to price it for each micro-batch."""
    tp = mesh.sizes["tp"] * mesh.ulysses.size
    heads = (shape.heads // tp, max(shape.kv_heads // tp, 1), shape.head_dim)
    return PackedAttention(ring=mesh.ring, ulysses=mesh.ulysses, transport=transport, heads=heads)


def _shard(model: LWM | DiT, mesh: Mesh, precision: str, unit: int) -> None:
    """FSDP2 (HSDP with copies) over dp·sp; gradients are summed, because losses are already divided globally."""
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        # Hidden states are bf16 already; `expected`, the only other floats, must reach the head unrounded.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    # Pipeline stages run many micro-batches between optimizer steps: gathering once is cheaper than resharding.
    reshard = mesh.sizes["pp"] == 1
    parts: list[nn.Module] = []
    if sum(p.numel() for p in model.parameters()) >= unit:
        parts = model.units()
    for part in (*parts, model):
        fully_shard(part, mesh=mesh.shards, mp_policy=policy, reshard_after_forward=reshard)
    for part in (*parts, model):
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # else NCCL's scaled sum, which gloo lacks


@torch.no_grad()
def initialise(model: LWM | DiT, *, seed: int) -> None:
    """Fill every parameter from (seed, name); each rank makes the whole tensor and keeps its part."""
    for name, p in model.named_parameters():
        whole = model.initial_value(name, tuple(p.shape), seed=seed).to(p.dtype)
        if isinstance(p, DTensor):
            part = distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
            p.to_local().copy_(part.to_local())
        else:
            p.copy_(whole)
