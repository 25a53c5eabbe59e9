"""The folder of a byte cache: one lock, one count of bytes, eviction of what was used longest ago.

    DIR/lock        held (flock) while the count changes; holds the count. A killed process lets go of it by itself.
    DIR/blocks/..   pieces of remote objects
    DIR/whole/..    unpacked shards and outputs of commands, held (shared flock) while somebody reads them
    DIR/tmp/..      files being made, held (flock) by their maker, so what nobody holds is a leftover
    DIR/making/..   one maker for a whole file at a time

The count is raised before bytes are written and lowered only by counting the folder anew. So it is never below the
truth, wherever a process dies, and the cap holds. Files become visible by rename, whole; unlinking one that somebody
has open takes nothing from them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

#: Bytes that a growing file reserves at a time, and the share of the cap that eviction leaves in use.
STEP = 16 << 20
_KEEP = 0.9
_PARTS = ("blocks", "whole", "tmp", "making")


class CacheBusyError(OSError):
    """The folder's lock was not free in time."""


class CacheDir:
    """Names, lock and accounting; what is in the files is the caller's business. Safe between processes."""

    def __init__(self, path: Path, max_bytes: int, *, lock_s: float = 10.0) -> None:
        """Makes the folder and takes leftovers of dead processes away. Raises OSError."""
        self.path, self.max_bytes, self.lock_s = path, max_bytes, lock_s
        for part in _PARTS:
            (path / part).mkdir(parents=True, exist_ok=True)
        with self.locked() as lock:
            self._write_count(lock, self._count_and_evict(max_bytes))

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the folder's lock; gives its descriptor. Raises CacheBusyError after `lock_s` seconds."""
        with file_lock(self.path / "lock", self.lock_s) as lock:
            yield lock

    @contextlib.contextmanager
    def making(self, name: str, wait_s: float) -> Iterator[None]:
        """Hold the right to make a whole file; after `wait_s` seconds go on without it (twice is only slower)."""
        path = self.path / "making" / name[:2]
        try:
            with file_lock(path, wait_s):
                yield
        except CacheBusyError:
            yield

    def make_room(self, lock: int, size: int) -> bool:
        """Under the lock: count `size` more bytes, evicting for them; False if they cannot fit."""
        used = self._read_count(lock)
        if used is None or used + size > self.max_bytes:
            used = self._count_and_evict(int(self.max_bytes * _KEEP) - size)
        fits = used + size <= self.max_bytes
        self._write_count(lock, used + size if fits else used)
        return fits

    def temporary(self) -> tuple[Path, int]:
        """A new file that this process holds: (path, descriptor for reading and writing). Under the lock."""
        path = self.path / "tmp" / secrets.token_hex(12)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path, fd

    def used(self) -> int:
        """Bytes of all files there are, counted anew."""
        return sum(size for _, size, _ in self._files())

    def _read_count(self, lock: int) -> int | None:
        text = os.pread(lock, 32, 0)
        return int(text) if text.strip().isdigit() else None

    def _write_count(self, lock: int, count: int) -> None:
        os.pwrite(lock, f"{count:<31}\n".encode(), 0)

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of every file that counts."""
        found: list[tuple[float, int, Path]] = []
        for part in _PARTS[:3]:
            stack = [self.path / part]
            while stack:
                with contextlib.suppress(FileNotFoundError), os.scandir(stack.pop()) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            stack.append(Path(entry.path))
                            continue
                        with contextlib.suppress(FileNotFoundError):
                            stat = entry.stat(follow_symlinks=False)
                            found.append((stat.st_mtime, stat.st_size, Path(entry.path)))
        return found

    def _count_and_evict(self, target: int) -> int:
        """Under the lock: leftovers go, then the oldest files until `target` bytes are used. Returns the bytes left."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        leftovers = [row for row in files if row[2].parent.name == "tmp"]
        others = [row for row in files if row[2].parent.name != "tmp"]
        for _, size, path in leftovers:
            used -= size if _remove(path, held=True) else 0
        for _, size, path in others:
            if used <= target:
                break
            used -= size if _remove(path, held=path.parent.name == "whole") else 0
        return used


def _remove(path: Path, *, held: bool) -> bool:
    """Unlink, unless somebody holds it (`held`: it may be). True if it is gone."""
    fd = -1
    try:
        if held:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except FileNotFoundError:
        return True
    except OSError:
        return False
    finally:
        if fd >= 0:
            os.close(fd)


@contextlib.contextmanager
def file_lock(path: Path, wait_s: float) -> Iterator[int]:
    """Hold a lock file exclusively. Released by hand: a child forked meanwhile has the descriptor too."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        until, pause = time.monotonic() + wait_s, 0.0005
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise CacheBusyError(f"{path} is held by another process for over {wait_s:g} s") from None
                time.sleep(pause)
                pause = min(0.05, pause * 2)
        try:
            yield fd
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)
