"""Walks from noise to data: solvers against closed forms and diffusers, guidance by hand, packs against documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ringweave.pretrain import verify_dit
from ringweave.pretrain.dit_sample import SampleSettings, Wish, guided, sample, schedule, walk
from ringweave.pretrain.flow import FlowSettings
from ringweave.pretrain.models.dit_positions import Grid
from ringweave.pretrain.parallelize import build_model
from ringweave.tokenizers.errors import DataError

States = list[list[np.ndarray[Any, Any]]]
NONE = FlowSettings(shift="none")


def _bend(states: States, levels: Sequence[float]) -> States:
    """dx/ds = x, whose walk from 1 to 0 multiplies by 1/e."""
    return states


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_errors_fall_with_the_order_of_the_solver(solver: Any, order: int) -> None:
    def error(steps: int) -> float:
        start = [[np.ones((1, 1), np.float32)]]
        levels = schedule(steps, 64, NONE)
        # Both end at half the way, where Heun needs no last Euler step.
        found = walk(_bend, start, [[1.0 - i / (2 * steps) for i in range(steps + 1)] + [0.5]], solver=solver)
        assert len(levels) == steps + 1
        return abs(float(found[0][0][0, 0]) - math.exp(-0.5))

    assert error(8) / error(16) == pytest.approx(2**order, rel=0.1)


def test_one_euler_step_is_the_scheduler_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    levels = schedule(4, 256, FlowSettings(shift="exponential"))
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.5)
    assert np.allclose(theirs.sigmas.numpy(), levels, atol=1e-6)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    states: States = [[x.numpy()]]
    for t in theirs.timesteps:
        x = theirs.step(torch.sin(x), t, x).prev_sample
    ours = walk(lambda s, levels: [[np.sin(v) for v in vs] for vs in s], states, [levels])
    assert np.abs(ours[0][0] - x.numpy()).max() < 1e-5


def test_guidance_by_hand() -> None:
    c, u = np.array([[3.0, 4.0]], np.float32), np.array([[3.0, 0.0]], np.float32)
    plain = guided(c, u, SampleSettings(guidance=2.0, rescale=False))
    assert plain.tolist() == [[3.0, 8.0]]
    scaled = guided(c, u, SampleSettings(guidance=2.0))
    assert np.allclose(np.linalg.norm(scaled), 5.0)
    assert np.allclose(scaled[0] / plain[0], 5.0 / math.sqrt(73))


def _wishes() -> list[Wish]:
    rng = np.random.default_rng(0)
    given = rng.standard_normal((6, verify_dit.CHANNELS), dtype=np.float32)
    return [
        Wish("a", [31, 32, 33], [Grid(2, 3, condition=True), Grid(2, 3), Grid(3, 3)], [given]),
        Wish("b", [], [Grid(5, 1)]),
        Wish("c", [40], [Grid(2, 2, frames=2)]),
    ]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_documents_come_out_alike_alone_and_in_a_pack(solver: Any) -> None:
    model = build_model(verify_dit.SHAPE, None, seed=1).eval()
    settings = SampleSettings(steps=3, solver=solver, seed=4)
    wishes = _wishes()
    together = sample(model, wishes, verify_dit.SETTINGS, settings)
    assert [[len(x) for x in own] for own in together] == [[6, 9], [5], [8]]
    for wish, found in zip(wishes, together):
        (alone,) = sample(model, [wish], verify_dit.SETTINGS, settings)
        for a, b in zip(found, alone):
            assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()
    other = sample(model, wishes, verify_dit.SETTINGS, replace(settings, guidance=1.0))
    assert np.abs(other[0][0] - together[0][0]).max() > 1e-3  # words matter
    assert np.abs(other[1][0] - together[1][0]).max() < 1e-5  # where there are none, guidance does not


def test_the_name_of_a_document_is_its_noise() -> None:
    model = build_model(verify_dit.SHAPE, None, seed=1).eval()
    twins = [Wish("a", [], [Grid(2, 2)]), Wish("b", [], [Grid(2, 2)])]
    first, second = sample(model, twins, verify_dit.SETTINGS, SampleSettings(steps=1, guidance=1.0))
    assert np.abs(first[0] - second[0]).max() > 0.1


def test_wishes_that_cannot_be_granted() -> None:
    with pytest.raises(DataError, match="a layer to make"):
        Wish("x", [], [Grid(1, 1, condition=True)], [np.zeros((1, 4), np.float32)])
    with pytest.raises(DataError, match="given layers"):
        Wish("x", [], [Grid(1, 2, condition=True), Grid(1, 1)])
