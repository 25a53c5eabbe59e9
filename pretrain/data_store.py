"""How the shards of a run are opened: the `Store` that the data section of a config describes. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from ringweave.data_pipes.corpus import SourceSpec
from ringweave.data_pipes.formats import resolve_plan
from ringweave.data_pipes.reader import expand_names, expand_shards
from ringweave.data_pipes.shard_names import Shard
from ringweave.data_pipes.storage import StorageOptions
from ringweave.data_pipes.store import Store
from ringweave.data_pipes.stored_shard import StoredShard
from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.config_data import DataSection, Source


def store_of(config: RunConfig) -> Store:
    """Limits, credentials and cache of a run. Nothing is opened."""
    return store_of_data(config.data)


def store_of_data(data: DataSection) -> Store:
    """As `store_of`, of a data section alone."""
    remote, cache = data.remote, data.cache
    options = StorageOptions(
        timeout_s=remote.timeout,
        retries=remote.retries,
        allow_hosts=remote.allow_hosts,
        allow_private=remote.allow_private,
        allow_pipe=data.allow_pipe,
        s3_endpoint=remote.s3_endpoint,
        s3_region=remote.s3_region,
        gs_endpoint=remote.gs_endpoint,
        anonymous=remote.anonymous,
    )
    return Store(options, None if cache.dir is None else Path(cache.dir), cache.size)


def source_shards(data: DataSection, source: Source, store: Store, *, heldout: bool = False) -> list[Shard]:
    """The shards of a source in order: paths of plain local tars, else byte sources of `store`.

    Empty for held-out shards of a source without them. Raises DataError for a malformed pattern, missing local shards,
    addresses nobody can read, and commands without `allow_pipe`.
    """
    pattern = source.heldout if heldout else source.shards
    if pattern is None:
        return []
    if source.pipe is not None:
        return [
            store.resolve([word.replace("{shard}", name) for word in source.pipe], name=name)
            for name in expand_names(pattern)
        ]
    return [store.resolve(shard) for shard in expand_shards(pattern, data.dir)]


def data_specs(
    data: DataSection, store: Store, *, heldout: bool = False, base: Path | str | None = None
) -> list[SourceSpec]:
    """The sources of a data section that have such shards. base: a folder or URL to use instead of `data.dir`."""
    if base is not None:
        data = data.model_copy(update={"dir": str(base)})
    specs = []
    for source in data.sources:
        shards = source_shards(data, source, store, heldout=heldout)
        if shards:
            whole = any(isinstance(shard, StoredShard) and shard.whole for shard in shards)
            specs.append(SourceSpec(source.name, shards, resolve_plan(source.plan, data.dir), whole=whole))
    return specs
