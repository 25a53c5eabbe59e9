"""Data that attacks: nothing of it runs, connects or writes elsewhere, and each piece ends in an error or as bytes.

The fixtures are made in `hostile_shards.py` and `hostile_members.py`; `hostile_run.py` takes them through index,
check, read, decode, encode and sheet in a process of its own, under an audit hook and 4 GiB of address space.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ringweave.data_pipes.index import build_index, write_index
from ringweave.data_pipes.reader import ShardReader
from ringweave.tokenizers.errors import DataError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One entry a fixture, then the control and the peak of memory."""
    place = tmp_path_factory.mktemp("hostile")
    done = subprocess.run(
        [sys.executable, str(HERE / "hostile_run.py"), str(place)],
        capture_output=True, text=True, timeout=500, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    last = found[-1].get("name") if found else "none"
    assert done.returncode == 0, f"ended with {done.returncode} after {last}:\n{done.stderr[-3000:]}"
    return found


@pytest.mark.slow
def test_every_fixture_ends_as_it_should(results: list[dict[str, Any]]) -> None:
    fixtures = [entry for entry in results if "name" in entry]
    assert len({entry["name"] for entry in fixtures}) == len(fixtures) >= 130
    wrong = [
        (e["name"], e["expect"], e["outcome"], e["why"]) for e in fixtures if e["outcome"] != e["expect"]
    ]
    assert wrong == []
    assert sum(entry["outcome"] == "refused" for entry in fixtures) >= 45
    assert sum(entry["outcome"] == "unusable" for entry in fixtures) >= 50
    silent = [
        entry["name"] for entry in fixtures if entry["outcome"] != "harmless" and "where:" not in entry["why"]
    ]
    assert silent == [], "an error names its place"


@pytest.mark.slow
def test_nothing_runs_connects_or_writes_elsewhere(results: list[dict[str, Any]]) -> None:
    seen = {entry["name"]: entry["events"] for entry in results if entry.get("events")}
    assert seen == {}
    noticed = " ".join(next(entry["control"] for entry in results if "control" in entry))
    for event in ("exec", "pickle.find_class", "socket.connect", "open", "subprocess.Popen"):
        assert f"{event} (" in noticed, "the hook sees what is done on purpose"


@pytest.mark.slow
def test_memory_and_time_stay_bounded(results: list[dict[str, Any]]) -> None:
    peak = next(entry["peak_mb"] for entry in results if "peak_mb" in entry)
    assert peak < 2500, "measured: 1,160 MB, of which the fixtures themselves are most"
    slowest = max((entry["seconds"], entry["name"]) for entry in results if "name" in entry)
    assert slowest[0] < 90, slowest


def test_a_sample_larger_than_the_limit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole in a file costs its author nothing, and whoever reads it all its bytes."""
    shard = tmp_path / "x-0000.tar"
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, size in (("a.bin", 5000), ("b.bin", 100)):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    write_index(shard, build_index(shard))
    monkeypatch.setattr("ringweave.data_pipes.reader._MAX_SAMPLE", 4096)
    with ShardReader(shard) as reader:
        with pytest.raises(DataError, match="5512 bytes in one sample") as caught:
            reader.read(0)
        assert "x-0000.tar#a/bin @512" in str(caught.value)
        assert len(reader.read(1).members["bin"]) == 100
