"""From packs of words and latents to the tensors of a diffusion step on one rank.

Every random number (noise level, noise of each layer, whether words are dropped) is a function of (seed, sample,
draw), so ranks, order and layout change nothing; a draw is how often the source had been read through before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringweave.data_pipes.pack import GridSpan, Pack, Piece
from ringweave.parallel.ring_layout import RingLayout
from ringweave.pretrain.batch import Batch
from ringweave.pretrain.errors import NonFiniteError
from ringweave.pretrain.flow import (
    FlowSettings,
    dropped,
    level_of,
    loss_weight,
    noise_of,
    noised,
)
from ringweave.pretrain.models.dit import LATENT, WORD
from ringweave.pretrain.models.dit_positions import Grid, Preset, document_positions
from ringweave.pretrain.objectives import target_counts
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.manifest import BOS
from ringweave.tokenizers.segment import LATENT as PLACEHOLDER
from ringweave.tokenizers.segment import MODALITY_ID

#: Noise levels of a pack are padded to a multiple of this: a pipeline prepares itself for each number anew.
SEGMENTS = 8


@dataclass(frozen=True, slots=True)
class DiffusionSettings:
    """What a diffusion step asks of packs beside the model.

    preset, sign, axes: of the positions (see `dit_positions.py`); drop: share of documents that go without their
    words; per: over what losses are means, "token", "layer" or "sample"; words: weight of the words' own loss is
    above 0; given: numbers of the vectors that documents hold for their words, 0 where they hold ids.
    """

    flow: FlowSettings = field(default_factory=FlowSettings)
    seed: int = 0
    preset: Preset = "bil"
    sign: int = 1
    axes: int = 3
    drop: float = 0.1
    per: str = "token"
    words: bool = False
    given: int = 0


@dataclass(slots=True, kw_only=True)
class DiTBatch(Batch):
    """As `Batch`, with what a diffusion transformer reads (see `DiT.forward`); weights and modality are of each
    slot's own loss. vectors [n, l, text]: of given words, the model's `embeddings`; None where words are ids."""

    kind: Tensor
    places: Tensor
    segment: Tensor
    sigma: Tensor
    words: Tensor
    latents: Tensor
    velocity: Tensor
    vectors: Tensor | None = None

    @property
    def segments(self) -> int:
        """Noise levels of a pack, padding included."""
        return self.sigma.shape[1]

    def inputs(self, part: slice = slice(None)) -> dict[str, Tensor]:
        """What the model needs beside ids, of these packs; every tensor has the packs as its first dim."""
        names = (
            "kind", "places", "segment", "sigma", "documents", "words", "owner", "order", "latents", "velocity",
            "targets",
        )  # fmt: skip
        given = {} if self.vectors is None else {"embeddings": self.vectors[part]}
        return {name: getattr(self, name)[part] for name in names} | given


class _Slots:
    """The arrays of one pack, slot by slot, as they fill up."""

    def __init__(self, pack: Pack, channels: int, axes: int) -> None:
        size = pack.plan.context
        self.ids = pack.ids.copy()
        self.documents = pack.doc.copy()
        self.kind = np.zeros(size, np.int8)
        self.places = np.zeros((size, axes), np.int32)
        self.order = np.zeros(size, np.int32)
        self.targets = np.full(size, -1, np.int32)
        self.weights = np.zeros(size, np.float32)
        self.modality = np.zeros(size, np.int8)
        self.latents = np.zeros((size, channels), np.float32)
        self.velocity = np.zeros((size, channels), np.float32)
        self.levels = np.zeros(len(pack.plan.pieces), np.float32)
        #: row of `pack.embeddings` that is the vector of a slot, -1 for none
        self.row = np.full(size, -1, np.int32)
        at = is_vector(pack)
        self.row[at] = np.arange(int(at.sum()))


def is_vector(pack: Pack) -> NDArray[np.bool_]:
    """bool [L]: whether a slot is a word that is given as a vector."""
    return (pack.ids == PLACEHOLDER) & (pack.modality == MODALITY_ID["text"])


def sample_name(piece: Piece) -> str:
    """What keys the random numbers of a document."""
    return f"{piece.source}/{piece.sample}"


def collate_diffusion(
    packs: Sequence[Pack],
    settings: DiffusionSettings,
    *,
    channels: int,
    ring: RingLayout | None = None,
    rank: int = 0,
    levels: Sequence[float] | None = None,
) -> DiTBatch:
    """Noise the packs and keep the slots of ring rank `rank` under `ring` (None: all slots).

    channels: of the model's latents. levels: for validation, one level for each pack in place of drawn ones, with
    noise that training never draws and words never dropped. Raises DataError for latents of other channels, for words
    that are ids where vectors are given or vectors of another width, and for a document that is not whole,
    NonFiniteError for latents and vectors that are not finite.
    """
    filled = [
        _fill(pack, settings, channels, None if levels is None else levels[number])
        for number, pack in enumerate(packs)
    ]
    documents = np.stack([s.documents for s in filled])
    owner = (ring or RingLayout()).owner(documents, _lengths(documents))
    mine = owner == rank

    def own(name: str) -> NDArray[np.generic]:
        values = np.stack([getattr(s, name) for s in filled])
        return values[mine].reshape(len(packs), -1, *values.shape[2:])

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(own(name).astype(np.int64))

    most = max([1, *(len(s.levels) for s in filled)])
    sigma = np.zeros((len(packs), -(-most // SEGMENTS) * SEGMENTS), np.float32)
    for row, slots in zip(sigma, filled):
        row[: len(slots.levels)] = slots.levels
    weights, modality = np.stack([s.weights for s in filled]), np.stack([s.modality for s in filled])
    words = np.stack([s.kind == WORD for s in filled])
    return DiTBatch(
        ids=tensor("ids"), order=tensor("order"), targets=tensor("targets"),
        documents=torch.from_numpy(documents), owner=torch.from_numpy(owner),
        prefix=torch.zeros(documents.shape, dtype=torch.int32),
        weights=np.asarray(own("weights"), np.float32), modality=np.asarray(own("modality"), np.int8),
        counts=target_counts(weights, modality),
        real_tokens=int((documents >= 0).sum()), slots=documents.size,
        kind=tensor("kind"), places=tensor("places"),
        segment=torch.from_numpy(np.maximum(documents, 0)[mine].reshape(len(packs), -1).astype(np.int64)),
        sigma=torch.from_numpy(sigma), words=torch.from_numpy(words),
        latents=torch.from_numpy(own("latents")), velocity=torch.from_numpy(own("velocity")),
        vectors=_vectors(packs, own("row"), settings.given) if settings.given else None,
    )  # fmt: skip


def _vectors(packs: Sequence[Pack], rows: NDArray[Any], width: int) -> Tensor:
    """float32 [n, l, width] of the slots here, whose rows of their pack's vectors are given; 0 where there is none: the
    empty prompt is one vector of zeros."""
    out = np.zeros((*rows.shape, width), np.float32)
    for pack, row, vectors in zip(packs, rows, out):
        if pack.embeddings is not None:
            vectors[row >= 0] = pack.embeddings[row[row >= 0]]
    return torch.from_numpy(out)


def _lengths(documents: NDArray[np.int32]) -> NDArray[np.int32]:
    """Length of each slot's document [B, L], 0 in padding: all of a document is seen both ways."""
    out = np.zeros_like(documents)
    for row, lengths in zip(documents, out):
        counts = np.bincount(row[row >= 0], minlength=1)
        lengths[row >= 0] = counts[row[row >= 0]]
    return out


