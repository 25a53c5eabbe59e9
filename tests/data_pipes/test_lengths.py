"""Token lengths by source and shard, and the digest that a cursor is checked against."""

from __future__ import annotations

import numpy as np
import pytest

from ringweave.data_pipes.lengths import Lengths, Table, as_lengths, lengths_digest
from ringweave.tokenizers.errors import DataError


def test_a_table_gives_counts_and_lengths_by_shard() -> None:
    table: Lengths = Table(
        {"b": [np.asarray([1, 2]), np.asarray([], np.int64), np.asarray([3])], "a": np.ones(4, np.int32)}
    )
    assert list(table.names) == ["a", "b"]
    assert table.counts("b").tolist() == [2, 0, 1]
    assert table.counts("a").tolist() == [4]
    assert table.of("b", 2).tolist() == [3]
    assert table.of("a", 0).dtype == np.int64
    assert not table.whole("b")
    assert Table({"b": np.ones(2, np.int64)}, whole=["b"]).whole("b")
    assert as_lengths(table) is table


def test_lengths_digest_sees_values_and_where_they_belong() -> None:
    a, b = np.asarray([1, 2], np.int64), np.asarray([3], np.int64)
    variants = [
        {"x": a, "y": b}, {"x": b, "y": a}, {"x": a}, {"xy": a, "": b}, {"x": np.concatenate([a, b])}, {"x": [a, b]},
    ]  # fmt: skip
    assert len({lengths_digest(v) for v in variants}) == len(variants)
    assert lengths_digest({"x": a, "y": b}) == lengths_digest({"y": b, "x": a.astype(np.int32)})
    assert lengths_digest(Table({"x": a}, whole=["x"])) != lengths_digest({"x": a})


@pytest.mark.parametrize("bad", [np.asarray([1.5]), np.asarray([-1]), np.ones((2, 2), np.int64)])
def test_what_is_no_length_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(DataError, match="lengths of source 'x'"):
        Table({"x": bad})
