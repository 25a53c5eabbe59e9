"""`Store`: how the shards of a job are opened, from wherever they lie: limits of reads, credentials, the cache.

One is made of a job's config and handed to everything that opens shards; `to_json` makes it fit for worker processes:
`Setup(..., reader=OPEN_SHARD, reader_options=store.to_json())`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringweave.data_pipes.compression import codec_of_shard
from ringweave.data_pipes.index import ShardIndex, load_index
from ringweave.data_pipes.reader import ShardReader
from ringweave.data_pipes.shard_names import (
    COMMAND,
    Shard,
    address_of,
    local_path,
    name_of,
    parse_command,
    shown,
    shown_command,
)
from ringweave.data_pipes.storage import ByteCache, ByteSource, LocalFile, StorageOptions
from ringweave.data_pipes.stored_shard import CommandShard, PackedShard, RemoteShard, StoredShard
from ringweave.tokenizers.errors import DataError

__all__ = ["OPEN_SHARD", "Store", "StoredShard", "index_of", "open_shard", "reader_of", "stored"]
#: What `Setup.reader` is for workers that open shards through a store.
OPEN_SHARD = "ringweave.data_pipes.store:open_shard"


@dataclass(frozen=True)
class Store:
    """Opens shards. cache_dir: folder of the cache (None: none), made when it is first needed; cache_bytes: its cap.

    Equal stores open alike. May be pickled and forked.
    """

    options: StorageOptions = field(default_factory=StorageOptions)
    cache_dir: Path | None = None
    cache_bytes: int = 20 << 30

    @functools.cached_property
    def cache(self) -> ByteCache | None:
        """The cache, or None. Raises DataError if its folder cannot be used."""
        return None if self.cache_dir is None else ByteCache(self.cache_dir, self.cache_bytes)

    @property
    def tokens_dir(self) -> Path | None:
        """Where token lengths and caches of shards go that nothing can be written beside; not under the cap."""
        return None if self.cache_dir is None else self.cache_dir / "tokens"

    def cache_for(self, shard: object) -> ByteCache:
        """The cache, for a shard that has to be made into a file. Raises DataError if there is none."""
        if self.cache is None:
            raise DataError(
                "no cache for a shard without random access",
                where=shown(str(shard)),
                why="packed shards and outputs of commands are made into files of the cache before they are read",
                fix="set data.cache.dir in the config (--cache DIR); or unpack the shard",
            )
        return self.cache

    def shard(self, address: Path | str | Sequence[str], *, name: str = "") -> ByteSource:
        """The bytes of a plain tar behind a path, an address, or a command (a list of arguments).

        `.tar.gz`, `.tgz` and `.tar.zst` are unpacked, and commands run, when they are first read. name: of a command's
        output. Nothing is opened or asked here. Raises DataError for addresses nobody can read, texts that pose as
        commands, and a command without `allow_pipe`.
        """
        if not isinstance(address, Path | str):
            return self._command(list(address), name)
        text = address_of(address)
        path = local_path(address)
        if path is not None:
            return LocalFile(path)
        if codec := codec_of_shard(name_of(text)):
            if "://" not in text:
                text = str(Path(text).absolute())  # the cache knows it by its name
            return PackedShard(self, text, name_of(text), codec)
        return RemoteShard(self, text, name_of(text))

    def resolve(self, address: Path | str | Sequence[str], *, name: str = "") -> Path | ByteSource:
        """As `shard`, but the path of a plain local tar: what lists of shards hold."""
        source = self.shard(address, name=name)
        return source.path if isinstance(source, LocalFile) else source

    def at(self, address: str) -> Path | ByteSource:
        """The shard that `address_of` gave this address for."""
        if address.startswith(COMMAND):
            name, argv = parse_command(address)
            return self._command(argv, name)
        return self.resolve(address)

    def _command(self, argv: list[str], name: str) -> CommandShard:
        name = name_of(name) if name else "command"
        if not self.options.allow_pipe:
            fix = "set data.allow_pipe: true in your own config if you trust this command"
            where = shown_command(name, argv)
            raise DataError("commands are not allowed", where=where, why="allow_pipe is off", fix=fix)
        return CommandShard(self, argv, name)

    def to_json(self) -> dict[str, Any]:
        """The store as plain values; holds no secrets. `from_json` and `open_shard` take it."""
        usual = StorageOptions()
        options = {
            field.name: getattr(self.options, field.name)
            for field in dataclasses.fields(StorageOptions)
            if getattr(self.options, field.name) != getattr(usual, field.name)
        }
        cache = None if self.cache_dir is None else str(Path(self.cache_dir).absolute())
        plain: dict[str, Any] = json.loads(json.dumps({"options": options, "cache_dir": cache}))
        return {**plain, "cache_bytes": self.cache_bytes}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Store:
        """Raises DataError for anything that `to_json` does not give."""
        try:
            options: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in values["options"].items()
            }
            cache = values["cache_dir"]
            return cls(
                StorageOptions(**options), None if cache is None else Path(cache), int(values["cache_bytes"])
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError("malformed store", why=f"{type(error).__name__}: {error}") from None


def open_shard(address: str, **options: Any) -> ShardReader:
    """The reader of a shard in a worker process. options: `Store.to_json` of the job's store."""
    return ShardReader(_store(json.dumps(options, sort_keys=True)).at(address))


@functools.lru_cache(maxsize=8)
def _store(options: str) -> Store:
    """One store, and so one cache, for all shards of a process."""
    return Store.from_json(json.loads(options))


def reader_of(shard: Shard) -> ShardReader:
    """The reader of any shard. Raises as `ShardReader`, and as opening a packed shard does."""
    return ShardReader(stored(shard) or shard)


def index_of(shard: Shard) -> ShardIndex:
    """The index of any shard; nothing of it stays open. Raises as `load_index`, and as opening a packed shard does."""
    held = stored(shard)
    try:
        return load_index(held or shard)
    finally:
        if held is not None:
            held.close()


def stored(shard: Shard) -> StoredShard | None:
    """A shard that nothing can be kept beside, as one; None for a plain local tar.

    A bare address is opened with the usual options and without a cache.
    """
    if isinstance(shard, StoredShard):
        return shard
    if local_path(shard) is not None:
        return None
    if not isinstance(shard, Path | str | LocalFile):
        return RemoteShard(Store(), shard.url, name_of(shard.url), shard)
    found = Store().at(str(shard))
    assert isinstance(found, StoredShard)
    return found
