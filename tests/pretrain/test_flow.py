"""Flow matching numbers: distributions of levels, shifts against diffusers' scheduler, keyed by sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from ringweave.pretrain.flow import (
    FlowSettings,
    dropped,
    level_of,
    loss_weight,
    noise_of,
    noised,
    raw_level,
    shift_of,
    shifted,
)

PLAIN = {"shift": "none"}


def levels(count: int = 4000, tokens: int = 256, **more: object) -> np.ndarray:
    settings = FlowSettings(**more)  # type: ignore[arg-type]
    return np.array([level_of(7, f"s{i}", 0, tokens, settings) for i in range(count)])


def test_levels_follow_their_sampler() -> None:
    """Against the closed distributions: shares below 0.1 ... 0.9 within 3 standard errors."""
    n = 4000
    edges = np.linspace(0.1, 0.9, 9)
    normal = [0.5 * (1 + math.erf(math.log(e / (1 - e)) / math.sqrt(2))) for e in edges]
    u = (np.arange(200_000) + 0.5) / 200_000
    mode = 1 - u - 1.29 * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    wanted = {
        "uniform": edges,
        "logit_normal": np.array(normal),
        "mode": np.array([(mode < e).mean() for e in edges]),
    }
    for name, shares in wanted.items():
        found = np.array([(levels(n, sampler=name, **PLAIN) < e).mean() for e in edges])
        assert (np.abs(found - shares) <= 3.5 * np.sqrt(shares * (1 - shares) / n)).all(), name


def test_shifts_are_those_of_the_scheduler() -> None:
    """Exponential with mu of the image's tokens, and linear, as diffusers applies them."""
    raw = np.array([0.1, 0.5, 0.9])
    for kind, settings in (("exponential", FlowSettings()), ("linear", FlowSettings(shift="linear"))):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        for tokens in (256, 1600, 8192):
            mu = (
                0.5 + 0.4 * (tokens - 256) / (8192 - 256)
                if kind == "exponential"
                else math.sqrt(tokens / 256)
            )
            theirs = scheduler.time_shift(mu, 1.0, raw)
            ours = [shifted(float(s), shift_of(tokens, settings)) for s in raw]
            assert np.allclose(ours, theirs, atol=1e-12)
    assert shift_of(1600, FlowSettings(shift="linear")) == 2.5  # the layered model at 640 x 640
    assert shift_of(999, FlowSettings(shift="none")) == 1.0


def test_larger_documents_get_more_noise() -> None:
    assert levels(400, tokens=8192).mean() > levels(400, tokens=256).mean() + 0.05


def test_draws_belong_to_a_sample_and_to_nothing_else() -> None:
    settings = FlowSettings()
    again = [level_of(7, "k", 3, 64, settings) for _ in range(2)]
    assert again[0] == again[1]
    others = {level_of(*key, 64, settings) for key in ((8, "k", 3), (7, "j", 3), (7, "k", 4))}
    assert len({again[0], *others}) == 4
    assert (noise_of(7, "k", 3, 0, (4, 5)) == noise_of(7, "k", 3, 0, (4, 5))).all()
    pair = np.stack([noise_of(7, "k", 3, layer, (4000,)) for layer in (0, 1)])
    assert abs(np.corrcoef(pair)[0, 1]) < 0.06 and abs(pair.std() - 1) < 0.03


def test_text_is_dropped_at_its_rate_document_by_document() -> None:
    """10,000 documents within 3 sigma of 0.15, and neighbours independent."""
    found = np.array([dropped(0, f"s{i}", 0, 0.15) for i in range(10_000)])
    assert abs(found.mean() - 0.15) <= 3 * math.sqrt(0.15 * 0.85 / 10_000)
    both = (found[1:] & found[:-1]).mean()
    assert abs(both - 0.15**2) <= 3 * math.sqrt(0.15**2 * (1 - 0.15**2) / 10_000)
    assert not any(dropped(0, f"s{i}", 0, 0.0) for i in range(50))


def test_the_road_from_data_to_noise() -> None:
    """x + s·v, and at the end the noise: the sign of diffusers' scale_noise."""
    latents, noise = (np.random.default_rng(n).normal(size=(3, 4)).astype(np.float32) for n in (0, 1))
    x, velocity = noised(latents, noise, 0.3)
    assert np.allclose(x, latents + 0.3 * velocity, atol=1e-6)
    assert np.allclose(noised(latents, noise, 1.0)[0], noise)
    assert np.allclose(noised(latents, noise, 0.0)[0], latents)


@pytest.mark.parametrize("weighting", ["none", "bell"])
def test_weights_have_mean_one(weighting: str) -> None:
    settings = FlowSettings(weighting=weighting)  # type: ignore[arg-type]
    grid = (np.arange(10_000) + 0.5) / 10_000
    assert abs(np.mean([loss_weight(float(s), settings) for s in grid]) - 1) < 1e-3


def test_levels_stay_inside() -> None:
    for sampler in ("uniform", "logit_normal", "mode"):
        settings = FlowSettings(sampler=sampler)  # type: ignore[arg-type]
        for u in (0.0, 1 - 1e-12):
            assert 0 < raw_level(u, settings, normal=40.0 * (1 if u else -1)) < 1
