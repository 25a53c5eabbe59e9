"""A document that cannot be read is padding, journaled once and replayed; too many of them end the run."""

from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.append(str(Path(__file__).parent))

from token_fixtures import Bytes, setup, texts, write_shard

from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.make_lengths import make_lengths
from ringweave.data_pipes.pack import PackPlan, Piece
from ringweave.data_pipes.packing import materialise
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.quarantine import Failure, Quarantine
from ringweave.data_pipes.stream import PackStream
from ringweave.data_pipes.token_lengths import write_lengths
from ringweave.data_pipes.workers import Task, TokenWorkers
from ringweave.tokenizers.errors import EXIT_DATA, DataError
from ringweave.tokenizers.segment import Document, Segment

FIELDS = ("ids", "doc", "order", "positions", "modality", "targets", "target_modality", "weights", "prefix")


def made_up(piece: Piece) -> Document:
    """40 tokens; the first ten are a condition."""
    ids = np.arange(1, 41, dtype=np.int32) + 100 * piece.sample
    places = np.ones((40, 4), np.int32)
    first = Segment(ids[:10], "text", places[:10], role="condition", weight=0.0)
    return Document(f"k{piece.sample}", (first, Segment(ids[10:], "image", places[10:])))


def failure(sample: int, *, source: str = "text", reason: str = "no") -> Failure:
    return Failure(source, sample, "text-0.tar", f"k{sample}", 512 * sample, reason)


def plan(index: int, samples: list[int]) -> PackPlan:
    return PackPlan(index, 200, tuple(Piece("text", 0, s, 0, 40) for s in samples))


# --- padding ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sets(st.integers(0, 4)), st.data())
def test_a_document_that_is_not_there_is_padding_and_the_others_stay_as_they_are(
    sizes: list[int], gone: set[int], data: Any
) -> None:
    """Slot by slot: nothing moves, and no target points into or out of the hole."""
    starts = [data.draw(st.integers(0, 40 - size)) for size in sizes]
    pieces = tuple(Piece("text", 0, s, a, a + n) for s, (a, n) in enumerate(zip(starts, sizes)))
    packed = PackPlan(0, 220, pieces)
    whole = materialise(packed, made_up)
    holed = materialise(packed, lambda p: None if p.sample in gone else made_up(p))
    hole = np.isin(whole.doc, sorted(gone)) | (whole.doc < 0)
    empty = materialise(PackPlan(0, 220, ()), made_up)
    for field in FIELDS:
        ours, before, none = (getattr(p, field) for p in (holed, whole, empty))
        np.testing.assert_array_equal(ours[~hole], before[~hole], err_msg=field)
        np.testing.assert_array_equal(ours[hole], none[hole], err_msg=field)
    assert (holed.doc[hole] == -1).all()
    assert (holed.targets[hole] == -1).all()
    assert (holed.weights[hole] == 0).all()


def test_a_batch_with_fewer_documents_than_slots_is_filled_with_masked_ones() -> None:
    """An evaluation batch whose last pack has nothing: all ranks take the same number of steps."""
    pack = materialise(PackPlan(7, 32, ()), made_up)
    assert (pack.doc == -1).all()
    assert (pack.targets == -1).all()
    assert not pack.weights.any()


# --- the journal ------------------------------------------------------------------------------------------


def test_a_failure_is_journaled_once_and_the_journal_goes_through_json() -> None:
    held = Quarantine()
    fresh = held.batch(
        [plan(0, [1, 2, 3])], [failure(2), failure(2, reason="other words, later in the alphabet")]
    )
    assert fresh == [failure(2)]
    assert held.batch([plan(1, [2, 4])], []) == []
    assert (("text", 2) in held, ("text", 4) in held, ("image", 2) in held) == (True, False, False)
    assert held.seen == 4, "what is padding anyway is not asked for"
    state = json.loads(json.dumps(held.state()))
    other = Quarantine()
    other.restore(state)
    assert other.state() == held.state()
    assert other.entries == [failure(2)]
    text = json.dumps(other.state())
    for bad in (
        {**state, "more": 1}, {k: v for k, v in state.items() if k != "seen"}, {**state, "failed": 2},
        {**state, "format": 2}, {**state, "entries": [["text", 2]]}, [], {**state, "seen": -1},
    ):  # fmt: skip
        with pytest.raises(DataError, match="malformed"):
            Quarantine().restore(bad)  # type: ignore[arg-type]
    assert json.dumps(other.state()) == text


