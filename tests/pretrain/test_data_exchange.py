"""Ranks of one dp index decode each document once between them and read what one process alone would."""

from __future__ import annotations

import hashlib
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "data_pipes"))

from token_fixtures import Bytes, setup, texts, write_shard

from ringweave.data_pipes.corpus import Corpus, SourceSpec, Unit
from ringweave.data_pipes.make_lengths import make_lengths
from ringweave.data_pipes.pack import Pack, packs_for_rank
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.quarantine import Quarantine
from ringweave.data_pipes.stream import PackStream
from ringweave.data_pipes.token_lengths import write_lengths
from ringweave.data_pipes.workers import TokenWorkers
from ringweave.parallel.spawn import run_ranks
from ringweave.pretrain.batch_reader import BatchReader
from ringweave.pretrain.data_exchange import DocumentExchange, Gather, data_groups, units_mark
from ringweave.pretrain.prefetch import Prefetcher, Stopped
from ringweave.tokenizers.errors import DataError, UserError

TEXT, HASH, COUNT = ("text",), "0" * 64, 4
FIELDS = ("ids", "doc", "order", "positions", "modality", "targets", "target_modality", "weights", "prefix")


def data(tmp_path: Path, *, orders: dict[int, str] | None = None, count: int = 150) -> Path:
    """Two shards with lengths and no tokens. Orders keep the lengths of the texts they stand for."""
    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(2):
        shard = write_shard(folder / f"text-{n}.tar", texts(count, words=8, tag=f"{n}:"))
        make_lengths(shard, TEXT, Bytes(), store_tokens=False)
        if orders and n == 0:
            sizes = [len(m["txt"]) for m in texts(count, words=8, tag=f"{n}:")]
            orders = {i: order.ljust(sizes[i]) for i, order in orders.items()}
            for path in folder.glob("text-0.*"):
                path.unlink()
            write_shard(shard, texts(count, words=8, orders=orders, tag=f"{n}:"))
            write_lengths(shard, TEXT, HASH, np.asarray(sizes, np.int64), [])
    return folder


def own_copy(folder: Path, rank: int) -> Path:
    """A folder of the rank's own, as on a host whose disk nobody else sees."""
    mine = folder.with_name(f"rank-{rank}")
    if not mine.exists():
        shutil.copytree(folder, mine)
    return mine


def stream_of(folder: Path, log: str, *, workers: int = 0, share: float = 0.5) -> PackStream:
    corpus = Corpus.open(
        [SourceSpec("text", [folder / "text-0.tar", folder / "text-1.tar"], TEXT)],
        manifest_hash=HASH, workers=TokenWorkers(workers, setup(log), timeout_s=10.0),
    )  # fmt: skip
    planner = PackPlanner(lengths=corpus.lengths, weights={"text": 1.0}, seed=2, context=256)
    return PackStream(corpus, planner, Quarantine(max_share=share, free=4))


def hashed(pack: Pack) -> str:
    digest = hashlib.sha256(repr(pack.plan).encode())
    for field in FIELDS:
        digest.update(getattr(pack, field).tobytes())
    return digest.hexdigest()


def alone(folder: Path, log: Path, steps: int) -> tuple[list[list[str]], dict[str, Any]]:
    """Hashes of all packs of each batch, read by one process, and its journal at the end."""
    reader = BatchReader(stream_of(own_copy(folder, 99), str(log)), count=COUNT, mine=range(COUNT))
    batches = [reader(threading.Event()) for _ in range(steps)]
    assert all(b is not None for b in batches)
    return [[hashed(p) for p in b.packs] for b in batches if b is not None], reader.stream.quarantine.state()


