"""The walk over tar headers: what tarfile finds, byte for byte, or a named error; quick and slow ways agree."""

from __future__ import annotations

import io
import random
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from ringweave.data_pipes import tar as tar_module
from ringweave.data_pipes.tar import BLOCK, HeaderError, LocalBytes, Members, Walk, parse_header
from ringweave.data_pipes.tar_header import plain_rows
from ringweave.tokenizers.errors import DataError

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


LYING = [b"-0000000012\0", b"0o000000012\0", b"0_000000012\0", b"77777777777\0", b"\xff" * 12]


class Memory:
    """A byte source of bytes; counts its reads."""

    def __init__(self, data: bytes) -> None:
        self.data, self.reads = data, 0

    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        self.reads += 1
        return self.data[offset : offset + size]


def make(entries: list[tuple[str, bytes]], form: int, **fields: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def walk(data: bytes, **options: bool) -> Members:
    return Walk(Memory(data), "m.tar", **options).run()


def entries(seed: int, count: int, *, long: bool) -> list[tuple[str, bytes]]:
    rng = random.Random(seed)
    found = []
    for i in range(count):
        size = rng.choice((0, 1, 511, 512, 513, rng.randrange(5000), rng.randrange(300_000)))
        name = (
            f"d{i % 7}/{i:06d}.txt"
            if not long or i % 5
            else f"{'f' * rng.randrange(60, 99)}/{'n' * 90}{i}.txt"
        )
        found.append((name, rng.randbytes(size)))
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("long", [False, True])
def test_the_walk_finds_what_tarfile_finds(form: str, long: bool) -> None:
    data = make(entries(1, 120, long=long), FORMS[form], mtime=1.5 if form == "pax" else 1)
    found = walk(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        known = tar.getmembers()
    assert found.names == [m.name for m in known]
    assert found.offsets == [m.offset_data for m in known]
    assert found.sizes == [m.size for m in known]
    assert found.crc32 == [zlib.crc32(data[m.offset_data : m.offset_data + m.size]) for m in known]
    heads = [data[m.offset_data - BLOCK : m.offset_data] for m in known]
    assert found.header_crc32 == [zlib.crc32(head) for head in heads]
    for number, head in enumerate(heads):
        name = parse_header(head).name.decode()
        assert found.headers.get(number, found.names[number]) == name


def test_headers_alone_give_the_same_places(tmp_path: Path) -> None:
    """Without payload crcs, from memory and from a file, where members are near and where they are far apart."""
    small = [(f"{i}.txt", b"x" * (i % 90)) for i in range(3000)]
    for n, members in enumerate((small, entries(2, 60, long=True))):
        data = make(members, tarfile.GNU_FORMAT)
        whole, heads = walk(data), walk(data, checksums=False)
        assert (heads.names, heads.offsets, heads.sizes) == (whole.names, whole.offsets, whole.sizes)
        path = tmp_path / f"{n}.tar"
        path.write_bytes(data)
        for checksums in (False, True):
            source = LocalBytes(path)
            again = Walk(source, "m.tar", checksums=checksums).run()
            source.close()
            assert again.offsets == whole.offsets
            assert again.crc32 == (whole.crc32 if checksums else [0] * len(whole))


@pytest.mark.parametrize("window", [BLOCK, 3 * BLOCK, 1 << 16])
def test_the_size_of_the_window_does_not_matter(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    data = make(entries(3, 40, long=True), tarfile.GNU_FORMAT)
    whole = walk(data)
    monkeypatch.setattr(tar_module, "_REMOTE_WINDOW", window)
    assert walk(data) == whole


def test_a_remote_shard_is_walked_with_few_reads() -> None:
    """Also one that has an extended header for every member."""
    for form, mtime in ((tarfile.USTAR_FORMAT, 1), (tarfile.PAX_FORMAT, 1.5)):
        source = Memory(make([(f"{i}.txt", b"y" * 1000) for i in range(2000)], form, mtime=mtime))
        assert len(Walk(source, "m.tar").run()) == 2000
        assert source.reads <= 6


def _headers() -> list[bytes]:
    """Header blocks as tar programs write them, and each with its fields spelled or damaged in other ways."""
    rng = random.Random(5)
    plain = []
    for form in FORMS.values():
        info = tarfile.TarInfo("some/folder/name.txt")
        info.size = rng.randrange(1 << 30)
        plain.append(info.tobuf(form)[:BLOCK])
    found = list(plain)
    for block in plain:
        for _ in range(400):
            at = rng.randrange(BLOCK)
            changed = bytearray(block)
            changed[at] ^= 1 << rng.randrange(8)
            found.append(bytes(changed))  # the checksum is wrong now, or spelled in another way
            changed[148:156] = b" " * 8
            changed[148:156] = f"{sum(changed):06o}\0 ".encode()
            found.append(bytes(changed))  # and right again
    for field in (*LYING[:4], b"       12 \0\0", b"+0000000012\0", b"\x80" + bytes(11)):
        changed = bytearray(plain[0])
        changed[124:136], changed[148:156] = field, b" " * 8
        changed[148:156] = f"{sum(changed):06o}\0 ".encode()
        found.append(bytes(changed))
    return found


def test_the_quick_check_takes_no_header_that_the_parser_refuses() -> None:
    blocks = _headers()
    quick = plain_rows(np.frombuffer(b"".join(blocks), np.uint8).reshape(-1, BLOCK))
    assert quick[:3].all()
    for block, good in zip(blocks, quick.tolist()):
        try:
            header = parse_header(block)
        except HeaderError:
            assert not good, block
            continue
        if good:
            assert header.size == int(block[124:135], 8)
            assert header.name == block[:100].split(b"\0")[0]


@pytest.mark.parametrize("at", range(0, 40, 3))
@pytest.mark.parametrize("field", LYING)
def test_a_size_that_lies_is_never_followed(at: int, field: bytes) -> None:
    """Not into a loop, not past the end, and never in silence: also with a checksum that fits."""
    data = bytearray(make([(f"{i:02d}.txt", b"x" * 300) for i in range(40)], tarfile.USTAR_FORMAT))
    start = walk(bytes(data)).offsets[at] - BLOCK
    data[start + 124 : start + 136], data[start + 148 : start + 156] = field, b" " * 8
    data[start + 148 : start + 156] = f"{sum(data[start : start + BLOCK]):06o}\0 ".encode()
    one = Walk(Memory(bytes(data)), "m.tar")
    with pytest.raises(DataError) as caught:
        one.run()
    assert len(one.members) == at
    assert f"@{start}" in caught.value.where or f"@{start + BLOCK}" in caught.value.where


def test_every_truncation_is_named_and_gives_whole_members_only() -> None:
    data = make(entries(7, 12, long=True), tarfile.GNU_FORMAT)
    whole = walk(data)
    end = whole.offsets[-1] + -(-whole.sizes[-1] // BLOCK) * BLOCK + 2 * BLOCK
    rng = random.Random(0)
    for cut in sorted(
        {*range(0, end, 4096), *(rng.randrange(end) for _ in range(200)), end - 1, end - BLOCK}
    ):
        one = Walk(Memory(data[:cut]), "m.tar")
        with pytest.raises(DataError) as caught:
            one.run()
        assert "truncated" in caught.value.why or "zero block" in caught.value.why
        count = len(one.members)
        assert one.members.crc32 == whole.crc32[:count]
        assert all(o + s <= cut for o, s in zip(one.members.offsets, one.members.sizes))


def test_pax_size_and_names_that_are_no_text() -> None:
    """A member's size from its pax header (files above 8 GiB are written so), and what pax may not say."""

    def pax(text: bytes, kind: bytes = b"x", length: int | None = None) -> bytes:
        size = len(text) + 4 if len(text) + 4 > 9 else len(text) + 3
        record = b"%d " % (size if length is None else length) + text + b"\n"
        info = tarfile.TarInfo("p")
        info.type, info.size = kind, len(record)
        return info.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % BLOCK)

    body = make([("a.txt", b"0123456789")], tarfile.USTAR_FORMAT)
    assert walk(pax(b"path=b.c") + body).names == ["b.c"]
    assert walk(pax(b"size=5") + body).sizes == [5]
    bad = {
        "malformed pax header": pax(b"path=b.c", length=99),
        "malformed pax size": pax(b"size=-5"),
        "sparse files": pax(b"GNU.sparse.major=1"),
        "global pax header": pax(b"path=b.c", b"g"),
        "not UTF-8": pax(b"path=\xff.c"),
    }
    for why, head in bad.items():
        with pytest.raises(DataError, match=why):
            walk(head + body)
    with pytest.raises(DataError, match="followed by no member"):
        walk(pax(b"path=b.c") + bytes(2 * BLOCK))
    info = tarfile.TarInfo("p")
    info.type, info.size = b"L", 1 << 21
    with pytest.raises(DataError, match="an extended header of"):
        walk(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 21) + body)


def test_headers_are_walked_quickly() -> None:
    """50k a second, far below the benchmark's number: a busy machine passes, a walk one by one does not."""
    few = make([(f"{i:05d}.txt", b"z" * 100) for i in range(200)], tarfile.USTAR_FORMAT)[: 200 * 2 * BLOCK]
    data = few * 100 + bytes(2 * BLOCK)
    times = []
    for _ in range(3):
        started = time.thread_time()
        assert len(walk(data)) == 20_000
        times.append(time.thread_time() - started)
    assert min(times) < 0.4
