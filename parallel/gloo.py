"""Process groups of gloo with one worker thread each, where torch's have two.

Both of torch's threads write the name of the collective they finished into one string of the group, without a lock
(`pgStatus_->lastCompletedWorkName` in ProcessGroupGloo::runLoop; seen in torch 2.14.1). Names of 16 and more
characters lie on the heap, as that of the coalesced all-gather that functional collectives, and so DTensor, run on.
Two threads that finish together then free the old name twice, and some time later the rank dies: "malloc():
unaligned tcache chunk detected", or SIGSEGV in pt_gloo_runloop. tests/prove/gloo_workers.py shows it in seconds, and
that groups with one worker, which has nobody to race with, live.

Collectives of one group then run one after another. Groups still run beside each other.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch.distributed import Backend, ProcessGroupGloo


def join_world(**where: Any) -> None:
    """`init_process_group("gloo", **where)`; this group, and all of gloo made later, have one worker thread."""
    Backend.register_backend(
        Backend.GLOO,
        _one_worker,
        extended_api=True,
        devices=Backend.backend_capability[Backend.GLOO],
        _backend_type=dist.ProcessGroup.BackendType.GLOO,
    )
    dist.init_process_group(Backend.GLOO, **where)


def _one_worker(group: Any, options: Any) -> ProcessGroupGloo:
    """What torch makes of `group` (store, ranks, timeout), but for the number of threads."""
    made = ProcessGroupGloo._Options()
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    made._devices = [ProcessGroupGloo.create_device(interface=name) for name in names]
    made._devices = made._devices or [ProcessGroupGloo.create_default_device()]
    made._timeout, made._threads = group.timeout, 1
    made.group_name, made.global_ranks_in_group = group.group_id, group.global_ranks_in_group
    made.enable_reconfigure = group.enable_reconfigure
    return ProcessGroupGloo(group.store, group.group_rank, group.group_size, made)
