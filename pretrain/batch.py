"""From packs to the tensors of one rank: its slice of every pack, and what its losses are multiplied by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringweave.data_pipes.pack import Pack
from ringweave.parallel.ring_plan import Slots
from ringweave.pretrain.objectives import target_counts


@dataclass(slots=True)
class Batch:
    """This rank's part of a step. n packs, l of their L slots.

    ids, order, targets [n, l]; documents [n, L] (whole packs: attention plans need them); weights and modality
    [n, l] of each target; counts [modalities] of this data rank's packs.
    """

    ids: Tensor
    order: Tensor
    targets: Tensor
    documents: Tensor
    weights: NDArray[np.float32]
    modality: NDArray[np.int8]
    counts: NDArray[np.float64]
    real_tokens: int
    slots: int

    def terms(self, coefficients: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
        """[n, l, 3] of `dtype`: coefficient x weight, weight, modality."""
        coef = coefficients[self.modality] * self.weights
        return torch.from_numpy(np.stack([coef, self.weights, self.modality], axis=-1)).to(dtype)


def collate(packs: Sequence[Pack], slots: Slots) -> Batch:
    """Stack packs and keep the slots of this ring rank (`slots`: global slot of each local one)."""
    weights = np.stack([p.weights for p in packs])
    modality = np.stack([p.target_modality for p in packs])
    documents = np.stack([p.doc for p in packs])

    def mine(field: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(p, field)[slots] for p in packs]).astype(np.int64))

    return Batch(
        ids=mine("ids"),
        order=mine("order"),
        targets=mine("targets"),
        documents=torch.from_numpy(documents),
        weights=weights[:, slots],
        modality=modality[:, slots],
        counts=target_counts(weights, modality),
        real_tokens=int((documents >= 0).sum()),
        slots=documents.size,
    )
