"""The video codec: exact at any cut, never worse than frame by frame, far shorter, and readable whatever the ids."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizer_samples import SMALL, clip, flac, mp4, picture, png

from ringweave.tokenizers import video_ids
from ringweave.tokenizers.codec import to_patches
from ringweave.tokenizers.conv_codecs import ConvImageCodec
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.fit import fit_tokenizers
from ringweave.tokenizers.learn_start import NetSizes, image_start
from ringweave.tokenizers.manifest import CONTROL
from ringweave.tokenizers.measure import psnr
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.video import Picture, VideoCodec, VideoDecoder, VideoFrame
from ringweave.tokenizers.video_plan import (
    PRICES,
    cell_errors,
    cheapest,
    likely_moves,
    luma,
    move_errors,
    runs,
    shifted,
)

U8 = NDArray[np.uint8]
SHORT = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def moving(tokenizers: TokenizerSet) -> TokenizerSet:
    """The fitted set, and a video codec."""
    return tokenizers.extended({"video": VideoCodec()})


@pytest.fixture(scope="module")
def codec(moving: TokenizerSet) -> VideoCodec:
    found = moving.codecs["video"]
    assert isinstance(found, VideoCodec)
    return found


def still(frames: int, size: int = 40) -> U8:
    return np.repeat(picture(7, size=size)[None], frames, 0)


def pan(frames: int, size: int = 40, step: tuple[int, int] = (1, 2)) -> U8:
    """A window that slides over a larger picture."""
    large = picture(8, size=size + frames * max(step))
    return np.stack([large[k * step[0] :, k * step[1] :][:size, :size] for k in range(frames)])


def cuts(frames: int, size: int = 40) -> U8:
    """Another picture every third frame, noise on all."""
    rng = np.random.default_rng(0)
    shown = np.stack([picture(k // 3, size=size) for k in range(frames)])
    return np.clip(shown + rng.normal(0, 3, shown.shape), 0, 255).astype(np.uint8)


CLIPS = {"still": still, "pan": pan, "cuts": cuts}


def same(one: list[VideoFrame], two: list[VideoFrame]) -> bool:
    return len(one) == len(two) and all(
        a.move == b.move and np.array_equal(a.codes, b.codes) for a, b in zip(one, two)
    )


def squared(frame: U8, guess: U8) -> int:
    guess = guess[: frame.shape[0], : frame.shape[1]]
    return int(((frame.astype(np.int64) - guess) ** 2).sum())


# ---- what the plan is made of ----


@pytest.mark.parametrize(("height", "width"), [(24, 32), (13, 9), (1, 1)])
def test_errors_of_moves_are_those_of_moving(height: int, width: int) -> None:
    rng = np.random.default_rng(height)
    before = rng.integers(0, 256, (-(-height // 8) * 8, -(-width // 8) * 8, 3)).astype(np.uint8)
    frame = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    found = move_errors(frame, before, 5)
    for down, right in itertools.product(range(-5, 6), repeat=2):
        moved = luma(shifted(before, (down, right)))[:height, :width]
        assert found[down + 5, right + 5] == ((luma(frame) - moved) ** 2).sum()


def test_content_moves_down_and_right_and_of_equal_moves_the_smallest_wins() -> None:
    large = picture(3, size=60)
    assert likely_moves(large[8:48, 5:45], large[10:50, 10:50], reach=6, count=1) == [(2, 5)]
    assert shifted(large, (2, 5))[30, 30].tolist() == large[28, 25].tolist()
    flat = np.full((16, 16, 3), 90, np.uint8)
    assert likely_moves(flat, flat, reach=3, count=3) == [(0, 0), (-1, 0), (0, -1)]


def test_cell_errors_count_the_pixels_there_are() -> None:
    rng = np.random.default_rng(1)
    frame, guess = rng.integers(0, 256, (13, 10, 3)).astype(np.uint8), np.zeros((16, 16, 3), np.uint8)
    padded = np.zeros((16, 16, 3), np.int64)
    padded[:13, :10] = frame
    assert np.array_equal(cell_errors(frame, guess, 8), (to_patches(padded, 8) ** 2).sum(-1))


@SHORT
@given(
    st.lists(st.tuples(st.integers(-40, 60), st.booleans()), min_size=1, max_size=8), st.sampled_from([1, 2])
)
def test_the_cheapest_choice_is_that_of_all_choices(cells: list[tuple[int, bool]], columns: int) -> None:
    harm, allowed = np.array([c[0] for c in cells]), np.array([c[1] for c in cells])
    choices = cheapest(harm, allowed, columns)
    assert not choices[:, ~allowed].any()

    def cost(taken: tuple[bool, ...] | NDArray[np.bool_], price: int) -> int:
        mask = np.array(taken, bool)
        return int(harm[mask].sum()) + price * (len(runs(mask, 99)) + columns * int((~mask).sum()))

    every = [
        t for t in itertools.product((False, True), repeat=len(cells)) if not (np.array(t) & ~allowed).any()
    ]
    for price, choice in list(zip(PRICES.tolist(), choices))[:16]:
        assert cost(choice, price) == min(cost(taken, price) for taken in every)


def test_runs_reach_over_rows_and_end_with_all_that_are_left() -> None:
    taken = np.array([1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1], bool)
    assert runs(taken, 3) == [(0, 2), (3, 3), (6, 2), (10, 0)]
    assert runs(np.ones(500, bool), 3) == [(0, 0)]
    assert runs(np.zeros(4, bool), 3) == []


# ---- law 4, causality, quality, length ----


@pytest.mark.parametrize("name", CLIPS)
def test_frames_in_pieces_equal_the_whole_and_look_at_no_later_frame(codec: VideoCodec, name: str) -> None:
    frames = CLIPS[name](9)
    whole = codec.encode(frames)
    for size in (1, 2, 5):
        stream = codec.stream()
        parts = [stream.push(frames[k : k + size]) for k in range(0, 9, size)]
        assert same(list(itertools.chain(*parts)), whole)
        assert stream.push(frames[:0]) == []
    assert same(codec.encode(frames[:4]), whole[:4])


@pytest.mark.parametrize("name", CLIPS)
def test_the_encoder_has_the_pictures_of_the_decoder(codec: VideoCodec, name: str) -> None:
    stream, decoder = codec.stream(), VideoDecoder(codec)
    for frame in CLIPS[name](6, 36):
        (found,) = stream.push(frame[None])
        assert stream._before is not None
        assert np.array_equal(decoder.push(found), stream._before.pixels)


@pytest.mark.parametrize("name", CLIPS)
def test_no_frame_is_worse_than_alone(codec: VideoCodec, name: str) -> None:
    frames = CLIPS[name](10, 44)  # a size of no whole patches
    coded = codec.encode(frames)
    alone = codec.image.decode(codec.image.encode(frames))
    for frame, ours, theirs in zip(frames, codec.decode(coded), alone):
        assert squared(frame, ours) <= squared(frame, theirs)
    assert all(codec.ids(f) <= codec.ids(VideoFrame(np.zeros_like(f.codes))) for f in coded)


class Bleeding:
    """An image codec of grey cells, whose picture depends strongly on the cells around."""

    patch, codes = 8, 64

    def encode(self, images: U8) -> NDArray[np.int32]:
        return (to_patches(images, 8).mean(-1) // 4).astype(np.int32)

    def decode(self, codes: NDArray[np.int32]) -> U8:
        level = np.where(codes < 0, 128, 4 * codes + 2)
        edge = np.pad(level, [*[(0, 0)] * (codes.ndim - 2), (1, 1), (1, 1)], mode="edge")
        around = edge[..., :-2, 1:-1] + edge[..., 2:, 1:-1] + edge[..., 1:-1, :-2] + edge[..., 1:-1, 2:]
        grey = np.clip(2 * level - around // 4, 0, 255).astype(np.uint8)
        return np.repeat(grey.repeat(8, -2).repeat(8, -1)[..., None], 3, -1)


def test_a_choice_that_spoils_fresh_cells_is_drawn_back(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, painted = VideoCodec(Bleeding()), Picture.painted
    drawn: list[int] = []

    def counted(self: Picture, image: object, codes: NDArray[np.int32]) -> Picture:
        drawn.append(1)
        return painted(self, image, codes)

    monkeypatch.setattr(Picture, "painted", counted)
    large = picture(2, size=120)
    frames = np.stack([large[a:, b:][:48, :48] for a, b in np.random.default_rng(2).integers(0, 20, (10, 2))])
    coded = codec.encode(frames)
    moved = sum(frame.move is not None for frame in coded)
    assert 0 < moved < len(drawn)  # or this clip shows nothing
    for frame, ours, theirs in zip(
        frames, codec.decode(coded), codec.image.decode(codec.image.encode(frames))
    ):
        assert squared(frame, ours) <= squared(frame, theirs)


def test_a_still_clip_costs_two_ids_and_a_mark_a_frame(moving: TokenizerSet) -> None:
    one, many = (moving.video_segment(still(n), np.arange(n) / 4) for n in (1, 12))
    assert len(many) - len(one) == 11 * 3


@pytest.mark.parametrize("step", [(0, 1), (1, 2), (3, 3)])
def test_a_panning_clip_takes_half_the_ids_or_less(moving: TokenizerSet, step: tuple[int, int]) -> None:
    frames = pan(12, 48, step)
    times = np.arange(12) / 12
    alone = TokenizerSet({"image": moving.codecs["image"]})
    ours, theirs = moving.video_segment(frames, times), alone.video_segment(frames, times)
    assert len(ours) <= len(theirs) / 2
    shown = [tokenizers.decode(s.ids)[0].value for tokenizers, s in ((moving, ours), (alone, theirs))]
    assert psnr(frames, shown[0]) >= psnr(frames, shown[1])
    found = moving.codecs["video"].encode(frames)
    moves = np.array([frame.move for frame in found if frame.move is not None])
    assert (np.abs(moves + step).max(1) <= 1).mean() >= 0.8


def test_whole_pictures_come_when_asked_and_at_a_cut(codec: VideoCodec) -> None:
    often = VideoCodec(codec.image, {"key_every": 4})
    assert [k for k, f in enumerate(often.encode(still(10))) if f.move is None] == [0, 4, 8]
    joined = np.concatenate([np.zeros_like(still(3)), np.maximum(still(3), 128)])
    assert [k for k, f in enumerate(codec.encode(joined)) if f.move is None] == [0, 3]


def test_a_learned_image_codec_will_do(moving: TokenizerSet) -> None:
    start = image_start(
        [picture(s) for s in range(8)],
        codes=48,
        net=NetSizes(width=8, encoder_blocks=1, decoder_blocks=1),
        crop=4,
    )
    rng = np.random.default_rng(0)
    tensors = dict(start.tensors)
    for name, value in tensors.items():
        if name.startswith(("encoder.", "decoder.")):
            tensors[name] = rng.integers(-300, 300, value.shape).astype(np.int32)
    learned = ConvImageCodec(start.config, tensors)
    tokenizers = TokenizerSet({"image": learned, "video": VideoCodec()})
    frames = pan(8)
    segment = tokenizers.video_segment(frames, np.arange(8) / 8)
    (item,) = tokenizers.decode(segment.ids)
    assert item.complete
    alone = learned.decode(learned.encode(frames))
    for frame, ours, theirs in zip(frames, item.value, alone):
        assert squared(frame, ours) <= squared(frame, theirs)
    assert len(segment) < 0.6 * len(frames) * (25 + 5 + 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (70, 3), (8, 16)])
def test_frames_of_any_shape(codec: VideoCodec, shape: tuple[int, int]) -> None:
    frames = cuts(5, 96)[:, : shape[0], : shape[1]]
    coded = codec.encode(frames)
    assert codec.decode(coded).shape == (5, -(-shape[0] // 8) * 8, -(-shape[1] // 8) * 8, 3)
    for frame, ours, theirs in zip(
        frames, codec.decode(coded), codec.image.decode(codec.image.encode(frames))
    ):
        assert squared(frame, ours) <= squared(frame, theirs)


def test_frames_that_do_not_fit_are_named(codec: VideoCodec) -> None:
    stream = codec.stream()
    stream.push(still(1))
    with pytest.raises(DataError, match="a frame of"):
        stream.push(still(1, 48))
    for wrong in (still(1)[0], still(1).astype(np.int32), still(1)[..., :2], still(1)[:, :0]):
        with pytest.raises(DataError, match="must be uint8"):
            codec.encode(wrong)
    assert codec.encode(still(0)) == []
    assert codec.decode([]).shape == (0, 0, 0, 3)


def test_a_stream_keeps_no_frames(codec: VideoCodec) -> None:
    frames = pan(24, 64)

    def peak(count: int) -> int:
        stream = codec.stream()
        tracemalloc.start()
        for number in range(count):
            stream.push(frames[number % 24][None].copy())
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    short, long = peak(30), peak(150)
    assert long - short < 0.1 * 120 * frames[0].nbytes


DIGEST = """
import hashlib, sys, numpy as np
from pathlib import Path
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.video import VideoCodec
t = TokenizerSet.load(Path(sys.argv[1])).extended({"video": VideoCodec()})
with np.load(sys.argv[2]) as frames:
    ids = [t.video_segment(frames[n], np.arange(len(frames[n])) / 4).ids for n in sorted(frames)]
