"""Encoders work in blocks: no id depends on it, and memory does not grow with the length of the input."""

from __future__ import annotations

import random
import re
import tracemalloc
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pytest
from text_samples import documents
from tokenizer_samples import picture

from ringweave.tokenizers.audio import SAMPLES, AudioCodec, mdct_basis
from ringweave.tokenizers.conv_codecs import ConvAudioCodec, ConvImageCodec
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.image import CELLS, ImageCodec
from ringweave.tokenizers.learn_start import NetSizes, audio_start, image_start
from ringweave.tokenizers.text import CHUNK_PATTERN, SCORE_STEP, UNIGRAM_CHUNK, TextCodec, chunks, exact_reach
from ringweave.tokenizers.text_model import BYTE, NORMAL, UNKNOWN, USER_DEFINED, Piece
from ringweave.tokenizers.vq import ROWS, ResidualQuantizer

NET = NetSizes(width=8, encoder_blocks=1, decoder_blocks=1)


def texts() -> list[str]:
    """Lengths around the limit, with newlines nowhere, everywhere and anywhere."""
    edges = [n + d for n in (UNIGRAM_CHUNK, 2 * UNIGRAM_CHUNK, 3000) for d in (-1, 0, 1)]
    rng = random.Random(0)
    out = ["", "\n", "a", "\n" * 5000, *("a" * n for n in edges), *("a" * (n - 1) + "\n" for n in edges)]
    for n in range(40):
        out.append("".join(rng.choices("ab\n", (900, 100, 2 ** (n % 8)), k=rng.randrange(9000))))
    return out


def ends(parts: list[str]) -> list[int]:
    return list(accumulate(map(len, parts)))


def test_chunks_are_the_matches_of_the_pattern() -> None:
    pattern = re.compile(CHUNK_PATTERN)
    for text in texts():
        assert list(chunks(text)) == pattern.findall(text)


@pytest.mark.parametrize("reach", [2000, 2715, 5000])
def test_chunks_are_joined_over_newlines_only_and_within_reach(reach: int) -> None:
    fewer = 0
    for text in texts():
        apart, joined = list(chunks(text)), list(chunks(text, reach=reach))
        assert "".join(joined) == text
        assert all(len(part) <= reach for part in joined)
        left_out = set(ends(apart)) - set(ends(joined))
        assert set(ends(joined)) <= set(ends(apart))
        assert all(text[end - 1] == "\n" for end in left_out)
        fewer += len(left_out)
    assert fewer


def test_reach_is_where_sums_are_exact() -> None:
    pieces = [Piece("<unk>", 0.0, UNKNOWN), Piece("\n", -3.0, NORMAL), Piece("a", -6.0, NORMAL)]
    assert exact_reach(pieces) == 65_536 // 16  # 2^24 steps of 1/256; a character costs at most 6 + 10
    assert exact_reach([*pieces, Piece("<0x41>", 0.0, BYTE)]) == 4096
    for bad in (
        Piece("b\n", -2.0, NORMAL),
        Piece("b", -2.0 - SCORE_STEP / 2, NORMAL),
        Piece("b", 1.0, NORMAL),
        Piece("b", -1000.0, NORMAL),
        Piece("b", 0.0, USER_DEFINED),
    ):
        assert exact_reach([*pieces, bad]) == UNIGRAM_CHUNK, bad


def test_joined_chunks_have_the_ids_of_chunks_alone() -> None:
    codec = TextCodec.fit([*documents(60, seed=1), "=" * 400, "abab" * 100], size=700, model_type="unigram")
    assert codec._reach > 1.5 * UNIGRAM_CHUNK
    alone = TextCodec(codec.model)
    alone._reach = UNIGRAM_CHUNK
    for text in (
        "\n".join(documents(60, seed=5)),
        *texts(),
        "=====\n" * 900,
        "ab" * 5000 + "\n" + "ab" * 5000,
    ):
        ids = codec.encode(text)
        assert np.array_equal(ids, alone.encode(text))
        assert ids.dtype == np.int32 and ids.flags.writeable
        assert codec.decode(ids) == text


def plain_beam(point: list[int], books: list[list[list[int]]], beam: int) -> list[int]:
    """The beam in whole numbers: the shortest residuals; of equals the earlier path, then the lower code."""
    paths: list[tuple[list[int], list[int]]] = [([], point)]
    for number, book in enumerate(books):
        grown = [
            (path + [k], [r - c for r, c in zip(rest, code)])
            for path, rest in paths
            for k, code in enumerate(book)
        ]
        grown.sort(key=lambda entry: sum(r * r for r in entry[1]))  # stable
        paths = grown[: 1 if number == len(books) - 1 else beam]
    return paths[0][0]


