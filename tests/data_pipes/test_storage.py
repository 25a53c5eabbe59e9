"""Byte sources: addresses, what is shown of them, local files, and the address rules."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import pytest

from ringweave.data_pipes.storage import LocalFile, StorageOptions, open_source, redact
from ringweave.data_pipes.storage_net import host_listed, kind_of_address
from ringweave.tokenizers.errors import DataError


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://me:pa:ss@h/x.tar", "https://***@h/x.tar"),
        ("https://token@h/x.tar", "https://***@h/x.tar"),
        ("s3://AKIA:secret@bucket/k", "s3://***@bucket/k"),
        ("https://h/x?X-Amz-Signature=aa&X-Amz-Credential=b%2Fc&v=1", "https://h/x?X-Amz-Signature=***&X-Amz-Credential=***&v=1"),
        ("https://h/x?x%2Damz%2Dsignature=aa", "https://h/x?x%2Damz%2Dsignature=***"),
        ("https://h/x?sv=2&sig=a%3D&se=9", "https://h/x?sv=2&sig=***&se=9"),
        ("https://h/x?AWSAccessKeyId=a&Signature=b&Expires=3", "https://h/x?AWSAccessKeyId=***&Signature=***&Expires=3"),
        ("https://h/x?GoogleAccessId=a&token=t", "https://h/x?GoogleAccessId=***&token=***"),
        ("https://h/x?access_token=a&key=k&api-key=k&password=p", "https://h/x?access_token=***&key=***&api-key=***&password=***"),
        ("curl failed: token=abc, then https://u@h/y", "curl failed: token=***, then https://***@h/y"),
        ("Authorization: Bearer abc.def\nok", "Authorization: ***\nok"),
        ("https://h/monkey=1/a@b.tar?author=x&versionId=3", "https://h/monkey=1/a@b.tar?author=x&versionId=3"),
        ("data/text-0000.tar", "data/text-0000.tar"),
    ],
)  # fmt: skip
def test_redact_hides_what_is_secret_and_nothing_else(given: str, shown: str) -> None:
    assert redact(given) == shown
    assert redact(shown) == shown


def test_redacting_a_long_text_is_quick() -> None:
    for text in ("a" * 300_000, "a=" * 150_000, "://" * 100_000, "%2D" * 100_000):
        redact(text)


def test_nothing_of_a_source_shows_its_secrets() -> None:
    source = open_source("https://user:hunter2@h/x.tar?token=abcdef&v=1")
    sibling = source.sibling(".idx")
    for shown in (str(source), repr(source), str(sibling), repr(sibling)):
        assert "hunter2" not in shown and "abcdef" not in shown
    assert source.url == "https://user:hunter2@h/x.tar?token=abcdef&v=1"
    assert sibling.url == "https://user:hunter2@h/x.tar.idx?token=abcdef&v=1"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("pipe:curl -s http://h/x.tar", "pipe"),
        ("PIPE: rm -rf /", "pipe"),
        ("ftp://h/x", "no reader for ftp://"),
        ("hdfs://h/x", "no reader for hdfs://"),
        ("file://elsewhere/etc/passwd", "no other host"),
        ("http:///x.tar", "no host"),
        ("s3://bucket", "no object"),
        ("gs://bucket/", "no object"),
    ],
)
def test_unusable_addresses_are_refused(url: str, why: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(url)
    assert why in str(caught.value) and caught.value.fix


def test_local_files_by_path_text_and_url(tmp_path: Path) -> None:
    path = tmp_path / "a b.tar"
    path.write_bytes(bytes(range(256)) * 10)
    for source in (open_source(path), open_source(str(path)), open_source(f"file://{tmp_path}/a%20b.tar")):
        assert source.size() == 2560 and source.read(250, 10) == bytes([*range(250, 256), 0, 1, 2, 3])
        assert source.read(2560, 0) == b""
        assert str(source) == str(path)
        source.close()
        assert source.read(0, 1) == b"\0", "a closed source opens again"
        with pytest.raises(DataError, match="2560 in all"):
            source.read(2555, 6)
        with pytest.raises(ValueError, match="cannot begin"):
            source.read(-1, 6)
    (tmp_path / "a b.tar.idx").write_bytes(b"i")
    assert open_source(path).sibling(".idx").read(0, 1) == b"i"
    with pytest.raises(DataError, match="missing file"):
        open_source(tmp_path / "none.tar").size()


def test_the_version_of_a_local_file_changes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"1")
    before = LocalFile(path).version()
    os.utime(path, ns=(1, 1))
    assert LocalFile(path).version() == "1" != before


def test_a_local_file_is_shared_by_threads_processes_and_pickles(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(os.urandom(100_000))
    data, source = path.read_bytes(), LocalFile(path)
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(at for at in range(0, 90_000, 700) if source.read(at, 999) != data[at : at + 999])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    child = os.fork()
    if child == 0:
        os._exit(0 if source.read(5, 9000) == data[5:9005] else 1)
    for thread in threads:
        thread.join()
    assert os.waitpid(child, 0)[1] == 0 and not wrong
    assert pickle.loads(pickle.dumps(source)).read(3, 4) == data[3:7]


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("93.184.216.34", "public"),
        ("2606:4700::1", "public"),
        ("127.0.0.1", "private"),
        ("10.0.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.0.1", "private"),
        ("100.64.0.1", "private"),
        ("198.18.0.1", "private"),
        ("::1", "private"),
        ("fd12::1", "private"),
        ("::ffff:10.0.0.1", "private"),
        ("64:ff9b::7f00:1", "private"),
        ("2002:7f00:1::", "private"),
        ("169.254.169.254", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("::ffff:169.254.169.254", "link-local"),
        ("64:ff9b::a9fe:a9fe", "link-local"),
        ("fd00:ec2::254", "link-local"),
        ("100.100.100.200", "link-local"),
        ("0.0.0.0", "link-local"),
        ("::", "link-local"),
        ("224.0.0.1", "link-local"),
    ],
)
def test_kinds_of_addresses(address: str, kind: str) -> None:
    assert kind_of_address(address) == kind


def test_listed_hosts() -> None:
    listed = ("Shards.example", "store.example:9000", "*.cdn.example")
    assert host_listed("shards.example", 443, listed) and host_listed("shards.example.", 80, listed)
    assert host_listed("store.example", 9000, listed) and not host_listed("store.example", 80, listed)
    assert host_listed("a.b.cdn.example", 443, listed)
    for host in ("cdn.example", "evilcdn.example", "shards.example.evil", "xshards.example"):
        assert not host_listed(host, 443, listed)


def test_s3_and_gs_say_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "botocore", None)
    with pytest.raises(DataError, match="pip install botocore"):
        open_source("s3://bucket/a.tar", options=StorageOptions(seed=901, s3_region="none-1")).size()
    monkeypatch.setitem(sys.modules, "google.auth", None)
    with pytest.raises(DataError, match="pip install google-auth"):
        open_source("gs://bucket/a.tar").size()
