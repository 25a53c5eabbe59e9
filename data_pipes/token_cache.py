"""Tokens of a shard, encoded once and read by slices ever after.

`X.tokens-<hash12>.safetensors` lies beside `X.tar`; hash12 names manifest and plan, so caches of several
vocabularies or plans coexist. Tensors, with N tokens, S segments and D documents (one a sample):

    ids              int32 [N]
    positions        int16 [N, 4], int32 if a position needs it
    document_offsets int64 [D + 1], first token of each document
    segment_offsets  int64 [D + 1], first segment of each document
    segments         int64 [S, 4], (length, modality, role, attends)
    segment_weights  float64 [S]
    document_crc32   uint32 [D], over the bytes of ids and positions
    names            uint8, JSON {"keys": [D names], "skipped": [{"key", "reason"}]}

The metadata (one JSON object under `ringweave`, so that the same shard gives the same bytes) hold the full
manifest hash, the plan, the shard's size and the crc32 of its index. The law of
this file: `document(i)` equals encoding sample i afresh. A sample that cannot be decoded is skipped (length
0) and journaled; a damaged shard aborts.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ringweave.data_pipes.documents import Tokenizers, encode_sample, parse_plan
from ringweave.data_pipes.index import index_path
from ringweave.data_pipes.reader import ShardReader
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.segment import MODALITIES, MODALITY_ID, Attends, Document, Role, Segment

_FORMAT = "ringweave-tokens/1"
_METADATA = "ringweave"
_ROLES: tuple[Role, ...] = get_args(Role)
_ATTENDS: tuple[Attends, ...] = get_args(Attends)
_TABLES = ("document_offsets", "segment_offsets", "segments", "segment_weights", "document_crc32", "names")
#: Tokens held at a time while target ids are counted.
_COUNT_AT_ONCE = 1 << 22
_FIX = "run `ringweave data index DIR --tokenizers TOKENIZERS`"
_FIX_DAMAGED = f"delete it and {_FIX}"


def cache_path(shard: Path, plan: Sequence[str], manifest_hash: str) -> Path:
    """`X.tar` -> `X.tokens-<hash12>.safetensors`."""
    digest = hashlib.sha256(json.dumps([manifest_hash, list(plan)]).encode()).hexdigest()
    return shard.with_name(f"{shard.name.removesuffix('.tar')}.tokens-{digest[:12]}.safetensors")


def _crc(*arrays: NDArray[Any]) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).tobytes(), value)
    return value


def _index_crc(shard: Path) -> int:
    """crc32 of the sidecar's text, which changes with any key, place or payload crc of the shard."""
    path = index_path(shard)
    try:
        return zlib.crc32(path.read_bytes())
    except OSError as error:
        raise DataError(
            "shard without an index",
            where=str(shard),
            why=str(error),
            fix=f"run `ringweave data index {shard.parent}`",
        ) from None


class _Tables:
    """Collects the tensors of a cache, document by document."""

    def __init__(self) -> None:
        self.ids: list[NDArray[np.int32]] = []
        self.positions: list[NDArray[np.int32]] = []
        self.segments: list[tuple[int, int, int, int]] = []
        self.weights: list[float] = []
        self.token_ends, self.segment_ends = [0], [0]

    def add(self, document: Document | None) -> None:
        """The next document; None for a skipped one."""
        for segment in document.segments if document is not None else ():
            self.ids.append(segment.ids.astype(np.int32, copy=False))
            self.positions.append(segment.positions.astype(np.int32, copy=False))
            numbers = (
                MODALITY_ID[segment.modality],
                _ROLES.index(segment.role),
                _ATTENDS.index(segment.attends),
            )
            self.segments.append((len(segment), *numbers))
            self.weights.append(segment.weight)
        self.token_ends.append(self.token_ends[-1] + (len(document) if document is not None else 0))
        self.segment_ends.append(len(self.segments))

    def tensors(self, names: dict[str, Any]) -> dict[str, NDArray[Any]]:
        ids = np.concatenate([np.zeros(0, np.int32), *self.ids])
        positions = np.concatenate([np.zeros((0, 4), np.int32), *self.positions])
        bounds = np.iinfo(np.int16)
        if not positions.size or (positions.min() >= bounds.min and positions.max() <= bounds.max):
            positions = positions.astype(np.int16)
        ends = self.token_ends
        crcs = [_crc(ids[a:b], positions[a:b]) for a, b in pairwise(ends)]
        return {
            "ids": ids,
            "positions": positions,
            "document_offsets": np.asarray(ends, np.int64),
            "segment_offsets": np.asarray(self.segment_ends, np.int64),
            "segments": np.asarray(self.segments, np.int64).reshape(-1, 4),
            "segment_weights": np.asarray(self.weights, np.float64),
            "document_crc32": np.asarray(crcs, np.uint32),
            "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
        }


