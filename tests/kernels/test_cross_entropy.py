"""Chunked head + cross-entropy against whole logits, with the vocabulary whole and in shards."""

from __future__ import annotations

import pytest
import torch

from ringweave.kernels.cross_entropy import head_cross_entropy, head_cross_entropy_reference


def _inputs(tokens: int = 37, vocab: int = 50, width: int = 12):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[::5] = -1
    return hidden, weight, targets, torch.rand(tokens, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_equals_whole_logits_with_gradients(chunk: int) -> None:
    hidden, weight, targets, dnll = _inputs()
    results = []
    for fn in (
        lambda h, w: head_cross_entropy(h, w, targets, chunk=chunk),
        lambda h, w: head_cross_entropy_reference(h, w, targets),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        nll = fn(h, w)
        results.append((nll.detach(), *torch.autograd.grad(nll, (h, w), dnll)))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-12
    assert (results[0][0][targets < 0] == 0).all()


def test_no_targets_gives_zeros_and_zero_gradients() -> None:
    hidden, weight, targets, dnll = _inputs()
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    nll = head_cross_entropy(h, w, torch.full_like(targets, -1))
    dh, dw = torch.autograd.grad(nll, (h, w), dnll)
    assert not nll.any()
    assert not dh.any()
    assert not dw.any()


def test_peak_memory_never_holds_the_logits() -> None:
    """Every tensor made is at most one chunk x V (or a gradient of the inputs' own size)."""
    hidden, weight, targets, _ = _inputs(tokens=400, vocab=300, width=8)
    sizes = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    h, w = hidden.requires_grad_(), weight.requires_grad_()
    with Spy():
        head_cross_entropy(h, w, targets, chunk=16).sum().backward()
    assert max(sizes) <= max(16 * 300, hidden.numel(), weight.numel())


def test_vocabulary_in_shards_equals_whole() -> None:
    """Two shards whose reductions see each other, run in two threads as two ranks would."""
    import threading

    hidden, weight, targets, dnll = _inputs()
    want = head_cross_entropy_reference(hidden, weight, targets)
    barrier, slots = threading.Barrier(2), [None, None]

    def reducer(rank: int, op):
        def reduce(x: torch.Tensor) -> torch.Tensor:
            slots[rank] = x.clone()
            barrier.wait()
            out = op(slots[0], slots[1])
            barrier.wait()
            return out

        return reduce

    results: dict[int, tuple[torch.Tensor, ...]] = {}

    def run(rank: int) -> None:
        h, w = hidden.clone().requires_grad_(), weight[rank * 25 : rank * 25 + 25].clone().requires_grad_()
        nll = head_cross_entropy(
            h, w, targets, chunk=9, vocab_start=rank * 25,
            reduce_max=reducer(rank, torch.maximum), reduce_sum=reducer(rank, torch.add),
        )  # fmt: skip
        forward[rank] = nll.detach()
        pending[rank] = (nll, h, w)

    forward: dict[int, torch.Tensor] = {}
    pending: dict[int, tuple[torch.Tensor, ...]] = {}
    for phase in ("forward", "backward"):

        def work(rank: int, phase: str = phase) -> None:
            if phase == "forward":
                run(rank)
            else:
                nll, *_ = pending[rank]
                fn = nll.grad_fn
                results[rank] = tuple(
                    g for g in fn.apply(dnll) if g is not None
                )  # autograd's own thread is shared

        threads = [threading.Thread(target=work, args=(r,)) for r in (0, 1)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    dh, dw = torch.autograd.grad(head_cross_entropy_reference(h, w, targets), (h, w), dnll)
    assert (forward[0] - want).abs().max() < 1e-12
    assert torch.equal(forward[0], forward[1])
    assert (results[0][0] - dh).abs().max() < 1e-12
    assert (torch.cat([results[0][1], results[1][1]]) - dw).abs().max() < 1e-12
