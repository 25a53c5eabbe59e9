"""Time from start to the first batch of a run that resumes at 1 %, 50 % and 99 % of an epoch of a 2 GB set of a million
samples, beside what webdataset does in its place: read and drop the samples that were trained on.

Ours opens lengths, restores the cursor (lanes, mixture, open packs, balancing window), reads the documents of the next
global batch out of the shards, tokenizes and packs them. webdataset goes through the tars in sequence without decoding
what it drops and then tokenizes as many documents. Shards are in the page cache. The first batch is checked against the
plan of the run that was not interrupted.
"""

from __future__ import annotations

import itertools
import json
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "data_pipes"))
import _harness as bench
from token_fixtures import Bytes, setup

from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.index import build_index, write_index
from ringweave.data_pipes.pack import PackPlan
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.stream import PackStream
from ringweave.data_pipes.token_lengths import write_lengths
from ringweave.data_pipes.workers import TokenWorkers
from ringweave.pretrain.batch_reader import BatchReader

CLAIM = "a run resumes within 2 s wherever it stood; dropping what was passed takes longer, and ever longer"
PLAN, HASH = ("text",), "0" * 64
COUNT, CONTEXT = 8, 4096
PLACES = (0.01, 0.5, 0.99)
SECONDS = 2.0
BLOCK = tarfile.BLOCKSIZE


def make_shards(folder: Path, *, shards: int, samples: int) -> list[Path]:
    """Indexed shards of texts of 1,100 to 1,500 letters (2 KiB of tar each) with their lengths, without tokens."""
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, 1 << 20).astype(np.uint8).tobytes()
    paths = []
    for n in range(shards):
        path = folder / f"text-{n:04d}.tar"
        sizes = rng.integers(1100, 1500, samples)
        starts = rng.integers(0, len(letters) - 1500, samples)
        with open(path, "wb") as file:
            for i, (size, start) in enumerate(zip(sizes.tolist(), starts.tolist())):
                info = tarfile.TarInfo(f"{n:04d}{i:06d}.txt")
                info.size = size
                file.write(
                    info.tobuf(tarfile.USTAR_FORMAT) + letters[start : start + size] + bytes(-size % BLOCK)
                )
            file.write(bytes(2 * BLOCK))
        write_index(path, build_index(path))
        write_lengths(path, PLAN, HASH, sizes.astype(np.int64), [])
        paths.append(path)
    return paths


def open_corpus(shards: list[Path]) -> Corpus:
    """The corpus without stored tokens: the first batch is decoded and tokenized in this process."""
    return Corpus.open(
        [SourceSpec("text", shards, PLAN)], manifest_hash=HASH, workers=TokenWorkers(0, setup()), store=False
    )


def interrupted(shards: list[Path]) -> dict[float, tuple[str, list[PackPlan]]]:
    """place -> (cursor as it is saved, plans of the batch that follows), of one run from the start."""
    corpus = open_corpus(shards)
    planner = PackPlanner(
        lengths=corpus.lengths, weights={"text": 1.0}, seed=1, context=CONTEXT, batch=COUNT, window=None
    )
    stream, total = PackStream(corpus, planner), sum(int(n) for n in corpus.lengths.counts("text"))
    found, read = {}, 0
    for place in PLACES:
        while read < place * total:
            batch = stream.next_batch(COUNT)
            read += sum(p.start == 0 for plan in batch.plans for p in plan.pieces)
        text = json.dumps({**batch.state_after})
        batch = stream.next_batch(COUNT)  # the next place is further on
        read += sum(p.start == 0 for plan in batch.plans for p in plan.pieces)
        found[place] = text, batch.plans
    return found


def ours(shards: list[Path], cursor: str, expected: list[PackPlan]) -> float:
    """Seconds from nothing to the packs of the first batch."""
    started = time.perf_counter()
    stream = PackStream.restore(open_corpus(shards), json.loads(cursor))
    batch = BatchReader(stream, count=COUNT, mine=range(COUNT))(threading.Event())
    seconds = time.perf_counter() - started
    assert batch is not None
    assert batch.plans == expected
    assert all((pack.doc >= 0).sum() == pack.plan.tokens for pack in batch.packs)
    return seconds


def theirs(shards: list[Path], passed: int, documents: int) -> float:
    """Seconds in which webdataset has dropped `passed` samples and tokenized the next `documents`."""
    import webdataset

    tokenizers = Bytes()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples: Any = iter(webdataset.WebDataset([str(p) for p in shards], shardshuffle=False))
    made = [
        tokenizers.text_segment(sample["txt"].decode())
        for sample in itertools.islice(samples, passed, passed + documents)
    ]
    seconds = time.perf_counter() - started
    assert len(made) == documents
    return seconds


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    if (reason := bench.missing("webdataset")) is not None:
        bench.skip(CLAIM, reason)
        return
    count, samples = (4, 500) if options.tiny else (100, 10_000)
    bench.one_thread()
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder), shards=count, samples=samples)
        size = sum(p.stat().st_size for p in shards)
        cursors = interrupted(shards)
        sides, names = [], []
        for place, (cursor, plans) in cursors.items():
            documents = sum(len(plan.pieces) for plan in plans)
            passed = min(int(place * count * samples), count * samples - documents)
            sides.append(lambda c=cursor, p=plans: ours(shards, c, p))
            sides.append(lambda n=passed, d=documents: theirs(shards, n, d))
            names.append(f"{place:.0%}")
        results = bench.paired(sides, runs=options.runs)
    mine, rival = results[::2], results[1::2]
    claimed = [SECONDS] * options.runs
    parts = [
        bench.Part(f"{n} beside the claimed time", t, claimed, "s", 1.0, "lower") for n, t in zip(names, mine)
    ]
    parts.append(bench.Part("99% beside 1%", mine[-1], mine[0], "s", 1.5, "lower"))
    for at in (1, 2):
        name = f"{names[at]} beside webdataset, which drops what was passed"
        parts.append(bench.Part(name, mine[at], rival[at], "s", 0.25, "lower"))
    bench.emit(
        CLAIM, *parts, versions=("webdataset",),
        sizes={"samples": count * samples, "gigabytes": round(size / 1e9, 2), "packs": COUNT, "context": CONTEXT},
        cursor_kib={n: round(len(c) / 1024) for n, (c, _) in zip(names, cursors.values())},
    )  # fmt: skip


if __name__ == "__main__":
    main()
