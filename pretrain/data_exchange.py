"""The ranks of one data index read the same packs: they share out the work of decoding and hand round the tokens.

All pp x tp x sp ranks of a dp index need the whole documents of its packs. Each makes some of the units that hold them
(`Corpus.units`), balanced by tokens, and the blocks go round in one all-gather of sizes and one of bytes, over a gloo
group of its own: nothing here touches the groups of training, so it may run in a thread beside it. A unit once made
stays with the rank that made it, so no document is decoded twice in a group. What cannot be made travels as well, so
all ranks pad alike.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ringweave.data_pipes.corpus import Unit
from ringweave.data_pipes.token_block import TokenBlock
from ringweave.data_pipes.workers import WorkersClosed
from ringweave.tokenizers.errors import DataError, UserError, VocabularyError

#: Reading stored tokens costs so much of making them.
_READ = 0.02
#: Cost of a unit that does not depend on its tokens, in tokens.
_UNIT = 32
#: Parts whose maker is remembered.
_REMEMBERED = 1 << 20


class Gather:
    """All-gather of bytes in one group. size 1: there is no group and nobody is asked.

    The group must be a gloo group that nothing else uses; every rank of it calls in the same order.
    """

    def __init__(self, group: Any = None, *, rank: int = 0, size: int = 1) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.sent = self.received = 0

    def __call__(self, data: bytes, *, tag: int = 0) -> list[bytes]:
        """The bytes of every rank, in order of ranks. Raises DataError if the ranks call with other tags."""
        if self.size == 1:
            return [data]
        mine = torch.tensor([len(data), tag], dtype=torch.int64)
        heads = [torch.empty(2, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(heads, mine, group=self.group)
        sizes, tags = [int(h[0]) for h in heads], [int(h[1]) for h in heads]
        if len(set(tags)) > 1:
            raise DataError(
                "the ranks that share data ask for different batches",
                where=f"rank {self.rank} of {self.size} in the group",
                why=f"marks of what they ask for: {', '.join(f'{t:08x}' for t in tags)}",
                fix="give every rank the same config, shards and lengths",
            )
        if not any(sizes):
            return [b""] * self.size
        largest = max(sizes)
        out = torch.zeros(largest, dtype=torch.uint8)
        if data:
            out[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.empty(largest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, out, group=self.group)
        self.sent += len(data)
        self.received += sum(sizes) - len(data)
        return [part[:size].numpy().tobytes() for part, size in zip(parts, sizes)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of sharing: the block of each unit, or that some rank stops, or the error some rank met, or that the
    data has ended."""

    blocks: list[TokenBlock]
    stopping: bool = False
    error: UserError | None = None
    ended: bool = False


