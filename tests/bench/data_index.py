"""Indexing a shard in the page cache: members a second of the header walk and of the whole index (crc32 of payloads and
headers, names, keys, checks), beside the claimed number and beside Python's tarfile."""

from __future__ import annotations

import random
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import _harness as bench

from ringweave.data_pipes.index import build_index
from ringweave.data_pipes.tar import LocalBytes, Walk

CLAIM = "indexing takes at least 300,000 members a second from the page cache"
TARGET = 300_000.0
BLOCK = 512


def make_shard(path: Path, members: int, size: int) -> None:
    """A ustar shard of `members` members (two a sample) of `size` random bytes."""
    rng = random.Random(0)
    data = rng.randbytes(size) + bytes(-size % BLOCK)
    with open(path, "wb") as file:
        for i in range(members):
            info = tarfile.TarInfo(f"set/{i // 2:09d}.{('jpg', 'txt')[i % 2]}")
            info.size = size
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + data)
        file.write(bytes(2 * BLOCK))


def headers(path: Path) -> tuple[float, int]:
    """Members a second of the walk over headers alone, and how many there are."""
    source = LocalBytes(path)
    started = time.perf_counter()
    count = len(Walk(source, path.name, checksums=False).run())
    seconds = time.perf_counter() - started
    source.close()
    return count / seconds, count


def whole(path: Path) -> float:
    """Members a second of everything an index holds."""
    started = time.perf_counter()
    index = build_index(path)
    return len(index.columns["offsets"]) / (time.perf_counter() - started)


def theirs(path: Path) -> float:
    """Members a second of tarfile's own list of members."""
    started = time.perf_counter()
    with tarfile.open(path, "r:") as tar:
        count = len(tar.getmembers())
    return count / (time.perf_counter() - started)


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    members = 4_000 if options.tiny else 200_000
    bench.one_thread()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        make_shard(path, members, 200)
        assert headers(path)[1] == members
        sides = [lambda: headers(path)[0], lambda: whole(path), lambda: theirs(path)]
        walk, index, rival = bench.paired(sides, runs=options.runs)
    claimed, unit = [TARGET] * len(walk), "members/s"
    bench.emit(
        CLAIM,
        bench.Part("headers alone beside the claimed number", walk, claimed, unit, 1.0, "higher"),
        bench.Part("the whole index beside the claimed number", index, claimed, unit, 1.0, "higher"),
        bench.Part("headers alone beside tarfile", walk, rival, unit, 5.0, "higher"),
        sizes={"members": members, "bytes a member": 200},
    )


if __name__ == "__main__":
    main()
