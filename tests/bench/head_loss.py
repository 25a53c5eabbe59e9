"""Claim 6: fused head + loss against `torch.nn.functional.cross_entropy` on whole logits, forward and backward.

V = 32K, L = 16K, width 256, fp32, one thread: memory at most 1/8, time at most 1.1 x. Both sides get hidden states,
head and targets, and leave the mean loss and both gradients, which must agree.
"""

from __future__ import annotations

from collections.abc import Callable

import _harness as bench
import torch
from torch import Tensor

from ringweave.kernels.cross_entropy import head_cross_entropy

CLAIM = "6: fused head + loss against cross_entropy on whole logits"


def inputs(tokens: int, vocab: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [tokens, width], weight [vocab, width], targets [tokens]."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).mul_(0.02).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=g)


def fused(tokens: int, vocab: int, width: int) -> Callable[[], Tensor]:
    """Ours, as the trainer calls it: each token's coefficient is known beforehand."""
    hidden, weight, targets = inputs(tokens, vocab, width)
    expected = torch.full((tokens,), 1 / tokens)

    def step() -> Tensor:
        hidden.grad = weight.grad = None
        loss = (head_cross_entropy(hidden, weight, targets, expected=expected) * expected).sum()
        loss.backward()
        return loss.detach()

    step.grads = lambda: (hidden.grad, weight.grad)  # type: ignore[attr-defined]
    return step


def whole(tokens: int, vocab: int, width: int) -> Callable[[], Tensor]:
    """The rival."""
    hidden, weight, targets = inputs(tokens, vocab, width)

    def step() -> Tensor:
        hidden.grad = weight.grad = None
        loss = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets)
        loss.backward()
        return loss.detach()

    step.grads = lambda: (hidden.grad, weight.grad)  # type: ignore[attr-defined]
    return step


def check_same(ours: Callable[[], Tensor], rival: Callable[[], Tensor]) -> None:
    """Raises AssertionError unless both give the same loss and gradients (fp32)."""
    torch.testing.assert_close(ours(), rival(), rtol=1e-6, atol=1e-6)
    for a, b in zip(ours.grads(), rival.grads(), strict=True):  # type: ignore[attr-defined]
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    size = (512, 4096, 64) if options.tiny else (16384, 32768, 256)
    memory = [[bench.peak_memory(side, *size)] for side in (fused, whole)]
    bench.one_thread()
    ours, rival = fused(*size), whole(*size)
    check_same(ours, rival)
    timed = bench.paired([ours, rival], runs=options.runs, warm_up=0)
    bench.emit(
        CLAIM,
        bench.Part("time", *timed, unit="s", target=1.1, better="lower"),
        bench.Part("peak memory", *memory, unit="MiB", target=1 / 8, better="lower"),
        sizes=dict(zip(("tokens", "vocabulary", "width"), size, strict=True)),
    )


if __name__ == "__main__":
    main()
