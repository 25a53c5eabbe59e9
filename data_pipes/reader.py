"""Random access to indexed shards, every byte verified at every read.

`ShardReader.read(i)` does one ranged read for a sample (one a member where they are not adjacent), compares the
crc32 of each member's tar header and of its data with the index, and returns a `Sample` or raises a `DataError`
that names shard, key, member and offset. `read_many` takes a run of samples with one read.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from ringweave.data_pipes.checksum import crc32
from ringweave.data_pipes.compression import codec_of_member, inflate_member, plain_extension
from ringweave.data_pipes.index import ShardIndex, build_index, load_index, shard_name
from ringweave.data_pipes.sample import Sample
from ringweave.data_pipes.shard_names import join_address
from ringweave.data_pipes.storage import ByteSource, open_source, redact
from ringweave.data_pipes.tar import BLOCK, HeaderError, parse_header
from ringweave.tokenizers.errors import DataError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
#: More shards than this in one pattern is a typing error.
_MAX_SHARDS = 1_000_000
#: Members of a sample (samples of a run) further apart than this, in bytes, are read one by one.
_MAX_GAP = 1 << 16
#: A run of samples longer than this is read in several pieces.
_MAX_RUN = 1 << 26
#: Bytes of a sample from its first header to its last byte: a sample is read into memory whole.
_MAX_SAMPLE = 1 << 31


class ShardReader:
    """The samples of one shard by number. May be forked or pickled (no shared file position)."""

    def __init__(self, shard: Path | str | ByteSource, *, index: ShardIndex | None = None) -> None:
        """shard: a path, a URL or an open byte source; index: if it is not the one beside it.

        Raises DataError when shard or index is missing, bad or stale.
        """
        self.where = shard_name(shard)
        self.index = load_index(shard) if index is None else index
        local = isinstance(shard, Path) or (isinstance(shard, str) and "://" not in shard)
        self.path = Path(str(shard)) if local else Path(self.where)
        self._local = local
        self._url = shard if isinstance(shard, str) and not local else None
        self._source: Any = None if local or self._url is not None else shard
        self._fd = -1
        self._prepare()

    def _prepare(self) -> None:
        index = self.index
        self._starts: list[int] = index.columns["starts"].tolist()
        self._rows = index.rows
        self._members = [(plain_extension(e), codec_of_member(e)) for e in index.extensions]
        self._apart = _apart(index)

    def __len__(self) -> int:
        return self.index.count

    @property
    def keys(self) -> list[str]:
        """The samples' keys in the order of the shard."""
        return self.index.keys

    def read(self, i: int) -> Sample:
        """Sample number `i` (0 <= i < len). Raises DataError for damage, IndexError for a wrong number."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in {self.where}")
        rows = self._rows[self._starts[i] : self._starts[i + 1]].tolist()
        if self._apart is not None and self._apart[i]:
            return self._scattered(i, rows)
        base = rows[0][0] - BLOCK
        return self._assemble(i, rows, self._fetch(base, rows[-1][0] + rows[-1][1] - base, i, rows[0]), base)

    @overload
    def read_many(self, first: int, count: int) -> list[Sample]: ...
    @overload
    def read_many(self, first: int, count: int, *, errors: Literal["return"]) -> list[Sample | DataError]: ...
    def read_many(
        self, first: int, count: int, *, errors: Literal["raise", "return"] = "raise"
    ) -> list[Sample] | list[Sample | DataError]:
        """Samples `first` to `first + count - 1`, with one read a run of 64 MiB, each verified as `read` does.

        errors: "return" gives the DataError of a damaged sample in its place; "raise" raises the first.
        """
        if not (first >= 0 and count >= 0 and first + count <= len(self)):
            raise IndexError(f"samples {first} to {first + count} of {len(self)} in {self.where}")
        found: list[Any] = []
        while len(found) < count:
            found += self._run(first + len(found), count - len(found), errors)
        return found

    def _run(self, first: int, most: int, errors: str) -> list[Any]:
        """As many of the samples from `first` on as one read may hold, at least one."""
        whole = self._rows[self._starts[first] : self._starts[first + most]]
        ends = whole[:, 0] + whole[:, 1]
        base = int(whole[0, 0]) - BLOCK
        # A member is part of the run while it lies behind the one before, not far, and ends within the limit.
        good = (ends - base <= _MAX_RUN) & (whole[:, 0] > base)
        good[1:] &= (whole[1:, 0] - ends[:-1] <= _MAX_GAP) & (whole[1:, 0] >= ends[:-1] + BLOCK)
        members = len(good) if good.all() else int(np.argmin(good))
        last = first
        while last < first + most and self._starts[last + 1] - self._starts[first] <= members:
            last += 1
        data: bytes | None = None
        if last > first + 1:
            stop = int(ends[self._starts[last] - self._starts[first] - 1])
            try:
                data = self._fetch(base, stop - base, first, whole[0].tolist())
            except DataError:
                data = None  # one by one, so that each sample has its own outcome
        found: list[Any] = []
        for i in range(first, max(last, first + 1)):
            try:
                rows = self._rows[self._starts[i] : self._starts[i + 1]].tolist()
                found.append(self.read(i) if data is None else self._assemble(i, rows, data, base))
            except DataError as error:
                if errors == "raise":
                    raise
                found.append(error)
        return found

    def _assemble(self, i: int, rows: list[list[int]], data: bytes, base: int) -> Sample:
        """The sample out of `data`, which begins at `base` in the shard; every member checked."""
        members: dict[str, bytes] = {}
        view = memoryview(data)
        for row in rows:
            offset, size, crc, head, ext = row
            at = offset - base
            payload = data[at : at + size]
            if crc32(view[at - BLOCK : at]) != head or crc32(payload) != crc or len(payload) != size:
                self._examine(i, row, data, at, base)
            name, codec = self._members[ext]
            if codec is not None:
                where = f"{self.where}#{self.keys[i]}/{self.index.extensions[ext]} @{offset}"
                payload = inflate_member(payload, codec, where=where)
            members[name] = payload
        return Sample(self.index.keys[i], members, self.where, i)

    def _scattered(self, i: int, rows: list[list[int]]) -> Sample:
        """A sample whose members are not adjacent: one read a member."""
        members: dict[str, bytes] = {}
        for row in rows:
            base = row[0] - BLOCK
            members |= self._assemble(i, [row], self._fetch(base, BLOCK + row[1], i, row), base).members
        return Sample(self.index.keys[i], members, self.where, i)

    def _examine(self, i: int, row: list[int], data: bytes, at: int, base: int) -> None:
        """What is wrong with a member, as a DataError; nothing if only its header is spelled in another way."""
        offset, size, crc, head, _ = row
        if at < BLOCK or at + size > len(data):
            raise self._error(i, row, f"truncated: the read ended at {base + len(data)}")
        block = data[at - BLOCK : at]
        if crc32(block) != head:
            try:
                header = parse_header(block)
            except HeaderError as error:
                raise self._error(i, row, str(error)) from None
            name = header.name.decode("utf-8", "surrogateescape")
            wanted = next(m.header_name for m in self.index.members(i) if m.offset == offset)
            if name != wanted or header.kind not in (b"0", b"\0"):
                why = f"the header is for {name!r} (type {header.kind!r}), the index has {wanted!r}"
                raise self._error(i, row, why)
        actual = crc32(data[at : at + size])
        if actual != crc:
            why = f"payload differs from the indexed one (crc32 {actual:08x}, indexed {crc:08x})"
            raise self._error(i, row, why)

    def _fetch(self, offset: int, size: int, i: int, row: list[int]) -> bytes:
        """Up to `size` bytes at `offset`; shorter only where a local file ends."""
        if size > _MAX_SAMPLE:
            why = f"{size} bytes in one sample, the limit is {_MAX_SAMPLE}"
            raise self._error(i, row, why, fix="cut the record into smaller ones")
        if not self._local:
            try:
                return self._open().read(offset, size)
            except DataError as error:
                raise self._error(i, row, f"{error.what}: {error.why}", fix=error.fix) from error
        try:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            data = os.pread(self._fd, size, offset)
            if len(data) == size:
                return data
            pieces = [data]
            while data and size > len(data):  # the system may give less at once than was asked for
                offset, size = offset + len(data), size - len(data)
                data = os.pread(self._fd, size, offset)
                pieces.append(data)
        except OSError as error:
            raise self._error(i, row, f"cannot read: {error}") from None
        return b"".join(pieces)

    def _open(self) -> Any:
        if self._source is None:
            self._source = open_source(self._url or "")
        return self._source

    def _error(self, i: int, row: list[int], why: str, *, fix: str = "") -> DataError:
        folder = self.path.parent if self._local else "DIR"
        fix = fix or (
            "restore the shard from its source; if it was changed on purpose, delete its index and run "
            f"`ringweave data index {folder}`"
        )
        where = f"{self.where}#{self.keys[i]}/{self.index.extensions[row[4]]} @{row[0]}"
        return DataError("damaged sample", where=where, why=why, fix=fix)

    def close(self) -> None:
        """Close the file or the source; a later `read` of a path or URL opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._source is not None:
            self._source.close()
            self._source = None if self._url is not None else self._source

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __getstate__(self) -> dict[str, object]:
        """A worker opens the file itself."""
        state = {**self.__dict__, "_fd": -1}
        return state if self._url is None else {**state, "_source": None}


