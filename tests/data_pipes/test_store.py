"""A corpus reads the same documents wherever its shards lie, and secrets of addresses stay where they are needed."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

sys.path.append(str(Path(__file__).parent))

from token_fixtures import HERE, Bytes, png, same, write_shard

from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.index import build_index, index_path, load_index, write_index
from ringweave.data_pipes.make_lengths import make_lengths
from ringweave.data_pipes.reader import ShardReader, check_shard, expand_shards
from ringweave.data_pipes.shard_names import address_of, join_address, local_path, shard_name, shown
from ringweave.data_pipes.storage import LocalFile, StorageOptions
from ringweave.data_pipes.store import OPEN_SHARD, Store, StoredShard, open_shard
from ringweave.data_pipes.token_files import stamp_of
from ringweave.data_pipes.worker_process import Setup
from ringweave.data_pipes.workers import Task, TokenWorkers
from ringweave.tokenizers.errors import DataError

PLAN, HASH = ("caption", "image"), "0" * 64
QUICK = StorageOptions(timeout_s=10.0, backoff_s=0.01, retries=2)
CAT = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three indexed shards of pictures with captions."""
    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(3):
        samples = [{"png": png(1 + i % 5, i), "txt": b"caption %d of %d" % (i, n)} for i in range(5 + n)]
        write_shard(folder / f"p-{n:03d}.tar", samples)
    return folder


def tars(data: Path) -> list[Path]:
    return sorted(data.glob("*.tar"))


def store(tmp_path: Path, **options: Any) -> Store:
    values = {"timeout_s": 10.0, "backoff_s": 0.01, "retries": 2, **options}
    return Store(StorageOptions(**values), tmp_path / "cache", 64 << 20)


def setup(opened: Store) -> Setup:
    return Setup(
        args=[], load="token_fixtures:make", path=(HERE,), reader=OPEN_SHARD, reader_options=opened.to_json()
    )


def corpus(shards: Any, opened: Store, *, count: int = 0, tokens: bool = False) -> Corpus:
    """A corpus with its lengths made as a job makes them."""
    workers = TokenWorkers(count, setup(opened))
    for shard in shards:
        make_lengths(shard, PLAN, Bytes(), workers=workers, store_tokens=tokens, folder=opened.tokens_dir)
    spec = SourceSpec("pictures", shards, PLAN, whole=any(getattr(s, "whole", False) for s in shards))
    return Corpus.open([spec], manifest_hash=HASH, workers=workers, folder=opened.tokens_dir)


def documents(made: Corpus) -> list[Any]:
    try:
        return [made.document(("pictures", i)) for i in range(int(made.lengths.counts("pictures").sum()))]
    finally:
        made.close()


def expected(data: Path) -> list[Any]:
    return documents(corpus(tars(data), Store(), tokens=True))


def packed(data: Path, kind: str) -> list[Path]:
    """The shards packed, without the plain ones' indexes."""
    folder = data.parent / kind
    folder.mkdir(exist_ok=True)
    for tar in tars(data):
        body = tar.read_bytes()
        pack = gzip.compress if kind != "tar.zst" else zstandard.ZstdCompressor(write_checksum=True).compress
        (folder / f"{tar.stem}.{kind}").write_bytes(pack(body))
    return sorted(folder.iterdir())


def on_server(server: Any, data: Path, *, query: str = "", indexes: bool = True) -> str:
    for tar in tars(data):
        server.put(f"/d/{tar.name}{query}", tar.read_bytes(), etag=f'"{tar.stem}"')
        if indexes:
            server.put(f"/d/{tar.name}.idx{query}", index_path(tar).read_bytes(), etag=f'"{tar.stem}i"')
    return f"{server.base}/d"


# --- the same documents everywhere --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 2])
def test_a_corpus_over_http_is_the_one_over_files(
    server: Any, data: Path, tmp_path: Path, count: int
) -> None:
    opened, base = store(tmp_path), on_server(server, data)
    shards = [opened.resolve(url) for url in expand_shards("p-{000..002}.tar", base)]
    made = corpus(shards, opened, count=count)
    local = corpus(tars(data), Store(), tokens=True)
    assert made.digest == local.digest
    assert [made.key("pictures", i) for i in (0, 5, 17)] == ["p-000-0", "p-001-0", "p-002-6"]
    assert not made.lengths.whole("pictures")
    found = documents(made)
    assert len(found) == 18 and all(map(same, found, documents(local)))


