"""Shards that webdataset 1.0.2 reads wrongly or in silence, and what users of other loaders report: our answers."""

from __future__ import annotations

import gzip
import io
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ringweave.data_pipes.compression import unpack
from ringweave.data_pipes.index import build_index, load_index, write_index
from ringweave.data_pipes.reader import ShardReader, check_shard
from ringweave.tokenizers import media
from ringweave.tokenizers.errors import DataError

Entry = tuple[str, bytes]
FOUR: list[Entry] = [(f"k{i}.{ext}", f"{i} {ext}".encode() * 9) for i in range(4) for ext in ("jpg", "txt")]


def write_tar(path: Path, entries: list[Entry], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def refused(path: Path, **options: str) -> DataError:
    with pytest.raises(DataError) as caught:
        build_index(path, **options)
    assert caught.value.why
    assert caught.value.fix
    assert path.name in caught.value.where
    return caught.value


def read_all(path: Path) -> dict[str, dict[str, bytes]]:
    with ShardReader(path) as reader:
        return {s.key: s.members for s in (reader.read(i) for i in range(len(reader)))}


def indexed(path: Path, **options: str) -> Path:
    write_index(path, build_index(path, **options))
    return path


def test_a_bad_header_checksum_mid_shard_does_not_end_it_in_silence(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", FOUR)
    start = build_index(path).samples[1].members[0].offset - 512
    data = bytearray(path.read_bytes())
    data[start + 10] ^= 1
    path.write_bytes(data)
    error = refused(path)
    assert "bad header checksum" in error.why
    assert f"@{start}" in error.where
    assert "after k0/txt" in error.where


def test_a_cut_between_the_files_of_a_sample_emits_no_partial_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", FOUR)
    member = build_index(path).samples[2].members[1]
    path.write_bytes(path.read_bytes()[: member.offset - 512])
    assert "truncated" in refused(path).why
    index = build_index(path, tail="quarantine")
    assert index.keys == ["k0", "k1"]


@pytest.mark.parametrize(
    "where", ["in a header", "at a member", "in data", "before the end blocks", "in them"]
)
def test_truncated_shards_are_refused_or_their_tail_is_quarantined(tmp_path: Path, where: str) -> None:
    """Complete samples only, and what was lost is written down (webdataset#142, #432)."""
    path = write_tar(tmp_path / "s.tar", FOUR)
    index = build_index(path)
    last = index.samples[3].members[1]
    end = last.offset + 512
    cut = {
        "in a header": last.offset - 100,
        "at a member": last.offset - 512,
        "in data": last.offset + 3,
        "before the end blocks": end,
        "in them": end + 700,
    }[where]
    path.write_bytes(path.read_bytes()[:cut])
    assert refused(path).what == "damaged or unusable shard"
    index = build_index(indexed(path, tail="quarantine"), tail="quarantine")
    assert index.keys == ["k0", "k1", "k2"]
    assert index.made["quarantined"]["members"][0] == "k3.jpg"
    assert index.made["quarantined"]["where"].startswith("@")
    assert load_index(path).made["quarantined"]["why"]
    assert read_all(path)["k2"] == {"jpg": b"2 jpg" * 9, "txt": b"2 txt" * 9}
    assert check_shard(path) == []


def test_a_flipped_payload_bit_is_noticed(tmp_path: Path) -> None:
    path = indexed(write_tar(tmp_path / "s.tar", FOUR))
    member = load_index(path).samples[1].members[1]
    data = bytearray(path.read_bytes())
    data[member.offset + 5] ^= 4
    path.write_bytes(data)
    with ShardReader(path) as reader, pytest.raises(DataError) as caught:
        reader.read(1)
    assert caught.value.where == f"{path}#k1/txt @{member.offset}"
    assert "crc32" in caught.value.why


def test_two_concatenated_tars_are_refused(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "s.tar", FOUR).read_bytes()
    (tmp_path / "two.tar").write_bytes(data + data)
    assert "after the end of the archive" in refused(tmp_path / "two.tar").why


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1023])
def test_an_empty_file_is_no_shard_and_an_empty_archive_has_no_samples(tmp_path: Path, size: int) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(bytes(size))
    assert "truncated" in refused(path).why
    path.write_bytes(bytes(1024))
    assert build_index(indexed(path)).count == 0
    with ShardReader(path) as reader:
        assert (len(reader), reader.keys) == (0, [])
        assert reader.read_many(0, 0) == []


def test_a_truncated_gzip_is_not_an_empty_file(tmp_path: Path) -> None:
    data = gzip.compress(write_tar(tmp_path / "s.tar", FOUR).read_bytes())
    with pytest.raises(DataError, match="truncated"):
        unpack([data[:-9]], tmp_path / "out.tar", "gzip", where="s.tar.gz")
    assert not (tmp_path / "out.tar").exists()
    unpack([data], tmp_path / "out.tar", "gzip", where="s.tar.gz")
    assert read_all(indexed(tmp_path / "out.tar")).keys() == {"k0", "k1", "k2", "k3"}


