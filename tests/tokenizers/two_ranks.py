"""A training over two gloo ranks of one thread each, for tests that compare it with one process."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ringweave.tokenizers.learn import Training


def losses_of(training: Training) -> list[float]:
    """The loss of every step."""
    losses: list[float] = []
    training.run(progress=lambda _step, loss: losses.append(loss))
    return losses


def _rank(rank: int, port: int, out: str, make: Callable[[], Training]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    losses = losses_of(make())
    if rank == 0:
        np.save(out, np.array(losses))
    dist.destroy_process_group()


def losses_of_two_ranks(make: Callable[[], Training], folder: Path) -> NDArray[np.float64]:
    """The losses that rank 0 of two sees. make: a function of a module, since processes are spawned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = str(folder / "losses.npy")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, port, out, make)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for number, rank in enumerate(ranks):
        rank.join(120)
        assert rank.exitcode == 0, f"rank {number} ended with {rank.exitcode}"
    losses: NDArray[np.float64] = np.load(out)
    return losses
