"""Chunked head + cross-entropy against whole logits, with and without gradients made in the forward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ringweave.kernels.cross_entropy import head_cross_entropy, head_cross_entropy_reference

CHUNKS = [1, 7, 16, 512]


def _inputs(tokens: int = 37, vocab: int = 50, width: int = 12, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[::5] = -1
    dnll = torch.rand(tokens, generator=g, dtype=torch.float64)
    dnll[3::7] = 0
    return hidden.to(dtype), weight.to(dtype), targets, dnll.to(dtype)


def _run(fn, hidden: torch.Tensor, weight: torch.Tensor, dnll: torch.Tensor):
    """(nll, dhidden, dweight) of fn."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    nll = fn(h, w)
    return (nll.detach(), *torch.autograd.grad(nll, (h, w), dnll))


class _Spy(TorchDispatchMode):
    """Counts the matmuls and notes the size of every tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.matmuls, self.sizes = 0, [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.matmuls += func.overloadpacket._qualified_op_name in ("aten::mm", "aten::addmm_")
        if isinstance(out, torch.Tensor):
            self.sizes.append(out.numel())
        return out


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("known", [None, 1.0, 0.5, 3.7, -0.3])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_whole_logits_with_gradients(chunk: int, known, dtype: torch.dtype, limit: float) -> None:
    """`known`: what the expected gradient is multiplied by to give the one handed back; None: nothing expected."""
    hidden, weight, targets, dnll = _inputs(dtype=dtype)
    expected = None if known is None else dnll / known
    got = _run(
        lambda h, w: head_cross_entropy(h, w, targets, chunk=chunk, expected=expected), hidden, weight, dnll
    )
    want = _run(
        lambda h, w: head_cross_entropy_reference(h, w, targets),
        hidden.double(),
        weight.double(),
        dnll.double(),
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() < limit
    assert not got[0][targets < 0].any()


@pytest.mark.parametrize("change", ["another", "one", "zero_became_live", "nan"])
def test_a_gradient_that_was_not_expected_is_answered_by_recomputing(change: str) -> None:
    hidden, weight, targets, expected = _inputs()
    dnll = expected.clone()
    live = torch.nonzero((targets >= 0) & (expected != 0)).squeeze(1)
    dead = torch.nonzero((targets >= 0) & (expected == 0)).squeeze(1)
    if change == "another":
        dnll = torch.rand(dnll.shape, dtype=dnll.dtype)
    elif change == "one":
        dnll[live[2]] *= 1 + 1e-9
    elif change == "zero_became_live":
        dnll[dead[0]] = 0.25
    else:
        expected = torch.full_like(expected, float("nan"))
    got = _run(
        lambda h, w: head_cross_entropy(h, w, targets, chunk=7, expected=expected), hidden, weight, dnll
    )
    want = _run(lambda h, w: head_cross_entropy_reference(h, w, targets), hidden, weight, dnll)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_expected_gradients_take_three_matmuls_and_unknown_ones_four() -> None:
    hidden, weight, targets, dnll = _inputs(tokens=40)
    chunks = -(-int(((targets >= 0) & (dnll != 0)).sum()) // 8)
    scored_only = -(-int(((targets >= 0) & (dnll == 0)).sum()) // 8)
    counts = {}
    for name, expected in (("expected", dnll), ("unknown", None)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with _Spy() as spy:
            head_cross_entropy(h, w, targets, chunk=8, expected=expected).backward(dnll)
        counts[name] = spy.matmuls
    assert counts["expected"] == 3 * chunks + scored_only
    assert counts["unknown"] == -(-int((targets >= 0).sum()) // 8) + 3 * chunks


def test_scoring_without_gradients_makes_none() -> None:
    hidden, weight, targets, dnll = _inputs()
    with torch.no_grad(), _Spy() as spy:
        head_cross_entropy(hidden, weight.requires_grad_(), targets, chunk=512, expected=dnll)
    assert spy.matmuls == 1


@pytest.mark.parametrize("with_expected", [False, True])
def test_gradcheck(with_expected: bool) -> None:
    """The whole Jacobian by finite differences, and so also gradients that were not the expected ones."""
    hidden, weight, targets, dnll = _inputs(tokens=6, vocab=5, width=3)
    expected = dnll if with_expected else None
    assert torch.autograd.gradcheck(
        lambda h, w: head_cross_entropy(h, w, targets, chunk=4, expected=expected),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("with_expected", [False, True])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient(frozen: str, with_expected: bool) -> None:
    hidden, weight, targets, dnll = _inputs()
    h, w = hidden.clone(), weight.clone()
    live = w if frozen == "hidden" else h
    live.requires_grad_()
    nll = head_cross_entropy(h, w, targets, chunk=7, expected=dnll if with_expected else None)
    (got,) = torch.autograd.grad(nll, (live,), dnll)
    want = _run(lambda h, w: head_cross_entropy_reference(h, w, targets), hidden, weight, dnll)
    assert (got - want[2 if frozen == "hidden" else 1]).abs().max() < 1e-12


def test_a_kept_graph_gives_the_same_gradients_twice() -> None:
    hidden, weight, targets, dnll = _inputs()
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    nll = head_cross_entropy(h, w, targets, chunk=7, expected=dnll)
    first = torch.autograd.grad(nll, (h, w), 2 * dnll, retain_graph=True)
    again = torch.autograd.grad(nll, (h, w), dnll, retain_graph=True)
    other = torch.autograd.grad(nll, (h, w), dnll.square())
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, 2 * b)
    want = torch.autograd.grad(head_cross_entropy_reference(h, w, targets), (h, w), dnll.square())
    for a, b in zip(other, want, strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("with_expected", [False, True])
def test_no_targets_gives_zeros_and_zero_gradients(with_expected: bool) -> None:
    hidden, weight, targets, dnll = _inputs()
    nothing = torch.full_like(targets, -1)
    expected = dnll if with_expected else None
    for values in _run(
        lambda h, w: head_cross_entropy(h, w, nothing, expected=expected), hidden, weight, dnll
    ):
        assert not values.any()
    for values in _run(
        lambda h, w: head_cross_entropy(h, w, nothing[:0], expected=expected if expected is None else dnll[:0]),
        hidden[:0], weight, dnll[:0],
    ):  # fmt: skip
        assert not values.any()


@pytest.mark.parametrize("with_expected", [False, True])
def test_nan_in_rows_without_a_target_poisons_nothing(with_expected: bool) -> None:
    hidden, weight, targets, dnll = _inputs()
    broken, returned = hidden.clone(), dnll.clone()
    broken[targets < 0], returned[targets < 0] = float("nan"), float("nan")
    got = _run(
        lambda h, w: head_cross_entropy(h, w, targets, chunk=7, expected=dnll if with_expected else None),
        broken, weight, returned,
    )  # fmt: skip
    want = _run(lambda h, w: head_cross_entropy_reference(h, w, targets), hidden, weight, dnll)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_losses_of_hundreds_of_nats_stay_exact() -> None:
    """Logits of ±400: exp of them overflows fp32 unless each is taken relative to its row's largest."""
    hidden, weight, targets, dnll = _inputs(dtype=torch.float32)
    hidden = hidden * 60
    got = _run(lambda h, w: head_cross_entropy(h, w, targets, expected=dnll), hidden, weight, dnll)
    want = _run(
        lambda h, w: head_cross_entropy_reference(h, w, targets),
        hidden.double(),
        weight.double(),
        dnll.double(),
    )
    assert want[0].max() > 200
    for a, b in zip(got, want, strict=True):
        # Rounding a logit of 400 changes its probability by 400 x 2^-24.
        assert ((a - b).abs() / b.abs().max()).max() < 2e-5


