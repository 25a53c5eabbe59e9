"""The balancing window: packs that cost alike train in the same step, so that data ranks finish together.

W raw packs are sorted by modelled cost and cut into steps from neighbours; the steps are shuffled. Padding and mixture
make packs of equal *length*; from 256K tokens on it is the attention inside long documents that makes them unequal.
What a window cannot even out (one document that fills the context costs some 20 packs of short ones at 1M) is left to
sharding inside the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ringweave.data_pipes.order import shuffled
from ringweave.tokenizers.errors import DataError

#: (context up to, steps of a window): measured on the mix of tests/prove/data_packing.py, 8 ranks.
_STEPS = ((8192, 4), (65536, 8), (2**62, 32))
#: Packs of an automatic window at most: they are planned again when a run resumes.
_PACKS = 1024


def auto_window(context: int, batch: int) -> int:
    """Packs of the window: 4 steps up to 8K, 8 up to 64K, 32 above; fewer (not below 4) beyond 1,024 packs.

    0 for a batch of one pack: there is nothing to balance.
    """
    if batch == 1:
        return 0
    steps = next(steps for upto, steps in _STEPS if context <= upto)
    return batch * max(4, min(steps, _PACKS // batch))


@dataclass(frozen=True, slots=True)
class CostModel:
    """Modelled floating-point operations of a pack, forward, of one layer.

    A document of n tokens costs ratio·d²·n for the matrices (24 for attention with four projections and an MLP of
    four times the width) and 4·d for each pair of a query and a key it sees: n²/2 pairs when causal, n² when
    bidirectional, at most `window` keys a query in a window. Lengths are those of the *pieces in the pack*: what was
    split off or passed over costs nothing.

    width: d of the model; ratio: operations per token / d²; causal: each token sees only earlier ones;
    window: keys a query sees at most, None for all.
    """

    width: int = 4096
    ratio: float = 24.0
    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.width < 1 or not self.ratio > 0 or (self.window is not None and self.window < 1):
            raise DataError(
                "bad cost model",
                why=f"width {self.width}, ratio {self.ratio} and window {self.window} must be positive",
            )

    def pack(self, lengths: Sequence[int]) -> float:
        """Operations of a pack of pieces of these lengths, divided by the width (only comparisons matter)."""
        tokens = sum(lengths)
        window = self.window
        if window is None:
            pairs = sum([n * n for n in lengths])
        elif self.causal:  # n·w − w²/2 pairs, doubled
            pairs = sum([n * n if n <= window else window * (2 * n - window) for n in lengths])
        else:
            pairs = sum([n * min(n, window) for n in lengths])
        return self.ratio * self.width * tokens + (2 if self.causal else 4) * pairs

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> CostModel:
        """Inverse of `to_json`. Raises ValueError on anything else."""
        if not isinstance(value, dict) or set(value) != set(asdict(cls())):
            raise ValueError(f"malformed cost model {value!r}")
        return cls(**value)


def _spread(count: int) -> list[int]:
    """0..count-1 in the order of their mirrored binary digits (van der Corput).

    Cut into dp equal blocks, this deals every rank an even sample of a sorted step, and the m-th packs of all
    ranks are neighbours: ranks agree in sum and, where they wait for each other per micro-batch, in turn.
    """
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))


def arrange(costs: Sequence[float], batch: int, *key: int | str) -> list[int]:
    """The order in which the packs of a window are emitted, as indices into `costs`.

    Steps of `batch` neighbours by cost, shuffled by `key`. If `batch` does not divide the window (the end of the
    data), the cheapest packs make the short last step.
    """
    by_cost = sorted(range(len(costs)), key=lambda i: (costs[i], i))
    rest = len(costs) % batch
    steps = np.asarray(by_cost[rest:], np.int64).reshape(-1, batch)[:, _spread(batch)]
    return [*steps[shuffled(len(steps), *key)].ravel().tolist(), *by_cost[:rest]]
