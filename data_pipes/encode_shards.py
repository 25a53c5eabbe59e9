"""Token caches of whole shards, made beforehand by many processes: the files a run would make while it trains.

Files are those of `token_cache.py` and `token_lengths.py`, with the same bytes whoever makes them, in whatever pieces
and with however many workers. While a shard is under way, what is done of it is kept every few seconds as parts
(`token_parts.py`), and parts that a run left are taken over: whoever is killed loses seconds. When the cache of the
shard is there, its parts go.

Several plans of one shard (tasks over the same records) go through it side by side, some samples by every plan and then
the next ones, so that a process that remembers what it has encoded (`LatentCodec`) meets the same pictures again soon.
"""

from __future__ import annotations

import contextlib
import glob
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ringweave.data_pipes.documents import parse_plan
from ringweave.data_pipes.plan_items import parse_entry
from ringweave.data_pipes.shard_names import Shard, address_of, shown
from ringweave.data_pipes.store import index_of
from ringweave.data_pipes.token_block import BlockWriter, TokenBlock, join_blocks
from ringweave.data_pipes.token_cache import TokenCache, check_skips, write_cache
from ringweave.data_pipes.token_files import (
    Stamp,
    open_tokens,
    places,
    plan_hash,
    stamp_of,
    stem_in,
    sweep,
    writable,
    write_tokens,
)
from ringweave.data_pipes.token_lengths import lengths_path, read_sidecar, write_lengths
from ringweave.data_pipes.token_parts import part_path
from ringweave.data_pipes.workers import Task, TokenWorkers
from ringweave.tokenizers.errors import DataError

#: Seconds of work that a kill may cost, and samples of a batch for each worker at first and at most.
KEEP_EVERY_S = 5.0
_FIRST, _MOST = 16, 256
#: Tasks of a batch for each worker: the last ones to end keep the others waiting only shortly.
_TASKS = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """A shard whose tokens are stored. made: samples that were encoded now (the others were there, whole or in parts);
    skipped: [{"key", "reason"}]."""

    path: Path
    samples: int
    tokens: int
    made: int
    skipped: list[dict[str, Any]]


def encode_shard(
    shard: Shard,
    plan: Sequence[str],
    manifest_hash: str,
    *,
    workers: TokenWorkers,
    folder: Path | None = None,
    max_skip_rate: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
    keep_every_s: float = KEEP_EVERY_S,
) -> Encoded:
    """Makes token cache and lengths of a shard, unless they are there and fit it. Goes on where it was stopped.

    folder: where they go if they cannot lie beside the shard; progress: called with samples done, and how many of
    them were encoded now. Samples that cannot be used are skips with their reasons; beyond `max_skip_rate` of the shard
    (one is always allowed unless the rate is 0), or if nothing is left, DataError. A damaged shard, a wrong plan and a
    vocabulary error always abort.
    """
    parse_plan(plan)
    made = 0
    try:
        cache = TokenCache.open(shard, plan, manifest_hash, folder=folder)
    except DataError:  # none, of another vocabulary, damaged, or older than the shard
        work = _Work(shard, tuple(plan), manifest_hash, folder, keep_every_s)
        block, made = _encoded(work, workers, max_skip_rate, progress)
        write_cache(shard, plan, manifest_hash, block, folder=folder)
        cache = TokenCache.open(shard, plan, manifest_hash, folder=folder)
        work.drop()
    if progress is not None and not made:
        progress(len(cache), 0)
    _keep_lengths(shard, plan, manifest_hash, cache, folder)
    return Encoded(cache.path, len(cache), int(cache.lengths.sum()), made, cache.skipped)


def encode_plans(
    shard: Shard,
    plans: Sequence[Sequence[str]],
    manifest_hash: str,
    *,
    workers: TokenWorkers,
    folder: Path | None = None,
    max_skip_rate: float = 0.05,
    progress: Callable[[int, int, int], None] | None = None,
    keep_every_s: float = KEEP_EVERY_S,
) -> list[Encoded]:
    """As `encode_shard` for each plan, in their order; plans of latents go through the shard side by side, in parts.

    progress: called with the number of a plan, its samples done, and how many of them were encoded now.
    """
    said: list[Callable[[int, int], None] | None] = [
        None if progress is None else partial(progress, number) for number in range(len(plans))
    ]
    made = _side_by_side(shard, plans, manifest_hash, workers, folder, max_skip_rate, said)
    found = []
    for plan, before, tell in zip(plans, made, said):
        done = encode_shard(
            shard, plan, manifest_hash, workers=workers, folder=folder, max_skip_rate=max_skip_rate,
            progress=None if tell is None else partial(_more, tell, before), keep_every_s=keep_every_s,
        )  # fmt: skip
        found.append(replace(done, made=done.made + before))
    return found


