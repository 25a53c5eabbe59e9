"""Tokens made while a job reads: equal to fresh ones, stored whole or not at all, never taken from elsewhere."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent))

from token_fixtures import HERE, Bytes, png, same, setup, texts, write_shard

from ringweave.data_pipes import token_files
from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.documents import encode_sample
from ringweave.data_pipes.make_lengths import make_lengths
from ringweave.data_pipes.reader import ShardReader
from ringweave.data_pipes.token_cache import build_cache
from ringweave.data_pipes.token_files import sweep
from ringweave.data_pipes.token_lengths import write_lengths
from ringweave.data_pipes.token_parts import ShardTokens, part_bounds, part_path
from ringweave.data_pipes.workers import TokenWorkers
from ringweave.tokenizers.errors import DataError, VocabularyError

TEXT = ("text",)
HASH = "0" * 64


def spec(*shards: Path, plan: tuple[str, ...] = TEXT) -> list[SourceSpec]:
    return [SourceSpec("text", list(shards), plan)]


def lengths_only(shard: Path, plan: tuple[str, ...] = TEXT) -> None:
    """The lengths sidecar and no tokens."""
    make_lengths(shard, plan, Bytes(), store_tokens=False)


def parts_of(folder: Path) -> list[str]:
    return sorted(p.name.partition(".part-")[2] for p in folder.glob("[!.]*.part-*"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 90), max_size=300), st.integers(1, 20), st.integers(1, 120))
def test_parts_cover_a_shard_and_stay_within_their_limits(
    lengths: list[int], documents: int, tokens: int
) -> None:
    bounds = part_bounds(np.asarray(lengths, np.int64), documents=documents, tokens=tokens).tolist()
    assert (bounds[0], bounds[-1]) == (0, len(lengths))
    assert all(a < b for a, b in pairwise(bounds))
    for a, b in pairwise(bounds):
        assert b - a <= documents
        assert sum(lengths[a:b]) <= tokens or b - a == 1


@pytest.mark.parametrize("count", [0, 2])
def test_documents_made_on_the_way_equal_fresh_ones_and_are_stored_by_parts(
    tmp_path: Path, count: int
) -> None:
    """The first need of a document makes its part; the second reads it, as does another job."""
    log, plan = tmp_path / "log", ("caption?", "image")
    shard = write_shard(
        tmp_path / "image-0.tar",
        [{"png": png(1 + i % 5, i), "txt": b"%d" % (100 + i)} for i in range(150)],
    )
    lengths_only(shard, plan)
    with TokenWorkers(count, setup(log)) as workers:
        for _ in range(2):
            corpus = Corpus.open(spec(shard, plan=plan), manifest_hash=HASH, workers=workers)
            with ShardReader(shard) as reader:
                for i in (3, 70, 5, 149, 70):
                    fresh = encode_sample(reader.read(i), plan, Bytes())
                    assert same(corpus.document(("text", i)), fresh)
                    assert len(fresh) == corpus.lengths["text"][i]
    assert parts_of(tmp_path) == [
        "00000000-64.safetensors", "00000064-64.safetensors", "00000128-22.safetensors",
    ]  # fmt: skip
    made = Counter(line.split()[1] for line in log.read_text().splitlines())
    assert set(made.values()) == {1}, "no document is made twice"
    assert len(made) == 150
    assert corpus.read.made == 0


def test_units_plan_without_reading_and_hold_each_wanted_document_once(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / f"text-{n}.tar", texts(70 + n)) for n in range(2)]
    for shard in shards:
        lengths_only(shard)
    corpus = Corpus.open(spec(*shards), manifest_hash=HASH)
    wanted = [("text", s) for s in (140, 3, 69, 66, 70, 3)]
    units = corpus.units(wanted)
    assert [(u.shard, u.first, u.samples) for u in units] == [
        (0, 0, (3,)), (0, 64, (66, 69)), (1, 0, (0,)), (1, 64, (70,)),
    ]  # fmt: skip
    assert corpus.units(wanted[::-1]) == units
    assert all(u.tokens <= u.part_tokens for u in units)
    with pytest.raises(DataError, match="no token cache"):
        corpus.make(units)
    with pytest.raises(DataError, match="no sample 141"):
        corpus.units([("text", 141)])


def test_a_whole_cache_goes_before_parts_and_before_workers(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text-0.tar", texts(10))
    build_cache(shard, TEXT, Bytes())
    corpus = Corpus.open(spec(shard), manifest_hash=HASH)
    [block] = corpus.make(corpus.units([("text", 4), ("text", 2)]))
    assert block.keys == ["text-0-2", "text-0-4"]
    assert parts_of(tmp_path) == []


def test_parts_of_another_vocabulary_or_state_of_the_shard_are_refused_by_name(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text-0.tar", texts(10))
    lengths_only(shard)
    with TokenWorkers(0, setup()) as workers:
        Corpus.open(spec(shard), manifest_hash=HASH, workers=workers).document(("text", 0))
    [part] = tmp_path.glob("*.part-*")
    foreign = part_path(shard, TEXT, "f" * 64, 0, 10)
    foreign.write_bytes(part.read_bytes())
    with pytest.raises(VocabularyError, match="another vocabulary") as caught:
        ShardTokens(shard, TEXT, "f" * 64).part(0, 10)
    assert foreign.name in caught.value.where
    assert ShardTokens(shard, TEXT, HASH).part(0, 10) is not None
    write_shard(shard, texts(10, words=2))
    with pytest.raises(DataError, match="stale token cache") as caught:
        ShardTokens(shard, TEXT, HASH).part(0, 10)
    assert part.name in caught.value.where
    # Making lengths and tokens of the shard as it is now takes the old parts away.
    make_lengths(shard, TEXT, Bytes())
    assert parts_of(tmp_path) == [foreign.name.partition(".part-")[2]]


def test_a_damaged_part_is_named_and_made_again(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text-0.tar", texts(10))
    lengths_only(shard)
    said: list[str] = []
    with TokenWorkers(0, setup()) as workers:
        Corpus.open(spec(shard), manifest_hash=HASH, workers=workers).document(("text", 0))
        [part] = tmp_path.glob("*.part-*")
        whole = part.read_bytes()
        for damaged in (whole[:100], whole[:-9], b"", whole[:40] + b"\0" + whole[41:]):
            part.unlink()
            part.write_bytes(damaged)
            corpus = Corpus.open(spec(shard), manifest_hash=HASH, workers=workers, warn=said.append)
            assert same(
                corpus.document(("text", 2)), encode_sample(ShardReader(shard).read(2), TEXT, Bytes())
            )
            assert part.read_bytes() == whole
    assert len(said) == 4
    assert all(part.name in s and "damaged token cache" in s for s in said)


def test_what_another_try_may_make_is_tried_again_alone(tmp_path: Path) -> None:
    """A part with a store that stalled is stored; the missing document is made when it is wanted, the rest is not."""
    log, stalls = tmp_path / "log", tmp_path / "stalls"
    shard = write_shard(tmp_path / "text-0.tar", texts(10))
    lengths_only(shard)
    stalls.write_text("4 7")
    with TokenWorkers(0, setup(log, reader="StallingReader", file=str(stalls))) as workers:
        corpus = Corpus.open(spec(shard), manifest_hash=HASH, workers=workers)
        units = corpus.units([("text", 3), ("text", 4)])
        [block] = corpus.make(units)
        assert [e["key"] for e in block.skipped] == ["text-0-4"]
        with pytest.raises(DataError, match="the store stalled"):
            corpus.document(("text", 7))
        stalls.write_text("")
        [block] = Corpus.open(spec(shard), manifest_hash=HASH, workers=workers).make(units)
        assert block.skipped == []
        assert same(block.document(1), encode_sample(ShardReader(shard).read(4), TEXT, Bytes()))
    made = Counter(line.partition(" ")[2] for line in log.read_text().splitlines())
    assert len(made) == 9, "all but sample 7, which nobody wanted again"
    assert set(made.values()) == {1}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_is_told_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    shard = write_shard(tmp_path / "text-0.tar", texts(200))
    lengths_only(shard)
    said: list[str] = []

    def full(*args: Any, **more: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(token_files, "save_file", full)
    with TokenWorkers(0, setup()) as workers:
        corpus = Corpus.open(spec(shard), manifest_hash=HASH, workers=workers, warn=said.append)
        for i in (0, 70, 140, 3):
            fresh = encode_sample(ShardReader(shard).read(i), TEXT, Bytes())
            assert same(corpus.document(("text", i)), fresh)
    assert len(said) == 1
    assert os.strerror(code) in said[0]
    assert "without storing" in said[0]
    assert parts_of(tmp_path) == []
    assert corpus.read.made == 64 + 3, "once nothing can be stored only what is wanted is made"


def test_a_folder_of_caches_serves_shards_that_may_not_be_written_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards of the same name in it do not meet."""
    shards, caches = [], tmp_path / "caches"
    for n in (1, 2):
        (tmp_path / f"d{n}").mkdir()
        shards.append(write_shard(tmp_path / f"d{n}" / "text-0.tar", texts(5 + n, words=n)))
    monkeypatch.setattr(
        token_files.os, "access", lambda path, mode: not Path(path).name.startswith("d")
    )  # tests may run as root, who may write anywhere
    with TokenWorkers(0, setup()) as workers:
        for shard in shards:
            make_lengths(shard, TEXT, Bytes(), store_tokens=False, folder=caches)
            corpus = Corpus.open(spec(shard), manifest_hash=HASH, workers=workers, folder=caches)
            for i in range(5):
                fresh = encode_sample(ShardReader(shard).read(i), TEXT, Bytes())
                assert same(corpus.document(("text", i)), fresh)
    assert len(list(caches.iterdir())) == 4
    assert all({p.name for p in s.parent.iterdir()} == {s.name, s.name + ".idx"} for s in shards)
    without = Corpus.open(spec(shards[0]), manifest_hash=HASH, folder=caches)
    assert len(without.document(("text", 1))) > 0, "what is stored there is read without workers"


