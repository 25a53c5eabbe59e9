"""Law 4 (chunked = batched = whole) for every codec, and what each promises about its output."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizer_samples import clip, page, picture, prose, tone

from ringweave.tokenizers.audio import AudioCodec, mdct_basis, resample
from ringweave.tokenizers.codec import from_patches, pad_to, to_patches
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.measure import ink_f1, psnr, rate_floor, si_sdr
from ringweave.tokenizers.rgba import BLANK, OPAQUE
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.vq import ResidualQuantizer, fit_books

BATCHES = (1, 3, 8)


@pytest.mark.parametrize("batch", BATCHES)
def test_image_batches_equal_whole(tokenizers: TokenizerSet, batch: int) -> None:
    codec = tokenizers.codecs["image"]
    images = np.stack([picture(s) for s in range(100, 117)])
    whole = codec.encode(images)
    parts = [codec.encode(images[k : k + batch]) for k in range(0, len(images), batch)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert np.array_equal(codec.decode(whole)[5], codec.decode(whole[5]))


@pytest.mark.parametrize("batch", BATCHES)
def test_rgba_batches_equal_whole(tokenizers: TokenizerSet, batch: int) -> None:
    codec = tokenizers.codecs["rgba"]
    layers = np.stack([picture(s, "RGBA") for s in range(100, 117)])
    parts = [codec.encode(layers[k : k + batch]) for k in range(0, len(layers), batch)]
    assert np.array_equal(codec.encode(layers), np.concatenate(parts))


@pytest.mark.parametrize("rows", BATCHES)
def test_score_rows_equal_whole(tokenizers: TokenizerSet, rows: int) -> None:
    codec = tokenizers.codecs["score"]
    sheet = page(100, height=128)
    step = rows * codec.patch
    parts = [codec.encode(sheet[k : k + step]) for k in range(0, len(sheet), step)]
    assert np.array_equal(codec.encode(sheet), np.concatenate(parts))


@pytest.mark.parametrize("batch", BATCHES)
def test_video_frames_equal_images(tokenizers: TokenizerSet, batch: int) -> None:
    frames = clip(100, 8)
    segment = tokenizers.video_segment(frames[:batch], np.arange(batch) / 4)
    first = tokenizers.image_segment(frames[0])
    assert np.array_equal(segment.ids[1 : len(first) - 1], first.ids[1:-1])
    per_frame = [tokenizers.image_segment(frame).ids[1:-1] for frame in frames[:batch]]
    assert np.array_equal(np.concatenate(per_frame), segment.ids[1:-1][segment.ids[1:-1] != 4])


@pytest.mark.parametrize("chunk", [1, 7, 639, 640, 641, 5000])
def test_audio_streams_equal_whole(tokenizers: TokenizerSet, chunk: int) -> None:
    codec: AudioCodec = tokenizers.codecs["audio"]
    for length in (1, codec.hop - 1, codec.hop, codec.hop + 1, 9 * codec.hop + 13):
        samples = tone(100, 1.0)[:length]
        stream = codec.stream()
        parts = [stream.push(samples[k : k + chunk]) for k in range(0, length, chunk)]
        parts.append(stream.flush())
        whole = codec.encode(samples)
        assert np.array_equal(np.concatenate(parts), whole)
        assert len(whole) == codec.frames(length)
        assert len(codec.decode(whole)) == (len(whole) - 1) * codec.hop >= length


def test_audio_random_cuts_equal_whole(tokenizers: TokenizerSet) -> None:
    codec = tokenizers.codecs["audio"]
    samples = tone(101, 1.3)
    whole, rng = codec.encode(samples), np.random.default_rng(0)
    for _ in range(10):
        stream = codec.stream()
        cuts = np.sort(rng.integers(0, len(samples), 6))
        parts = [stream.push(piece) for piece in np.split(samples, cuts)]
        assert np.array_equal(np.concatenate([*parts, stream.flush()]), whole)


@pytest.mark.parametrize("batch", BATCHES)
def test_audio_frames_in_batches_equal_whole(tokenizers: TokenizerSet, batch: int) -> None:
    codec = tokenizers.codecs["audio"]
    frames = np.lib.stride_tricks.sliding_window_view(tone(102), 2 * codec.hop)[::97][:40]
    parts = [codec.encode_frames(frames[k : k + batch]) for k in range(0, len(frames), batch)]
    assert np.array_equal(codec.encode_frames(frames), np.concatenate(parts))


DIGEST = """
import hashlib, sys, numpy as np
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tokenizer_samples import clip, page, picture, prose, tone
from ringweave.tokenizers.set import TokenizerSet
t = TokenizerSet.load(Path(sys.argv[1]))
ids = [t.text_segment(prose(1, 300)), t.image_segment(np.tile(picture(1), (8, 8, 1))),
       t.rgba_segment([np.tile(picture(1, "RGBA"), (6, 6, 1))]), t.score_segment(page(1, 512, 640)),
       t.audio_segment(tone(1, 20.0), 16000), t.video_segment(clip(1, 16), np.arange(16) / 4)]