def _more(tell: Callable[[int, int], None], before: int, done: int, made: int) -> None:
    tell(done, made + before)


def _side_by_side(
    shard: Shard, plans: Sequence[Sequence[str]], manifest_hash: str, workers: TokenWorkers, folder: Path | None,
    max_skip_rate: float, said: Sequence[Callable[[int, int], None] | None],
) -> list[int]:  # fmt: skip
    """Keeps parts of plans of latents that have no cache yet, if there are several; gives how many samples of each plan
    were encoded. Other plans have nothing that is worth remembering."""
    made, works = [0] * len(plans), {}
    for number, plan in enumerate(plans):
        if not any(parse_entry(text).item == "latents" for text, _ in parse_plan(plan)):
            continue
        try:
            TokenCache.open(shard, plan, manifest_hash, folder=folder)
        except DataError:
            works[number] = _Work(shard, tuple(plan), manifest_hash, folder, 0.0)
    if len(works) < 2 or not all(work.keeps for work in works.values()):
        return made
    count, size = index_of(shard).count, _FIRST * max(1, workers.count)
    at = dict.fromkeys(works, 0)
    skipped: dict[int, list[dict[str, Any]]] = {number: [] for number in works}
    while min(at.values()) < count:
        number = min(at, key=lambda n: at[n])
        work, done, tell = works[number], at[number], said[number]
        if done in work.parts:
            some = [work.parts[done]]
        else:
            some = _batch(work, done, min(done + size, work.next_part(done), count), workers)
            work.keep(done, some, now=True)
            made[number] += sum(map(len, some))
        at[number] += sum(map(len, some))
        skipped[number] += [entry for block in some for entry in block.skipped]
        check_skips(shard, skipped[number], at[number], count, max_skip_rate)
        if tell is not None:
            tell(at[number], made[number])
    return made


def _keep_lengths(
    shard: Shard, plan: Sequence[str], manifest_hash: str, cache: TokenCache, folder: Path | None
) -> None:
    """Writes the lengths unless some are there that agree with every document.

    A run may have taken them from headers, of samples too that turned out to be damaged: its plan is made of them, so
    they stay.
    """
    stamp = stamp_of(shard)
    for place in places(shard, folder):
        path = lengths_path(shard, plan, manifest_hash, folder=place, stamp=stamp)
        with contextlib.suppress(DataError):
            if path.is_file():
                held = read_sidecar(path, stamp, plan, manifest_hash).load()
                if len(held) == len(cache) and not ((held != cache.lengths) & (cache.lengths > 0)).any():
                    return
    write_lengths(shard, plan, manifest_hash, cache.lengths, cache.skipped, folder=folder)