@pytest.mark.parametrize("count", [0, 2])
def test_a_corpus_over_s3_is_the_one_over_files(
    s3: Any, moto_url: str, data: Path, tmp_path: Path, count: int
) -> None:
    for path in (*tars(data), *map(index_path, tars(data))):
        s3.put_object(Bucket="shards", Key=f"d/{path.name}", Body=path.read_bytes())
    opened = store(tmp_path, s3_endpoint=moto_url)
    shards = [opened.resolve(url) for url in expand_shards("p-{000..002}.tar", "s3://shards/d/")]
    assert all(map(same, documents(corpus(shards, opened, count=count)), expected(data)))


@pytest.mark.parametrize("kind", ["tar.gz", "tgz", "tar.zst"])
def test_packed_shards_are_read_as_plain_ones(data: Path, tmp_path: Path, kind: str) -> None:
    opened = store(tmp_path)
    shards = [opened.resolve(path) for path in packed(data, kind)]
    assert all(isinstance(shard, StoredShard) and shard.whole for shard in shards)
    made = corpus(shards, opened, count=2 if kind == "tar.zst" else 0)
    assert made.lengths.whole("pictures")
    assert all(map(same, documents(made), expected(data)))
    assert sorted(p.name for p in (data.parent / kind).iterdir()) == [f"p-{n:03d}.{kind}" for n in range(3)]
    assert len(list((tmp_path / "cache" / "indexes").glob("*.idx"))) == 3
    assert [stamp_of(a).index_crc32 for a in shards] == [stamp_of(b).index_crc32 for b in tars(data)]


def test_a_packed_shard_in_a_store(server: Any, data: Path, tmp_path: Path) -> None:
    [path, *_] = packed(data, "tar.gz")
    server.put("/p-000.tar.gz?sig=hunter2", path.read_bytes())
    shard = store(tmp_path).shard(f"{server.base}/p-000.tar.gz?sig=hunter2")
    with ShardReader(shard) as reader, ShardReader(tars(data)[0]) as plain:
        assert [reader.read(i).members for i in range(5)] == [plain.read(i).members for i in range(5)]


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_a_corpus_over_a_command_is_the_one_over_files(
    data: Path, tmp_path: Path, count: int, kind: str
) -> None:
    folder = data if kind == "tar" else packed(data, kind)[0].parent
    opened = store(tmp_path, allow_pipe=True)
    names = [f"p-{n:03d}.{kind}" for n in range(3)]
    shards = [opened.resolve([sys.executable, "-c", CAT, str(folder / name)], name=name) for name in names]
    made = corpus(shards, opened, count=count)
    assert [shard_name(s) for s in shards] == names and made.lengths.whole("pictures")
    assert all(map(same, documents(made), expected(data)))


def test_looking_at_a_jobs_shards_makes_none_of_them_again(data: Path, tmp_path: Path) -> None:
    opened = store(tmp_path)
    shards = [opened.resolve(path) for path in packed(data, "tar.gz")]
    documents(corpus(shards, opened))
    for path in (tmp_path / "cache" / "whole").iterdir():
        path.unlink()
    again = [
        opened.resolve(path) for path in packed(data, "tar.gz")
    ]  # written anew: other times, so other versions
    kept = [opened.resolve(path) for path in sorted((tmp_path / "tar.gz").iterdir())]
    assert [stamp_of(s) for s in again] == [stamp_of(s) for s in kept] == [stamp_of(s) for s in shards]
    for path in (tmp_path / "cache" / "whole").iterdir():
        path.unlink()
    fresh = [opened.resolve(path) for path in sorted((tmp_path / "tar.gz").iterdir())]
    spec = SourceSpec("pictures", fresh, PLAN, whole=True)
    Corpus.open([spec], manifest_hash=HASH, folder=opened.tokens_dir)
    assert not list((tmp_path / "cache" / "whole").iterdir())


