"""Documents that cannot be read while a run trains: padding in the packs, and a journal in the cursor.

The plan of a run never moves: a document that turns out to be damaged, out of reach or deadly to its decoder keeps
its slots, as padding. The journal names each one, travels in the cursor and is replayed on resume: what was padding
once is padding ever after, also if it could be read by then. A share of failures, or a row of them without a
document in between, ends the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ringweave.data_pipes.pack import PackPlan
from ringweave.tokenizers.errors import DataError

_FORMAT = 1
_FIELDS = ("source", "sample", "shard", "key", "offset", "reason")
_STATE = frozenset(["format", "seen", "failed", "in_a_row", "entries"])


@dataclass(frozen=True, slots=True)
class Failure:
    """A document that could not be made: sample of a source (counted through its shards), name of its shard, key,
    offset of its first member in the shard (-1: unknown), reason in one line."""

    source: str
    sample: int
    shard: str
    key: str
    offset: int
    reason: str

    def to_json(self) -> list[Any]:
        """[source, sample, shard, key, offset, reason]"""
        return [self.source, self.sample, self.shard, self.key, self.offset, self.reason]

    @classmethod
    def from_json(cls, value: Any) -> Failure:
        """Inverse of `to_json`. Raises DataError on anything else."""
        kinds = (str, int, str, str, int, str)
        if (
            not isinstance(value, list)
            or len(value) != len(kinds)
            or any(type(v) is not kind for v, kind in zip(value, kinds))
        ):
            raise DataError("malformed entry of a quarantine", why=f"{value!r:.200} is not {list(_FIELDS)}")
        return cls(*value)


class Quarantine:
    """The journal of one run. All ranks keep the same one: `batch` gets the failures of all of them.

    max_share: of the documents read since the run began, once more than `free` have failed;
    max_in_a_row: failures with no document read in between.
    """

    def __init__(self, *, max_share: float = 0.01, max_in_a_row: int = 64, free: int = 8) -> None:
        if not 0 <= max_share <= 1 or max_in_a_row < 0 or free < 0:
            raise ValueError(
                "max_share must be in 0..1, max_in_a_row and free 0 or above (0 failures in a row: none is allowed)"
            )
        self.max_share, self.max_in_a_row, self.free = max_share, max_in_a_row, free
        self._entries: dict[tuple[str, int], Failure] = {}
        self._seen = self._in_a_row = 0

    def __contains__(self, document: tuple[str, int]) -> bool:
        """Whether (source, sample) is padding."""
        return document in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> list[Failure]:
        """The journal, oldest first."""
        return list(self._entries.values())

    @property
    def seen(self) -> int:
        """Documents that were asked for since the run began, once for each batch that holds a piece of them."""
        return self._seen

    def batch(self, plans: Iterable[PackPlan], failures: Iterable[Failure]) -> list[Failure]:
        """Takes account of one global batch; gives its failures that are new, in the order of the plans.

        failures: of all ranks, in any order. Raises DataError (exit 3) once failures are too many; the journal
        holds them all the same.
        """
        found: dict[tuple[str, int], Failure] = {}
        for failure in failures:  # two data ranks may fail on one document, with other reasons
            known = found.get((failure.source, failure.sample))
            if known is None or failure.reason < known.reason:
                found[failure.source, failure.sample] = failure
        fresh, longest = [], 0
        documents = dict.fromkeys((p.source, p.sample) for plan in plans for p in plan.pieces)
        for document in documents:
            if document in self._entries:
                continue
            self._seen += 1
            if document in found:
                self._entries[document] = found[document]
                fresh.append(found[document])
                self._in_a_row += 1
                longest = max(longest, self._in_a_row)
            else:
                self._in_a_row = 0
        if fresh:
            self._judge(fresh, longest)
        return fresh

    def _judge(self, fresh: list[Failure], longest: int) -> None:
        failed = len(self._entries)
        said = "; ".join(f"{f.shard}#{f.key}: {f.reason}" for f in fresh[-3:])
        if longest > self.max_in_a_row:
            what = f"{longest} documents in a row cannot be read"
        elif failed > self.free and failed > self.max_share * self._seen:
            what = f"{failed} of {self._seen} documents cannot be read, more than {self.max_share:.2%}"
        else:
            return
        raise DataError(
            what,
            where=", ".join(sorted({f.shard for f in fresh})[:4]),
            why=f"the last: {said}",
            fix="check the shards with `ringweave data check`; raise the limits of data.quarantine if this is known",
        )

    def state(self) -> dict[str, Any]:
        """The journal as a JSON object; `restore(state()).state()` is the same object."""
        return {
            "format": _FORMAT,
            "seen": self._seen,
            "failed": len(self._entries),
            "in_a_row": self._in_a_row,
            "entries": [f.to_json() for f in self._entries.values()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved journal; limits stay those of this object. Raises DataError if it is malformed."""
        if not isinstance(state, Mapping) or set(state) != _STATE or state["format"] != _FORMAT:
            raise DataError("malformed quarantine", why=f"it must hold exactly {', '.join(sorted(_STATE))}")
        entries = [Failure.from_json(value) for value in state["entries"]]
        if any(type(state[name]) is not int or state[name] < 0 for name in ("seen", "failed", "in_a_row")):
            raise DataError("malformed quarantine", why="seen, failed and in_a_row must be numbers")
        self._entries = {(f.source, f.sample): f for f in entries}
        if len(self._entries) != state["failed"] or len(entries) != state["failed"]:
            raise DataError(
                "malformed quarantine", why=f"{len(entries)} entries, {state['failed']} documents failed"
            )
        self._seen, self._in_a_row = state["seen"], state["in_a_row"]
