"""A lane's state as a short text: whole numbers as varints, column by column, deflated, in base64.

A piece that waits is named by the block of its lane and its place there, not by its sample: places follow each other,
so their differences fit a byte and most of them repeat. Some 4,000 pieces (8 open packs of 1M tokens) take 6 KiB.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.bins import Waiting
from ringweave.data_pipes.lanes import Lane, Snapshot
from ringweave.data_pipes.order import Block, Orders

_Ints: TypeAlias = NDArray[np.int64]
#: Blocks of a lane by (source, epoch, number of the block).
Blocks: TypeAlias = dict[tuple[int, int, int], Block]

_NONE = np.zeros(0, np.int64)
#: Bytes a state may inflate to: far above any real one, far below what harms.
_LARGEST = 2**26


def pack_varints(values: _Ints) -> bytes:
    """LEB128 of non-negative numbers, int64 [n]: seven bits a byte, the lowest first."""
    words = values.astype(np.uint64)
    size = np.ones(len(words), np.int64)
    for shift in range(7, 63, 7):
        size += words >= np.uint64(1) << np.uint64(shift)
    first = np.cumsum(size) - size
    out = np.zeros(int(size.sum()), np.uint8)
    for at in range(int(size.max(initial=0))):
        some = size > at
        part = (words[some] >> np.uint64(7 * at)) & np.uint64(127)
        out[first[some] + at] = part.astype(np.uint8) | ((size[some] > at + 1) * 128).astype(np.uint8)
    return out.tobytes()


def unpack_varints(data: bytes) -> _Ints:
    """Inverse of `pack_varints`. Raises ValueError if the bytes are none."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 128)
    if not len(raw):
        return _NONE
    if not len(ends) or ends[-1] != len(raw) - 1:
        raise ValueError("a number is cut off")
    first = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(raw)) - np.repeat(first, ends - first + 1)
    if int(place.max()) > 8:
        raise ValueError("a number has more than 63 bits")
    words = (raw & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(words, first).astype(np.int64)


class _Columns:
    """Reads numbers one after the other. Raises ValueError beyond the end."""

    def __init__(self, values: _Ints) -> None:
        self._values, self._at = values, 0

    def take(self, count: int) -> _Ints:
        if not 0 <= count <= len(self._values) - self._at:
            raise ValueError("the text ends early")
        self._at += count
        return self._values[self._at - count : self._at]

    def rows(self, width: int) -> list[list[int]]:
        """A table: its number of rows, then the rows."""
        count = int(self.take(1)[0])
        return self.take(count * width).reshape(count, width).tolist()

    def end(self) -> None:
        if self._at != len(self._values):
            raise ValueError("the text goes on after its end")


def encode(snapshot: Snapshot) -> str:
    """The snapshot as text, made once."""
    if snapshot.text is None:
        head = [len(snapshot.cursors)]
        for source, (epoch, number, offset, passed, ended) in snapshot.cursors.items():
            head += [source, epoch, number, offset, passed, int(ended)]
        head.append(len(snapshot.tokens))
        for source, tokens in snapshot.tokens.items():
            head += [source, tokens]
        head.append(snapshot.drawn)
        columns = [np.asarray(head, np.int64), *_pieces([*snapshot.packs, snapshot.pending])]
        data = zlib.compress(pack_varints(np.concatenate(columns)), 6)
        snapshot.text = base64.b64encode(data).decode("ascii")
    return snapshot.text


def _pieces(groups: Sequence[Sequence[Waiting]]) -> list[_Ints]:
    """Columns of the waiting pieces in the order of their draw; the last group is what has no pack yet."""
    rows = list(chain.from_iterable(groups))
    head = np.asarray([len(groups), len(rows)], np.int64)
    if not rows:
        return [head]
    numbers, sources, blocks, offsets, starts, ends = zip(*rows)
    table = {id(b): (s, b.epoch, b.number, b) for s, b in zip(sources, blocks)}
    ordered = sorted(table.values(), key=lambda row: row[:3])
    refs = {id(row[3]): at for at, row in enumerate(ordered)}
    start = np.asarray(starts, np.int64)
    number = np.asarray(numbers, np.int64)
    order = np.lexsort((start, number))
    draw = np.diff(number[order], prepend=0)
    group = np.repeat(np.arange(len(groups)), [len(g) for g in groups])[order]
    ref = np.asarray([refs[id(b)] for b in blocks], np.int64)[order]
    offset, start = np.asarray(offsets, np.int64)[order], start[order]
    missing = _sizes(ref, offset, [row[3] for row in ordered]) - np.asarray(ends, np.int64)[order]
    parts = np.flatnonzero((start > 0) | (missing > 0))
    step = offset.copy()
    for at in range(len(ordered)):
        own = np.flatnonzero(ref == at)
        step[own[1:]] = np.diff(offset[own])
    exceptions = np.stack([parts, start[parts], missing[parts]], axis=1).ravel()
    known = [number for row in ordered for number in row[:3]]
    return [
        head, np.asarray([len(ordered), *known]), draw, ref, step, group, np.asarray([len(parts)]), exceptions,
    ]  # fmt: skip


def _sizes(ref: _Ints, offset: _Ints, blocks: Sequence[Block]) -> _Ints:
    """Tokens of the whole document of each piece. Raises ValueError if a place is outside its block."""
    out = np.zeros(len(ref), np.int64)
    for at, block in enumerate(blocks):
        own = ref == at
        inside = offset[own]
        if len(inside) and not 0 <= inside.min() <= inside.max() < len(block.sizes):
            raise ValueError("a piece lies outside its block")
        out[own] = block.sizes[inside]
    return out


def decode(text: str, lane: int, orders: Orders) -> tuple[Snapshot, Blocks]:
    """The snapshot that `text` came from, with all blocks it needs. Raises ValueError if it is malformed."""
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(text.encode("ascii"), validate=True), _LARGEST)
    except (zlib.error, binascii.Error, AttributeError, UnicodeEncodeError) as error:
        raise ValueError(f"lane {lane}: {error}") from None
    if not inflate.eof or inflate.unused_data:
        raise ValueError(f"lane {lane}: cut off or too long")
    columns = _Columns(unpack_varints(data))
    blocks: Blocks = {}

    def block(source: int, epoch: int, number: int) -> Block:
        key = (source, epoch, number)
        if key not in blocks:
            blocks[key] = orders.get(source).block(lane, epoch, number)
        return blocks[key]

    cursors = {row[0]: (row[1], row[2], row[3], row[4], bool(row[5])) for row in columns.rows(6)}
    for source, (epoch, number, _, _, ended) in cursors.items():
        if not (ended and orders.get(source).blocks(lane, epoch) == 0):
            block(source, epoch, number)
    tokens = {source: count for source, count in columns.rows(2)}
    drawn = int(columns.take(1)[0])
    groups, count = columns.take(2).tolist()
    if groups < 1:
        raise ValueError("no group of waiting pieces")
    waiting = _waiting(columns, groups, count, block) if count else [[] for _ in range(groups)]
    columns.end()
    if any(not 0 <= piece[0] < drawn for group in waiting for piece in group):
        raise ValueError("a piece waits that was not drawn yet")
    return Snapshot(cursors, tokens, waiting[:-1], waiting[-1], drawn, text), blocks