print(hashlib.sha256(b"".join(i.tobytes() for i in ids)).hexdigest())
"""


def test_threads_change_no_id(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "clips.npz", a=pan(6, 200), b=cuts(5, 120))

    def digest(threads: int) -> str:
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        env = os.environ | {name: str(threads) for name in names}
        command = [sys.executable, "-c", DIGEST, str(folder), str(tmp_path / "clips.npz")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout.strip()

    one = digest(1)
    assert len(one) == 64
    assert digest(2) == one


# ---- in a tokenizer set ----


def test_any_number_of_frames_comes_back(moving: TokenizerSet) -> None:
    frames = np.concatenate([pan(20, 17, (1, 0)), cuts(20, 17)])
    times = np.cumsum(np.random.default_rng(0).uniform(0.05, 0.9, 40))
    first = moving.image_segment(frames[0])
    for count in range(1, 41):
        segment = moving.video_segment(frames[:count], times[:count])
        (item,) = moving.decode(segment.ids)
        assert item.complete
        assert item.value.shape == (count, 24, 24, 3)
        assert np.array_equal(segment.ids[1 : len(first) - 1], first.ids[1:-1])
    assert np.array_equal(item.value, moving.codecs["video"].decode(moving.codecs["video"].encode(frames)))
    shown = np.unique(segment.positions[:, 0])
    assert np.abs(shown * 0.04 - (times - times[0])).max() <= 0.0201


def test_positions_are_those_of_the_cells(moving: TokenizerSet) -> None:
    frames = still(3)
    frames[2, 16:24, 8:16] = 255 - frames[2, 16:24, 8:16]
    segment = moving.video_segment(frames, np.array([0.0, 0.08, 1.0]))
    move, run, image = (moving.manifest.block(name).start for name in ("video.move", "video.run", "image"))
    middle = move + 15 * 31 + 15
    begins = np.flatnonzero(segment.ids == middle)
    code = int(segment.ids[-3])
    assert image <= code < image + 96
    assert segment.ids[begins[0] : begins[0] + 3].tolist() == [middle, run, CONTROL["eof"]]
    assert segment.ids[begins[1] :].tolist() == [middle, run + 11, code, run, CONTROL["eov"]]
    assert segment.positions[begins[1] :].tolist() == [
        [25, 0, 0, 0], [25, 0, 0, 0], [25, 2, 1, 0], [25, 2, 2, 0], [25, 2, 2, 0],
    ]  # fmt: skip
    assert segment.positions[begins[0] : begins[0] + 3, 0].tolist() == [2, 2, 2]


def test_a_set_without_the_codec_is_what_it_was(
    tokenizers: TokenizerSet, moving: TokenizerSet, tmp_path: Path
) -> None:
    assert moving.manifest.extends(tokenizers.manifest)
    assert [block.name for block in moving.manifest.blocks[-2:]] == ["video.move", "video.run"]
    assert moving.manifest.blocks[:-2] == tokenizers.manifest.blocks
    assert not any("video" in block.name for block in tokenizers.manifest.blocks)
    old = tokenizers.video_segment(clip(1, 5), np.arange(5) / 4)
    assert np.array_equal(moving.decode(old.ids)[0].value, tokenizers.decode(old.ids)[0].value)
    assert moving.decode(old.ids)[0].complete
    moving.save(tmp_path)
    loaded = TokenizerSet.load(tmp_path)
    assert loaded.manifest == moving.manifest
    assert np.array_equal(
        loaded.video_segment(pan(4), np.arange(4)).ids, moving.video_segment(pan(4), np.arange(4)).ids
    )


def test_what_cannot_be_a_video_codec_is_named(tmp_path: Path, moving: TokenizerSet) -> None:
    with pytest.raises(VocabularyError, match="no image codec"):
        TokenizerSet({"video": VideoCodec()})
    for wrong in ({"reach": -1}, {"runs": 0}, {"tolerance": 99}, {"speed": 1}, {"reach": 2.5}):
        with pytest.raises(ValueError, match="no setting"):
            VideoCodec(config=wrong)
    with pytest.raises(ValueError, match="use `on`"):
        VideoCodec().encode(still(1))
    with pytest.raises(VocabularyError, match="not a readable video"):
        VideoCodec.from_bytes(b"nothing", where="here")
    kept = VideoCodec(config={"reach": 7, "key_every": 64})
    assert VideoCodec.from_bytes(kept.to_bytes(), where="").config == kept.config
    assert (kept.move_size, kept.run_size) == (225, 128)
    moving.save(tmp_path)
    file = tmp_path / "video.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(VocabularyError, match="video"):
        TokenizerSet.load(tmp_path)


def test_fitting_makes_one_where_asked(tmp_path: Path) -> None:
    samples = {
        "image": [{"png": png(picture(s))} for s in range(6)],
        "video": [{"mp4": mp4(clip(1))}],
        "audio": [{"flac": flac(np.zeros(3000, np.int16))}],
    }
    sizes = replace(SMALL, image_codes=16, audio_codes=4, video=True, video_key_every=9)
    fit_tokenizers(samples, tmp_path / "a", sizes=sizes)
    found = TokenizerSet.load(tmp_path / "a")
    assert list(found.codecs) == ["image", "audio", "video"]
    assert found.codecs["video"].key_every == 9
    fit_tokenizers({"audio": samples["audio"]}, tmp_path / "b", sizes=sizes)
    assert list(TokenizerSet.load(tmp_path / "b").codecs) == ["audio"]
    fit_tokenizers({"image": samples["image"]}, tmp_path / "c", sizes=replace(sizes, video=False))
    assert list(TokenizerSet.load(tmp_path / "c").codecs) == ["image"]


# ---- ids of any kind ----


class Codes:
    """What writing and reading ask of an image codec: how many codes, and the size of a patch."""

    patch = 8

    def __init__(self, codes: int) -> None:
        self.codes = codes


@st.composite
def some_frames(draw: st.DrawFn) -> tuple[VideoCodec, list[VideoFrame]]:
    codec = VideoCodec(Codes(draw(st.sampled_from([50, 100_000]))), {"reach": 3, "runs": 4})
    height, width = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    frames = []
    for number in range(draw(st.integers(1, 4))):
        seed = draw(st.integers(0, 1000))
        rng = np.random.default_rng(seed)
        codes = rng.integers(0, codec.image.codes, (height, width)).astype(np.int32)
        if number and seed % 3:
            codes[rng.random((height, width)) < rng.choice([0.2, 0.7, 1.0])] = -1
            frames.append(VideoFrame(codes, (int(rng.integers(-3, 4)), int(rng.integers(-3, 4)))))
        else:
            frames.append(VideoFrame(codes))
    return codec, frames


EOL, STARTS = 3, {1: np.array([10, 1000, 2000]), 2: np.array([10, 20_000, 60_000, 70_000])}


def kinds_of(
    ids: NDArray[np.int32], starts: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Kinds and codes of ids, as the parser finds them by its tables."""
    place = np.searchsorted(starts, ids, side="right") - 1
    names = np.array([*range(len(starts) - 2), video_ids.MOVE, video_ids.RUN], np.int32)
    kinds = np.where(ids == EOL, video_ids.LINE, names[np.maximum(place, 0)])
    return kinds.astype(np.int32), (ids - starts[np.maximum(place, 0)]).astype(np.int32)


