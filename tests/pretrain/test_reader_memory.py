"""What a reader holds does not grow with what it has read: the counted form of tests/prove/data_memory.py."""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[1] / "data_pipes"))

from token_fixtures import Bytes, setup, texts, write_shard

from ringweave.data_pipes import corpus as corpus_module
from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.make_lengths import make_lengths
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.stream import PackStream
from ringweave.data_pipes.workers import TokenWorkers
from ringweave.pretrain.batch_reader import BatchReader
from ringweave.pretrain.data_exchange import DocumentExchange

SHARDS, SAMPLES, EPOCHS, COUNT, OPEN, PARTS = 8, 70, 4, 2, 3, 6


def held() -> Counter[str]:
    """Objects of the package that are alive, by kind."""
    gc.collect()
    kinds = [type(o) for o in gc.get_objects()]
    return Counter(k.__name__ for k in kinds if str(k.__module__).startswith("ringweave"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stored", "made"])
def test_nothing_is_held_for_each_document_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, way: str
) -> None:
    """The most of each kind of object, of open files and of memory maps: no more in the last epoch than in the
    second. Eight shards, of which three may be open."""
    monkeypatch.setattr(corpus_module, "_OPEN_SHARDS", OPEN)
    monkeypatch.setattr(corpus_module, "_OPEN_PARTS", PARTS)
    for n in range(SHARDS):
        shard = write_shard(tmp_path / f"text-{n:02d}.tar", texts(SAMPLES, words=20, tag=f"{n}:"))
        make_lengths(shard, ("text",), Bytes(), store_tokens=way == "stored")
    corpus = Corpus.open(
        [SourceSpec("text", sorted(tmp_path.glob("*.tar")), ("text",))], manifest_hash="0" * 64, store=False,
        workers=TokenWorkers(0, setup()),
    )  # fmt: skip
    planner = PackPlanner(
        lengths=corpus.lengths, weights={"text": 1.0}, seed=1, context=512, batch=COUNT, lanes=3, window=4 * COUNT,
        bins=4, epochs=EPOCHS,
    )  # fmt: skip
    exchange = DocumentExchange()
    reader = BatchReader(PackStream(corpus, planner), count=COUNT, mine=range(COUNT), exchange=exchange)
    most: list[Counter[str]] = [Counter() for _ in range(EPOCHS)]
    me, stop = psutil.Process(), threading.Event()
    gc.collect()
    gc.freeze()  # what there is already is not looked at
    request.addfinalizer(gc.unfreeze)
    batch, steps = reader(stop), 0
    while batch is not None:
        epoch, steps = max(p.epoch for plan in batch.plans for p in plan.pieces), steps + 1
        if steps % 10 == 0:
            found = held()
            found["open files"] = me.num_fds() if hasattr(me, "num_fds") else me.num_handles()
            found["maps of data"] = sum(str(tmp_path) in m.path for m in me.memory_maps(grouped=False))
            most[epoch] |= found
        batch = reader(stop)
    assert reader.ended
    assert steps > 25 * EPOCHS
    assert min(len(corpus._tokens._held), SHARDS) == OPEN
    assert len(corpus._sizes._held) == SHARDS
    assert len(corpus._parts._held) <= PARTS
    parts = sum(len(corpus._measures("text", n)[1]) - 1 for n in range(SHARDS))
    assert len(exchange._maker) == parts, "one number for each part of the data, however often it is read"
    grown = {kind: (most[1][kind], n) for kind, n in most[-1].items() if n > most[1][kind] + 2}
    assert grown == {}, f"kind: (most in the second epoch, most in the last): {grown}"
    made = corpus.read.made / (EPOCHS * SHARDS * SAMPLES)
    assert made == 0 if way == "stored" else 0.95 < made <= 1, "two epochs may meet in a batch"