DOTTED = {
    "versions": (["img.v1.0.jpg", "img.v2.0.jpg"], False),
    "numbers": (["img.1.jpg", "img.2.jpg"], False),
    "beside a plain one": (["img.jpg", "img.v2.0.jpg"], False),
    "capitals and digits": (["img.2x.jpg", "img.3x.jpg"], False),
    "words": (["a.flat.png", "a.layer0.png", "a.layer11.png", "a.seg.png", "a.json"], True),
    "a score": (["a.png", "a.musicxml", "a.mid", "a.timemap.json", "a.json"], True),
    "different kinds": (["a.v1.0.jpg", "a.v1.0.txt"], True),
    "compressed": (["a.layer0.png.gz", "a.layer1.png.gz", "a.json.gz"], True),
}


@pytest.mark.parametrize("case", DOTTED)
def test_dots_in_names_merge_no_samples_in_silence(tmp_path: Path, case: str) -> None:
    """webdataset#237, #288, datasets#7144: the key ends at the first dot; what looks like two samples is said."""
    names, fine = DOTTED[case]
    path = write_tar(tmp_path / "s.tar", [(name, b"x") for name in names])
    if not fine:
        error = refused(path)
        assert "merge into one" in error.why
        assert "dotted=keep" in error.fix
    index = build_index(path) if fine else build_index(path, dotted="keep")
    assert index.count == 1
    assert [m.ext for m in index.members(0)] == [name.partition(".")[2] for name in names]


HIDDEN = ["d/._a.jpg", "._a.jpg", ".DS_Store", "__MACOSX/._a.jpg"]


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_files_are_refused_or_left_out_and_counted(tmp_path: Path, name: str) -> None:
    """webdataset makes a sample of key `d/` of the first and drops the others in silence."""
    path = write_tar(tmp_path / "s.tar", [*FOUR[:2], (name, b"junk"), *FOUR[2:]])
    error = refused(path)
    assert name in error.where
    assert "hidden=skip" in error.fix
    index = build_index(indexed(path, hidden="skip"), hidden="skip")
    assert index.made["skipped"] == {"hidden": 1, "first": name}
    assert load_index(path).made["skipped"]["hidden"] == 1
    assert read_all(path).keys() == {"k0", "k1", "k2", "k3"}
    assert check_shard(path) == []


@pytest.mark.parametrize("name", ["README", "a.", "dir.d/LICENSE"])
def test_members_without_extension_are_not_dropped_in_silence(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "s.tar", [*FOUR, (name, b"x")])
    assert "belongs to no sample" in refused(path).why
    assert "belongs to no sample" in refused(path, hidden="skip").why


def test_names_that_differ_by_case(tmp_path: Path) -> None:
    """Extensions are one in lower case, keys are not."""
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.JPG", b"2")])
    assert "occurs twice" in refused(path).why
    path = write_tar(tmp_path / "b.tar", [("a.JPG", b"1"), ("A.jpg", b"2")])
    assert read_all(indexed(path)) == {"a": {"jpg": b"1"}, "A": {"jpg": b"2"}}


INTERLEAVED: list[Entry] = [
    ("a.jpg", b"a" * 3000), ("b.jpg", b"b"), ("c.jpg", b""), ("a.txt", b"ta"), ("c.txt", b"tc"), ("b.txt", b"tb"),
]  # fmt: skip


def test_interleaved_keys_are_refused_or_regrouped(tmp_path: Path) -> None:
    """webdataset gives six partial samples (ray PR#63374, #65044)."""
    path = write_tar(tmp_path / "s.tar", INTERLEAVED)
    error = refused(path)
    assert "not adjacent" in error.why
    assert error.why.count("@") == 1
    assert "interleaved=regroup" in error.fix
    indexed(path, interleaved="regroup")
    wanted = {key: {"jpg": dict(INTERLEAVED)[f"{key}.jpg"], "txt": f"t{key}".encode()} for key in "abc"}
    assert read_all(path) == wanted
    with ShardReader(path) as reader:
        assert [s.members for s in reader.read_many(0, 3)] == list(wanted.values())
    assert check_shard(path) == []
    data = bytearray(path.read_bytes())
    data[load_index(path).samples[1].members[1].offset] ^= 1
    path.write_bytes(data)
    assert [p.where.split(" ")[0] for p in check_shard(path)] == [f"{path}#b/txt"]


