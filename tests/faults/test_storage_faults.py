"""Reads from a web server that cuts, stalls, lies and redirects: the exact bytes, or a named error."""

from __future__ import annotations

import os
import pickle
import random
import threading
import time
from pathlib import Path
from typing import Any

import hostile_server as bad
import pytest
import webdataset
from hostile_server import HostileServer, ranges

from ringweave.data_pipes.index import build_index, write_index
from ringweave.data_pipes.reader import ShardReader
from ringweave.data_pipes.storage import ByteSource, StorageOptions, open_source
from ringweave.data_pipes.storage_net import Transport
from ringweave.tokenizers.errors import DataError

DATA = random.Random(5).randbytes(300_000)


def quick(**changes: Any) -> StorageOptions:
    values: dict[str, Any] = {"timeout_s": 5.0, "deadline_s": 60.0, "backoff_s": 0.01, "backoff_cap_s": 0.05}
    return StorageOptions(**(values | changes))


def source_of(server: HostileServer, *, path: str = "/a.tar", **changes: Any) -> ByteSource:
    if path not in server.things:
        server.put(path, DATA)
    return open_source(server.base + path, options=quick(**changes))


def refused(source: ByteSource, offset: int = 0, size: int = 100_000) -> DataError:
    with pytest.raises(DataError) as caught:
        source.read(offset, size)
    return caught.value


def test_reads_are_exact_and_pinned(server: HostileServer) -> None:
    source = source_of(server)
    assert (source.size(), source.version()) == (len(DATA), "v1")
    assert source.read(1234, 5678) == DATA[1234 : 1234 + 5678]
    assert source.read(len(DATA), 0) == b"" and source.read(len(DATA) - 1, 1) == DATA[-1:]
    assert server.asked[-1].headers["if-match"] == '"v1"'
    assert server.asked[-1].headers["accept-encoding"] == "identity"
    assert "read past the end" in str(refused(source, len(DATA) - 5, 6))


def test_cuts_at_random_places_lose_nothing_and_repeat_nothing(server: HostileServer) -> None:
    source, draw = source_of(server), random.Random(1)
    source.size()
    for _ in range(40):
        offset = draw.randrange(len(DATA) - 1)
        size = draw.randrange(1, len(DATA) - offset)
        cuts = [draw.randrange(1, size + 1) for _ in range(draw.randrange(5))]
        server.things["/a.tar"].next, before = [bad.cut(after) for after in cuts], len(server.asked)
        assert source.read(offset, size) == DATA[offset : offset + size]
        at = offset
        for (start, end), after in zip(ranges(server.asked[before:]), cuts + [size]):
            assert (start, end) == (at, offset + size), "a request that does not begin at the byte reached"
            at += min(after, end - start)
        server.things["/a.tar"].next.clear()


def test_short_answers_are_continued(server: HostileServer) -> None:
    """A stream that returns only its last chunk after a short read would lose the ones before."""
    source = source_of(server)
    server.things["/a.tar"].always = bad.less(999)
    assert source.read(7, 10_000) == DATA[7:10_007]
    assert source.retried == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("after", [-1, 0, 1, 50_000])
def test_a_stall_is_cut_off_and_resumed(server: HostileServer, after: int) -> None:
    source = source_of(server, timeout_s=0.2)
    source.size()
    server.things["/a.tar"].next = [bad.stall(after)]
    assert source.read(10, 200_000) == DATA[10:200_010]
    assert ranges(server.asked)[-1] == (10 + max(0, after), 200_010)


def test_a_server_that_only_stalls_is_named(server: HostileServer) -> None:
    source = open_source(
        server.base.replace("//", "//user:hunter2@") + "/a.tar?sig=abcdef",
        options=quick(timeout_s=0.1, retries=2),
    )
    server.put("/a.tar?sig=abcdef", DATA).always = bad.stall(-1)
    error = refused(source, 5, 5000)
    assert error.what == "storage does not answer"
    assert "@5" in error.where and "3 tries" in error.why and "stalled" in error.why
    assert "hunter2" not in str(error) and "abcdef" not in str(error)


