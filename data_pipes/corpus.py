"""All documents of a job by (source, sample): read from token caches on disk, made where they are missing.

What is asked for is grouped into units: the wanted documents of one part of one shard (`token_parts.py`). `units`
plans alike on every rank; `make` does the work of some units, so the ranks of a data group can share it out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.pack import Piece
from ringweave.data_pipes.quarantine import Failure
from ringweave.data_pipes.recent import Recent
from ringweave.data_pipes.shard_names import Shard, address_of, shard_name, shown
from ringweave.data_pipes.store import reader_of
from ringweave.data_pipes.token_block import TokenBlock, add_counts
from ringweave.data_pipes.token_lengths import FileLengths, open_lengths
from ringweave.data_pipes.token_parts import ShardTokens, part_bounds, select
from ringweave.data_pipes.token_vocabulary import FIX
from ringweave.data_pipes.workers import Task, TokenWorkers
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import Document

#: Shards whose caches, and parts whose tables, stay open; the files themselves are mapped.
_OPEN_SHARDS, _OPEN_PARTS = 64, 256
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A named source: its shards in order and what its documents hold (see `documents.py`).

    shards: paths of local tars; for all others what `Store.shard` gives. whole: its shards are read in one go each (no
    random access to their bytes).
    """

    name: str
    shards: Sequence[Shard]
    plan: tuple[str, ...]
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Unit:
    """Documents wanted of one part of a shard.

    shard: number in its source; first, count: samples of the part; samples: those wanted, as numbers in the shard,
    rising; part_tokens, tokens: of the whole part and of what is wanted.
    """

    source: str
    shard: int
    first: int
    count: int
    samples: tuple[int, ...]
    part_tokens: int
    tokens: int

    @property
    def part(self) -> tuple[str, int, int]:
        """What names the part in a job."""
        return self.source, self.shard, self.first


@dataclass(slots=True)
class Read:
    """Documents that came from storage, and that were made."""

    stored: int = 0
    made: int = 0