RACE = """
import sys
sys.path[:0] = [{here!r}]
from pathlib import Path
from token_fixtures import setup
from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.workers import TokenWorkers
shard = Path({shard!r})
print("ready", flush=True)
sys.stdin.readline()
corpus = Corpus.open([SourceSpec("text", [shard], ("text",))], manifest_hash="0" * 64,
                     workers=TokenWorkers(0, setup()))
print(sum(len(corpus.document(("text", i))) for i in range(0, 640, 16)))
"""


@pytest.mark.slow
def test_processes_that_race_for_the_same_parts_write_the_same_bytes(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text-0.tar", texts(640))
    lengths_only(shard)
    program = RACE.format(here=HERE, shard=str(shard))
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
    answers = {run.communicate("go\n", timeout=60)[0] for run in runs}
    assert len(answers) == 1
    assert len(parts_of(tmp_path)) == 10
    raced = {p.name: p.read_bytes() for p in tmp_path.glob("*.part-*")}
    for path in tmp_path.glob("*.part-*"):
        path.unlink()
    with TokenWorkers(0, setup()) as workers:
        corpus = Corpus.open(spec(shard), manifest_hash=HASH, workers=workers)
        alone = sum(len(corpus.document(("text", i))) for i in range(0, 640, 16))
    assert answers == {f"{alone}\n"}
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.part-*")} == raced
    assert not list(tmp_path.glob(".*"))


KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}]
from pathlib import Path
from token_fixtures import setup
from ringweave.data_pipes import token_files
from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.workers import TokenWorkers
save, at = token_files.save_file, {at}
def save_and_die(tensors, path, metadata):
    save(tensors, path, metadata=metadata)
    if at >= 0:
        os.truncate(path, min(at, os.path.getsize(path)))
        os.kill(os.getpid(), signal.SIGKILL)
