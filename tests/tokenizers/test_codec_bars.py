"""Trimmed forms of the proofs codec_image, codec_audio and codec_score: what each rests on, at small sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizer_samples import page, picture, tone

from ringweave.tokenizers.audio import mdct_basis, random_frames
from ringweave.tokenizers.conv_codecs import AUDIO_CELL, ConvScoreCodec
from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.learn import Schedule, Training
from ringweave.tokenizers.learn_start import NetSizes, Start, audio_start, image_start, score_start, together
from ringweave.tokenizers.measure import ink_f1, psnr, rate_floor, si_sdr
from ringweave.tokenizers.pulses import fit_pulse_books
from ringweave.tokenizers.score import ink_of_tone, ink_tone
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.vq import ResidualQuantizer, fit_books

NET = NetSizes(width=16, encoder_blocks=1, decoder_blocks=1)


def left(books: np.ndarray, points: np.ndarray) -> float:
    """Share of the energy of `points` that the books, searched with a beam of 4, do not catch."""
    quantizer = ResidualQuantizer(books, beam=4, limit=float(np.sqrt((points**2).sum(1).max())))
    missed = points - quantizer.decode(quantizer.encode(points))
    return float((missed**2).sum() / (points**2).sum())


def test_books_of_peaks_catch_more_of_frames_that_are_peaks() -> None:
    """Held out: six frequencies a frame, of any height and sign."""
    rng = np.random.default_rng(0)

    def frames(count: int) -> np.ndarray:
        out = np.zeros((count, 48))
        for row in out:
            row[rng.choice(48, 6, replace=False)] = rng.normal(0, 1000, 6)
        return np.rint(out + rng.normal(0, 20, out.shape))

    train, unseen = frames(3000), frames(500)
    peaks = fit_pulse_books(train, 6, 96)
    assert peaks.shape == (6, 96, 48)
    assert not peaks[:, 0].any(), "code 0 says silence"
    assert np.array_equal(peaks, fit_pulse_books(train.copy(), 6, 96))
    assert left(peaks, unseen) < 0.8 * left(fit_books(train, 6, 96, seed=0, reserve_zero=True), unseen)


@pytest.mark.parametrize(("codes", "size"), [(7, 40), (96, 3), (2, 5)])
def test_books_of_peaks_have_any_number_of_codes(codes: int, size: int) -> None:
    points = np.rint(np.random.default_rng(1).normal(0, 300, (200, size)))
    books = fit_pulse_books(points, 2, codes)
    assert books.shape == (2, codes, size)
    assert left(books, points) < 1
    assert not fit_pulse_books(np.zeros((5, size)), 1, codes).any()


def test_books_fitted_together_leave_less_than_one_after_another() -> None:
    rng = np.random.default_rng(2)
    points = np.rint(rng.normal(0, 200, (1500, 12)))
    books = fit_books(points, 3, 24, seed=0)
    assert left(together(books, points, reach=2.0**16), points) < 0.99 * left(books, points)


def test_tone_goes_there_and_back() -> None:
    tone_of = ink_tone()
    assert tone_of.tolist() == sorted(tone_of)
    assert (tone_of[0], tone_of[127] < 128, tone_of[128] >= 128, tone_of[255]) == (0, True, True, 255)
    back = ink_of_tone(tone_of.astype(np.float64), tone_of.astype(np.float64))
    assert back[0] == 0 and back[255] == 255
    assert np.abs(back - np.arange(256)).max() <= 16, "flat where it does not matter"
    assert ((back > 127) == (np.arange(256) > 127)).all()


def test_light_lines_are_not_dropped_and_pages_without_a_tone_are_read_as_before() -> None:
    start = score_start([page(s) for s in range(6)], books=2, codes=32, patch=8, net=NET)
    codec = start.codec(start.tensors)
    grey = np.full((32, 32), 255, np.uint8)
    grey[12:14] = 150  # too light to count as ink
    lines = [np.where(page(s) < 128, 150, page(s)).astype(np.uint8) for s in range(6)]
    light = score_start(lines, books=2, codes=32, patch=8, net=NET)
    decoded = light.codec(light.tensors).decode(light.codec(light.tensors).encode(lines[0]))
    shown = decoded[lines[0] == 150]
    assert (shown < 245).mean() > 0.9 and shown.min() > 100
    plain = {name: value for name, value in codec.tensors.items() if name != "tone"}
    old = ConvScoreCodec(codec.config, plain)
    assert old.core.encode(np.zeros((1, 1, 1, 64))).shape == (1, 1, 1, 2)
    assert (
        old.encode(grey)[1]
        == codec.core.encode((255.0 - grey[8:16]).reshape(8, 4, 8).swapaxes(0, 1).reshape(1, 1, 4, 64))[0, 0]
    ).all()


def test_only_the_decoder_of_pages_learns() -> None:
    start = score_start([page(s) for s in range(6)], books=2, codes=16, patch=8, net=NET)
    assert start.decoder_only
    schedule = Schedule(steps=6, batch=2, decoder_only=True)
    training = Training(start.config, start.tensors, start.crops, schedule)
    training.run()
    found = training.tensors()
    for name in ("project", "back", "mean", "codebooks"):
        assert np.array_equal(found[name], start.tensors[name])
    assert found["decoder.out.weight"].any()
    closed, trained = start.codec(start.tensors), start.codec(found)
    assert all(np.array_equal(closed.encode(page(s)), trained.encode(page(s))) for s in range(50, 54))


@pytest.mark.parametrize("cut", [0, 2])
def test_a_stopped_decoder_goes_on_bit_for_bit(cut: int, tmp_path: Path) -> None:
    start = score_start([page(s) for s in range(6)], books=2, codes=16, patch=8, net=NET)
    schedule = Schedule(steps=4, batch=2, decoder_only=True)
    whole, before, after = (Training(start.config, start.tensors, start.crops, schedule) for _ in range(3))
    whole.run()
    before.run(until=cut)
    before.save(tmp_path / "state.safetensors")
    after.restore(tmp_path / "state.safetensors")
    after.run()
    assert after.loss == whole.loss
    found, wanted = after.tensors(), whole.tensors()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def learned(start: Start, *, steps: int) -> tuple[object, object]:
    """The closed form and what it becomes."""
    schedule = Schedule(steps=steps, batch=8, commit=start.commit, decoder_only=start.decoder_only)
    training = Training(start.config, start.tensors, start.crops, schedule)
    training.run()
    return start.codec(start.tensors), start.codec(training.tensors())


@pytest.mark.slow
@pytest.mark.parametrize("patch", [4, 8])
def test_pictures_are_above_their_floor(patch: int) -> None:
    start = image_start([picture(s) for s in range(30)], codes=128, patch=patch, net=NET, crop=6)
    unseen = np.stack([picture(s) for s in range(200, 216)])
    for codec in learned(start, steps=60):
        back = codec.decode(codec.encode(unseen))  # type: ignore[attr-defined]
        gain = [psnr(a, b) - psnr(a, rate_floor(a, patch, (3, 2, 2))) for a, b in zip(unseen, back)]
        assert np.mean(gain) > 1.2


@pytest.mark.slow
def test_sound_at_more_bits_is_closer_and_silence_stays() -> None:
    clips, unseen = [tone(s) for s in range(24)], [tone(s) for s in range(100, 108)]
    found = []
    for books in (4, 10):
        start = audio_start(clips, rate=16_000, hop=640, bins=96, books=books, codes=32, net=NET, crop=16)
        _, codec = learned(start, steps=40)
        back = [codec.decode(codec.encode(c))[: len(c)] for c in unseen]  # type: ignore[attr-defined]
        found.append(float(np.mean([si_sdr(a, b) for a, b in zip(unseen, back)])))
        quiet = codec.decode(codec.encode(np.zeros(5000, np.int16)))  # type: ignore[attr-defined]
        assert not quiet.any()
    assert found[0] > 5
    assert found[1] > found[0] + 3


@pytest.mark.slow
def test_pages_keep_their_ink() -> None:
    start = score_start([page(s) for s in range(40)], books=4, codes=64, patch=16, net=NET)
    unseen = [page(s) for s in range(100, 112)]
    for codec in learned(start, steps=20):
        back = [codec.decode(codec.encode(p)) for p in unseen]  # type: ignore[attr-defined]
        assert np.mean([ink_f1(a, b) for a, b in zip(unseen, back)]) > 0.92


@pytest.mark.parametrize("name", ["image", "audio", "score"])
def test_one_flipped_weight_of_a_learned_codec_stops_the_set(name: str, tmp_path: Path) -> None:
    start = {
        "image": lambda: image_start([picture(s) for s in range(4)], codes=16, net=NET, crop=4),
        "audio": lambda: audio_start(
            [tone(0)], rate=16_000, hop=320, bins=32, books=2, codes=16, net=NET, crop=8
        ),
        "score": lambda: score_start([page(0)], books=2, codes=16, patch=8, net=NET, crop=4),
    }[name]()
    TokenizerSet({name: start.codec(start.tensors)}).save(tmp_path)
    path = tmp_path / f"{name}.safetensors"
    whole = path.read_bytes()
    weights = 8 + int.from_bytes(whole[:8], "little")
    for at in np.random.default_rng(3).integers(weights, len(whole), 8):
        broken = bytearray(whole)
        broken[at] ^= 16
        path.write_bytes(broken)
        with pytest.raises(VocabularyError, match=f"the {name} codec"):
            TokenizerSet.load(tmp_path)


def test_frames_of_sound_are_what_the_books_are_fitted_to() -> None:
    basis = mdct_basis(640, 96)
    cells = random_frames([tone(s) for s in range(20)], basis, frames=2000, scale=AUDIO_CELL, seed=0)
    unseen = random_frames([tone(s) for s in range(50, 56)], basis, frames=400, scale=AUDIO_CELL, seed=0)
    assert left(fit_pulse_books(cells, 8, 32), unseen) < left(
        fit_books(cells, 8, 32, seed=0, reserve_zero=True), unseen
    )
