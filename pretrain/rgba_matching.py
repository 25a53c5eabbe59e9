"""Which predicted layer stands for which true one, in the order of the layers, and how alike they are.

The protocol of LayerD (Suzuki et al. 2025): both stacks are walked from the bottom to the top by dynamic time warping,
so each layer has at least one partner and no two pairs cross. Because nobody can say into how many layers a picture
ought to fall, figures are given for up to so many merges of neighbouring layers, in either stack. Left out of it: its
step that first groups top layers which do not overlap, for layers made from designs.

A pair's cost is (RGB L1 + 1 - soft IoU) / 2. RGB L1 is the mean absolute difference of the channels, 0 to 1, weighted
by the true layer's alpha, so it is scored only where that is above 0; colour under alpha 0 counts as black. Soft IoU is
sum(min) / sum(max) of the alphas. Two layers without any alpha are equal: RGB L1 0, IoU 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.pretrain.rgba_metrics import U8
from ringweave.pretrain.rgba_pictures import check_layers
from ringweave.tokenizers.errors import DataError

#: Layers [start, stop) of a stack, merged into one.
Span = tuple[int, int]
Path = list[tuple[int, int]]
Costs = Sequence[Sequence[float]]
_LEAST = 2  # layers of a stack that no merge goes below, or two merged pictures would match by being whole
_GAIN = 1e-9  # a merge has to lower the mean cost by more than rounding does


@dataclass(frozen=True, slots=True)
class Matching:
    """The best match after `merges` merges: pairs of (predicted, true) spans, bottom first, and their mean figures."""

    merges: int
    pairs: tuple[tuple[Span, Span], ...]
    cost: float
    rgb_l1: float
    alpha_iou: float


@dataclass(frozen=True, slots=True)
class _Layer:
    """planes: uint8 [4, H, W], black where alpha is 0; box: rows and columns that hold all alpha; total: its sum."""

    planes: U8
    box: tuple[slice, slice]
    total: int

    @classmethod
    def of(cls, planes: U8) -> _Layer:
        """planes: uint8 [4, H, W], which this may write to."""
        alpha = planes[3]
        planes[:3] *= alpha > 0
        rows, columns = (np.flatnonzero(alpha.any(axis)) for axis in (1, 0))
        box = tuple(slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0) for at in (rows, columns))
        return cls(planes, (box[0], box[1]), int(alpha.sum(dtype=np.int64)))


def _over(below: _Layer, above: _Layer) -> _Layer:
    """One layer that looks like `above` on `below` over any background, in straight alpha rounded to 8 bits."""
    planes = below.planes.copy()
    where = (slice(None), *above.box)
    bottom, top = below.planes[where].astype(np.int32), above.planes[where].astype(np.int32)
    share_top, share_bottom = 255 * top[3], bottom[3] * (255 - top[3])
    alpha = share_top + share_bottom  # of 255 * 255
    colour = share_top * top[:3] + share_bottom * bottom[:3]
    planes[where][:3] = (2 * colour + alpha) // (2 * np.maximum(alpha, 1))
    planes[where][3] = (2 * alpha + 255) // 510
    return _Layer.of(planes)


class _Stacks:
    """Both stacks, and the figures (RGB L1, soft IoU) of the pairs of spans that were compared so far."""

    def __init__(self, *sides: Sequence[U8]) -> None:
        self.sides = [
            [_Layer.of(np.ascontiguousarray(layer.transpose(2, 0, 1)).copy()) for layer in side]
            for side in sides
        ]
        self.known: dict[tuple[Span, Span], tuple[float, float]] = {}

    def layer(self, side: int, span: Span) -> _Layer:
        """The layers of a span as one, merged from the bottom up."""
        start, stop = span
        out = self.sides[side][start]
        for above in self.sides[side][start + 1 : stop]:
            out = _over(out, above)
        return out

    def costs(self, predicted: Sequence[Span], true: Sequence[Span]) -> list[list[float]]:
        """[predicted, true] costs of all pairs; what is not known yet is compared."""
        made: dict[Span, _Layer] = {}
        for column in true:
            missing = [row for row in predicted if (row, column) not in self.known]
            if not missing:
                continue
            wanted = self.layer(1, column)
            weight = wanted.planes[(3, *wanted.box)].astype(np.float64).ravel()
            for row in missing:
                if row not in made:
                    made[row] = self.layer(0, row)
                self.known[row, column] = _figures(made[row], wanted, weight)
        return [[self.cost(row, column) for column in true] for row in predicted]

    def cost(self, row: Span, column: Span) -> float:
        """Of a pair that is known."""
        rgb, iou = self.known[row, column]
        return (rgb + 1 - iou) / 2


def _figures(found: _Layer, wanted: _Layer, weight: NDArray[np.float64]) -> tuple[float, float]:
    """(RGB L1, soft IoU). weight: the wanted layer's alpha inside its box, float64; all sums are whole numbers."""
    a, b = found.planes[(slice(None), *wanted.box)], wanted.planes[(slice(None), *wanted.box)]
    both = int(np.minimum(a[3], b[3]).sum(dtype=np.int64))
    either = found.total + wanted.total - both
    apart = np.zeros(b.shape[1:], np.uint16)
    for channel in range(3):
        apart += np.maximum(a[channel], b[channel]) - np.minimum(a[channel], b[channel])
    rgb = float(apart.ravel().astype(np.float64) @ weight) / (3 * 255 * wanted.total) if wanted.total else 0.0
    return rgb, both / either if either else 1.0


