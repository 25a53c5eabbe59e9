"""`PackStream`: batches of plans with the cursor that follows each, and the packs of those one owns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.pack import Pack, PackPlan, Piece
from ringweave.data_pipes.packing import materialise
from ringweave.data_pipes.planner import PackPlanner
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import Document


class Documents(Protocol):
    """What a stream needs of a corpus: `Corpus`, or anything that makes documents up."""

    @property
    def lengths(self) -> dict[str, NDArray[np.int64]]: ...
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
    """The packs of a job. Plans are the same on every rank; `materialise` reads the tokens of one."""

    def __init__(self, corpus: Documents, planner: PackPlanner) -> None:
        self.corpus, self.planner = corpus, planner

    @classmethod
    def restore(cls, corpus: Documents, state: Mapping[str, Any], *, seed: int | None = None) -> PackStream:
        """The stream that `state` came from. Raises DataError if the corpus or the seed is another one."""
        if not isinstance(state, Mapping) or set(state) != {"corpus", "planner"}:
            raise DataError("malformed data cursor", why="it must hold exactly `corpus` and `planner`")
        if state["corpus"] != corpus.digest:
            raise DataError(
                "the data changed since the checkpoint was saved",
                why="sources, plans, vocabulary, shards or lengths differ, so the cursor points elsewhere",
                fix="resume with the data of the checkpoint or start a new run",
            )
        return cls(corpus, PackPlanner.restore(state["planner"], lengths=corpus.lengths, seed=seed))

    def plans(self, count: int) -> list[PackPlan]:
        """The next `count` plans; moves the stream on."""
        return [self.planner.next() for _ in range(count)]

    def next_batch(self, count: int) -> Batch:
        """The next global batch of `count` packs with the state to store once it is trained on."""
        plans = self.plans(count)
        return Batch(plans, self.state())

    def switch(
        self, *, context: int, weights: Mapping[str, float] | None = None, bins: int | None = None
    ) -> None:
        """Starts a stage; see `PackPlanner.switch`."""
        self.planner.switch(context=context, weights=weights, bins=bins)

    def materialise(self, plan: PackPlan) -> Pack:
        """Reads a pack. Does not move the stream."""
        return materialise(plan, self.corpus.document)

    def state(self) -> dict[str, Any]:
        """The cursor as a JSON object."""
        return {"corpus": self.corpus.digest, "planner": self.planner.state()}
