"""The vocabulary-parallel head on gloo ranks against whole logits in one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ringweave.kernels.cross_entropy import head_cross_entropy_reference
from ringweave.parallel.spawn import run_ranks
from ringweave.parallel.vocab import VocabParallelCrossEntropy

TOKENS, WIDTH = 37, 12
#: Sizes of the vocabulary: one that 2 and 3 divide, one that neither does, one with an empty third shard.
VOCABS = (48, 49, 4)
HOW = ("unknown", "expected", "multiple", "mismatch", "none")


def _inputs(vocab: int, dtype: torch.dtype):
    g = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(TOKENS, WIDTH, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, WIDTH, generator=g, dtype=torch.float64)
    targets = torch.randint(0, vocab, (TOKENS,), generator=g)
    targets[::5] = -1
    dnll = torch.rand(TOKENS, generator=g, dtype=torch.float64)
    dnll[3::7] = 0
    return (
        hidden.to(dtype),
        weight.to(dtype),
        targets,
        dnll.to(torch.float64 if dtype.itemsize == 8 else torch.float32),
    )


class _Counted:
    """Counts what a rank asks of the others."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.real = dist.all_gather, dist.all_reduce

    def __enter__(self) -> _Counted:
        def gather(parts, x, **kw):
            self.calls.append(("gather", x.numel()))
            return self.real[0](parts, x, **kw)

        def reduce(x, **kw):
            self.calls.append(("reduce", x.numel()))
            return self.real[1](x, **kw)

        dist.all_gather, dist.all_reduce = gather, reduce
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather, dist.all_reduce = self.real


def _case(vocab: int, how: str, dtype: torch.dtype, chunk: int, mesh: Any) -> dict[str, Any]:
    hidden, weight, targets, dnll = _inputs(vocab, dtype)
    if how == "none":
        targets = torch.full_like(targets, -1)
    expected = {"unknown": None, "multiple": dnll * 3.1, "mismatch": dnll.square()}.get(how, dnll)
    h = hidden.requires_grad_()
    w = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None).requires_grad_()
    with _Counted() as seen:
        nll = VocabParallelCrossEntropy(mesh.get_group())(h, w, targets, chunk=chunk, expected=expected)
        nll.backward(dnll)
    assert isinstance(w.grad, DTensor)
    return {
        "nll": _array(nll.detach()), "dhidden": _array(h.grad), "dweight": _array(w.grad.full_tensor()),
        "calls": seen.calls, "rows": w.to_local().shape[0],
    }  # fmt: skip


def _array(x: torch.Tensor) -> NDArray[np.float64]:
    """Results travel as arrays: a tensor would live in its process's shared memory, which ends with it."""
    return x.double().numpy()


CASES = [
    *((vocab, how, "float64", 7) for vocab in VOCABS for how in HOW),
    *((49, how, "float64", 512) for how in ("unknown", "expected")),
    *((49, how, dtype, 7) for how in ("unknown", "expected") for dtype in ("float32", "bfloat16")),
]


def _all_cases() -> dict[tuple[Any, ...], dict[str, Any]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        (vocab, how, dtype, chunk): _case(vocab, how, getattr(torch, dtype), chunk, mesh)
        for vocab, how, dtype, chunk in CASES
    }


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_sharded_vocabulary_equals_whole_logits(world: int) -> None:
    """Even and uneven shards, one without rows; whatever comes back; and the same collectives on every rank."""
    results = run_ranks(world, _all_cases)
    limits = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 4e-2}
    for key in results[0]:
        vocab, how, dtype, _chunk = key
        hidden, weight, targets, dnll = _inputs(vocab, getattr(torch, dtype))
        if how == "none":
            targets = torch.full_like(targets, -1)
        h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
        nll = head_cross_entropy_reference(h, w, targets)
        nll.backward(dnll.double())
        want = {"nll": _array(nll.detach()), "dhidden": _array(h.grad), "dweight": _array(w.grad)}
        for rank, got in enumerate(r[key] for r in results):
            for name, value in want.items():
                scale = 1.0 if dtype != "bfloat16" else max(1.0, float(np.abs(value).max()))
                error = float(np.abs(got[name] - value).max()) / scale
                assert error < limits[dtype], (key, rank, name, error)
            assert np.array_equal(got["nll"], results[0][key]["nll"])
            assert np.array_equal(got["dhidden"], results[0][key]["dhidden"])
            assert got["calls"] == results[0][key]["calls"]
        assert sum(r[key]["rows"] for r in results) == vocab
    if world > 1:
        _check_collectives({how: results[0][48, how, "float64", 7]["calls"] for how in HOW})


def _check_collectives(calls: dict[str, list[tuple[str, int]]]) -> None:
    """One gather a call, or one a chunk where the forward makes gradients; one reduction of dhidden a call."""
    targets, dnll = _inputs(48, torch.float64)[2:]
    live = int(((targets >= 0) & (dnll != 0)).sum())
    rest = int((targets >= 0).sum()) - live
    sum_of_dhidden = ("reduce", live * WIDTH)
    assert calls["unknown"] == [("gather", 2 * (live + rest)), sum_of_dhidden]
    chunks = [7] * (live // 7) + ([live % 7] if live % 7 else [])
    for how in ("expected", "multiple", "mismatch"):
        assert calls[how] == [*(("gather", 2 * n) for n in (*chunks, rest)), sum_of_dhidden]
