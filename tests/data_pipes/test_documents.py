"""Plans become documents: the right members, in order, with the right roles; failures name the sample."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from ringweave.data_pipes.documents import encode_sample, parse_plan
from ringweave.data_pipes.sample import Sample
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.members import as_grey, as_mono, as_rgb, as_rgba
from ringweave.tokenizers.segment import Document, Segment


class Recorder:
    """Stands in for a tokenizer set: one token a segment, and a note of what it was given."""

    manifest = SimpleNamespace(hash="0" * 64)

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., Segment]:
        if not name.endswith("_segment"):
            raise AttributeError(name)

        def segment(*values: Any, role: Any = "target", weight: float = 1.0) -> Segment:
            modality = name.removesuffix("_segment")
            self.calls.append((modality, values))
            return Segment(
                np.zeros(1, np.int32), modality, np.zeros((1, 4), np.int32), role=role, weight=weight
            )

        return segment

    def document(self, key: str, segments: list[Segment]) -> Document:
        return Document(key, tuple(segments))


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "png")
    return out.getvalue()


def sample(**members: bytes) -> Sample:
    return Sample("k7", {name.replace("__", "."): data for name, data in members.items()}, "s-0000.tar", 7)


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)
RGB = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
RGBA = np.concatenate([RGB, np.full((3, 4, 1), 128, np.uint8)], axis=2)


def test_segments_come_in_the_order_of_the_plan_with_their_roles() -> None:
    members = sample(txt="Grüße".encode(), png=png(RGB))
    for plan, roles in [
        (("caption", "image"), ["target", "target"]),
        (("caption?", "image"), ["condition", "target"]),
        (("image?", "caption"), ["condition", "target"]),
    ]:
        tokenizers = Recorder()
        document = encode_sample(members, plan, tokenizers)
        names = {"caption": "text", "image": "image"}
        assert [s.modality for s in document.segments] == [names[item.rstrip("?")] for item in plan]
        assert [s.role for s in document.segments] == roles
        assert [s.weight for s in document.segments] == [0.0 if r == "condition" else 1.0 for r in roles]
        assert document.key == "k7"
        given = dict(tokenizers.calls)
        assert given["text"] == ("Grüße",)
        np.testing.assert_array_equal(given["image"][0], RGB)


def test_layers_come_bottom_first_in_numeric_order() -> None:
    tokenizers = Recorder()
    layers = [np.full((2, 2, 4), n, np.uint8) for n in range(12)]
    members = Sample("k", {f"layer{n}.png": png(x) for n, x in reversed(list(enumerate(layers)))}, "s.tar", 0)
    encode_sample(members, ["rgba"], tokenizers)
    assert [int(x[0, 0, 0]) for x in tokenizers.calls[0][1][0]] == list(range(12))
    with pytest.raises(DataError, match="without a gap"):
        encode_sample(
            Sample("k", {"layer0.png": png(RGBA), "layer2.png": png(RGBA)}, "s.tar", 0), ["rgba"], tokenizers
        )
    with pytest.raises(DataError, match="different sizes"):
        encode_sample(
            Sample("k", {"layer0.png": png(RGBA), "layer1.png": png(RGBA[:2])}, "s.tar", 0),
            ["rgba"],
            tokenizers,
        )


def test_score_is_grey_and_image_takes_the_flat_picture() -> None:
    tokenizers = Recorder()
    encode_sample(sample(png=png(GREY)), ["score"], tokenizers)
    encode_sample(sample(flat__png=png(RGB), layer0__png=png(RGBA)), ["image"], tokenizers)
    np.testing.assert_array_equal(tokenizers.calls[0][1][0], GREY)
    np.testing.assert_array_equal(tokenizers.calls[1][1][0], RGB)


def test_audio_is_mixed_to_mono_at_its_own_rate() -> None:
    stereo = np.stack([np.arange(-50, 50), np.arange(0, 200, 2)], axis=1).astype(np.int16) * 10
    out = io.BytesIO()
    soundfile.write(out, stereo, 16000, format="FLAC", subtype="PCM_16")
    tokenizers = Recorder()
    encode_sample(sample(flac=out.getvalue()), ["audio"], tokenizers)
    mono, rate = tokenizers.calls[0][1]
    assert rate == 16000
    np.testing.assert_array_equal(mono, (stereo[:, 0].astype(int) + stereo[:, 1]) // 2)


def test_colours_are_brought_to_form_in_integers() -> None:
    clear = np.zeros((1, 1, 4), np.uint8)
    assert as_rgb(clear).tolist() == [[[255, 255, 255]]]
    assert as_rgb(np.asarray([[[10, 20, 30, 255]]], np.uint8)).tolist() == [[[10, 20, 30]]]
    assert as_rgb(np.asarray([[[0, 100, 200, 128]]], np.uint8)).tolist() == [[[127, 177, 227]]]
    assert as_rgba(GREY[..., None])[0, 1].tolist() == [1, 1, 1, 255]
    ramp = np.arange(256, dtype=np.uint8)[None, :, None]
    assert as_grey(np.repeat(ramp, 3, axis=2)).tolist() == ramp[..., 0].tolist(), "grey stays what it is"
    assert as_mono(np.asarray([[32767, 32767], [-32768, -32768], [3, 0]], np.int16)).tolist() == [
        32767,
        -32768,
        1,
    ]


def test_a_missing_member_names_sample_item_and_what_is_there() -> None:
    with pytest.raises(DataError) as caught:
        encode_sample(sample(txt=b"a", json=b"{}"), ["caption", "image"], Recorder())
    for word in ("s-0000.tar#k7", "'image'", "json, txt"):
        assert word in str(caught.value)


@pytest.mark.parametrize("plan", [["picture"], ["caption", "imag?"], [], ["caption?"], ["image??"]])
def test_bad_plans_are_refused(plan: list[str]) -> None:
    with pytest.raises(DataError, match="plan"):
        parse_plan(plan)


@pytest.mark.parametrize(
    ("item", "member", "data"),
    [
        ("image", "png", b"not a png"),
        ("audio", "flac", b"fLaC"),
        ("video", "mp4", b"\0" * 64),
        ("text", "txt", b"\xff"),
    ],
)
def test_undecodable_members_name_the_sample_and_member(item: str, member: str, data: bytes) -> None:
    with pytest.raises(DataError) as caught:
        encode_sample(sample(**{member: data}), [item], Recorder())
    assert "s-0000.tar#k7" in str(caught.value)
    assert member in str(caught.value)
