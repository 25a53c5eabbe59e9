"""Token lengths of a shard on disk, and those of a job: all that planning reads.

`X.tar.len-<hash12>` lies beside `X.tar` (or in a folder of caches); hash12 names manifest and plan. It is safetensors
with one tensor, `lengths` int32 [n] (int64 if one needs it), tokens of each sample, 0 for one that cannot be used. Its
metadata (one JSON object under `ringweave`) tie it to manifest, plan, size of the shard and crc32 of its index, and
hold crc32 and sha256 of the lengths and the skipped samples with their reasons. Lengths of a complete token cache
count as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ringweave.data_pipes.checksum import crc32
from ringweave.data_pipes.shard_names import Shard, is_remote, shard_name, shown
from ringweave.data_pipes.token_cache import TokenCache, cache_path
from ringweave.data_pipes.token_files import (
    FIX_DAMAGED,
    METADATA,
    Stamp,
    WriteError,
    places,
    plan_hash,
    read_metadata,
    stamp_of,
    stem_in,
    sync,
    writable,
)
from ringweave.data_pipes.token_vocabulary import FIX, other_vocabulary
from ringweave.tokenizers.errors import DataError, VocabularyError

_FORMAT = "ringweave-lengths/1"
#: Shards in stores that are asked for at the same time.
_AT_ONCE = 16


def lengths_path(
    shard: Shard,
    plan: Sequence[str],
    manifest_hash: str,
    *,
    folder: Path | None = None,
    stamp: Stamp | None = None,
) -> Path:
    """`X.tar` -> `X.tar.len-<hash12>` beside it, or in a folder of caches."""
    stem = stem_in(shard, folder, stamp)
    return stem.with_name(f"{stem.name}.tar.len-{plan_hash(plan, manifest_hash)}")


@dataclass(frozen=True, slots=True)
class ShardSizes:
    """Lengths of one shard. count: samples; digest: sha256 of the lengths; skipped: [{"key", "reason"}]; load: gives
    the lengths, int64 [count]."""

    count: int
    digest: str
    skipped: list[dict[str, Any]]
    load: Callable[[], NDArray[np.int64]]


def write_lengths(
    shard: Shard,
    plan: Sequence[str],
    manifest_hash: str,
    lengths: NDArray[np.int64],
    skipped: Sequence[dict[str, Any]],
    *,
    folder: Path | None = None,
) -> Path:
    """Stores the lengths of a shard, whole or not at all. Raises DataError if that cannot be done."""
    stamp = stamp_of(shard)
    place = next(iter(writable(shard, folder)), folder if not places(shard, None) else None)
    path = lengths_path(shard, plan, manifest_hash, folder=place, stamp=stamp)
    small = not len(lengths) or int(lengths.max()) <= np.iinfo(np.int32).max
    stored = lengths.astype(np.int32 if small else np.int64)
    metadata = {
        "format": _FORMAT,
        "manifest": manifest_hash,
        "plan": list(plan),
        "shard": stamp.name,
        "shard_size": stamp.size,
        "index_crc32": stamp.index_crc32,
        "count": len(stored),
        "crc32": crc32(stored.tobytes()),
        "sha256": sizes_digest(lengths),
        "skipped": [{"key": s["key"], "reason": s["reason"]} for s in skipped],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({"lengths": stored}, temporary, metadata={METADATA: json.dumps(metadata)})
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise WriteError(
            "cannot write the token lengths", where=str(path), why=str(error), fix="free space there"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def sizes_digest(lengths: NDArray[np.int64]) -> str:
    """sha256 of the lengths of one shard."""
    return hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest()


def read_lengths(
    shard: Shard, plan: Sequence[str], manifest_hash: str, *, folder: Path | None = None
) -> ShardSizes:
    """The lengths of a shard from its sidecar, else from its complete token cache; arrays are read when asked for.

    Raises VocabularyError if there are only those of another manifest, DataError if there are none, or if what is
    there is damaged or older than shard or index.
    """
    stamp = stamp_of(shard)
    for place in places(shard, folder):
        path = lengths_path(shard, plan, manifest_hash, folder=place, stamp=stamp)
        if path.is_file():
            return read_sidecar(path, stamp, plan, manifest_hash)
    try:
        cache = TokenCache.open(shard, plan, manifest_hash, folder=folder, stamp=stamp)
    except VocabularyError:
        raise
    except DataError as error:
        if error.what != "no token cache":
            raise
        raise _absent(shard, plan, manifest_hash, folder, stamp) from None
    lengths = cache.lengths
    return ShardSizes(len(lengths), sizes_digest(lengths), cache.skipped, lambda: lengths)


def has_lengths(shard: Shard, plan: Sequence[str], manifest_hash: str, *, folder: Path | None = None) -> bool:
    """Whether there is a file to read them from, fitting or not. Raises DataError for a shard without an index."""
    stamp = stamp_of(shard) if is_remote(shard) else None
    for place in places(shard, folder):
        at: dict[str, Any] = {"folder": place, "stamp": stamp}
        if place is not None and stamp is None:
            at["stamp"] = stamp = stamp_of(shard)
        if any(f(shard, plan, manifest_hash, **at).is_file() for f in (lengths_path, cache_path)):
            return True
    return False


def read_sidecar(path: Path, stamp: Stamp, plan: Sequence[str], manifest_hash: str) -> ShardSizes:
    """What one file holds, for the shard as `stamp` says it is now. Raises as `read_lengths`."""
    try:
        metadata = read_metadata(safe_open(path, framework="numpy"))
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"format {metadata.get('format')!r}, known {_FORMAT!r}")
        if metadata["manifest"] != manifest_hash:
            raise other_vocabulary(path, str(metadata["manifest"]), manifest_hash, folder=path.parent)
        if metadata["plan"] != list(plan):
            raise ValueError(f"they were made for the plan {metadata['plan']}")
        found = (metadata["shard_size"], metadata["index_crc32"])
        count, digest, skipped = int(metadata["count"]), str(metadata["sha256"]), list(metadata["skipped"])
        crc = int(metadata["crc32"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    if found != (stamp.size, stamp.index_crc32):
        raise DataError(
            "stale token lengths",
            where=str(path),
            why=f"{stamp.name} or its index changed since",
            fix=f"{FIX} again",
        )
    return ShardSizes(count, digest, skipped, lambda: _load(path, count, crc, digest))


def _load(path: Path, count: int, crc: int, digest: str) -> NDArray[np.int64]:
    try:
        stored = safe_open(path, framework="numpy").get_tensor("lengths")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    lengths: NDArray[np.int64] = stored.astype(np.int64)
    if stored.shape != (count,) or crc32(stored.tobytes()) != crc or sizes_digest(lengths) != digest:
        raise _damaged(path, "crc32 of the lengths differs")
    return lengths


def _damaged(path: Path, why: str) -> DataError:
    return DataError("damaged token lengths", where=str(path), why=why, fix=FIX_DAMAGED)


def _absent(
    shard: Shard, plan: Sequence[str], manifest_hash: str, folder: Path | None, stamp: Stamp
) -> DataError:
    others: dict[str, Path] = {}
    for place in places(shard, folder):
        stem = stem_in(shard, place, stamp)
        for path in sorted(stem.parent.glob(f"{stem.name}.tar.len-*")):
            with contextlib.suppress(SafetensorError, OSError, ValueError):
                metadata = read_metadata(safe_open(path, framework="numpy"))
                if metadata.get("plan") == list(plan):
                    others[str(metadata.get("manifest"))] = path.parent
    if others:
        found = min(others)
        return other_vocabulary(shown(shard), found, manifest_hash, folder=others[found])
    plans = ", ".join(plan)
    return DataError("no token lengths", where=shown(shard), why=f"none for the plan [{plans}]", fix=FIX)


class FileLengths:
    """`Lengths` (see `lengths.py`) of sources whose shards have sidecars or token caches; arrays are read when needed.

    Also readable as a mapping, source -> int64 [n] of all its shards one after the other.
    """

    def __init__(
        self, sources: dict[str, list[ShardSizes]], *, whole: Sequence[str] = (), manifest_hash: str = ""
    ) -> None:
        """whole: sources that are read shard by shard."""
        self._sources = {name: sources[name] for name in sorted(sources)}
        self._whole = frozenset(whole)
        self.names: list[str] = list(self._sources)
        parts = [[n, n in self._whole, [[s.count, s.digest] for s in v]] for n, v in self._sources.items()]
        self.digest = hashlib.sha256(json.dumps([manifest_hash, parts]).encode()).hexdigest()

    def counts(self, name: str, /) -> NDArray[np.int64]:
        """Samples of each shard, int64 [shards]."""
        return np.asarray([s.count for s in self._sources[name]], np.int64)

    def whole(self, name: str, /) -> bool:
        """Whether a run of the source is a whole shard."""
        return name in self._whole

    def of(self, name: str, shard: int, /) -> NDArray[np.int64]:
        """Tokens of each sample of a shard, int64 [count]. Raises DataError if its file is damaged."""
        return self._sources[name][shard].load()

    def sizes(self, name: str) -> list[ShardSizes]:
        """What is known of each shard of a source."""
        return self._sources[name]

    def __getitem__(self, name: str) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(0, np.int64), *(s.load() for s in self._sources[name])])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def keys(self) -> list[str]:
        """Names of the sources."""
        return list(self.names)

    def values(self) -> list[NDArray[np.int64]]:
        """The arrays of all sources."""
        return [self[name] for name in self.names]

    def items(self) -> list[tuple[str, NDArray[np.int64]]]:
        """(source, its array) of all sources."""
        return [(name, self[name]) for name in self.names]


def open_lengths(
    sources: Sequence[tuple[str, Sequence[Shard], Sequence[str]]],
    manifest_hash: str,
    *,
    folder: Path | None = None,
    whole: Sequence[str] = (),
) -> FileLengths:
    """The lengths of (name, shards, plan). Raises as `read_lengths`. Stores are asked for several shards at once."""
    found: dict[str, list[ShardSizes]] = {}
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="lengths") as pool:
        for name, shards, plan in sources:
            each = partial(read_lengths, plan=plan, manifest_hash=manifest_hash, folder=folder)
            found[name] = list(pool.map(each, shards) if any(map(is_remote, shards)) else map(each, shards))
    return FileLengths(found, whole=whole, manifest_hash=manifest_hash)


def names_of(shards: Sequence[Shard]) -> list[str]:
    """Names of shards without their folders, as digests of data hold them."""
    return [shard_name(shard) for shard in shards]