@pytest.mark.parametrize("headers", [False, True])
def test_a_dripping_server_does_not_hold_a_read(server: HostileServer, headers: bool) -> None:
    source = source_of(server, timeout_s=0.2, deadline_s=2.5, retries=1)
    server.things["/a.tar"].always = bad.drip(0.02, headers=headers)
    began = time.monotonic()
    error = refused(source)
    assert time.monotonic() - began < 6
    assert error.what == "storage does not answer"


def test_a_slow_but_steady_server_is_waited_for(server: HostileServer) -> None:
    source = source_of(server, timeout_s=0.2)
    server.things["/a.tar"].next = [bad.good, bad.slow(200_000)]
    source.size()
    assert source.read(0, 120_000) == DATA[:120_000]
    assert source.retried == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [500, 502, 503, 504, 408, 429])
def test_bursts_of_overload_are_waited_out(server: HostileServer, code: int) -> None:
    source = source_of(server)
    server.things["/a.tar"].next = [bad.status(code)] * 4
    assert source.read(3, 1000) == DATA[3:1003]
    assert len(server.asked) == 5
    assert len({one.connection for one in server.asked}) == 1, "an answer with a body costs no connection"


def test_retry_after_is_obeyed_and_bounded(server: HostileServer) -> None:
    source = source_of(server)
    server.things["/a.tar"].next = [bad.status(429, {"Retry-After": "1"})]
    began = time.monotonic()
    assert source.read(0, 10) == DATA[:10]
    assert time.monotonic() - began >= 1
    server.things["/a.tar"].always = bad.status(503, {"Retry-After": "3600"})
    began, error = time.monotonic(), refused(source)
    assert time.monotonic() - began < 5
    assert "HTTP 503" in error.why and "deadline" in error.why


@pytest.mark.parametrize(
    ("code", "what"), [(404, "missing object"), (403, "the server refuses"), (400, "the server")]
)
def test_other_refusals_are_final(server: HostileServer, code: int, what: str) -> None:
    source = source_of(server)
    server.things["/a.tar"].always = bad.status(code)
    error = refused(source)
    assert error.what.startswith(what) and f"HTTP {code}" in error.why and error.fix
    assert len(server.asked) == 1


def test_pauses_are_the_same_in_a_second_run(server: HostileServer) -> None:
    source: Any = source_of(server, backoff_s=1.0, backoff_cap_s=8.0)
    pauses = [source._pause(100, n, n) for n in range(1, 8)]
    assert pauses == [source._pause(100, n, n) for n in range(1, 8)]
    for n, pause in enumerate(pauses):
        assert 0.5 * min(8, 2**n) <= pause <= min(8, 2**n)
    assert len({source._pause(100, 1, 1), source._pause(101, 1, 1), source._pause(100, 1, 2)}) == 3


@pytest.mark.parametrize("shift", [-1, 1, 512, 1000])
def test_another_range_than_asked_is_never_taken(server: HostileServer, shift: int) -> None:
    source = source_of(server)
    source.size()
    server.things["/a.tar"].next = [bad.other_range(shift)]
    assert source.read(2000, 3000) == DATA[2000:5000]
    server.things["/a.tar"].always = bad.other_range(shift)
    error = refused(source, 2000, 3000)
    assert "bytes 2000-4999 were asked for" in error.why


def test_a_server_without_ranges_is_read_to_a_limit(server: HostileServer) -> None:
    source = source_of(server, max_skip=50_000)
    server.things["/a.tar"].always = bad.whole
    assert source.size() == len(DATA)
    assert source.read(40_000, 1000) == DATA[40_000:41_000]
    error = refused(source, 50_001, 10)
    assert error.what == "server without ranges" and "50001 bytes would be read for nothing" in error.why
    assert "range requests" in error.fix