class _Work:
    """A shard under way, and the parts of it that are kept. Where parts begin and end is of no importance here."""

    def __init__(
        self, shard: Shard, plan: tuple[str, ...], manifest_hash: str, folder: Path | None, every: float
    ) -> None:
        self.shard, self.plan, self.manifest_hash = shard, plan, manifest_hash
        self.every, self._last = every, time.monotonic()
        self.stamp: Stamp = stamp_of(shard)
        self.count = index_of(shard).count
        self._place = writable(shard, folder)
        self._stems = [stem_in(shard, place, self.stamp) for place in places(shard, folder)]
        for place in self._place:
            stem = stem_in(shard, place, self.stamp)
            sweep(stem.parent, f"{stem.name}.tokens-")
            sweep(stem.parent, f"{stem.name}.tar.len-")
        self.parts = dict(self._found())  # of two that begin alike, the longer one

    @property
    def keeps(self) -> bool:
        """Whether parts can be stored."""
        return bool(self._place)

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(first sample, number of samples, file) of each part of this plan and vocabulary."""
        name = f"tokens-{plan_hash(self.plan, self.manifest_hash)}.part-"
        for stem in self._stems:
            for path in stem.parent.glob(f"{glob.escape(stem.name)}.{name}*.safetensors"):
                numbers = path.name.removesuffix(".safetensors").rpartition(".part-")[2].split("-")
                if len(numbers) == 2 and all(n.isdecimal() for n in numbers):
                    yield int(numbers[0]), int(numbers[1]), path

    def _found(self) -> Iterator[tuple[int, TokenBlock]]:
        """The parts that can be used: of this state of the shard, whole, and nothing in them worth another try."""
        for first, count, path in sorted(self._files()):
            with contextlib.suppress(DataError):
                block = open_tokens(
                    path, stamp=self.stamp, shard=self.shard, plan=self.plan, manifest_hash=self.manifest_hash,
                    first=first, count=count,
                )  # fmt: skip
                if count and len(block) == count and not block.again(range(count)):
                    yield first, block

    def next_part(self, after: int) -> int:
        """First sample of the next part behind `after`; the number of samples if there is none."""
        return min((first for first in self.parts if first > after), default=self.count)

    def keep(self, first: int, blocks: Sequence[TokenBlock], *, now: bool = False) -> list[TokenBlock]:
        """Stores the blocks that begin at sample `first` as a part if the last one is a while ago (or `now`); gives
        those that are still to be kept. Raises DataError if it cannot be written."""
        waits = not now and time.monotonic() - self._last < self.every
        if not blocks or not self._place or waits:
            return list(blocks)
        block = join_blocks(blocks, shown(self.shard))
        path = part_path(
            self.shard, self.plan, self.manifest_hash, first, len(block), folder=self._place[0],
            stamp=self.stamp,
        )  # fmt: skip
        write_tokens(
            path, block.tensors(), stamp=self.stamp, plan=self.plan, manifest_hash=self.manifest_hash,
            first=first, count=len(block),
        )  # fmt: skip
        self._last = time.monotonic()
        return []

    def drop(self) -> None:
        """Removes all parts."""
        for _, _, path in self._files():
            path.unlink(missing_ok=True)


def _encoded(
    work: _Work,
    workers: TokenWorkers,
    max_skip_rate: float,
    progress: Callable[[int, int], None] | None,
) -> tuple[TokenBlock, int]:
    """(all documents of a shard, how many samples were encoded now). What is skipped here stays skipped."""
    blocks: list[TokenBlock] = []
    fresh: list[TokenBlock] = []  # made since a part was kept
    skipped: list[dict[str, Any]] = []
    done = made = first = 0
    size = _FIRST * max(1, workers.count)
    while done < work.count:
        if done in work.parts:
            some = [work.parts[done]]
            work.keep(first, fresh, now=True)
            fresh = []
        else:
            begun = time.monotonic()
            end = min(done + size, work.next_part(done), work.count)
            some = _batch(work, done, end, workers)
            made += end - done
            first = done if not fresh else first
            size = _next_size(size, time.monotonic() - begun, workers.count)
            fresh = work.keep(first, [*fresh, *some]) if end < work.count else []
        blocks += some
        done += sum(map(len, some))
        skipped += [entry for block in some for entry in block.skipped]
        check_skips(work.shard, skipped, done, work.count, max_skip_rate)
        if progress is not None:
            progress(done, made)
    name = shown(work.shard)
    joined = join_blocks(blocks, name) if blocks else BlockWriter().block(name)
    return joined.settled(), made


def _next_size(size: int, took: float, workers: int) -> int:
    """Samples of the next batch: about two seconds of work."""
    wanted = int(size * min(2.0, max(0.25, 2.0 / max(took, 1e-3))))
    return int(np.clip(wanted, max(1, workers), _MOST * max(1, workers)))


def _batch(work: _Work, first: int, end: int, workers: TokenWorkers) -> list[TokenBlock]:
    """Samples first .. end - 1. Raises DataError if the shard is damaged there."""
    step = max(1, -(-(end - first) // (_TASKS * max(1, workers.count))))
    address = address_of(work.shard)
    tasks = [Task(address, tuple(range(s, min(s + step, end))), work.plan) for s in range(first, end, step)]
    blocks = workers.run(tasks)
    for block in blocks:
        for entry in block.skipped:
            if entry.get("damage"):
                raise DataError("damaged shard", where=shown(work.shard), why=str(entry["reason"]))
    return blocks
