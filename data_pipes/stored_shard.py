"""Shards that nothing can be kept beside: remote ones, packed ones, and outputs of commands.

Each is a `ByteSource` of a plain tar. A remote one is read by range. The others have no random access: at the first
read they are made into a file of the cache, whole. Their index, and that of a remote shard that has none beside it,
is built at the first use by reading the shard once, and kept in `<cache>/indexes/`, named by a hash of address and
version.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ringweave.data_pipes.compression import Caps, Codec, codec_of_shard, decompress
from ringweave.data_pipes.index import build_index, load_index, write_index
from ringweave.data_pipes.index_file import read_identity
from ringweave.data_pipes.shard_names import command_address, shown_command
from ringweave.data_pipes.storage import ByteSource, LocalFile, open_pipe, open_source, redact, unpacked
from ringweave.data_pipes.storage_cache_dir import CacheBusyError, file_lock
from ringweave.tokenizers.errors import DataError

if TYPE_CHECKING:
    from ringweave.data_pipes.storage import ByteCache
    from ringweave.data_pipes.store import Store

_SIDECAR = ".idx"
#: Bytes that hold the metadata of nearly every sidecar: one request.
_HEAD = 1 << 16
_PIECE = 8 << 20
#: Seconds to wait for another process that builds the same index; after that, two build it.
_BUILDING_S = 3600.0
#: Answers to a request for what is not there; stores say "forbidden" where a reader may not list.
_ABSENT = ("missing object", "missing file", "the server refuses")
#: Times that a shard is made for one read, if others evict it at once.
_TIMES = 4
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class StoredShard(ABC):
    """What all of them do. address: the whole address, for workers; name: its last part; `str` shows no secrets."""

    whole = True

    def __init__(self, store: Store, address: str, name: str) -> None:
        self.store, self.address, self.url, self.name = store, address, address, name
        self._identity: tuple[int, int] | None = None
        self._index_source: ByteSource | None = None
        self._lock = threading.RLock()

    # --- what the kinds differ in --------------------------------------------------------------------------

    @abstractmethod
    def size(self) -> int:
        """See `ByteSource`."""

    @abstractmethod
    def version(self) -> str:
        """See `ByteSource`."""

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """See `ByteSource`."""

    @abstractmethod
    def close(self) -> None:
        """See `ByteSource`."""

    @abstractmethod
    def _beside(self, suffix: str) -> ByteSource:
        """The object beside it."""

    def _key(self) -> str:
        """What tells this shard from others and from other versions of it, without its secrets."""
        return f"{redact(self.address)}\0{self.version()}"

    # --- the index -----------------------------------------------------------------------------------------

    def sibling(self, suffix: str) -> ByteSource:
        """The object beside it; `.idx` gives the index wherever it lies, and makes it if there is none.

        Raises DataError for a shard without an index and without a cache that one could be kept in.
        """
        if suffix != _SIDECAR:
            return self._beside(suffix)
        with self._lock:
            if self._index_source is None:
                self._index_source = self._find_index()
            return self._index_source

    def _find_index(self, **options: Any) -> ByteSource:
        kept = self.kept_index()
        return LocalFile(kept if kept is not None and kept.is_file() else self.build_index(**options))

    def ensure_index(self, *, rebuild: bool = False, **options: Any) -> Path | None:
        """Builds the index with these options if there is none (or with `rebuild`) and gives its file then.

        Raises as `build_index` and, for an index beside a remote shard that does not fit it, as `load_index`.
        """
        kept = self.kept_index()
        before = kept is not None and kept.is_file()
        with self._lock:
            self._index_source = None if rebuild else self._find_index(**options)
        try:
            if rebuild:
                return self.build_index(rebuild=True, **options)
            load_index(self)
        except DataError as error:
            if not before or error.what not in ("malformed index", "stale index"):
                raise
            return self.build_index(rebuild=True, **options)
        finally:
            self.close()
        return kept if kept is not None and not before and kept.is_file() else None

    def kept_index(self) -> Path | None:
        """Where the index of this version is kept, if not beside the shard; None without a cache."""
        if self.store.cache_dir is None:
            return None
        name = hashlib.blake2b(self._key().encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        return self.store.cache_dir / "indexes" / f"{name}{_SIDECAR}"

    def build_index(self, *, rebuild: bool = False, **options: Any) -> Path:
        """Reads the shard whole and keeps its index in the cache, once for all processes of this host.

        rebuild: also if one is kept already. options: those of `index.build_index`. Raises DataError as that does,
        and without a cache.
        """
        kept = self.kept_index()
        if kept is None:
            raise DataError(
                "shard without an index",
                where=str(self),
                why="there is none beside it, and no cache in which one could be kept",
                fix="set data.cache.dir (--cache DIR): the shard is then read once and its index kept there; or run "
                "`ringweave data index` before the shards are copied, and copy the .idx files along",
            )
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with _alone(kept):
                if rebuild or not kept.is_file():  # another process may have made it meanwhile
                    self._before_building()
                    write_index(kept.with_suffix(""), build_index(self, **options))
        except OSError as error:
            fix = "free space, or put data.cache.dir on another disk"
            raise DataError("cannot keep an index", where=str(kept), why=str(error), fix=fix) from None
        self._identity = None
        return kept

    def _before_building(self) -> None:
        _log.info("building the index of %s", self)

    def identity(self) -> tuple[int, int]:
        """(bytes, crc32 of the index: `ShardIndex.crc32`), asked for once. What had to be made for it is let go."""
        if self._identity is None:
            source = self.sibling(_SIDECAR)
            total = source.size()
            found = read_identity(source.read(0, min(_HEAD, total)))
            if isinstance(found, int):
                found = read_identity(source.read(0, min(found, total)))
            source.close()
            if not isinstance(found, tuple) or found[0] != self.size():
                index = load_index(self)
                found = index.shard_size, index.crc32
            self._identity = found
        return self._identity

    def __str__(self) -> str:
        return redact(self.address)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


class RemoteShard(StoredShard):
    """A plain tar in a store, read by range; its index is the one beside it if there is one."""

    whole = False

    def __init__(self, store: Store, address: str, name: str, source: ByteSource | None = None) -> None:
        """source: what is read, if it is open already."""
        super().__init__(store, address, name)
        self._source = source or open_source(address, options=store.options, cache=store.cache)

    def size(self) -> int:
        return self._source.size()

    def version(self) -> str:
        return self._source.version()

    def read(self, offset: int, size: int) -> bytes:
        return self._source.read(offset, size)

    def close(self) -> None:
        self._source.close()

    def _beside(self, suffix: str) -> ByteSource:
        return self._source.sibling(suffix)

    def _find_index(self, **options: Any) -> ByteSource:
        self.size()  # a missing shard is not a shard without an index
        beside = self._beside(_SIDECAR)
        try:
            beside.size()
        except DataError as error:
            if error.what not in _ABSENT:
                raise
            return super()._find_index(**options)
        return beside

    def _before_building(self) -> None:
        _log.warning(
            "%s has no index beside it: all its %.1f MB are read once to make one, kept in %s; "
            "`ringweave data index` before the copy to the store saves that",
            self, self.size() / 1e6, self.store.cache_dir,
        )  # fmt: skip


class MadeShard(StoredShard):
    """A tar that is made into a file of the cache at the first read, and again if it was evicted since.

    The file is held during single reads only: readers keep shards open that they are done with, and those of many
    processes must not fill the cache for good.
    """

    def __init__(self, store: Store, address: str, name: str) -> None:
        super().__init__(store, address, name)
        self._made: LocalFile | None = None
        self._evicted = 0

    @abstractmethod
    def _make(self, cache: ByteCache) -> LocalFile:
        """The tar as a file of the cache."""

    def _file(self) -> LocalFile:
        with self._lock:
            if self._made is None:
                made = self._make(self.store.cache_for(self))
                kept = self.kept_index()
                known = _size_in(kept) if kept is not None else None
                found = made.size()
                made.close()
                if known is not None and found != known:
                    why = f"its index is of {known} bytes, now there are {found}"
                    fix = f"if it changed on purpose, delete {kept} and start a new run"
                    raise DataError("the shard changed", where=str(self), why=why, fix=fix)
                self._made = made
            return copy.copy(self._made)  # each reader opens and closes one of its own

    def size(self) -> int:
        """Of the plain tar: as its index says, so that looking at a job's shards makes none of them."""
        kept = self.kept_index()
        known = _size_in(kept) if kept is not None else None
        return self._use(lambda file: file.size()) if known is None else known

    def read(self, offset: int, size: int) -> bytes:
        return self._use(lambda file: file.read(offset, size))

    def _use(self, use: Callable[[LocalFile], _T]) -> _T:
        for _ in range(_TIMES):
            try:
                with contextlib.closing(self._file()) as file:
                    return use(file)
            except DataError as error:
                if error.what != "missing file":
                    raise
            self._made = None
            self._evicted += 1
            if self._evicted & (self._evicted - 1) == 0:
                _log.warning(
                    "%s was evicted from the cache while in use and is made again (%d times so far): "
                    "raise data.cache.size",
                    self, self._evicted,
                )  # fmt: skip
        why = f"it was evicted {_TIMES} times in a row before it could be read"
        raise DataError("cache too small", where=str(self), why=why, fix="raise data.cache.size")

    def close(self) -> None:
        """Nothing is held between reads."""


