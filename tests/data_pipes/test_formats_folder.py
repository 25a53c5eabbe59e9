"""Plain folders and JSONL files become shards: the same bytes every time, nothing left out in silence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import webdataset

from ringweave.data_pipes.folder import build_from_folder, build_from_jsonl, is_heldout, scan_folder
from ringweave.data_pipes.jsonl import read_lines
from ringweave.data_pipes.reader import ShardReader, check_shard
from ringweave.data_pipes.shard_writer import ShardWriter
from ringweave.data_pipes.tar import parse_header
from ringweave.tokenizers.errors import DataError


def make(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pairs(count: int) -> dict[str, bytes]:
    return {
        f"d{i % 3}/{i:03d}.{ext}": f"{ext}{i}".encode() * 20 for i in range(count) for ext in ("txt", "jpg")
    }


def contents(out: Path, shards: list[str]) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for name in shards:
        assert check_shard(out / name) == []
        with ShardReader(out / name) as reader:
            for i in range(len(reader)):
                sample = reader.read(i)
                assert sample.key not in found
                found[sample.key] = sample.members
    return found


def build(folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    return build_from_folder(folder, out, **{"name": "s", "shard_bytes": 1 << 20, **more})


# --- folders -----------------------------------------------------------------------------------------------


def test_files_are_grouped_by_stem_and_every_byte_arrives(tmp_path: Path) -> None:
    files = pairs(20)
    made = build(make(tmp_path / "in", files), tmp_path / "out", shard_bytes=12_000)
    assert made["samples"] == 20 and made["heldout"] == 0 and made["members"] == {"jpg": 20, "txt": 20}
    assert made["shards"] == [f"s-train-{n:04d}.tar" for n in range(len(made["shards"]))]
    assert len(made["shards"]) > 2
    assert all((tmp_path / "out" / name).stat().st_size < 12_000 + 10_240 for name in made["shards"])
    found = contents(tmp_path / "out", made["shards"])
    assert list(found) == sorted(found)
    assert {f"{key}.{ext}": data for key, members in found.items() for ext, data in members.items()} == files


def test_the_same_folder_gives_the_same_bytes_whatever_its_times_and_order(tmp_path: Path) -> None:
    files = pairs(12)
    one = make(tmp_path / "one", files)
    two = make(tmp_path / "two", dict(reversed(files.items())))
    for path in two.rglob("*"):
        os.utime(path, (1, 1))
    (two / "d0" / "000.txt").chmod(0o600)
    first, second = (build(p, tmp_path / f"{p.name}-out", heldout=0.3) for p in (one, two))
    assert first == second and first["heldout"] > 0
    for name in first["shards"]:
        for suffix in ("", ".idx"):
            a, b = (tmp_path / f"{p}-out" / f"{name}{suffix}" for p in ("one", "two"))
            assert a.read_bytes() == b.read_bytes()


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    made = build(make(tmp_path / "in", pairs(8)), tmp_path / "out")
    [shard] = [tmp_path / "out" / name for name in made["shards"]]
    theirs = {
        s["__key__"]: {"txt": s["txt"], "jpg": s["jpg"]}
        for s in webdataset.WebDataset(str(shard), shardshuffle=False)
    }
    assert theirs == contents(tmp_path / "out", made["shards"])


def test_sides_follow_from_the_key_alone(tmp_path: Path) -> None:
    made = build(make(tmp_path / "in", pairs(60)), tmp_path / "out", heldout=0.2)
    held = contents(tmp_path / "out", [n for n in made["shards"] if "-heldout-" in n])
    assert 2 <= made["heldout"] == len(held) <= 25 and made["samples"] + len(held) == 60
    assert all(is_heldout(key, 0.2) and is_heldout(key, 0.5) for key in held)
    keys = [f"k{i}" for i in range(4000)]
    assert 0.17 < sum(is_heldout(key, 0.2) for key in keys) / 4000 < 0.23


def test_links_special_files_and_odd_names_stay_out_and_are_reported(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "in",
        {"a.txt": b"a", ".hidden.txt": b"", ".git/x.txt": b"", "__MACOSX/a.txt": b"", "Thumbs.db": b""}
        | {"README": b"r", "b\nc.txt": b"", "back\\slash.txt": b"", "flip\u202etxt.txt": b"", "x.j g": b""}
        | {"v.1.jpg": b"1", "v_1.txt": b"2", "P.JPG": b"3", "P.jpg": b"4"},
    )
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "dir").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.txt")
    (Path(os.fsencode(folder).decode() + "/") / os.fsdecode(b"bad\xff.txt")).write_bytes(b"x")
    made = build(folder, tmp_path / "out")
    found = contents(tmp_path / "out", made["shards"])
    assert found == {"P": {"jpg": b"3"}, "a": {"txt": b"a"}, "v_1": {"jpg": b"1"}}
    assert made["hidden"] == 4
    reasons = {entry["file"]: entry["reason"] for entry in made["skipped"]}
    assert reasons["link.txt"] == reasons["dir"] == "a symbolic link"
    assert reasons["pipe.txt"] == "not a regular file"
    assert "no ending" in reasons["README"] and "no ending" in reasons["x.j g"]
    assert "its key 'v_1' is that of 'v.1'" in reasons["v_1.txt"]
    assert "a second member 'jpg'" in reasons["P.jpg"]
    for odd in ("b\nc.txt", "back\\slash.txt", "flip\u202etxt.txt", os.fsdecode(b"bad\xff.txt")):
        assert "unsafe name" in reasons[odd]
    assert len(reasons) == 11


def test_layers_and_long_or_foreign_names(tmp_path: Path) -> None:
    long = "n" * 90
    files = {
        f"{long}/{long}/{long}.txt": b"long",
        "é/ü.txt": b"foreign",
        "a.layer0.png": b"0",
        "a.layer1.png": b"1",
    }
    made = build(make(tmp_path / "in", files), tmp_path / "out")
    found = contents(tmp_path / "out", made["shards"])
    assert found == {f"{long}/{long}/{long}": {"txt": b"long"}, "é/ü": {"txt": b"foreign"}} | {
        "a": {"layer0.png": b"0", "layer1.png": b"1"}
    }
    block = (tmp_path / "out" / made["shards"][0]).read_bytes()[:512]
    assert block[257:265] == b"ustar\x0000" and parse_header(block).kind == b"0", "plain ustar where it fits"


def test_what_cannot_be_built_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", pairs(3))
    with pytest.raises(DataError, match="inside the folder"):
        build(folder, folder / "out")
    with pytest.raises(DataError, match="no samples"):
        build(make(tmp_path / "empty", {".x": b""}), tmp_path / "out")
    with pytest.raises(DataError, match="bad source name"):
        build(folder, tmp_path / "out", name="../x")
    with pytest.raises(DataError, match="nothing is left to train on"):
        build(folder, tmp_path / "out", heldout=0.9999999999)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True
    build(folder, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(DataError, match="already"):
        build(folder, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_file_that_changes_or_turns_into_a_link_is_not_written(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", pairs(3))
    (tmp_path / "secret.txt").write_text("secret")
    victim = folder / "d1" / "001.txt"

    def swap(message: str, done: int, total: int) -> None:
        if victim.exists() and not victim.is_symlink():
            victim.unlink()
            victim.symlink_to(tmp_path / "secret.txt")

    with pytest.raises(DataError, match="cannot read a file"):
        build(folder, tmp_path / "out", progress=swap)
    assert list((tmp_path / "out").iterdir()) == []
    with (
        ShardWriter(tmp_path / "w", "x-train", shard_bytes=100) as writer,
        open(victim.resolve(), "rb") as file,
    ):
        with pytest.raises(DataError, match="grew"):
            writer.add("k", [("txt", (file, 3))])
        writer.abort()
    assert list((tmp_path / "w").iterdir()) == []


def test_scan_goes_by_bytes_of_names(tmp_path: Path) -> None:
    scan = scan_folder(make(tmp_path, {"b.txt": b"", "B.txt": b"", "a.b.flat.png": b""}))
    assert list(scan.samples) == ["B", "a_b", "b"] and scan.samples["a_b"] == {"flat.png": "a.b.flat.png"}


# --- jsonl -------------------------------------------------------------------------------------------------

GOOD = b'{"q": "hi",  "a": "yo"}'


def jsonl(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines))
    return path


def test_every_line_is_kept_byte_for_byte_under_its_number(tmp_path: Path) -> None:
    lines = [GOOD, b"", b'  {"q":"\xc3\xa9","a":"2"}', GOOD + b"\r"]
    made = build_from_jsonl(
        jsonl(tmp_path / "x.jsonl", *lines), tmp_path / "out", name="qa", fields="[q],a", shard_bytes=1 << 20
    )
    found = contents(tmp_path / "out", made["shards"])
    assert found == {
        "qa-000000001": {"json": GOOD},
        "qa-000000003": {"json": lines[2]},
        "qa-000000004": {"json": GOOD},
    }
    assert made["skipped"] == [] and not (tmp_path / "out" / "qa-skipped.jsonl").exists()


def test_offsets_of_lines_are_where_they_begin(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", b"", GOOD, b"   ", GOOD + b"\r", b"last")
    data = path.read_bytes()
    found = list(read_lines(path))
    assert [line.number for line in found] == [2, 4, 5]
    assert all(data[line.offset : line.offset + len(line.data)] == line.data for line in found)


def test_bad_lines_are_named_by_line_field_and_offset(tmp_path: Path) -> None:
    bad = [
        b'{"q": "hi"}',
        b"not json",
        b'{"q": "1", "a": 2}',
        b'{"q":"1","q":"2","a":"3"}',
        b'{"q": "\xff"}',
        b"[1]",
    ]
    lines = [x for pair in zip([GOOD] * 6, bad, strict=True) for x in pair] + [GOOD] * 200
    source = jsonl(tmp_path / "x.jsonl", *lines)
    made = build_from_jsonl(source, tmp_path / "out", name="qa", fields="[q],a", shard_bytes=1 << 20)
    assert made["samples"] == 206 and len(made["skipped"]) == 6
    data = source.read_bytes()
    for entry, line in zip(made["skipped"], bad, strict=True):
        assert data[entry["offset"] :].startswith(line) and entry["line"] % 2 == 0
        assert f"line {entry['line']} @{entry['offset']}" in entry["reason"]
    for entry, word in zip(
        made["skipped"], ("'a'", "Expecting", "'a'", "'q' occurs twice", "UTF-8", "object"), strict=True
    ):
        assert word in entry["reason"]
    journal = [json.loads(x) for x in (tmp_path / "out" / "qa-skipped.jsonl").read_text().splitlines()]
    assert journal == made["skipped"]


def test_too_many_bad_lines_end_it_and_nothing_is_written(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", *[b"bad", GOOD] * 20)
    with pytest.raises(DataError, match="20 of 40 lines") as caught:
        build_from_jsonl(source, tmp_path / "out", name="qa", shard_bytes=1 << 20)
    assert "line 1 @0" in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []
    made = build_from_jsonl(source, tmp_path / "out", name="qa", shard_bytes=1 << 20, max_skip_rate=0.6)
    assert made["samples"] == 20
    for empty in (b"", b"\n\n"):
        with pytest.raises(DataError, match="0 of 0 lines"):
            build_from_jsonl(jsonl(tmp_path / "e.jsonl", empty), tmp_path / "o", name="e", shard_bytes=1)


def test_a_line_over_the_limit_is_one_bad_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringweave.data_pipes.jsonl.MAX_JSON", 64)
    exact = b'{"a": "' + b"x" * (64 - 9) + b'"}'
    source = jsonl(tmp_path / "x.jsonl", GOOD, b'{"a": "' + b"x" * 3_000_000 + b'"}', exact, GOOD)
    found = list(read_lines(source))
    assert [(line.number, line.whole) for line in found] == [(1, True), (2, False), (3, True), (4, True)]
    assert len(found[1].data) <= 66 and found[2].data == exact
    data = source.read_bytes()
    assert all(data[line.offset :].startswith(line.data) for line in found)
