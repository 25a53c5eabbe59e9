"""Score codec: ink patches of an engraved page, coded by residual k-means, with an id for blank paper.

Works on ink (255 - grey), so paper is 0. A cell whose ink stays below `blank_below` is BLANK: one control
id, decoded to white exactly. The other cells cost one id per book.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.codec import (
    SCALE,
    Tensors,
    from_patches,
    pack_codec,
    pad_to,
    to_patches,
    unpack_codec,
)
from ringweave.tokenizers.grid import BLANK, MISSING
from ringweave.tokenizers.vq import ResidualQuantizer, fit_books

BLANK_BELOW = 24


class ScoreCodec:
    """uint8 [H, W] grey <-> codes int32 [h, w, books]; BLANK throughout where the paper is blank."""

    kind = "score"

    def __init__(self, config: dict[str, int], tensors: Tensors) -> None:
        self.config, self.tensors = config, tensors
        self.patch = config["patch"]
        limit = 256.0 * SCALE * self.patch
        self.quantizer = ResidualQuantizer(tensors["codebooks"], beam=config["beam"], limit=limit)
        self.books, self.codes = self.quantizer.books, self.quantizer.codes

    @classmethod
    def fit(
        cls, pages: list[NDArray[np.uint8]], *, books: int, codes: int, patch: int, seed: int = 0
    ) -> ScoreCodec:
        """Fit to grey pages of any sizes."""
        rng = np.random.default_rng(seed)
        cells = np.concatenate([_ink(page, patch).reshape(-1, patch * patch) for page in pages])
        cells = cells[cells.max(1) >= BLANK_BELOW]
        cells = cells[rng.permutation(len(cells))[:30_000]].astype(np.float64) * SCALE
        books_ = fit_books(cells, books, codes, seed=seed, rounds=8)
        return cls({"patch": patch, "beam": 8, "blank_below": BLANK_BELOW}, {"codebooks": books_})

    def encode(self, page: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Codes int32 [h, w, books] of grey uint8 [H, W], padded with paper to whole patches."""
        ink = _ink(page, self.patch)
        cells = ink.reshape(-1, ink.shape[-1])
        marked = cells.max(1) >= self.config["blank_below"]
        out = np.full((len(cells), self.books), BLANK, np.int32)
        out[marked] = self.quantizer.encode(cells[marked].astype(np.float64) * SCALE)
        return out.reshape(*ink.shape[:-1], self.books)

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Grey uint8 [p*h, p*w]; blank and missing cells are white."""
        flat = np.maximum(codes.reshape(-1, self.books), MISSING)
        ink = np.clip(np.rint(self.quantizer.decode(flat) / SCALE), 0, 255)
        grid = (255 - ink).astype(np.uint8).reshape(*codes.shape[:-1], -1)
        return from_patches(grid, self.patch, 1)[..., 0]

    def to_bytes(self) -> bytes:
        """The codec file."""
        return pack_codec(self.kind, self.config, self.tensors)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> ScoreCodec:
        """Load `to_bytes`; VocabularyError when it is something else."""
        return cls(*unpack_codec(data, cls.kind, where=where))


def _ink(page: NDArray[np.uint8], patch: int) -> NDArray[np.uint8]:
    """Ink cells [h, w, p*p]."""
    return to_patches(pad_to(255 - page[..., None], patch, mode="constant"), patch)