def _fill(pack: Pack, settings: DiffusionSettings, channels: int, level: float | None) -> _Slots:
    """The arrays of one pack. Documents that are not there (quarantined) stay padding."""
    if pack.latents is not None and pack.latents.shape[1] != channels:
        raise DataError(
            f"latents of {pack.latents.shape[1]} channels, the model reads {channels}",
            where=f"pack {pack.plan.index}",
            fix="encode the data with the codec of latents that the run names",
        )
    if pack.embeddings is not None and pack.embeddings.shape[1] != settings.given:
        wanted = (
            f"the model reads vectors of {settings.given}"
            if settings.given
            else "the model reads words as ids"
        )
        raise DataError(
            f"embeddings of {pack.embeddings.shape[1]} numbers, {wanted}",
            where=f"pack {pack.plan.index}",
            fix="set model.words.given to the numbers of a vector in the records",
        )
    slots = _Slots(pack, channels, settings.axes)
    grids: dict[int, list[GridSpan]] = {}
    for span in pack.grids:
        grids.setdefault(span.doc, []).append(span)
    at = 0
    for number, piece in enumerate(pack.plan.pieces):
        inside = slice(at, at + len(piece))
        at += len(piece)
        if (pack.doc[inside] >= 0).any():
            _fill_document(slots, pack, piece, inside, grids.get(number, []), settings, level)
    return slots


