"""One rank of a training job, from its environment variables to its exit code.

Launchers (torchrun, srun, `ringweave launch`) set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.reader import expand_shards
from ringweave.data_pipes.token_cache import build_cache, cache_path
from ringweave.pretrain import checkpoint
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.errors import HangError
from ringweave.pretrain.run_folder import RunFolder, write_json
from ringweave.pretrain.trainer import Trainer
from ringweave.tokenizers.errors import DataError, UserError
from ringweave.tokenizers.manifest import VocabularyManifest
from ringweave.tokenizers.set import TokenizerSet


def main(config: RunConfig, *, allow_change: bool = False) -> int:
    """Train as this process's rank. Gives the exit code; also leaves it in exit.json (see docs/errors.md)."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = RunFolder(Path(config.run.dir))
    try:
        return _train(config, folder, rank, world, allow_change)
    except UserError as e:
        return _fail(folder, rank, e)
    except RuntimeError as e:
        if "timed out" not in str(e).lower():
            raise
        return _fail(folder, rank, _hang(e, rank, config))
    finally:
        folder.release()


def _train(config: RunConfig, folder: RunFolder, rank: int, world: int, allow_change: bool) -> int:
    manifest = VocabularyManifest.load(Path(config.tokenizers.dir) / "tokenizers.json")
    corpus = open_corpus(config, manifest, rank=rank)
    _join(config, rank, world)
    try:
        checkpoint.on_first_rank(lambda: _claim(folder, config))
        trainer = Trainer(
            config, corpus, vocab=manifest.size, vocabulary_hash=manifest.hash, folder=folder, rank=rank,
            allow_change=allow_change,
        )  # fmt: skip
        code = trainer.run()
    except UserError:
        if world == 1:  # with peers, one may wait in a collective: leave without tearing the group down
            dist.destroy_process_group()
        raise
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
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, timeout=timedelta(seconds=config.timeout.collective)
    )


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


def _hang(e: RuntimeError, rank: int, config: RunConfig) -> HangError:
    return HangError(
        f"rank {rank} waited in vain for another rank",
        where="".join(traceback.format_tb(e.__traceback__)[-1:]).strip(),
        why=f"a collective did not finish within timeout.collective = {config.timeout.collective:.0f} s",
        fix="see which rank's log ends first; resume with the same command",
    )


def _fail(folder: RunFolder, rank: int, e: UserError) -> int:
    """Say what went wrong, once, and leave it in exit.json."""
    record = {**e.as_dict(), "reason": e.what, "rank": rank, "attempt": folder.attempt}
    # When another job holds the folder its exit.json is not ours to write.
    if folder.path.is_dir() and "already in use" not in e.what:
        write_json(folder.path / "exit.json", record)
    if rank == 0 or not _agreed(e):
        print(f"error (rank {rank}): {e.render()}", file=sys.stderr, flush=True)
    return e.exit_code


def _agreed(e: UserError) -> bool:
    """Failures every rank raises alike, of which rank 0 alone need speak."""
    return type(e).__name__ in ("StorageError", "NonFiniteError", "ConfigError", "VocabularyError")