class PackedShard(MadeShard):
    """A gzip or zstd shard, on a disk or in a store."""

    def __init__(self, store: Store, address: str, name: str, codec: Codec) -> None:
        super().__init__(store, address, name)
        self._codec: Codec = codec
        self._source = open_source(address, options=store.options)

    def version(self) -> str:
        return self._source.version()

    def close(self) -> None:
        self._source.close()

    def _beside(self, suffix: str) -> ByteSource:
        return self._source.sibling(suffix)

    def _make(self, cache: ByteCache) -> LocalFile:
        return unpacked(self._source, self._codec, cache=cache)


class CommandShard(MadeShard):
    """What a command writes, unpacked if its name says that it is packed."""

    def __init__(self, store: Store, argv: Sequence[str], name: str) -> None:
        super().__init__(store, command_address(name, argv), name)
        self._argv = list(argv)

    def version(self) -> str:
        """Of the command: two that differ in any argument are two shards."""
        words = "\0".join(self._argv).encode("utf-8", "surrogateescape")
        return hashlib.blake2b(words, digest_size=16).hexdigest()

    def _key(self) -> str:
        return f"command {self.name}\0{self.version()}"

    def _beside(self, suffix: str) -> ByteSource:
        raise DataError("nothing lies beside a command", where=f"{self} {suffix}")

    def _make(self, cache: ByteCache) -> LocalFile:
        output = open_pipe(self._argv, cache=cache, options=self.store.options)
        codec = codec_of_shard(self.name)
        if codec is None:
            return output
        try:
            total = output.size()
            pieces = (output.read(at, min(_PIECE, total - at)) for at in range(0, total, _PIECE))
            plain = decompress(pieces, codec, where=str(self), caps=Caps(), what="shard")
            return cache.materialise(f"{codec} {self.name}", self.version(), plain)
        finally:
            output.close()

    def __str__(self) -> str:
        return shown_command(self.name, self._argv)


def _size_in(index: Path) -> int | None:
    """The shard's bytes as a kept index has them."""
    try:
        with open(index, "rb") as file:
            found = read_identity(file.read(_HEAD))
            if isinstance(found, int):
                file.seek(0)
                found = read_identity(file.read(found))
    except OSError:
        return None
    return found[0] if isinstance(found, tuple) else None


@contextlib.contextmanager
def _alone(kept: Path) -> Iterator[None]:
    """Hold the right to build an index; after a long wait go on without it (twice is only slower)."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(CacheBusyError):
            held.enter_context(file_lock(kept.with_name(f".lock-{kept.name[:2]}"), _BUILDING_S))
        yield
