"""Samples a second of verified, resumable reading beside raw webdataset: the same shards in the page cache, the same
decoding (Pillow), in this process and in two workers of a DataLoader.

Ours reads runs of 64 samples, checks the crc32 of every header and payload, and its position is a number of samples
that any reader can start from. webdataset reads the tars in sequence and checks nothing. Workers hand over how many
bytes a sample decoded to: what is measured is reading and not the copying of pixels between processes.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import _harness as bench

from ringweave.data_pipes.index import build_index, load_index, write_index
from ringweave.data_pipes.reader import ShardReader

CLAIM = "verified, resumable reading is at least as fast as raw webdataset with decoding, and twice as fast without"
RUN, BATCH = 64, 32
Members = dict[str, Any]


def make_shards(folder: Path, *, shards: int, samples: int, side: int) -> list[Path]:
    """Photograph-like JPEGs (smooth, with grain) of side x side with a caption and facts, `samples` a shard."""
    rng = np.random.default_rng(0)
    waves = np.linspace(0, 9, side)
    paths = []
    for n in range(shards):
        path = folder / f"pictures-{n:04d}.tar"
        with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0) as writer:
            for i in range(samples):
                a, b, c = rng.uniform(0.2, 2, 3)
                smooth = 128 + 90 * np.sin(a * waves)[:, None] * np.cos(b * waves + c)[None, :]
                pixels = smooth[..., None] + rng.normal(0, 12, (side, side, 3))
                out = io.BytesIO()
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=88)
                text = f"picture {i} of shard {n}, " * 6
                members = {"jpg": out.getvalue(), "txt": text.encode(), "json": b'{"width": %d}' % side}
                writer.write({"__key__": f"{n:04d}{i:06d}", **members})
        write_index(path, build_index(path))
        paths.append(path)
    return paths


def raw(members: Members) -> int:
    """No decoding: the sizes of the members."""
    return sum(len(v) for k, v in members.items() if k in ("jpg", "txt", "json"))


def decoded(members: Members) -> int:
    """The picture's pixels and the caption's letters, counted."""
    with Image.open(io.BytesIO(members["jpg"]), formats=("JPEG",)) as image:
        return int(np.asarray(image.convert("RGB")).size) + len(members["txt"].decode("utf-8"))


class Ours(torch.utils.data.IterableDataset[int]):
    """Runs of samples from `position` on, dealt to the workers in turn."""

    def __init__(self, shards: list[Path], use: Callable[[Members], int], position: int = 0) -> None:
        self.readers = [ShardReader(path) for path in shards]
        self.use, self.position = use, position

    def __iter__(self) -> Iterator[int]:
        worker = torch.utils.data.get_worker_info()
        every, mine = (worker.num_workers, worker.id) if worker else (1, 0)
        passed = turn = 0
        for reader in self.readers:
            for first in range(0, len(reader), RUN):
                count = min(RUN, len(reader) - first)
                if passed >= self.position:
                    if turn % every == mine:
                        for sample in reader.read_many(first, count):
                            yield self.use(sample.members)
                    turn += 1
                passed += count


def theirs(shards: list[Path], use: Callable[[Members], int]) -> Any:
    """webdataset as its manual shows it, without shuffling."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return webdataset.WebDataset([str(p) for p in shards], shardshuffle=False).map(use)


def speed(dataset: Any, workers: int, samples: int) -> float:
    """Samples a second over all of them; with workers from the first batch on, when they have started."""
    if not workers:
        started = time.perf_counter()
        count = sum(1 for _ in dataset)
        assert count == samples
        return count / (time.perf_counter() - started)
    context = "fork" if sys.platform != "win32" else None
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, num_workers=workers, collate_fn=list, multiprocessing_context=context
    )
    batches = iter(loader)
    seen = len(next(batches))
    count, started = 0, time.perf_counter()
    for batch in batches:
        count += len(batch)
    seconds = time.perf_counter() - started
    assert seen + count == samples
    return count / seconds


def check_same(shards: list[Path]) -> None:
    """Both sides give the same samples, and ours can begin anywhere."""
    for use in (raw, decoded):
        ours, rival = list(Ours(shards, use)), list(theirs(shards, use))
        assert ours == rival
    assert list(Ours(shards, raw, position=RUN)) == list(Ours(shards, raw))[RUN:]


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    shards, samples, side = (2, 96, 64) if options.tiny else (4, 1500, 224)
    parts = []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_shards(Path(folder), shards=shards, samples=samples, side=side)
        check_same([paths[0]])
        total = sum(load_index(p).count for p in paths)
        size = sum(p.stat().st_size for p in paths)
        for use, target in ((raw, 2.0), (decoded, 1.0)):
            for workers in (0, 2):
                sides = [
                    lambda u=use, w=workers: speed(Ours(paths, u), w, total),
                    lambda u=use, w=workers: speed(theirs(paths, u), w, total),
                ]
                ours, rival = bench.paired(sides, runs=options.runs)
                name = f"{'bytes alone' if use is raw else 'with decoding'}, {workers} workers"
                parts.append(bench.Part(name, ours, rival, "samples/s", target, "higher"))
    bench.emit(
        CLAIM,
        *parts,
        versions=["webdataset", "pillow"],
        sizes={"shards": shards, "samples": total, "kB a sample": round(size / total / 1e3, 1)},
    )


if __name__ == "__main__":
    main()
