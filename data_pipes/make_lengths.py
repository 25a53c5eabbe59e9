"""Making the lengths of a shard: by tokenizing it, or from the headers of its media."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.documents import Tokenizers, encode_sample, parse_plan
from ringweave.data_pipes.encode import Readers, encode_samples, one_line
from ringweave.data_pipes.shard_names import address_of, shown
from ringweave.data_pipes.store import reader_of
from ringweave.data_pipes.token_block import BlockWriter, TokenBlock, join_blocks
from ringweave.data_pipes.token_cache import TokenCache, cache_path, check_skips, write_cache
from ringweave.data_pipes.token_files import Shard, places, stamp_of
from ringweave.data_pipes.token_lengths import lengths_path, read_sidecar, sizes_digest, write_lengths
from ringweave.data_pipes.token_parts import PART_DOCUMENTS, ShardTokens
from ringweave.data_pipes.token_probe import probe_length
from ringweave.data_pipes.token_vocabulary import remember_vocabulary
from ringweave.data_pipes.workers import Task, TokenWorkers
from ringweave.tokenizers.errors import DataError, VocabularyError


def make_lengths(
    shard: Shard,
    plan: Sequence[str],
    tokenizers: Tokenizers,
    *,
    workers: TokenWorkers | None = None,
    store_tokens: bool = True,
    probe: bool | None = None,
    max_skip_rate: float = 0.05,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Makes the lengths of a shard unless those that are there fit; gives their file.

    By tokenizing, with `workers` if given, and then the token cache is written too unless `store_tokens` is False.
    probe: lengths that follow from the headers of media are taken from there, and no tokens are made of such a shard
    (default: if tokens are not to be stored). A sample that cannot be used has length 0 and a reason; beyond
    `max_skip_rate` of the shard, or if nothing is left, DataError. A damaged shard, a wrong plan and a vocabulary
    error always abort. progress: called with (samples done, samples).
    """
    parse_plan(plan)
    manifest_hash = str(tokenizers.manifest.hash)
    probe = not store_tokens if probe is None else probe
    path = _fitting(shard, plan, manifest_hash, folder, tokens=store_tokens and not probe)
    if path is not None:
        return path
    block: TokenBlock | None = None
    try:
        cache = TokenCache.open(shard, plan, manifest_hash, folder=folder)
        lengths, skipped = cache.lengths, cache.skipped
    except DataError:
        measured = _measured(shard, plan, tokenizers, max_skip_rate, progress) if probe else None
        if measured is not None:
            lengths, skipped = measured
        else:
            block = _tokenized(shard, plan, tokenizers, workers, max_skip_rate, progress)
            lengths, skipped = block.lengths, block.skipped
    if block is not None and store_tokens:
        write_cache(shard, plan, manifest_hash, block, folder=folder)
        ShardTokens(shard, plan, manifest_hash, folder=folder).drop_parts()
    path = write_lengths(shard, plan, manifest_hash, lengths, skipped, folder=folder)
    remember_vocabulary(path.parent, tokenizers.manifest)
    return path


def _fitting(
    shard: Shard, plan: Sequence[str], manifest_hash: str, folder: Path | None, *, tokens: bool
) -> Path | None:
    """The sidecar that is there, if it fits (and the token cache too, where that is wanted)."""
    stamp = stamp_of(shard)
    for place in places(shard, folder):
        path = lengths_path(shard, plan, manifest_hash, folder=place, stamp=stamp)
        cache = cache_path(shard, plan, manifest_hash, folder=place, stamp=stamp)
        with contextlib.suppress(DataError):
            if path.is_file() and (cache.is_file() or not tokens):
                sizes = read_sidecar(path, stamp, plan, manifest_hash)
                sizes.load()
                if tokens:
                    held = TokenCache.open(shard, plan, manifest_hash, folder=folder, stamp=stamp).lengths
                    if sizes_digest(held) != sizes.digest:
                        continue
                return path
    return None


def _tokenized(
    shard: Shard,
    plan: Sequence[str],
    tokenizers: Tokenizers,
    workers: TokenWorkers | None,
    max_skip_rate: float,
    progress: Callable[[int, int], None] | None,
) -> TokenBlock:
    """All documents of a shard. What is skipped here stays skipped: `lasting` goes."""
    blocks: list[TokenBlock] = []
    skipped: list[dict[str, Any]] = []
    done, count = 0, _count(shard)
    for block in _blocks(shard, plan, tokenizers, workers, count):
        blocks.append(block)
        skipped += block.skipped
        done += len(block)
        check_skips(shard, skipped, done, count, max_skip_rate)
        if progress is not None:
            progress(done, count)
    joined = join_blocks(blocks, shown(shard)) if blocks else BlockWriter().block(shown(shard))
    return joined.settled()


def _count(shard: Shard) -> int:
    with reader_of(shard) as reader:
        return len(reader)


def _blocks(
    shard: Shard, plan: Sequence[str], tokenizers: Tokenizers, workers: TokenWorkers | None, count: int
) -> Iterator[TokenBlock]:
    """The documents of a shard in blocks, in order. Raises DataError if the shard is damaged."""
    tasks = [
        Task(address_of(shard), tuple(range(s, min(s + PART_DOCUMENTS, count))), tuple(plan))
        for s in range(0, count, PART_DOCUMENTS)
    ]
    at_once = 4 * workers.count if workers is not None and workers.count else 1
    readers = Readers(lambda _: reader_of(shard))
    try:
        for first in range(0, len(tasks), at_once):
            some = tasks[first : first + at_once]
            if workers is not None and workers.count:
                made = workers.run(some)
            else:
                made = [
                    encode_samples(
                        task.shard, task.samples, plan, readers=readers, tokenizers=tokenizers
                    ).block(task.where)
                    for task in some
                ]
            for block in made:
                for entry in block.skipped:
                    if entry.get("damage"):
                        raise DataError("damaged shard", where=shown(shard), why=str(entry["reason"]))
                yield block
    finally:
        readers.close()


def _measured(
    shard: Shard,
    plan: Sequence[str],
    tokenizers: Tokenizers,
    max_skip_rate: float,
    progress: Callable[[int, int], None] | None,
) -> tuple[NDArray[np.int64], list[dict[str, Any]]] | None:
    """Lengths and skips of a shard from headers, single samples by tokenizing; None if its kind has none that tell."""
    lengths: list[int] = []
    skipped: list[dict[str, Any]] = []
    with reader_of(shard) as reader:
        for i in range(len(reader)):
            sample = reader.read(i)
            try:
                length = probe_length(sample, plan, tokenizers)
                if length is None and i == 0:  # as a rule none of this source can be probed
                    return None
                lengths.append(length if length is not None else len(encode_sample(sample, plan, tokenizers)))
            except VocabularyError:
                raise
            except DataError as error:
                lengths.append(0)
                skipped.append({"key": sample.key, "reason": one_line(error)})
                check_skips(shard, skipped, i + 1, len(reader), max_skip_rate)
            if progress is not None:
                progress(i + 1, len(reader))
    return np.asarray(lengths, np.int64), skipped