def _apart(index: ShardIndex) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
    """bool [count]: samples whose members lie apart or out of order; None if there is none."""
    offsets, sizes, starts = (index.columns[name] for name in ("offsets", "sizes", "starts"))
    if not len(offsets):
        return None
    far = np.zeros(len(offsets), np.bool_)
    gaps = offsets[1:] - offsets[:-1] - sizes[:-1]
    far[1:] = (gaps > _MAX_GAP) | (gaps < BLOCK)
    far[starts[:-1]] = False  # the distance to the sample before does not matter
    return np.logical_or.reduceat(far, starts[:-1]) if far.any() else None


def check_shard(shard: Path | str | ByteSource) -> list[DataError]:
    """Read a shard whole, by its index and by its headers; returns every problem found, empty when sound.

    Unlike `ShardReader.read` it goes on after a damaged sample, so one pass lists all of them.
    """
    problems: list[DataError] = []
    reader: ShardReader | None = None
    try:
        reader = ShardReader(shard)
    except DataError as error:
        problems.append(error)
    options: dict[str, Any] = {}
    if reader is not None:
        options |= reader.index.made.get("policy", {})
        options |= {"tail": "quarantine"} if "quarantined" in reader.index.made else {}
        with reader:
            for i in range(len(reader)):
                try:
                    reader.read(i)
                except DataError as error:
                    problems.append(error)
    elif problems[0].what in ("missing shard", "missing object", "missing file"):
        return problems
    try:
        rebuilt = build_index(shard, **options)
    except DataError as error:
        return [*problems, error]
    if reader is not None and not problems and rebuilt != reader.index:
        where = shard_name(shard)
        why = f"the index lists {len(reader)} samples, the shard holds {rebuilt.count} (or other places)"
        fix = f"delete the index and run `ringweave data index {Path(where).parent}`"
        problems.append(DataError("index and shard disagree", where=where, why=why, fix=fix))
    return problems


