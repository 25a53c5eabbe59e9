"""A large codebook in two blocks: exact, each block small enough, broken pairs are marked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.grid import MISSING
from ringweave.tokenizers.sub_ids import LIMIT, block_sizes, join, split


def test_sizes_of_known_codebooks() -> None:
    assert block_sizes(1024) == (1024,)
    assert block_sizes(LIMIT) == (LIMIT,)
    assert block_sizes(2**18) == (2**6, 2**12)  # Open-MAGVIT2
    assert block_sizes(2**18, coarse=2**9) == (2**9, 2**9)
    assert block_sizes(32_768) == (2**5, 2**10)  # Emu3
    assert block_sizes(64_000) == (32, 2048)  # FSQ [8, 8, 8, 5, 5, 5]: 31.25 coarse ids
    assert block_sizes(2**28) == (LIMIT, LIMIT)


@pytest.mark.parametrize("codebook", [2**18, 64_000, 16_385, 1024])
def test_every_code_comes_back(codebook: int) -> None:
    codes = np.arange(codebook, dtype=np.int32)
    sizes = block_sizes(codebook)
    parts = split(codes, codebook=codebook)
    assert parts.dtype == np.int32 and parts.shape == (codebook, len(sizes))
    assert (parts.max(axis=0) == np.array(sizes) - 1).all()
    assert (join(parts, codebook=codebook) == codes).all()


def test_the_bits_of_a_lookup_free_code() -> None:
    """18 bits as the first 6 and the last 12."""
    code = 0b101101_110010011101
    assert split(np.array([code]), codebook=2**18).tolist() == [[0b101101, 0b110010011101]]


def test_any_codebook_and_any_split() -> None:
    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        codebook = data.draw(st.integers(2, 2**28))
        coarse = data.draw(st.none() | st.integers(max(2, -(-codebook // LIMIT)), min(codebook, LIMIT)))
        sizes = block_sizes(codebook, coarse=coarse)
        assert max(sizes) <= LIMIT and codebook <= int(np.prod(sizes)) < codebook + sizes[-1]
        codes = data.draw(st.lists(st.integers(MISSING, codebook - 1), max_size=20))
        shaped = np.array([*codes, 0, codebook - 1], np.int32)[:, None]
        parts = split(shaped, codebook=codebook, coarse=coarse)
        assert parts.shape == (*shaped.shape, len(sizes))
        assert (parts < np.array(sizes)).all()
        assert ((parts == MISSING) == (shaped == MISSING)[..., None]).all()
        assert (join(parts, codebook=codebook, coarse=coarse) == shaped).all()

    check()


def test_broken_pairs_are_missing() -> None:
    book = 64_000
    pairs = np.array([[0, 2048], [32, 0], [-1, 5], [5, -1], [31, 600], [31, 511], [2**62, 2**62]], np.int64)
    assert join(pairs, codebook=book).tolist() == [*[MISSING] * 5, 63_999, MISSING]
    with pytest.raises(ValueError, match="sub-ids must be"):
        join(np.zeros((4, 3), np.int32), codebook=book)


def test_what_does_not_fit_is_refused() -> None:
    for code in (64_000, -2):
        with pytest.raises(VocabularyError, match="do not fit a codebook of 64000"):
            split(np.array([code]), codebook=64_000)
    for sizes in ({"codes": 2**29}, {"codes": 2**18, "coarse": 2}, {"codes": 0}, {"codes": 9, "coarse": 1}):
        with pytest.raises(VocabularyError, match="codebook of"):
            block_sizes(**sizes)
