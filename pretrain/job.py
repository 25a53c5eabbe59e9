"""One rank of a training job, from its environment variables to its exit code.

Launchers (torchrun, srun, `ringweave launch`) set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.make_lengths import make_lengths
from ringweave.data_pipes.shard_names import Shard, address_of, is_remote, shard_name, shown
from ringweave.data_pipes.store import OPEN_SHARD
from ringweave.data_pipes.stream import Documents
from ringweave.data_pipes.token_lengths import has_lengths
from ringweave.data_pipes.token_vocabulary import naming_blocks
from ringweave.data_pipes.worker_process import Setup
from ringweave.data_pipes.workers import TokenWorkers
from ringweave.parallel.gloo import join_world
from ringweave.parallel.watchdog import is_lost_peer
from ringweave.pretrain import checkpoint
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.data_store import data_specs, store_of
from ringweave.pretrain.errors import HangError
from ringweave.pretrain.failure import Failure
from ringweave.pretrain.previews import draw_at_end
from ringweave.pretrain.run_folder import RunFolder
from ringweave.pretrain.trainer import Trainer
from ringweave.tokenizers.errors import EXIT_OK, DataError, UserError, printable
from ringweave.tokenizers.manifest import VocabularyManifest
from ringweave.tokenizers.set import TokenizerSet

#: What a job trains on: the corpus, the vocabulary's size, and the vocabulary, or its hash where there is no more.
Data = tuple[Documents, int, VocabularyManifest | str]


#: What launchers set, and a process of its own sets for itself while it trains.
LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


def main(config: RunConfig, *, allow_change: bool = False) -> int:
    """Train as this process's rank. Gives the exit code; also leaves it in exit.json (see docs/errors.md)."""

    def load() -> Data:
        manifest = VocabularyManifest.load(Path(config.tokenizers.dir) / "tokenizers.json")
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        corpus = open_corpus(config, manifest, rank=rank, world=world)
        return corpus, manifest.size, manifest

    return run_rank(config, load, allow_change=allow_change)


def run_rank(
    config: RunConfig, load: Callable[[], Data], *, allow_change: bool = False, channels: int | None = None
) -> int:
    """As `main`, on the data that `load` gives. channels: of its latents, where the vocabulary does not tell."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = RunFolder(Path(config.run.dir))
    failure = Failure(config, folder, rank, world)
    before = {name: os.environ.get(name) for name in LAUNCHED}
    try:
        code = _train(config, load, failure, allow_change, channels)
        if code == EXIT_OK and rank == 0 and config.log.previews:
            draw_at_end(config, folder)  # the other ranks are gone: nobody waits
        return code
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
        for name, value in before.items():  # else what this process starts later takes itself for a rank
            if value is None:
                os.environ.pop(name, None)


def _train(
    config: RunConfig,
    load: Callable[[], Data],
    failure: Failure,
    allow_change: bool,
    channels: int | None,
) -> int:
    rank, world, folder = failure.rank, failure.world, failure.folder
    corpus, vocab, vocabulary = load()
    try:
        _join(config, rank, world)
        checkpoint.on_first_rank(lambda: _claim(folder, config))
        failure.watch()
        trainer = Trainer(
            config, corpus, vocab=vocab, vocabulary=vocabulary, folder=folder, rank=rank,
            allow_change=allow_change, channels=channels,
        )  # fmt: skip
        failure.shield()  # from here on the trainer handles signals
        code = trainer.run()
    except UserError:
        if world == 1:  # with peers, one may wait in a collective: leave without tearing the group down
            dist.destroy_process_group()
        raise
    finally:
        if isinstance(corpus, Corpus):
            corpus.close()
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
        join_world(store=store, rank=0, world_size=1)
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=config.timeout.start)))
    _meet(store, rank, world, seconds=config.timeout.start)
    limit = timedelta(seconds=config.timeout.collective)
    join_world(store=store, rank=rank, world_size=world, timeout=limit)


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
    return data_specs(config.data, store_of(config), heldout=heldout)


def open_corpus(
    config: RunConfig,
    manifest: VocabularyManifest,
    *,
    rank: int = 0,
    world: int = 1,
    heldout: bool = False,
    tokens: bool = False,
) -> Corpus:
    """The corpus of a job. The ranks share the work of making token lengths that are missing; all wait for them.

    tokens: also make the token caches of shards whose lengths their headers tell, which otherwise are made when they
    are needed; without workers (`data.workers.count` 0) they are always made here. Close the corpus to end its workers.
    """
    store, w = store_of(config), config.data.workers
    specs, folder = data_specs(config.data, store, heldout=heldout), store.tokens_dir
    setup = Setup(args=[config.tokenizers.dir], reader=OPEN_SHARD, reader_options=store.to_json())
    workers = TokenWorkers(w.count, setup, memory_bytes=w.memory, timeout_s=w.timeout)
    try:
        wanted = [(shard, spec.plan) for spec in specs for shard in spec.shards]
        wanted.sort(key=lambda item: address_of(item[0]))  # tasks over one shard in turn: they share pictures
        left = _without_lengths(wanted, manifest.hash, folder)
        host = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
        mine = []
        for n in left:
            # What belongs to a shard in a store lies in the cache folder, which may be each host's own.
            who, of = host if is_remote(wanted[n][0]) else (rank, world)
            if n % of == who:
                mine.append(wanted[n])
        if mine:
            tokenizers = TokenizerSet.load(Path(config.tokenizers.dir))
        for n, (shard, plan) in enumerate(mine, 1):
            print(f"tokenizing {printable(shard_name(shard))} ({n}/{len(mine)})", flush=True)
            make_lengths(
                shard, plan, tokenizers, workers=workers, probe=not tokens and w.count > 0, folder=folder
            )
        _wait_for_lengths([wanted[n] for n in left], manifest.hash, folder, seconds=config.timeout.start)
        with naming_blocks(manifest):
            return Corpus.open(specs, manifest_hash=manifest.hash, workers=workers, folder=folder)
    except BaseException:
        workers.close()
        raise


def _without_lengths(
    wanted: Sequence[tuple[Shard, tuple[str, ...]]], manifest_hash: str, folder: Path | None
) -> list[int]:
    """Numbers of the shards that have no lengths yet. Stores are asked for several at a time."""

    def there(item: tuple[Shard, tuple[str, ...]]) -> bool:
        return has_lengths(*item, manifest_hash, folder=folder)

    if any(is_remote(shard) for shard, _ in wanted):
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(there, wanted))
    else:
        found = [there(item) for item in wanted]
    return [n for n, has in enumerate(found) if not has]


def _wait_for_lengths(
    left: list[tuple[Shard, tuple[str, ...]]], manifest_hash: str, folder: Path | None, *, seconds: float
) -> None:
    """Until other ranks have made what is missing. Raises DataError if they do not in time."""
    deadline = time.monotonic() + seconds
    while numbers := _without_lengths(left, manifest_hash, folder):
        left = [left[n] for n in numbers]
        if time.monotonic() > deadline:
            raise DataError(
                f"the token lengths of {len(left)} shards did not appear",
                where=shown(left[0][0]),
                why=f"other ranks had {seconds:.0f} s (timeout.start) to make them, in a folder that all must see",
                fix="make them beforehand: ringweave data index DIR --tokenizers TOKENIZERS",
            )
        time.sleep(0.2)
