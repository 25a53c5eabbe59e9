"""One rival loader in a process of its own, under whatever interpreter has it installed: `data_rivals.py` starts it.

`python _data_rivals.py NAME SHARDS OUT` converts the shards (WebDataset tars of jpg, txt, json) into the loader's own
form under OUT, then reads "raw" or "decoded" from standard input, one a line, runs an epoch and answers with one JSON
line {"samples", "speed"} (samples a second), or {"skipped"} at the start if the loader is not there. It imports nothing
of ringweave, so that the rivals' requirements need not fit ours.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import os
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = {"mosaicml-streaming": "streaming", "litdata": "litdata", "megatron-energon": "megatron.energon"}
FIELDS = ("jpg", "txt", "json")


def records(shards: list[Path]) -> Iterator[dict[str, Any]]:
    """The samples of the shards as {"key", "jpg", "txt", "json"}."""
    for path in shards:
        with tarfile.open(path, "r:") as tar:
            sample: dict[str, Any] = {}
            for member in tar:
                key, _, ext = member.name.partition(".")
                if sample and sample["key"] != key:
                    yield sample
                    sample = {}
                file = tar.extractfile(member)
                assert file is not None
                sample |= {"key": key, ext: file.read()}
            if sample:
                yield sample


def use(sample: Any, decode: bool) -> int:
    """What `data_reading.py` does with a sample: its bytes, or the decoded picture.

    `bytes` of bytes costs nothing; of litdata's views into a mapped file it is what reads them.
    """
    if not decode:
        return sum(len(bytes(sample[name])) for name in FIELDS)
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(sample["jpg"]), formats=("JPEG",)) as image:
        return int(np.asarray(image.convert("RGB")).size) + len(bytes(sample["txt"]).decode("utf-8"))


def mosaic(shards: list[Path], out: Path) -> Callable[[], Iterator[Any]]:
    """MDS shards of bytes."""
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(out), columns=dict.fromkeys(FIELDS, "bytes")) as writer:
        for sample in records(shards):
            writer.write({name: sample[name] for name in FIELDS})
    dataset = StreamingDataset(local=str(out), shuffle=False, batch_size=1)
    return lambda: iter(dataset)


def _same(sample: dict[str, bytes]) -> dict[str, bytes]:
    return sample


def litdata(shards: list[Path], out: Path) -> Callable[[], Iterator[Any]]:
    """Chunks of 64 MB."""
    from litdata import StreamingDataset, optimize

    samples = [{name: sample[name] for name in FIELDS} for sample in records(shards)]
    optimize(fn=_same, inputs=samples, output_dir=str(out), chunk_bytes="64MB", num_workers=1, verbose=False)
    return lambda: iter(StreamingDataset(str(out), shuffle=False))


def energon(shards: list[Path], out: Path) -> Callable[[], Iterator[Any]]:
    """The same tars with energon's index."""
    from megatron import energon as package
    from megatron.energon.flavors import BaseWebdatasetFactory

    out.mkdir()
    for path in shards:
        os.link(path, out / path.name)
    names = [path.name for path in shards]
    BaseWebdatasetFactory.prepare_dataset(
        out, names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
    )
    settings = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (out / ".nv-meta" / "dataset.yaml").write_text(settings, encoding="utf-8")

    @dataclass
    class Record(package.Sample):
        jpg: bytes
        txt: bytes
        json: bytes

        def __getitem__(self, name: str) -> bytes:
            return getattr(self, name)

    @package.stateless
    def cook(sample: dict[str, Any]) -> Record:
        return Record(**package.basic_sample_keys(sample), **{name: sample[name] for name in FIELDS})

    class Task(package.DefaultTaskEncoder):
        cookers = [package.Cooker(cook)]  # noqa: RUF012
        decoder = None

    def epoch() -> Iterator[Any]:
        workers = package.WorkerConfig(rank=0, world_size=1, num_workers=0)
        dataset = package.get_train_dataset(
            out, worker_config=workers, batch_size=None, shuffle_buffer_size=None,
            max_samples_per_sequence=None, task_encoder=Task(), repeat=False,
        )  # fmt: skip
        return iter(package.get_savable_loader(dataset))

    return epoch


def main() -> None:
    """Convert, then an epoch for every line of standard input."""
    name, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the loaders print must not stand among the answers
    try:
        __import__(PACKAGES[name])
    except ImportError as error:
        print(json.dumps({"skipped": f"{name} cannot be imported: {error}"}), file=answers, flush=True)
        return
    import torch

    torch.set_num_threads(1)
    shards = sorted(folder.glob("*.tar"))
    epoch = {"mosaicml-streaming": mosaic, "litdata": litdata, "megatron-energon": energon}[name](shards, out)
    print(json.dumps({"version": importlib.metadata.version(name)}), file=answers, flush=True)
    for line in sys.stdin:
        decode, started, total = line.strip() == "decoded", time.perf_counter(), 0
        count = 0
        for sample in epoch():
            total += use(sample, decode)
            count += 1
        seconds = time.perf_counter() - started
        print(
            json.dumps({"samples": count, "bytes": total, "speed": count / seconds}), file=answers, flush=True
        )


if __name__ == "__main__":
    main()
