"""Shares of sources, counted in tokens: exact, never more than a document off, as the temperature says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringweave.data_pipes.mixture import Mixture, integer_weights, tempered
from ringweave.tokenizers.errors import DataError


def test_integer_weights() -> None:
    assert integer_weights({"b": 0.3, "a": 0.7, "zero": 0.0}) == {"a": 7, "b": 3}
    assert integer_weights({"a": 2.0, "b": 2}) == {"a": 1, "b": 1}
    for bad in ({"a": -1.0}, {"a": float("nan")}, {"a": 0.0}, {}):
        with pytest.raises(DataError):
            integer_weights(bad)


@settings(max_examples=25, deadline=None)
@given(
    weights=st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 10), min_size=1),
    sizes=st.lists(st.integers(1, 50), min_size=200, max_size=200),
)
def test_no_source_gets_more_than_a_document_ahead(weights: dict[str, float], sizes: list[int]) -> None:
    mixture, whole = Mixture(weights), integer_weights(weights)
    total = sum(whole.values())
    for size in sizes:
        mixture.add(mixture.next(), size)
        drawn = mixture.tokens
        shares = {name: w / total * sum(drawn.values()) for name, w in whole.items()}
        assert all(drawn[name] <= shares[name] + 50 for name in whole)
        assert all(drawn[name] >= shares[name] - 50 * (len(whole) - 1) - 1e-6 for name in whole)
        assert Mixture(weights, tokens=drawn).next() == mixture.next()


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=120, max_size=120),
    ends=st.dictionaries(st.sampled_from("abc"), st.integers(0, 100), max_size=2),
)
def test_sources_that_end_leave_the_ratio_of_the_others(sizes: list[int], ends: dict[str, int]) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0, "d": 3.0}
    mixture, closed = Mixture(weights), set()
    for turn, size in enumerate(sizes):
        for name, end in ends.items():
            if turn == end:
                mixture.close(mixture.names.index(name))
                closed.add(name)
        which = mixture.next()
        assert mixture.names[which] not in closed
        again = Mixture(weights, tokens=mixture.tokens, closed=closed)
        assert again.next() == which
        mixture.add(which, size)
    if (
        closed
    ):  # the rest catch up with each other: start from where the last one closed, and go on long enough
        for _ in range(2000):
            mixture.add(mixture.next(), 7)
        drawn = {n: t for n, t in mixture.tokens.items() if n not in closed}
        total, weight = sum(drawn.values()), sum(weights[n] for n in drawn)
        assert all(abs(t - weights[n] / weight * total) <= 50 * len(drawn) for n, t in drawn.items())


def test_when_all_have_ended_none_is_served() -> None:
    mixture = Mixture({"a": 1.0, "b": 1.0})
    mixture.close(0)
    assert mixture.next() == 1
    mixture.close(1)
    assert mixture.next() == -1
    assert mixture.tokens == {"a": 0, "b": 0}


def test_temperature_evens_shares_out_and_stays_exact() -> None:
    weights = {"a": 0.9, "b": 0.1, "none": 0.0}
    assert tempered(weights, 1.0) == weights
    for temperature, ratio in [(2.0, 3.0), (0.5, 81.0), (1000.0, 1.0)]:
        found = tempered(weights, temperature)
        assert found["none"] == 0.0
        assert found["a"] / found["b"] == pytest.approx(ratio, rel=3e-3)
        assert all(value == float(f"{value:.5e}") for value in found.values()), (
            "six digits, so exact anywhere"
        )
        assert max(integer_weights(found).values()) <= 10**9
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="temperature"):
            tempered(weights, bad)