class DocumentExchange:
    """Shares out units among the ranks of a dp index. See the module's docstring.

    by: "tokens" balances what the ranks make by modelled cost, "count" by number of units.
    """

    def __init__(
        self, group: Any = None, *, rank_in_group: int = 0, size: int = 1, by: str = "tokens"
    ) -> None:
        if by not in ("tokens", "count"):
            raise ValueError(f"units are shared out by tokens or count, not by {by!r}")
        self.gather = Gather(group, rank=rank_in_group, size=size)
        self.by = by
        self._maker: OrderedDict[tuple[str, int, int], int] = OrderedDict()
        self._made = [0.0] * size  # cost of all that each rank made so far

    def assign(self, units: Sequence[Unit]) -> list[int]:
        """The rank that makes each unit: where its part was made before, else by longest processing time first
        (Graham 1969), to the rank with the least in this batch and then in all. The same on every rank that has
        shared out the same units before."""
        loads = [0.0] * self.gather.size
        owners = [self._maker.get(unit.part, -1) for unit in units]
        for unit, owner in zip(units, owners):
            if owner >= 0:
                loads[owner] += _READ * (unit.tokens + _UNIT) if self.by == "tokens" else 1.0
        costs = [float(u.part_tokens + _UNIT) if self.by == "tokens" else 1.0 for u in units]
        for n in sorted(range(len(units)), key=lambda n: (-costs[n], n)):
            if owners[n] < 0:
                owner = min(range(self.gather.size), key=lambda r: (loads[r], self._made[r], r))
                owners[n] = owner
                loads[owner] += costs[n]
                self._made[owner] += costs[n]
        for unit, owner in zip(units, owners):
            self._maker[unit.part] = owner
            self._maker.move_to_end(unit.part)
        while len(self._maker) > _REMEMBERED:
            self._maker.popitem(last=False)
        return owners

    def share(
        self,
        units: Sequence[Unit],
        make: Callable[[Sequence[Unit]], list[TokenBlock]],
        *,
        stopping: bool = False,
        ended: bool = False,
    ) -> Outcome:
        """The blocks of all units, in their order; every rank of the group calls it with the same units.

        make: does this rank's share; what it raises reaches every rank as the outcome's error. stopping: take part,
        but make nothing. ended: the plan has no batch any more; a rank that stops did not look and is told.
        """
        owners = self.assign(units)
        mine = [n for n, owner in enumerate(owners) if owner == self.gather.rank]
        head: dict[str, Any] = {
            "stop": stopping, "end": ended, "error": None, "units": mine, "mark": units_mark(units),
        }  # fmt: skip
        blocks: list[TokenBlock] = []
        own: UserError | None = None
        if not stopping and not ended:
            try:
                blocks = make([units[n] for n in mine])
            except WorkersClosed:
                head["stop"] = True
            except UserError as error:
                head["error"], own = describe(error), error
        if self.gather.size == 1:
            return Outcome(blocks, head["stop"], own, ended)
        body = [] if head["stop"] or head["error"] else [block.to_bytes() for block in blocks]
        head["sizes"] = [len(b) for b in body]
        text = json.dumps(head).encode()
        answers = self.gather(b"".join([len(text).to_bytes(8, "little"), text, *body]))
        heads = [json.loads(a[8 : 8 + int.from_bytes(a[:8], "little")]) for a in answers]
        if any(h["end"] for h in heads):
            return Outcome([], ended=True)
        if any(h["stop"] for h in heads):
            return Outcome([], True)
        for rank, h in enumerate(heads):
            if h["error"] is not None:
                return Outcome([], False, own or restored(h["error"], f"rank {rank} of its data group"))
        try:
            return Outcome(self._merged(units, answers, heads, dict(zip(mine, blocks))))
        except UserError as error:  # the other data groups are told as of any other
            return Outcome([], False, error)

    def _merged(
        self,
        units: Sequence[Unit],
        answers: list[bytes],
        heads: list[dict[str, Any]],
        mine: dict[int, TokenBlock],
    ) -> list[TokenBlock]:
        found = dict(mine)
        made = sorted(n for head in heads for n in head["units"])
        for rank, (answer, head) in enumerate(zip(answers, heads)):
            if head["mark"] != heads[0]["mark"] or made != list(range(len(units))):
                raise DataError(
                    "the ranks that share data ask for different batches",
                    where=f"rank {self.gather.rank} of {self.gather.size} in the group",
                    why=f"rank {rank} read batch {head['mark']:08x}, rank 0 {heads[0]['mark']:08x}",
                    fix="give every rank the same config, shards and lengths",
                )
            at = 8 + int.from_bytes(answer[:8], "little")
            for n, size in zip(head["units"], head["sizes"]):
                if n not in found:
                    found[n] = TokenBlock.from_bytes(answer[at : at + size], f"tokens from rank {rank}")
                at += size
        for n, unit in enumerate(units):
            if len(found[n]) != len(unit.samples):
                raise DataError(
                    "the ranks that share data disagree about a part",
                    where=f"source {unit.source}, shard {unit.shard}, sample {unit.first}",
                    why=f"{len(found[n])} documents for {len(unit.samples)}",
                )
        return [found[n] for n in range(len(units))]


def units_mark(units: Sequence[Unit]) -> int:
    """A number that stands for a list of units: equal lists have equal ones."""
    text = json.dumps([[u.source, u.shard, u.first, u.count, u.samples] for u in units])
    return zlib.crc32(text.encode())


def describe(error: UserError) -> dict[str, Any]:
    """An error as JSON."""
    kind = "vocabulary" if isinstance(error, VocabularyError) else "data"
    return {"kind": kind, "what": error.what, "where": error.where, "why": error.why, "fix": error.fix}


def restored(said: dict[str, Any], who: str) -> UserError:
    """The error another rank described."""
    kind = VocabularyError if said["kind"] == "vocabulary" else DataError
    where = f"{said['where']} ({who})" if said["where"] else who
    return kind(said["what"], where=where, why=said["why"], fix=said["fix"])


def data_groups(
    mesh_ranks: np.ndarray, *, timeout: timedelta | None = None
) -> tuple[DocumentExchange, Gather]:
    """The exchange of this rank's dp index, and the gather over all ranks that failures go through.

    mesh_ranks: int [dp, ...], the global rank at each place of the mesh; timeout: of one exchange. Every rank of the
    world calls it once a mesh, at the same time; each group is a gloo group of its own. Sizes of 1 make no group.
    """
    rows = mesh_ranks.reshape(len(mesh_ranks), -1)
    me, world = dist.get_rank(), rows.size
    exchange = DocumentExchange()
    for row in rows.tolist():
        if len(row) > 1:
            group = dist.new_group(row, backend="gloo", timeout=timeout)
            if me in row:
                exchange = DocumentExchange(group, rank_in_group=row.index(me), size=len(row))
    everyone = Gather()
    if len(rows) > 1:
        ranks = rows.reshape(-1).tolist()
        everyone = Gather(
            dist.new_group(sorted(ranks), backend="gloo", timeout=timeout),
            rank=sorted(ranks).index(me),
            size=world,
        )
    return exchange, everyone