def test_bf16_sums_the_weight_gradient_in_fp32() -> None:
    """600 chunks of one row that all push the same way: a bf16 sum stops growing at 256."""
    tokens = 600
    hidden = torch.ones(tokens, 8, dtype=torch.bfloat16)
    weight = torch.zeros(2, 8, dtype=torch.bfloat16)
    dnll = torch.ones(tokens)
    for expected in (dnll, None):
        nll, dhidden, dweight = _run(
            lambda h, w, e=expected: head_cross_entropy(
                h, w, torch.zeros(tokens, dtype=torch.int64), chunk=1, expected=e
            ),
            hidden, weight, dnll,
        )  # fmt: skip
        assert nll.dtype == torch.float32
        assert dhidden.dtype == dweight.dtype == torch.bfloat16
        assert (dweight[0].float() == -tokens / 2).all()


def test_a_narrower_expected_is_not_taken_for_the_gradient() -> None:
    """A wrapper that casts it to bf16 would round every coefficient."""
    hidden, weight, targets, dnll = _inputs(dtype=torch.float32)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    got = _run(lambda h, w: head_cross_entropy(h, w, targets, expected=dnll.bfloat16()), hidden, weight, dnll)
    want = _run(lambda h, w: head_cross_entropy(h, w, targets), hidden, weight, dnll)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight, targets, dnll = _inputs()
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        head_cross_entropy(hidden, weight, targets, chunk=0)
    for bad in (
        lambda: head_cross_entropy(hidden[1:], weight, targets),
        lambda: head_cross_entropy(hidden, weight[:, 1:], targets),
        lambda: head_cross_entropy(hidden, weight, targets, expected=dnll[1:]),
    ):
        with pytest.raises(ValueError, match="want hidden"):
            bad()


@pytest.mark.parametrize("with_expected", [False, True])
def test_no_tensor_is_larger_than_one_chunk_of_logits(with_expected: bool) -> None:
    hidden, weight, targets, dnll = _inputs(tokens=400, vocab=300, width=8)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    with _Spy() as spy:
        head_cross_entropy(h, w, targets, chunk=16, expected=dnll if with_expected else None).backward(dnll)
    assert max(spy.sizes) <= max(16 * 300, hidden.numel(), weight.numel())


_PEAK = """
import re, sys, torch
from pathlib import Path
from ringweave.kernels.cross_entropy import head_cross_entropy
torch.set_num_threads(1)
tokens, width, vocab = int(sys.argv[1]), 8, 20000
hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
targets, dnll = torch.arange(tokens) % vocab, torch.ones(tokens)
def step(n):
    expected = dnll[:n] if sys.argv[2] == "1" else None
    head_cross_entropy(hidden[:n], weight, targets[:n], chunk=64, expected=expected).backward(dnll[:n])
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
step(1)
before = peak()
step(tokens)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("with_expected", [False, True])
def test_25_peak_memory_of_head_and_loss_is_independent_of_sequence_length(with_expected: bool) -> None:
    """Four times the tokens: the step's own peak, in KiB, grows by less than a tenth of what their logits take.

    As torchtitan's issues 996 and 4514 ask of a chunked head and loss. (A child's ru_maxrss would start at its
    parent's, hence VmHWM.)
    """
    few, many = 512, 2048
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", _PEAK, str(tokens), str(int(with_expected))],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for tokens in (few, many)
    ]
    chunk = 64 * 20000 * 4 // 1024
    assert peaks[0] > chunk // 2  # the measurement sees a chunk at all
    assert peaks[1] - peaks[0] < (many - few) * 20000 * 4 // 1024 // 10
    assert peaks[1] < 6 * chunk
