"""All documents of a job by (source, sample), read from token caches that stay on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.pack import Piece
from ringweave.data_pipes.token_cache import TokenCache, add_counts
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import Document


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A named source: its shards in order and what its documents hold (see `documents.py`)."""

    name: str
    shards: list[Path]
    plan: tuple[str, ...]


class Corpus:
    """Documents of several sources; `sample` counts through the shards of a source.

    lengths: source -> int64 [n], tokens of each document, 0 for a skipped one
    digest:  sha256 over sources, plans, vocabulary, names of shards (without their folder) and lengths
    skipped: [{"source", "shard", "key", "reason"}], what the caches left out
    """

    def __init__(self, caches: dict[str, list[TokenCache]], *, digest: str) -> None:
        self._caches = caches
        self.digest = digest
        self.lengths: dict[str, NDArray[np.int64]] = {
            name: np.concatenate([np.zeros(0, np.int64), *(c.lengths for c in parts)])
            for name, parts in caches.items()
        }
        self._ends = {name: np.cumsum([len(c) for c in parts]) for name, parts in caches.items()}
        self._counts: dict[str, dict[str, NDArray[np.int64]]] = {}
        self._last: tuple[str, int, Document] | None = None

    @classmethod
    def open(cls, specs: Sequence[SourceSpec], *, manifest_hash: str) -> Corpus:
        """Opens the caches of all shards.

        Raises DataError for a missing, stale or damaged cache, a repeated name or a source without shards,
        VocabularyError for caches of another manifest.
        """
        caches: dict[str, list[TokenCache]] = {}
        digest = hashlib.sha256(manifest_hash.encode())
        for spec in sorted(specs, key=lambda s: s.name):
            if spec.name in caches or not spec.shards:
                why = "the name occurs twice" if spec.name in caches else "it lists no shards"
                raise DataError(
                    f"bad source {spec.name!r}", why=why, fix="correct data.sources in the config"
                )
            parts = [TokenCache.open(shard, spec.plan, manifest_hash) for shard in spec.shards]
            caches[spec.name] = parts
            digest.update(
                json.dumps([spec.name, list(spec.plan), [Path(s).name for s in spec.shards]]).encode()
            )
            for part in parts:
                digest.update(part.lengths.astype("<i8").tobytes())
        return cls(caches, digest=digest.hexdigest())

    @property
    def skipped(self) -> list[dict[str, str]]:
        """The journal of skips of all caches."""
        return [
            {"source": name, "shard": cache.path.name.split(".tokens-")[0] + ".tar", **entry}
            for name, parts in self._caches.items()
            for cache in parts
            for entry in cache.skipped
        ]

    def _locate(self, source: str, sample: int) -> tuple[TokenCache, int]:
        if source not in self._caches:
            raise DataError(f"unknown source {source!r}", why=f"known: {', '.join(self._caches)}")
        ends = self._ends[source]
        if not 0 <= sample < ends[-1]:
            raise DataError(f"source {source!r} has no sample {sample}", why=f"it has {ends[-1]}")
        which = int(np.searchsorted(ends, sample, side="right"))
        return self._caches[source][which], sample - (int(ends[which - 1]) if which else 0)

    def document(self, which: Piece | tuple[str, int]) -> Document:
        """The document a piece belongs to, or that of (source, sample). The whole of it, not the piece."""
        source, sample = (which.source, which.sample) if isinstance(which, Piece) else which
        last = self._last
        if last is not None and last[:2] == (source, sample):
            return last[2]  # the pieces of a long document come one after the other
        cache, i = self._locate(source, sample)
        document = cache.document(i)
        self._last = (source, sample, document)
        return document

    def key(self, source: str, sample: int) -> str:
        """The sample's name inside its shard."""
        cache, i = self._locate(source, sample)
        return cache.keys[i]

    def target_histogram(self, *sources: str) -> dict[str, NDArray[np.int64]]:
        """modality -> int64 [largest id + 1], how often each id is a target with weight above 0.

        Over the given sources, all by default, each document once. Reads every token the first time.
        """
        total: dict[str, NDArray[np.int64]] = {}
        for source in sources or tuple(self._caches):
            for modality, counts in self._source_counts(source).items():
                total[modality] = add_counts(total.get(modality), counts)
        return total

    def _source_counts(self, source: str) -> dict[str, NDArray[np.int64]]:
        if source not in self._caches:
            raise DataError(f"unknown source {source!r}", why=f"known: {', '.join(self._caches)}")
        if source not in self._counts:
            counts: dict[str, NDArray[np.int64]] = {}
            for cache in self._caches[source]:
                for modality, more in cache.target_counts().items():
                    counts[modality] = add_counts(counts.get(modality), more)
            self._counts[source] = counts
        return self._counts[source]

    def unigram_entropy(self, modality: str, *sources: str) -> float:
        """Entropy in nats of the target ids of a modality: the loss of a model that knows frequencies only.

        Raises DataError if the sources hold no such target.
        """
        counts = self.target_histogram(*sources).get(modality)
        if counts is None:
            raise DataError(
                f"no target of modality {modality!r}", where=f"sources {', '.join(sources or self._caches)}"
            )
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())
