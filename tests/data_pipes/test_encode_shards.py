"""Token caches made beforehand: the files of `make_lengths`, byte for byte, also if the maker is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))

from token_fixtures import HERE, Bytes, png, setup, texts, write_shard

from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.encode_shards import encode_shard
from ringweave.data_pipes.make_lengths import make_lengths
from ringweave.data_pipes.token_cache import TokenCache
from ringweave.data_pipes.token_lengths import read_lengths, write_lengths
from ringweave.data_pipes.workers import TokenWorkers
from ringweave.tokenizers.errors import DataError

TEXT = ("text",)
HASH = "0" * 64


def tokens_of(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of everything that is not a shard or its index."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix not in (".tar", ".idx")}


def encode(shard: Path, **options: object) -> tuple[int, list[tuple[int, int]]]:
    """(samples encoded now, progress) in this process."""
    said: list[tuple[int, int]] = []
    with TokenWorkers(0, setup()) as workers:
        made = encode_shard(
            shard, TEXT, HASH, workers=workers, progress=lambda *now: said.append(now), **options
        )  # type: ignore[arg-type]
    return made.made, said


@pytest.mark.parametrize("count", [0, 1, 3])
def test_files_are_those_of_a_run_for_any_number_of_workers(tmp_path: Path, count: int) -> None:
    plan = ("caption?", "image")
    samples = [{"png": png(1 + i % 5, i), "txt": b"c%d" % i} for i in range(150)]
    samples[70] = {"png": b"broken", "txt": b"c"}
    shard = write_shard(tmp_path / "image-0000.tar", samples)
    make_lengths(shard, plan, Bytes())
    wanted = tokens_of(tmp_path)
    for name in wanted:
        (tmp_path / name).unlink()
    with TokenWorkers(count, setup(), memory_bytes=0) as workers:
        made = encode_shard(shard, plan, HASH, workers=workers, keep_every_s=0.0)
        again = encode_shard(shard, plan, HASH, workers=workers)
        assert workers.counts.documents == 150
    assert tokens_of(tmp_path) == wanted and len(wanted) == 2
    assert (made.samples, made.made, again.made) == (150, 150, 0)
    assert [entry["key"] for entry in made.skipped] == ["image-0000-70"]
    assert again == replace(made, made=0)


_KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from token_fixtures import setup
from ringweave.data_pipes.encode_shards import encode_shard
from ringweave.data_pipes.workers import TokenWorkers
workers = TokenWorkers(2, setup({log!r}))
for name in ("a", "b"):
    encode_shard(Path({folder!r}) / f"{{name}}.tar", ("text",), "0" * 64, workers=workers, keep_every_s=0.0)
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_and_leaves_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL inside the second shard: the first is not encoded again, nor what is kept of the second."""
    slow = {i: f"slow 0.01 {i}" for i in range(120)}
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "a.tar", texts(5, tag="first "))
        write_shard(tmp_path / name / "b.tar", texts(120, orders=slow))
    folder, log = tmp_path / "killed", tmp_path / "log"
    program = _KILLED.format(here=HERE, log=str(log), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not (parts := list(folder.glob("b.tokens-*.part-*"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    parts = list(folder.glob("b.tokens-*.part-*"))
    kept = sum(int(p.stem.rpartition("-")[2]) for p in parts)
    assert 0 < kept < 120 and list(folder.glob("a.tokens-*")) and not list(folder.glob("b.tar.len-*"))
    (folder / f".b.tokens-x.safetensors.{process.pid}.tmp").write_bytes(b"left by the killed one")
    log.write_text("")
    with TokenWorkers(2, setup(str(log))) as workers:
        first, second = (encode_shard(folder / f"{n}.tar", TEXT, HASH, workers=workers) for n in "ab")
    assert (first.made, second.made) == (0, 120 - kept) and len(log.read_text().splitlines()) == 120 - kept
    for name in ("a", "b"):
        encode(tmp_path / "whole" / f"{name}.tar")
    assert tokens_of(folder) == tokens_of(tmp_path / "whole")


def test_parts_that_a_run_left_are_taken_over_and_damaged_ones_made_again(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", texts(300, words=50))
    make_lengths(shard, TEXT, Bytes(), store_tokens=False)
    with TokenWorkers(0, setup()) as workers:
        corpus = Corpus.open([SourceSpec("text", [shard], TEXT)], manifest_hash=HASH, workers=workers)
        corpus.make(corpus.units([("text", 100), ("text", 299)]))
        kept = corpus.read.made
    parts = sorted(tmp_path.glob("*.part-*"))
    assert len(parts) == 2 and 2 < kept < 300
    made, said = encode(shard)
    assert made == 300 - kept and said[-1] == (300, made) and not list(tmp_path.glob("*.part-*"))
    [cache] = tmp_path.glob("*.tokens-*")
    whole = cache.read_bytes()
    cache.unlink()
    data = bytearray(whole)
    parts[0].write_bytes(data[: len(data) // 2])  # what is there is not a part
    made, _ = encode(shard)
    assert made == 300 and cache.read_bytes() == whole and not list(tmp_path.glob("*.part-*"))


def test_lengths_that_a_run_planned_with_stay_and_wrong_ones_do_not(tmp_path: Path) -> None:
    """A picture whose header is whole has a length, and turns out to be damaged when it is read."""
    shard = write_shard(tmp_path / "a.tar", texts(30, orders={3: "undecodable"}))
    planned = np.asarray([len(s["txt"]) for s in texts(30, orders={3: "undecodable"})], np.int64)
    write_lengths(shard, TEXT, HASH, planned, [])
    assert encode(shard)[0] == 30
    assert read_lengths(shard, TEXT, HASH).load().tolist() == planned.tolist()
    assert TokenCache.open(shard, TEXT, HASH).lengths[3] == 0
    write_lengths(shard, TEXT, HASH, planned + 1, [])
    assert encode(shard)[0] == 0
    held = read_lengths(shard, TEXT, HASH)
    assert held.load().tolist() == [0 if i == 3 else n for i, n in enumerate(planned.tolist())]
    assert [entry["key"] for entry in held.skipped] == ["a-3"]


def test_too_many_skips_and_damage_end_it_as_they_end_a_run(tmp_path: Path) -> None:
    bad = write_shard(tmp_path / "a.tar", texts(40, orders={i: "undecodable" for i in range(3)}))
    with pytest.raises(DataError, match="3 of the first") as caught:
        encode(bad)
    assert "cannot decode this text" in caught.value.why and not tokens_of(tmp_path)
    shard = write_shard(tmp_path / "b.tar", texts(40))
    data = bytearray(shard.read_bytes())
    data[data.index(b"7 word")] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="damaged shard"):
        encode(shard)