@pytest.mark.parametrize(
    ("books", "beam", "spread"), [(1, 1, 2), (3, 4, 2), (3, 4, 60), (4, 2, 3), (2, 50, 1)]
)
def test_the_quantizer_is_a_plain_beam_in_whole_numbers(books: int, beam: int, spread: int) -> None:
    """With small numbers there are many equal distances."""
    rng = np.random.default_rng(books + beam)
    codes = rng.integers(-spread, spread + 1, (books, 9, 3)).astype(np.int32)
    points = rng.integers(-3 * spread, 3 * spread + 1, (ROWS + 60, 3))
    found = ResidualQuantizer(codes, beam=beam).encode(points.astype(np.float64))
    for point, path in zip(points.tolist(), found.tolist()):
        assert path == plain_beam(point, codes.tolist(), beam)


@pytest.fixture(scope="module")
def image() -> ImageCodec:
    return ImageCodec.fit([picture(s) for s in range(12)], codes=32)


@pytest.fixture(scope="module")
def learned_image() -> ConvImageCodec:
    start = image_start([picture(s) for s in range(12)], codes=32, net=NET)
    return start.codec(start.tensors)


def test_pictures_larger_than_a_block_have_the_nearest_codes(image: ImageCodec) -> None:
    """The nearest code in whole numbers, found without the codec's arithmetic."""
    large = np.tile(picture(60), (12, 12, 1))[: 8 * 65, : 8 * 66 - 3]
    codes = image.encode(large)
    assert codes.shape == (65, 66) and codes.size > CELLS
    padded = np.pad(large, [(0, 0), (0, 3), (0, 0)], mode="edge").astype(np.int64)
    basis, mean = (image.tensors[n].astype(np.int64) for n in ("basis", "mean"))
    book = image.tensors["codebook"][0].astype(np.int64)
    for y, x in [(0, 0), (64, 65), (62, 3), (62, 4), (31, 65), (7, 20)]:
        point = (padded[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].reshape(-1) - mean) @ basis
        assert codes[y, x] == np.square(point - book).sum(1).argmin()


@pytest.mark.parametrize("kind", ["image", "learned_image"])
def test_a_clip_longer_than_a_block_is_its_frames(kind: str, request: pytest.FixtureRequest) -> None:
    codec = request.getfixturevalue(kind)
    frames = np.stack([picture(s % 7)[:45, :43] for s in range(CELLS // 36 + 5)])
    codes = codec.encode(frames)
    assert codes.shape == (len(frames), 6, 6)
    assert all(np.array_equal(one, codec.encode(frame)) for one, frame in zip(codes[-40:], frames[-40:]))
    assert np.array_equal(codec.encode(frames[:6].reshape(2, 3, 45, 43, 3)), codes[:6].reshape(2, 3, 6, 6))


def sound(samples: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-9000, 9000, samples).astype(np.int16)


@pytest.fixture(scope="module")
def audio() -> AudioCodec:
    books = np.random.default_rng(1).integers(-4000, 4000, (3, 16, 40)).astype(np.int32)
    return AudioCodec(
        {"rate": 8000, "hop": 160, "beam": 4}, {"basis": mdct_basis(160, 40), "codebooks": books}
    )


@pytest.fixture(scope="module")
def learned_audio() -> ConvAudioCodec:
    start = audio_start([sound(20_000)], rate=8000, hop=160, bins=40, books=2, codes=16, net=NET)
    return start.codec(start.tensors)


@pytest.mark.parametrize("kind", ["audio", "learned_audio"])
def test_sound_longer_than_a_block_is_one_push(kind: str, request: pytest.FixtureRequest) -> None:
    codec = request.getfixturevalue(kind)
    samples = sound(2 * SAMPLES + 777)
    stream = codec.stream()
    whole = np.concatenate([stream.push(samples), stream.flush()])
    assert len(whole) == codec.frames(len(samples))
    assert np.array_equal(codec.encode(samples), whole)
    assert codec.encode(samples[:0]).shape == (0, codec.books)
    for wrong in (samples[:0].astype(np.float32), np.zeros((0, 2), np.int16)):
        with pytest.raises(DataError, match="int16"):
            codec.encode(wrong)


def peak(work: Callable[[], np.ndarray]) -> int:
    """Most bytes that Python and numpy held during `work`, without its result."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = work().nbytes
        return tracemalloc.get_traced_memory()[1] - before - kept
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["audio", "learned_audio"])
def test_memory_is_flat_in_the_length_of_sound(kind: str, request: pytest.FixtureRequest) -> None:
    codec = request.getfixturevalue(kind)
    long, short = sound(8 * SAMPLES), sound(2 * SAMPLES)
    codec.encode(short[:5000])
    assert peak(lambda: codec.encode(long)) <= 1.1 * peak(lambda: codec.encode(short))


@pytest.mark.parametrize("kind", ["image", "learned_image"])
def test_memory_is_flat_in_the_number_of_frames(kind: str, request: pytest.FixtureRequest) -> None:
    codec = request.getfixturevalue(kind)
    frames = np.broadcast_to(np.tile(picture(3), (5, 5, 1)), (80, 240, 240, 3))
    long, short = frames.copy(), frames[:20].copy()
    codec.encode(short[:2])
    assert peak(lambda: codec.encode(long)) <= 1.1 * peak(lambda: codec.encode(short))
