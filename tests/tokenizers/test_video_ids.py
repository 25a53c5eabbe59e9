"""Ids of videos: what was written is read, and whatever is read never raises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizer_samples import picture
from video_samples import pan, same, still

from ringweave.tokenizers import video_ids
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.manifest import CONTROL
from ringweave.tokenizers.measure import psnr
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.video import VideoCodec, VideoFrame

U8 = NDArray[np.uint8]
SHORT = settings(max_examples=60, deadline=None)


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


def test_a_lost_cell_of_a_later_whole_picture_is_the_one_before(video_codec: VideoCodec) -> None:
    first, second = video_codec.image.encode(still(1)[0]), video_codec.image.encode(picture(9, size=40))
    lost = second.copy()
    lost[1, 2] = -1
    shown = video_codec.decode([VideoFrame(first), VideoFrame(lost)])
    assert np.array_equal(shown[1][8:16, 16:24], shown[0][8:16, 16:24])
    assert np.array_equal(shown[1][32:, 32:], video_codec.image.decode(second)[32:, 32:])


def test_a_frame_that_moves_nothing_begins_with_the_missing_picture(video_codec: VideoCodec) -> None:
    nothing = np.full((2, 3), -1, np.int32)
    (shown,) = video_codec.decode([VideoFrame(nothing, (0, 0))])
    assert np.array_equal(shown, video_codec.image.decode(nothing))


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
