"""The four-axis device mesh: which rank stands where, and the groups that follow from it.

Axes are `dp` (data), `pp` (pipeline), `tp` (tensor), `sp` (ring sequence), in that order: sp neighbours and
tp neighbours have neighbouring ranks, which launchers place on one node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ringweave.parallel.ring import Ring
from ringweave.parallel.ulysses import Ulysses

AXES = ("dp", "pp", "tp", "sp")


@dataclass(frozen=True, slots=True)
class Mesh:
    """A rank's place (`rank_on`) and sizes on each axis; `device_mesh` is torch's object behind it.

    pools: sp as [ring, ulysses], where heads are split. dp_sp: data and ring axes flattened into one, the
    ranks among which parameters are spread. shards: the same ranks
    as FSDP2 takes them: [shard], or [replicate, shard] where `replicate` copies of the parameters are kept.
    """

    device_mesh: DeviceMesh
    dp_sp: DeviceMesh
    shards: DeviceMesh
    sizes: dict[str, int]
    rank_on: dict[str, int]
    pools: DeviceMesh | None = None

    @classmethod
    def build(
        cls, layout: Mapping[str, int], *, device: str = "cpu", replicate: int = 1, ulysses: int = 1
    ) -> Mesh:
        """Make the mesh of the running world from sizes by axis (missing axes are 1).

        replicate: copies of the parameters within dp·sp (1: FSDP2, dp·sp: plain replication, between: HSDP); ranks
        next to each other shard one copy. ulysses: neighbours on sp that split heads instead of tokens.
        Raises ValueError when the product of sizes is not the world size, an
        axis is unknown, replicate does not divide dp·sp, or ulysses does not divide sp.
        """
        unknown = set(layout) - set(AXES)
        if unknown:
            raise ValueError(f"unknown mesh axes {sorted(unknown)}; known: {', '.join(AXES)}")
        sizes = {axis: layout.get(axis, 1) for axis in AXES}
        dp, pp, tp, sp = sizes.values()
        world = dist.get_world_size()
        if dp * pp * tp * sp != world:
            raise ValueError(f"dp·pp·tp·sp = {dp}·{pp}·{tp}·{sp} = {dp * pp * tp * sp}, world = {world}")
        device_mesh = init_device_mesh(device, (dp, pp, tp, sp), mesh_dim_names=AXES)
        if (dp * sp) % replicate:
            raise ValueError(f"dp·sp = {dp}·{sp} = {dp * sp} is not divisible by replicate = {replicate}")
        if sp % ulysses:
            raise ValueError(f"sp = {sp} is not divisible by ulysses = {ulysses}")
        pools = None
        if ulysses > 1:
            shape = (dp * pp * tp, sp // ulysses, ulysses)
            pools = init_device_mesh(device, shape, mesh_dim_names=("rest", "ring", "ulysses"))
        dp_sp = shards = device_mesh["dp", "sp"]._flatten("dp_sp")
        if replicate > 1:
            shards = dp_sp._unflatten(0, (replicate, dp * sp // replicate), ("replicate", "shard"))
        where = device_mesh.get_coordinate()
        assert where is not None
        return cls(
            device_mesh=device_mesh,
            dp_sp=dp_sp,
            shards=shards,
            sizes=sizes,
            rank_on=dict(zip(AXES, where, strict=True)),
            pools=pools,
        )

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group of this rank along an axis."""
        return self.device_mesh[axis].get_group()

    @property
    def ring(self) -> Ring:
        """This rank's ring (of one, without a group, when nothing is passed round)."""
        if self.sizes["sp"] == 1:
            return Ring()
        if self.pools is not None:
            size = self.pools["ring"].size()
            return (
                Ring(self.pools["ring"].get_local_rank(), size, self.pools["ring"].get_group())
                if size > 1
                else Ring()
            )
        return Ring(rank=self.rank_on["sp"], size=self.sizes["sp"], group=self.group("sp"))

    @property
    def ulysses(self) -> Ulysses:
        """The neighbours on sp with which this rank swaps tokens for heads."""
        if self.pools is None:
            return Ulysses()
        pool = self.pools["ulysses"]
        return Ulysses(pool.get_local_rank(), pool.size(), pool.get_group())

    def describe(self) -> str:
        """For messages: `dp2·tp2`, or `1` for a single rank."""
        return describe_layout(self.sizes)


def describe_layout(sizes: dict[str, int]) -> str:
    """`dp2·tp2` for {"dp": 2, "pp": 1, "tp": 2, "sp": 1}."""
    return "·".join(f"{axis}{sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "1"
