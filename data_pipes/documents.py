"""From a sample to a document, by the plan of its source.

A plan lists what the document holds, in order: `("caption", "image")` is text to image, `("image",
"caption")` the way back. Everything is trained on unless an item ends in "?", which makes it a condition:
seen, but without loss (`("caption?", "image")`).

| item    | members read                                        |
|---------|-----------------------------------------------------|
| text    | txt                                                 |
| caption | txt                                                 |
| image   | png, jpg, jpeg, webp or flat.png                    |
| rgba    | layer0.png ... layerN.png, bottom first             |
| score   | png, jpg, jpeg or webp, as grey                     |
| audio   | flac, wav or ogg, mixed to mono                     |
| video   | mp4, webm, mkv or mov                               |

Pixels and sound are brought to the tokenizers' form in integers, so ids cannot depend on the machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.sample import Sample
from ringweave.tokenizers import media
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.members import as_grey, as_mono, as_rgb, as_rgba
from ringweave.tokenizers.segment import Document, Role, Segment

_PICTURES = ("png", "jpg", "jpeg", "webp")
_LAYER = re.compile(r"layer(\d+)\.png")


class Tokenizers(Protocol):
    """The part of `TokenizerSet` used here. Every segment method also takes `role` and `weight`."""

    @property
    def manifest(self) -> Any: ...
    def text_segment(self, text: str, *, role: Role = ..., weight: float = ...) -> Segment: ...
    def image_segment(
        self, image: NDArray[np.uint8], *, role: Role = ..., weight: float = ...
    ) -> Segment: ...
    def rgba_segment(
        self, layers: list[NDArray[np.uint8]], *, role: Role = ..., weight: float = ...
    ) -> Segment: ...
    def video_segment(
        self,
        frames: NDArray[np.uint8],
        times: NDArray[np.float64],
        *,
        role: Role = ...,
        weight: float = ...,
    ) -> Segment: ...
    def audio_segment(
        self, samples: NDArray[np.int16], rate: int, *, role: Role = ..., weight: float = ...
    ) -> Segment: ...
    def score_segment(
        self, image: NDArray[np.uint8], *, role: Role = ..., weight: float = ...
    ) -> Segment: ...
    def document(self, key: str, segments: list[Segment]) -> Document: ...


def _member(sample: Sample, item: str, wanted: Sequence[str]) -> tuple[bytes, str]:
    """The first member present out of `wanted`, and how messages name it."""
    for extension in wanted:
        if extension in sample.members:
            return sample.members[extension], f"{sample.where}:{extension}"
    raise _missing(sample, item, " or ".join(wanted))


def _missing(sample: Sample, item: str, wanted: str) -> DataError:
    return DataError(
        f"plan item {item!r} finds no member {wanted}",
        where=sample.where,
        why=f"the sample holds: {', '.join(sorted(sample.members)) or 'nothing'}",
        fix="correct the plan of this source, or the shard",
    )


def _text(sample: Sample, item: str, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    data, where = _member(sample, item, ("txt",))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("text is not UTF-8", where=where, why=str(error)) from None
    return tokenizers.text_segment(text, **options)


def _image(sample: Sample, item: str, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    data, where = _member(sample, item, (*_PICTURES, "flat.png"))
    return tokenizers.image_segment(as_rgb(media.decode_image(data, where=where)), **options)


def _score(sample: Sample, item: str, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    data, where = _member(sample, item, _PICTURES)
    return tokenizers.score_segment(as_grey(media.decode_image(data, where=where)), **options)


def _rgba(sample: Sample, item: str, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    numbers = sorted(int(m[1]) for m in map(_LAYER.fullmatch, sample.members) if m)
    names = [f"layer{n}.png" for n in range(len(numbers))]
    if not names or any(name not in sample.members for name in names):
        raise _missing(sample, item, "layer0.png, layer1.png, ... without a gap")
    layers = [as_rgba(media.decode_image(sample.members[n], where=f"{sample.where}:{n}")) for n in names]
    shapes = {layer.shape for layer in layers}
    if len(shapes) > 1:
        sizes = ", ".join(f"{layer.shape[1]}x{layer.shape[0]}" for layer in layers)
        raise DataError("layers of different sizes", where=sample.where, why=sizes)
    return tokenizers.rgba_segment(layers, **options)


def _audio(sample: Sample, item: str, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    data, where = _member(sample, item, ("flac", "wav", "ogg"))
    samples, rate = media.decode_audio(data, where=where)
    return tokenizers.audio_segment(as_mono(samples), rate, **options)


def _video(sample: Sample, item: str, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    data, where = _member(sample, item, ("mp4", "webm", "mkv", "mov"))
    frames, times = media.decode_video(data, where=where)
    return tokenizers.video_segment(frames, times, **options)


_ITEMS: dict[str, Callable[[Sample, str, Tokenizers, dict[str, Any]], Segment]] = {
    "text": _text,
    "caption": _text,
    "image": _image,
    "rgba": _rgba,
    "score": _score,
    "audio": _audio,
    "video": _video,
}


def parse_plan(plan: Sequence[str]) -> list[tuple[str, Role]]:
    """[(item, role)] of a plan. Raises DataError for an unknown item and for nothing to train on."""
    parsed: list[tuple[str, Role]] = []
    for entry in plan:
        item, condition = entry.removesuffix("?"), entry.endswith("?")
        if item not in _ITEMS:
            known = ", ".join(_ITEMS)
            raise DataError(
                f"unknown plan item {entry!r}", where=f"plan [{', '.join(plan)}]", fix=f"use one of {known}"
            )
        parsed.append((item, "condition" if condition else "target"))
    if not any(role == "target" for _, role in parsed):
        raise DataError("a plan without anything to train on", where=f"plan [{', '.join(plan)}]")
    return parsed


def encode_sample(sample: Sample, plan: Sequence[str], tokenizers: Tokenizers) -> Document:
    """The document of a sample.

    Raises DataError for an unknown plan item, a missing member and whatever cannot be decoded, always naming
    the sample.
    """
    segments: list[Segment] = []
    for item, role in parse_plan(plan):
        options = {"role": role, "weight": 0.0 if role == "condition" else 1.0}
        segments.append(_ITEMS[item](sample, item, tokenizers, options))
    return tokenizers.document(sample.key, segments)
