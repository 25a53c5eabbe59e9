"""The set: segments, documents, and reading ids back whatever they are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import clip, page, picture, prose, tone

from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.manifest import BOS, CONTROL, EOS
from ringweave.tokenizers.segment import MODALITY_ID, Segment
from ringweave.tokenizers.set import TokenizerSet


def all_segments(tokenizers: TokenizerSet, seed: int = 600) -> list[Segment]:
    return [
        tokenizers.text_segment(prose(seed), role="condition", weight=0.0),
        tokenizers.image_segment(picture(seed)),
        tokenizers.rgba_segment([picture(seed + k, "RGBA") for k in range(3)]),
        tokenizers.video_segment(clip(seed, 5), np.array([0, 0.25, 0.5, 1.0, 1.04])),
        tokenizers.audio_segment(tone(seed), 16_000),
        tokenizers.score_segment(page(seed)),
    ]


def test_a_document_of_everything_comes_back(tokenizers: TokenizerSet) -> None:
    document = tokenizers.document("key", all_segments(tokenizers))
    ids = np.concatenate([segment.ids for segment in document.segments])
    assert ids[0] == BOS
    assert ids[-1] == EOS
    items = tokenizers.decode(ids)
    assert [item.modality for item in items] == ["text", "image", "rgba", "video", "audio", "score"]
    assert all(item.complete for item in items)
    text, image, layers, video, audio, score = (item.value for item in items)
    assert text == prose(600)
    assert image.shape == (48, 48, 3)
    assert [layer.shape for layer in layers] == [(48, 48, 4)] * 3
    assert video.shape == (5, 32, 32, 3)
    assert audio[1] == 16_000
    assert len(audio[0]) == 16_000
    assert score.shape == (64, 96)
    bounds = [(item.start, item.end) for item in items]
    assert bounds[0][0] == 1
    assert bounds[-1][1] == len(ids) - 1
    assert all(a[1] == b[0] for a, b in pairwise(bounds))


def test_segments_are_well_formed(tokenizers: TokenizerSet) -> None:
    for segment in all_segments(tokenizers):
        assert segment.ids.dtype == np.int32
        assert segment.positions.dtype == np.int32
        assert segment.positions.shape == (len(segment), 4)
        assert segment.positions.min() >= 0
        assert segment.attends == "causal"
        kinds = tokenizers.manifest.modality_of(segment.ids)
        own = MODALITY_ID["image" if segment.modality == "video" else segment.modality]
        assert set(kinds.tolist()) <= {0, own}
    caption = all_segments(tokenizers)[0]
    assert (caption.role, caption.weight) == ("condition", 0.0)


def test_positions_follow_the_grid(tokenizers: TokenizerSet) -> None:
    image = tokenizers.image_segment(picture(1))
    assert image.positions[1:8].tolist() == [[0, 0, c, 0] for c in range(7)]  # six cells and the end of line
    assert image.ids[7] == CONTROL["eol"]
    layers = tokenizers.rgba_segment([picture(k, "RGBA") for k in range(3)])
    assert set(layers.positions[:, 3].tolist()) == {0, 1, 2}
    video = tokenizers.video_segment(clip(1, 3), np.array([2.0, 2.25, 3.0]))
    assert set(video.positions[:, 0].tolist()) == {0, 6, 25}  # 40 ms each
    assert (video.ids == CONTROL["eof"]).sum() == 2
    assert video.ids[-1] == CONTROL["eov"]
    audio = tokenizers.audio_segment(tone(1), 16_000)
    assert audio.positions[-1, 0] == 25
    assert set(audio.positions[:, 1].tolist()) == {0, 1, 2}


def test_sound_and_flash_share_their_time(tokenizers: TokenizerSet) -> None:
    """A click and a flash at the same moments of a variable-rate clip stand within one unit (40 ms)."""
    times = np.array([0.0, 0.31, 0.9, 1.52])
    video = tokenizers.video_segment(clip(1, 4), times)
    shown = np.unique(video.positions[:, 0])
    samples = np.zeros(32_000, np.int16)
    samples[(times * 16_000).astype(int) + 8] = 30_000
    audio = tokenizers.audio_segment(samples, 16_000)
    codec = tokenizers.codecs["audio"]
    energy = np.abs(np.lib.stride_tricks.sliding_window_view(np.pad(samples, (640, 640)), 1280)[::640]).sum(1)
    heard = [audio.positions[1 + f * codec.books, 0] for f in np.flatnonzero(energy)]
    assert all(min(abs(int(h) - int(s)) for h in heard) <= 1 for s in shown)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
def test_truncated_streams_decode(tokenizers: TokenizerSet, part: float) -> None:
    for segment in all_segments(tokenizers)[1:]:
        cut = segment.ids[: max(2, int(len(segment) * part))]
        (item,) = tokenizers.decode(cut)
        assert item.modality == segment.modality
        assert not item.complete
        whole = tokenizers.decode(segment.ids)[0].value
        if segment.modality == "image":
            assert item.value.shape[1] in (whole.shape[1], 8 * (len(cut) - 1))


def test_a_truncated_row_keeps_the_rows_before(tokenizers: TokenizerSet) -> None:
    segment = tokenizers.image_segment(picture(5))
    (item,) = tokenizers.decode(segment.ids[:18])  # two rows and three cells
    assert item.value.shape == (24, 48, 3)


def test_a_torn_off_tail_decodes(tokenizers: TokenizerSet) -> None:
    for segment in all_segments(tokenizers)[1:]:
        items = tokenizers.decode(segment.ids[2:])
        assert items
        assert not items[0].complete


def test_any_ids_decode(tokenizers: TokenizerSet) -> None:
    size = tokenizers.manifest.size
    some = st.lists(st.one_of(st.integers(0, 20), st.integers(-5, size + 5)), max_size=60)

    @settings(max_examples=200, deadline=None)
    @given(some)
    def check(ids: list[int]) -> None:
        items = tokenizers.decode(np.array(ids, np.int32))
        for item in items:
            assert 0 <= item.start < item.end <= len(ids)
        assert all(a.end <= b.start for a, b in pairwise(items))

    check()


@pytest.mark.parametrize("codec", ["image", "rgba", "audio", "score"])
def test_random_bodies_decode(tokenizers: TokenizerSet, codec: str) -> None:
    """Right block, wrong order: what a badly trained model says."""
    rng = np.random.default_rng(0)
    blocks = [b for b in tokenizers.manifest.blocks if b.codec == codec]
    pool = np.concatenate([np.arange(b.start, b.stop) for b in blocks])
    begin = {"image": "boi", "rgba": "bor", "audio": "boa", "score": "bos_score"}[codec]
    marks = [CONTROL[name] for name in ("eol", "blank", "layer", "eof")]
    for length in (0, 1, 2, 50, 400):
        body = np.where(rng.random(length) < 0.2, rng.choice(marks, length), rng.choice(pool, length))
        items = tokenizers.decode(np.concatenate([[CONTROL[begin]], body]).astype(np.int32))
        assert items[0].modality == codec
        assert not items[0].complete


def test_a_long_hostile_stream_stays_small(tokenizers: TokenizerSet) -> None:
    """One wide row and very many empty ones must not become a square picture."""
    start = tokenizers.manifest.block("image").start
    body = [CONTROL["boi"]] + [start] * 5000 + [CONTROL["eol"]] * 5000 + [start, CONTROL["eol"]] * 20
    (item,) = tokenizers.decode(np.array(body, np.int32))
    assert item.value.size <= 4 * 5100 * 192


def test_a_missing_codec_is_named(tokenizers: TokenizerSet) -> None:
    small = TokenizerSet({"text": tokenizers.codecs["text"]})
    assert small.decode(small.text_segment("words").ids)[0].value == "words"
    with pytest.raises(VocabularyError, match="no audio codec"):
        small.audio_segment(tone(1), 16_000)
    assert small.decode(np.array([CONTROL["boi"], CONTROL["bov"], CONTROL["boa"]], np.int32)) == []
    with pytest.raises(DataError):
        small.document("key", [])