@pytest.mark.parametrize("by", ["etag", "weak etag", "time", "size"])
def test_an_object_that_changes_is_named(server: HostileServer, by: str) -> None:
    tag = {"etag": '"v1"', "weak etag": 'W/"v1"'}.get(by, "")
    thing = server.put("/a.tar", DATA, etag=tag, modified="Tue, 01 Sep 2026 00:00:00 GMT")
    source = source_of(server)
    assert source.read(0, 10) == DATA[:10]
    if by == "time":
        thing.modified = "Tue, 01 Sep 2026 00:00:01 GMT"
    elif by == "size":
        thing.data = DATA + b"x"
    else:
        thing.etag = tag.replace("v1", "v2")
    error = refused(source)
    assert error.what == "object changed during the run" and "/a.tar @0" in error.where
    assert refused(pickle.loads(pickle.dumps(source))).what == error.what, "a worker reads the same version"


def test_a_change_between_two_parts_of_a_read_is_seen(server: HostileServer) -> None:
    source = source_of(server)
    thing = server.things["/a.tar"]

    def cut_and_change(*args: Any) -> None:
        bad.cut(1000)(*args)
        thing.etag, thing.data = '"v2"', DATA[::-1]

    thing.next = [cut_and_change]
    assert refused(source).what == "object changed during the run"


def test_chunked_answers(server: HostileServer) -> None:
    source = source_of(server)
    thing = server.things["/a.tar"]
    thing.next = [bad.chunked(206), bad.chunked(206, broken=True), bad.chunked(206)]
    assert source.read(1, 9999) == DATA[1:10_000]
    assert source.read(1, 9999) == DATA[1:10_000]
    thing.always = bad.chunked(200)
    assert "does not say how long" in refused(source_of(server)).why


def test_packed_answers_are_refused(server: HostileServer) -> None:
    source = source_of(server)
    server.things["/a.tar"].always = bad.packed
    assert "Content-Encoding gzip" in refused(source).why


def test_an_empty_object_and_a_closed_port(server: HostileServer) -> None:
    server.put("/empty", b"")
    empty = source_of(server, path="/empty")
    assert empty.size() == 0 and empty.read(0, 0) == b"" and "holds 0" in refused(empty, 0, 1).why
    nobody = open_source("http://127.0.0.1:1/a.tar", options=quick(retries=1))
    error = refused(nobody)
    assert error.what == "storage does not answer" and "2 tries" in error.why


METADATA = "http://169.254.169.254/latest/meta-data/iam"


@pytest.mark.parametrize(
    ("to", "why"),
    [
        (METADATA, "link-local"),
        ("http://[fe80::1]/x", "link-local"),
        ("http://[::ffff:169.254.169.254]/x", "link-local"),
        ("http://0xa9.0xfe.0xa9.0xfe/x", "link-local"),
        ("http://2852039166/x", "link-local"),
        ("http://10.1.2.3/x", "private"),
        ("http://192.168.1.1:8080/x", "private"),
        ("http://localhost:1/x", "private"),
        ("http://127.0.0.1:22/x", "private"),
        ("http://[::1]/x", "private"),
        ("http://100.64.0.1/x", "private"),
        ("file:///etc/passwd", "no http or https"),
        ("ftp://example.com/x", "no http or https"),
        ("gopher://127.0.0.1:70/_x", "no http or https"),
        ("http://[bad/x", "no http or https"),
        ("http://host:99999999/x", "no http or https"),
    ],
)
def test_redirects_to_where_nobody_should_go(server: HostileServer, to: str, why: str) -> None:
    source = source_of(server)
    server.things["/a.tar"].always = bad.redirect(to)
    error = refused(source)
    assert error.what in ("refused redirect", "refused to connect") and why in error.why, str(error)
    assert len(server.asked) == 1, "a refusal is not retried"


def test_link_local_needs_its_own_permission(server: HostileServer) -> None:
    source = source_of(server, allow_private=True)
    server.things["/a.tar"].always = bad.redirect(METADATA)
    assert "link-local" in refused(source).why


