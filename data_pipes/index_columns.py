"""`ShardIndex`: what the sidecar of a shard holds, as numpy columns, and its samples as objects on demand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.index_file import Columns, content_crc, pack_index


@dataclass(frozen=True, slots=True)
class MemberEntry:
    """One member: `ext` after the first dot of the base name, `offset` of its data and `size` in bytes."""

    ext: str
    offset: int
    size: int
    crc32: int
    header_name: str  # the name as the member's own tar header spells it


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """The members that share a key, in the order of the shard."""

    key: str
    members: tuple[MemberEntry, ...]


class ShardIndex:
    """What the sidecar holds, as columns (`index_file.py`); `samples` and `members(i)` give them as objects.

    shard_size in bytes tells a stale index from a fresh one; version is the etag of a remote shard, "" if the
    shard was a local file; made says how it was made: the policies, and what they left out.
    """

    def __init__(self, columns: Columns, about: dict[str, Any]) -> None:
        self.shard_size: int = about["shard_size"]
        self.version: str = about["version"]
        self.extensions: list[str] = about["extensions"]
        self.made: dict[str, Any] = about["made"]
        self.columns = columns
        self.count = len(columns["starts"]) - 1

    def __len__(self) -> int:
        return self.count

    @cached_property
    def keys(self) -> list[str]:
        """The samples' keys in the order of the shard."""
        text = self.columns["keys"].tobytes().decode("utf-8")
        return text.split("\n") if self.count else []

    @cached_property
    def key_hash(self) -> NDArray[np.uint64]:
        """uint64 [count]: blake2b of each key."""
        stored = self.columns.get("key_hash")
        return stored if stored is not None else hash_keys(self.keys)

    @property
    def media(self) -> NDArray[np.int64] | None:
        """int64 [count, 4]: width, height, frames, milliseconds; 0 where unknown. None if not probed."""
        return self.columns.get("media")

    @cached_property
    def header_names(self) -> dict[int, str]:
        """Member -> the name in its tar header, only where that is not `key.ext`."""
        if "header_names" not in self.columns:
            return {}
        return {int(k): v for k, v in json.loads(self.columns["header_names"].tobytes()).items()}

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """int64 [members, 5]: offset, size, crc32, header_crc32 (-1: not known), number of the extension."""
        c = self.columns
        rows = np.empty((len(c["offsets"]), 5), np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 4] = c["offsets"], c["sizes"], c["crc32"], c["extension"]
        rows[:, 3] = c.get("header_crc32", -1)
        return rows

    def members(self, i: int) -> tuple[MemberEntry, ...]:
        """The members of sample i (0 <= i < count), in the order of the shard."""
        first, last = self.columns["starts"][i : i + 2].tolist()
        key, names, made = self.keys[i], self.header_names, []
        for number, (offset, size, crc, _, ext) in enumerate(self.rows[first:last].tolist(), first):
            name = self.extensions[ext]
            made.append(MemberEntry(name, offset, size, crc, names.get(number, f"{key}.{name}")))
        return tuple(made)

    @property
    def samples(self) -> Samples:
        """All samples as objects, made when asked for."""
        return Samples(self)

    @cached_property
    def crc32(self) -> int:
        """Identity of the content: changes whenever a key, an extension, a place or a payload crc does."""
        return content_crc(self.columns, self.extensions)

    def __eq__(self, other: object) -> bool:
        """Whether both describe the same shard; header crcs count where both have them."""
        if not isinstance(other, ShardIndex):
            return NotImplemented
        heads = [index.columns.get("header_crc32") for index in (self, other)]
        return (
            (self.shard_size, self.crc32, self.count) == (other.shard_size, other.crc32, other.count)
            and self.header_names == other.header_names
            and (heads[0] is None or heads[1] is None or np.array_equal(heads[0], heads[1]))
        )

    __hash__ = None  # type: ignore[assignment]

    def to_bytes(self) -> bytes:
        """The sidecar's bytes (format 2)."""
        about = {"shard_size": self.shard_size, "version": self.version, "content_crc32": self.crc32}
        return pack_index(self.columns, {**about, "extensions": self.extensions, "made": self.made})


class Samples(Sequence[SampleEntry]):
    """The samples of an index, each made when it is asked for."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return self._index.count

    @overload
    def __getitem__(self, i: int) -> SampleEntry: ...
    @overload
    def __getitem__(self, i: slice) -> list[SampleEntry]: ...
    def __getitem__(self, i: int | slice) -> SampleEntry | list[SampleEntry]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return SampleEntry(self._index.keys[i], self._index.members(i))


def hash_keys(keys: list[str]) -> NDArray[np.uint64]:
    """uint64 [n]: blake2b of each key, 8 bytes."""
    blake2b = hashlib.blake2b
    digests = b"".join([blake2b(key.encode("utf-8"), digest_size=8).digest() for key in keys])
    return np.frombuffer(digests, "<u8").astype(np.uint64)
