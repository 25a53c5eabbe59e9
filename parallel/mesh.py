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

AXES = ("dp", "pp", "tp", "sp")


@dataclass(frozen=True, slots=True)
class Mesh:
    """A rank's place (`rank_on`) and sizes on each axis; `device_mesh` is torch's object behind it.

    dp_sp: data and ring axes flattened into one, over which parameters are sharded.
    """

    device_mesh: DeviceMesh
    dp_sp: DeviceMesh
    sizes: dict[str, int]
    rank_on: dict[str, int]

    @classmethod
    def build(cls, layout: Mapping[str, int], *, device: str = "cpu") -> Mesh:
        """Make the mesh of the running world from sizes by axis (missing axes are 1).

        Raises ValueError when their product is not the world size, or an axis is unknown.
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
        dp_sp = device_mesh["dp", "sp"]._flatten("dp_sp")
        where = device_mesh.get_coordinate()
        assert where is not None
        return cls(
            device_mesh=device_mesh, dp_sp=dp_sp, sizes=sizes, rank_on=dict(zip(AXES, where, strict=True))
        )

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group of this rank along an axis."""
        return self.device_mesh[axis].get_group()

    @property
    def ring(self) -> Ring:
        """This rank's ring (of one, without a group, when sp is 1)."""
        if self.sizes["sp"] == 1:
            return Ring()
        return Ring(rank=self.rank_on["sp"], size=self.sizes["sp"], group=self.group("sp"))

    def describe(self) -> str:
        """For messages: `dp2·tp2`, or `1` for a single rank."""
        return describe_layout(self.sizes)


def describe_layout(sizes: dict[str, int]) -> str:
    """`dp2·tp2` for {"dp": 2, "pp": 1, "tp": 2, "sp": 1}."""
    return "·".join(f"{axis}{sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "1"