token_files.save_file = save_and_die
corpus = Corpus.open([SourceSpec("text", [Path({shard!r})], ("text",))], manifest_hash="0" * 64,
                     workers=TokenWorkers(0, setup()))
corpus.document(("text", 0))
"""


@pytest.mark.slow
def test_a_job_killed_while_it_stores_a_part_leaves_nothing_that_could_be_read(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text-0.tar", texts(10))
    lengths_only(shard)
    for at in (0, 300, 10**9):
        program = KILLED.format(here=HERE, shard=str(shard), at=at)
        done = subprocess.run([sys.executable, "-c", program], check=False)
        assert done.returncode == -signal.SIGKILL
        assert parts_of(tmp_path) == []
        assert len(list(tmp_path.glob(".*.tmp"))) == 1
        with TokenWorkers(0, setup()) as workers:
            corpus = Corpus.open(spec(shard), manifest_hash=HASH, workers=workers)
            fresh = encode_sample(ShardReader(shard).read(0), TEXT, Bytes())
            assert same(corpus.document(("text", 0)), fresh)
        assert not list(tmp_path.glob(".*.tmp")), "what a killed job left is swept away"
        [part] = tmp_path.glob("*.part-*")
        part.unlink()


def test_what_living_writers_have_begun_is_not_swept_away(tmp_path: Path) -> None:
    ours, foreign = tmp_path / f".x.tokens-1.{os.getpid()}.tmp", tmp_path / ".x.tokens-1.notes.tmp"
    dead = tmp_path / ".x.tokens-1.999999999.tmp"
    for path in (ours, foreign, dead):
        path.touch()
    assert sweep(tmp_path, "x.tokens-") == 1
    assert ours.exists()
    assert foreign.exists()


def test_lengths_that_lie_are_an_error_and_not_a_wrong_pack(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text-0.tar", texts(4))
    write_lengths(shard, TEXT, HASH, np.asarray([6, 12, 16, 6], np.int64), [])
    with TokenWorkers(0, setup()) as workers:
        corpus = Corpus.open(spec(shard), manifest_hash=HASH, workers=workers)
        with pytest.raises(DataError, match="disagree") as caught:
            corpus.document(("text", 1))
    assert "text-0-1" in caught.value.where
    assert "11 tokens, planned as 12" in caught.value.why
