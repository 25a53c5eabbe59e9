"""A reader that runs for days takes no more memory than one that runs for minutes: the slope of its resident set.

One process reads a source of small texts over and over, with a prefetching thread, once from stored tokens and once
through two worker processes (nothing stored). After an epoch of warming up, resident memory is read every few batches
for three epochs, and a straight line is fitted to it (least squares, MiB against samples). Memory maps of token caches
count as resident; there are more shards than a corpus holds open. `--tiny` reads less and writes no row.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.append(str(Path(__file__).resolve().parents[1] / "data_pipes"))
from _harness import PAGE, prove
from token_fixtures import Bytes, setup, texts, write_shard

from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.make_lengths import make_lengths
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.stream import PackStream
from ringweave.data_pipes.workers import TokenWorkers
from ringweave.pretrain.batch_reader import BatchReader
from ringweave.pretrain.prefetch import Prefetcher, Stopped

BOUND = 1.0  # MiB for 10,000 samples
EPOCHS, COUNT, CONTEXT = 4, 4, 1024
#: So few that in the first epoch each lane draws the 4,096 documents that an open pack may wait for.
LANES = 4
MIB = 2**20


def write_data(folder: Path, *, shards: int, samples: int, stored: bool) -> None:
    """Shards of texts with lengths, and with their tokens if `stored`."""
    folder.mkdir()
    for n in range(shards):
        shard = write_shard(folder / f"text-{n:04d}.tar", texts(samples, words=24, tag=f"{n}:"))
        make_lengths(shard, ("text",), Bytes(), store_tokens=stored)


def series(folder: str, workers: int) -> dict[str, Any]:
    """Reads all epochs. Gives [samples read, bytes resident here, bytes of the workers] every few batches."""
    shards = sorted(Path(folder).glob("*.tar"))
    made = TokenWorkers(workers, setup()) if workers else None
    corpus = Corpus.open(
        [SourceSpec("text", shards, ("text",))], manifest_hash="0" * 64, workers=made, store=False
    )
    planner = PackPlanner(
        lengths=corpus.lengths, weights={"text": 1.0}, seed=1, context=CONTEXT, batch=COUNT, window=4 * COUNT,
        lanes=LANES, epochs=EPOCHS,
    )  # fmt: skip
    source = Prefetcher(BatchReader(PackStream(corpus, planner), count=COUNT, mine=range(COUNT)), depth=2)
    me, rows, read = psutil.Process(), [], 0
    with contextlib.suppress(Stopped):
        while True:
            batch = source.next()
            read += sum(p.start == 0 for plan in batch.plans for p in plan.pieces)
            if source.taken % 8 == 0:
                children = 0
                for child in me.children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        children += child.memory_info().rss
                rows.append([read, me.memory_info().rss, children])
    if made is not None:
        made.close()
    return {"rows": rows, "samples": read, "decoded": corpus.read.made, "stored": corpus.read.stored}


def slope(rows: Any, column: int) -> float:
    """MiB for 10,000 samples, over all epochs but the first."""
    values = np.asarray(rows, np.float64)
    values = values[values[:, 0] > values[-1, 0] / EPOCHS]
    return float(np.polyfit(values[:, 0] / 10_000, values[:, column] / MIB, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="few samples: shows that it works; no row")
    tiny = parser.parse_args().tiny
    sizes = {"stored": 4, "workers": 4} if tiny else {"stored": 96, "workers": 40}
    samples = 300 if tiny else 400
    claim = "resident memory of a reader grows by ≤ 1 MiB per 10,000 samples over 3 epochs, with and without workers"
    with tempfile.TemporaryDirectory() as name:
        page = Path(name) / "proofs.md" if tiny else PAGE
        with prove("data_memory", claim, page=page) as proof:
            for way, workers in (("stored", 0), ("workers", 2)):
                folder, shards = Path(name) / way, sizes[way]
                write_data(folder, shards=shards, samples=samples, stored=not workers)
                with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                    found = fresh.submit(series, str(folder), workers).result()
                rows = found["rows"]
                proof.holds(found["samples"] == EPOCHS * shards * samples, f"{way}: samples are missing")
                proof.holds((found["decoded"] > 0) == bool(workers), f"{way}: tokens came another way")
                grows = slope(rows, 1)
                proof.found(
                    **{
                        f"samples_{way}": found["samples"],
                        f"slope_{way}": round(grows, 3),
                        f"resident_{way}": f"{rows[-1][1] / MIB:.0f} MiB",
                    }
                )
                # A few hundred samples say nothing of a slope: only the full proof judges it.
                proof.holds(tiny or grows <= BOUND, f"{way}: {grows:.2f} MiB for 10,000 samples")
                if workers:
                    together = slope(rows, 2)
                    proof.found(slope_of_worker_processes=round(together, 3))
                    proof.holds(tiny or together <= BOUND, f"workers grow by {together:.2f} MiB")


if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    main()
