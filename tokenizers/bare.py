"""Documents of continuous latents alone, as a diffusion transformer reads them: words, then grids without delimiters.

Words are ids after `bos`, or vectors that another model made of them, a placeholder each (`embedding_segment`).
A grid is a run of placeholders, row by row, frame by frame. Its shape lies in its positions, so nothing but latents
and words takes a slot of the context. Models over ids want `TokenizerSet.latents_segment` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.manifest import BOS
from ringweave.tokenizers.segment import LATENT, Document, Role, Segment


def latent_segment(
    latents: NDArray[np.float32],
    *,
    modality: str = "rgba",
    layer: int = 0,
    role: Role = "target",
    weight: float = 1.0,
) -> Segment:
    """float32 [T, h, w, Z], T frames of one grid, as T·h·w placeholders at (frame, row, column, layer).

    DataError for other shapes, for what is not finite, and for a modality other than image, rgba or video.
    """
    latents = np.asarray(latents)
    if latents.ndim != 4 or 0 in latents.shape or latents.dtype != np.float32:
        raise DataError(f"latents must be float32 [T, h, w, Z], got {latents.dtype} {list(latents.shape)}")
    if not np.isfinite(latents).all():
        at = np.argwhere(~np.isfinite(latents))[0].tolist()
        raise DataError(
            f"latents of layer {layer} are not finite", why=f"the first is at {at} of {list(latents.shape)}"
        )
    if modality not in ("image", "rgba", "video"):
        raise DataError(f"a grid of latents is no {modality}", fix="name image, rgba or video")
    frames, height, width, channels = latents.shape
    places = np.empty((frames, height, width, 4), np.int32)
    places[..., 0] = np.arange(frames)[:, None, None]
    places[..., 1] = np.arange(height)[None, :, None]
    places[..., 2] = np.arange(width)[None, None, :]
    places[..., 3] = layer
    return Segment(
        ids=np.full(frames * height * width, LATENT, np.int32),
        modality=modality,
        positions=places.reshape(-1, 4),
        role=role,
        attends="bidirectional",
        weight=weight,
        latents=np.ascontiguousarray(latents.reshape(-1, channels)),
    )


def embedding_segment(vectors: NDArray[np.float32]) -> Segment:
    """float32 [n, E], the words of a document as vectors, as n placeholders in order.

    DataError for other shapes and for what is not finite.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or 0 in vectors.shape or vectors.dtype != np.float32:
        raise DataError(f"embeddings must be float32 [n, E], got {vectors.dtype} {list(vectors.shape)}")
    if not np.isfinite(vectors).all():
        at = np.argwhere(~np.isfinite(vectors))[0].tolist()
        raise DataError("embeddings are not finite", why=f"the first is at {at} of {list(vectors.shape)}")
    places = np.zeros((len(vectors), 4), np.int32)
    places[:, 0] = np.arange(len(vectors))
    return Segment(
        ids=np.full(len(vectors), LATENT, np.int32),
        modality="text",
        positions=places,
        role="condition",
        weight=0.0,
        latents=np.ascontiguousarray(vectors),
    )


def document(key: str, words: Segment | None, grids: Sequence[Segment]) -> Document:
    """`bos` and the words (None: the empty prompt), then the grids in order. DataError without a grid.

    The first slot is always of words: it is what stays of them where they are dropped. Words that are vectors
    (`embedding_segment`) have no `bos` in front.
    """
    if not grids:
        raise DataError("a document of latents needs at least one grid", where=key)
    if words is not None and words.latents is not None:
        return Document(key, (words, *grids))
    first = Segment(np.array([BOS], np.int32), "text", np.zeros((1, 4), np.int32), "condition", "causal", 0.0)
    if words is not None:
        places = words.positions.copy()
        places[:, 0] += 1
        first = replace(
            words,
            ids=np.concatenate([first.ids, words.ids]),
            positions=np.concatenate([first.positions, places]),
        )
    return Document(key, (first, *grids))


def shape_of(segment: Segment) -> tuple[int, int, int] | None:
    """(frames, rows, columns) of a grid that `latent_segment` wrote; None for any other segment."""
    if segment.latents is None or segment.modality == "text" or len(segment.latents) != len(segment.ids):
        return None
    frames, rows, columns = (int(segment.positions[:, axis].max()) + 1 for axis in (0, 1, 2))
    return (frames, rows, columns) if frames * rows * columns == len(segment.ids) else None
