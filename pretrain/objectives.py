"""Objectives: what is summed, and over what it is divided.

An objective gives (sum, count) per named term. Only the trainer divides, by counts taken over data, ring,
micro-batches and accumulation, so no layout and no rank without targets can change the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringweave.tokenizers.segment import MODALITIES


def target_counts(weights: NDArray[np.float32], modality: NDArray[np.int8]) -> NDArray[np.float64]:
    """Σ of target weights per modality, [len(MODALITIES)]: the counts of the next-token objective."""
    counts = np.bincount(
        modality.ravel(), weights=weights.ravel().astype(np.float64), minlength=len(MODALITIES)
    )
    return counts.astype(np.float64)


def term_sums(nll: Tensor, weights: Tensor, modality: Tensor) -> Tensor:
    """Σ weight·nll per modality, fp64 [len(MODALITIES)]: the sums of the next-token objective."""
    sums = torch.zeros(len(MODALITIES), dtype=torch.float64, device=nll.device)
    return sums.index_add_(0, modality.flatten().long(), (nll.double() * weights.double()).flatten())


def coefficients(
    counts: NDArray[np.float64], modality_weights: Mapping[str, float], *, normalize: str
) -> NDArray[np.float64]:
    """What each modality's sum is multiplied by, [len(MODALITIES)]; modalities absent from the batch get 0.

    "modality": Σ_m λ_m·S_m/N_m / Σ_{m present} λ_m, each modality's mean, as LWM weighs text and vision.
    "tokens": Σ_m λ_m·S_m / Σ_m λ_m·N_m, one mean over all tokens. A common factor on λ changes neither.
    """
    lam = np.array([modality_weights.get(name, 1.0) for name in MODALITIES])
    present = counts > 0
    if normalize == "modality":
        scale = np.where(present, lam / np.where(present, counts, 1.0), 0.0)
        total = lam[present].sum()
    else:
        scale = np.where(present, lam, 0.0)
        total = (lam * counts).sum()
    return scale / total if total > 0 else np.zeros_like(lam)
