"""Where the training of each learned codec starts: its closed form, and the crops it learns from.

`start(modality, records, sizes)` gives a `Start`; `Training` (learn.py) takes its config, tensors and crops, and
`Start.codec` makes the finished codec of what `Training.tensors` returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.audio import mdct_basis, random_frames, transform
from ringweave.tokenizers.codec import Tensors, pad_to, to_patches
from ringweave.tokenizers.conv_codec import BASIS, zero_networks
from ringweave.tokenizers.conv_codecs import AUDIO_CELL, ConvAudioCodec, ConvImageCodec, ConvScoreCodec
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.image import ImageCodec
from ringweave.tokenizers.score import BLANK_BELOW, ink_cells
from ringweave.tokenizers.vq import fit_books

F64 = NDArray[np.float64]
I16 = NDArray[np.int16]
U8 = NDArray[np.uint8]


class Crops(Protocol):
    """Where a training takes its cells from."""

    def batch(self, rng: np.random.Generator, count: int) -> tuple[F64, F64]:
        """Cells [count, h, w, C] and the weight of each cell in the loss [count, h, w]; 0: its code is not used."""
        ...


@dataclass(frozen=True)
class NetSizes:
    """Of the convolutions beside the projection: channels inside, and residual blocks on either side."""

    width: int = 96
    encoder_blocks: int = 2
    decoder_blocks: int = 3


@dataclass(frozen=True)
class Start:
    """config and tensors of the closed form, where training takes its cells from, and the class of the codec.

    fixed: tensors of the codec that are not trained; commit: see `learn.Schedule`. Where codes catch only part of what
    is coded, as in sound at 1.6 kbit/s, a strong pull towards them shrinks what is coded instead.
    """

    config: dict[str, int]
    tensors: Tensors
    crops: Crops
    kind: Any
    fixed: Tensors
    commit: float = 1.0

    def codec(self, tensors: Tensors) -> Any:
        """The codec with the trained `tensors`."""
        return self.kind(self.config, tensors | self.fixed)


class GridCrops:
    """Square crops of grids of cells: [size, size] cells of a record chosen at random, by its number of cells."""

    def __init__(self, records: list[U8], size: int, *, blank_below: int = 0) -> None:
        """records: [h, w, C] each. A cell whose largest value is under `blank_below` has no weight."""
        self._records = [record for record in records if record.size]
        if not self._records:
            raise DataError("there is no picture to learn from")
        self._size, self._blank_below = size, blank_below
        cells = np.array([record.shape[0] * record.shape[1] for record in self._records], np.float64)
        self._odds = np.cumsum(cells / cells.sum())

    def batch(self, rng: np.random.Generator, count: int) -> tuple[F64, F64]:
        """See `learn.Crops`; a record smaller than a crop is filled up with cells of no weight."""
        first = self._records[0]
        cells = np.zeros((count, self._size, self._size, first.shape[-1]))
        weights = np.zeros((count, self._size, self._size))
        for n, u in enumerate(rng.random(count)):
            record = self._records[min(int(np.searchsorted(self._odds, u)), len(self._records) - 1)]
            height, width = (min(self._size, side) for side in record.shape[:2])
            top = int(rng.integers(0, record.shape[0] - height + 1))
            left = int(rng.integers(0, record.shape[1] - width + 1))
            part = record[top : top + height, left : left + width]
            # Beyond a small record its edge goes on, as the codec's own padding has it.
            edge = [(0, self._size - height), (0, self._size - width), (0, 0)]
            cells[n] = np.pad(part, edge, mode="edge")
            weights[n, :height, :width] = part.max(-1) >= self._blank_below
        return cells, weights


class PhotoCrops(GridCrops):
    """Crops of pictures at any pixel, cut into patches afterwards: a codec must not learn where patches lie."""

    def __init__(self, images: list[U8], patch: int, size: int) -> None:
        """images: uint8 [H, W, 3]; size: cells a side."""
        side = patch * size
        padded = [_at_least(pad_to(image, patch), side) for image in images]
        super().__init__(padded, side)
        self._patch = patch

    def batch(self, rng: np.random.Generator, count: int) -> tuple[F64, F64]:
        """See `learn.Crops`."""
        pixels, _ = super().batch(rng, count)
        cells = to_patches(pixels, self._patch)
        return cells, np.ones(cells.shape[:-1])


class SoundCrops:
    """Runs of frames cut at any sample. Each weighs the inverse of its clip's power, as SI-SDR has it; 1 on average."""

    def __init__(self, clips: list[I16], basis: NDArray[np.int32], frames: int) -> None:
        self._hop, self._frames = len(basis) // 2, frames
        self._basis = basis.astype(np.float64)
        wanted = (frames + 1) * self._hop
        self._clips = [np.pad(c, (0, max(0, wanted - len(c)))) for c in clips if len(c)]
        if not self._clips:
            raise DataError("there is no sound to learn from")
        lengths = np.array([len(c) for c in self._clips], np.float64)
        self._odds = np.cumsum(lengths / lengths.sum())
        power = np.array([np.square(c.astype(np.float64)).mean() for c in self._clips])
        share = 1 / np.maximum(power, 1e-2 * max(1.0, float(np.median(power))))
        self._weights = share / (share * lengths).sum() * lengths.sum()

    def batch(self, rng: np.random.Generator, count: int) -> tuple[F64, F64]:
        """Cells [count, 1, frames, bins] and weights [count, 1, frames]."""
        hop, odds = self._hop, self._odds
        cells, weights = [], np.zeros((count, 1, self._frames))
        for n, u in enumerate(rng.random(count)):
            chosen = min(int(np.searchsorted(odds, u)), len(self._clips) - 1)
            clip = self._clips[chosen]
            start = int(rng.integers(0, len(clip) - (self._frames + 1) * hop + 1))
            windows = np.lib.stride_tricks.sliding_window_view(clip[start:], 2 * hop)[::hop]
            cells.append(transform(windows[: self._frames], self._basis, AUDIO_CELL))
            weights[n, 0] = np.where(cells[-1].any(1), self._weights[chosen], 0.0)
        return np.stack(cells)[:, None], weights


