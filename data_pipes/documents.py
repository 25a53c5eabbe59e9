"""From a sample to a document, by the plan of its source.

A plan lists what the document holds, in order: `("caption", "image")` is text to image, `("image",
"caption")` the way back. Everything is trained on unless an item ends in "?", which makes it a condition:
seen, but without loss (`("caption?", "image")`).

| item    | members read                                        | argument                            |
|---------|-----------------------------------------------------|-------------------------------------|
| text    | txt                                                 | a member, a json field, or a class  |
| caption | txt, never empty                                    | a member, a json field, or a class  |
| image   | png, jpg, jpeg, webp or flat.png                    | the one member: `image:seg.png`     |
| rgba    | layer0.png ... layerN.png, bottom first             | none                                |
| score   | png, jpg, jpeg or webp, as grey                     | the one member                      |
| audio   | flac, wav, ogg or mp3, mixed to mono                | the one member                      |
| video   | mp4, webm, mkv or mov                               | the one member                      |
| symbolic | musicxml, mxl or xml: LMX words                   | the one member                      |
| midi    | mid or midi: events                                 | the one member                      |
| latents | layer0.png ... and more, as continuous latents      | a view: `latents:layers`            |
| embeddings | embeddings.npy, vectors of the words             | the one member                      |
| fields  | json, a record of LWM's JSONL: one or more segments | a field list: `fields:[ask],answer` |

Where several members fit, the first in the table wins. Arguments of text and caption: `caption:json.caption`
reads a field of the json member (`json.meta.title` and `json.captions.0` reach inside), `caption:cls` the cls
member, `caption:cls=cat|dog` the name of its number, `caption:cls@names.txt` the same from a file beside the
shards, `text:md` the member md. A missing field and an empty caption are errors of that sample.

A plan with `latents` holds nothing else but words or their embeddings, which are a condition there; see
`layer_documents.py`.

Pixels and sound are brought to the tokenizers' form in integers, so ids cannot depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.formats import fields_segments, member_of, text_of
from ringweave.data_pipes.layer_documents import latents_document, layers_of
from ringweave.data_pipes.plan_items import (
    CLIPS,
    ITEMS,
    PICTURES,
    SHEETS,
    SONGS,
    SOUNDS,
    Entry,
    of_latents,
    parse_entry,
)
from ringweave.data_pipes.sample import Sample
from ringweave.tokenizers import media
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.members import as_grey, as_mono, as_rgb
from ringweave.tokenizers.segment import Document, Role, Segment

__all__ = ["Tokenizers", "encode_sample", "layers_of", "parse_plan"]


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
    def symbolic_segment(
        self, xml: bytes, *, where: str = ..., role: Role = ..., weight: float = ...
    ) -> Segment: ...
    def midi_segment(
        self, data: bytes, *, where: str = ..., role: Role = ..., weight: float = ...
    ) -> Segment: ...
    def codes_segment(
        self,
        codes: NDArray[np.int32],
        *,
        codebook: int,
        times: NDArray[np.float64] | None = ...,
        role: Role = ...,
        weight: float = ...,
    ) -> Segment: ...
    def encode_layer(self, layer: NDArray[np.uint8]) -> NDArray[np.float32]: ...
    def document(self, key: str, segments: list[Segment]) -> Document: ...


def _media(sample: Sample, entry: Entry, wanted: Sequence[str]) -> tuple[bytes, str]:
    """The member that the entry names, else the first present out of `wanted`, and how messages name it."""
    wanted = (entry.argument,) if entry.argument else wanted
    data = member_of(sample, entry.text, wanted)
    return data, f"{sample.where}:{next(ext for ext in wanted if ext in sample.members)}"


def _text(sample: Sample, entry: Entry, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    return tokenizers.text_segment(text_of(sample, entry), **options)


def _image(sample: Sample, entry: Entry, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    data, where = _media(sample, entry, (*PICTURES, "flat.png"))
    return tokenizers.image_segment(as_rgb(media.decode_image(data, where=where)), **options)


def _score(sample: Sample, entry: Entry, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    data, where = _media(sample, entry, PICTURES)
    return tokenizers.score_segment(as_grey(media.decode_image(data, where=where)), **options)


def _rgba(sample: Sample, entry: Entry, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    return tokenizers.rgba_segment(layers_of(sample, entry.text), **options)


def _audio(sample: Sample, entry: Entry, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    data, where = _media(sample, entry, SOUNDS)
    samples, rate = media.decode_audio(data, where=where)
    return tokenizers.audio_segment(as_mono(samples), rate, **options)


def _video(sample: Sample, entry: Entry, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    data, where = _media(sample, entry, CLIPS)
    frames, times = media.decode_video(data, where=where)
    return tokenizers.video_segment(frames, times, **options)


def _symbolic(sample: Sample, entry: Entry, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    data, where = _media(sample, entry, SHEETS)
    return tokenizers.symbolic_segment(data, where=where, **options)


def _midi(sample: Sample, entry: Entry, tokenizers: Tokenizers, options: dict[str, Any]) -> Segment:
    data, where = _media(sample, entry, SONGS)
    return tokenizers.midi_segment(data, where=where, **options)


_ITEMS: dict[str, Callable[[Sample, Entry, Tokenizers, dict[str, Any]], Segment]] = {
    "text": _text,
    "caption": _text,
    "image": _image,
    "rgba": _rgba,
    "score": _score,
    "audio": _audio,
    "video": _video,
    "symbolic": _symbolic,
    "midi": _midi,
}


def parse_plan(plan: Sequence[str]) -> list[tuple[str, Role]]:
    """[(item with its argument, role)] of a plan.

    Raises DataError for an unknown item, a bad argument, items that cannot stand together and for nothing to train on.
    """
    shown = ", ".join(entry[:40] for entry in plan)
    found: list[Entry] = []
    for text in plan:
        try:
            found.append(parse_entry(text))
        except ValueError as error:
            kind = "unknown" if text.removesuffix("?").partition(":")[0] not in ITEMS else "bad"
            raise DataError(
                f"{kind} plan item {text[:80]!r}", where=f"plan [{shown}]", fix=str(error)
            ) from None
    try:
        latents = of_latents(found)
    except ValueError as error:
        raise DataError("a plan that makes no document", where=f"plan [{shown}]", why=str(error)) from None
    parsed: list[tuple[str, Role]] = []
    for entry in found:
        seen = entry.condition or (latents and entry.item != "latents")
        parsed.append((entry.text, "condition" if seen else "target"))
    if not any(role == "target" for _, role in parsed):
        raise DataError("a plan without anything to train on", where=f"plan [{shown}]")
    return parsed


def encode_sample(sample: Sample, plan: Sequence[str], tokenizers: Tokenizers) -> Document:
    """The document of a sample.

    Raises DataError for an unknown plan item, a missing member or field and whatever cannot be decoded,
    always naming the sample.
    """
    items = [(parse_entry(text), role) for text, role in parse_plan(plan)]
    try:
        if any(entry.item == "latents" for entry, _ in items):
            return latents_document(sample, items, tokenizers)
        segments: list[Segment] = []
        for entry, role in items:
            if entry.item == "fields":
                segments += fields_segments(sample, entry, tokenizers)
                continue
            options = {"role": role, "weight": 0.0 if role == "condition" else 1.0}
            segments.append(_ITEMS[entry.item](sample, entry, tokenizers, options))
        return tokenizers.document(sample.key, segments)
    except DataError as error:
        if error.where:
            raise
        # Tokenizers see arrays and text, not where those came from.
        raise type(error)(error.what, where=sample.where, why=error.why, fix=error.fix) from error.__cause__