def test_redirects_to_other_ports_and_listed_hosts(server: HostileServer) -> None:
    with HostileServer() as other:
        threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        other.put("/b.tar", DATA)
        server.put("/a.tar", DATA).always = bad.redirect(f"{other.base}/b.tar")
        assert "private" in refused(source_of(server)).why
        port = other.server_address[1]
        for allowed in ({"allow_private": True}, {"allow_hosts": (f"127.0.0.1:{port}",)}):
            asked = len(other.asked)
            source = open_source(
                f"{server.base.replace('//', '//me:secret@')}/a.tar", options=quick(**allowed)
            )
            assert source.read(5, 50) == DATA[5:55]
            assert "authorization" in server.asked[-1].headers
            assert len(other.asked) == asked + 1
            assert "authorization" not in other.asked[-1].headers, "credentials went to another host"
            before = len(server.asked)
            assert source.read(55, 50) == DATA[55:105]
            assert len(server.asked) == before, "the end of a redirect is remembered for a while"
            assert "authorization" not in other.asked[-1].headers
        error = refused(source_of(server, allow_private=True, allow_hosts=("shards.example",)))
        assert error.what == "refused redirect" and "allow_hosts does not list" in error.why
        other.stop.set()
        other.shutdown()


def test_a_remembered_target_gains_no_trust(server: HostileServer) -> None:
    """What a redirect led to stays a stranger: its own redirects and address are checked as such."""
    with HostileServer() as other:
        threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        thing = other.put("/b.tar", DATA)
        server.put("/a.tar", DATA).always = bad.redirect(f"{other.base}/b.tar")
        listed = f"127.0.0.1:{other.server_address[1]}"
        source = source_of(server, allow_hosts=(listed,))
        assert source.read(5, 50) == DATA[5:55]
        thing.always = bad.redirect("http://127.0.0.1:9/x")
        assert "allow_hosts does not list" in refused(source, 55, 50).why
        other.shutdown()


def test_expired_targets_are_asked_for_again(server: HostileServer) -> None:
    """Signed targets of redirects expire; the address in the config does not."""
    target = server.put("/signed-1", DATA)
    server.put("/signed-2", DATA)
    server.put("/a.tar", DATA).next = [bad.redirect("/signed-1"), bad.redirect("/signed-2")]
    source = source_of(server)
    assert source.read(0, 10) == DATA[:10]
    target.always = bad.status(403)
    assert source.read(10, 10) == DATA[10:20]
    assert [one.path for one in server.asked] == ["/a.tar", "/signed-1", "/signed-1", "/a.tar", "/signed-2"]


def test_redirects_in_a_circle_end(server: HostileServer) -> None:
    source = source_of(server)
    server.things["/a.tar"].always = bad.redirect("/a.tar")
    error = refused(source)
    assert error.what == "too many redirects" and len(server.asked) == 6


def test_no_redirect_from_https_to_http() -> None:
    from urllib.parse import urlsplit

    transport = Transport(quick())
    with pytest.raises(DataError, match="from https"):
        transport._hop("https://a.example/x", "http://a.example/x", urlsplit("https://a.example/x"))


