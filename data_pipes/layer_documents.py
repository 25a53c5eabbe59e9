"""Records of layers, pictures and clips as documents of latents: words, then grids, each a view of the record.

`latents:layers`, `latents:trimap?` and so on: `plan_items.py` has the names, `layer_views.py` what they show. Words,
or their embeddings (`embeddings.py`), come first and are always a condition. Then come the grids, targets before
conditions whatever the order of the plan (as in Qwen-Image, whose layered form takes the last grid for the
condition); of a view with several pictures each is a grid. Targets are numbered 0, 1, ... and conditions -1, -2, ...
(`Segment.positions`, layer), so every grid of a document has a number of its own.

`latents:image` and members that are named are opaque (transparency lies on white), `latents:video` is one grid of
many frames.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.embeddings import embeddings_of
from ringweave.data_pipes.formats import member_of, missing_member, text_of
from ringweave.data_pipes.layer_views import TOLERANCE, composite_error, pictures_of
from ringweave.data_pipes.plan_items import CLIPS, PICTURES, WORDS, Entry, read_by_view
from ringweave.data_pipes.sample import Sample
from ringweave.tokenizers import bare, media
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.members import as_rgb, as_rgba
from ringweave.tokenizers.segment import Document, Role, Segment

#: Members that hold the layers over each other; those that are there must agree with the layers.
FLAT = ("flat.png", "composite.png")
_LAYER = re.compile(r"layer(\d+)\.png")
#: Views that are opaque by their nature.
_OPAQUE = ("alpha", "trimap", "mask", "top_mask")


class LayerTokenizers(Protocol):
    """The part of `TokenizerSet` used here."""

    def text_segment(self, text: str, *, role: Role = ..., weight: float = ...) -> Segment: ...
    def encode_layer(self, layer: NDArray[np.uint8]) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class Picture:
    """What one grid shows. name: in messages; modality: image, rgba or video; frames: uint8 [T, H, W, 4]."""

    name: str
    modality: str
    frames: NDArray[np.uint8]


def latents_document(
    sample: Sample, plan: Sequence[tuple[Entry, Role]], tokenizers: LayerTokenizers
) -> Document:
    """The document of a sample by a plan of latents and words, or vectors of words.

    Raises DataError, naming the sample and where it can the layer, for missing or damaged members, layers without
    alpha, of different sizes or that do not add up, views a record cannot give, and latents that are not finite.
    """
    lines = [text_of(sample, entry) for entry, _ in plan if entry.item in WORDS]
    words = None
    if any(lines):
        words = tokenizers.text_segment("\n".join(lines), role="condition", weight=0.0)
    for entry, _ in plan:
        if entry.item == "embeddings":
            words = bare.embedding_segment(embeddings_of(sample, entry))
    views = _Views(sample)
    grids: dict[Role, list[Segment]] = {"target": [], "condition": []}
    for entry, role in plan:
        if entry.item != "latents":
            continue
        for picture in views.pictures(entry):
            mine = grids[role]
            number = len(mine) if role == "target" else -1 - len(mine)
            mine.append(_grid(sample, picture, tokenizers, layer=number, role=role))
    return bare.document(sample.key, words, [*grids["target"], *grids["condition"]])


def _grid(
    sample: Sample, picture: Picture, tokenizers: LayerTokenizers, *, layer: int, role: Role
) -> Segment:
    where = f"{sample.where}:{picture.name}"
    try:
        latents = np.stack([tokenizers.encode_layer(frame) for frame in picture.frames])
    except VocabularyError:
        raise
    except DataError as error:  # the encoder names itself at most: it sees an array
        why = ": ".join(part for part in (error.where, error.why) if part)
        raise DataError(error.what, where=where, why=why, fix=error.fix) from error.__cause__
    wrong = np.argwhere(~np.isfinite(latents))
    if len(wrong):
        raise DataError(
            "the encoder gave latents that are not finite",
            where=where,
            why=f"{len(wrong)} of {latents.size} numbers, the first at {wrong[0].tolist()} of {list(latents.shape)}",
            fix="check the encoder: every picture has finite latents",
        )
    weight = 1.0 if role == "target" else 0.0
    return bare.latent_segment(latents, modality=picture.modality, layer=layer, role=role, weight=weight)


class _Views:
    """The pictures of one sample; its layers are read once, and not at all where no view wants them."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._item = ""

    def pictures(self, entry: Entry) -> list[Picture]:
        """What a `latents` entry names, a grid each. Raises DataError as `latents_document`."""
        view, self._item = entry.argument, entry.text
        made_of = read_by_view(view)
        if made_of != "rgba":
            return [self._clip(view) if made_of == "video" else self._picture(view)]
        try:
            found = pictures_of(self._layers, view, key=self._sample.key)
        except DataError as error:
            if error.where:
                raise
            what = f"plan item {entry.text!r}: {error.what}"
            raise DataError(what, where=self._sample.where, why=error.why, fix=error.fix) from None
        modality = "image" if view in _OPAQUE else "rgba"
        return [Picture(name, modality, picture[None]) for name, picture in found]

    def _picture(self, view: str) -> Picture:
        wanted = (*PICTURES, "flat.png") if view == "image" else (view,)
        data = member_of(self._sample, self._item, wanted)
        name = next(name for name in wanted if name in self._sample.members)
        pixels = media.decode_image(data, where=f"{self._sample.where}:{name}")
        return Picture(name, "image", as_rgba(as_rgb(pixels))[None])

    def _clip(self, view: str) -> Picture:
        wanted = CLIPS if view == "video" else (view,)
        data = member_of(self._sample, self._item, wanted)
        name = next(name for name in wanted if name in self._sample.members)
        frames, _ = media.decode_video(data, where=f"{self._sample.where}:{name}")
        return Picture(name, "video", np.stack([as_rgba(frame) for frame in frames]))

    @cached_property
    def _layers(self) -> list[NDArray[np.uint8]]:
        layers = layers_of(self._sample, self._item, alpha=True)
        check_composite(self._sample, layers)
        return layers