def expand_shards(pattern: str, base: Path | str) -> list[Any]:
    """`name-{0000..0003}.tar` -> the paths it stands for, relative to `base`, in order; URLs stay `str`.

    base: a folder or its URL, see `join_address`. Raises as `expand_names`, and for missing shards (naming them);
    whether the shards of a URL are there shows when they are read.
    """
    found = [join_address(base, name) for name in expand_names(pattern)]
    paths = [path for path in found if isinstance(path, Path)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"{len(missing)} of {len(paths)} shards missing",
            where=f"{pattern!r} in {redact(base)}",
            why=f"not found: {shown}",
            fix="correct the range in the data section of the config, or build the missing shards",
        )
    return found


def expand_names(pattern: str) -> list[str]:
    """The names that a pattern stands for. A number keeps the width of the first one. Several braces multiply.

    Raises DataError for a malformed pattern.
    """
    bad = DataError(
        "malformed shard pattern",
        where=redact(repr(pattern)),
        why="braces must hold a rising range of numbers such as {0000..0003}",
        fix="write name-{0000..0003}.tar",
    )
    pieces = _RANGE.split(pattern)  # text, first, last, text, first, last, ..., text
    if any(c in text for text in pieces[::3] for c in "{}") or not pattern:
        raise bad
    choices: list[list[str]] = [[pieces[0]]]
    total = 1
    for first, last, text in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
        total *= max(0, int(last) - int(first) + 1)
        if not 0 < total <= _MAX_SHARDS:
            raise bad
        choices.append([f"{n:0{len(first)}d}{text}" for n in range(int(first), int(last) + 1)])
    return ["".join(parts) for parts in itertools.product(*choices)]