def _waiting(
    columns: _Columns, groups: int, count: int, block: Callable[[int, int, int], Block]
) -> list[list[Waiting]]:
    """Inverse of `_pieces`."""
    known = columns.rows(3)
    found = [block(*row) for row in known]
    draw, ref, step, group = (columns.take(count) for _ in range(4))
    exceptions = np.asarray(columns.rows(3), np.int64).reshape(-1, 3)
    if int(ref.max()) >= len(known) or int(group.max()) >= groups:
        raise ValueError("a piece names a block or pack that is not there")
    offset = step.copy()
    for at in range(len(known)):
        own = ref == at
        offset[own] = np.cumsum(step[own])
    start, end = np.zeros(count, np.int64), _sizes(ref, offset, found)
    parts, first, missing = exceptions.T
    if len(parts) and int(parts.max()) >= count:
        raise ValueError("a part belongs to no piece")
    start[parts] = first
    end[parts] -= missing
    if (start >= end).any():
        raise ValueError("a piece holds no token")
    sources = [row[0] for row in known]
    numbers = ref.tolist()
    rows: list[Waiting] = list(
        zip(
            np.cumsum(draw).tolist(),
            [sources[r] for r in numbers],
            [found[r] for r in numbers],
            offset.tolist(),
            start.tolist(),
            end.tolist(),
        )
    )
    out: list[list[Waiting]] = [[] for _ in range(groups)]
    for row, g in zip(rows, group.tolist()):
        out[g].append(row)
    return out


def load(lane: Lane, snapshot: Snapshot, blocks: Blocks) -> None:
    """Sets the cursors and waiting pieces of a fresh lane; `Lane.enter` and `Bins.refill` come after.

    Raises ValueError if a cursor lies outside its block."""
    for source, (epoch, number, offset, passed, ended) in snapshot.cursors.items():
        cursor = lane.cursor(source)
        block = blocks.get((source, epoch, number))
        if block is not None:
            cursor.seek(block, offset=offset, passed=passed, ended=ended)
        elif not cursor.ended:
            raise ValueError(f"source number {source} has not ended in lane {lane.number}")
    lane.pending.extend(snapshot.pending)
    lane.drawn = snapshot.drawn