def _fill_document(
    slots: _Slots,
    pack: Pack,
    piece: Piece,
    inside: slice,
    spans: list[GridSpan],
    settings: DiffusionSettings,
    level: float | None,
) -> None:
    """One document: words in front, then its grids to the end."""
    first = spans[0].at if spans else inside.stop
    cells = sum(span.cells for span in spans)
    targets = [span for span in spans if not span.condition]
    given = int((slots.row[inside] >= 0).sum())
    latent = int((pack.ids[inside] == PLACEHOLDER).sum()) - given
    if piece.start or first + cells != inside.stop or latent != cells or first == inside.start or not targets:
        raise DataError(
            "a document is no whole document of words and latents",
            where=f"{piece.source} sample {piece.sample}, tokens {piece.start} to {piece.end}",
            why="it was cut at the end of a context, or its plan is not one of latents",
            fix="raise the context above the longest document, and use plans of `latents`",
        )
    _check_words(slots, pack, piece, slice(inside.start, first), given, settings)
    name, draw = sample_name(piece), piece.epoch
    number = int(pack.doc[inside.start])
    words = slice(inside.start, first)
    if level is None:
        drawn = level_of(settings.seed, name, draw, targets[0].cells, settings.flow)
        words = _drop_words(slots, words, dropped(settings.seed, name, draw, settings.drop))
    else:
        drawn, draw = level, -1  # no source has been read through -1 times
    slots.levels[number] = drawn
    grids = [Grid(s.height, s.width, s.frames, s.condition) for s in spans]
    text, image = document_positions(
        grids, words.stop - words.start, settings.preset, axes=settings.axes, sign=settings.sign
    )
    slots.places[words], slots.places[first : inside.stop] = text, image
    slots.kind[words], slots.kind[first : inside.stop] = WORD, LATENT
    slots.order[words] = np.arange(words.stop - words.start)
    if settings.words:
        slots.targets[words] = pack.targets[words]  # none for the last: a latent follows it
        slots.weights[words] = slots.targets[words] >= 0
        slots.modality[words] = MODALITY_ID["text"]
    _noise(slots, pack, piece, spans, settings, drawn, draw)


def _check_words(
    slots: _Slots, pack: Pack, piece: Piece, words: slice, given: int, settings: DiffusionSettings
) -> None:
    """The words of a document are all vectors where those are given, or `bos` alone, the empty prompt."""
    where = f"{piece.source} sample {piece.sample}"
    count = words.stop - words.start
    if settings.given and given != count and (given or count > 1):
        raise DataError(
            f"a document with {count - given} words as ids, the model reads vectors of words",
            where=where,
            fix="put `embeddings` into the plan in the place of its words",
        )
    if given:
        assert pack.embeddings is not None
        if not np.isfinite(pack.embeddings[slots.row[words]]).all():
            raise NonFiniteError(
                "embeddings of a document are not finite",
                where=where,
                why="the record gave them; no parameter was updated",
                fix="see the record: ringweave data show; leave it out or mend it, and resume",
            )


def _drop_words(slots: _Slots, words: slice, drop: bool) -> slice:
    """The slots of the words that stay. Where they are dropped this is one, the last, with the empty prompt's id (or no
    vector)."""
    if drop:
        slots.documents[words.start : words.stop - 1] = -1
        slots.row[words] = -1
        words = slice(words.stop - 1, words.stop)
        slots.ids[words] = BOS
    return words


def _noise(
    slots: _Slots,
    pack: Pack,
    piece: Piece,
    spans: list[GridSpan],
    settings: DiffusionSettings,
    level: float,
    draw: int,
) -> None:
    """Latents of conditions as they are; those of targets noised, with velocities, weights and modalities."""
    assert pack.latents is not None and pack.latent_weights is not None
    targets = [span for span in spans if not span.condition]
    total = sum(span.cells for span in targets)
    for layer, span in enumerate(spans):
        clean = pack.latents[span.slots]
        if not np.isfinite(clean).all():
            raise NonFiniteError(
                f"latents of layer {layer} of a document are not finite",
                where=f"{piece.source} sample {piece.sample}",
                why="the codec of latents or the record gave them; no parameter was updated",
                fix="see the record: ringweave data show; leave it out or mend it, and resume",
            )
        if span.condition:
            slots.latents[span.slots] = clean
            continue
        noise = noise_of(settings.seed, sample_name(piece), draw, layer, clean.shape)
        slots.latents[span.slots], slots.velocity[span.slots] = noised(clean, noise, level)
        share = {"token": 1.0, "layer": 1.0 / span.cells, "sample": 1.0 / total}[settings.per]
        weight = share * (1.0 if draw < 0 else loss_weight(level, settings.flow))
        slots.weights[span.slots] = weight * pack.latent_weights[span.slots]
        slots.modality[span.slots] = span.modality
