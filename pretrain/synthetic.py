"""A corpus made of arithmetic, for `ringweave verify` and tests: no files, documents of uneven lengths."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.pack import Piece
from ringweave.tokenizers.bare import document as bare_document
from ringweave.tokenizers.bare import embedding_segment, latent_segment
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


class SyntheticLatents:
    """Documents of words and latents: `rgba` of several layers and conditions, `video` of several frames; grids of
    mixed and odd sizes, ids below `vocab`. given: words are vectors of so many numbers instead (0: ids)."""

    def __init__(self, *, vocab: int, channels: int, count: int = 24, seed: int = 0, given: int = 0) -> None:
        self.vocab, self.channels, self.count, self.seed, self.given = vocab, channels, count, seed, given
        self.lengths: dict[str, NDArray[np.int64]] = {
            name: np.array([self._length(name, n) for n in range(count)], np.int64)
            for name in ("rgba", "video")
        }
        self.digest = hashlib.sha256(repr((vocab, channels, count, seed, given)).encode()).hexdigest()

    def _plan(self, source: str, sample: int) -> tuple[int, list[tuple[tuple[int, int, int], bool]]]:
        """(words, [((frames, rows, columns), condition)]) of a document."""
        state = np.random.RandomState(self.seed * 7919 + sample * 31 + len(source))
        rows, columns = (int(n) for n in state.randint(1, 5, size=2))
        frames = 1 if source == "rgba" else int(state.randint(2, 4))
        targets, conditions = int(state.randint(1, 4)), int(state.randint(0, 3))
        if source == "video":
            targets = 1
        grids = [((1, rows, columns), True)] * conditions + [((frames, rows, columns), False)] * targets
        return int(state.randint(0, 6)), grids

    def _length(self, source: str, sample: int) -> int:
        words, grids = self._plan(source, sample)
        return 1 + words + sum(frames * rows * columns for (frames, rows, columns), _ in grids)

    def document(self, piece: Piece) -> Document:
        """The document a piece is cut from, the same on every call."""
        words, grids = self._plan(piece.source, piece.sample)
        state = np.random.default_rng([self.seed, piece.sample, len(piece.source)])
        ids = state.integers(30, self.vocab, size=words).astype(np.int32)
        places = np.zeros((words, 4), np.int32)
        places[:, 0] = np.arange(words)
        text = Segment(ids, "text", places, "target") if words else None
        if text is not None and self.given:
            text = embedding_segment(state.standard_normal((1 + words, self.given), dtype=np.float32))
        segments = [
            latent_segment(
                state.standard_normal((*shape, self.channels), dtype=np.float32),
                modality=piece.source, layer=layer, role="condition" if condition else "target",
                weight=0.0 if condition else 1.0,
            )
            for layer, (shape, condition) in enumerate(grids)
        ]  # fmt: skip
        return bare_document(f"{piece.source}-{piece.sample}", text, segments)
