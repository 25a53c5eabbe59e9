"""RGBA codec: alpha and colour of each 8x8 patch, coded apart.

A cell is one of

* ``BLANK``: every alpha is 0; one control id, decoded to alpha 0 exactly;
* opaque: every alpha is 255; the reserved alpha code 0, then a colour code; decoded to alpha 255 exactly;
* mixed: one code per alpha book (residual k-means), then a colour code.

Colour is straight, not premultiplied: before it is coded, the pixels under alpha 0 take the patch's
alpha-weighted mean colour, so that invisible pixels neither cost codes nor bleed a fringe into the edge.
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

OPAQUE = 0  # the alpha code of a wholly opaque cell


class RgbaCodec:
    """uint8 [H, W, 4] <-> cells int32 [h, w, books + 1] = alpha codes, then the colour code.

    Blank cells hold BLANK throughout; opaque ones hold OPAQUE, then MISSING for the other alpha books.
    """

    kind = "rgba"

    def __init__(self, config: dict[str, int], tensors: Tensors) -> None:
        self.config, self.tensors = config, tensors
        self.patch = config["patch"]
        limit = 256.0 * SCALE * self.patch
        self.alpha = ResidualQuantizer(tensors["alpha"], beam=config["beam"], limit=limit)
        self.colour = ResidualQuantizer(tensors["colour"], limit=2 * limit)
        self.books = self.alpha.books
        #: ids of the blocks: first alpha book (with OPAQUE), the other alpha books, colour.
        self.block_sizes = (
            [self.alpha.codes + 1] + [self.alpha.codes] * (self.books - 1) + [self.colour.codes]
        )

    @classmethod
    def fit(
        cls,
        layers: list[NDArray[np.uint8]],
        *,
        books: int,
        alpha_codes: int,
        colour_codes: int,
        patch: int = 8,
        seed: int = 0,
    ) -> RgbaCodec:
        """Fit to RGBA layers. `alpha_codes` counts the reserved one."""
        rng = np.random.default_rng(seed)
        grids = [_cells(pad_to(layer, patch), patch) for layer in layers]
        cells = np.concatenate([grid.reshape(-1, *grid.shape[2:]) for grid in grids])
        cells = cells[cells[..., 3].max(1) > 0]
        cells = cells[rng.permutation(len(cells))[:20_000]]
        mixed = cells[cells[..., 3].min(1) < 255][..., 3].astype(np.float64) * SCALE
        tensors: Tensors = {
            "alpha": fit_books(mixed, books, alpha_codes - 1, seed=seed),
            "colour": fit_books(_colour(cells), 1, colour_codes, seed=seed),
        }
        return cls({"patch": patch, "beam": 4}, tensors)

    def encode(self, layer: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Cells int32 [..., h, w, books + 1] of uint8 [..., H, W, 4], edge-padded to whole patches."""
        grid = _cells(pad_to(layer, self.patch), self.patch)
        cells = grid.reshape(-1, *grid.shape[-2:])
        alpha = cells[..., 3]
        blank, opaque = alpha.max(1) == 0, alpha.min(1) == 255
        out = np.full((len(cells), self.books + 1), MISSING, np.int32)
        mixed = ~(blank | opaque)
        out[mixed, : self.books] = self.alpha.encode(alpha[mixed].astype(np.float64) * SCALE)
        out[mixed, 0] += 1
        out[opaque, 0] = OPAQUE
        out[~blank, -1] = self.colour.encode(_colour(cells[~blank]))[:, 0]
        out[blank] = BLANK
        return out.reshape(*grid.shape[:-2], self.books + 1)

    def decode(self, cells: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Straight-alpha uint8 [..., p*h, p*w, 4]; a cell without its first alpha code is transparent."""
        flat = cells.reshape(-1, self.books + 1)
        codes = np.maximum(flat, MISSING)
        codes[:, 0] = np.where(codes[:, 0] >= 1, codes[:, 0] - 1, MISSING)
        alpha = np.clip(np.rint(self.alpha.decode(codes[:, : self.books]) / SCALE), 0, 255)
        # What is nearly clear or nearly opaque was so: the books leave a haze of a few levels.
        alpha = np.where(alpha < 8, 0, np.where(alpha > 247, 255, alpha))
        alpha[flat[:, 0] == OPAQUE] = 255
        alpha[flat[:, 0] < 0] = 0
        colour = np.clip(np.rint(self.colour.decode(codes[:, -1:]) / SCALE), 0, 255)
        colour[flat[:, 0] < 0] = 0
        pixels = np.concatenate([colour.reshape(len(flat), -1, 3), alpha[:, :, None]], axis=2)
        patches = pixels.reshape(*cells.shape[:-1], -1).astype(np.uint8)
        return from_patches(patches, self.patch, 4)

    def to_bytes(self) -> bytes:
        """The codec file."""
        return pack_codec(self.kind, self.config, self.tensors)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> RgbaCodec:
        """Load `to_bytes`; VocabularyError when it is something else."""
        return cls(*unpack_codec(data, cls.kind, where=where))


def _cells(layer: NDArray[np.uint8], patch: int) -> NDArray[np.uint8]:
    """[..., h, w, p*p, 4]."""
    grid = to_patches(layer, patch)
    return grid.reshape(*grid.shape[:-1], patch * patch, 4)


def _colour(cells: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Straight colour with hidden pixels filled, times SCALE, in integers: [n, p*p, 4] -> [n, p*p*3]."""
    values = cells.astype(np.int64)
    rgb, alpha = values[..., :3], values[..., 3:]
    mean = (rgb * alpha).sum(1, keepdims=True) // np.maximum(alpha.sum(1, keepdims=True), 1)
    filled = (rgb * alpha + mean * (255 - alpha)) * SCALE // 255
    return filled.reshape(len(cells), -1).astype(np.float64)
