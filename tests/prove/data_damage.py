"""Truncation at every block and 2,000 random bit flips of real shards: each is detected, or every payload is whole.

The shards are the demo's six sources, a few records each: text, pictures, layers, scores, sound, video. `--tiny` takes
fewer and writes no row.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import _harness as harness

from ringweave.data_pipes.demo import build_demo
from ringweave.data_pipes.index import ShardIndex, build_index, load_index
from ringweave.data_pipes.reader import ShardReader
from ringweave.tokenizers.errors import DataError

CLAIM = "truncation at every 512 bytes and 2,000 bit flips of real shards: each detected, or the payload identical"
FLIPS = 2000
BLOCK = 512


class Memory:
    """A byte source over bytes in memory, so that 10,000 damaged shards need no disk."""

    def __init__(self, url: str, data: bytes | bytearray) -> None:
        self.url, self.data = url, data

    def size(self) -> int:
        return len(self.data)

    def version(self) -> str:
        return ""

    def read(self, offset: int, size: int) -> bytes:
        """Short where the data end, as a file that was cut gives it."""
        return bytes(self.data[offset : offset + size])

    def sibling(self, suffix: str) -> Memory:
        raise DataError("no such object", where=self.url + suffix)

    def close(self) -> None:
        pass

    def __str__(self) -> str:
        return self.url


def outcomes(source: Memory, index: ShardIndex) -> list[dict[str, bytes] | DataError]:
    """What a reader with this index gives for each sample."""
    with ShardReader(source, index=index) as reader:
        found = reader.read_many(0, index.count, errors="return")
    return [x if isinstance(x, DataError) else x.members for x in found]


def named(error: DataError, url: str) -> bool:
    """Whether a message says which shard and where."""
    return url in error.where and "@" in error.where and bool(error.why)


def truncations(proof: harness.Proof, shard: Path, original: list[dict[str, bytes]], extra: int) -> int:
    """Every block boundary and some odd places; returns how many."""
    data, index = shard.read_bytes(), load_index(shard)
    whole = [max(m.offset + m.size for m in index.members(i)) for i in range(index.count)]
    last = index.members(index.count - 1)[-1]
    end = last.offset + -(-last.size // BLOCK) * BLOCK + 2 * BLOCK  # what follows is padding
    rng = random.Random(shard.name)
    cuts = sorted({*range(0, end, BLOCK), *(rng.randrange(end) for _ in range(extra)), end - 1})
    for cut in cuts:
        source = Memory(shard.name, data[:cut])
        try:
            build_index(source)
            proof.holds(False, f"{shard.name} cut at {cut} was indexed")
        except DataError as error:
            proof.holds(named(error, shard.name), f"{shard.name} cut at {cut}: {error}")
        for i, (found, wanted) in enumerate(zip(outcomes(source, index), original, strict=True)):
            right = (
                named(found, shard.name) and whole[i] > cut
                if isinstance(found, DataError)
                else found == wanted
            )
            proof.holds(right, f"{shard.name} cut at {cut}, sample {i}: {found}")
    return len(cuts)


def flips(
    proof: harness.Proof, shards: list[Path], originals: list[list[dict[str, bytes]]], count: int
) -> tuple[int, int]:
    """Random bits of random shards, by size; (detected, harmless)."""
    rng = random.Random(0)
    loaded = [(path.name, bytearray(path.read_bytes()), load_index(path)) for path in shards]
    detected = 0
    for _ in range(count):
        which = rng.choices(range(len(shards)), weights=[len(data) for _, data, _ in loaded])[0]
        name, data, index = loaded[which]
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[at] ^= bit
        found = outcomes(Memory(name, data), index)
        data[at] ^= bit
        errors = [x for x in found if isinstance(x, DataError)]
        detected += bool(errors)
        proof.holds(len(errors) <= 1, f"one flip in {name} @{at} damaged {len(errors)} samples")
        proof.holds(all(named(e, name) for e in errors), f"flip in {name} @{at} is not named: {errors}")
        same = [x == w or isinstance(x, DataError) for x, w in zip(found, originals[which], strict=True)]
        proof.holds(all(same), f"flip in {name} @{at} changed a payload in silence")
    return detected, count - detected


def run(proof: harness.Proof, folder: Path, *, limit: int, extra: int, count: int) -> None:
    """limit: records a source; extra: odd places cut beside the blocks, for each shard; count: flips."""
    build_demo(folder, limit=limit)
    shards = sorted(p for p in folder.glob("*.tar") if load_index(p).count)
    originals = []
    for path in shards:
        with ShardReader(path) as reader:
            originals.append([s.members for s in reader.read_many(0, len(reader))])
    cuts = sum(truncations(proof, p, o, extra) for p, o in zip(shards, originals, strict=True))
    detected, harmless = flips(proof, shards, originals, count)
    size = sum(p.stat().st_size for p in shards)
    proof.found(shards=len(shards), MB=round(size / 1e6, 1), truncations=cuts, flips=count)
    proof.found(flips_detected=detected, flips_without_effect=harmless)


def main() -> None:
    """Build the shards, damage them, write the row."""
    tiny = "--tiny" in sys.argv[1:]
    limit, extra, count = (12, 20, 100) if tiny else (40, 500, FLIPS)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "proofs.md" if tiny else harness.PAGE
        with harness.prove("data_damage", CLAIM, page=page) as proof:
            run(proof, Path(folder), limit=limit, extra=extra, count=count)


if __name__ == "__main__":
    main()
