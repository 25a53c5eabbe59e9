"""From (shard, sample numbers, plan) to a block of documents: the work that worker processes do."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from ringweave.data_pipes.documents import Tokenizers, encode_sample, parse_plan
from ringweave.data_pipes.token_block import BlockWriter
from ringweave.tokenizers.errors import DataError, VocabularyError

OUT_OF_MEMORY = "decoder killed: memory"
#: Shards a process keeps open.
_OPEN_SHARDS = 16


class Readers:
    """Opened shards, the ones used last. open: gives the reader of a shard (`ShardReader`, or like it)."""

    def __init__(self, open: Callable[[str], Any], *, limit: int = _OPEN_SHARDS) -> None:
        self._open, self._limit = open, limit
        self._readers: OrderedDict[str, Any] = OrderedDict()

    def __call__(self, shard: str) -> Any:
        """The reader of a shard. Raises DataError if it cannot be opened."""
        if shard not in self._readers:
            while len(self._readers) >= self._limit:
                self._readers.popitem(last=False)[1].close()
            self._readers[shard] = self._open(shard)
        self._readers.move_to_end(shard)
        return self._readers[shard]

    def close(self) -> None:
        """Close all."""
        while self._readers:
            self._readers.popitem()[1].close()


def encode_samples(
    shard: str,
    samples: Sequence[int],
    plan: Sequence[str],
    *,
    readers: Readers,
    tokenizers: Tokenizers,
    begin: Callable[[int], None] = lambda number: None,
) -> BlockWriter:
    """The documents of these samples of a shard, in the order given. begin: told of each sample before it is read.

    A sample that cannot be read or decoded is a skip with its reason; one that ends otherwise on another day (damage
    of the shard, a store that fails, memory) is not lasting. Raises VocabularyError, and DataError for a wrong plan
    or a shard that cannot be opened.
    """
    parse_plan(plan)
    reader = readers(shard)
    writer = BlockWriter()
    for number in samples:
        begin(number)
        reason, lasting, damage = "", False, False
        try:
            sample = reader.read(number)
        except DataError as error:
            reason, damage = one_line(error), True
        except MemoryError:
            reason = OUT_OF_MEMORY
        else:
            try:
                writer.add(sample.key, encode_sample(sample, plan, tokenizers))
                continue
            except VocabularyError:
                raise
            except MemoryError:
                reason = OUT_OF_MEMORY
            except DataError as error:
                lasting = not isinstance(error.__cause__, MemoryError)
                reason = one_line(error) if lasting else OUT_OF_MEMORY
            except Exception as error:  # a mistake in a decoder must not end a run of weeks; rates still do
                reason = f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
        offset = offset_of(reader, number)
        writer.skip(reader.keys[number], reason, lasting=lasting, damage=damage, offset=offset)
    return writer


def offset_of(reader: Any, number: int) -> int | None:
    """Where a sample's first member lies in its shard."""
    index = getattr(reader, "index", None)
    return int(index.samples[number].members[0].offset) if index is not None else None


#: What differs from process to process: libraries show objects with it.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
#: Characters of a reason that are kept: journals are part of every checkpoint.
_LONGEST_REASON = 240


def one_line(error: DataError) -> str:
    """What, where and why of an error in one line of at most 240 characters."""
    parts = [error.what, error.where, error.why]
    return _ADDRESS.sub("", ": ".join(" ".join(p.split()) for p in parts if p))[:_LONGEST_REASON]
