"""Tokens of a shard while they are being made: parts of it, each stored the first time a document of it is needed.

`X.tokens-<hash12>.part-<first>-<count>.safetensors` is the block of samples first .. first + count - 1. Where parts
are cut follows from the lengths of the shard alone (at most 64 documents or 8,192 tokens, unless one document is
longer), so every rank and job cuts alike; who makes a part at the same time writes the same bytes, and the last
rename wins. The whole of a shard (`token_cache.py`) goes first where it is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.token_block import BlockWriter, TokenBlock
from ringweave.data_pipes.token_cache import TokenCache, cache_path
from ringweave.data_pipes.token_files import (
    DamagedTokens,
    Shard,
    Stamp,
    WriteError,
    open_tokens,
    places,
    plan_hash,
    stamp_of,
    stem_in,
    sweep,
    writable,
    write_tokens,
)

PART_DOCUMENTS, PART_TOKENS = 64, 1 << 13
_log = logging.getLogger(__name__)


def part_bounds(
    lengths: NDArray[np.int64], *, documents: int = PART_DOCUMENTS, tokens: int = PART_TOKENS
) -> NDArray[np.int64]:
    """First sample of each part of a shard, and the number of samples at the end: int64 [parts + 1].

    lengths: int64 [n], tokens of each sample.
    """
    bounds, held, first = [0], 0, 0
    for i, length in enumerate(lengths.tolist()):
        if i > first and (i - first >= documents or held + length > tokens):
            bounds.append(i)
            first, held = i, 0
        held += length
    return np.asarray([*bounds, len(lengths)] if len(lengths) else [0], np.int64)


def part_path(
    shard: Shard,
    plan: Sequence[str],
    manifest_hash: str,
    first: int,
    count: int,
    *,
    folder: Path | None = None,
    stamp: Stamp | None = None,
) -> Path:
    """Where the part of samples first .. first + count - 1 lies, beside the shard or in a folder of caches."""
    stem = stem_in(shard, folder, stamp)
    part = f"tokens-{plan_hash(plan, manifest_hash)}.part-{first:08d}-{count}"
    return stem.with_name(f"{stem.name}.{part}.safetensors")


class ShardTokens:
    """What is stored of one shard for one plan and vocabulary, read and added to.

    folder: where caches go if they cannot lie beside the shard; store: whether parts are stored at all; warn: told
    once if they cannot be (a full disk), and of a damaged part (which is made again). Opening raises as
    `TokenCache.open` for a complete cache that is stale, damaged or of another vocabulary; a stale part and one of
    another vocabulary are refused by name when they are met.
    """

    def __init__(
        self,
        shard: Shard,
        plan: Sequence[str],
        manifest_hash: str,
        *,
        folder: Path | None = None,
        store: bool = True,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        self.shard, self.plan, self.manifest_hash = shard, tuple(plan), manifest_hash
        self.folder, self._warn = folder, warn
        self.stamp = stamp_of(shard)
        self.cache: TokenCache | None = None
        self._place = writable(shard, folder) if store else []
        stored = [
            cache_path(shard, plan, manifest_hash, folder=place, stamp=self.stamp)
            for place in places(shard, folder)
        ]
        if any(path.is_file() for path in stored):
            self.cache = TokenCache.open(shard, plan, manifest_hash, folder=folder, stamp=self.stamp)
        elif self._place:
            stem = stem_in(shard, self._place[0], self.stamp)
            sweep(stem.parent, f"{stem.name}.tokens-")

    @property
    def storing(self) -> bool:
        """Whether a part that is made can be stored, so that making the whole of it is no waste."""
        return self.cache is None and bool(self._place)

    def part(self, first: int, count: int) -> TokenBlock | None:
        """The stored part, or None. Raises VocabularyError and DataError for one that must not be used."""
        for place in places(self.shard, self.folder):
            path = part_path(
                self.shard, self.plan, self.manifest_hash, first, count, folder=place, stamp=self.stamp
            )
            if not path.is_file():
                continue
            try:
                return open_tokens(
                    path, stamp=self.stamp, shard=self.shard, plan=self.plan,
                    manifest_hash=self.manifest_hash, first=first, count=count,
                )  # fmt: skip
            except DamagedTokens as error:
                self._warn(f"{error.render()}\n  it is made again")
        return None

    def store(self, first: int, block: TokenBlock) -> bool:
        """Stores the part that begins at sample `first`, if possible; says whether it was.

        A disk that is full or read-only is told once; from then on nothing of this shard is stored.
        """
        if not self._place:
            return False
        path = part_path(
            self.shard, self.plan, self.manifest_hash, first, len(block), folder=self._place[0], stamp=self.stamp
        )  # fmt: skip
        try:
            write_tokens(
                path, block.tensors(), stamp=self.stamp, plan=self.plan, manifest_hash=self.manifest_hash,
                first=first, count=len(block),
            )  # fmt: skip
        except WriteError as error:
            self._place = []
            self._warn(f"{error.render()}\n  going on without storing the tokens of this shard")
            return False
        return True

    def drop_parts(self) -> int:
        """Removes all parts of this plan and vocabulary that lie where parts are written; gives their number."""
        removed = 0
        for place in self._place:
            stem = stem_in(self.shard, place, self.stamp)
            pattern = f"{stem.name}.tokens-{plan_hash(self.plan, self.manifest_hash)}.part-*.safetensors"
            for path in stem.parent.glob(pattern):
                path.unlink(missing_ok=True)
                removed += 1
        return removed


def select(
    block: TokenBlock, numbers: Sequence[int], *, instead: Mapping[int, tuple[TokenBlock, int]] | None = None
) -> TokenBlock:
    """The documents of these numbers in a block of their own, in the order given; skips stay skips.

    instead: number -> (block, number there) of documents to take from elsewhere.
    """
    writer = BlockWriter()
    for number in numbers:
        source, i = (instead or {}).get(number, (block, number))
        entry = source.entry(i)
        if entry is None:
            writer.add(source.keys[i], source.document(i))
        else:
            writer.skip(**entry)
    return writer.block(block.where)
