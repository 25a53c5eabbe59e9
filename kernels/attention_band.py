"""Geometry of a diagonal band within a block: which rows and keys take part, and how to cut it into tiles.

Everywhere: query i sees key j iff lower <= j - i <= upper, None leaving a side open. Pure arithmetic on
shapes (and the small masks of tile edges); no attention is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_ALL = slice(None)


class Tile(NamedTuple):
    """A rectangle of a block: FULL, square and causal, or with a band of its own (a mask has to cut it)."""

    rows: slice
    keys: slice
    first: bool  # the first tile of its rows: its result stands, later ones merge into it
    causal: bool = False
    lower: int | None = None
    upper: int | None = None


def trim_band(
    lq: int, lk: int, lower: int | None, upper: int | None
) -> tuple[slice | None, slice, int | None, int | None]:
    """(rows, keys, lower, upper): the part of an [lq, lk] block in which every row and every key counts.

    The band is given relative to that part, None on each side that does not bind in it. `rows` is None if
    nothing had to be cut away; an empty slice if no row sees any key.
    """
    if lower is None and (upper is None or (upper == 0 and lq == lk)) and lq and lk:
        return None, _ALL, lower, upper  # the two commonest blocks
    low = 1 - lq if lower is None else lower
    up = lk - 1 if upper is None else upper
    # Row i sees keys max(0, i + low) .. min(lk - 1, i + up): not empty iff i + up >= 0 and i + low <= lk - 1.
    first, last = max(0, -up), min(lq, lk - low)
    if low > up or first >= last or not lk:
        return slice(0, 0), slice(0, 0), None, None
    start, stop = max(0, first + low), min(lk, last + up)
    rows, keys = last - first, stop - start
    low, up = low + first - start, up + first - start
    whole = rows == lq and keys == lk
    return (
        None if whole else slice(first, last),
        slice(start, stop),
        low if low > 1 - rows else None,
        up if up < keys - 1 else None,
    )


def cut_into_tiles(
    lq: int, lk: int, lower: int | None, upper: int | None, *, whole: int = 1 << 15, part: int = 1 << 17
) -> Iterator[Tile]:
    """Cut a trimmed block (`trim_band`) into tiles for a kernel that knows only FULL, square causal and masks.

    Work outside the band is left out but for the corners of tiles, and masks stay small: none has more than
    `part` elements, and a block of up to `whole` elements is one tile. Without a lower bound no mask is
    needed at all. Every row of every tile sees a key.
    """
    if (lower is None and upper is None) or (lower is None and upper == 0 and lq == lk):
        yield Tile(slice(0, lq), slice(0, lk), True, causal=upper is not None)
    elif lq * lk <= whole:
        yield Tile(slice(0, lq), slice(0, lk), True, lower=lower, upper=upper)
    elif lower is None:
        assert upper is not None
        yield from _causal_tiles(lq, lk, upper)
    else:
        up = lk - 1 if upper is None else upper
        step = 128 if up - lower < 512 else 256
        for start in range(0, lq, step):
            yield from _chunk_tiles(start, min(start + step, lq), lk, lower, up, part)


def _causal_tiles(lq: int, lk: int, upper: int) -> Iterator[Tile]:
    """Row i sees keys 0 .. i + upper: the first `upper` keys in full, then a square triangle, then full rows."""
    square = lk - upper
    top = slice(0, square)
    if upper:
        yield Tile(top, slice(0, upper), True)
    yield Tile(top, slice(upper, lk), not upper, causal=True)
    if square < lq:
        yield Tile(slice(square, lq), slice(0, lk), True)


def _chunk_tiles(start: int, stop: int, lk: int, lower: int, upper: int, part: int) -> Iterator[Tile]:
    """The tiles of rows start .. stop - 1: the keys all of them see, and the two ragged edges, if large."""
    rows = slice(start, stop)
    first, last = max(0, start + lower), min(lk, stop + upper)
    left = min(last, max(first, stop - 1 + lower))  # keys before it are hidden from the last row
    right = max(first, min(last, start + upper + 1))  # keys from it on are hidden from the first row
    if left == first and right == last:
        yield Tile(rows, slice(first, last), True)
    elif left >= right or (stop - start) * (last - first) <= part:
        shift = start - first
        yield Tile(rows, slice(first, last), True, lower=lower + shift, upper=upper + shift)
    else:
        yield Tile(rows, slice(left, right), True)
        if first < left:
            some = slice(start, min(stop, left - lower))
            yield Tile(some, slice(first, left), False, lower=lower + start - first)
        if right < last:
            some = slice(max(start, right - upper), stop)
            yield Tile(some, slice(right, last), False, upper=upper + some.start - right)


def band_allowed(
    lq: int, lk: int, lower: int | None, upper: int | None, *, device: torch.device | None = None
) -> Tensor:
    """Boolean [lq, lk]: True where query i sees key j."""
    offset = torch.arange(lk, device=device) - torch.arange(lq, device=device)[:, None]
    allowed = torch.ones(lq, lk, dtype=torch.bool, device=device)
    if lower is not None:
        allowed &= offset >= lower
    if upper is not None:
        allowed &= offset <= upper
    return allowed


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat the key or value heads of x [L, Hk, D] to [L, heads, D], each for its group of queries' heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