def test_open_readers_do_not_fill_the_cache_for_good(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cap that holds one shard at a time: making one evicts the others, which are made again when they are read."""
    opened = Store(StorageOptions(), tmp_path / "cache", 17 << 20)
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(ShardReader(opened.shard(path))) for path in packed(data, "tar.gz")]
        plain = [stack.enter_context(ShardReader(path)) for path in tars(data)]
        for i in (0, 1, 2):
            for ours, theirs in zip(readers, plain):
                assert ours.read(i).members == theirs.read(i).members
    assert "raise data.cache.size" in caplog.text


# --- indexes ------------------------------------------------------------------------------------------------


def test_a_remote_shard_without_an_index_is_read_once_and_its_index_kept(
    server: Any, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = on_server(server, data, indexes=False)
    opened, tar = store(tmp_path), tars(data)[0]
    with caplog.at_level(logging.WARNING):
        shard = opened.shard(f"{base}/{tar.name}")
        index = load_index(shard)
    assert index == load_index(tar)
    assert "no index beside it" in caplog.text and "read once" in caplog.text
    [kept] = (tmp_path / "cache" / "indexes").glob("*.idx")
    before = kept.stat().st_mtime_ns
    assert load_index(store(tmp_path).shard(f"{base}/{tar.name}")) == index
    assert kept.stat().st_mtime_ns == before
    server.put(f"/d/{tar.name}", tars(data)[1].read_bytes(), etag='"new"')
    assert load_index(store(tmp_path).shard(f"{base}/{tar.name}")) == load_index(tars(data)[1])
    with pytest.raises(DataError, match="shard without an index") as caught:
        load_index(Store(QUICK).shard(f"{base}/{tar.name}"))
    assert "data.cache.dir" in caught.value.fix
    with pytest.raises(DataError, match="missing object"):
        load_index(opened.shard(f"{base}/none.tar"))


def test_a_stamp_is_the_identity_of_the_index_however_it_is_stored(data: Path) -> None:
    tar = tars(data)[0]
    index, stamp = load_index(tar), stamp_of(tar)
    assert (stamp.size, stamp.index_crc32) == (tar.stat().st_size, index.crc32)
    write_index(tar, build_index(tar, probe=True))
    assert (
        stamp_of(tar) == stamp == stamp_of(str(tar)) == stamp_of(LocalFile(tar)) == stamp_of(f"file://{tar}")
    )
    members = [[[m.ext, m.offset, m.size, m.crc32, m.header_name] for m in s.members] for s in index.samples]
    rows = [{"key": s.key, "members": m} for s, m in zip(index.samples, members)]
    import zlib

    crc = zlib.crc32(json.dumps(rows, separators=(",", ":")).encode())
    old = {"format": "ringweave-shard-index/1", "shard_size": stamp.size, "count": len(rows), "crc32": crc}
    index_path(tar).unlink()
    tar.with_name(tar.name + ".idx.json").write_text(json.dumps({**old, "samples": rows}))
    assert stamp_of(tar) == stamp
    with open(tar, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match="stale index"):
        stamp_of(tar)


# --- what is refused ----------------------------------------------------------------------------------------


def test_what_cannot_be_opened_says_what_to_set(data: Path, tmp_path: Path) -> None:
    [path, *_] = packed(data, "tar.gz")
    for shard in (Store().shard(path), str(path), path):
        with pytest.raises(DataError) as caught:
            stamp_of(shard)
        assert "data.cache.dir" in caught.value.fix
    with pytest.raises(DataError, match="allow_pipe"):
        Store().shard(["cat", "x"], name="x")
    posing = 'command:{"name": "x", "argv": ["touch", "owned"]}'
    for text in (posing, "pipe:touch owned"):
        for call in (store(tmp_path, allow_pipe=True).shard, address_of):
            with pytest.raises(DataError, match="a command is not an address"):
                call(text)
    with pytest.raises(DataError, match="not allowed"):
        stamp_of(posing)
    with pytest.raises(DataError, match="malformed store"):
        open_shard("x.tar", options={"shell": True}, cache_dir=None, cache_bytes=1)


def test_nowhere_to_keep_tokens_is_said(server: Any, data: Path) -> None:
    base = on_server(server, data)
    with pytest.raises(DataError, match="nowhere to keep the tokens"):
        make_lengths(Store(QUICK).shard(f"{base}/p-000.tar"), PLAN, Bytes())


# --- secrets ------------------------------------------------------------------------------------------------


def _everything_said(server: Any, data: Path, opened: Store, word: str, count: int) -> list[str]:
    """What is shown, logged nowhere else, of making, reading and losing shards behind signed addresses."""
    base = on_server(server, data, query=f"?sig={word}", indexes=False)
    shards = [opened.resolve(url) for url in expand_shards("p-{000..002}.tar", f"{base}?sig={word}")]
    assert address_of(shards[0]).endswith(f"sig={word}")
    made = corpus(shards, opened, count=count)
    said = [made.digest, repr(made.skipped), repr(shards), str(shards[0]), shown(address_of(shards[0]))]
    assert len(documents(made)) == 18
    with pytest.raises(DataError, match="no token lengths") as caught:
        Corpus.open([SourceSpec("pictures", shards, PLAN)], manifest_hash=HASH)
    return [*said, caught.value.render()]


def _errors(server: Any, opened: Store, word: str) -> list[str]:
    gone = f"{server.base}/gone.tar?sig={word}"
    server.put(f"/bad.tar?sig={word}", b"no tar" * 400)
    said = [
        error.render()
        for address in (gone, gone.replace("gone", "bad"))
        for error in check_shard(opened.shard(address))
    ]
    workers = TokenWorkers(1, setup(opened))
    for call in (
        lambda: stamp_of(gone),
        lambda: make_lengths(opened.shard(gone), PLAN, Bytes(), folder=opened.tokens_dir),
        lambda: workers.run([Task(gone, (0,), PLAN)]),
        lambda: expand_shards("a-{3..1}.tar?sig=" + word, server.base),
    ):
        with pytest.raises(DataError) as caught:
            call()
        said.append(caught.value.render())
    workers.close()
    return said


def test_secrets_of_an_address_are_in_no_file_message_or_digest(
    server: Any,
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened, words = store(tmp_path), ("hunter2first", "hunter2second", "hunter2third")
    with caplog.at_level(logging.DEBUG):
        first = _everything_said(server, data, opened, words[0], 2)
        again = _everything_said(server, data, opened, words[1], 0)
        errors = _errors(server, opened, words[2])
    assert first[0] == again[0], "the digest is that of the first run"
    said = [*first, *again, *errors, *capfd.readouterr()]
    # The client's own log of what it asks is not ours to write.
    said += [record.getMessage() for record in caplog.records if not record.name.startswith("urllib3")]
    for path in (tmp_path / "cache").rglob("*"):
        said += [str(path), path.read_bytes().decode("latin-1") if path.is_file() else ""]
    assert not [text[:300] for text in said if any(word in text for word in words)]


# --- processes ----------------------------------------------------------------------------------------------


def _read_all(address: str, options: dict[str, Any]) -> None:
    with open_shard(address, **options) as reader:
        for i in range(len(reader)):
            reader.read(i)


def _together(target: Callable[..., None], *args: Any, count: int = 3) -> None:
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=target, args=args) for _ in range(count)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * count


def test_processes_that_want_a_shard_at_once_make_it_once(data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = f"open({str(log)!r}, 'a').write('x'); import time; time.sleep(0.5); " + CAT
    opened = store(tmp_path, allow_pipe=True)
    shard = opened.shard([sys.executable, "-c", program, str(tars(data)[0])], name="p-000.tar")
    _together(_read_all, address_of(shard), opened.to_json())
    assert log.read_text() == "x"
    assert len(list((tmp_path / "cache" / "indexes").glob("*.idx"))) == 1
    assert len(list((tmp_path / "cache" / "whole").iterdir())) == 1


def test_a_killed_maker_leaves_nothing_half_made(data: Path, tmp_path: Path) -> None:
    tar = tars(data)[0]
    body = tar.read_bytes()
    program = (
        "import sys, time; out = sys.stdout.buffer; data = open(sys.argv[1], 'rb').read();"
        "out.write(data[:4096]); out.flush(); time.sleep(float(sys.argv[2])); out.write(data[4096:])"
    )
    opened = store(tmp_path, allow_pipe=True)
    slow = opened.shard([sys.executable, "-c", program, str(tar), "60"], name="p-000.tar")
    code = (
        "import json, sys; from ringweave.data_pipes.store import open_shard;"
        "open_shard(sys.argv[1], **json.loads(sys.argv[2]))"
    )
    maker = subprocess.Popen([sys.executable, "-c", code, address_of(slow), json.dumps(opened.to_json())])
    cache = tmp_path / "cache"
    until = time.monotonic() + 60
    while not any(p.stat().st_size for p in cache.glob("tmp/*")) and time.monotonic() < until:
        time.sleep(0.02)
    assert any(cache.glob("tmp/*"))
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    assert not list(cache.glob("whole/*")) and not list(cache.glob("indexes/*.idx"))
    after = store(tmp_path, allow_pipe=True)
    quick = after.shard([sys.executable, "-c", program, str(tar), "0"], name="p-000.tar")
    with ShardReader(quick) as reader:
        assert len(reader) == 5
    assert not list(cache.glob("tmp/*"))
    assert [p.read_bytes() for p in cache.glob("whole/*")] == [body]


@pytest.mark.slow
def test_a_store_that_takes_its_time_is_no_decoder_that_hangs(data: Path, tmp_path: Path) -> None:
    """Opening the shard takes longer than a sample may; the worker is left alone."""
    program = "import time; time.sleep(4); " + CAT
    opened = store(tmp_path, allow_pipe=True)
    shard = opened.shard([sys.executable, "-c", program, str(tars(data)[0])], name="p-000.tar")
    with TokenWorkers(1, setup(opened), timeout_s=3.0) as workers:
        [block] = workers.run([Task(address_of(shard), (0, 1, 2, 3, 4), PLAN)])
        assert not block.skipped and workers.counts.killed == 0


def test_a_store_and_its_shards_travel(data: Path, tmp_path: Path) -> None:
    opened = store(tmp_path, allow_hosts=("a", "b"), anonymous=True)
    assert Store.from_json(json.loads(json.dumps(opened.to_json()))) == opened
    assert pickle.loads(pickle.dumps(opened)) == opened
    shard = opened.shard(packed(data, "tar.gz")[0])
    with ShardReader(shard) as reader:
        other = pickle.loads(pickle.dumps(reader))
        assert other.read(2) == reader.read(2)
    shard.close()
    os.unlink(next((tmp_path / "cache" / "whole").iterdir()))
    assert shard.read(0, 5) == tars(data)[0].read_bytes()[:5], "evicted since: made again"


# --- names --------------------------------------------------------------------------------------------------


def test_names_and_joins() -> None:
    join = join_address
    assert join("https://u:p@h/d/?sig=x&v=1", "a.tar") == "https://u:p@h/d/a.tar?sig=x&v=1"
    assert join("https://h/d", "e/a.tar?v=2") == "https://h/d/e/a.tar?v=2"
    assert join("https://h/d?sig=x", "a.tar?v=2") == "https://h/d/a.tar?v=2&sig=x"
    assert join("s3://b/d ?#/", "a%20?.tar") == "s3://b/d ?#/a%20?.tar"
    assert join("file:///x%20y/z", "a.tar") == Path("/x y/z/a.tar") == join("/x y", "z/a.tar")
    assert join("https://h/d", "/local/a.tar") == Path("/local/a.tar") == join("/x", "/local/a.tar")
    assert join("/x", "gs://b/a.tar") == "gs://b/a.tar"
    names = {
        "https://u:p@h/x/a.tar?sig=/b": "a.tar", "https://u:p@h": "shard", "s3://b/k/a b.tar?versionId=3": "a b.tar",
        "/x/a.tar": "a.tar",
    }  # fmt: skip
    assert {address: shard_name(address) for address in names} == names
    assert local_path("a.tar.zst") is None is local_path("http://h/a.tar")
    assert expand_shards("a-{0..1}.tgz", "https://h/d?sig=x") == [
        f"https://h/d/a-{n}.tgz?sig=x" for n in (0, 1)
    ]