# ---- layers of a record ----


def layers_of(sample: Sample, item: str = "rgba", *, alpha: bool = False) -> list[NDArray[np.uint8]]:
    """uint8 [H, W, 4] of layer0.png, layer1.png, ...: bottom first.

    alpha: whether a layer that stores none is an error, instead of opaque. DataError for a gap, too, and for layers
    of different sizes.
    """
    numbers = sorted(int(m[1]) for m in map(_LAYER.fullmatch, sample.members) if m)
    names = [f"layer{n}.png" for n in range(len(numbers))]
    if not names or any(name not in sample.members for name in names):
        raise missing_member(sample, item, "layer0.png, layer1.png, ... without a gap")
    layers = []
    for name in names:
        where = f"{sample.where}:{name}"
        pixels = media.decode_image(sample.members[name], where=where)
        if alpha and pixels.shape[2] != 4:
            raise DataError(
                f"plan item {item!r} wants RGBA, and this layer stores no alpha",
                where=where,
                why=f"it has {pixels.shape[2]} channel{'s'[: pixels.shape[2] != 1]}",
                fix="store it with alpha, 255 where it is opaque",
            )
        layers.append(as_rgba(pixels))
    if len({layer.shape for layer in layers}) > 1:
        sizes = ", ".join(f"{layer.shape[1]}x{layer.shape[0]}" for layer in layers)
        raise DataError("layers of different sizes", where=sample.where, why=sizes)
    return layers


def check_composite(sample: Sample, layers: Sequence[NDArray[np.uint8]]) -> None:
    """DataError if flat.png or composite.png is there and the layers do not add up to it, over black and over white.

    A stored picture without alpha counts as opaque.
    """
    for name in FLAT:
        if name not in sample.members:
            continue
        where = f"{sample.where}:{name}"
        flat = as_rgba(media.decode_image(sample.members[name], where=where))
        if flat.shape != layers[0].shape:
            size, theirs = ("x".join(map(str, x.shape[1::-1])) for x in (flat, layers[0]))
            raise DataError("layers and their composite differ in size", where=where, why=f"{size}, {theirs}")
        error = composite_error(layers, flat)
        if error > TOLERANCE:
            raise DataError(
                "the layers do not add up to the stored composite",
                where=where,
                why=f"over black or white they differ by {error}/255, more than {TOLERANCE}/255",
                fix="check the order of the layers (layer0.png is the bottom) and that alpha is straight",
            )