@SHORT
@given(some_frames())
def test_frames_written_are_read(made: tuple[VideoCodec, list[VideoFrame]]) -> None:
    codec, frames = made
    starts = STARTS[codec.columns]
    parts = video_ids.write_frames(codec, frames, list(range(len(frames))), starts=starts, eol=EOL, blank=7)
    pairs = []
    for part, frame in zip(parts, frames):
        assert len(part[0]) == len(part[1]) == codec.ids(frame)
        pairs += [kinds_of(part[0], starts), (np.array([video_ids.NEXT]), np.array([0]))]
    kinds, codes = (np.concatenate(arrays) for arrays in zip(*pairs[:-1]))
    found, whole = video_ids.read_frames(codec, kinds, codes)
    assert whole
    assert same(found, frames)


@SHORT
@given(
    st.lists(st.tuples(st.integers(-4, 1), st.integers(-1, 60)), max_size=60), st.sampled_from([50, 100_000])
)
def test_reading_never_raises(ids: list[tuple[int, int]], codes: int) -> None:
    codec = VideoCodec(Codes(codes), {"reach": 3, "runs": 60})
    kept = np.array([(k % codec.columns if k > 0 else k, max(0, c) % 49) for k, c in ids], np.int32).reshape(
        -1, 2
    )
    frames, _ = video_ids.read_frames(codec, kept[:, 0], kept[:, 1])
    assert frames
    assert len({frame.codes.shape for frame in frames}) == 1
    for frame in frames:
        assert frame.codes.max() < codes
        assert frame.move is None or max(np.abs(frame.move)) <= 3


