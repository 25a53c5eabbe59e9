"""Random access to indexed shards, every byte verified at every read.

`ShardReader.read(i)` does one `pread` for a sample, checks the tar header in front of each member and the
crc32 of its data, and returns a `Sample` or raises a `DataError` that names shard, key, member and offset.
"""

from __future__ import annotations

import itertools
import os
import re
import zlib
from pathlib import Path

from ringweave.data_pipes.index import (
    BLOCK,
    HeaderError,
    MemberEntry,
    SampleEntry,
    build_index,
    load_index,
    parse_header,
)
from ringweave.data_pipes.sample import Sample
from ringweave.tokenizers.errors import DataError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
#: More shards than this in one pattern is a typing error.
_MAX_SHARDS = 1_000_000


class ShardReader:
    """The samples of one shard by number. May be forked or pickled (`pread`, no shared file position)."""

    def __init__(self, path: Path) -> None:
        """Load the index beside `path`. Raises DataError when either is missing, bad or stale."""
        self.path = Path(path)
        self.index = load_index(self.path)
        self._fd = -1

    def __len__(self) -> int:
        return self.index.count

    @property
    def keys(self) -> list[str]:
        """The samples' keys in the order of the shard."""
        return [sample.key for sample in self.index.samples]

    def read(self, i: int) -> Sample:
        """Sample number `i` (0 <= i < len). Raises DataError for damage, IndexError for a wrong number."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in {self.path}")
        entry = self.index.samples[i]
        first, last = entry.members[0], entry.members[-1]
        start = first.offset - BLOCK
        data = self._pread(start, last.offset + last.size - start, entry, first)
        members: dict[str, bytes] = {}
        for member in entry.members:
            at = member.offset - start
            if at - BLOCK < 0 or at + member.size > len(data):
                why = f"truncated: the read ended at {start + len(data)}"
                raise self._error(entry, member, why)
            self._check_header(data[at - BLOCK : at], entry, member)
            payload = data[at : at + member.size]
            crc = zlib.crc32(payload)
            if crc != member.crc32:
                why = f"payload differs from the indexed one (crc32 {crc:08x}, indexed {member.crc32:08x})"
                raise self._error(entry, member, why)
            members[member.ext] = payload
        return Sample(entry.key, members, str(self.path), i)

    def _check_header(self, block: bytes, entry: SampleEntry, member: MemberEntry) -> None:
        try:
            header = parse_header(block)
        except HeaderError as error:
            raise self._error(entry, member, str(error)) from None
        name = header.name.decode("utf-8", "surrogateescape")
        if name != member.header_name or header.kind not in (b"0", b"\0"):
            why = f"the header is for {name!r} (type {header.kind!r}), the index has {member.header_name!r}"
            raise self._error(entry, member, why)

    def _pread(self, offset: int, size: int, entry: SampleEntry, member: MemberEntry) -> bytes:
        """Up to `size` bytes at `offset`; shorter only where the file ends."""
        pieces: list[bytes] = []
        try:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            while size > 0:
                piece = os.pread(self._fd, size, offset)
                if not piece:
                    break
                pieces.append(piece)
                offset, size = offset + len(piece), size - len(piece)
        except OSError as error:
            raise self._error(entry, member, f"cannot read: {error}") from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _error(self, entry: SampleEntry, member: MemberEntry, why: str) -> DataError:
        fix = (
            "restore the shard from its source; if it was changed on purpose, delete its index and run "
            f"`ringweave data index {self.path.parent}`"
        )
        where = f"{self.path}#{entry.key}/{member.ext} @{member.offset}"
        return DataError("damaged sample", where=where, why=why, fix=fix)

    def close(self) -> None:
        """Close the file; a later `read` opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_fd": -1}  # a worker opens the file itself


def check_shard(path: Path) -> list[DataError]:
    """Read a shard whole, by its index and by its headers; returns every problem found, empty when sound.

    Unlike `ShardReader.read` it goes on after a damaged sample, so one pass lists all of them.
    """
    path = Path(path)
    problems: list[DataError] = []
    reader: ShardReader | None = None
    try:
        reader = ShardReader(path)
    except DataError as error:
        problems.append(error)
    if reader is not None:
        with reader:
            for i in range(len(reader)):
                try:
                    reader.read(i)
                except DataError as error:
                    problems.append(error)
    if not path.exists():
        return problems
    try:
        rebuilt = build_index(path)
    except DataError as error:
        return [*problems, error]
    if reader is not None and not problems and rebuilt != reader.index:
        why = f"the index lists {len(reader)} samples, the shard holds {rebuilt.count} (or other places)"
        fix = f"delete the index and run `ringweave data index {path.parent}`"
        problems.append(DataError("index and shard disagree", where=str(path), why=why, fix=fix))
    return problems


def expand_shards(pattern: str, base: Path) -> list[Path]:
    """`name-{0000..0003}.tar` -> the paths it stands for, relative to `base`, in order.

    A number keeps the width of the first one. Several braces multiply. Raises DataError for a malformed
    pattern and for missing shards (naming them).
    """
    bad = DataError(
        "malformed shard pattern",
        where=repr(pattern),
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
    paths = [base / "".join(parts) for parts in itertools.product(*choices)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"{len(missing)} of {len(paths)} shards missing",
            where=f"{pattern!r} in {base}",
            why=f"not found: {shown}",
            fix="correct the range in the data section of the config, or build the missing shards",
        )
    return paths