def test_a_share_of_failures_ends_the_run_with_exit_3() -> None:
    held = Quarantine(max_share=0.1, free=2)
    for n in range(2):
        held.batch([plan(n, [2 * n, 2 * n + 1])], [failure(2 * n)])
    with pytest.raises(DataError, match="3 of 6 documents") as caught:
        held.batch([plan(2, [4, 5])], [failure(4)])
    assert caught.value.exit_code == EXIT_DATA
    assert "text-0.tar#k4: no" in caught.value.why
    rare = Quarantine(max_share=0.1, free=2)
    for n in range(100):
        rare.batch([plan(n, list(range(5 * n, 5 * n + 5)))], [failure(5 * n)] if n % 10 == 0 else [])
    assert len(rare) == 10


def test_failures_in_a_row_end_the_run_also_over_batches_and_restarts() -> None:
    held = Quarantine(max_share=1.0, max_in_a_row=4)
    held.batch([plan(0, [0, 1, 2])], [failure(1), failure(2)])
    held.batch([plan(1, [3, 4, 5])], [failure(3), failure(5)])
    later = Quarantine(max_share=1.0, max_in_a_row=4)
    later.restore(held.state())
    later.batch([plan(2, [6, 7, 5, 8])], [failure(6), failure(7), failure(8)])
    with pytest.raises(DataError, match="5 documents in a row"):
        later.batch([plan(3, [9])], [failure(9)])


# --- a stream with failures -------------------------------------------------------------------------------


@pytest.fixture
def corpus_of(tmp_path: Path) -> Callable[..., Corpus]:
    """40 texts in a store that stalls on the samples named in `stalls`."""
    shard = write_shard(tmp_path / "text-0.tar", texts(40, words=7))
    make_lengths(shard, ("text",), Bytes(), store_tokens=False)

    def corpus(stalls: str) -> Corpus:
        (tmp_path / "stalls").write_text(stalls)
        workers = TokenWorkers(0, setup(reader="StallingReader", file=str(tmp_path / "stalls")))
        return Corpus.open(
            [SourceSpec("text", [shard], ("text",))], manifest_hash="0" * 64, workers=workers, store=False
        )

    return corpus


def stream_of(corpus: Corpus, state: Any = None) -> PackStream:
    if state is not None:
        return PackStream.restore(corpus, state, quarantine=Quarantine(max_share=0.5))
    planner = PackPlanner(lengths=corpus.lengths, weights={"text": 1.0}, seed=2, context=96)
    return PackStream(corpus, planner, Quarantine(max_share=0.5))


def step(stream: PackStream) -> tuple[list[Any], dict[str, Any]]:
    """One batch as a trainer of one rank takes it: packs, and the cursor after it."""
    drawn = stream.next_batch(2)
    assert isinstance(stream.corpus, Corpus)
    failures = []
    wanted = {(p.source, p.sample) for plan in drawn.plans for p in plan.pieces}
    units = stream.corpus.units(w for w in wanted if w not in stream.quarantine)
    for unit, block in zip(units, stream.corpus.make(units)):
        for i, number in enumerate(unit.samples):
            entry = block.entry(i)
            if entry is not None:
                failures.append(stream.corpus.failure(unit, number, entry))
    stream.quarantine.batch(drawn.plans, failures)
    packs = [stream.materialise(p) for p in drawn.plans]
    return packs, {**drawn.state_after, "quarantine": stream.quarantine.state()}


