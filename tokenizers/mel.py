"""Mel features of sound by torchaudio, for models that listen and do not speak (no ids, no way back)."""

from __future__ import annotations

from math import gcd

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.audio import resample
from ringweave.tokenizers.errors import DataError

FLOOR = 1e-10  # power of a band below which all is silence: its logarithm is -23.03
MAX_PHASES = (
    1000  # of torchaudio's resampling, which holds the square of them; beyond, that of `audio.py` is used
)


def mel_features(
    samples: NDArray[np.int16], rate: int, *, bands: int = 80, frames_per_second: int = 100
) -> NDArray[np.float32]:
    """Natural logarithm of mel band power, float32 [frames, bands], of mono int16 [T] at `rate` Hz.

    Frame f is centred on second f / frames_per_second, and ceil(T * frames_per_second / rate) frames begin inside the
    sound. A window is 2.5 hops of a Hann curve, its spectrum the power of the samples over 32768, the bands
    triangles of the HTK mel scale from 0 Hz to half the rate; zeros stand before the start and behind the end. Where
    the rate is no multiple of `frames_per_second`, the sound is resampled to the next one above. Powers below FLOOR
    count as FLOOR. DataError for other arrays, no samples, and more bands than the spectrum can fill.
    """
    if samples.ndim != 1 or samples.dtype != np.int16 or not len(samples) or rate <= 0:
        raise DataError(
            f"audio must be int16 [T] mono, T > 0, got {samples.dtype} {list(samples.shape)} at {rate} Hz"
        )
    hop = -(-rate // frames_per_second) if frames_per_second > 0 else 0
    window = 5 * hop // 2
    if bands < 1 or bands > window // 4:
        raise DataError(
            f"{bands} mel bands of {window} samples",
            why=f"{frames_per_second} frames a second at {rate} Hz leave room for {window // 4}",
            fix="ask for fewer bands or frames, or resample the sound before",
        )
    import torch
    from torchaudio.transforms import MelSpectrogram, Resample

    count = -(-len(samples) * frames_per_second // rate)
    even = hop * frames_per_second
    large = even // gcd(rate, even) > MAX_PHASES
    if large:
        samples = resample(samples, rate, even)
    wave = torch.from_numpy(samples.astype(np.float32) / 32768)
    with torch.no_grad():
        if even != rate and not large:
            wave = Resample(rate, even)(wave)
        size = 1 << (window - 1).bit_length()
        spectrum = MelSpectrogram(
            even, n_fft=size, win_length=window, hop_length=hop, n_mels=bands, pad_mode="constant"
        )
        power = spectrum(wave)[:, :count]
        return np.ascontiguousarray(power.clamp(min=FLOOR).log().T.numpy())
