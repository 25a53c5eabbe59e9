"""One rank of a training job without a model: it reads, agrees with the others on what was read, and records it.

Rank 0 appends a line a step to `steps.jsonl`, synced before the step counts, and replaces `cursor.json` every few
steps. Both survive a kill at any moment; the next job continues from the cursor.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parent))
from _resume_data import COUNT, STAGES, SWITCH, new_planner, open_corpus

from ringweave.data_pipes.pack import Pack, packs_for_rank
from ringweave.data_pipes.quarantine import Quarantine
from ringweave.data_pipes.stream import PackStream
from ringweave.parallel.gloo import join_world
from ringweave.parallel.process import leave
from ringweave.pretrain.batch_reader import BatchReader, ReadyBatch
from ringweave.pretrain.data_exchange import data_groups
from ringweave.pretrain.prefetch import Prefetcher, Stopped

FIELDS = ("ids", "doc", "order", "positions", "modality", "targets", "target_modality", "weights", "prefix")


@dataclass(frozen=True, slots=True)
class Job:
    """What all ranks of a job know. data: folder of shards; out: folder of record and cursor; rendezvous: a file
    that is not there yet; dp x group ranks; pause: seconds that a step takes beside its data; hold: a step that takes
    half a second more; slow: seconds between the pieces in which the cursor is written."""

    data: str
    out: str
    rendezvous: str
    seed: int
    dp: int
    group: int = 1
    workers: int = 0
    depth: int = 1
    store: bool = False
    every: int = 3
    pause: float = 0.0
    hold: int = 0
    slow: float = 0.0

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.group

    def __str__(self) -> str:
        kept = {k: v for k, v in asdict(self).items() if k not in ("data", "out", "rendezvous")}
        return " ".join(f"{k}={v}" for k, v in kept.items())


def run_rank(rank: int, job: Job) -> None:
    """The process of a rank: what it prints goes to `rank-N.log`, the end of the data to `end-N.json`."""
    with open(Path(job.out) / f"rank-{rank}.log", "a", buffering=1, encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        faulthandler.enable(file=log)
        print(f"--- rank {rank} of {job.world}, process {os.getpid()}: {job}", flush=True)
        torch.set_num_threads(1)
        limit = timedelta(seconds=90)
        join_world(init_method=f"file://{job.rendezvous}", rank=rank, world_size=job.world, timeout=limit)
        _train(rank, job)
        dist.barrier()
        dist.destroy_process_group()
    leave(0)


def _train(rank: int, job: Job) -> None:
    """Every step from the cursor to the end of the data."""
    exchange, everyone = data_groups(np.arange(job.world).reshape(job.dp, job.group))
    corpus = open_corpus(Path(job.data), str(Path(job.out) / "healed"), workers=job.workers, store=job.store)
    record = Record(Path(job.out), slow=job.slow) if rank == 0 else None
    cursor = json.loads((Path(job.out) / "cursor.json").read_text()) if _saved(job) else None
    quarantine = Quarantine(max_share=0.5)
    if cursor is None:
        step, stream = 0, PackStream(corpus, new_planner(corpus, seed=job.seed), quarantine)
    else:
        step = cursor["step"]
        stream = PackStream.restore(corpus, cursor["stream"], seed=job.seed, quarantine=quarantine)
        if step == SWITCH:
            stream.planner.switch(**STAGES[1])
    mine = packs_for_rank(0, COUNT, rank // job.group, job.dp)
    reader = BatchReader(stream, count=COUNT, mine=mine, exchange=exchange, everyone=everyone)
    last = stream.state()
    while True:
        source = Prefetcher(reader, depth=job.depth, limit=SWITCH - step if step < SWITCH else None)
        try:
            while True:
                batch = source.next()
                hashes = _agreed(batch, job)
                time.sleep(job.pause + 0.5 * (job.hold == step))
                step, last = step + 1, batch.state_after
                if record is not None:
                    record.step(step, batch, hashes, save=step % job.every == 0 or step == SWITCH)
                if step == SWITCH:
                    break
        except Stopped:
            if not reader.ended:
                raise
            break
        finally:
            source.stop()
        stream.planner.switch(**STAGES[1])
    if record is not None:
        record.save(step, last)
    if corpus.workers is not None:
        corpus.workers.close()
    journal = [f.to_json() for f in stream.quarantine.entries]
    (Path(job.out) / f"end-{rank}.json").write_text(json.dumps({"steps": step, "journal": journal}))


def _saved(job: Job) -> bool:
    """Whether there is a cursor; all ranks look before one of them may write."""
    there = (Path(job.out) / "cursor.json").exists()
    dist.barrier()
    return there


def digest(pack: Pack) -> bytes:
    """sha256 over the plan and every array of a pack."""
    found = hashlib.sha256(json.dumps(pack.plan.to_json()).encode())
    for field in FIELDS:
        found.update(getattr(pack, field).tobytes())
    return found.digest()


def _agreed(batch: ReadyBatch, job: Job) -> list[str]:
    """The hash of every pack of the batch, in order. Ranks of one data index must have read the same."""
    own = torch.frombuffer(bytearray(b"".join(digest(p) for p in batch.packs)), dtype=torch.uint8)
    parts = [torch.empty_like(own) for _ in range(job.world)]
    dist.all_gather(parts, own)
    texts = [part.numpy().tobytes().hex() for part in parts]
    for first in range(0, job.world, job.group):
        if len(set(texts[first : first + job.group])) != 1:
            raise AssertionError(f"ranks {first}..{first + job.group - 1} read different packs")
    whole = "".join(texts[:: job.group])
    return [whole[at : at + 64] for at in range(0, len(whole), 64)]


class Record:
    """What rank 0 keeps of the steps."""

    def __init__(self, out: Path, *, slow: float = 0.0) -> None:
        self.out, self.slow = out, slow
        path = out / "steps.jsonl"
        if path.exists():  # a line that was cut off by a kill was not a step
            text = path.read_bytes()
            os.truncate(path, text.rfind(b"\n") + 1)
        self.file: IO[bytes] = open(path, "ab")  # noqa: SIM115

    def step(self, step: int, batch: ReadyBatch, hashes: list[str], *, save: bool) -> None:
        """A step that was made, and perhaps the cursor after it."""
        packs = [[p.to_json() for p in plan.pieces] for plan in batch.plans]
        self.file.write(json.dumps({"step": step, "packs": packs, "sha256": hashes}).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        if save:
            self.save(step, batch.state_after)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Replaces the cursor, whole or not at all."""
        data = json.dumps({"step": step, "stream": state}).encode()
        temporary = self.out / "cursor.tmp"
        with open(temporary, "wb") as file:
            for at in range(0, len(data), len(data) // 8 + 1):
                file.write(data[at : at + len(data) // 8 + 1])
                file.flush()
                time.sleep(self.slow)
            os.fsync(file.fileno())
        os.replace(temporary, self.out / "cursor.json")
        descriptor = os.open(self.out, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
