"""Our one space of ids to LWM's two tables and back, exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import picture

from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.lwm_tables import Still, lwm_tables
from ringweave.tokenizers.manifest import CONTROL, VocabularyManifest
from ringweave.tokenizers.set import TokenizerSet

LWM = VocabularyManifest.build(
    [("text", 32_000, "text", "text", "t"), ("image", 8192, "image", "image", "i")],
    text_pieces="t", preprocessing={},
)  # fmt: skip
TEXT, IMAGE = (block.start for block in LWM.blocks)
C = CONTROL


def test_the_numbers_of_lwm() -> None:
    tables = lwm_tables(LWM)
    assert (tables.eof, tables.eov, tables.vision_rows) == (8192, 8193, 8448)
    assert tables.text_rows == 32_003
    ids = np.array(
        [C["bos"], TEXT, TEXT + 31_999, IMAGE, IMAGE + 8191, C["eof"], C["eov"], C["eos"], C["pad"]]
    )
    found, vision = tables.to_lwm(ids)
    assert found.tolist() == [32_001, 0, 31_999, 0, 8191, 8192, 8193, 32_002, 32_000]
    assert vision.tolist() == [False, False, False, True, True, True, True, False, False]
    assert found.dtype == np.int32 and vision.dtype == np.bool_


def test_any_stream_of_text_and_vision_comes_back() -> None:
    tables = lwm_tables(LWM)
    with_a_row = st.one_of(
        st.integers(TEXT, TEXT + 31_999), st.integers(IMAGE, IMAGE + 8191),
        st.sampled_from([C["pad"], C["bos"], C["eos"], C["eof"], C["eov"]]),
    )  # fmt: skip

    @settings(max_examples=200, deadline=None)
    @given(st.lists(with_a_row, max_size=60))
    def check(numbers: list[int]) -> None:
        ids = np.array(numbers, np.int32)
        found, vision = tables.to_lwm(ids)
        assert (found[vision] < 8194).all() and (found[~vision] < 32_003).all()
        back = tables.from_lwm(found, vision)
        assert back.dtype == np.int32 and back.tolist() == numbers

    check()


@pytest.mark.parametrize("number", [C["boi"], C["eol"], 18, IMAGE + 8192, LWM.size, -1, TEXT - 1])
def test_ids_without_a_row_are_refused(number: int) -> None:
    with pytest.raises(VocabularyError, match=f"id {number} at place 1 has no row"):
        lwm_tables(LWM).to_lwm(np.array([TEXT, number]))


@pytest.mark.parametrize(("number", "vision"), [(8194, True), (32_003, False), (-1, True), (8447, True)])
def test_rows_that_mean_nothing_are_refused(number: int, vision: bool) -> None:
    with pytest.raises(VocabularyError, match=f"id {number} at place 0 means nothing"):
        lwm_tables(LWM).from_lwm(np.array([number]), np.array([vision]))


def frame(numbers: list[int], grid: tuple[int, int]) -> list[int]:
    rows = np.resize(np.array(numbers) + IMAGE, grid).tolist()
    return [number for row in rows for number in (*row, C["eol"])]


def test_a_stream_written_by_hand() -> None:
    """A caption, a picture of 1 x 2 and a video of two frames."""
    tables = lwm_tables(LWM)
    ids = np.array(
        [C["bos"], TEXT + 5, C["boi"], IMAGE + 7, IMAGE + 8, C["eol"], C["eoi"], C["bov"], IMAGE + 1, IMAGE + 2,
         C["eol"], C["eof"], IMAGE + 3, IMAGE + 4, C["eol"], C["eov"], C["eos"]],
        np.int32,
    )  # fmt: skip
    found, vision = tables.to_lwm(tables.strip(ids, grid=(1, 2)))
    assert found.tolist() == [32_001, 5, 7, 8, 8193, 1, 2, 8192, 3, 4, 8193, 32_002]
    assert vision.tolist() == [False] * 2 + [True] * 9 + [False]
    assert tables.restore(tables.from_lwm(found, vision), grid=(1, 2)).tolist() == ids.tolist()


def test_any_document_comes_back() -> None:
    tables = lwm_tables(LWM)
    codes = st.lists(st.integers(0, 8191), min_size=1, max_size=4)

    @settings(max_examples=200, deadline=None)
    @given(st.data(), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.sampled_from(["image", "video"]))
    def check(data: st.DataObject, grid: tuple[int, int], still: Still) -> None:
        ids = [C["bos"]]
        for kind in data.draw(st.lists(st.sampled_from(["text", "image", "video"]), max_size=5)):
            if kind == "text":
                ids += data.draw(st.lists(st.integers(TEXT, TEXT + 31_999), max_size=4))
            elif kind == "image" and still == "image":
                ids += [C["boi"], *frame(data.draw(codes), grid), C["eoi"]]
            else:
                frames = [
                    frame(data.draw(codes), grid)
                    for _ in range(data.draw(st.integers(1, 3)) + (still == "image"))
                ]
                ids += [C["bov"], *(n for f in frames for n in (C["eof"], *f))]
                del ids[-sum(map(len, frames)) - len(frames)]  # no eof before the first
                ids += [C["eov"]]
        stream = np.array([*ids, C["eos"]], np.int32)
        short = tables.strip(stream, grid=grid, still=still)
        assert not np.isin(short, [C["boi"], C["bov"], C["eol"], C["eoi"]]).any()
        again = tables.from_lwm(*tables.to_lwm(short))
        assert tables.restore(again, grid=grid, still=still).tolist() == stream.tolist()

    check()


@pytest.mark.parametrize(
    "ids",
    [
        [C["boi"], *frame([1], (2, 2))[:-1], C["eoi"]],  # a line without its end
        [C["boi"], *frame([1], (2, 2))],  # cut off
        [C["boi"], *frame([1], (2, 3)), C["eoi"]],  # another size
        [C["boi"], *frame([1], (4, 1)), C["eoi"]],  # another shape of as many codes
        [C["bov"], *frame([1], (2, 2)), C["eov"]],  # one frame, but a video
        [C["boi"], *frame([1], (2, 2)), C["eof"], *frame([1], (2, 2)), C["eoi"]],  # two frames in a picture
        [*frame([1], (2, 2)), C["eoi"]],  # no beginning
        [TEXT, C["eol"], TEXT],
        [TEXT, C["boi"], TEXT],
        [TEXT, C["eof"], TEXT],
    ],
)
def test_what_would_not_come_back_is_refused(ids: list[int]) -> None:
    with pytest.raises(DataError, match="LWM's form"):
        lwm_tables(LWM).strip(np.array(ids), grid=(2, 2))


def test_documents_of_a_real_set(tokenizers: TokenizerSet) -> None:
    tables = lwm_tables(tokenizers.manifest)
    frames = np.stack([picture(seed) for seed in range(3)])
    document = tokenizers.document(
        "k",
        [
            tokenizers.text_segment("three boats on the water"),
            tokenizers.image_segment(frames[0]),
            tokenizers.video_segment(frames, np.arange(3) / 4),
        ],
    )
    ids = np.concatenate([segment.ids for segment in document.segments])
    found, vision = tables.to_lwm(tables.strip(ids, grid=(6, 6)))
    assert int(vision.sum()) == 4 * 36 + 2 + 2  # codes, eof between frames, eov after each
    back = tables.restore(tables.from_lwm(found, vision), grid=(6, 6))
    assert back.tolist() == ids.tolist()
    wrong = VocabularyManifest.build([("text", 9, "text", "text", "")], text_pieces="", preprocessing={})
    with pytest.raises(VocabularyError, match="no block 'image'"):
        lwm_tables(wrong)