def test_a_name_is_resolved_once_and_the_checked_address_is_used(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that answers a public address first and a private one afterwards gains nothing."""
    import socket

    port, calls, real = server.server_address[1], [], socket.getaddrinfo

    def answer(host: str, *args: Any, **options: Any) -> Any:
        calls.append(host)
        return real("127.0.0.1" if host == "shards.example" else "10.9.9.9", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    server.put("/a.tar", DATA)
    source = open_source(f"http://shards.example:{port}/a.tar", options=quick())
    assert source.read(0, 10) == DATA[:10]  # the configured host may be private
    assert calls == ["shards.example"]
    assert server.asked[-1].headers["host"] == f"shards.example:{port}"
    server.things["/a.tar"].always = bad.redirect("http://elsewhere.example/x")
    error = refused(source)
    assert "elsewhere.example:80" in error.why and "10.9.9.9 is private" in error.why
    assert calls == ["shards.example", "elsewhere.example"]


def test_connections_are_kept_and_shared_by_threads(server: HostileServer) -> None:
    sources = [source_of(server, path=f"/{i}.tar", seed=77) for i in range(3)]
    for source in sources:
        for at in range(0, 100_000, 10_000):
            assert source.read(at, 10_000) == DATA[at : at + 10_000]
    assert len({one.connection for one in server.asked}) == 1
    failed: list[int] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(30):
            at = draw.randrange(200_000)
            if draw.choice(sources).read(at, 5000) != DATA[at : at + 5000]:
                failed.append(at)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len({one.connection for one in server.asked}) <= 6


def test_a_forked_child_has_its_own_connection(server: HostileServer) -> None:
    source = source_of(server, seed=78)
    assert source.read(0, 1000) == DATA[:1000]
    child = os.fork()
    if child == 0:
        good = all(source.read(at, 999) == DATA[at : at + 999] for at in range(0, 50_000, 1000))
        os._exit(0 if good else 1)
    for at in range(0, 50_000, 1000):
        assert source.read(at, 1001) == DATA[at : at + 1001]
    assert os.waitpid(child, 0)[1] == 0
    used: dict[tuple[str, int], set[int]] = {}
    for (start, end), one in zip(ranges(server.asked), server.asked):
        used.setdefault(one.connection, set()).add(end - start)
    assert len(used) == 2 and {999} in used.values(), "parent and child shared a connection"


def write_shard(path: Path, count: int) -> dict[str, dict[str, bytes]]:
    draw = random.Random(3)
    samples = {
        f"k{i:03}": {"bin": draw.randbytes(draw.randrange(4000)), "txt": b"%d" % i} for i in range(count)
    }
    with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
    write_index(path, build_index(path))
    return samples


@pytest.mark.parametrize("seed", range(4))
def test_every_sample_of_a_shard_exactly_once_or_a_named_error(
    server: HostileServer, tmp_path: Path, seed: int
) -> None:
    """The whole road: a shard behind a server that mixes everything above, read through its index."""
    samples = write_shard(tmp_path / "s.tar", 40)
    thing = server.put("/s.tar", (tmp_path / "s.tar").read_bytes())
    server.put("/s.tar.idx", (tmp_path / "s.tar.idx").read_bytes())
    draw = random.Random(seed)

    def anything(*args: Any) -> None:
        bad_ways = [
            bad.cut(draw.randrange(3000)), bad.status(503), bad.status(429), bad.other_range(512),
            bad.chunked(206, broken=True), bad.less(700), bad.redirect("/s.tar?again"), bad.packed,
            bad.stall(draw.randrange(500)), bad.whole, bad.redirect(METADATA),
        ]  # fmt: skip
        weights = [9, 9, 3, 9, 3, 9, 3, 0.5, 1, 3, 0.5]
        way = bad.good if draw.random() < 0.4 else draw.choices(bad_ways, weights)[0]
        way(*args)

    server.things["/s.tar?again"] = thing
    thing.always = anything
    source = open_source(f"{server.base}/s.tar", options=quick(timeout_s=0.15, retries=8))
    reader, got, errors = None, {}, []
    while reader is None:
        try:
            reader = ShardReader(source)
        except DataError as error:
            errors.append(error)
    for i in range(len(reader)):
        try:
            sample = reader.read(i)
            assert sample.key not in got
            got[sample.key] = sample.members
        except DataError as error:
            errors.append(error)
    thing.always = None
    for i, key in enumerate(samples):
        if key not in got:
            got[key] = reader.read(i).members
    assert got == samples
    known = ("Content-Encoding", "link-local", "tries", "HTTP", "redirect")
    for error in errors:
        assert any(word in str(error) for word in known) and "/s.tar" in error.where, str(error)
