"""One rank of a training job, from its environment variables to its exit code.

Launchers (torchrun, srun, `ringweave launch`) set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.reader import expand_shards
from ringweave.data_pipes.stream import Documents
from ringweave.data_pipes.token_cache import build_cache, cache_path
from ringweave.parallel.watchdog import is_lost_peer
from ringweave.pretrain import checkpoint
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.errors import HangError
from ringweave.pretrain.failure import Failure
from ringweave.pretrain.run_folder import RunFolder
from ringweave.pretrain.trainer import Trainer
from ringweave.tokenizers.errors import DataError, UserError
from ringweave.tokenizers.manifest import VocabularyManifest
from ringweave.tokenizers.set import TokenizerSet

#: What a job trains on: the corpus, the vocabulary's size and its hash.
Data = tuple[Documents, int, str]


def main(config: RunConfig, *, allow_change: bool = False) -> int:
    """Train as this process's rank. Gives the exit code; also leaves it in exit.json (see docs/errors.md)."""

    def load() -> Data:
        manifest = VocabularyManifest.load(Path(config.tokenizers.dir) / "tokenizers.json")
        corpus = open_corpus(config, manifest, rank=int(os.environ.get("RANK", "0")))
        return corpus, manifest.size, manifest.hash

    return run_rank(config, load, allow_change=allow_change)


def run_rank(config: RunConfig, load: Callable[[], Data], *, allow_change: bool = False) -> int:
    """As `main`, on the data that `load` gives."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = RunFolder(Path(config.run.dir))
    failure = Failure(config, folder, rank, world)
    try:
        return _train(config, load, failure, allow_change)
    except UserError as e:
        return failure.raised(e)
    except Exception as e:
        if world > 1 and is_lost_peer(e):
            return failure.lost(e)
        failure.crashed(e)
        raise
    finally:
        failure.close()
        folder.release()


def _train(config: RunConfig, load: Callable[[], Data], failure: Failure, allow_change: bool) -> int:
    rank, world, folder = failure.rank, failure.world, failure.folder
    corpus, vocab, vocabulary_hash = load()
    _join(config, rank, world)
    try:
        checkpoint.on_first_rank(lambda: _claim(folder, config))
        failure.watch()
        trainer = Trainer(
            config, corpus, vocab=vocab, vocabulary_hash=vocabulary_hash, folder=folder, rank=rank,
            allow_change=allow_change,
        )  # fmt: skip
        failure.shield()  # from here on the trainer handles signals
        code = trainer.run()
    except UserError:
        if world == 1:  # with peers, one may wait in a collective: leave without tearing the group down
            dist.destroy_process_group()
        raise
    failure.done()
    dist.destroy_process_group()
    return code


def _claim(folder: RunFolder, config: RunConfig) -> None:
    folder.acquire()
    (folder.path / "config.yaml").write_text(config.to_yaml())


def _join(config: RunConfig, rank: int, world: int) -> None:
    """Join the process group; a single process makes a group of one."""
    if world == 1 and "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=config.timeout.start)))
    _meet(store, rank, world, seconds=config.timeout.start)
    limit = timedelta(seconds=config.timeout.collective)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)


def _meet(store: dist.Store, rank: int, world: int, *, seconds: float) -> None:
    """Wait until every rank has come this far: starts differ by more than a collective may take.

    Raises HangError with the ranks that did not come.
    """
    store.set(f"ringweave-here-{rank}", "1")
    deadline, missing = time.monotonic() + seconds, list(range(world))
    while missing := [r for r in missing if not store.check([f"ringweave-here-{r}"])]:
        if time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:16])) + (" …" if len(missing) > 16 else "")
            raise HangError(
                f"{len(missing)} of {world} ranks did not start: {shown}",
                where=f"rank {rank} waited at the start",
                why=f"they did not come within timeout.start = {seconds:g} s",
                fix="see their logs and hosts, or raise timeout.start; start again with the same command",
            )
        time.sleep(0.1)


def source_specs(config: RunConfig, *, heldout: bool = False) -> list[SourceSpec]:
    """The shards of each source (training, or held-out where a source has them)."""
    base = Path(config.data.dir)
    specs = []
    for s in config.data.sources:
        pattern = s.heldout if heldout else s.shards
        if pattern is not None:
            specs.append(SourceSpec(name=s.name, shards=expand_shards(pattern, base), plan=tuple(s.plan)))
    return specs


def open_corpus(
    config: RunConfig, manifest: VocabularyManifest, *, rank: int = 0, heldout: bool = False
) -> Corpus:
    """The tokenized corpus. Rank 0 makes missing token caches while the others wait for the files."""
    specs = source_specs(config, heldout=heldout)
    missing = [
        (shard, s.plan)
        for s in specs
        for shard in s.shards
        if not cache_path(shard, s.plan, manifest.hash).exists()
    ]
    if missing and rank == 0:
        tokenizers = TokenizerSet.load(Path(config.tokenizers.dir))
        for n, (shard, plan) in enumerate(missing, 1):
            print(f"tokenizing {shard.name} ({n}/{len(missing)})", flush=True)
            build_cache(shard, plan, tokenizers)
    deadline = time.monotonic() + config.timeout.start
    while rank != 0 and not all(cache_path(shard, plan, manifest.hash).exists() for shard, plan in missing):
        if time.monotonic() > deadline:
            raise DataError(
                "the token caches did not appear",
                where=str(missing[0][0]),
                why=f"rank 0 had {config.timeout.start:.0f} s (timeout.start) to make them",
                fix="make them beforehand: ringweave data index DIR --tokenizers TOKENIZERS",
            )
        time.sleep(0.2)
    return Corpus.open(specs, manifest_hash=manifest.hash)