def test_any_ids_of_the_set_decode(moving: TokenizerSet) -> None:
    pool = [CONTROL[name] for name in ("bov", "eov", "boi", "eoi", "eol", "eof", "layer")]
    for name in ("image", "video.move", "video.run", "text"):
        block = moving.manifest.block(name)
        pool += [block.start, block.start + 3, block.stop - 1]

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from(pool), max_size=50))
    def check(ids: list[int]) -> None:
        items = moving.decode(np.array(ids, np.int32))
        assert all(0 <= item.start < item.end <= len(ids) for item in items)
        for item in items:
            if item.modality == "video":
                assert item.value.dtype == np.uint8
                assert item.value.ndim == 4

    check()


def test_damage_is_seen_and_bridged(moving: TokenizerSet) -> None:
    frames = pan(6)
    segment = moving.video_segment(frames, np.arange(6) / 6)
    whole = moving.decode(segment.ids)[0].value
    runs_from = moving.manifest.block("video.run").start
    frame = np.cumsum(segment.ids == CONTROL["eof"])
    # A frame that ends in "all that are left" makes up for a cell or a run that is lost before it.
    open_ends = [bool((segment.ids[frame == k] == runs_from).any()) for k in range(6)]
    begins = np.append(False, segment.ids[:-1] == CONTROL["eof"])
    for place, number in enumerate(segment.ids.tolist()):
        if number in (CONTROL["eof"], CONTROL["bov"], CONTROL["eov"]):
            continue
        (item,) = moving.decode(np.delete(segment.ids, place))
        assert len(item.value) == 6
        assert not item.complete or (open_ends[frame[place]] and not begins[place] and number != runs_from)
        if number != CONTROL["eol"]:  # without one, the only whole picture has a row less
            assert item.value.shape == whole.shape
            assert psnr(item.value, whole) > 12


