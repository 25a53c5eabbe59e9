"""Where the training of each learned codec starts: its closed form, and the crops it learns from.

`start(modality, records, sizes)` gives a `Start`; `Training` (learn.py) takes its config, tensors and crops, and
`Start.codec` makes the finished codec of what `Training.tensors` returns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.audio import mdct_basis, random_frames, transform
from ringweave.tokenizers.codec import Tensors, pad_to, to_patches
from ringweave.tokenizers.conv_codec import BASIS, zero_networks
from ringweave.tokenizers.conv_codecs import AUDIO_CELL, ConvAudioCodec, ConvImageCodec, ConvScoreCodec
from ringweave.tokenizers.conv_rgba import BASIS as FINE
from ringweave.tokenizers.conv_rgba import ConvRgbaCodec, premultiplied, still_networks
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.image import ImageCodec
from ringweave.tokenizers.pulses import fit_pulse_books
from ringweave.tokenizers.score import BLANK_BELOW, ink_cells, ink_tone
from ringweave.tokenizers.vq import ResidualQuantizer, fit_books

F64 = NDArray[np.float64]
I16 = NDArray[np.int16]
U8 = NDArray[np.uint8]
#: Books of sound up to which encoder and books are trained: at 8 of them 0.5 dB came of it, at 20 the same was lost.
JOINT_BOOKS = 8


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
    is coded, as in sound at 1.6 kbit/s, a strong pull towards them shrinks what is coded instead. decoder_only: for
    pages, and for sound of more than JOINT_BOOKS books, whose closed form a joint training only made worse.
    """

    config: dict[str, int]
    tensors: Tensors
    crops: Crops
    kind: Any
    fixed: Tensors
    commit: float = 1.0
    decoder_only: bool = False

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


class LayerCrops(GridCrops):
    """Crops of RGBA layers at any pixel: straight cells, then a background colour drawn for each (3 numbers).

    Layers have clear pixels put around them, so that they lie in many ways over the patches; blank cells weigh 0.
    """

    def __init__(self, layers: list[U8], patch: int, size: int) -> None:
        """layers: uint8 [H, W, 4]; size: cells a side."""
        side, around = patch * size, [(patch - 1, patch - 1), (patch - 1, patch - 1), (0, 0)]
        shown = [layer for layer in layers if layer[..., 3].any()]
        super().__init__([_at_least(pad_to(np.pad(s, around), patch), side) for s in shown], side)
        self._patch = patch

    def batch(self, rng: np.random.Generator, count: int) -> tuple[F64, F64]:
        """See `learn.Crops`: cells [count, h, w, 4*p*p + 3]."""
        pixels, _ = super().batch(rng, count)
        for n, mirrored in enumerate(rng.random(count) < 0.5):
            if mirrored:
                pixels[n] = pixels[n, :, ::-1]
        cells = to_patches(pixels, self._patch)
        grounds = np.rint(rng.random((*cells.shape[:-1], 3)) * 255)
        return np.concatenate([cells, grounds], -1), (cells[..., 3::4].max(-1) > 0).astype(np.float64)


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
    pages: list[U8], *, books: int, codes: int, patch: int = 16, dims: int = 256, net: NetSizes | None = None,
    crop: int = 8, seed: int = 0,
) -> Start:  # fmt: skip
    """From principal components and residual k-means of inked cells; blank paper stays out.

    Each page counts twice, once moved by less than a patch. `dims` is cut to the pixels of a patch: at 64 of 256 even
    what is not quantised loses a tenth of the ink.
    """
    rng = np.random.default_rng(seed)
    tone, dims = ink_tone(), min(dims, patch * patch)
    moved = [np.pad(p, [(int(n), 0) for n in rng.integers(0, patch, 2)], constant_values=255) for p in pages]
    grids = [tone[ink_cells(page, patch)].astype(np.uint8) for page in (*pages, *moved)]
    cells = np.concatenate([grid.reshape(-1, patch * patch) for grid in grids]).astype(np.float64)
    cells = cells[cells.max(1) >= tone[BLANK_BELOW]]
    cells = cells[rng.permutation(len(cells))[:60_000]]
    basis = _components(cells, dims)
    points = cells @ basis.astype(np.float64)
    book = together(fit_books(points, books, codes, seed=seed, rounds=6), points, reach=8192 * 256)
    net = replace(net or NetSizes(), encoder_blocks=0)  # it would not be trained
    config = _config(book, net, steps=256, unit=128, reach=8192, beam=8)
    config |= {"patch": patch, "blank_below": BLANK_BELOW}
    mean = np.zeros(patch * patch, np.int32)
    tensors = {"project": basis, "back": basis.T.copy(), "mean": mean, "codebooks": book}
    tensors |= zero_networks(config, basis.shape[1], patch * patch)
    crops = GridCrops(grids, crop, blank_below=int(tone[BLANK_BELOW]))
    return Start(config, tensors, crops, ConvScoreCodec, {"tone": tone}, decoder_only=True)