def build_cache(
    shard: Path,
    plan: Sequence[str],
    tokenizers: Tokenizers,
    *,
    progress: Callable[[int, int], None] | None = None,
    max_skip_rate: float = 0.05,
    force: bool = False,
) -> Path:
    """Encodes a shard and writes its cache; one that is already there and fits is kept unless `force`.

    progress: called with (samples done, samples). Samples that cannot be decoded are skipped and journaled;
    beyond `max_skip_rate` of the shard (one is always allowed unless the rate is 0), or if nothing is left,
    DataError. A damaged shard, an unknown plan item and a vocabulary error always abort.
    """
    shard = Path(shard)
    parse_plan(plan)
    manifest_hash = str(tokenizers.manifest.hash)
    path = cache_path(shard, plan, manifest_hash)
    if not force and path.exists() and _fits(shard, plan, manifest_hash):
        return path
    tables, skipped = _Tables(), []
    with ShardReader(shard) as reader:
        count, keys = len(reader), list(reader.keys)
        allowed = max(1, int(max_skip_rate * count)) if max_skip_rate > 0 else 0
        for i in range(count):
            sample = reader.read(i)  # damage of the shard itself is not skipped
            try:
                tables.add(encode_sample(sample, plan, tokenizers))
            except VocabularyError:
                raise
            except DataError as error:
                tables.add(None)
                skipped.append({"key": sample.key, "reason": error.render()})
                if len(skipped) > allowed or len(skipped) == count:
                    raise _too_many(shard, skipped, i + 1, count) from None
            if progress is not None:
                progress(i + 1, count)
    tensors = tables.tensors({"keys": keys, "skipped": skipped})
    metadata = {
        "format": _FORMAT,
        "manifest": manifest_hash,
        "plan": list(plan),
        "shard": shard.name,
        "shard_size": shard.stat().st_size,
        "index_crc32": _index_crc(shard),
        "tables_crc32": _crc(*(tensors[name] for name in _TABLES)),
    }
    _write(path, tensors, metadata)
    return path


def _fits(shard: Path, plan: Sequence[str], manifest_hash: str) -> bool:
    try:
        TokenCache.open(shard, plan, manifest_hash)
    except DataError:
        return False
    return True


def _too_many(shard: Path, skipped: list[dict[str, str]], read: int, count: int) -> DataError:
    reasons = "; ".join(f"{s['key']}: {s['reason'].splitlines()[0]}" for s in skipped[:3])
    return DataError(
        f"{len(skipped)} of the first {read} samples cannot be used",
        where=f"{shard} ({count} samples)",
        why=f"{reasons}{'; ...' if len(skipped) > 3 else ''}",
        fix="check the plan of this source and the shard, or allow a higher rate of skips",
    )


def _write(path: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, Any]) -> None:
    """Temporary file, fsync, rename, fsync of the folder: a cache is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={_METADATA: json.dumps(metadata)})
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise DataError(
            "cannot write the token cache",
            where=str(path),
            why=str(error),
            fix="free space or change permissions",
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TokenCache:
    """The documents of one shard. Only tables are in memory; tokens are sliced out of the mapped file.

    lengths: int64 [D], tokens of each document, 0 for a skipped one; keys: names inside the shard;
    skipped: [{"key", "reason"}].
    """

    def __init__(self, path: Path, file: Any, tables: dict[str, NDArray[Any]]) -> None:
        self.path = path
        self._tables = tables
        self._starts = tables["document_offsets"].tolist()
        self._ids, self._positions = file.get_slice("ids"), file.get_slice("positions")
        names = json.loads(tables["names"].tobytes())
        self.keys: list[str] = names["keys"]
        self.skipped: list[dict[str, str]] = names["skipped"]
        self.lengths: NDArray[np.int64] = np.diff(tables["document_offsets"])

    @classmethod
    def open(cls, shard: Path, plan: Sequence[str], manifest_hash: str) -> TokenCache:
        """Opens the cache of a shard.

        Raises VocabularyError if only caches of another manifest are there, DataError if there is none, if it
        is damaged, or if shard or index changed since.
        """
        shard = Path(shard)
        path = cache_path(shard, plan, manifest_hash)
        if not path.is_file():
            raise _absent(shard, plan, manifest_hash)
        try:
            file = safe_open(path, framework="numpy")
            metadata = _metadata(file)
            tables = {name: file.get_tensor(name) for name in _TABLES}
            _check_metadata(path, shard, plan, manifest_hash, metadata)
            if metadata["tables_crc32"] != _crc(*tables.values()):
                raise ValueError("crc32 of its tables differs")
            cache = cls(path, file, tables)
            tokens = int(tables["document_offsets"][-1])
            if cache._ids.get_shape() != [tokens] or cache._positions.get_shape() != [tokens, 4]:
                raise ValueError("its tables and tokens disagree")
        except (SafetensorError, OSError, ValueError, KeyError, IndexError) as error:
            why = f"{type(error).__name__}: {error}"
            raise DataError("damaged token cache", where=str(path), why=why, fix=_FIX_DAMAGED) from None
        return cache

    def __len__(self) -> int:
        return len(self.keys)

    def document(self, i: int) -> Document:
        """Document i, equal to a fresh encoding of sample i. Raises DataError if its bytes changed."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.path}")
        begin, end = self._starts[i], self._starts[i + 1]
        ids, positions = self._ids[begin:end], self._positions[begin:end]
        if _crc(ids, positions) != int(self._tables["document_crc32"][i]):
            raise DataError(
                "damaged token cache",
                where=f"{self.path}#{self.keys[i]}",
                why="crc32 of the tokens differs",
                fix=_FIX_DAMAGED,
            )
        positions = positions.astype(np.int32)
        first, last = self._tables["segment_offsets"][i : i + 2].tolist()
        rows = self._tables["segments"][first:last].tolist()
        weights = self._tables["segment_weights"][first:last].tolist()
        segments, at = [], 0
        for (length, modality, role, attends), weight in zip(rows, weights):
            inside = slice(at, at + length)
            at += length
            segments.append(
                Segment(
                    ids[inside],
                    MODALITIES[modality],
                    positions[inside],
                    role=_ROLES[role],
                    attends=_ATTENDS[attends],
                    weight=weight,
                )
            )
        return Document(self.keys[i], tuple(segments))

    def target_counts(self) -> dict[str, NDArray[np.int64]]:
        """modality -> int64 [largest id + 1], how often each id is predicted with a weight above 0."""
        segments, documents = self._tables["segments"], self._tables["document_offsets"]
        starts = np.concatenate([[0], np.cumsum(segments[:, 0])])
        trained = (self._tables["segment_weights"] > 0) & (segments[:, 2] == _ROLES.index("target"))
        # The first token of a document is nobody's target.
        begins = starts[:-1] + np.isin(starts[:-1], documents[:-1])
        counts: dict[str, NDArray[np.int64]] = {}
        waiting: dict[str, list[NDArray[np.int32]]] = {}
        tokens = 0
        for s in np.flatnonzero(trained & (begins < starts[1:])).tolist():
            begin, end = int(begins[s]), int(starts[s + 1])
            waiting.setdefault(MODALITIES[int(segments[s, 1])], []).append(self._ids[begin:end])
            tokens += end - begin
            if tokens >= _COUNT_AT_ONCE:
                _count(counts, waiting)
                tokens = 0
        _count(counts, waiting)
        return counts


