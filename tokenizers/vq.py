"""Residual vector quantisation in integers, and the k-means that fits it.

Both run on float64 arrays that hold integers, so every sum is exact: the fit gives the same codebooks and
the encoder the same ids at any batch size and thread count.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
EXACT = 2.0**53
ROWS = 256  # rows multiplied by all codes at a time: bounds memory, changes nothing else
SUMS = 1 << 19  # distances that the beam compares at a time (4 MiB): the same


def kmeans(
    points: F64, codes: int, *, rng: np.random.Generator, rounds: int = 8, reserve_zero: bool = False
) -> F64:
    """Lloyd's k-means over integer `points` [n, d]; centres [codes, d] rounded to integers in every round.

    Centres start as a sample of the points; one that loses all its points restarts at a point that is
    badly served. With `reserve_zero` centre 0 is the zero vector and stays it.
    """
    points = np.rint(np.asarray(points, np.float64))
    if not len(points):
        points = np.zeros((1, points.shape[1]))
    centres = points[rng.choice(len(points), codes, replace=len(points) < codes)].copy()
    energy = (points * points).sum(1)
    for _ in range(rounds):
        if reserve_zero:
            centres[0] = 0
        owner, cost = _nearest(points, centres)
        counts = np.bincount(owner, minlength=codes)
        order = np.argsort(owner, kind="stable")
        filled = np.flatnonzero(counts)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])[filled]
        centres[filled] = np.rint(np.add.reduceat(points[order], starts, axis=0) / counts[filled, None])
        lost = np.flatnonzero(counts == 0)
        if len(lost):
            worst = np.argsort(-(energy + cost), kind="stable")[: 8 * len(lost)]
            centres[lost] = points[rng.choice(worst, len(lost), replace=len(worst) < len(lost))]
    if reserve_zero:
        centres[0] = 0
    return centres


def _nearest(points: F64, centres: F64) -> tuple[NDArray[np.int64], F64]:
    """Index of the nearest centre (the first of equals) and |x - c|^2 - |x|^2, both [n]."""
    norms, turned = (centres * centres).sum(1), np.ascontiguousarray(-2.0 * centres.T)
    owner, cost = np.empty(len(points), np.int64), np.empty(len(points))
    for start in range(0, len(points), ROWS):
        distance = points[start : start + ROWS] @ turned
        distance += norms
        best = distance.argmin(1)
        owner[start : start + ROWS] = best
        cost[start : start + ROWS] = distance[np.arange(len(best)), best]
    return owner, cost


def fit_books(
    points: F64, books: int, codes: int, *, seed: int, rounds: int = 8, reserve_zero: bool = False
) -> NDArray[np.int32]:
    """Fit `books` codebooks one after another on what the earlier ones leave: int32 [books, codes, d]."""
    rng = np.random.default_rng(seed)
    rest = np.rint(np.asarray(points, np.float64))
    out = []
    for _ in range(books):
        centres = kmeans(rest, codes, rng=rng, rounds=rounds, reserve_zero=reserve_zero)
        rest = rest - centres[_nearest(rest, centres)[0]]
        out.append(centres)
    return np.stack(out).astype(np.int32)


class ResidualQuantizer:
    """Codebooks int32 [Q, K, D] with an exact beam search.

    `limit` bounds |x| of any input vector; the constructor checks that no sum can leave the exact range.
    """

    def __init__(self, codebooks: NDArray[np.int32], *, beam: int = 1, limit: float = 2.0**20) -> None:
        self.codebooks = codebooks
        self.books, self.codes, self.dim = codebooks.shape
        self.beam = beam if self.books > 1 else 1
        self._flat = codebooks.reshape(-1, self.dim).astype(np.float64)
        norms = (self._flat * self._flat).sum(1)
        longest = float(np.sqrt(norms.reshape(self.books, self.codes).max(1)).sum())
        # No sum of the search leaves 2·L·(L + B): costs are |s|² - 2 x·s with |s| <= L and |x| <= B, products less.
        if 2.0 * longest * (longest + limit) >= EXACT:
            raise ValueError(f"codebooks of length {longest:.3g} and inputs up to {limit:.3g} are not exact")
        self._norms = norms
        self._turned = np.ascontiguousarray(-2.0 * self._flat.T)
        #: Twice the products of the codes of an earlier book [K] with those of a later one [K].
        self._products = {
            (earlier, later): 2.0 * self._book(earlier) @ self._book(later).T
            for later in range(self.books)
            for earlier in range(later)
        }

    def _book(self, number: int) -> F64:
        return self._flat[number * self.codes : (number + 1) * self.codes]

    def encode(self, points: F64) -> NDArray[np.int32]:
        """Codes of integer `points` [n, D]: int32 [n, Q]. Equal distances go to the lower code."""
        out = np.empty((len(points), self.books), np.int32)
        rows = max(1, SUMS // (self.codes * self.beam))
        for start in range(0, len(points), ROWS):
            alone = points[start : start + ROWS] @ self._turned  # |c|^2 - 2 x.c of every code of every book
            alone += self._norms
            for first in range(0, len(alone), rows):
                part = alone[first : first + rows]
                out[start + first : start + first + len(part)] = self._search(part)
        return out

    def _search(self, alone: F64) -> NDArray[np.int64]:
        """The beam over |x - sum of codes|^2 - |x|^2, by products of codebooks instead of residuals. Overwrites."""
        n, size = len(alone), self.codes
        paths, cost = np.zeros((n, 1, 0), np.int64), np.zeros((n, 1))
        added = np.empty((n, self.beam, size))
        for book in range(self.books):
            total = alone[:, None, book * size : (book + 1) * size]
            if book:
                total = total + cost[:, :, None]
            for earlier in range(book):
                part = added[:, : paths.shape[1]]
                # "clip" and not "raise", which would buffer what it writes: no code is out of range.
                np.take(self._products[earlier, book], paths[:, :, earlier], axis=0, out=part, mode="clip")
                total += part
            total = total.reshape(n, -1)
            keep = 1 if book == self.books - 1 else min(self.beam, total.shape[1])
            chosen, cost = _smallest(total, keep)
            parents = np.take_along_axis(paths, (chosen // size)[:, :, None], axis=1)
            paths = np.concatenate([parents, (chosen % size)[:, :, None]], axis=2)
        return paths[:, 0]

    def decode(self, codes: NDArray[np.int32]) -> F64:
        """Sum of the codes' vectors: integers, float64 [n, D]. A code of -1 adds nothing."""
        out = np.zeros((len(codes), self.dim))
        for book in range(self.books):
            column = codes[:, book]
            out += np.where(column[:, None] >= 0, self.codebooks[book][np.maximum(column, 0)], 0)
        return out


def _smallest(total: F64, keep: int) -> tuple[NDArray[np.int64], F64]:
    """Indices and values [n, keep] of each row's smallest entries, the first of equals first.

    Repeated argmin and not argpartition, whose choice among equals differs between processors. Overwrites
    `total`.
    """
    rows = np.arange(len(total))
    indices, values = np.empty((len(total), keep), np.int64), np.empty((len(total), keep))
    for slot in range(keep):
        best = total.argmin(1)
        indices[:, slot], values[:, slot] = best, total[rows, best]
        total[rows, best] = np.inf
    return indices, values