def rgba_start(
    layers: list[U8], *, books: int, alpha_codes: int, colour_codes: int, patch: int = 8, dims: int = 64,
    alpha_dims: int = 64, net: NetSizes | None = None, crop: int = 6, seed: int = 0,
) -> Start:  # fmt: skip
    """From principal components and k-means of colour and of alpha. `alpha_codes` counts the reserved one."""
    rng = np.random.default_rng(seed)
    grids = [to_patches(pad_to(layer, patch), patch).reshape(-1, patch**2, 4) for layer in layers]
    cells = np.concatenate(grids).astype(np.int64)
    cells = cells[cells[..., 3].max(1) > 0]
    cells = cells[rng.permutation(len(cells))[:20_000]]
    if not len(cells):
        raise DataError("there is no layer to learn from: nothing shows in any")
    mixed = cells[..., 3].min(1) < 255
    colour, alpha = premultiplied(cells)
    tensors: Tensors = {}
    for name, points, size, count, codes in (
        ("colour", colour, min(dims, 3 * patch**2), 1, colour_codes),
        ("alpha", alpha[mixed] if mixed.any() else alpha, min(alpha_dims, patch**2), books, alpha_codes - 1),
    ):
        mean = np.rint(points.mean(0))
        basis = _components(points - mean, size, unit=FINE)
        tensors[f"project_{name}"], tensors[f"back_{name}"] = basis, basis.T.copy()
        tensors[f"mean_{name}"] = mean.astype(np.int32)
        numbers = np.rint((points - mean) @ basis.astype(np.float64) * (256 / FINE))
        tensors[f"books_{name}"] = fit_books(numbers, count, codes, seed=seed, rounds=10)
    book = tensors["books_alpha"]
    config = _config(book, net, steps=256, unit=64, reach=2048, beam=4) | {"patch": patch}
    total = tensors["project_colour"].shape[1] + tensors["project_alpha"].shape[1]
    tensors |= still_networks(config, total)
    return Start(config, tensors, LayerCrops(layers, patch, crop), ConvRgbaCodec, {}, 0.2)


def together(books: NDArray[np.int32], points: F64, *, reach: float) -> NDArray[np.int32]:
    """Codebooks [Q, K, D] that share `points` [n, D] best, by least squares, given the codes of the books as they are.

    Books fitted one after another do not know that the later ones will mend what they miss.
    """
    count, codes, dims = books.shape
    quantizer = ResidualQuantizer(books, beam=8, limit=reach * np.sqrt(dims))
    rows = quantizer.encode(points) + np.arange(count) * codes
    gram, right = np.zeros((count * codes,) * 2), np.zeros((count * codes, dims))
    for q in range(count):
        np.add.at(right, rows[:, q], points)
        for other in range(count):
            np.add.at(gram, (rows[:, q], rows[:, other]), 1.0)
    flat = books.reshape(-1, dims).astype(np.float64)
    keep = 2.0  # as if each code had been seen that often as it was
    solved = np.linalg.solve(gram + keep * np.eye(len(gram)), right + keep * flat)
    return np.rint(solved).astype(np.int32).reshape(books.shape)


def _components(points: F64, dims: int, *, unit: int = BASIS) -> NDArray[np.int32]:
    """Principal components of centred points [n, C], in 1/`unit`: int32 [C, dims]."""
    _, vectors = np.linalg.eigh(points.T @ points)
    basis = vectors[:, ::-1][:, :dims]
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(dims)])  # eigh leaves the sign open
    return np.rint(basis * unit).astype(np.int32)


def audio_start(
    clips: list[I16], *, rate: int, hop: int, bins: int, books: int, codes: int, net: NetSizes | None = None,
    crop: int = 64, seed: int = 0,
) -> Start:  # fmt: skip
    """From residual k-means of the lowest `bins` frequencies, each code a peak at first (`pulses.py`)."""
    basis = mdct_basis(hop, bins)
    cells = random_frames(clips, basis, frames=30_000, scale=AUDIO_CELL, seed=seed)
    book = fit_pulse_books(cells, books, codes)
    config = _config(book, net, steps=1, unit=1 << 15, reach=1 << 20, beam=4, rows=1, columns=3)
    config |= {"rate": rate, "hop": hop}
    same = np.eye(bins, dtype=np.int32) * BASIS
    tensors = {"project": same, "back": same.copy(), "mean": np.zeros(bins, np.int32), "codebooks": book}
    tensors |= zero_networks(config, bins, bins)
    crops, alone = SoundCrops(clips, basis, crop), books > JOINT_BOOKS
    return Start(config, tensors, crops, ConvAudioCodec, {"basis": basis}, 0.1, decoder_only=alone)


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
