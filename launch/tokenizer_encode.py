"""`ringweave tokenizer encode-shards`: the token caches of all shards of a config, before a run needs them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringweave.launch.console import Progress
from ringweave.launch.data_sources import load_tokenizers, name_of

if TYPE_CHECKING:
    from ringweave.data_pipes.corpus import SourceSpec
    from ringweave.data_pipes.shard_names import Shard
    from ringweave.data_pipes.store import Store
    from ringweave.pretrain.config import RunConfig

#: What indexing refuses: everything that a policy would have to be chosen for.
_STRICT = {"hidden": "refuse", "interleaved": "refuse", "dotted": "refuse", "tail": "refuse"}


@dataclass
class _Pace:
    """Samples encoded a second, and the time the rest will take at that rate."""

    total: int
    done: int = 0
    made: int = 0
    begun: float = field(default_factory=time.monotonic)

    def line(self, name: str, done: int, made: int) -> str:
        """Where it stands with `done` samples of the shard `name`, `made` of them encoded now."""
        fresh = self.made + made
        if not fresh:
            return f"encoding {name}"
        rate = fresh / max(1e-6, time.monotonic() - self.begun)
        left = round((self.total - self.done - done) / rate)
        return f"encoding {name} · {rate:,.0f} samples/s · {_clock(left)} left"


def _clock(seconds: int) -> str:
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def encode_config(
    config: RunConfig, *, store: Store, workers: int | None, progress: Progress
) -> dict[str, Any]:
    """Encodes training and held-out shards of all sources; gives figures, files and skipped records.

    store: how shards are opened, and where caches lie that cannot lie beside their shard; workers: processes, else as
    `data.workers.count` says. Local shards without an index get one. Raises as `encode_shard`: what is finished by then
    stays, and is not made again.
    """
    from ringweave.data_pipes.encode_shards import encode_plans
    from ringweave.data_pipes.store import OPEN_SHARD, index_of
    from ringweave.data_pipes.worker_process import Setup
    from ringweave.data_pipes.workers import TokenWorkers

    wanted = _wanted(config, store, progress)
    manifest = str(load_tokenizers(Path(config.tokenizers.dir)).manifest.hash)
    w, count = config.data.workers, config.data.workers.count if workers is None else workers
    pace = _Pace(sum(len(specs) * index_of(shard).count for specs, shard in wanted))
    setup = Setup(args=[config.tokenizers.dir], reader=OPEN_SHARD, reader_options=store.to_json())
    facts: dict[str, Any] = {
        "shards": sum(len(specs) for specs, _ in wanted),
        "encoded": 0,
        "samples": 0,
        "tokens": 0,
        "made": 0,
    }
    caches: list[str] = []
    skipped: list[dict[str, str]] = []
    with TokenWorkers(count, setup, memory_bytes=w.memory, timeout_s=w.timeout) as pool:
        for specs, shard in wanted:
            name = name_of(shard)
            under_way: dict[int, tuple[int, int]] = {}

            def inside(number: int, done: int, made: int, name: str = name, at: Any = under_way) -> None:
                at[number] = (max(done, at.get(number, (0, 0))[0]), made)
                done, made = (sum(part) for part in zip(*at.values()))
                progress(pace.line(name, done, made), pace.done + done, pace.total)

            found = encode_plans(
                shard, [spec.plan for spec in specs], manifest, workers=pool, folder=store.tokens_dir,
                progress=inside,
            )  # fmt: skip
            for spec, made in zip(specs, found):
                pace.done, pace.made = pace.done + made.samples, pace.made + made.made
                facts["encoded"] += made.made > 0
                for key, value in (("samples", made.samples), ("tokens", made.tokens), ("made", made.made)):
                    facts[key] += value
                caches.append(str(made.path))
                skipped += [{"source": spec.name, "shard": name, **entry} for entry in made.skipped]
    seconds = time.monotonic() - pace.begun
    rate = round(pace.made / seconds, 1) if pace.made else None
    facts |= {"seconds": round(seconds, 2), "samples_per_s": rate, "workers": count}
    return facts | {"caches": caches, "skipped": skipped}


def _wanted(config: RunConfig, store: Store, progress: Progress) -> list[tuple[list[SourceSpec], Shard]]:
    """The shards of all sources, each with the sources that read it, one of each plan; indexed."""
    from ringweave.data_pipes.index import index_path
    from ringweave.data_pipes.shard_names import address_of, local_path
    from ringweave.launch.data_index import index_shards
    from ringweave.pretrain.data_store import data_specs

    found: dict[str, tuple[dict[tuple[str, ...], SourceSpec], Shard]] = {}
    for heldout in (False, True):
        for spec in data_specs(config.data, store, heldout=heldout):
            for shard in spec.shards:
                found.setdefault(address_of(shard), ({}, shard))[0].setdefault(spec.plan, spec)
    bare = []
    for _, shard in found.values():
        path = local_path(shard)
        if path is None or not index_path(path).is_file():
            bare.append(shard)
    if bare:
        index_shards(bare, _STRICT, progress)
    return [(list(specs.values()), shard) for specs, shard in found.values()]
