"""Everything that spreads a model over a mesh, in one place and one fixed order.

1. keep this rank's pipeline stage, 2. tensor parallel (DTensor), 3. ring attention over sp, 4. FSDP2 over
dp and sp together (a ring rank sees other tokens, so it is a data rank to the parameters), 5. materialise
and initialise. The model itself knows none of this.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ringweave.parallel.mesh import Mesh
from ringweave.parallel.packed import PackedAttention
from ringweave.parallel.vocab import VocabParallelCrossEntropy
from ringweave.pretrain.models.lwm import LWM, LWMShape, initial_value

# FSDP warns that in-place changes of a view it returns would lose its hooks; the model makes none.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")

#: Below this many parameters a stage is gathered and reduced whole: latency, not memory, is what costs.
UNIT = 2**24

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def build_model(
    shape: LWMShape,
    mesh: Mesh | None,
    *,
    seed: int,
    rope_theta: float,
    precision: str = "fp32",
    ring_layout: str = "zigzag",
    device: torch.device | None = None,
    unit: int = UNIT,
) -> LWM:
    """The model of this rank under `mesh` (None: one process, nothing applied), initialised from `seed`.

    Parameters are kept in fp32 (fp64 for precision "fp64"); "bf16" computes in bf16 and reduces in fp32.
    unit: parameters below which a stage is sharded as one unit instead of a unit a layer.
    """
    device = device or torch.device("cpu")
    keep = torch.float64 if precision == "fp64" else torch.float32
    with torch.device("meta"):
        model = LWM(shape, rope_theta=rope_theta).to(keep)
    if mesh is not None:
        model.keep_stage(mesh.rank_on["pp"], mesh.sizes["pp"])
        _tensor_parallel(model, mesh)
        model.attention = PackedAttention(ring=mesh.ring, layout=ring_layout)
        _shard(model, mesh, precision, unit)
    model.to_empty(device=device)
    initialise(model, seed=seed)
    return model


def _tensor_parallel(model: LWM, mesh: Mesh) -> None:
    """Column- and row-parallel linears, vocabulary-parallel embedding and head. Norms stay replicated."""
    if mesh.sizes["tp"] == 1:
        return
    tp = mesh.device_mesh["tp"]
    for layer in model.layers.values():
        parallelize_module(
            layer,
            tp,
            {
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(),
                "mlp.gate": ColwiseParallel(),
                "mlp.up": ColwiseParallel(),
                "mlp.down": RowwiseParallel(),
            },
        )
    if model.embed is not None:
        parallelize_module(model.embed, tp, RowwiseParallel(input_layouts=Replicate()))
    if model.head is not None:
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight, tp, [Shard(0)]))
        model.head.cross_entropy = VocabParallelCrossEntropy(mesh.group("tp"))


def _shard(model: LWM, mesh: Mesh, precision: str, unit: int) -> None:
    """FSDP2 over the flattened dp·sp axis; gradients are summed, because losses are already divided globally."""
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    over = mesh.dp_sp
    # Pipeline stages run many micro-batches between optimizer steps: gathering once is cheaper than resharding.
    reshard = mesh.sizes["pp"] == 1
    parts: list[nn.Module] = []
    if sum(p.numel() for p in model.parameters()) >= unit:
        parts = [m for m in (model.embed, *model.layers.values(), model.head) if m is not None]
    for part in (*parts, model):
        fully_shard(part, mesh=over, mp_policy=policy, reshard_after_forward=reshard)
    for part in (*parts, model):
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # else NCCL's scaled sum, which gloo lacks


@torch.no_grad()
def initialise(model: LWM, *, seed: int) -> None:
    """Fill every parameter from (seed, name); each rank makes the whole tensor and keeps its part."""
    for name, p in model.named_parameters():
        whole = initial_value(name, tuple(p.shape), seed=seed, layers=model.shape.layers)
        whole = whole.to(p.dtype)
        if isinstance(p, DTensor):
            part = distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
            p.to_local().copy_(part.to_local())
        else:
            p.copy_(whole)
