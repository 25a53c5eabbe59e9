"""`Sample`: one record of a shard, its member bytes and where it came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """key: name inside the shard; members: extension -> bytes; shard: path; index: ordinal in the shard."""

    key: str
    members: dict[str, bytes]
    shard: str
    index: int

    @property
    def where(self) -> str:
        """`shard#key`, the way every message names a record."""
        return f"{self.shard}#{self.key}"
