"""The order of documents inside a source: pure arithmetic on (seed, source, epoch).

Every element gets a 64-bit key by a keyed *bijection* of its number, and the keys are sorted. No two keys
can be equal, so the order depends neither on the sorting algorithm nor on numpy's random generators,
whose streams may change between versions.
"""

from __future__ import annotations

import json
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)

#: Positions turned into Python integers at a time; bounds the memory of a cursor beside its permutation.
_CHUNK = 4096


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words. [n] -> [n]"""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def permutation(count: int, *, seed: int, source: str, epoch: int) -> NDArray[np.int64]:
    """A permutation of 0..count-1, int64 [count]: entry p is the document at position p of that epoch."""
    text = json.dumps([seed, source, epoch], ensure_ascii=True).encode()
    first, second = np.frombuffer(blake2b(text, digest_size=16).digest(), dtype="<u8").astype(np.uint64)
    numbers = np.arange(count, dtype=np.uint64) * _GOLDEN + first
    return np.argsort(_mix(_mix(numbers) ^ second), kind="stable").astype(np.int64, copy=False)


class SourceCursor:
    """Reads a source for ever, epoch after epoch, each in its own order.

    Documents of length 0 (skipped when they were encoded) are passed over and counted in `passed`.
    The state is (epoch, position, passed).
    """

    def __init__(
        self,
        name: str,
        lengths: NDArray[np.int64],
        *,
        seed: int,
        epoch: int = 0,
        position: int = 0,
        passed: int = 0,
    ) -> None:
        """lengths: int64 [n], tokens of each document; at least one of them positive."""
        if not 0 <= position <= len(lengths):
            raise ValueError(f"position {position} of source {name!r} is not in 0..{len(lengths)}")
        if not (lengths > 0).any():
            raise ValueError(f"source {name!r} holds no document")
        self.name, self.epoch, self.position, self.passed = name, epoch, position, passed
        self._lengths, self._seed = lengths, seed
        self._permutation: NDArray[np.int64] | None = None
        self._samples: list[int] = []
        self._sizes: list[int] = []
        self._at = 0

    def draw(self) -> tuple[int, int, int]:
        """The next document: (epoch, sample, length > 0)."""
        while True:
            if self._at == len(self._samples):
                self._load()
            at = self._at
            self._at = at + 1
            self.position += 1
            size = self._sizes[at]
            if size:
                return self.epoch, self._samples[at], size
            self.passed += 1

    def _load(self) -> None:
        """Lists the next positions, opening the next epoch at the end of one."""
        if self.position == len(self._lengths):
            self.epoch, self.position, self._permutation = self.epoch + 1, 0, None
        if self._permutation is None:
            self._permutation = permutation(
                len(self._lengths), seed=self._seed, source=self.name, epoch=self.epoch
            )
        chosen = self._permutation[self.position : self.position + _CHUNK]
        self._samples, self._sizes, self._at = chosen.tolist(), self._lengths[chosen].tolist(), 0
