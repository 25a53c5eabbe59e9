"""From packs to the tensors of one rank: its slice of every pack, and what its losses are multiplied by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringweave.data_pipes.pack import Pack
from ringweave.parallel.ring_layout import RingLayout
from ringweave.pretrain.objectives import target_counts
from ringweave.tokenizers.errors import DataError


@dataclass(slots=True)
class Batch:
    """This rank's part of a step. n packs, l of their L slots.

    ids, order, targets [n, l]; documents, owner, prefix [n, L] (whole packs: attention plans need them): document,
    ring rank and leading two-way slots of each slot; weights and modality [n, l] of each target; counts [modalities]
    of this data rank's packs.
    """

    ids: Tensor
    order: Tensor
    targets: Tensor
    documents: Tensor
    owner: Tensor
    prefix: Tensor
    weights: NDArray[np.float32]
    modality: NDArray[np.int8]
    counts: NDArray[np.float64]
    real_tokens: int
    slots: int

    @property
    def segments(self) -> int:
        """Noise levels of a pack: none here."""
        return 0

    def inputs(self, part: slice = slice(None)) -> dict[str, Tensor]:
        """What the model needs beside ids, of these packs; every tensor has the packs as its first dim."""
        names = ("order", "documents", "owner", "prefix", "targets")
        return {name: getattr(self, name)[part] for name in names}

    def terms(self, coefficients: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
        """[n, l, 3] of `dtype`: coefficient x weight, weight, modality."""
        coef = coefficients[self.modality] * self.weights
        return torch.from_numpy(np.stack([coef, self.weights, self.modality], axis=-1)).to(dtype)


def collate(
    packs: Sequence[Pack], *, ring: RingLayout | None = None, rank: int = 0, prefix: bool = False
) -> Batch:
    """Stack packs and keep the slots of ring rank `rank` under `ring` (None: all slots).

    prefix: whether the leading conditions of documents see each other both ways.
    """
    if strange := [p for p in packs if p.latents is not None or p.embeddings is not None]:
        raise DataError(
            "these packs hold continuous latents, which a model over ids has no place for",
            where=f"pack {strange[0].plan.index}",
            fix="use plan items that give ids",
        )
    weights = np.stack([p.weights for p in packs])
    modality = np.stack([p.target_modality for p in packs])
    documents = np.stack([p.doc for p in packs])
    lead = np.stack([p.prefix for p in packs]) if prefix else np.zeros_like(documents)
    owner = (ring or RingLayout()).owner(documents, lead)
    mine = owner == rank

    def own(values: NDArray[Any]) -> NDArray[Any]:
        return values[mine].reshape(len(packs), -1)

    def tensor(field: str) -> Tensor:
        return torch.from_numpy(own(np.stack([getattr(p, field) for p in packs])).astype(np.int64))

    return Batch(
        ids=tensor("ids"),
        order=tensor("order"),
        targets=tensor("targets"),
        documents=torch.from_numpy(documents),
        owner=torch.from_numpy(owner),
        prefix=torch.from_numpy(lead),
        weights=own(weights),
        modality=own(modality),
        counts=target_counts(weights, modality),
        real_tokens=int((documents >= 0).sum()),
        slots=documents.size,
    )
