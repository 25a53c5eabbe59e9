"""From plans to packs, for the ranks of a whole job: draw a global batch, get its documents, settle what failed.

`BatchReader` is what a `Prefetcher` runs. A batch takes one round among the ranks of its dp index (the documents,
`DocumentExchange`) and one among all ranks (what could not be read, a wish to stop, an error), so every rank keeps the
same journal and ends at the same batch.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ringweave.data_pipes.corpus import Corpus, Unit
from ringweave.data_pipes.pack import Pack, PackPlan, Piece
from ringweave.data_pipes.planner import EndOfData
from ringweave.data_pipes.quarantine import Failure
from ringweave.data_pipes.stream import PackStream
from ringweave.data_pipes.token_block import TokenBlock
from ringweave.pretrain.data_exchange import DocumentExchange, Gather, Outcome, describe, restored
from ringweave.tokenizers.segment import Document


@dataclass(frozen=True, slots=True)
class ReadyBatch:
    """A global batch: its plans, this dp index's packs, the cursor after it, what went into quarantine with it."""

    plans: list[PackPlan]
    packs: list[Pack]
    state_after: dict[str, Any]
    quarantined: list[Failure]


class BatchReader:
    """Reads batch after batch of `count` packs, of which this dp index owns `mine`. Call it with the stop event.

    A corpus that makes documents up (anything but `Corpus`) is asked for them one by one. ended: finite data is over
    (true as soon as the last batch is made: a prefetcher may still hold some).
    """

    def __init__(
        self,
        stream: PackStream,
        *,
        count: int,
        mine: range,
        exchange: DocumentExchange | None = None,
        everyone: Gather | None = None,
    ) -> None:
        self.stream, self.count, self.mine = stream, count, mine
        self.exchange = exchange or DocumentExchange()
        self.everyone = everyone or Gather()
        self.ended = False

    def __call__(self, stop: threading.Event) -> ReadyBatch | None:
        """The next batch; None once this rank or another one stops, or after the last one of finite data (`ended`),
        which is filled up with empty packs: all ranks end at the same call. Raises on all ranks what one of them met,
        and DataError when too much is in quarantine."""
        if self.ended:
            return None
        stopping, ended = stop.is_set(), False
        plans: list[PackPlan] = []
        state: dict[str, Any] = {}
        if not stopping:
            try:
                drawn = self.stream.next_batch(self.count)
                plans, state = drawn.plans, drawn.state_after
            except EndOfData:
                ended = True  # a rank that stops did not look, and waits for this round
        if not isinstance(self.stream.corpus, Corpus):
            units: list[Unit] = []
            outcome = Outcome([], stopping, ended=ended)
        else:
            units = self._units(self.stream.corpus, plans) if plans else []
            outcome = self._documents(self.stream.corpus, units, stop, stopping, ended)
        documents, failed = self._sorted(units, outcome.blocks)
        failures = self._agree(failed, outcome)
        if failures is None:
            return None
        fresh = self.stream.quarantine.batch(plans, failures)
        read = documents.of if units else None
        packs = [self.stream.materialise(plans[i], read) for i in self.mine]
        return ReadyBatch(plans, packs, {**state, "quarantine": self.stream.quarantine.state()}, fresh)

    def _units(self, corpus: Corpus, plans: Sequence[PackPlan]) -> list[Unit]:
        pieces = [p for i in self.mine for p in plans[i].pieces]
        wanted = dict.fromkeys((p.source, p.sample) for p in pieces)
        return corpus.units(d for d in wanted if d not in self.stream.quarantine)

    def _documents(
        self, corpus: Corpus, units: list[Unit], stop: threading.Event, stopping: bool, ended: bool
    ) -> Outcome:
        def make(some: Sequence[Unit]) -> list[TokenBlock]:
            return corpus.make(some, stop=stop)

        return self.exchange.share(units, make, stopping=stopping, ended=ended)

    def _sorted(
        self, units: Sequence[Unit], blocks: Sequence[TokenBlock]
    ) -> tuple[_Documents, list[Failure]]:
        """Where each document is, and those that could not be made."""
        found = _Documents()
        failed: list[Failure] = []
        corpus = self.stream.corpus
        if not isinstance(corpus, Corpus):
            return found, failed
        for unit, block in zip(units, blocks):
            before = corpus.before(unit)
            for i, number in enumerate(unit.samples):
                entry = block.entry(i)
                if entry is None:
                    found.places[unit.source, before + number] = block, i
                else:
                    failed.append(corpus.failure(unit, number, entry))
        return found, failed

    def _agree(self, failed: list[Failure], outcome: Outcome) -> list[Failure] | None:
        """The failures of all ranks; None if one of them stops or came to the end (all have the same plan). Raises the
        error that one of them met."""
        if self.everyone.size == 1:
            if outcome.error is not None:
                raise outcome.error
            self.ended = outcome.ended
            return None if outcome.stopping or outcome.ended else failed
        news: dict[str, Any] = {}
        if failed:
            news["failed"] = [f.to_json() for f in failed]
        if outcome.stopping:
            news["stop"] = True
        if outcome.ended:
            news["end"] = True
        if outcome.error is not None:
            news["error"] = describe(outcome.error)
        answers = self.everyone(json.dumps(news).encode() if news else b"")
        heard = [json.loads(a) if a else {} for a in answers]
        if outcome.error is not None:
            raise outcome.error
        for rank, said in enumerate(heard):
            if "error" in said:
                raise restored(said["error"], f"rank {rank}")
        self.ended = any("end" in said for said in heard)
        if self.ended or any("stop" in said for said in heard):
            return None
        return [Failure.from_json(f) for said in heard for f in said.get("failed", [])]


class _Documents:
    """Documents by (source, sample), out of blocks; the last one is kept, for the pieces that follow each other."""

    def __init__(self) -> None:
        self.places: dict[tuple[str, int], tuple[TokenBlock, int]] = {}
        self._last: tuple[tuple[str, int], Document] | None = None

    def of(self, piece: Piece) -> Document:
        """The document of a piece."""
        key = (piece.source, piece.sample)
        if self._last is None or self._last[0] != key:
            block, i = self.places[key]
            self._last = key, block.document(i)
        return self._last[1]
