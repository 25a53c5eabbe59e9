"""Law 6 on shards: whatever happens to the bytes, a read gives the original payload or a named error."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tarfile
import zlib
from pathlib import Path

import pytest
import webdataset

from ringweave.data_pipes import index as index_module
from ringweave.data_pipes.index import build_index, index_folder, index_path, load_index, write_index
from ringweave.data_pipes.reader import ShardReader, check_shard, expand_shards
from ringweave.tokenizers.errors import DataError

SAMPLES: list[dict[str, bytes]] = [
    {"txt": b"in the beginning", "json": b'{"piece": "a"}'},
    {"txt": b"", "json": b'{"piece": "b"}'},  # a zero-length member
    {"bin": bytes(range(256)) * 5, "json": b"{}"},
]


def write_shard(path: Path, samples: list[dict[str, bytes]] = SAMPLES) -> Path:
    with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0) as writer:
        for i, members in enumerate(samples):
            writer.write({"__key__": f"k{i}", **members})
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = write_shard(tmp_path / "demo-0000.tar")
    write_index(path, build_index(path))
    return path


def read_all(path: Path) -> list[dict[str, bytes]]:
    with ShardReader(path) as reader:
        return [reader.read(i).members for i in range(len(reader))]


def tar_of(path: Path, entries: list[tarfile.TarInfo | tuple[str, bytes]], **options: int) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return path


def assert_names(error: DataError, *words: str) -> None:
    assert type(error) is DataError
    assert error.what
    assert error.why
    assert error.fix
    for word in words:
        assert word in str(error), f"{word!r} not in: {error}"


def test_round_trip_keeps_keys_order_and_bytes(shard: Path) -> None:
    with ShardReader(shard) as reader:
        assert reader.keys == ["k0", "k1", "k2"]
        assert len(reader) == 3
        sample = reader.read(2)
    assert (sample.key, sample.index, sample.shard) == ("k2", 2, str(shard))
    assert read_all(shard) == SAMPLES
    assert check_shard(shard) == []


def test_shard_writer_output_is_read(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "w-%04d.tar"), maxcount=2, verbose=0, encoder=False) as writer:
        for i, members in enumerate(SAMPLES):
            writer.write({"__key__": f"dir/k{i}", **members})
    assert [p.name for p in index_folder(tmp_path)] == ["w-0000.tar.idx", "w-0001.tar.idx"]
    shards = expand_shards("w-{0000..0001}.tar", tmp_path)
    assert [m for s in shards for m in read_all(s)] == SAMPLES


def test_every_truncation_is_refused_at_indexing(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole.tar")
    data = whole.read_bytes()
    last = build_index(whole).samples[-1].members[-1]
    end = last.offset + -(-last.size // 512) * 512 + 1024  # the two end-of-archive blocks included
    cuts = sorted({*range(0, end, 61), *range(0, end, 512), end - 1, end - 512, end - 513})
    for cut in cuts:
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:cut])
        with pytest.raises(DataError) as caught:
            build_index(path)
        assert_names(caught.value, "cut.tar", "@")
        assert "truncated" in caught.value.why or "zero block" in caught.value.why


def test_truncation_after_indexing_is_stale_and_named(shard: Path) -> None:
    data = shard.read_bytes()
    for cut in range(0, len(data), 509):
        shard.write_bytes(data[:cut])
        with pytest.raises(DataError) as caught:
            ShardReader(shard)
        assert_names(caught.value, shard.name, "stale index", f"ringweave data index {shard.parent}")


def test_truncation_under_an_open_reader_is_named(shard: Path) -> None:
    data = shard.read_bytes()
    reader = ShardReader(shard)
    first, last = reader.index.samples[0].members[0], reader.index.samples[-1].members[-1]
    for cut in range(0, last.offset + last.size, 97):
        shard.write_bytes(data[:cut])
        failed = 0
        for i in range(3):
            try:
                assert reader.read(i).members == SAMPLES[i]
            except DataError as error:
                failed += 1
                assert_names(error, f"{shard}#k{i}/", "@")
        assert failed >= (3 if cut < first.offset else 1)
    reader.close()


@pytest.mark.parametrize("seed", range(4))
def test_any_flipped_byte_is_detected_or_harmless(shard: Path, seed: int) -> None:
    """Every byte of the shard in turn (a quarter each run): a named error or the original payload."""
    rng = random.Random(seed)
    data = shard.read_bytes()
    file = os.open(shard, os.O_RDWR)
    index = load_index(shard)
    last = index.samples[-1].members[-1]
    payload = {at for s in index.samples for m in s.members for at in range(m.offset, m.offset + m.size)}
    starts = {m.offset - 512: f"#{s.key}/{m.ext}" for s in index.samples for m in s.members}
    headers = {at + i: name for at, name in starts.items() for i in range(512)}
    reader = ShardReader(shard)
    for at in range(seed, last.offset + last.size + 1024, 4):
        os.pwrite(file, bytes([data[at] ^ (1 << rng.randrange(8))]), at)
        errors = []
        for i in range(3):
            try:
                assert reader.read(i).members == SAMPLES[i], f"silent change at byte {at}"
            except DataError as error:
                errors.append(error)
                assert_names(error, f"{shard}#k{i}/", "@")
        if at in payload:
            assert len(errors) == 1
        if at in headers and not 148 <= at % 512 < 156:  # the checksum field may be spelled in several ways
            assert len(errors) == 1
            assert headers[at] in errors[0].where
        os.pwrite(file, data[at : at + 1], at)
    assert shard.read_bytes() == data
    os.close(file)
    reader.close()


def test_header_flip_is_refused_at_indexing(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole.tar")
    data = bytearray(whole.read_bytes())
    start = build_index(whole).samples[1].members[0].offset - 512
    for at in [*range(start, start + 148, 7), *range(start + 156, start + 512, 11)]:
        data[at] ^= 1
        path = tmp_path / "flip.tar"
        path.write_bytes(data)
        with pytest.raises(DataError) as caught:
            build_index(path)
        assert_names(caught.value, "flip.tar", "after k0/txt", "bad header checksum", f"@{start}")
        data[at] ^= 1


def test_check_shard_lists_every_damaged_sample(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    index = load_index(shard)
    for i in (0, 2):
        data[index.samples[i].members[0].offset] ^= 0x10
    shard.write_bytes(data)
    problems = check_shard(shard)
    assert [p.where.split("@")[0].strip() for p in problems] == [f"{shard}#k0/json", f"{shard}#k2/bin"]


def test_check_shard_sees_the_tar_behind_a_bad_index(shard: Path) -> None:
    index_path(shard).unlink()
    assert [p.what for p in check_shard(shard)] == ["shard without an index"]
    shard.write_bytes(shard.read_bytes()[:700])
    assert [p.what for p in check_shard(shard)] == ["shard without an index", "damaged or unusable shard"]
    shard.unlink()
    assert [p.what for p in check_shard(shard)] == ["missing shard"]


REFUSED = {
    "duplicate": ([("a.txt", b"1"), ("a.txt", b"2")], "a/txt", "twice"),
    "case": ([("a.txt", b"1"), ("a.TXT", b"2")], "a/txt", "twice"),
    "apart": ([("a.txt", b"1"), ("b.txt", b"1"), ("a.json", b"{}")], "a/json", "not adjacent"),
    "dots": ([("x/../a.txt", b"1")], "x/../a.txt", "unsafe"),
    "up": ([("../a.txt", b"1")], "../a.txt", "unsafe"),
    "absolute": ([("/etc/a.txt", b"1")], "/etc/a.txt", "unsafe"),
    "no extension": ([("README", b"1")], "README", "no sample"),
    "dot file": ([("d/._a.jpg", b"1")], "d/._a.jpg", "no sample"),
    "control": ([("a\x07.txt", b"1")], "txt", "control character"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ambiguous_or_unsafe_members_are_refused(tmp_path: Path, case: str) -> None:
    entries, name, why = REFUSED[case]
    path = tar_of(tmp_path / "bad.tar", entries, format=tarfile.USTAR_FORMAT)
    with pytest.raises(DataError) as caught:
        build_index(path)
    assert_names(caught.value, "bad.tar#", name, why)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("a.txt")
    info.type, info.linkname = kind, "/etc/passwd"
    path = tar_of(tmp_path / "bad.tar", [info])
    with pytest.raises(DataError) as caught:
        build_index(path)
    assert_names(caught.value, "bad.tar#a.txt", "is not a file")


def test_joined_tars_and_a_missing_end_are_refused(tmp_path: Path) -> None:
    data = write_shard(tmp_path / "one.tar").read_bytes()
    (tmp_path / "two.tar").write_bytes(data + data)
    with pytest.raises(DataError, match="after the end of the archive"):
        build_index(tmp_path / "two.tar")
    last = build_index(tmp_path / "one.tar").samples[-1].members[-1]
    (tmp_path / "open.tar").write_bytes(data[: last.offset + 512])
    with pytest.raises(DataError, match="end-of-archive"):
        build_index(tmp_path / "open.tar")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_forms_and_long_names(tmp_path: Path, form: int) -> None:
    """ustar prefix, GNU long name, pax path, `./` in front, capital extensions: all read and verified."""
    long = "f" * 90 + "/" + "k" * 90
    entries = [
        ("./dir/A.JPG", b"jpeg"),
        (f"{long}.txt", b"long"),
        (f"{long}.seg.png", b"png"),
        ("z.txt", b""),
    ]
    folder = tarfile.TarInfo("dir")
    folder.type = tarfile.DIRTYPE
    names = [] if form == tarfile.USTAR_FORMAT else [("é" * 70 + ".txt", "ü".encode())]
    path = tar_of(tmp_path / "f.tar", [folder, *entries, *names], format=form)
    write_index(path, build_index(path))
    with ShardReader(path) as reader:
        assert reader.keys[:3] == ["dir/A", long, "z"]
        assert reader.read(0).members == {"jpg": b"jpeg"}
        assert reader.read(1).members == {"txt": b"long", "seg.png": b"png"}
        if names:
            assert (reader.keys[3], reader.read(3).members) == ("é" * 70, {"txt": "ü".encode()})
    assert check_shard(path) == []


def json_index(shard: Path) -> dict[str, object]:
    """The sidecar an earlier version wrote (format 1)."""
    samples = [
        {"key": s.key, "members": [[m.ext, m.offset, m.size, m.crc32] for m in s.members]}
        for s in build_index(shard).samples
    ]
    crc = zlib.crc32(json.dumps(samples, separators=(",", ":")).encode())
    head = {"format": "ringweave-shard-index/1", "shard_size": shard.stat().st_size}
    return {**head, "count": len(samples), "crc32": crc, "samples": samples}


def test_an_index_of_format_1_is_read_and_then_replaced(shard: Path) -> None:
    new = load_index(shard)
    index_path(shard).unlink()
    old = shard.with_name(shard.name + ".idx.json")
    old.write_text(json.dumps(json_index(shard)))
    assert index_path(shard) == old
    index = load_index(shard)
    assert index == new
    assert index.crc32 == new.crc32
    assert read_all(shard) == SAMPLES  # headers are parsed where their crc32 is not known
    assert check_shard(shard) == []
    assert index_folder(shard.parent) == []
    assert index_folder(shard.parent, rebuild=True) == [shard.with_name(shard.name + ".idx")]
    assert not old.exists()


def test_faults_of_a_format_1_index_name_the_command(shard: Path) -> None:
    index_path(shard).unlink()
    raw = json_index(shard)
    good, path = json.dumps(raw), shard.with_name(shard.name + ".idx.json")
    broken = {
        "cut": good[:-20],
        "list": "[]",
        "format": json.dumps({**raw, "format": "other"}),
        "count": json.dumps({**raw, "count": 9}),
        "row": json.dumps({**raw, "samples": [{"key": "k0", "members": [["txt", -1, 5, 0]]}]}),
        "rows": json.dumps({**raw, "samples": [{"key": "k0", "members": 3}]}),
        "flip": good.replace('"k1"', '"k7"'),
        "deep": '{"format":' + "[" * 100_000,
        "size": json.dumps({**raw, "shard_size": "many"}),
    }
    for name, text in broken.items():
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            load_index(shard)
        assert caught.value.what == "malformed index", name
        assert_names(caught.value, path.name, f"ringweave data index {shard.parent}")


def test_index_faults_name_the_command(shard: Path) -> None:
    path = index_path(shard)
    good = path.read_bytes()
    broken = {
        "cut": good[:-20],
        "empty": b"",
        "not an index": b"\x00",
        "list": b"[]",
        "longer": good + b"\0" * 8,
        "format": good.replace(b"shard-index/2", b"shard-index/9"),
        "metadata": good.replace(b"txt", b"tyt"),
        "key": good.replace(b"k1", b"k7"),
        "header": (1 << 60).to_bytes(8, "little") + good[8:],
    }
    for name, data in broken.items():
        assert data != good, name
        path.write_bytes(data)
        with pytest.raises(DataError) as caught:
            load_index(shard)
        assert caught.value.what == "malformed index", name
        assert_names(caught.value, path.name, f"ringweave data index {shard.parent}")
    path.unlink()
    with pytest.raises(DataError, match="without an index") as caught:
        load_index(shard)
    assert_names(caught.value, f"ringweave data index {shard.parent}")
    assert index_folder(shard.parent) == [path]
    assert path.read_bytes() == good
    assert index_folder(shard.parent) == []


def test_any_flipped_byte_of_an_index_is_noticed(shard: Path) -> None:
    path = index_path(shard)
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        try:
            index = load_index(shard)
        except DataError:
            continue
        assert index == load_index(shard)  # spaces of the header may change
        assert index.to_bytes() == good, at


def test_index_write_is_atomic(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = index_path(shard).read_bytes()

    def crash(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(index_module.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_index(shard, build_index(shard))
    assert index_path(shard).read_bytes() == good
    assert sorted(p.name for p in shard.parent.iterdir()) == [shard.name, index_path(shard).name]


def test_a_swapped_sample_is_noticed(shard: Path) -> None:
    """Same size, valid tar, other content: the stored names and crc32s do not agree."""
    write_shard(shard, [SAMPLES[1], SAMPLES[0], SAMPLES[2]])
    with ShardReader(shard) as reader, pytest.raises(DataError) as caught:
        reader.read(0)
    assert_names(caught.value, f"{shard}#k0/")


def test_reader_survives_pickling(shard: Path) -> None:
    with ShardReader(shard) as reader:
        reader.read(0)
        with pickle.loads(pickle.dumps(reader)) as copy:
            assert copy.read(1).members == SAMPLES[1]


def test_expand_shards(tmp_path: Path) -> None:
    for name in ("a-0008.tar", "a-0009.tar", "a-0010.tar", "plain.tar"):
        (tmp_path / name).touch()
    found = expand_shards("a-{0008..0010}.tar", tmp_path)
    assert [p.name for p in found] == ["a-0008.tar", "a-0009.tar", "a-0010.tar"]
    assert expand_shards("plain.tar", tmp_path) == [tmp_path / "plain.tar"]
    with pytest.raises(DataError, match=r"a-0011\.tar, a-0012\.tar") as caught:
        expand_shards("a-{0008..0012}.tar", tmp_path)
    assert caught.value.what == "2 of 5 shards missing"
    for bad in ("a-{8..}.tar", "a-{0003..0001}.tar", "a-{1..2}{.tar", "a-{x}.tar", "", "a-{0..99999999}.tar"):
        with pytest.raises(DataError, match="malformed shard pattern"):
            expand_shards(bad, tmp_path)