def test_a_folder_packed_by_hand_is_read_with_both_policies(tmp_path: Path) -> None:
    """`tar c ./x` on a Mac: all pictures, then all texts, and a shadow of each in between."""
    entries = [("./x/a.jpg", b"1"), ("./x/._a.jpg", b"?"), ("./x/b.jpg", b"2")]
    entries += [("./x/a.txt", b"3"), ("./x/b.txt", b"4")]
    path = indexed(write_tar(tmp_path / "s.tar", entries), hidden="skip", interleaved="regroup")
    assert read_all(path) == {"x/a": {"jpg": b"1", "txt": b"3"}, "x/b": {"jpg": b"2", "txt": b"4"}}
    assert check_shard(path) == []


def test_a_duplicate_key_names_shard_and_both_places(tmp_path: Path) -> None:
    """webdataset#157, #286: a crash in the error path, or the first wins."""
    path = write_tar(tmp_path / "s.tar", [*FOUR, FOUR[2]])
    first = build_index(write_tar(tmp_path / "good.tar", FOUR)).samples[1].members[0].offset - 512
    error = refused(path)
    assert "occurs twice" in error.why
    assert f"@{first} and @{8 * 1024}" in error.why
    assert f"@{8 * 1024}" in error.where
    for policy in ({"interleaved": "regroup"}, {}):
        twice = write_tar(
            tmp_path / "t.tar", [*FOUR, ("k3.txt", b"again")] if not policy else [*FOUR, FOUR[2]]
        )
        error = refused(twice, **policy)
        assert error.why.count("@") == 2
        assert "occurs twice" in error.why
    both = write_tar(tmp_path / "z.tar", [("a.json", b"{}"), ("a.json.gz", b"?")])
    assert "member 'json' occurs twice" in refused(both).why


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_not_dropped(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "b.jpg"
        tar.addfile(info)
    assert "link is not a file" in refused(path).why


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_and_zero_length_members_are_read(tmp_path: Path, form: int) -> None:
    """webdataset#144: ustar, GNU long names and pax alike."""
    long = f"{'d' * 90}/{'k' * 80}"
    entries = [("a.txt", b""), (f"{long}.txt", b"t"), (f"{long}.bin", b""), ("z.txt", b"z"), ("z.cls", b"")]
    path = indexed(write_tar(tmp_path / "s.tar", entries, form))
    assert read_all(path) == {
        "a": {"txt": b""},
        long: {"txt": b"t", "bin": b""},
        "z": {"txt": b"z", "cls": b""},
    }


def test_a_command_is_never_run_from_the_name_of_a_shard(tmp_path: Path) -> None:
    """webdataset gives `pipe:` to a shell; here it is an address nobody opens."""
    mark = tmp_path / "ran"
    for name in (f"pipe:touch {mark}", f"pipe://touch {mark}"):
        with pytest.raises(DataError):
            ShardReader(name)
    assert not mark.exists()


def test_pickled_members_stay_bytes(tmp_path: Path) -> None:
    """webdataset unpickles `.pyd` and `.pkl` when it decodes."""
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    path = indexed(write_tar(tmp_path / "s.tar", [("a.pkl", evil), ("a.pyd", evil), ("a.pth", evil)]))
    assert read_all(path) == {"a": {"pkl": evil, "pyd": evil, "pth": evil}}
    assert not (tmp_path / "ran").exists()


def _bomb_png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def _chunk_png() -> bytes:
    """A PNG whose text chunk unpacks to 64 MiB (LlamaFactory#5622, #6300)."""
    import zlib

    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(out, "PNG")
    body = b"zTXt" + b"a\0\0" + zlib.compress(bytes(1 << 26))
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    data = out.getvalue()
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize("case", ["pixels", "chunk"])
def test_bombs_are_refused_before_they_are_decoded(case: str) -> None:
    """pytorch-CycleGAN-and-pix2pix#1592: the error of a bomb is one record's, not the worker's end."""
    data = _bomb_png(60_000, 60_000) if case == "pixels" else _chunk_png()
    with pytest.raises(DataError, match="cannot decode this image"):
        media.decode_image(data, where="k#png")


def test_a_sound_of_one_sample_a_minute_is_refused() -> None:
    """Its hours would be resampled to gigabytes."""
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, np.zeros(60_000, np.int16), 1, format="WAV")
    with pytest.raises(DataError, match="cannot decode this audio"):
        media.decode_audio(out.getvalue(), where="k#wav")


def test_a_shard_cut_under_an_open_reader_loses_nothing_in_silence(tmp_path: Path) -> None:
    path = indexed(write_tar(tmp_path / "s.tar", FOUR))
    rng = random.Random(1)
    size = path.stat().st_size
    with ShardReader(path) as reader:
        reader.read(0)
        os.truncate(path, rng.randrange(6 * 1024, 7 * 1024))
        assert reader.read(2).key == "k2"
        with pytest.raises(DataError, match="truncated"):
            reader.read(3)
        found = reader.read_many(0, 4, errors="return")
    assert [type(x).__name__ for x in found] == ["Sample", "Sample", "Sample", "DataError"]
    assert size > path.stat().st_size