def image_start(
    images: list[U8], *, codes: int, patch: int = 8, net: NetSizes | None = None, crop: int = 8, seed: int = 0
) -> Start:
    """From the principal components and k-means of `ImageCodec`."""
    closed = ImageCodec.fit(images, codes=codes, patch=patch, dims=min(24, 3 * patch * patch), seed=seed)
    basis, book = closed.tensors["basis"], closed.tensors["codebook"]
    config = _config(book, net, steps=256, unit=64, reach=2048, beam=1) | {"patch": patch}
    tensors = {"project": basis, "back": basis.T.copy(), "mean": closed.tensors["mean"], "codebooks": book}
    tensors |= zero_networks(config, basis.shape[1], len(basis))
    return Start(config, tensors, PhotoCrops(images, patch, crop), ConvImageCodec, {})


def score_start(
    pages: list[U8], *, books: int, codes: int, patch: int = 16, dims: int = 64, net: NetSizes | None = None,
    crop: int = 8, seed: int = 0,
) -> Start:  # fmt: skip
    """From principal components and residual k-means of inked cells; blank paper stays out."""
    rng = np.random.default_rng(seed)
    grids = [ink_cells(page, patch) for page in pages]
    cells = np.concatenate([grid.reshape(-1, patch * patch) for grid in grids]).astype(np.float64)
    cells = cells[cells.max(1) >= BLANK_BELOW]
    cells = cells[rng.permutation(len(cells))[:30_000]]
    _, vectors = np.linalg.eigh(cells.T @ cells)
    basis = vectors[:, ::-1][:, :dims]
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(basis.shape[1])])
    basis = np.rint(basis * BASIS).astype(np.int32)
    book = fit_books(cells @ basis.astype(np.float64), books, codes, seed=seed, rounds=6)
    config = _config(book, net, steps=256, unit=128, reach=8192, beam=8)
    config |= {"patch": patch, "blank_below": BLANK_BELOW}
    mean = np.zeros(patch * patch, np.int32)
    tensors = {"project": basis, "back": basis.T.copy(), "mean": mean, "codebooks": book}
    tensors |= zero_networks(config, basis.shape[1], patch * patch)
    return Start(config, tensors, GridCrops(grids, crop, blank_below=BLANK_BELOW), ConvScoreCodec, {})


def audio_start(
    clips: list[I16], *, rate: int, hop: int, bins: int, books: int, codes: int, net: NetSizes | None = None,
    crop: int = 64, seed: int = 0,
) -> Start:  # fmt: skip
    """From residual k-means of the lowest `bins` frequencies."""
    basis = mdct_basis(hop, bins)
    cells = random_frames(clips, basis, frames=30_000, scale=AUDIO_CELL, seed=seed)
    book = fit_books(cells, books, codes, seed=seed, rounds=6, reserve_zero=True)
    config = _config(book, net, steps=1, unit=1 << 15, reach=1 << 20, beam=4, rows=1, columns=3)
    config |= {"rate": rate, "hop": hop}
    same = np.eye(bins, dtype=np.int32) * BASIS
    tensors = {"project": same, "back": same.copy(), "mean": np.zeros(bins, np.int32), "codebooks": book}
    tensors |= zero_networks(config, bins, bins)
    return Start(config, tensors, SoundCrops(clips, basis, crop), ConvAudioCodec, {"basis": basis}, 0.1)


def _config(
    book: NDArray[np.int32], net: NetSizes | None, *, steps: int, unit: int, reach: int, beam: int,
    rows: int = 3, columns: int = 3,
) -> dict[str, int]:  # fmt: skip
    net = net or NetSizes()
    return {
        "books": book.shape[0], "codes": book.shape[1], "beam": beam, "steps": steps, "unit": unit, "reach": reach,
        "width": net.width, "encoder_blocks": net.encoder_blocks, "decoder_blocks": net.decoder_blocks,
        "rows": rows, "columns": columns,
    }  # fmt: skip


def _at_least(image: U8, side: int) -> U8:
    """`image` [H, W, C] with its edge drawn out to `side` pixels where it is smaller."""
    height, width = image.shape[:2]
    return np.pad(image, [(0, max(0, side - height)), (0, max(0, side - width)), (0, 0)], mode="edge")
