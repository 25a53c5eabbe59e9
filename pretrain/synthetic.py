"""A corpus made of arithmetic, for `ringweave verify` and tests: no files, documents of uneven lengths."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.pack import Piece
from ringweave.tokenizers.segment import Document, Segment


class SyntheticCorpus:
    """`count` documents a source, 1 to `longest` tokens each, ids below `vocab`; a third of them conditions."""

    def __init__(self, *, vocab: int, count: int = 40, longest: int = 90, seed: int = 0) -> None:
        self.vocab, self.seed = vocab, seed
        self.lengths: dict[str, NDArray[np.int64]] = {}
        for name in ("text", "image"):
            draws = np.random.RandomState(seed + len(name)).randint(1, longest, size=count)
            draws[0] = 3 * longest  # longer than a context: must be split
            self.lengths[name] = draws.astype(np.int64)
        self.digest = hashlib.sha256(repr((vocab, count, longest, seed)).encode()).hexdigest()

    def document(self, piece: Piece) -> Document:
        """The document a piece is cut from, the same on every call."""
        length = int(self.lengths[piece.source][piece.sample])
        state = np.random.RandomState((self.seed * 7919 + piece.sample * 31 + len(piece.source)) % 2**31)
        ids = state.randint(0, self.vocab, size=length).astype(np.int32)
        cut = length // 3
        positions = np.zeros((length, 4), np.int32)
        positions[:, 0] = np.arange(length)
        parts = []
        if cut:
            parts.append(Segment(ids[:cut], "text", positions[:cut], role="condition", weight=0.0))
        parts.append(
            Segment(ids[cut:], piece.source, positions[cut:], weight=0.5 if piece.source == "image" else 1.0)
        )
        return Document(key=f"{piece.source}-{piece.sample}", segments=tuple(parts))