def add_counts(total: NDArray[np.int64] | None, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum of two histograms of ids of different lengths."""
    if total is None:
        return counts
    longer, shorter = (total, counts) if len(total) >= len(counts) else (counts, total)
    merged = longer.copy()
    merged[: len(shorter)] += shorter
    return merged


def _count(counts: dict[str, NDArray[np.int64]], waiting: dict[str, list[NDArray[np.int32]]]) -> None:
    """Moves the waiting ids into the histograms."""
    for modality, arrays in waiting.items():
        counts[modality] = add_counts(counts.get(modality), np.bincount(np.concatenate(arrays)))
    waiting.clear()


def _metadata(file: Any) -> dict[str, Any]:
    """The JSON object in the header of a cache. Raises ValueError if it is none."""
    metadata = json.loads((file.metadata() or {}).get(_METADATA, "null"))
    if not isinstance(metadata, dict):
        raise ValueError("it holds no metadata of ringweave")
    return metadata


def _absent(shard: Path, plan: Sequence[str], manifest_hash: str) -> DataError:
    """Says whether nothing is there or only caches of other vocabularies."""
    others = set()
    for path in sorted(shard.parent.glob(f"{shard.name.removesuffix('.tar')}.tokens-*.safetensors")):
        try:
            metadata = _metadata(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError, ValueError):
            continue
        if metadata.get("plan") == list(plan):
            others.add(str(metadata.get("manifest")))
    if others:
        return _other_vocabulary(shard, ", ".join(sorted(h[:12] for h in others)), manifest_hash)
    plans = ", ".join(plan)
    return DataError("no token cache", where=str(shard), why=f"none for the plan [{plans}]", fix=_FIX)


def _other_vocabulary(where: Path, found: str, wanted: str) -> VocabularyError:
    return VocabularyError(
        "tokens made under another vocabulary",
        where=str(where),
        why=f"cached with manifest {found}, the tokenizers are {wanted[:12]}",
        fix=f"use the tokenizers the cache was made with, or {_FIX} again",
    )


def _check_metadata(
    path: Path, shard: Path, plan: Sequence[str], manifest_hash: str, metadata: dict[str, Any]
) -> None:
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"format {metadata.get('format')!r}, known {_FORMAT!r}")
    if metadata["manifest"] != manifest_hash:
        raise _other_vocabulary(path, metadata["manifest"][:12], manifest_hash)
    if metadata["plan"] != list(plan):
        raise ValueError(f"it was made for the plan {metadata['plan']}")
    try:
        size = shard.stat().st_size
    except OSError as error:
        raise DataError("missing shard", where=str(shard), why=str(error)) from None
    if (metadata["shard_size"], metadata["index_crc32"]) != (size, _index_crc(shard)):
        raise DataError(
            "stale token cache",
            where=str(path),
            why=f"{shard.name} or its index changed since",
            fix=f"{_FIX} again",
        )