def test_a_stalled_store_is_padding_and_stays_padding_after_a_restart(
    corpus_of: Callable[..., Corpus],
) -> None:
    """The skip is a decision that the cursor replays, also when the sample could be read by then; plans do not move."""
    healthy = [step(stream_of(corpus_of("")))[0]]
    stalled, stream = corpus_of("3 4 11"), None
    stream = stream_of(stalled)
    reference, states = [], []
    for _ in range(12):
        packs, state = step(stream)
        reference.append(packs)
        states.append(json.loads(json.dumps(state)))
    found = {(f.sample, f.key) for f in stream.quarantine.entries}
    assert found == {(3, "text-0-3"), (4, "text-0-4"), (11, "text-0-11")}
    assert all("the store stalled" in f.reason and f.offset > 0 for f in stream.quarantine.entries)
    for pack in (p for packs in reference for p in packs):
        for number, piece in enumerate(pack.plan.pieces):
            padded = piece.sample in (3, 4, 11)
            assert (pack.doc == number).sum() == (0 if padded else len(piece))
    assert [p.plan for p in healthy[0]] == [p.plan for p in reference[0]]
    last = next(n for n, s in enumerate(states) if len(s["quarantine"]["entries"]) == 3)
    resumed = stream_of(corpus_of(""), states[last])
    for expected in reference[last + 1 :]:
        packs, _ = step(resumed)
        for ours, other in zip(packs, expected, strict=True):
            for field in FIELDS:
                np.testing.assert_array_equal(getattr(ours, field), getattr(other, field))
    assert resumed.quarantine.state() == stream.quarantine.state()


def test_restoring_a_cursor_and_saving_it_again_changes_nothing(corpus_of: Callable[..., Corpus]) -> None:
    stream = stream_of(corpus_of("3 4"))
    for _ in range(5):
        _, state = step(stream)
    again = stream_of(corpus_of(""), json.loads(json.dumps(state))).state()
    assert again == state


# --- pictures that are traps ------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def traps() -> dict[str, bytes]:
    """A text chunk that inflates to 64 MiB, and a picture of a billion pixels."""
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "PNG")
    whole = out.getvalue()
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * (64 << 20)))
    header = struct.pack(">IIBBBBB", 40_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return {"chunk": whole[:33] + text + whole[33:], "pixels": bomb + chunk(b"IEND", b"")}


@pytest.mark.parametrize("trap", ["chunk", "pixels"])
def test_a_picture_that_is_a_trap_costs_one_document_and_no_worker(tmp_path: Path, trap: str) -> None:
    whole = io.BytesIO()
    Image.new("RGB", (4, 4)).save(whole, "PNG")
    shard = write_shard(tmp_path / "image-0.tar", [{"png": whole.getvalue()}, {"png": traps()[trap]}] * 2)
    with TokenWorkers(1, setup(), memory_bytes=128 << 20) as workers:
        [block] = workers.run([Task(str(shard), (0, 1, 2), ("image",))])
        assert [e["key"] for e in block.skipped] == ["image-0-1"]
        assert "cannot decode this image" in block.skipped[0]["reason"]
        assert block.skipped[0].get("lasting", True), "it would be the same another day"
        assert (workers.counts.died, workers.counts.killed) == (0, 0)
    # With a length (from its header, say) it is planned, and then it is padding.
    write_lengths(shard, ("image",), "0" * 64, np.asarray([48, 48, 48, 48], np.int64), [])
    corpus = Corpus.open(
        [SourceSpec("image", [shard], ("image",))], manifest_hash="0" * 64, workers=TokenWorkers(0, setup())
    )
    units = corpus.units([("image", 0), ("image", 1)])
    [block] = corpus.make(units)
    entry = block.entry(1)
    assert entry is not None
    assert corpus.failure(units[0], 1, entry).key == "image-0-1"
    assert len(block.document(0)) == 48
