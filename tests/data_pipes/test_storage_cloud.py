"""s3:// against a local S3 (moto) and gs:// against a local stand-in: same checks and limits as for http."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import webdataset

from ringweave.data_pipes.index import build_index, write_index
from ringweave.data_pipes.reader import ShardReader
from ringweave.data_pipes.storage import ByteCache, StorageOptions, open_source
from ringweave.tokenizers.errors import DataError

DATA = random.Random(5).randbytes(300_000)


def options(moto_url: str, **changes: Any) -> StorageOptions:
    values: dict[str, Any] = {"s3_endpoint": moto_url, "timeout_s": 10.0, "backoff_s": 0.01, "retries": 2}
    return StorageOptions(**(values | changes))


def test_s3_ranges_versions_and_changes(s3: Any, moto_url: str) -> None:
    key = "some dir/a+b%20 (1)#?.tar"
    etag = s3.put_object(Bucket="shards", Key=key, Body=DATA)["ETag"].strip('"')
    source = open_source(f"s3://shards/{key}", options=options(moto_url))
    assert (source.size(), source.version()) == (len(DATA), etag)
    for at, size in ((0, 1), (1000, 70_000), (len(DATA) - 7, 7)):
        assert source.read(at, size) == DATA[at : at + size]
    worker = pickle.loads(pickle.dumps(source))
    assert worker.read(5, 50) == DATA[5:55]
    for shown in (str(source), repr(source), repr(pickle.dumps(source))):
        assert "AKIAHUNTER2" not in shown and "Signature" not in shown
    s3.put_object(Bucket="shards", Key=key, Body=DATA[::-1])
    with pytest.raises(DataError) as caught:
        source.read(0, 10)
    assert caught.value.what == "object changed during the run"
    assert "AKIAHUNTER2" not in str(caught.value) and "Signature" not in str(caught.value)


def test_s3_names_a_missing_key_and_a_missing_bucket(s3: Any, moto_url: str) -> None:
    for url, code in (("s3://shards/none.tar", "NoSuchKey"), ("s3://nobody/a.tar", "NoSuchBucket")):
        with pytest.raises(DataError) as caught:
            open_source(url, options=options(moto_url)).size()
        assert caught.value.what == "missing object" and code in caught.value.why
        assert caught.value.where == f"{url} @0"


def test_s3_needs_credentials_unless_anonymous(
    s3: Any, moto_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    s3.put_object(Bucket="shards", Key="public.tar", Body=DATA, ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match="no credentials for s3"):
        open_source("s3://shards/public.tar", options=options(moto_url, s3_region="eu-west-3")).size()
    public = open_source("s3://shards/public.tar", options=options(moto_url, anonymous=True))
    assert public.read(5, 5) == DATA[5:10]


def test_every_sample_of_an_s3_shard_through_the_cache(s3: Any, moto_url: str, tmp_path: Path) -> None:
    draw, path = random.Random(3), tmp_path / "s.tar"
    samples = {f"k{i}": {"bin": draw.randbytes(draw.randrange(9000)), "txt": b"%d" % i} for i in range(30)}
    with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0) as writer:
        for name, members in samples.items():
            writer.write({"__key__": name, **members})
    index = build_index(path)
    write_index(path, index)
    s3.put_object(Bucket="shards", Key="s.tar", Body=path.read_bytes())
    cache = ByteCache(tmp_path / "cache", 8 << 20, block_bytes=1 << 16)
    for _ in range(2):
        source = open_source("s3://shards/s.tar", options=options(moto_url), cache=cache)
        reader = ShardReader(source, index=index)
        got = [reader.read(i) for i in range(len(reader))]
        assert {sample.key: sample.members for sample in got} == samples


@pytest.fixture
def google() -> Iterator[ThreadingHTTPServer]:
    """Serves /bucket/key to whoever brings the token `fresh`, and notes what was asked."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            good = self.headers.get("Authorization") == "Bearer fresh" or self.path.startswith("/public/")
            start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            body = DATA[start : end + 1] if good else b"<Error><Code>AccessDenied</Code></Error>"
            self.send_response(206 if good else 403)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(DATA)}")
            self.send_header("ETag", '"g1"')
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    asked: list[tuple[str, str | None]] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = asked  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def test_gs_reads_with_a_token_and_without(google: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    auth = pytest.importorskip("google.auth", reason="google-auth (extra gs) is not installed")
    from google.oauth2.credentials import Credentials

    from ringweave.data_pipes import storage_cloud

    endpoint = f"http://127.0.0.1:{google.server_address[1]}"
    open_public = StorageOptions(gs_endpoint=endpoint, anonymous=True)
    public = open_source("gs://public/dir/a b.tar", options=open_public)
    assert (public.size(), public.version()) == (len(DATA), "g1") and public.read(5, 50) == DATA[5:55]
    assert google.asked[-1] == ("/public/dir/a%20b.tar", None)

    storage_cloud._google_tokens.cache_clear()
    monkeypatch.setattr(auth, "default", lambda scopes: (Credentials("fresh"), None))
    private = open_source("gs://private/a.tar?generation=7", options=StorageOptions(gs_endpoint=endpoint))
    assert private.read(1, 9) == DATA[1:10]
    assert google.asked[-1] == ("/private/a.tar?generation=7", "Bearer fresh")
    assert private.sibling(".idx").url == "gs://private/a.tar.idx"
    storage_cloud._google_tokens.cache_clear()
    monkeypatch.setattr(auth, "default", lambda scopes: (Credentials("stale"), None))
    with pytest.raises(DataError) as caught:
        private.read(1, 9)
    assert "HTTP 403" in caught.value.why and "AccessDenied" in caught.value.why
    assert "stale" not in str(caught.value)

    def none(scopes: list[str]) -> Any:
        raise auth.exceptions.DefaultCredentialsError("no credentials here")

    storage_cloud._google_tokens.cache_clear()
    monkeypatch.setattr(auth, "default", none)
    with pytest.raises(DataError, match="no credentials for gs"):
        private.read(1, 9)
    storage_cloud._google_tokens.cache_clear()
