"""Score codec: ink patches of an engraved page, coded by residual k-means, with an id for blank paper.

Works on ink (255 - grey), so paper is 0. A cell whose ink stays below `blank_below` is BLANK: one control
id, decoded to white exactly. The other cells cost one id per book. Decoding adds a linear correction from
the 3x3 neighbourhood (`blend`), which mends staff lines across patches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.blend import fit_blend, neighbourhood
from ringweave.tokenizers.codec import (
    SCALE,
    Tensors,
    from_patches,
    pack_codec,
    pad_to,
    to_patches,
    to_uint8,
    unpack_codec,
)
from ringweave.tokenizers.grid import BLANK, MISSING
from ringweave.tokenizers.vq import ResidualQuantizer, fit_books

BLANK_BELOW = 24
F64 = NDArray[np.float64]


class ScoreCodec:
    """uint8 [H, W] grey <-> codes int32 [h, w, books]; BLANK throughout where the paper is blank."""

    kind = "score"

    def __init__(self, config: dict[str, int], tensors: Tensors) -> None:
        self.config, self.tensors = config, tensors
        self.patch = config["patch"]
        limit = 256.0 * SCALE * self.patch
        self.quantizer = ResidualQuantizer(tensors["codebooks"], beam=config["beam"], limit=limit)
        self.books, self.codes = self.quantizer.books, self.quantizer.codes
        self._project = tensors["project"].astype(np.float64)  # [p*p, F]
        self._blend = tensors["blend"].astype(np.float64)  # [9*F + 1, p*p]

    @classmethod
    def fit(
        cls, pages: list[NDArray[np.uint8]], *, books: int, codes: int, patch: int, seed: int = 0
    ) -> ScoreCodec:
        """Fit to grey pages of any sizes."""
        rng = np.random.default_rng(seed)
        cells = np.concatenate([ink_cells(page, patch).reshape(-1, patch * patch) for page in pages])
        cells = cells[cells.max(1) >= BLANK_BELOW]
        cells = cells[rng.permutation(len(cells))[:50_000]].astype(np.float64)
        book = fit_books(cells * SCALE, books, codes, seed=seed, rounds=10)
        _, vectors = np.linalg.eigh(cells.T @ cells)
        features = min(32, patch * patch)
        tensors: Tensors = {
            "codebooks": book,
            "project": vectors[:, ::-1][:, :features].astype(np.float32),
            "blend": np.zeros((9 * features + 1, patch * patch), np.float32),
        }
        codec = cls({"patch": patch, "beam": 8, "blank_below": BLANK_BELOW}, tensors)
        tensors["blend"] = fit_blend(codec._misses(pages[:200]))
        return cls(codec.config, tensors)

    def _misses(self, pages: list[NDArray[np.uint8]]) -> Iterator[tuple[F64, F64]]:
        """For the marked cells of each page: neighbourhood features, and what their codes miss."""
        for page in pages:
            codes = self.encode(page)
            ink = self._ink_of(codes)
            marked = codes[..., 0] != BLANK
            yield neighbourhood(ink @ self._project)[marked], (ink_cells(page, self.patch) - ink)[marked]

    def _ink_of(self, codes: NDArray[np.int32]) -> F64:
        """Ink [h, w, p*p] of the codes alone; 0 where blank or missing."""
        flat = np.maximum(codes.reshape(-1, self.books), MISSING)
        return (self.quantizer.decode(flat) / SCALE).reshape(*codes.shape[:-1], -1)

    def encode(self, page: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Codes int32 [h, w, books] of grey uint8 [H, W], padded with paper to whole patches."""
        ink = ink_cells(page, self.patch)
        cells = ink.reshape(-1, ink.shape[-1])
        marked = cells.max(1) >= self.config["blank_below"]
        out = np.full((len(cells), self.books), BLANK, np.int32)
        out[marked] = self.quantizer.encode(cells[marked].astype(np.float64) * SCALE)
        return out.reshape(*ink.shape[:-1], self.books)

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Grey uint8 [p*h, p*w]; blank and missing cells are white."""
        ink = self._ink_of(codes)
        ink = ink + neighbourhood(ink @ self._project) @ self._blend
        ink[codes[..., 0] < 0] = 0
        return from_patches(255 - to_uint8(ink), self.patch, 1)[..., 0]

    def to_bytes(self) -> bytes:
        """The codec file."""
        return pack_codec(self.kind, self.config, self.tensors)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> ScoreCodec:
        """Load `to_bytes`; VocabularyError when it is something else."""
        return cls(*unpack_codec(data, cls.kind, where=where))


def ink_cells(page: NDArray[np.uint8], patch: int) -> NDArray[np.uint8]:
    """Ink (255 - grey) of a page [H, W] in cells [h, w, p*p], padded with paper."""
    return to_patches(pad_to(255 - page[..., None], patch, mode="constant"), patch)


#: The curve of `ink_tone`: steep about mid-grey, so that ink and paper part, but not so steep that grey is lost.
TONE_FROM, TONE_TO = (0, 23, 24, 120, 135, 255), (0, 19, 20, 30, 225, 255)


def ink_tone() -> NDArray[np.int32]:
    """What the learned codec codes a level of ink as [256]: a steep curve about mid-grey, flat on either side.

    Thin lines are grey at small sizes: two in three inked pixels of the demo's pages lie near the level where ink and
    paper part. Codes are spent on which side a pixel is, and little on how grey it is. Ink-F1 asks for that, and
    it has a price: lines lighter than mid-grey come back fainter, some as white, and PSNR of the page falls.
    """
    curve = np.interp(np.arange(256), TONE_FROM, TONE_TO)
    return np.rint(curve).astype(np.int32)


def ink_of_tone(values: F64, tone: F64) -> F64:
    """Ink of coded levels: `tone` backwards, and between its levels in proportion."""
    levels, first, count = np.unique(tone, return_index=True, return_counts=True)
    middle = first + (count - 1) / 2
    middle[0], middle[-1] = 0, 255
    return np.interp(values, levels, middle)