def test_a_lost_cell_of_a_later_whole_picture_is_the_one_before(codec: VideoCodec) -> None:
    first, second = codec.image.encode(still(1)[0]), codec.image.encode(picture(9, size=40))
    lost = second.copy()
    lost[1, 2] = -1
    shown = codec.decode([VideoFrame(first), VideoFrame(lost)])
    assert np.array_equal(shown[1][8:16, 16:24], shown[0][8:16, 16:24])
    assert np.array_equal(shown[1][32:, 32:], codec.image.decode(second)[32:, 32:])


def test_a_frame_that_moves_nothing_begins_with_the_missing_picture(codec: VideoCodec) -> None:
    nothing = np.full((2, 3), -1, np.int32)
    (shown,) = codec.decode([VideoFrame(nothing, (0, 0))])
    assert np.array_equal(shown, codec.image.decode(nothing))


def test_few_ids_cannot_become_a_huge_clip(moving: TokenizerSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_ids, "PIXELS", 64 * 25 * 40)  # 40 frames of 5 x 5 cells
    short = moving.video_segment(still(8), np.arange(8.0))
    assert moving.decode(short.ids)[0].complete
    middle = moving.manifest.block("video.move").start + 15 * 31 + 15
    more = np.array([CONTROL["eof"], middle, moving.manifest.block("video.run").start] * 500, np.int32)
    (item,) = moving.decode(np.concatenate([short.ids[:-1], more, short.ids[-1:]]))
    assert not item.complete
    assert len(item.value) * 25 <= 4 * (len(short) + len(more))
    with pytest.raises(DataError, match="can be read back"):
        moving.video_segment(still(100), np.arange(100.0))