class Corpus:
    """Documents of several sources; `sample` counts through the shards of a source.

    lengths: of all documents by source and shard (see `lengths.py`), 0 for a skipped one
    digest:  sha256 over sources, plans, vocabulary, names of shards (without their folder) and lengths
    skipped: [{"source", "shard", "key", "reason"}], what cannot be used
    read:    how many documents were read from storage and how many made
    """

    def __init__(
        self,
        specs: Sequence[SourceSpec],
        lengths: FileLengths,
        *,
        manifest_hash: str,
        workers: TokenWorkers | None = None,
        folder: Path | None = None,
        store: bool = True,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self.lengths, self.workers, self.read = lengths, workers, Read()
        self._manifest, self._folder, self._store, self._warn = manifest_hash, folder, store, warn
        self._ends = {name: np.cumsum(lengths.counts(name)) for name in lengths.names}
        self._sizes: Recent[tuple[str, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = Recent(256)
        self._tokens: Recent[tuple[str, int], ShardTokens] = Recent(_OPEN_SHARDS)
        self._parts: Recent[tuple[str, int, int], TokenBlock] = Recent(_OPEN_PARTS)
        self._counts: dict[str, dict[str, NDArray[np.int64]]] = {}
        self._last: tuple[str, int, Document] | None = None
        self._lock = threading.RLock()
        digest = hashlib.sha256(manifest_hash.encode())
        for name in lengths.names:
            spec = self._specs[name]
            digest.update(json.dumps([name, list(spec.plan), [shard_name(s) for s in spec.shards]]).encode())
            digest.update(json.dumps([s.digest for s in lengths.sizes(name)]).encode())
        self.digest = digest.hexdigest()

    @classmethod
    def open(
        cls,
        specs: Sequence[SourceSpec],
        *,
        manifest_hash: str,
        workers: TokenWorkers | None = None,
        folder: Path | None = None,
        store: bool = True,
        warn: Callable[[str], None] = _log.warning,
    ) -> Corpus:
        """Opens the lengths of all shards: sidecars or complete token caches.

        workers: make documents that are not stored (None: they have to be); folder: where caches lie that cannot lie
        beside their shard; store: whether what is made is stored; warn: told what does not end the run. Raises
        DataError for missing, stale or damaged lengths, a repeated name or a source without shards, VocabularyError
        for those of another manifest.
        """
        names: set[str] = set()
        for spec in specs:
            if spec.name in names or not spec.shards:
                why = "the name occurs twice" if spec.name in names else "it lists no shards"
                raise DataError(
                    f"bad source {spec.name!r}", why=why, fix="correct data.sources in the config"
                )
            names.add(spec.name)
        lengths = open_lengths(
            [(spec.name, spec.shards, spec.plan) for spec in specs], manifest_hash, folder=folder,
            whole=[spec.name for spec in specs if spec.whole],
        )  # fmt: skip
        return cls(
            specs, lengths, manifest_hash=manifest_hash, workers=workers, folder=folder, store=store, warn=warn
        )  # fmt: skip

    def close(self) -> None:
        """Ends the workers."""
        if self.workers is not None:
            self.workers.close()

    @property
    def skipped(self) -> list[dict[str, str]]:
        """The journal of what had no length when lengths were made."""
        return [
            {"source": name, "shard": shard_name(shard), "key": entry["key"], "reason": entry["reason"]}
            for name in self.lengths.names
            for shard, sizes in zip(self._specs[name].shards, self.lengths.sizes(name))
            for entry in sizes.skipped
        ]

    # --- where things are ------------------------------------------------------------------------------

    def locate(self, source: str, sample: int) -> tuple[int, int]:
        """(number of the shard in its source, number of the sample in it). DataError if there is no such sample."""
        if source not in self._ends:
            raise DataError(f"unknown source {source!r}", why=f"known: {', '.join(self._ends)}")
        ends = self._ends[source]
        if not 0 <= sample < ends[-1]:
            raise DataError(f"source {source!r} has no sample {sample}", why=f"it has {ends[-1]}")
        which = int(np.searchsorted(ends, sample, side="right"))
        return which, sample - (int(ends[which - 1]) if which else 0)

    def _measures(self, source: str, shard: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Lengths of a shard, and where its parts begin."""

        def load() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            lengths = self.lengths.of(source, shard)
            return lengths, part_bounds(lengths)

        return self._sizes.get((source, shard), load)

    def tokens(self, source: str, shard: int) -> ShardTokens:
        """What is stored of a shard."""
        spec = self._specs[source]
        return self._tokens.get(
            (source, shard),
            lambda: ShardTokens(
                spec.shards[shard], spec.plan, self._manifest, folder=self._folder, store=self._store,
                warn=self._warn,
            ),
        )  # fmt: skip

    def units(self, documents: Iterable[tuple[str, int]]) -> list[Unit]:
        """The parts that hold these documents (source, sample), in order of sources, shards and samples.

        A pure function of lengths: the same on every rank. Raises DataError if there is no such sample.
        """
        wanted: dict[tuple[str, int, int], set[int]] = {}
        for source, sample in documents:
            shard, i = self.locate(source, sample)
            bounds = self._measures(source, shard)[1]
            part = int(np.searchsorted(bounds, i, side="right")) - 1
            wanted.setdefault((source, shard, part), set()).add(i)
        units = []
        for (source, shard, part), numbers in sorted(wanted.items()):
            lengths, bounds = self._measures(source, shard)
            first, end = int(bounds[part]), int(bounds[part + 1])
            samples = sorted(numbers)
            units.append(
                Unit(
                    source, shard, first, end - first, tuple(samples), int(lengths[first:end].sum()),
                    int(lengths[samples].sum()),
                )
            )  # fmt: skip
        return units

    # --- reading and making ----------------------------------------------------------------------------

    def make(self, units: Sequence[Unit], *, stop: threading.Event | None = None) -> list[TokenBlock]:
        """The wanted documents of each unit, in the order of its samples; what cannot be made is a skip.

        A part that is not stored is made whole and stored where that can be done; else only what is wanted is made.
        Raises DataError for a stale or damaged cache, if there are no workers for what is missing, and if tokens and
        planned lengths differ; VocabularyError; WorkersClosed once `stop` is set.
        """
        with self._lock:
            stored = [self._stored(unit) for unit in units]
            tasks: list[tuple[int, Task]] = []
            for n, (unit, block) in enumerate(zip(units, stored)):
                spec, tokens = self._specs[unit.source], self.tokens(unit.source, unit.shard)
                wanted = unit.samples
                if block is not None:
                    if tokens.cache is not None:
                        continue  # what is skipped there is skipped for good
                    inside = [i - unit.first for i in unit.samples]
                    wanted = tuple(i + unit.first for i in block.again(inside))
                elif tokens.storing:
                    wanted = tuple(range(unit.first, unit.first + unit.count))
                if wanted:
                    tasks.append((n, Task(address_of(spec.shards[unit.shard]), wanted, spec.plan)))
            fresh = {n: (task, block) for (n, task), block in zip(tasks, self._run(tasks, stop))}
            return [
                self._checked(unit, self._wanted(unit, block, *fresh.get(n, (None, None))))
                for n, (unit, block) in enumerate(zip(units, stored))
            ]

    def _stored(self, unit: Unit) -> TokenBlock | None:
        """The part of a unit, or its whole shard."""
        tokens = self.tokens(unit.source, unit.shard)
        if tokens.cache is not None:
            return tokens.cache.block
        part = self._parts.peek(unit.part) or tokens.part(unit.first, unit.count)
        if part is not None:
            self._parts.keep(unit.part, part)
        return part

    def _run(self, tasks: Sequence[tuple[int, Task]], stop: threading.Event | None) -> list[TokenBlock]:
        if not tasks:
            return []
        if self.workers is None:
            task = tasks[0][1]
            why = f"none for the plan [{', '.join(task.plan)}]"
            raise DataError("no token cache", where=task.where, why=why, fix=FIX)
        return self.workers.run([task for _, task in tasks], stop=stop)

    def _wanted(
        self, unit: Unit, stored: TokenBlock | None, task: Task | None, made: TokenBlock | None
    ) -> TokenBlock:
        """The documents of a unit out of what was stored and what was made; a part that was made is stored."""
        count = len(task.samples) if task is not None else 0
        self.read.made += count
        if stored is not None:
            tokens = self.tokens(unit.source, unit.shard)
            shift = 0 if tokens.cache is not None else unit.first
            instead = {}
            if task is not None and made is not None:
                instead = {sample - shift: (made, i) for i, sample in enumerate(task.samples)}
            self.read.stored += len(unit.samples) - len(instead)
            return select(stored, [i - shift for i in unit.samples], instead=instead)
        assert task is not None
        assert made is not None
        if task.samples == unit.samples and not self.tokens(unit.source, unit.shard).storing:
            return made
        self.tokens(unit.source, unit.shard).store(unit.first, made)
        return select(made, [i - unit.first for i in unit.samples])

    def _checked(self, unit: Unit, block: TokenBlock) -> TokenBlock:
        """The block, if its documents are as long as the plan takes them to be."""
        planned = self._measures(unit.source, unit.shard)[0][list(unit.samples)]
        wrong = np.flatnonzero((block.lengths != planned) & (block.lengths > 0))
        if len(wrong):
            i = int(wrong[0])
            raise DataError(
                "tokens and their lengths disagree",
                where=f"{shown(self._specs[unit.source].shards[unit.shard])}#{block.keys[i]}",
                why=f"{int(block.lengths[i])} tokens, planned as {int(planned[i])}",
                fix=f"delete the lengths and caches of this shard and {FIX}",
            )
        return block

    def before(self, unit: Unit) -> int:
        """Samples in the shards before a unit's, so that adding a number in its shard gives that in the source."""
        return int(self._ends[unit.source][unit.shard - 1]) if unit.shard else 0

    def failure(self, unit: Unit, number: int, entry: dict[str, Any]) -> Failure:
        """The journal's entry for sample `number` of a unit's shard. entry: as in `TokenBlock.skipped`."""
        shard = shard_name(self._specs[unit.source].shards[unit.shard])
        offset = int(entry.get("offset", -1))
        return Failure(unit.source, self.before(unit) + number, shard, entry["key"], offset, entry["reason"])

    def document(self, which: Piece | tuple[str, int]) -> Document:
        """The document a piece belongs to, or that of (source, sample). The whole of it, not the piece.

        Raises DataError if it cannot be made.
        """
        source, sample = (which.source, which.sample) if isinstance(which, Piece) else which
        with self._lock:
            last = self._last
            if last is not None and last[:2] == (source, sample):
                return last[2]  # the pieces of a long document come one after the other
            unit = self.units([(source, sample)])[0]
            cache = self.tokens(source, unit.shard).cache
            block, i = (cache.block, unit.samples[0]) if cache is not None else (self.make([unit])[0], 0)
            entry = block.entry(i) if self._measures(source, unit.shard)[0][unit.samples[0]] else None
            if entry is not None:
                raise DataError(
                    "a document cannot be made",
                    where=f"{shown(self._specs[source].shards[unit.shard])}#{entry['key']}",
                    why=str(entry["reason"]),
                    fix="check the shard with `ringweave data check`",
                )
            document = block.document(i)
            self._last = (source, sample, document)
            return document

    def key(self, source: str, sample: int) -> str:
        """The sample's name inside its shard."""
        shard, i = self.locate(source, sample)
        cache = self.tokens(source, shard).cache
        if cache is not None:
            return cache.keys[i]
        with reader_of(self._specs[source].shards[shard]) as reader:
            return reader.keys[i]

    # --- statistics ------------------------------------------------------------------------------------

    def target_histogram(self, *sources: str) -> dict[str, NDArray[np.int64]]:
        """modality -> int64 [largest id + 1], how often each id is a target with weight above 0.

        Over the given sources, all by default, each document once. Reads every token the first time.
        """
        total: dict[str, NDArray[np.int64]] = {}
        for source in sources or tuple(self.lengths.names):
            for modality, counts in self._source_counts(source).items():
                total[modality] = add_counts(total.get(modality), counts)
        return total

    def _source_counts(self, source: str) -> dict[str, NDArray[np.int64]]:
        if source not in self._specs:
            raise DataError(f"unknown source {source!r}", why=f"known: {', '.join(self._specs)}")
        if source not in self._counts:
            counts: dict[str, NDArray[np.int64]] = {}
            for block in self._all_blocks(source):
                for modality, more in block.target_counts().items():
                    counts[modality] = add_counts(counts.get(modality), more)
            self._counts[source] = counts
        return self._counts[source]

    def _all_blocks(self, source: str) -> Iterable[TokenBlock]:
        """Every document of a source once."""
        for shard in range(len(self._specs[source].shards)):
            cache = self.tokens(source, shard).cache
            if cache is not None:
                yield cache.block
                continue
            before = int(self._ends[source][shard - 1]) if shard else 0
            lengths = self._measures(source, shard)[0]
            for unit in self.units((source, before + i) for i in np.flatnonzero(lengths).tolist()):
                yield from self.make([unit])

    def unigram_entropy(self, modality: str, *sources: str) -> float:
        """Entropy in nats of the target ids of a modality: the loss of a model that knows frequencies only.

        Raises DataError if the sources hold no such target.
        """
        counts = self.target_histogram(*sources).get(modality)
        if counts is None:
            raise DataError(
                f"no target of modality {modality!r}",
                where=f"sources {', '.join(sources or self.lengths.names)}",
            )
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())
