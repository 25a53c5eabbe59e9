"""Sound from strangers: the right samples at the right level, or a DataError that names the place and the reason."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile
from media_samples import WHERE, sound
from tokenizer_samples import tone

from ringweave.tokenizers import ogg
from ringweave.tokenizers.audio import resample
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.media import decode_audio
from ringweave.tokenizers.members import as_mono

RNG = np.random.default_rng(3)


def refused(data: bytes, why: str) -> None:
    with pytest.raises(DataError, match=why) as caught:
        decode_audio(data, where=WHERE)
    assert caught.value.where == WHERE


def column(data: bytes) -> list[int]:
    samples, _ = decode_audio(data, where=WHERE)
    assert samples.dtype == np.int16
    assert samples.shape[1] == 1
    return list(samples[:, 0].tolist())


def wave(seconds: float, rate: int, hertz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


# widths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 192_000])
@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_16_bits_of_any_rate_are_exact(form: str, rate: int) -> None:
    samples = RNG.integers(-32768, 32768, (1000, 2)).astype(np.int16)
    got, found = decode_audio(sound(samples, rate, form, "PCM_16"), where=WHERE)
    assert found == rate
    np.testing.assert_array_equal(got, samples)


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_24_bits_are_rounded(form: str) -> None:
    wide = RNG.integers(-(1 << 23), 1 << 23, 4000)
    wide[:4] = 0, 127, 129, -(1 << 23)
    expected = np.clip([round(int(v) / 256) for v in wide], -32768, 32767)
    assert column(sound((wide << 8).astype(np.int32), 48_000, form, "PCM_24")) == expected.tolist()


def test_32_bits_8_bits_and_companded() -> None:
    wide = RNG.integers(-(1 << 31), 1 << 31, 4000)
    expected = np.clip([round(int(v) / 65536) for v in wide], -32768, 32767)
    assert column(sound(wide.astype(np.int32), 8000, "WAV", "PCM_32")) == expected.tolist()
    eight = (np.arange(-128, 128) << 8).astype(np.int16)
    for form, subtype in (("WAV", "PCM_U8"), ("FLAC", "PCM_S8")):
        assert column(sound(eight, 8000, form, subtype)) == eight.tolist()
    loud = (np.arange(-4, 5) * 8000).astype(np.int16)
    assert np.abs(np.array(column(sound(loud, 8000, "WAV", "ULAW"))) - loud).max() <= 1024


def test_an_offset_stays() -> None:
    samples = np.full(3000, 1234, np.int16)
    assert set(column(sound(samples, 8000, "FLAC", "PCM_16"))) == {1234}
    assert set(column(sound(samples / 32768, 8000, "WAV", "FLOAT"))) == {1234}
    turned = resample(samples, 8000, 16_000)[200:-200]
    assert np.abs(turned.astype(int) - 1234).max() <= 1


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_within_full_scale_keep_their_level(subtype: str) -> None:
    values = np.array([0.0, 1.0, -1.0, 0.5, -0.25, 1e-9, 0.5 + 0.6 / 32768])
    assert column(sound(values, 8000, "WAV", subtype)) == [0, 32767, -32768, 16384, -8192, 0, 16385]


@pytest.mark.parametrize("peak", [1.0001, 1.5, 3.0, 40_000.0, 1e30])
def test_beyond_full_scale_the_clip_is_turned_down_and_not_clipped(peak: float) -> None:
    values = wave(0.5, 8000, level=peak)
    top = np.abs(values.astype(np.float32)).max()
    got = np.array(column(sound(values.astype(np.float32), 8000, "WAV", "FLOAT")))
    assert np.abs(got - values / top * 32768).max() <= 1.01


def test_what_is_not_finite_is_refused() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        values = np.zeros(3_000_000, np.float32)  # more than is read at a time
        values[-1] = bad
        refused(sound(values, 8000, "WAV", "FLOAT"), "non-finite")


@pytest.mark.parametrize(("form", "subtype"), [("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_lossy_sound_comes_back_near(form: str, subtype: str) -> None:
    values = wave(1.0, 48_000, 440, 0.4)
    got, rate = decode_audio(sound(values, 48_000, form, subtype), where=WHERE)
    assert rate == 48_000
    assert abs(len(got) - len(values)) <= 2400  # MP3 pads
    middle = got[20_000:30_000, 0] / 32768
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(np.argmax(spectrum) * 48_000 / len(middle) - 440) < 5
    assert abs(np.sqrt(2 * (middle**2).mean()) - 0.4) < 0.03


@pytest.mark.parametrize(("form", "subtype"), [("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS")])
def test_lossy_overshoot_is_not_clipped(form: str, subtype: str) -> None:
    square = np.sign(wave(0.5, 44_100, 300)) * 0.999
    data = sound(square, 44_100, form, subtype)
    raw = soundfile.read(io.BytesIO(data), dtype="float64")[0]
    top = np.abs(raw).max()
    assert top > 1.05
    got = np.array(column(data))
    assert np.abs(got - raw / top * 32768).max() <= 1.01


# channels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 6, 8])
def test_every_channel_comes_back_and_mono_is_their_mean(channels: int) -> None:
    samples = RNG.integers(-32768, 32768, (500, channels)).astype(np.int16)
    for form in ("WAV", "FLAC"):
        got, _ = decode_audio(sound(samples, 44_100, form, "PCM_16"), where=WHERE)
        np.testing.assert_array_equal(got, samples)
    assert as_mono(samples).tolist() == [sum(map(int, row)) // channels for row in samples]


# resampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "target"), [(44_100, 16_000), (8000, 16_000), (192_000, 16_000), (16_000, 48_000)]
)
def test_overshoot_of_resampling_is_not_clipped(rate: int, target: int) -> None:
    square = (np.sign(wave(0.5, rate, 300)) * 32767).astype(np.int16)
    half = (square // 2).astype(np.int16)
    loud, quiet = resample(square, rate, target).astype(float), resample(half, rate, target).astype(float)
    assert np.abs(quiet).max() > 1.04 * 16_384  # it does overshoot
    assert np.abs(loud).max() == 32767
    gain = 32767 / np.abs(quiet).max()
    assert np.abs(loud - quiet * gain).max() <= 4


@pytest.mark.parametrize(("rate", "target"), [(8000, 16_000), (192_000, 16_000), (44_100, 24_000)])
def test_a_clip_with_room_keeps_its_level(rate: int, target: int) -> None:
    samples = (wave(0.5, rate, 440, 0.8) * 32767).astype(np.int16)
    got = resample(samples, rate, target)[300:-300]
    expected = (wave(0.5, target, 440, 0.8) * 32767)[300 : 300 + len(got)]
    assert np.abs(got - expected).max() <= 40  # 58 dB below


def test_full_scale_at_the_same_rate_is_not_touched() -> None:
    samples = np.array([32767, -32768, 32767, 0], np.int16)
    np.testing.assert_array_equal(resample(samples, 16_000, 16_000), samples)


# damage --------------------------------------------------------------------------------------------------------


def test_no_samples_are_refused() -> None:
    for form, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("WAV", "FLOAT")):
        refused(sound(np.zeros(0), 16_000, form, subtype), "cannot decode this audio")
    refused(sound(np.zeros(0), 16_000, "WAV", "PCM_16"), "no samples at 16000 Hz")


@pytest.mark.parametrize("form", ["AIFF", "AU", "CAF", "W64", "RF64"])
def test_other_formats_are_named(form: str) -> None:
    refused(sound(tone(1, 0.1), 16_000, form, "PCM_16"), f"format {form}; readable: WAV")


@pytest.mark.parametrize(
    ("rate", "why"), [(1, "1 channels at 1 Hz"), (999, "999 Hz"), (800_000, "800000 Hz")]
)
def test_rates_beyond_the_limits(rate: int, why: str) -> None:
    refused(sound(np.zeros(10), rate, "WAV", "PCM_16"), why)


def test_a_header_that_promises_more() -> None:
    data = bytearray(sound(tone(1, 0.1), 16_000, "WAV", "PCM_16"))
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 0xFFFFFFF0)
    refused(bytes(data), "'data' needs 4294967280 bytes")


@pytest.mark.parametrize(("form", "subtype"), [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS")])
def test_a_flipped_bit_changes_no_sample_unseen(form: str, subtype: str) -> None:
    data = sound(wave(0.3, 16_000) + 0.01 * RNG.standard_normal(4800), 16_000, form, subtype)
    good, _ = decode_audio(data, where=WHERE)
    refusals = 0
    for at in RNG.integers(0, len(data), 200):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(RNG.integers(8))
        try:
            got, _ = decode_audio(bytes(damaged), where=WHERE)
        except DataError:
            refusals += 1
        else:  # in a tag, or in the rate, which FLAC's MD5 does not cover
            np.testing.assert_array_equal(got, good)
    assert refusals > 150


@pytest.mark.parametrize(
    ("form", "subtype"), [("FLAC", "PCM_24"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
)
def test_every_cut_is_seen(form: str, subtype: str) -> None:
    data = sound(wave(0.5, 16_000), 16_000, form, subtype)
    decode_audio(data, where=WHERE)
    for end in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 1]:
        with pytest.raises(DataError):
            decode_audio(data[:end], where=WHERE)


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_frames_of_another_flac_are_not_those_of_this_one(subtype: str) -> None:
    """Every frame is whole and has its right number; only the MD5 tells."""
    one, two = (sound(wave(0.3, 16_000, hertz), 16_000, "FLAC", subtype) for hertz in (300, 500))
    begins = [data.index(b"\xff\xf8") for data in (one, two)]
    mixed = one[: begins[0]] + two[begins[1] :]
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(mixed))[0], soundfile.read(io.BytesIO(two))[0])
    refused(mixed, "not those of its MD5")
    unstated = mixed[:26] + bytes(16) + mixed[42:]  # an encoder may leave it out
    np.testing.assert_array_equal(decode_audio(unstated, where=WHERE)[0], decode_audio(two, where=WHERE)[0])


def test_a_lost_page_and_a_second_stream_are_seen() -> None:
    data = sound(wave(3, 16_000) + 0.1 * RNG.standard_normal(48_000), 16_000, "OGG", "VORBIS")
    starts = [at for at in range(len(data)) if data[at : at + 4] == b"OggS"]
    assert len(starts) > 4
    refused(data[: starts[3]] + data[starts[4] :], "page 3 is missing")
    damaged = bytearray(data)
    damaged[starts[3] + 500] ^= 1
    refused(bytes(damaged), "the checksum of page 3 does not match")
    refused(data + data, "several streams")
    refused(data + b"junk", "ends before its last page|no page begins")


def test_the_checksum_of_ogg_by_long_division() -> None:
    data = RNG.integers(0, 256, 50, dtype=np.uint8).tobytes()
    register = 0
    for byte in data:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1 ^ (0x04C11DB7 if register >> 31 else 0)) & 0xFFFFFFFF
    assert ogg.checksum(data) == register
