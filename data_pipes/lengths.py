"""Token lengths of every sample of a job: all that planning needs to know of the data.

A planner reads them shard by shard, so the lengths of 10^9 samples need never be in memory at once.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import DataError

#: Values that `ShardLengths` keeps in memory, over all sources (int64: 64 MiB).
_KEPT = 2**23


class Lengths(Protocol):
    """Lengths by source and shard. `of` is called for shards in random order: it should be cheap (a memory map)."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the sources."""
        ...

    @property
    def digest(self) -> str:
        """Hash over names, shards and lengths: equal digests give equal plans."""
        ...

    def counts(self, name: str, /) -> NDArray[np.int64]:
        """Samples of each shard, int64 [shards], in the order of the shards."""
        ...

    def whole(self, name: str, /) -> bool:
        """Whether the source is read shard by shard, in one go each (no random access to its bytes)."""
        ...

    def of(self, name: str, shard: int, /) -> NDArray[np.int64]:
        """Tokens of each sample of a shard, int64 [count]; 0 for a sample that is passed over."""
        ...


#: Lengths by source as plain arrays: one array is one shard.
Arrays: TypeAlias = Mapping[str, "NDArray[np.int64] | Sequence[NDArray[np.int64]]"]


class Table:
    """`Lengths` that are in memory: for tests, evaluation and small data."""

    def __init__(self, lengths: Arrays, *, whole: Sequence[str] = ()) -> None:
        """lengths: source -> int64 [n], or one such array a shard; whole: sources that are read shard by shard.

        Raises DataError for lengths that are not whole numbers of 0 or above.
        """
        self._shards: dict[str, list[NDArray[np.int64]]] = {}
        for name in sorted(lengths):
            value = lengths[name]
            parts = [value] if isinstance(value, np.ndarray) else list(value)
            if parts and np.ndim(parts[0]) == 0:
                parts = [np.asarray(parts)]
            self._shards[name] = [_checked(name, np.asarray(part)) for part in parts]
        self._whole = frozenset(whole)
        self.names: list[str] = list(self._shards)
        self.digest = self._hash()

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name, parts in self._shards.items():
            sizes = ",".join(str(len(part)) for part in parts)
            kind = "whole" if name in self._whole else ""
            digest.update(f"{len(name)}:{name}:{sizes}:{kind}:".encode())
            for part in parts:
                digest.update(np.ascontiguousarray(part, dtype="<i8").data)
        return digest.hexdigest()

    def counts(self, name: str, /) -> NDArray[np.int64]:
        """Samples of each shard, int64 [shards]."""
        return np.asarray([len(part) for part in self._shards[name]], np.int64)

    def whole(self, name: str, /) -> bool:
        """Whether a run of the source is a whole shard."""
        return name in self._whole

    def of(self, name: str, shard: int, /) -> NDArray[np.int64]:
        """Tokens of each sample of a shard, int64 [count]."""
        return self._shards[name][shard]


def _checked(name: str, array: NDArray[np.int64]) -> NDArray[np.int64]:
    whole = array.dtype.kind in "iu" or array.size == 0
    if array.ndim != 1 or not whole or (array.size and int(array.min()) < 0):
        raise DataError(f"lengths of source {name!r} must be a list of whole numbers, 0 or above")
    return array.astype(np.int64, copy=False)


def as_lengths(lengths: Lengths | Arrays) -> Lengths:
    """Plain arrays as a `Table`, anything else as it is."""
    return Table(lengths) if isinstance(lengths, Mapping) else lengths


def lengths_digest(lengths: Lengths | Arrays) -> str:
    """sha256 over names and lengths, in alphabetical order: what a state is checked against."""
    return as_lengths(lengths).digest


class ShardLengths:
    """The lengths of single shards, checked when they are read; those last used stay in memory."""

    def __init__(self, lengths: Lengths, *, keep: int = _KEPT) -> None:
        """keep: values to hold in memory; one shard is held even if it is larger."""
        self._lengths, self._keep, self._held = lengths, keep, 0
        self._shards: OrderedDict[tuple[str, int], NDArray[np.int64]] = OrderedDict()

    def get(self, name: str, shard: int, count: int) -> NDArray[np.int64]:
        """int64 [count]. Raises DataError if the shard holds another number of lengths, or negative ones."""
        key = (name, shard)
        array = self._shards.get(key)
        if array is not None:
            self._shards.move_to_end(key)
            return array
        array = self._lengths.of(name, shard)
        if array.shape != (count,) or (count and int(array.min()) < 0):
            raise DataError(
                "token lengths of a shard do not fit its index",
                where=f"source {name}, shard {shard}",
                why=f"{array.shape[0] if array.ndim else 0} lengths for {count} samples, or negative ones",
                fix="make its index and lengths again",
            )
        self._shards[key] = array
        self._held += count
        while self._held > self._keep and len(self._shards) > 1:
            self._held -= len(self._shards.popitem(last=False)[1])
        return array