def read_shared(
    folder: str, log: str, dp: int, steps: int, workers: int, depth: int, share: float = 0.5
) -> dict[str, Any]:
    """On one rank of many: what it read, what it made, what it knows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = np.arange(world).reshape(dp, world // dp)
    exchange, everyone = data_groups(mesh)
    stream = stream_of(own_copy(Path(folder), rank), f"{log}-{rank}", workers=workers, share=share)
    mine = packs_for_rank(0, COUNT, rank // (world // dp), dp)
    reader = BatchReader(stream, count=COUNT, mine=mine, exchange=exchange, everyone=everyone)
    source = Prefetcher(reader, depth=depth, limit=steps + 3)
    try:
        batches = [source.next() for _ in range(steps)]
    except UserError as error:
        return {"error": f"{type(error).__name__}: {error.what}", "taken": source.taken}
    began = time.monotonic()
    stopped = source.stop(timeout=20)
    assert isinstance(stream.corpus, Corpus)
    assert stream.corpus.workers is not None
    stream.corpus.workers.close()
    return {
        "packs": [[hashed(p) for p in b.packs] for b in batches],
        "journal": batches[-1].state_after["quarantine"],
        "stopped": stopped,
        "seconds": time.monotonic() - began,
        "received": exchange.gather.received,
    }


def made_by(log: Path, ranks: list[int]) -> list[Counter[str]]:
    """Texts that each of these ranks tokenized."""
    return [
        Counter(line.partition(" ")[2] for line in Path(f"{log}-{r}").read_text().splitlines()) for r in ranks
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "dp", "workers", "depth"), [(4, 1, 0, 0), (4, 2, 0, 2), (3, 1, 1, 1), (2, 2, 0, 2), (8, 1, 0, 1)]
)  # fmt: skip
def test_shared_reading_equals_reading_alone_and_decodes_nothing_twice(
    tmp_path: Path, world: int, dp: int, workers: int, depth: int
) -> None:
    """Over more than an epoch, on hosts that do not see each other's disks."""
    folder, log, steps = data(tmp_path, count=100 * world), tmp_path / "log", 8 * world
    expected, journal = alone(folder, tmp_path / "alone", steps)
    results = run_ranks(world, read_shared, str(folder), str(log), dp, steps, workers, depth)
    size = world // dp
    for rank, found in enumerate(results):
        mine = packs_for_rank(0, COUNT, rank // size, dp)
        assert found["packs"] == [[batch[i] for i in mine] for batch in expected]
        assert found["journal"] == journal
        assert found["stopped"]
    for first in range(0, world, size):
        made = made_by(log, list(range(first, first + size)))
        together = sum(made, Counter())
        assert set(together.values()) == {1}, "no document is decoded twice in a group"
        tokens = [sum(len(t) * n for t, n in m.items()) for m in made]
        assert min(tokens) > 0.4 * sum(tokens) / size, f"nobody idles: {tokens}"


@pytest.mark.slow
@pytest.mark.parametrize("dp", [1, 2])
def test_what_one_rank_cannot_decode_is_padding_on_all_ranks(tmp_path: Path, dp: int) -> None:
    orders = {5: "undecodable", 17: "mistake", 90: "segfault"}
    folder, log, steps = data(tmp_path, orders=orders), tmp_path / "log", 20
    results = run_ranks(4, read_shared, str(folder), str(log), dp, steps, 1, 1)
    journals = [r["journal"] for r in results]
    assert all(j == journals[0] for j in journals)
    entries = journals[0]["entries"]
    assert {e[1] for e in entries} == set(orders)
    assert all(e[2] == "text-0.tar" and e[4] > 0 for e in entries)
    size = 4 // dp
    for first in range(0, 4, size):
        group = [r["packs"] for r in results[first : first + size]]
        assert all(packs == group[0] for packs in group)
    if dp == 1:
        (tmp_path / "two").mkdir()
        whole = run_ranks(1, read_shared, str(folder), str(tmp_path / "one"), 1, steps, 1, 0)
        assert whole[0]["packs"] == results[0]["packs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("orders", "error"),
    [
        ({40: "foreign"}, "VocabularyError: not of this vocabulary"),
        (dict.fromkeys(range(60), "undecodable"), "documents cannot be read"),
    ],
)
def test_an_error_of_one_rank_ends_all_ranks_at_the_same_batch(
    tmp_path: Path, orders: dict[int, str], error: str
) -> None:
    folder = data(tmp_path, orders=orders)
    results = run_ranks(4, read_shared, str(folder), str(tmp_path / "log"), 2, 60, 0, 2, 0.02)
    assert all(error in r.get("error", "") for r in results), results
    assert len({r["taken"] for r in results}) == 1


def different_batches() -> str:
    """Rank 1 asks for other documents than the others."""
    group = dist.new_group(list(range(dist.get_world_size())), backend="gloo")
    exchange = DocumentExchange(group, rank_in_group=dist.get_rank(), size=dist.get_world_size())
    asked = 8 + (dist.get_rank() == 1)
    units = [Unit("text", 0, 64 * n, 64, (64 * n,), 100, 2) for n in range(asked)]
    outcome = exchange.share(units, lambda some: [])
    assert outcome.error is not None
    return f"{outcome.error.what}; {outcome.error.where}"


def other_tags() -> str:
    gather = Gather(dist.new_group([0, 1], backend="gloo"), rank=dist.get_rank(), size=2)
    assert gather(b"x" * (1 + dist.get_rank())) == [b"x", b"xx"]
    assert gather(b"") == [b"", b""]
    with pytest.raises(DataError, match="different batches"):
        gather(b"", tag=dist.get_rank())
    return "seen"


@pytest.mark.slow
def test_ranks_that_read_different_batches_are_told_and_do_not_hang() -> None:
    found = run_ranks(3, different_batches)
    assert all("different batches" in text for text in found)
    assert [t.partition("; ")[2][:6] for t in found] == ["rank 0", "rank 1", "rank 2"]
    assert run_ranks(2, other_tags) == ["seen", "seen"]


def stop_in_the_middle(folder: str, log: str) -> tuple[bool, float, int]:
    """Every rank stops after the same step, at another moment, with batches on their way."""
    rank = dist.get_rank()
    exchange, everyone = data_groups(np.arange(4).reshape(2, 2))
    stream = stream_of(own_copy(Path(folder), rank), f"{log}-{rank}")
    mine = packs_for_rank(0, COUNT, rank // 2, 2)
    reader = BatchReader(stream, count=COUNT, mine=mine, exchange=exchange, everyone=everyone)
    source = Prefetcher(reader, depth=3)
    for step in range(5):
        source.next()
        time.sleep(0.05 * ((rank + step) % 3))
    time.sleep(0.2 * rank)
    began = time.monotonic()
    stopped = source.stop(timeout=20)
    with pytest.raises(Stopped):
        source.next()
    return stopped, time.monotonic() - began, source.taken


@pytest.mark.slow
def test_stopping_joins_on_every_rank_wherever_its_thread_is(tmp_path: Path) -> None:
    folder = data(tmp_path, orders={n: "slow 0.02" for n in range(40) if n % 8})
    found = run_ranks(4, stop_in_the_middle, str(folder), str(tmp_path / "log"))
    assert [stopped for stopped, _, _ in found] == [True] * 4
    assert max(seconds for _, seconds, _ in found) < 10


# --- pure -------------------------------------------------------------------------------------------------


units_of = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 5000)), min_size=1, max_size=60, unique_by=lambda u: u[0]
).map(lambda rows: [Unit("text", 0, 64 * n, 64, (64 * n,), tokens, min(tokens, 9)) for n, tokens in rows])


