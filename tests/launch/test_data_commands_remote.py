"""`ringweave data index|check|show|stats` on shards that are packed, remote, or written by a command."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "faults"))
sys.path.append(str(Path(__file__).parents[1] / "data_pipes"))

from hostile_server import HostileServer
from token_fixtures import write_shard

from ringweave.data_pipes.index import index_path
from ringweave.data_pipes.store import OPEN_SHARD, Store
from ringweave.data_pipes.stored_shard import CommandShard
from ringweave.launch.cli import run
from ringweave.launch.data_records import records_by_modality
from ringweave.pretrain.config import RunConfig, load_config
from ringweave.pretrain.data_store import data_specs, store_of
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.text import TextCodec

SECRET = "?sig=hunter2"


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer() as local:
        threading.Thread(target=local.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield local
        local.shutdown()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(2):
        write_shard(
            folder / f"text-{n:03d}.tar", [{"txt": b"some words %d of %d" % (i, n)} for i in range(4)]
        )
    return folder


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, the JSON object, what people see)."""
    capsys.readouterr()
    code = run([*argv, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


def packed(data: Path) -> Path:
    folder = data.parent / "packed"
    folder.mkdir()
    for tar in data.glob("*.tar"):
        (folder / f"{tar.name}.gz").write_bytes(gzip.compress(tar.read_bytes()))
    return folder


def config_of(tmp_path: Path, data: str, source: dict[str, Any], **more: Any) -> Path:
    values = {
        "run": {"name": "t", "dir": str(tmp_path / "run")},
        "tokenizers": {"dir": str(tmp_path / "tokenizers")},
        "data": {"dir": data, "sources": [{"name": "text", "plan": ["text"], **source}], **more},
        "model": {"layers": 1, "width": 16, "heads": 1, "kv_heads": 1},
        "optimizer": {"lr": 1e-3},
        "stages": [{"context": 256, "tokens": 10**4, "batch": 2, "layout": {}}],
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def tokenizers(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizers"
    TokenizerSet({"text": TextCodec.fit([f"some words {i} of" for i in range(50)], size=300)}).save(folder)
    return folder


def test_packed_shards_of_a_folder_are_indexed_checked_and_shown(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cache = packed(data), str(tmp_path / "cache")
    code, found, said = call(capsys, "data", "index", str(folder))
    assert code == 3 and "--cache DIR" in said
    code, found, _ = call(capsys, "data", "index", str(folder), "--cache", cache)
    assert code == 0 and found["shards"] == 2 and len(found["indexed"]) == 2
    assert all(path.startswith(str(tmp_path / "cache" / "indexes")) for path in found["indexed"])
    code, found, _ = call(capsys, "data", "index", str(folder), "--cache", cache)
    assert code == 0 and found["indexed"] == []
    code, found, _ = call(capsys, "data", "check", str(folder), "--cache", cache, "--decode")
    assert code == 0 and found["sources"][0]["samples"] == 8 and found["sources"][0]["source"] == "text"
    code, found, _ = call(
        capsys, "data", "show", str(folder), "--cache", cache, "--sample", "text-001.tar.gz#2"
    )
    assert code == 0 and found["sample"]["members"][0]["start"] == "some words 2 of 1"
    bad = folder / "text-000.tar.gz"
    bad.write_bytes(bad.read_bytes()[:-20])
    code, found, said = call(capsys, "data", "check", str(folder), "--cache", cache)
    assert code == 3 and found["sources"][0]["damaged"] >= 1 and "text-000.tar.gz" in said


def test_remote_shards_are_indexed_into_the_cache_and_missing_ones_named(
    server: HostileServer, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tar in data.glob("*.tar"):
        server.put(f"/{tar.name}{SECRET}", tar.read_bytes())
    url = f"{server.base}/text-{{000..001}}.tar{SECRET}"
    code, _, said = call(capsys, "data", "index", url)
    assert code == 3 and "shard without an index" in said and "--cache DIR" in said
    code, found, said = call(capsys, "data", "index", url, "--cache", str(tmp_path / "cache"))
    assert code == 0 and len(found["indexed"]) == 2
    code, found, said = call(capsys, "data", "check", url)
    assert code == 3 and [p["what"] for p in found["problems"]] == ["shard without an index"] * 2
    wider = url.replace("001", "002")
    code, found, said = call(capsys, "data", "check", wider, "--cache", str(tmp_path / "cache"))
    assert code == 3 and [p["what"] for p in found["problems"]] == ["missing object"]
    assert "text-002.tar?sig=***" in said and "hunter2" not in said + json.dumps(found)
    assert found["sources"][0]["samples"] == 8


def test_a_config_over_http_makes_lengths_and_predicts(
    server: HostileServer, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tar in data.glob("*.tar"):
        server.put(f"/d/{tar.name}", tar.read_bytes())
        server.put(f"/d/{tar.name}.idx", index_path(tar).read_bytes())
    cache = {"dir": str(tmp_path / "cache"), "size": "64MB"}
    config = config_of(tmp_path, f"{server.base}/d", {"shards": "text-{000..001}.tar"}, cache=cache)
    folder = str(tokenizers(tmp_path))
    pattern = f"{server.base}/d/text-{{000..001}}.tar"
    code, found, _ = call(capsys, "data", "index", pattern, "-t", folder, "--config", str(config))
    assert code == 0 and len(found["lengths"]) == 2 and found["indexed"] == []
    assert all(path.startswith(str(tmp_path / "cache" / "tokens")) for path in found["lengths"])
    code, found, _ = call(capsys, "data", "stats", f"{server.base}/d", "--config", str(config))
    assert code == 0 and found["sources"][0]["documents"] == 8
    records = records_by_modality(config)
    assert [r["txt"] for r in records["text"]][:2] == [b"some words 0 of 0", b"some words 1 of 0"]


def test_sources_of_a_config_become_shards_of_its_store(data: Path, tmp_path: Path) -> None:
    pipe = [sys.executable, "-c", "import sys; sys.stdout.write('')", "{shard}", "--from={shard}"]
    source = {"shards": "text-{000..001}.tar", "pipe": pipe, "heldout": "held.tar.gz"}
    cache = {"dir": str(tmp_path / "cache"), "size": "64MB"}
    remote = {"timeout": "3s", "s3_endpoint": "http://127.0.0.1:9", "anonymous": True, "allow_hosts": ["h"]}
    path = config_of(tmp_path, str(data), source, cache=cache, allow_pipe=True, remote=remote)
    config = load_config(path)
    assert isinstance(config, RunConfig)
    store = store_of(config)
    assert (store.options.timeout_s, store.options.anonymous, store.options.allow_hosts) == (
        3.0,
        True,
        ("h",),
    )
    assert store.options.s3_endpoint == "http://127.0.0.1:9" and store.cache_bytes == 64_000_000
    assert Store.from_json(store.to_json()) == store and OPEN_SHARD.endswith("open_shard")
    [spec], [held] = data_specs(config.data, store), data_specs(config.data, store, heldout=True)
    assert spec.whole and held.whole and len(spec.shards) == 2
    first = spec.shards[0]
    assert isinstance(first, CommandShard) and first.name == "text-000.tar"
    assert '"text-000.tar", "--from=text-000.tar"]' in first.address
    assert not (tmp_path / "cache").exists(), "nothing is opened yet"
    plain = load_config(config_of(tmp_path, str(data), {"shards": "text-{000..001}.tar"}))
    [spec] = data_specs(plain.data, store_of(plain))
    assert list(spec.shards) == [data / "text-000.tar", data / "text-001.tar"] and not spec.whole
    absent = load_config(config_of(tmp_path, str(data), {"shards": "text-{000..009}.tar"}))
    with pytest.raises(DataError, match="8 of 10 shards missing"):
        data_specs(absent.data, store_of(absent))
