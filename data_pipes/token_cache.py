"""Tokens of a shard, encoded once and read by slices ever after.

`X.tokens-<hash12>.safetensors` lies beside `X.tar` (or in a folder of caches, see `token_files.py`); hash12 names
manifest and plan, so caches of several vocabularies or plans coexist. It is one block of all samples of the shard
(`token_block.py`). The law of this file: `document(i)` equals encoding sample i afresh. A sample that cannot be
decoded is skipped (length 0) and journaled; a damaged shard aborts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ringweave.data_pipes.documents import Tokenizers, encode_sample, parse_plan
from ringweave.data_pipes.encode import one_line
from ringweave.data_pipes.shard_names import shown
from ringweave.data_pipes.store import reader_of
from ringweave.data_pipes.token_block import BlockWriter, TokenBlock, add_counts
from ringweave.data_pipes.token_files import (
    Shard,
    Stamp,
    open_tokens,
    places,
    plan_hash,
    read_metadata,
    stamp_of,
    stem_in,
    writable,
    write_tokens,
)
from ringweave.data_pipes.token_vocabulary import FIX, other_vocabulary, remember_vocabulary
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.segment import Document

__all__ = ["TokenCache", "add_counts", "build_cache", "cache_path", "check_skips", "write_cache"]


def cache_path(
    shard: Shard,
    plan: Sequence[str],
    manifest_hash: str,
    *,
    folder: Path | None = None,
    stamp: Stamp | None = None,
) -> Path:
    """`X.tar` -> `X.tokens-<hash12>.safetensors` beside it, or in a folder of caches."""
    stem = stem_in(shard, folder, stamp)
    return stem.with_name(f"{stem.name}.tokens-{plan_hash(plan, manifest_hash)}.safetensors")


def build_cache(
    shard: Shard,
    plan: Sequence[str],
    tokenizers: Tokenizers,
    *,
    progress: Callable[[int, int], None] | None = None,
    max_skip_rate: float = 0.05,
    force: bool = False,
    folder: Path | None = None,
) -> Path:
    """Encodes a shard and writes its cache; one that is already there and fits is kept unless `force`.

    progress: called with (samples done, samples). Samples that cannot be decoded are skipped and journaled;
    beyond `max_skip_rate` of the shard (one is always allowed unless the rate is 0), or if nothing is left,
    DataError. A damaged shard, an unknown plan item and a vocabulary error always abort. folder: where the cache
    goes if it cannot lie beside the shard.
    """
    parse_plan(plan)
    manifest_hash = str(tokenizers.manifest.hash)
    if not force and (there := _fitting(shard, plan, manifest_hash, folder)) is not None:
        return there
    writer = BlockWriter()
    with reader_of(shard) as reader:
        count = len(reader)
        for i in range(count):
            sample = reader.read(i)  # damage of the shard itself is not skipped
            try:
                writer.add(sample.key, encode_sample(sample, plan, tokenizers))
            except VocabularyError:
                raise
            except DataError as error:
                writer.skip(sample.key, one_line(error))
                check_skips(shard, writer.skipped, i + 1, count, max_skip_rate)
            if progress is not None:
                progress(i + 1, count)
    path = write_cache(shard, plan, manifest_hash, writer.block(shown(shard)), folder=folder)
    remember_vocabulary(path.parent, tokenizers.manifest)
    return path


def write_cache(
    shard: Shard, plan: Sequence[str], manifest_hash: str, block: TokenBlock, *, folder: Path | None = None
) -> Path:
    """Stores the block of all samples of a shard as its cache. Raises DataError if that cannot be done."""
    stamp = stamp_of(shard)
    place = next(iter(writable(shard, folder)), folder if not places(shard, None) else None)
    path = cache_path(shard, plan, manifest_hash, folder=place, stamp=stamp)
    write_tokens(path, block.tensors(), stamp=stamp, plan=plan, manifest_hash=manifest_hash)
    return path


def _fitting(shard: Shard, plan: Sequence[str], manifest_hash: str, folder: Path | None) -> Path | None:
    try:
        return TokenCache.open(shard, plan, manifest_hash, folder=folder).path
    except DataError:
        return None


def check_skips(
    shard: Shard, skipped: list[dict[str, Any]], read: int, count: int, max_skip_rate: float
) -> None:
    """Raises DataError if more samples of a shard were skipped than allowed, or all of them."""
    allowed = max(1, int(max_skip_rate * count)) if max_skip_rate > 0 else 0
    if len(skipped) <= allowed and len(skipped) < count:
        return
    reasons = "; ".join(f"{s['key']}: {s['reason'].splitlines()[0]}" for s in skipped[:3])
    raise DataError(
        f"{len(skipped)} of the first {read} samples cannot be used",
        where=f"{shown(shard)} ({count} samples)",
        why=f"{reasons}{'; ...' if len(skipped) > 3 else ''}",
        fix="check the plan of this source and the shard, or allow a higher rate of skips",
    )


class TokenCache:
    """The documents of one shard. Only tables are in memory; tokens are sliced out of the mapped file.

    lengths: int64 [D], tokens of each document, 0 for a skipped one; keys: names inside the shard;
    skipped: [{"key", "reason"}].
    """

    def __init__(self, path: Path, block: TokenBlock) -> None:
        self.path, self.block = path, block
        self.keys, self.skipped = block.keys, block.skipped
        self.lengths: NDArray[np.int64] = block.lengths

    @classmethod
    def open(
        cls,
        shard: Shard,
        plan: Sequence[str],
        manifest_hash: str,
        *,
        folder: Path | None = None,
        stamp: Stamp | None = None,
    ) -> TokenCache:
        """Opens the cache of a shard, beside it or in `folder`. stamp: of the shard now, if known.

        Raises VocabularyError if only caches of another manifest are there, DataError if there is none, if it
        is damaged, or if shard or index changed since.
        """
        for place in places(shard, folder):
            if place is not None and stamp is None:
                stamp = stamp_of(shard)
            path = cache_path(shard, plan, manifest_hash, folder=place, stamp=stamp)
            if path.is_file():
                block = open_tokens(path, stamp=stamp, shard=shard, plan=plan, manifest_hash=manifest_hash)
                return cls(path, block)
        raise _absent(shard, plan, manifest_hash, folder, stamp)

    def __len__(self) -> int:
        return len(self.keys)

    def document(self, i: int) -> Document:
        """Document i, equal to a fresh encoding of sample i. Raises DataError if its bytes changed."""
        return self.block.document(i)

    def target_counts(self) -> dict[str, NDArray[np.int64]]:
        """modality -> int64 [largest id + 1], how often each id is predicted with a weight above 0."""
        return self.block.target_counts()


def _absent(
    shard: Shard, plan: Sequence[str], manifest_hash: str, folder: Path | None, stamp: Stamp | None
) -> DataError:
    """Says whether nothing is there or only caches of other vocabularies."""
    others: dict[str, Path] = {}
    where = shown(shard)
    for place in places(shard, folder):
        stem = stem_in(shard, place, stamp)
        for path in sorted(stem.parent.glob(f"{stem.name}.tokens-*.safetensors")):
            try:
                metadata = read_metadata(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError, ValueError):
                continue
            if metadata.get("plan") == list(plan) and metadata.get("manifest") != manifest_hash:
                others[str(metadata.get("manifest"))] = path.parent
    if others:
        found = min(others)
        return other_vocabulary(where, found, manifest_hash, folder=others[found])
    plans = ", ".join(plan)
    return DataError("no token cache", where=where, why=f"none for the plan [{plans}]", fix=FIX)
