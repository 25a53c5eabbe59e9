"""Decoder-side smoothing: a linear correction of each patch from the 3x3 cells around it.

A patch decoded from its own code alone meets its neighbours with a seam. Least squares from features of the
nine codes to what the own patch misses removes most of it; it costs no ids and is a closed form.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def neighbourhood(features: F64) -> F64:
    """[..., h, w, F] -> [..., h, w, 9*F + 1]: the features of the 3x3 cells, edges repeated, and a 1."""
    rows, columns = features.shape[-3:-1]
    lead = [(0, 0)] * (features.ndim - 3)
    padded = np.pad(features, [*lead, (1, 1), (1, 1), (0, 0)], mode="edge")
    parts = [padded[..., y : y + rows, x : x + columns, :] for y in range(3) for x in range(3)]
    return np.concatenate([*parts, np.ones((*features.shape[:-1], 1))], axis=-1)


def fit_blend(pairs: Iterable[tuple[F64, F64]], *, ridge: float = 1e-6) -> NDArray[np.float32]:
    """Ridge regression over (inputs [n, 9*F + 1], misses [n, D]) pairs: float32 [9*F + 1, D]."""
    gram: F64 | float = 0.0
    right: F64 | float = 0.0
    for inputs, misses in pairs:
        gram = gram + inputs.T @ inputs
        right = right + inputs.T @ misses
    assert isinstance(gram, np.ndarray) and isinstance(right, np.ndarray)
    size = len(gram)
    return np.linalg.solve(gram + ridge * np.trace(gram) / size * np.eye(size), right).astype(np.float32)