print(hashlib.sha256(b"".join(s.ids.tobytes() for s in ids)).hexdigest())
"""


def test_threads_change_no_id(folder: Path) -> None:
    def digest(threads: int) -> str:
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        env = os.environ | {name: str(threads) for name in names}
        command = [sys.executable, "-c", DIGEST, str(folder), str(Path(__file__).parent)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout.strip()

    one = digest(1)
    assert len(one) == hashlib.sha256().digest_size * 2
    assert digest(2) == one


def test_beam_search_is_exact_and_beats_greedy() -> None:
    rng = np.random.default_rng(0)
    points = np.rint(rng.normal(0, 400, (300, 6)))
    books = fit_books(points, 3, 8, seed=0)
    everything = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), -1).reshape(-1, 3)
    full = ResidualQuantizer(books, beam=512)
    distances = ((points[:, None] - full.decode(everything)[None]) ** 2).sum(-1)
    found = ((points - full.decode(full.encode(points))) ** 2).sum(-1)
    assert np.array_equal(found, distances.min(1))
    greedy = ResidualQuantizer(books, beam=1)
    assert found.sum() <= ((points - greedy.decode(greedy.encode(points))) ** 2).sum()


def test_inexact_codebooks_are_refused() -> None:
    with pytest.raises(ValueError, match="not exact"):
        ResidualQuantizer(np.full((1, 2, 4), 2**28, np.int32))


def test_fit_is_the_same_twice_and_survives_few_points() -> None:
    points = np.rint(np.random.default_rng(0).normal(0, 99, (40, 5)))
    assert np.array_equal(fit_books(points, 2, 16, seed=3), fit_books(points, 2, 16, seed=3))
    assert fit_books(points[:3], 2, 16, seed=0, reserve_zero=True)[:, 0].any() == 0
    assert fit_books(points[:0], 1, 4, seed=0).shape == (1, 4, 5)


def test_patches_and_padding() -> None:
    image = picture(1)[:45, :37]
    padded = pad_to(image, 8)
    assert padded.shape == (48, 40, 3)
    assert np.array_equal(padded[:, -1], padded[:, 36])
    assert np.array_equal(from_patches(to_patches(padded, 8), 8, 3), padded)


def test_image_beats_the_floor_of_its_rate(tokenizers: TokenizerSet) -> None:
    codec = tokenizers.codecs["image"]
    pairs = [(psnr(i, codec.decode(codec.encode(i))), psnr(i, rate_floor(i, 8, (2, 3, 2)))) for i in
             (picture(s) for s in range(200, 212))]  # fmt: skip
    ours, floor = np.mean(pairs, axis=0)
    assert ours > floor + 0.8


def test_opaque_stays_opaque_and_blank_stays_blank(tokenizers: TokenizerSet) -> None:
    codec = tokenizers.codecs["rgba"]
    solid = np.concatenate([picture(300), np.full((48, 48, 1), 255, np.uint8)], axis=2)
    cells = codec.encode(solid)
    assert (cells[..., 0] == OPAQUE).all()
    assert (codec.decode(cells)[..., 3] == 255).all()
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 4), dtype=np.uint8)
    noise[:24, :, 3] = 0  # colour under alpha 0 must not matter
    cells = codec.encode(noise)
    assert (cells[:3] == BLANK).all()
    assert (codec.decode(cells)[:24] == 0).all()
    assert (cells[3:, :, 0] > OPAQUE).all()


def test_hidden_colour_changes_no_id(tokenizers: TokenizerSet) -> None:
    codec = tokenizers.codecs["rgba"]
    layer = picture(301, "RGBA").copy()
    other = layer.copy()
    other[layer[..., 3] == 0] = [0, 255, 0, 0]
    assert np.array_equal(codec.encode(layer), codec.encode(other))
    assert np.abs(codec.decode(codec.encode(layer))[..., 3].astype(int) - layer[..., 3]).mean() < 0.1 * 255


def test_blank_paper_is_one_id_a_cell_and_white(tokenizers: TokenizerSet) -> None:
    codec = tokenizers.codecs["score"]
    white = np.full((32, 48), 255, np.uint8)
    assert (codec.encode(white) == BLANK).all()
    assert (codec.decode(codec.encode(white)) == 255).all()
    pages = [page(s) for s in range(400, 406)]
    assert np.mean([ink_f1(p, codec.decode(codec.encode(p))) for p in pages]) > 0.8


def test_silence_stays_silent_and_tones_come_back(tokenizers: TokenizerSet) -> None:
    codec = tokenizers.codecs["audio"]
    assert np.abs(codec.decode(codec.encode(np.zeros(16_000, np.int16)))).max() == 0
    for level in (-32768, 32767):
        assert codec.encode(np.full(5000, level, np.int16)).shape == (9, codec.books)
    clips = [tone(s) for s in range(500, 506)]
    assert np.mean([si_sdr(c, codec.decode(codec.encode(c))[: len(c)]) for c in clips]) > 3


def test_the_basis_reconstructs() -> None:
    """With every frequency kept, overlap-add gives the samples back to the rounding of the basis."""
    hop = 32
    basis = mdct_basis(hop, hop) / 4096
    samples = np.random.default_rng(0).normal(0, 1, 10 * hop)
    frames = np.lib.stride_tricks.sliding_window_view(samples, 2 * hop)[::hop] @ basis @ basis.T
    inner = frames[1:, :hop] + frames[:-1, hop:]
    assert np.abs(inner.reshape(-1) - samples[hop:-hop]).max() < 5e-3


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_resampling_keeps_tones(rate: int) -> None:
    t = np.arange(rate) / rate
    out = resample((np.sin(2 * np.pi * 440 * t) * 10_000).astype(np.int16), rate, 16_000)
    wanted = np.sin(2 * np.pi * 440 * np.arange(len(out)) / 16_000) * 10_000
    assert len(out) == 16_000
    assert si_sdr(wanted[100:-100], out[100:-100]) > 35


def test_wrong_arrays_are_data_errors(tokenizers: TokenizerSet) -> None:
    with pytest.raises(DataError):
        tokenizers.image_segment(np.zeros((8, 8, 4), np.uint8))
    with pytest.raises(DataError):
        tokenizers.score_segment(np.zeros((0, 8), np.uint8))
    with pytest.raises(DataError):
        tokenizers.rgba_segment([])
    with pytest.raises(DataError):
        tokenizers.rgba_segment([picture(1, "RGBA"), picture(1, "RGBA")[:8]])
    with pytest.raises(DataError):
        tokenizers.audio_segment(np.zeros((8, 2), np.int16), 16_000)
    with pytest.raises(DataError):
        tokenizers.audio_segment(np.zeros(0, np.int16), 16_000)
    with pytest.raises(DataError):
        tokenizers.video_segment(clip(1), np.zeros(4))
    assert len(tokenizers.text_segment(prose(1)).ids) > 10