def cheapest_path(costs: Costs) -> Path:
    """Dynamic time warping: the (row, column) pairs of least total cost from (0, 0) to the last of both. costs: [n, m].

    Each pair goes on by one row, one column or both. Of equal sums the path with fewer pairs is taken, then the one
    that goes on by both.
    """
    best: dict[tuple[int, int], tuple[float, int, tuple[int, int] | None]] = {}
    for i, row in enumerate(costs):
        for j, cost in enumerate(row):
            total, length, came = 0.0, 0, None
            if i or j:
                steps = [at for at in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if at in best]
                came = min(steps, key=lambda at: best[at][:2])
                total, length, _ = best[came]
            best[i, j] = (total + cost, length + 1, came)
    at: tuple[int, int] | None = (len(costs) - 1, len(costs[0]) - 1)
    path: Path = []
    while at is not None:
        path.append(at)
        at = best[at][2]
    return path[::-1]


def match_layers(
    predicted: Sequence[U8], true: Sequence[U8], *, merges: int = 5, where: str = ""
) -> list[Matching]:
    """The matching with at most 0, 1 ... `merges` merges; the cost never rises along the list.

    A merge joins two neighbours of one stack. The one taken is that which lowers the mean cost of the pairs most when
    the joined layer inherits the partners of both; then the stacks are matched again. It ends early when that no longer
    lowers the mean cost, and no stack goes below two layers. Raises DataError for stacks that differ in size.
    """
    a, b = check_layers(predicted, where=where), check_layers(true, where=where)
    if a != b:
        raise DataError("the two stacks differ in size", where=where, why=f"predicted {a}, true {b}")
    stacks = _Stacks(predicted, true)
    spans = [[(i, i + 1) for i in range(len(side))] for side in (predicted, true)]
    path, matching = _matched(stacks, spans, 0)
    found = [matching]
    while len(found) <= merges:
        trial = _best_merge(stacks, spans, path)
        if trial is None:
            break
        path, matching = _matched(stacks, trial, len(found))
        if matching.cost >= found[-1].cost - _GAIN:
            break
        spans = trial
        found.append(matching)
    return found + [found[-1]] * (merges + 1 - len(found))


def _matched(stacks: _Stacks, spans: Sequence[Sequence[Span]], merges: int) -> tuple[Path, Matching]:
    path = cheapest_path(stacks.costs(spans[0], spans[1]))
    pairs = tuple((spans[0][i], spans[1][j]) for i, j in path)
    rgb, iou = (sum(stacks.known[pair][k] for pair in pairs) / len(pairs) for k in (0, 1))
    return path, Matching(merges, pairs, sum(stacks.cost(*pair) for pair in pairs) / len(pairs), rgb, iou)


def _best_merge(stacks: _Stacks, spans: Sequence[Sequence[Span]], path: Path) -> list[list[Span]] | None:
    """The spans after the merge that promises the lowest mean cost (the first of equals); None if there is none."""
    best: tuple[float, list[list[Span]]] | None = None
    for side in (0, 1):
        other = 1 - side
        for at in range(len(spans[side]) - 1 if len(spans[side]) > _LEAST else 0):
            joined = (spans[side][at][0], spans[side][at + 1][1])
            rest = [pair for pair in path if pair[side] not in (at, at + 1)]
            partners = [spans[other][p] for p in sorted({p[other] for p in path if p[side] in (at, at + 1)})]
            kept = sum(stacks.cost(spans[0][i], spans[1][j]) for i, j in rest)
            new = stacks.costs([joined], partners) if side == 0 else stacks.costs(partners, [joined])
            mean = (kept + sum(map(sum, new))) / (len(rest) + len(partners))
            if best is None or mean < best[0]:
                trial = [list(one) for one in spans]
                trial[side][at : at + 2] = [joined]
                best = (mean, trial)
    return best[1] if best else None


def decomposition(
    predicted: Sequence[U8], true: Sequence[U8], *, merges: int = 5, where: str = ""
) -> list[dict[str, Any]]:
    """`match_layers` as plain numbers: for each number of merges allowed {"allowed", "taken", "cost", "rgb_l1",
    "alpha_iou"}."""
    return [
        {"allowed": allowed, "taken": m.merges, "cost": m.cost, "rgb_l1": m.rgb_l1, "alpha_iou": m.alpha_iou}
        for allowed, m in enumerate(match_layers(predicted, true, merges=merges, where=where))
    ]
