"""What DeepSpeed is given: itself imported quietly, the process groups, and a model of plain local parameters."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ringweave.parallel.mesh import Mesh
from ringweave.pretrain.errors import ConfigError
from ringweave.pretrain.models.lwm import LWM, LWMShape
from ringweave.pretrain.parallelize import ring_attention_of
from ringweave.pretrain.parallelize_tensor import tensor_parallel
from ringweave.pretrain.recompute import recompute_activations


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter's shapes, whole and on this tensor-parallel rank, and how tp splits it."""

    whole: torch.Size
    local: torch.Size
    split: Placement

    def cut(self, whole: Tensor, mesh: Mesh) -> Tensor:
        """This tensor-parallel rank's part of a whole tensor."""
        if not isinstance(self.split, Shard):
            return whole
        parts = whole.chunk(mesh.sizes["tp"], dim=self.split.dim)
        rank = mesh.rank_on["tp"]
        return parts[rank] if rank < len(parts) else whole.new_empty(self.local)


class ProcessGroups:
    """The `mpu` object that `deepspeed.initialize` asks for its groups (Megatron's model-parallel unit)."""

    def __init__(self, mesh: Mesh) -> None:
        self.data, self.tensor = mesh.dp_sp.get_group(), mesh.group("tp")

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """dp and sp together."""
        return self.data

    def get_data_parallel_world_size(self) -> int:
        """Ranks in it."""
        return dist.get_world_size(self.data)

    def get_data_parallel_rank(self) -> int:
        """This rank in it."""
        return dist.get_rank(self.data)

    def get_data_parallel_group_ranks(self) -> list[int]:
        """World ranks in it."""
        return dist.get_process_group_ranks(self.data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """tp."""
        return self.tensor

    def get_model_parallel_world_size(self) -> int:
        """Ranks of tp."""
        return dist.get_world_size(self.tensor)

    def get_model_parallel_rank(self) -> int:
        """This rank in tp."""
        return dist.get_rank(self.tensor)


def local_model(
    shape: LWMShape, mesh: Mesh, *, rope_theta: float, norms: str, recompute: str, transport: str = "ring"
) -> tuple[LWM, dict[str, Place]]:
    """The model on the meta device with plain parameters, tensor-parallel ones this rank's shards only.

    ZeRO flattens parameters into buffers, which DTensors do not survive. So each becomes a plain parameter that
    its module wraps into a DTensor whenever it reads it: the maths is that of the torch engine.
    """
    with torch.device("meta"):
        model = LWM(shape, rope_theta=rope_theta)
    tensor_parallel(model, mesh, norms)
    model.attention = ring_attention_of(shape, mesh, transport)
    recompute_activations(model, recompute)
    places: dict[str, Place] = {}
    for path, module in list(model.named_modules()):
        for key, p in list(module.named_parameters(recurse=False)):
            name = f"{path}.{key}" if path else key
            if isinstance(p, DTensor):
                places[name] = _localise(module, key, p)
            else:
                places[name] = Place(p.shape, p.shape, Replicate())
    return model, places


def _localise(module: nn.Module, key: str, p: DTensor) -> Place:
    """Keep the local shard of `p` as the module's parameter and wrap it on every read."""
    (split,), tp, whole, stride = p.placements, p.device_mesh, p.shape, p.stride()
    local = nn.Parameter(torch.empty_like(p.to_local(), device="meta"))

    def read(self: nn.Module) -> Tensor:
        plain = self._parameters[key]
        assert plain is not None
        return DTensor.from_local(plain, tp, (split,), run_check=False, shape=whole, stride=stride)

    module._parameters[key] = local
    base = type(module)
    module.__class__ = type(base.__name__, (base,), {key: property(read)})
    return Place(torch.Size(whole), local.shape, split)


def import_deepspeed(device: str) -> Any:
    """The deepspeed module, told which device this process computes on, its chatter silenced.

    It reads the accelerator and the local rank from the environment, and only there; both are set inside this
    process unless the launcher has set them. Raises ConfigError when it cannot be imported.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        with _quiet():
            import deepspeed
            from deepspeed import comm
    except ImportError as e:
        raise ConfigError(
            "engine.kind is deepspeed, which cannot be imported",
            where="engine.kind",
            why=str(e),
            fix="pip install deepspeed, or set engine.kind: torch",
        ) from e
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    names = "all_gather_into_tensor|reduce_scatter_tensor"
    warnings.filterwarnings("ignore", message=rf"`torch.distributed.({names})` is deprecated")
    if not comm.is_initialized():
        # On CPU it would compile a shared-memory collective (a minute) to be used beside gloo's.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if device == "cuda" else "gloo"
        comm.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what is printed, and without torch's remark that a machine without a GPU has none."""
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        log.setLevel(level)
