"""What tokenizers hand on: `Segment`s, and the `Document` they make.

A Segment is one run of one modality. A Document is the ordered segments that may see each other.
Packing (`data_pipes/packing.py`) turns documents into fixed-length packs and is the only place where
labels are shifted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

#: Fixed numbering, stored in packs, token caches and metrics. Only append.
MODALITIES: tuple[str, ...] = (
    "control", "text", "image", "rgba", "video", "audio", "score", "symbolic", "midi",
)  # fmt: skip
MODALITY_ID: dict[str, int] = {name: i for i, name in enumerate(MODALITIES)}
#: The control id that holds the place of a continuous latent; the latent lies in `Segment.latents`.
LATENT = 22

Role = Literal["condition", "target"]
Attends = Literal["causal", "bidirectional", "prefix"]


@dataclass(frozen=True, slots=True)
class Segment:
    """One run of one modality inside a document.

    ids:        int32 [n], global ids of the vocabulary manifest (delimiters included).
    modality:   a name from MODALITIES.
    positions:  int32 [n, 4], (time, row, column, layer) of each id. Text repeats its order in `time`.
    role:       "target" is trained on, "condition" is only seen.
    attends:    how its tokens see each other; everything is causal across segments.
    weight:     loss weight of each of its tokens (0 for a condition).
    latents:    float32 [m, Z], one row for each id that is LATENT, in order; None where there is none.
    """

    ids: NDArray[np.int32]
    modality: str
    positions: NDArray[np.int32]
    role: Role = "target"
    attends: Attends = "causal"
    weight: float = 1.0
    latents: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.modality not in MODALITY_ID:
            raise ValueError(f"unknown modality {self.modality!r}; known: {', '.join(MODALITIES)}")
        if self.ids.ndim != 1 or self.positions.shape != (len(self.ids), 4):
            raise ValueError(
                f"ids {self.ids.shape} and positions {self.positions.shape} must be [n] and [n, 4]"
            )
        if self.latents is not None:
            places = int((self.ids == LATENT).sum())
            if self.latents.ndim != 2 or len(self.latents) != places or self.latents.dtype != np.float32:
                raise ValueError(
                    f"latents must be float32 [{places}, Z], got {self.latents.dtype} {list(self.latents.shape)}"
                )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Document:
    """The ordered segments that may see each other, and the sample they came from."""

    key: str
    segments: tuple[Segment, ...] = field(default_factory=tuple)

    def __len__(self) -> int:
        return sum(len(s) for s in self.segments)
