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
from video_samples import cuts, pan, same, still

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


CLIPS = {"still": still, "pan": pan, "cuts": cuts}


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
def test_frames_in_pieces_equal_the_whole_and_look_at_no_later_frame(
    video_codec: VideoCodec, name: str
) -> None:
    frames = CLIPS[name](9)
    whole = video_codec.encode(frames)
    for size in (1, 2, 5):
        stream = video_codec.stream()
        parts = [stream.push(frames[k : k + size]) for k in range(0, 9, size)]
        assert same(list(itertools.chain(*parts)), whole)
        assert stream.push(frames[:0]) == []
    assert same(video_codec.encode(frames[:4]), whole[:4])


@pytest.mark.parametrize("name", CLIPS)
def test_the_encoder_has_the_pictures_of_the_decoder(video_codec: VideoCodec, name: str) -> None:
    stream, decoder = video_codec.stream(), VideoDecoder(video_codec)
    for frame in CLIPS[name](6, 36):
        (found,) = stream.push(frame[None])
        assert stream._before is not None
        assert np.array_equal(decoder.push(found), stream._before.pixels)


@pytest.mark.parametrize("name", CLIPS)
def test_no_frame_is_worse_than_alone(video_codec: VideoCodec, name: str) -> None:
    frames = CLIPS[name](10, 44)  # a size of no whole patches
    coded = video_codec.encode(frames)
    alone = video_codec.image.decode(video_codec.image.encode(frames))
    for frame, ours, theirs in zip(frames, video_codec.decode(coded), alone):
        assert squared(frame, ours) <= squared(frame, theirs)
    assert all(video_codec.ids(f) <= video_codec.ids(VideoFrame(np.zeros_like(f.codes))) for f in coded)


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


def test_whole_pictures_come_when_asked_and_at_a_cut(video_codec: VideoCodec) -> None:
    often = VideoCodec(video_codec.image, {"key_every": 4})
    assert [k for k, f in enumerate(often.encode(still(10))) if f.move is None] == [0, 4, 8]
    joined = np.concatenate([np.zeros_like(still(3)), np.maximum(still(3), 128)])
    assert [k for k, f in enumerate(video_codec.encode(joined)) if f.move is None] == [0, 3]


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
def test_frames_of_any_shape(video_codec: VideoCodec, shape: tuple[int, int]) -> None:
    frames = cuts(5, 96)[:, : shape[0], : shape[1]]
    coded = video_codec.encode(frames)
    assert video_codec.decode(coded).shape == (5, -(-shape[0] // 8) * 8, -(-shape[1] // 8) * 8, 3)
    for frame, ours, theirs in zip(
        frames, video_codec.decode(coded), video_codec.image.decode(video_codec.image.encode(frames))
    ):
        assert squared(frame, ours) <= squared(frame, theirs)


def test_frames_that_do_not_fit_are_named(video_codec: VideoCodec) -> None:
    stream = video_codec.stream()
    stream.push(still(1))
    with pytest.raises(DataError, match="a frame of"):
        stream.push(still(1, 48))
    for wrong in (still(1)[0], still(1).astype(np.int32), still(1)[..., :2], still(1)[:, :0]):
        with pytest.raises(DataError, match="must be uint8"):
            video_codec.encode(wrong)
    assert video_codec.encode(still(0)) == []
    assert video_codec.decode([]).shape == (0, 0, 0, 3)


def test_a_stream_keeps_no_frames(video_codec: VideoCodec) -> None:
    frames = pan(24, 64)

    def peak(count: int) -> int:
        stream = video_codec.stream()
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