@settings(max_examples=80, deadline=None)
@given(st.lists(units_of, min_size=1, max_size=4), st.integers(1, 8), st.sampled_from(["tokens", "count"]))
def test_units_are_shared_out_alike_on_all_ranks_and_evenly(
    batches: list[list[Unit]], size: int, by: str
) -> None:
    ranks = [DocumentExchange(rank_in_group=r, size=size, by=by) for r in range(size)]
    maker: dict[tuple[str, int, int], int] = {}
    for batch, units in enumerate(batches):
        owners = [rank.assign(units) for rank in ranks]
        assert all(o == owners[0] for o in owners)
        for unit, owner in zip(units, owners[0], strict=True):
            assert maker.setdefault(unit.part, owner) == owner, "a part stays with the rank that made it"
        if batch == 0:
            cost = [u.part_tokens + 32 if by == "tokens" else 1 for u in units]
            loads = [sum(c for c, o in zip(cost, owners[0]) if o == r) for r in range(size)]
            assert max(loads) <= sum(cost) / size + max(cost), "Graham's bound for any greedy assignment"


def test_marks_tell_batches_apart() -> None:
    units = [Unit("text", 0, 0, 64, (1, 2), 100, 9)]
    assert units_mark(units) == units_mark(list(units))
    assert units_mark(units) != units_mark([Unit("text", 0, 0, 64, (1, 3), 100, 9)])
    with pytest.raises(ValueError, match="tokens or count"):
        DocumentExchange(by="size")


def test_one_process_needs_no_group(tmp_path: Path) -> None:
    """And a corpus that makes documents up goes through the same reader."""
    folder = data(tmp_path, count=30)
    hashes, journal = alone(folder, tmp_path / "log", 5)
    again, _ = alone(folder, tmp_path / "log", 5)
    assert hashes == again
    assert journal["entries"] == []
    from ringweave.pretrain.synthetic import SyntheticCorpus

    corpus = SyntheticCorpus(vocab=50)
    planner = PackPlanner(lengths=corpus.lengths, weights={"text": 1.0}, seed=2, context=64)
    other = PackPlanner(lengths=corpus.lengths, weights={"text": 1.0}, seed=2, context=64)
    reader = BatchReader(PackStream(corpus, planner), count=4, mine=range(1, 3))
    batch = reader(threading.Event())
    assert batch is not None
    plain = PackStream(corpus, other)
    plans = plain.plans(4)
    assert [hashed(p) for p in batch.packs] == [hashed(plain.materialise(plans[i])) for i in (1, 2)]
    assert batch.plans == plans
