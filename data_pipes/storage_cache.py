"""A byte-capped cache on disk for remote objects: blocks with checksums, and whole files that were unpacked.

A block file is a header (magic, key, number, length, a crc32 for every 64 KiB, crc32 of the header) and the bytes.
Reads check the pieces they touch; a block that is damaged, half there or of another object is taken away and
fetched again. Several processes may use one folder (see storage_cache_dir.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ringweave.data_pipes.checksum import crc32
from ringweave.data_pipes.storage_base import ByteSource, LocalFile, beyond, check_range, redact
from ringweave.data_pipes.storage_cache_dir import STEP, CacheBusyError, CacheDir
from ringweave.tokenizers.errors import DataError

_log = logging.getLogger(__name__)
_HEAD = struct.Struct("<8s16sQII")  # magic, key, number of the block, its bytes, how many pieces
_MAGIC = b"RWBLOCK1"
_PIECE = 1 << 16
#: A file used again within this many seconds keeps its time of last use.
_TOUCH_S = 1.0
#: Missing blocks side by side are fetched by one request of at most this many bytes.
_FETCH = 32 << 20
#: Seconds to wait for another process that makes the same whole file.
_MAKING_S = 600.0


class ByteCache:
    """Blocks and whole files under one cap. Threads, forked and unrelated processes may share the folder."""

    def __init__(self, dir: str | Path, max_bytes: int, *, block_bytes: int = 4 << 20) -> None:
        """dir is made when missing. Raises DataError when it cannot be, or the cap holds not even one block."""
        self.dir, self.max_bytes, self.block_bytes = Path(dir), max_bytes, block_bytes
        self._broken = False
        if max_bytes < 2 * block_bytes:
            why = f"{max_bytes} bytes do not hold two blocks of {block_bytes}"
            raise DataError("cache too small", where=str(dir), why=why, fix="raise data.cache.size")
        try:
            self._folder = CacheDir(self.dir, max_bytes)
        except OSError as error:
            fix = "correct data.cache.dir, or leave it out to read without a cache"
            raise DataError("unusable cache folder", where=str(dir), why=str(error), fix=fix) from None

    @property
    def usable(self) -> bool:
        """False once the disk refused a write: what is there is still read, nothing is added."""
        return not self._broken

    def used(self) -> int:
        """Bytes of all files in the folder."""
        return self._folder.used()

    def get(self, key: bytes, number: int, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of a block, None if it is not there (any more) or not sound."""
        path = self._block_path(key, number)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            data = _read_block(fd, key, number, start, stop)
            if data is not None:
                _touch(fd)
        except OSError:
            data = None
        finally:
            os.close(fd)
        if data is None:
            with contextlib.suppress(OSError):
                path.unlink()
        return data

    def put(self, key: bytes, number: int, block: bytes) -> None:
        """Keep a block if there is room. A full or read-only disk is warned of once, and then left alone."""
        if self._broken:
            return
        header = _block_header(key, number, block)
        path = self._block_path(key, number)
        try:
            with self._folder.locked() as lock:
                if path.exists() or not self._folder.make_room(lock, len(header) + len(block)):
                    return
                path.parent.mkdir(exist_ok=True)
                temporary, fd = self._folder.temporary()
                try:
                    _write(fd, 0, header)
                    _write(fd, len(header), block)
                    os.rename(temporary, path)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
                finally:
                    os.close(fd)
        except CacheBusyError:
            return
        except OSError as error:
            self._give_up(error)

    def materialise(
        self, name: str, version: str, pieces: Iterable[bytes], *, max_bytes: int | None = None
    ) -> LocalFile:
        """The whole file that is known by (name, version); made of `pieces` if it is not there.

        name: an address or a command; secrets in it do not count. max_bytes: of the file. While the result or a
        copy of it is open, it is not evicted. Raises DataError when it does not fit, and what `pieces` raises.
        """
        key = cache_key(name, version)
        path = self.dir / "whole" / f"{key.hex()}.file"
        if (found := _held(path)) is not None:
            return found
        with self._folder.making(key.hex(), _MAKING_S):
            if (found := _held(path)) is not None:
                return found  # another process made it meanwhile
            try:
                return self._make(path, pieces, self.max_bytes if max_bytes is None else max_bytes, name)
            except OSError as error:
                fix = "free space, or put data.cache.dir on another disk"
                raise DataError(
                    "cannot unpack into the cache",
                    where=f"{redact(name)} -> {self.dir}",
                    why=str(error),
                    fix=fix,
                ) from None

    def _make(self, path: Path, pieces: Iterable[bytes], limit: int, name: str) -> LocalFile:
        with self._folder.locked():
            temporary, fd = self._folder.temporary()
        try:
            size = reserved = 0
            for piece in pieces:
                size += len(piece)
                if size > limit:
                    why, fix = (
                        f"more than the {limit} bytes allowed",
                        "raise the limit if the object is meant to be so large",
                    )
                    raise DataError("object too large", where=redact(name), why=why, fix=fix)
                if size > reserved:
                    more = -(-(size - reserved) // STEP) * STEP
                    with self._folder.locked() as lock:
                        if not self._folder.make_room(lock, more):
                            raise self._no_room(name, size)
                        reserved += more
                        os.ftruncate(fd, reserved)  # so that a count of the folder sees what is reserved
                _write(fd, size - len(piece), piece)
            os.ftruncate(fd, size)
            os.fsync(fd)
            os.rename(temporary, path)
            fcntl.flock(fd, fcntl.LOCK_SH)
            return _HeldFile(path, fd)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            os.close(fd)
            raise

    def _no_room(self, name: str, size: int) -> DataError:
        why = f"{size} bytes so far do not fit beside what is in use; the cap is {self.max_bytes}"
        fix = "raise data.cache.size: it has to hold every unpacked shard that is open at once"
        return DataError("cache too small", where=f"{redact(name)} -> {self.dir}", why=why, fix=fix)

    def _block_path(self, key: bytes, number: int) -> Path:
        name = key.hex()
        return self.dir / "blocks" / name[:2] / f"{name}-{number}"

    def _give_up(self, error: OSError) -> None:
        if not self._broken:
            self._broken = True
            _log.warning("cache %s cannot be written (%s): reading on without it", self.dir, error)

    def __getstate__(self) -> dict[str, object]:
        return {"dir": self.dir, "max_bytes": self.max_bytes, "block_bytes": self.block_bytes}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc, arg-type]


