"""Writes shards: plain ustar tars with fixed owner, time and mode, an index beside each, all or nothing.

The layout is that of webdataset's ShardWriter (`key.extension`, members of a sample adjacent), so any
WebDataset reader takes them; equal input gives equal bytes, which a time stamp would spoil.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ringweave.data_pipes.index import build_index, write_index
from ringweave.tokenizers.errors import DataError

#: (extension, content): bytes, or an open file and how many bytes it has.
Member = tuple[str, bytes | tuple[BinaryIO, int]]
_BLOCK = 512


class ShardWriter:
    """`stem-0000.tar`, `stem-0001.tar`, ... of about `shard_bytes` each (a larger sample gets its own).

    Files appear under their names at `close`, with their indexes; a `with` block that fails leaves nothing.
    """

    def __init__(self, out: Path, stem: str, *, shard_bytes: int) -> None:
        """Raises DataError when `out` already holds shards of this stem: nothing is overwritten."""
        self.out, self.stem, self._limit = Path(out), stem, shard_bytes
        self.count = self.bytes = 0
        self._written: list[tuple[Path, Path]] = []  # (temporary, final)
        self._file: BinaryIO | None = None
        self._tar: tarfile.TarFile | None = None
        self._size = 0
        old = sorted(self.out.glob(f"{stem}-*.tar")) if self.out.is_dir() else []
        if old:
            raise DataError(
                "there are shards of this name already",
                where=str(old[0]),
                fix="give another folder or another --name, or delete them",
            )
        self.out.mkdir(parents=True, exist_ok=True)

    def add(self, key: str, members: Sequence[Member]) -> None:
        """One sample. Raises DataError when a file does not have the size it was said to have."""
        need = sum(
            _BLOCK + -(-(len(c) if isinstance(c, bytes) else c[1]) // _BLOCK) * _BLOCK for _, c in members
        )
        if self._tar is None or (self._size and self._size + need > self._limit):
            self._roll()
        assert self._tar is not None
        for ext, content in members:
            file, size = (io.BytesIO(content), len(content)) if isinstance(content, bytes) else content
            info = tarfile.TarInfo(f"{key}.{ext}")
            info.size, info.mode, info.mtime = size, 0o444, 0
            info.uname = info.gname = "ringweave"
            try:
                # With the pax format every name that is not ASCII would get an extra header.
                self._tar.format = tarfile.USTAR_FORMAT if _fits_ustar(info) else tarfile.PAX_FORMAT
                self._tar.addfile(info, file)
                if file.read(1):
                    raise OSError("it grew while it was read")
            except OSError as error:
                raise DataError("cannot write a member", where=f"{key}.{ext}", why=str(error)) from None
            self.bytes += size
        self._size += need
        self.count += 1

    def _roll(self) -> None:
        """Ends the open shard and begins the next one."""
        self._finish()
        final = self.out / f"{self.stem}-{len(self._written):04d}.tar"
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        self._written.append((temporary, final))
        self._file = temporary.open("xb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8")
        self._size = 0

    def _finish(self) -> None:
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._tar = self._file = None

    def close(self) -> list[Path]:
        """Puts every shard in its place, reads it back for its index, and returns the paths."""
        self._finish()
        for temporary, final in self._written:
            os.replace(temporary, final)
            write_index(final, build_index(final))
        paths = [final for _, final in self._written]
        self._written = []
        return paths

    def abort(self) -> None:
        """Removes whatever was begun."""
        if self._file is not None:
            self._file.close()
            self._tar = self._file = None
        for temporary, _ in self._written:
            temporary.unlink(missing_ok=True)
        self._written = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.abort()


def _fits_ustar(info: tarfile.TarInfo) -> bool:
    """Whether the header can be plain ustar; a longer name or 8 GiB of data takes a pax header in front."""
    try:
        info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError:
        return False
    return True
