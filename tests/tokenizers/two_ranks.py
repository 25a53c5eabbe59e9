"""A training over two gloo ranks of one thread each, for tests that compare it with one process."""

from __future__ import annotations

from collections.abc import Callable

from ringweave.parallel.spawn import run_ranks
from ringweave.tokenizers.learn import Training


def losses_of(training: Training) -> list[float]:
    """The loss of every step."""
    losses: list[float] = []
    training.run(progress=lambda _step, loss: losses.append(loss))
    return losses


def _rank(make: Callable[[], Training]) -> list[float]:
    return losses_of(make())


def losses_of_two_ranks(make: Callable[[], Training]) -> list[float]:
    """The losses that rank 0 of two sees. make: a function of a module, since processes are spawned."""
    losses: list[float] = run_ranks(2, _rank, make)[0]
    return losses
