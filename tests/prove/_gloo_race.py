"""What runs on the ranks of gloo_workers.py: four all-gathers under way at a time."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist


def group_of(workers: int) -> dist.ProcessGroup:
    """The world (`join_world`, one worker thread), or a group of all ranks as torch makes it (two)."""
    if workers == 1:
        return dist.group.WORLD
    dist.distributed_c10d._register_builtin_gloo_backend()
    return dist.new_group(list(range(dist.get_world_size())))


def race(seconds: float, workers: int) -> int:
    """All-gathers that this rank came through in so many seconds."""
    group, wire = group_of(workers), torch.ops._c10d_functional
    name, ranks = group.group_name, dist.get_world_size()
    x, late, count, started = torch.ones(4, 2), torch.zeros(1), 0, time.monotonic()
    while not late:
        for _ in range(500):
            four = [wire.all_gather_into_tensor(x, ranks, name) for _ in range(4)]
            count += sum(int(wire.wait_tensor(rows).shape[0] == 4 * ranks) for rows in four)
        late[0] = time.monotonic() - started > seconds
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
    return count
