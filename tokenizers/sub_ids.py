"""Codebooks too large for one block, as two sub-ids: pure functions.

A head over 2^18 codes costs more than the model around it. As in Open-MAGVIT2 (Luo et al., 2024) such a code is
written as two smaller ones, coarse first, of unequal sizes: 2^6 and 2^12 for 2^18. The split is arithmetic
(code = coarse * fine_size + fine), so for a lookup-free codebook it is a split of its bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.grid import MISSING

#: A block holds at most this many codes.
LIMIT = 16_384
I32 = NDArray[np.int32]


def block_sizes(codes: int, *, coarse: int | None = None) -> tuple[int, ...]:
    """Sizes of the blocks of a codebook: (codes,) up to LIMIT, else (coarse, fine) with coarse * fine >= codes.

    coarse: wanted size of the first block, which gets smaller where fewer do. By default a third of the bits is
    coarse, or more where fine would pass LIMIT.
    VocabularyError when a block would pass LIMIT or hold no code.
    """
    if codes < 1 or (coarse is not None and not 1 < coarse <= codes):
        raise VocabularyError(f"cannot split a codebook of {codes} codes with {coarse} coarse ids")
    if coarse is None:
        if codes <= LIMIT:
            return (codes,)
        bits = (codes - 1).bit_length()
        fine = min(1 << -(-2 * bits // 3), LIMIT)
    else:
        fine = -(-codes // coarse)
    sizes = (-(-codes // fine), fine)
    if max(sizes) > LIMIT:
        raise VocabularyError(
            f"a codebook of {codes} codes does not fit two blocks of at most {LIMIT}",
            why=f"the blocks would have {sizes[0]} and {sizes[1]} ids",
            fix="give another size of the coarse block, or use a smaller codebook",
        )
    return sizes


def split(codes: I32, *, codebook: int, coarse: int | None = None) -> I32:
    """Codes [...] of a codebook -> sub-ids int32 [..., 1 or 2], as `block_sizes` says; MISSING stays MISSING.

    VocabularyError for a code outside the codebook.
    """
    sizes, codes = block_sizes(codebook, coarse=coarse), np.asarray(codes)
    if codes.size and (codes.min() < MISSING or codes.max() >= codebook):
        raise VocabularyError(
            f"codes from {codes.min()} to {codes.max()} do not fit a codebook of {codebook}"
        )
    if len(sizes) == 1:
        return codes[..., None].astype(np.int32)
    pair = np.stack([codes // sizes[1], codes % sizes[1]], axis=-1)
    return np.where(codes[..., None] == MISSING, MISSING, pair).astype(np.int32)


def join(sub_ids: I32, *, codebook: int, coarse: int | None = None) -> I32:
    """Inverse of `split`: [..., 1 or 2] -> [...]. Built for model output: no value of a sub-id makes it raise.

    A pair with a part outside its block, or that stands for no code of the codebook, is MISSING.
    """
    sizes, parts = block_sizes(codebook, coarse=coarse), np.asarray(sub_ids).astype(np.int64)
    if parts.shape[-1:] != (len(sizes),):
        raise ValueError(f"sub-ids must be [..., {len(sizes)}], got {list(parts.shape)}")
    fits = ((parts >= 0) & (parts < np.array(sizes))).all(axis=-1)
    code = parts[..., 0] if len(sizes) == 1 else parts[..., 0] * sizes[1] + parts[..., 1]
    return np.where(fits & (code < codebook), code, MISSING).astype(np.int32)
