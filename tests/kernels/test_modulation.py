"""Modulation and gates by runs against the forms that gather a row a token: values and gradients."""

from __future__ import annotations

import pytest
import torch

from ringweave.kernels.modulation import gate_reference, gated, modulate, modulate_reference, runs_of


def test_runs_are_those_of_equal_neighbours() -> None:
    segment = torch.tensor([3, 3, 0, 0, 0, 3, 1])
    assert runs_of(segment) == ((0, 2, 3), (2, 5, 0), (5, 6, 3), (6, 7, 1))
    assert runs_of(segment[:0]) == ()


@pytest.mark.parametrize("segment", [[0, 0, 0], [2, 2, 0, 1, 1, 1, 2], []])
def test_runs_equal_lookups_with_all_gradients(segment: list[int]) -> None:
    """fp64; a row that comes twice, one that never comes, no token at all."""
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor(segment, dtype=torch.int64)

    def values() -> list[torch.Tensor]:
        generator.manual_seed(1)
        shapes = [(len(index), 5), (4, 5), (4, 5), (len(index), 5)]
        return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]

    upstream = torch.randn(len(index), 5, dtype=torch.float64, generator=generator)
    for ours, plain, which in (
        (
            lambda v: modulate(v[0], v[1], v[2], runs_of(index)),
            lambda v: modulate_reference(*v[:3], index),
            3,
        ),
        (
            lambda v: gated(v[0], v[1], v[3], runs_of(index)),
            lambda v: gate_reference(v[0], v[1], v[3], index),
            4,
        ),
    ):
        mine, theirs = values(), values()
        a, b = ours(mine), plain(theirs)
        assert torch.allclose(a, b, atol=1e-14)
        (a * upstream).sum().backward()
        (b * upstream).sum().backward()
        for x, y in zip(mine, theirs):
            assert (x.grad is None) == (y.grad is None)
            if x.grad is not None and y.grad is not None:
                assert torch.allclose(x.grad, y.grad, atol=1e-13), which