class CachedSource:
    """A remote source whose blocks are kept. The first use asks the server for the version, the key of the blocks."""

    def __init__(self, source: ByteSource, cache: ByteCache) -> None:
        self.source, self.cache, self.url = source, cache, source.url

    def size(self) -> int:
        return self.source.size()

    def version(self) -> str:
        return self.source.version()

    def read(self, offset: int, size: int) -> bytes:
        check_range(offset, size)
        total, step = self.source.size(), self.cache.block_bytes
        if offset + size > total:
            raise beyond(self, offset, size, total)
        if not size:
            return b""
        key = cache_key(self.url, self.source.version())
        pieces: list[bytes] = []
        missing: list[int] = []
        end = offset + size
        for number in range(offset // step, -(-end // step)):
            start, stop = max(offset, number * step), min(end, number * step + step)
            data = self.cache.get(key, number, start - number * step, stop - number * step)
            if data is None:
                missing.append(number)
                if len(missing) * step < _FETCH:
                    continue
            if missing:
                pieces += self._fetch(key, missing, offset, end, total)
                missing = []
            if data is not None:
                pieces.append(data)
        if missing:
            pieces += self._fetch(key, missing, offset, end, total)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _fetch(self, key: bytes, numbers: list[int], offset: int, end: int, total: int) -> Iterator[bytes]:
        """The wanted parts of missing blocks that lie side by side, which are kept."""
        step = self.cache.block_bytes
        first, last = numbers[0] * step, min(total, numbers[-1] * step + step)
        if not self.cache.usable:  # no use to read more than is wanted
            start, stop = max(offset, first), min(end, last)
            yield self.source.read(start, stop - start)
            return
        data = self.source.read(first, last - first)
        for number in numbers:
            at = number * step - first
            self.cache.put(key, number, data[at : at + step])
        yield data[max(offset, first) - first : min(end, last) - first]

    def sibling(self, suffix: str) -> CachedSource:
        return CachedSource(self.source.sibling(suffix), self.cache)

    def close(self) -> None:
        self.source.close()

    def __str__(self) -> str:
        return str(self.source)

    def __repr__(self) -> str:
        return f"CachedSource({self.source!r})"


class _HeldFile(LocalFile):
    """A whole file of the cache. The shared lock of its descriptor keeps it from eviction."""

    def __init__(self, path: Path, fd: int) -> None:
        super().__init__(path)
        self._open_fd["fd"] = fd

    def _open_file(self) -> int:
        fd = super()._open_file()
        fcntl.flock(fd, fcntl.LOCK_SH)
        _touch(fd)
        return fd


def cache_key(name: str, version: str) -> bytes:
    """16 bytes for (address without its secrets, version)."""
    return hashlib.blake2b(f"{redact(name)}\0{version}".encode(), digest_size=16).digest()


def _held(path: Path) -> LocalFile | None:
    """A whole file, held; None if it is not there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    fcntl.flock(fd, fcntl.LOCK_SH)
    _touch(fd)
    return _HeldFile(path, fd)


def _touch(fd: int) -> None:
    if time.time() - os.fstat(fd).st_mtime > _TOUCH_S:
        with contextlib.suppress(OSError):
            os.utime(fd)


def _block_header(key: bytes, number: int, block: bytes) -> bytes:
    view = memoryview(block)
    crcs = [crc32(view[at : at + _PIECE]) for at in range(0, len(block), _PIECE)]
    head = _HEAD.pack(_MAGIC, key, number, len(block), len(crcs)) + struct.pack(f"<{len(crcs)}I", *crcs)
    return head + struct.pack("<I", crc32(head))


def _read_block(fd: int, key: bytes, number: int, start: int, stop: int) -> bytes | None:
    head = os.pread(fd, 4096, 0)
    if len(head) < _HEAD.size:
        return None
    magic, found, block, length, count = _HEAD.unpack_from(head)
    tail = _HEAD.size + 4 * count
    if (magic, found, block) != (_MAGIC, key, number) or stop > length or count != -(-length // _PIECE):
        return None
    if len(head) < tail + 4:
        head = os.pread(fd, tail + 4, 0)
    if len(head) < tail + 4 or struct.unpack_from("<I", head, tail)[0] != crc32(head[:tail]):
        return None
    first, last = start // _PIECE, -(-stop // _PIECE)
    from_, to = first * _PIECE, min(last * _PIECE, length)
    data = os.pread(fd, to - from_, tail + 4 + from_)
    if len(data) != to - from_:
        return None
    view = memoryview(data)
    for i, crc in enumerate(struct.unpack_from(f"<{last - first}I", head, _HEAD.size + 4 * first)):
        if crc32(view[i * _PIECE : (i + 1) * _PIECE]) != crc:
            return None
    return bytes(view[start - from_ : stop - from_])


def _write(fd: int, at: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done
