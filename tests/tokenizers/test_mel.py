"""Mel features against the same formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizer_samples import tone

from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.mel import FLOOR, mel_features


def by_formula(samples: np.ndarray, rate: int, bands: int, per_second: int) -> np.ndarray:
    """float64 [frames, bands]; the rate is a multiple of `per_second`."""
    hop = rate // per_second
    window, size = 5 * hop // 2, 1
    while size < window:
        size *= 2
    hann = np.zeros(size)
    first = (size - window) // 2
    hann[first : first + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    padded = np.pad(samples / 32768, size)
    count = -(-len(samples) // hop)
    starts = size + hop * np.arange(count) - size // 2
    frames = np.stack([padded[start : start + size] * hann for start in starts])
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    bins = np.arange(size // 2 + 1) * rate / size
    rising = (bins[:, None] - edges[None, :-2]) / np.diff(edges)[None, :-1]
    falling = (edges[None, 2:] - bins[:, None]) / np.diff(edges)[None, 1:]
    return np.log(np.maximum(power @ np.maximum(0, np.minimum(rising, falling)), FLOOR))


@pytest.mark.parametrize(
    ("rate", "bands", "per_second"), [(16_000, 80, 100), (48_000, 128, 100), (8000, 20, 50)]
)
def test_features_are_those_of_the_formulas(rate: int, bands: int, per_second: int) -> None:
    noise = np.random.default_rng(0).normal(0, 3000, rate // 3)
    samples = (tone(1, 0.5, rate)[: len(noise)] + noise).astype(np.int16)
    got = mel_features(samples, rate, bands=bands, frames_per_second=per_second)
    assert got.dtype == np.float32
    expected = by_formula(samples, rate, bands, per_second)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 2e-3


def test_silence_is_the_floor_and_a_tone_is_where_it_sounds() -> None:
    silent = mel_features(np.zeros(16_000, np.int16), 16_000)
    assert silent.shape == (100, 80)
    np.testing.assert_allclose(silent, np.log(FLOOR), rtol=1e-6)
    time = np.arange(16_000) / 16_000
    samples = (np.sin(2 * np.pi * 1000 * time) * 9000 * (time >= 0.5)).astype(np.int16)
    got = mel_features(samples, 16_000)
    centres = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82)[1:-1] / 2595) - 1)
    assert abs(centres[got[70].argmax()] - 1000) < 60
    np.testing.assert_allclose(got[:48], np.log(FLOOR), rtol=1e-6)
    assert got[52:].max(axis=1).min() > 0


@pytest.mark.parametrize("length", [1, 159, 160, 161, 441, 16_000])
@pytest.mark.parametrize("rate", [16_000, 11_025, 22_050, 16_001])
def test_every_length_and_rate(rate: int, length: int) -> None:
    got = mel_features(np.full(length, 1000, np.int16), rate, bands=40)
    assert got.shape == (-(-length * 100 // rate), 40)
    assert np.isfinite(got).all()


def test_an_uneven_rate_gives_near_the_same() -> None:
    times = np.arange(48_000) / 48_000
    wave = np.sin(2 * np.pi * 700 * times) * 9000 + np.sin(2 * np.pi * 1900 * times) * 4000
    even = mel_features(wave[::3].astype(np.int16), 16_000, bands=30)
    odd_times = np.arange(22_050) / 22_050
    odd_wave = np.sin(2 * np.pi * 700 * odd_times) * 9000 + np.sin(2 * np.pi * 1900 * odd_times) * 4000
    odd = mel_features(odd_wave.astype(np.int16), 22_050, bands=30)
    assert even.shape == odd.shape == (100, 30)
    for hertz in (700, 1900):
        tops = []
        for features, rate in ((even, 16_000), (odd, 22_100)):
            points = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), 32)[1:-1]
            place = np.abs(points - 2595 * np.log10(1 + hertz / 700)).argmin()
            tops.append(features[50, place - 1 : place + 2].max() > features[50].mean() + 3)
        assert all(tops)


def test_what_cannot_be_done_is_refused() -> None:
    good = np.ones(16_000, np.int16)
    for samples in (good[:0], good[None], good.astype(np.float32)):
        with pytest.raises(DataError, match="audio must be int16"):
            mel_features(samples, 16_000)
    with pytest.raises(DataError, match="audio must be int16"):
        mel_features(good, 0)
    for options in ({"bands": 0}, {"bands": 200}, {"frames_per_second": 0}, {"frames_per_second": 4000}):
        with pytest.raises(DataError, match="mel bands"):
            mel_features(good, 16_000, **options)
