"""`Piece`, `PackPlan` and `Pack`: what goes into a pack, by name first and then with its arrays.

A plan is a few integers, the same on every rank; a `Pack` is what one rank reads for the plans it owns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import DataError


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, end) of one document.

    source: name of the source; epoch: how often the source had been read through before this draw;
    sample: ordinal of the document over all shards of the source.
    """

    source: str
    epoch: int
    sample: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def to_json(self) -> list[Any]:
        """[source, epoch, sample, start, end]"""
        return [self.source, self.epoch, self.sample, self.start, self.end]

    @classmethod
    def from_json(cls, value: Any) -> Piece:
        """Inverse of `to_json`. Raises DataError on anything else."""
        if (
            not isinstance(value, list)
            or len(value) != 5
            or not isinstance(value[0], str)
            or any(type(v) is not int or v < 0 for v in value[1:])
            or value[3] >= value[4]
        ):
            raise DataError(
                "malformed piece of a pack", why=f"{value!r} is not [source, epoch, sample, start, end]"
            )
        return cls(*value)


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Pack number `index` of the stream: the pieces that fill its `context` slots, in order of slots."""

    index: int
    context: int
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Slots in use, padding left out."""
        return sum(p.end - p.start for p in self.pieces)

    def to_json(self) -> list[Any]:
        """[index, context, [piece, ...]]"""
        return [self.index, self.context, [p.to_json() for p in self.pieces]]

    @classmethod
    def from_json(cls, value: Any) -> PackPlan:
        """Inverse of `to_json`. Raises DataError on anything else."""
        if (
            not isinstance(value, list)
            or len(value) != 3
            or any(type(v) is not int or v < 0 for v in value[:2])
            or not isinstance(value[2], list)
        ):
            raise DataError("malformed pack plan", why=f"{value!r:.200} is not [index, context, pieces]")
        plan = cls(value[0], value[1], tuple(Piece.from_json(p) for p in value[2]))
        if plan.tokens > plan.context:
            raise DataError("malformed pack plan", why=f"{plan.tokens} tokens in a context of {plan.context}")
        return plan


@dataclass(frozen=True, slots=True)
class GridSpan:
    """A whole grid of latents in a pack: frames·height·width slots from `at` on.

    doc: number of its piece; layer: as the document counts them; condition: seen, not trained on; modality: number.
    """

    at: int
    frames: int
    height: int
    width: int
    doc: int
    layer: int
    condition: bool
    modality: int

    @property
    def cells(self) -> int:
        """Number of slots."""
        return self.frames * self.height * self.width

    @property
    def slots(self) -> slice:
        """Where it stands."""
        return slice(self.at, self.at + self.cells)


@dataclass(slots=True)
class Pack:
    """The arrays of one plan, L = plan.context slots. Nobody downstream derives a label or a boundary again.

    ids:             int32 [L], 0 in padding
    doc:             int32 [L], which piece a slot belongs to, 0..n-1 in order of slots, -1 is padding
    order:           int32 [L], position inside the piece, from 0
    positions:       int32 [L, 4], (time, row, column, layer) as the tokenizer gave them
    modality:        int8 [L], number in `MODALITIES`
    targets:         int32 [L], the id to predict at this slot, -1 for none (shifted already)
    target_modality: int8 [L], modality of that id, 0 for none
    weights:         float32 [L], loss weight of that id, 0 for none
    prefix:          int32 [L], leading slots of the slot's piece that are conditions (a prefix model lets them see
                     each other both ways)
    latents:         float32 [L, Z], the latent in a slot whose id is its placeholder, 0 elsewhere; None without any
    latent_weights:  float32 [L], loss weight of that latent (not shifted: a latent is its own target), else 0
    grids:           grids of latents without delimiters that lie in it whole, in order of slots
    embeddings:      float32 [m, E], vectors of words: one for each slot of modality text whose id is a placeholder, in
                     order of slots (not a row a slot: E is large and words are few); None without any
    """

    plan: PackPlan
    ids: NDArray[np.int32]
    doc: NDArray[np.int32]
    order: NDArray[np.int32]
    positions: NDArray[np.int32]
    modality: NDArray[np.int8]
    targets: NDArray[np.int32]
    target_modality: NDArray[np.int8]
    weights: NDArray[np.float32]
    prefix: NDArray[np.int32]
    latents: NDArray[np.float32] | None = None
    latent_weights: NDArray[np.float32] | None = None
    grids: tuple[GridSpan, ...] = ()
    embeddings: NDArray[np.float32] | None = None


def packs_for_rank(first: int, count: int, dp_rank: int, dp: int) -> range:
    """Pack numbers that data rank `dp_rank` of `dp` reads of the global batch [first, first + count).

    Contiguous blocks in order of rank, so the batch as a whole is the same for every `dp`.
    Raises ValueError when `count` does not divide by `dp` or the rank is out of range.
    """
    if dp < 1 or count < 1 or count % dp:
        raise ValueError(f"a global batch of {count} packs does not divide over dp = {dp}")
    if not 0 <= dp_rank < dp:
        raise ValueError(f"dp rank {dp_rank} is not in 0..{dp - 1}")
    share = count // dp
    return range(first + dp_rank * share, first + (dp_rank + 1) * share)
