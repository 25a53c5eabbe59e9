"""Lanes: how many there are, what they share out, and how little their state takes."""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringweave.data_pipes.cursor_codec import decode, encode, load, pack_varints, unpack_varints
from ringweave.data_pipes.lanes import LANES, Lane, auto_lanes
from ringweave.data_pipes.lengths import Table
from ringweave.data_pipes.mixture import Mixture
from ringweave.data_pipes.order import Orders
from ringweave.data_pipes.planner import PackPlanner

LIMIT = 16 * 1024


def lane_of(sizes: np.ndarray, *, number: int = 0, lanes: int = 1, context: int = 50, bins: int = 4) -> Lane:
    lane = Lane(number, Orders(Table({"a": sizes, "b": sizes[::-1]}), seed=1, lanes=lanes, run=2, block=3))
    lane.enter(Mixture({"a": 1.0, "b": 2.0}), [0, 1], context=context, bins=bins, close_at=0.9)
    return lane


def waiting(lane: Lane) -> list[list[tuple[Any, ...]]]:
    """Open packs and pending pieces, blocks by their name, draws left out (they are numbered anew)."""
    groups = [*lane.bins.packs, list(lane.pending)]
    return [[(p[1], p[2].epoch, p[2].number, *p[3:]) for p in group] for group in groups]


# --- how many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "lanes"),
    [(0, 1), (100, 1), (2000, 6), (5000, 12), (61_439, 180), (61_440, 240), (10**7, 240)],
)
def test_lanes_follow_the_number_of_samples(samples: int, lanes: int) -> None:
    class Counts(Table):
        def counts(self, name: str, /) -> np.ndarray:
            return np.asarray([samples // 2, samples - samples // 2])

    assert auto_lanes(Counts({"a": []})) == lanes
    assert lanes in LANES


def test_sources_read_by_whole_shards_get_a_lane_a_shard() -> None:
    shards = [np.ones(1000, np.int64)] * 13
    assert auto_lanes(Table({"a": shards}, whole=["a"])) == 12
    assert auto_lanes(Table({"a": shards})) == 48
    assert auto_lanes(Table({"a": [np.ones(10, np.int64)]}, whole=["a"])) == 1


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    lanes=st.integers(1, 8),
    run=st.integers(1, 9),
    whole=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_epoch_over_all_lanes_is_exactly_the_data(
    shards: list[int], lanes: int, run: int, whole: bool, seed: int
) -> None:
    parts = [1 + (np.arange(count) * 7 + at) % 11 for at, count in enumerate(shards)]
    plan = PackPlanner(
        lengths=Table({"a": parts}, whole=["a"] if whole else []), weights={"a": 1.0}, seed=seed, context=24,
        lanes=lanes, run=run, block=3, epochs=2,
    )  # fmt: skip
    packs = iter(lambda: plan.plans(1), None)
    found = Counter((p.epoch, p.sample) for (pack,) in packs for p in pack.pieces)
    assert found == Counter((e, s) for e in range(2) for s in range(sum(shards)))


# --- state -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), max_size=60))
def test_varints_hold_any_number(values: list[int]) -> None:
    assert unpack_varints(pack_varints(np.asarray(values, np.int64))).tolist() == values


def test_varints_refuse_what_is_cut_or_too_large() -> None:
    for bad in (b"\x80", b"\x01\xff", b"\xff" * 9 + b"\x01"):
        with pytest.raises(ValueError):
            unpack_varints(bad)


@settings(max_examples=40, deadline=None)
@given(
    packs=st.integers(0, 40),
    bins=st.integers(1, 6),
    lanes=st.integers(1, 3),
    split=st.booleans(),
    back=st.booleans(),
)
def test_a_lane_comes_back_from_its_text(packs: int, bins: int, lanes: int, split: bool, back: bool) -> None:
    sizes = 1 + np.arange(30) * 13 % (170 if split else 40)
    lane = lane_of(sizes, number=lanes - 1, lanes=lanes, bins=bins)
    emitted = [lane.next() for _ in range(packs)]
    if back:
        lane.hand_back([p for p in emitted[-2:] if p is not None])
    text = encode(lane.snapshot())
    again = lane_of(sizes, number=lanes - 1, lanes=lanes, bins=bins)
    orders = again._orders
    snapshot, blocks = decode(text, lanes - 1, orders)
    fresh = Lane(lanes - 1, orders)
    load(fresh, snapshot, blocks)
    tokens = {"ab"[s]: t for s, t in snapshot.tokens.items()}
    fresh.enter(Mixture({"a": 1.0, "b": 2.0}, tokens=tokens), [0, 1], context=50, bins=bins, close_at=0.9)
    fresh.bins.refill([list(p) for p in snapshot.packs])
    assert waiting(fresh) == waiting(lane)
    assert encode(fresh.snapshot()) == text
    for _ in range(10):
        ours, theirs = fresh.next(), lane.next()
        assert ours is not None and theirs is not None
        assert [(p[1], p[2].epoch, p[2].number, *p[3:]) for p in ours] == [
            (p[1], p[2].epoch, p[2].number, *p[3:]) for p in theirs
        ]


@settings(max_examples=120, deadline=None)
@given(at=st.integers(0, 10**6), byte=st.integers(1, 255))
def test_a_changed_text_is_refused_or_harmless(at: int, byte: int) -> None:
    """Any byte of the numbers may be wrong: that ends in ValueError, never in another exception."""
    lane = lane_of(1 + np.arange(30) * 13 % 90, bins=3)
    for _ in range(9):
        lane.next()
    raw = bytearray(zlib.decompress(base64.b64decode(encode(lane.snapshot()))))
    raw[at % len(raw)] ^= byte
    text = base64.b64encode(zlib.compress(bytes(raw))).decode()
    try:
        snapshot, blocks = decode(text, 0, lane._orders)
        load(Lane(0, lane._orders), snapshot, blocks)
    except (ValueError, OverflowError):
        return
    for pieces in [*snapshot.packs, snapshot.pending]:
        for _, source, block, offset, start, end in pieces:
            assert 0 <= start < end <= block.sizes[offset]
            assert source in (0, 1)


def test_a_text_that_inflates_without_end_is_refused() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(2**26 + 1))).decode()
    with pytest.raises(ValueError, match="too long"):
        decode(bomb, 0, Orders(Table({"a": np.ones(3, np.int64)}), seed=1, lanes=1))


@pytest.mark.slow
@pytest.mark.parametrize("short", [150, 600])
def test_a_lane_takes_at_most_16_kib_at_a_million_tokens(short: int) -> None:
    """Eight open packs of 1M tokens, each kept open by a large document and filled with small ones."""
    rng = np.random.default_rng(0)
    lengths = {
        "small": [rng.integers(short // 2, short * 2, 1000) for _ in range(100)],
        "large": rng.integers(400_000, 700_000, 4000),
    }
    plan = PackPlanner(
        lengths=lengths,
        weights={"small": 0.3, "large": 0.7},
        seed=1,
        context=2**20,
        lanes=1,
        batch=8,
        window=64,
    )
    largest = pieces = 0
    for _ in range(3):
        for _ in range(20):
            plan.next()
        # What a stage change hands back is the most a lane ever holds: open packs and the rest of a window.
        again = PackPlanner.restore(json.loads(json.dumps(plan.state())), lengths=lengths)
        pieces = max(pieces, len(again.waiting()))
        again.switch(context=2**20)
        assert len(again.waiting()) == len(plan.waiting())
        largest = max(largest, *(len(text) for text in again.state()["cursors"]))
    assert pieces > 10_000
    assert largest <= LIMIT, f"{largest} bytes for {pieces} pieces"
