"""Image codec: one id per 8x8 RGB patch, in closed form.

Encoding: PCA of the patch to a few integers, then the nearest of K codes (k-means in that space).
Decoding: the code's own patch plus a linear correction from the codes of the 3x3 neighbourhood, fitted by
least squares; it smooths the seams between patches. K-means and not per-axis levels (FSQ): at ten bits a
patch it is about 0.8 dB better, because chroma and texture share the bits with luma (docs/tokenizers.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.blend import fit_blend, neighbourhood
from ringweave.tokenizers.codec import (
    Tensors,
    from_patches,
    pack_codec,
    pad_to,
    to_patches,
    to_uint8,
    unpack_codec,
)
from ringweave.tokenizers.vq import ResidualQuantizer, fit_books

BASIS_SCALE = 256
CHANNELS = 3
CELLS = 1024  # patches coded at a time: bounds memory, changes nothing else


class ImageCodec:
    """uint8 [H, W, 3] <-> codes int32 [ceil(H/p), ceil(W/p)]."""

    kind = "image"

    def __init__(self, config: dict[str, int], tensors: Tensors) -> None:
        self.config, self.tensors = config, tensors
        self.patch = config["patch"]
        self._basis = tensors["basis"].astype(np.float64)  # [p*p*3, D], unit columns times BASIS_SCALE
        self._mean = tensors["mean"].astype(np.float64)  # [p*p*3], whole pixel levels
        self._offset = self._mean @ self._basis
        limit = 256.0 * np.sqrt(len(self._basis)) * BASIS_SCALE * 1.01
        self.quantizer = ResidualQuantizer(tensors["codebook"], limit=limit)
        self.codes = self.quantizer.codes
        # Row K stands for a missing code: all features zero, so the mean patch.
        book = np.concatenate([tensors["codebook"][0], np.zeros((1, self._basis.shape[1]), np.int32)])
        self._patches = self._mean + (book @ self._basis.T) / float(BASIS_SCALE) ** 2
        self._features = book[:, : config["features"]] / float(BASIS_SCALE)
        # [9*features + 1, p*p*3] in whole 2^-22, so that sums are exact: video ids depend on what is decoded.
        self._blend = np.rint(tensors["blend"].astype(np.float64) * 2.0**22) / 2.0**22

    @classmethod
    def fit(
        cls, images: list[NDArray[np.uint8]], *, codes: int, patch: int = 8, dims: int = 24, seed: int = 0
    ) -> ImageCodec:
        """Fit to RGB images of any sizes."""
        rng = np.random.default_rng(seed)
        grids = [to_patches(pad_to(image, patch), patch) for image in images]
        points = np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in grids]).astype(np.float64)
        points = points[rng.permutation(len(points))[:20_000]]
        mean = np.rint(points.mean(0))
        centred = points - mean
        _, vectors = np.linalg.eigh(centred.T @ centred)
        basis = vectors[:, ::-1][:, :dims]
        basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(dims)])  # eigh leaves the sign open
        basis = np.rint(basis * BASIS_SCALE)
        book = fit_books(centred @ basis, 1, codes, seed=seed, rounds=10)
        features = min(16, dims)
        tensors: Tensors = {
            "basis": basis.astype(np.int32),
            "mean": mean.astype(np.int32),
            "codebook": book,
            "blend": np.zeros((9 * features + 1, len(mean)), np.float32),
        }
        codec = cls({"patch": patch, "features": features}, tensors)
        tensors["blend"] = fit_blend(codec._misses(grids[:800]))
        return cls(codec.config, tensors)

    def _misses(
        self, grids: list[NDArray[np.uint8]]
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """For each grid of patches: neighbourhood features, and what the codes' own patches miss."""
        for grid in grids:
            codes = self._encode_patches(grid)
            inputs = neighbourhood(self._features[codes])
            missed = grid - self._patches[codes]
            yield inputs.reshape(-1, inputs.shape[-1]), missed.reshape(-1, missed.shape[-1])

    def _encode_patches(self, grid: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Codes [...] of patches [..., p*p*3]."""
        patches = grid.reshape(-1, grid.shape[-1])
        codes = np.empty(len(patches), np.int32)
        for start in range(0, len(codes), CELLS):
            points = patches[start : start + CELLS].astype(np.float64) @ self._basis - self._offset
            codes[start : start + CELLS] = self.quantizer.encode(points)[:, 0]
        return codes.reshape(grid.shape[:-1])

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Codes int32 [..., h, w] of uint8 [..., H, W, 3], edge-padded to whole patches."""
        rows, columns = (-(-side // self.patch) for side in images.shape[-3:-1])
        frames = images.reshape(-1, *images.shape[-3:])
        codes = np.empty((len(frames), rows, columns), np.int32)
        at_once = max(1, CELLS // max(1, rows * columns))
        for start in range(0, len(frames), at_once):
            part = pad_to(frames[start : start + at_once], self.patch)
            codes[start : start + at_once] = self._encode_patches(to_patches(part, self.patch))
        return codes.reshape(*images.shape[:-3], rows, columns)

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """uint8 [..., p*h, p*w, 3] of codes [..., h, w]; -1 (missing) decodes to the mean patch."""
        codes = np.where(codes < 0, self.codes, codes)
        values = self._patches[codes] + neighbourhood(self._features[codes]) @ self._blend
        return to_uint8(from_patches(values, self.patch, CHANNELS))

    def to_bytes(self) -> bytes:
        """The codec file."""
        return pack_codec(self.kind, self.config, self.tensors)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> ImageCodec:
        """Load `to_bytes`; VocabularyError when it is something else."""
        return cls(*unpack_codec(data, cls.kind, where=where))
