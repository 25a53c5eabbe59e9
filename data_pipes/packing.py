"""From a plan to arrays: the one place where labels are shifted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.pack import GridSpan, Pack, PackPlan, Piece
from ringweave.tokenizers.bare import shape_of
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import LATENT, MODALITY_ID, Document, Segment

PAD_ID = 0


def materialise(plan: PackPlan, document_of: Callable[[Piece], Document | None]) -> Pack:
    """Reads the documents of a plan into a `Pack`.

    The target of a slot is the next token of its *document*, also where that token lies in the next piece
    of a split document; the last token of a document has none. A piece of a document that is not there (None)
    is padding: its slots are as if no document were planned there, and the others keep theirs. Raises DataError
    if a piece reaches beyond its document or the pieces beyond the context.
    """
    if plan.tokens > plan.context:
        raise DataError(f"pack {plan.index} holds {plan.tokens} tokens in a context of {plan.context}")
    size = plan.context
    pack = Pack(
        plan=plan,
        ids=np.full(size, PAD_ID, np.int32),
        doc=np.full(size, -1, np.int32),
        order=np.zeros(size, np.int32),
        positions=np.zeros((size, 4), np.int32),
        modality=np.zeros(size, np.int8),
        targets=np.full(size, -1, np.int32),
        target_modality=np.zeros(size, np.int8),
        weights=np.zeros(size, np.float32),
        prefix=np.zeros(size, np.int32),
    )
    at = 0
    vectors: list[NDArray[np.float32]] = []
    for number, piece in enumerate(plan.pieces):
        document = document_of(piece)
        if document is not None:
            _write(pack, at, number, piece, document, vectors)
        at += len(piece)
    if vectors:
        pack.embeddings = np.concatenate(vectors)
    return pack


def _write(
    pack: Pack, at: int, number: int, piece: Piece, document: Document, vectors: list[NDArray[np.float32]]
) -> None:
    """Writes one piece to slots at, at + 1, ... of the pack; its words' vectors go behind `vectors`."""
    stop = at + len(piece)
    pack.doc[at:stop] = number
    pack.order[at:stop] = np.arange(len(piece), dtype=np.int32)
    lead = sum(len(s) for s in takewhile(lambda s: s.role == "condition", document.segments))
    pack.prefix[at:stop] = max(0, min(lead, piece.end) - piece.start)
    begin = 0  # of the segment, inside the document
    for segment in document.segments:
        end = begin + len(segment)
        _write_inputs(pack, at - piece.start, begin, segment, piece.start, piece.end)
        if segment.latents is not None and segment.modality == "text":
            _add_vectors(vectors, begin, segment, piece)
        elif segment.latents is not None:
            _write_latents(pack, at - piece.start, begin, segment, piece)
            _write_grid(pack, at - piece.start, begin, segment, piece, number)
        # A token t of the document is the target of slot t - 1: the window moves on by one.
        _write_targets(pack, at - piece.start - 1, begin, segment, piece.start + 1, piece.end + 1)
        begin = end
    if piece.end > begin:
        raise DataError(
            "a plan asks for tokens beyond the end of a document",
            where=f"{piece.source}#{document.key}",
            why=f"tokens {piece.start}..{piece.end} of {begin}",
            fix="the token cache changed under the plan: resume with the data of the checkpoint",
        )


def _write_inputs(pack: Pack, shift: int, begin: int, segment: Segment, start: int, end: int) -> None:
    """Copies document tokens [start, end) as far as they lie in the segment that starts at `begin`."""
    low, high = max(start, begin), min(end, begin + len(segment))
    if low < high:
        slots, inside = slice(low + shift, high + shift), slice(low - begin, high - begin)
        pack.ids[slots] = segment.ids[inside]
        pack.positions[slots] = segment.positions[inside]
        pack.modality[slots] = MODALITY_ID[segment.modality]


def _write_targets(pack: Pack, shift: int, begin: int, segment: Segment, start: int, end: int) -> None:
    """The same for targets, with modality and weight of the segment that holds the target."""
    low, high = max(start, begin), min(end, begin + len(segment))
    if low < high:
        slots, inside = slice(low + shift, high + shift), slice(low - begin, high - begin)
        pack.targets[slots] = segment.ids[inside]
        pack.target_modality[slots] = MODALITY_ID[segment.modality]
        pack.weights[slots] = segment.weight if segment.role == "target" else 0.0
        if segment.latents is not None:
            # No id is predicted where a latent stands: its own loss is that of the latent.
            placeholders = np.flatnonzero(segment.ids[inside] == LATENT) + slots.start
            pack.targets[placeholders], pack.target_modality[placeholders] = -1, 0
            pack.weights[placeholders] = 0.0


def _add_vectors(vectors: list[NDArray[np.float32]], begin: int, segment: Segment, piece: Piece) -> None:
    """The vectors of the words that lie in the piece."""
    assert segment.latents is not None
    places = np.flatnonzero(segment.ids == LATENT) + begin  # in the document
    width = segment.latents.shape[1]
    if vectors and vectors[0].shape[1] != width:
        raise DataError(
            f"embeddings of {width} and of {vectors[0].shape[1]} numbers in one pack",
            where=f"{piece.source} sample {piece.sample}",
            fix="make the embeddings of all sources with one model",
        )
    vectors.append(segment.latents[(places >= piece.start) & (places < piece.end)])


def _write_latents(pack: Pack, shift: int, begin: int, segment: Segment, piece: Piece) -> None:
    """Latents, and the weights of their losses, into the slots of their placeholders."""
    assert segment.latents is not None
    places = np.flatnonzero(segment.ids == LATENT) + begin  # in the document
    inside = (places >= piece.start) & (places < piece.end)
    width = segment.latents.shape[1]
    if pack.latents is None or pack.latent_weights is None:
        pack.latents = np.zeros((len(pack.ids), width), np.float32)
        pack.latent_weights = np.zeros(len(pack.ids), np.float32)
    if pack.latents.shape[1] != width:
        raise DataError(
            f"latents of {width} and of {pack.latents.shape[1]} channels in one pack",
            where=f"{piece.source} sample {piece.sample}",
            fix="encode all sources with one codec of latents",
        )
    slots = places[inside] + shift
    pack.latents[slots] = segment.latents[inside]
    pack.latent_weights[slots] = segment.weight if segment.role == "target" else 0.0


def _write_grid(pack: Pack, shift: int, begin: int, segment: Segment, piece: Piece, number: int) -> None:
    """Notes a grid that lies whole in the piece."""
    shape = shape_of(segment)
    if shape is None or begin < piece.start or begin + len(segment) > piece.end:
        return
    span = GridSpan(
        begin + shift, *shape, doc=number, layer=int(segment.positions[0, 3]),
        condition=segment.role == "condition", modality=MODALITY_ID[segment.modality],
    )  # fmt: skip
    pack.grids = (*pack.grids, span)
