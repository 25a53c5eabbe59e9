"""`PackStream`: batches of plans with the cursor that follows each, and the packs of those one owns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.lengths import Lengths
from ringweave.data_pipes.pack import Pack, PackPlan, Piece
from ringweave.data_pipes.packing import materialise
from ringweave.data_pipes.planner import EndOfData, PackPlanner
from ringweave.data_pipes.quarantine import Quarantine
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import Document


class Documents(Protocol):
    """What a stream needs of a corpus: `Corpus`, or anything that makes documents up."""

    @property
    def lengths(self) -> Lengths | Mapping[str, NDArray[np.int64]]: ...
    @property
    def digest(self) -> str: ...
    def document(self, piece: Piece, /) -> Document: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """One global batch. A checkpoint stores `state_after` of the last batch *stepped on*, not of the last
    one produced, so batches prepared ahead are planned again after a restart."""

    plans: list[PackPlan]
    state_after: dict[str, Any]


class PackStream:
    """The packs of a job. Plans are the same on every rank; `materialise` reads the tokens of one.

    quarantine: documents that turned out unreadable while the run trained; they are padding, and part of the cursor.
    """

    def __init__(self, corpus: Documents, planner: PackPlanner, quarantine: Quarantine | None = None) -> None:
        self.corpus, self.planner = corpus, planner
        self.quarantine = quarantine if quarantine is not None else Quarantine()

    @classmethod
    def restore(
        cls,
        corpus: Documents,
        state: Mapping[str, Any],
        *,
        seed: int | None = None,
        quarantine: Quarantine | None = None,
    ) -> PackStream:
        """The stream that `state` came from. quarantine: an empty one with the limits to keep.

        Raises DataError if the corpus or the seed is another one, or the state is malformed.
        """
        if not isinstance(state, Mapping) or set(state) - {"quarantine"} != {"corpus", "planner"}:
            raise DataError(
                "malformed data cursor", why="it must hold exactly `corpus`, `planner` and `quarantine`"
            )
        if state["corpus"] != corpus.digest:
            raise DataError(
                "the data changed since the checkpoint was saved",
                why="sources, plans, vocabulary, shards or lengths differ, so the cursor points elsewhere",
                fix="resume with the data of the checkpoint or start a new run",
            )
        stream = cls(
            corpus, PackPlanner.restore(state["planner"], lengths=corpus.lengths, seed=seed), quarantine
        )
        if "quarantine" in state:
            stream.quarantine.restore(state["quarantine"])
        return stream

    def plans(self, count: int) -> list[PackPlan]:
        """The next `count` plans; moves the stream on.

        Packs without pieces fill the last batch of finite data up. Raises EndOfData after it, every time.
        """
        plans = self.planner.plans(count)
        if plans is None:
            raise EndOfData("every source was read as often as asked for")
        return plans

    def next_batch(self, count: int) -> Batch:
        """The next global batch of `count` packs with the state to store once it is trained on.

        Raises EndOfData after the last batch of finite data.
        """
        plans = self.plans(count)
        return Batch(plans, self.state())

    def switch(
        self, *, context: int, weights: Mapping[str, float] | None = None, bins: int | None = None
    ) -> None:
        """Starts a stage; see `PackPlanner.switch`."""
        self.planner.switch(context=context, weights=weights, bins=bins)

    def materialise(
        self, plan: PackPlan, document_of: Callable[[Piece], Document | None] | None = None
    ) -> Pack:
        """Reads a pack; documents in quarantine are padding. Does not move the stream.

        document_of: where documents come from, if not from the corpus one by one.
        """
        read = self.corpus.document if document_of is None else document_of

        def wanted(piece: Piece) -> Document | None:
            return None if (piece.source, piece.sample) in self.quarantine else read(piece)

        return materialise(plan, wanted)

    def state(self) -> dict[str, Any]:
        """The cursor as a JSON object."""
        return {
            "corpus": self.corpus.digest,
            "planner": self.planner.state(),
            "quarantine": self.quarantine.state(),
        }
