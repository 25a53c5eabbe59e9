"""MusicXML from strangers: standard files are read as they are, hostile and damaged ones end in a DataError."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from ringweave.tokenizers import musicxml
from ringweave.tokenizers.errors import DataError

DOCTYPE = (
    '<!DOCTYPE score-partwise PUBLIC "-//Recordare//DTD MusicXML 4.0 Partwise//EN" '
    '"http://www.musicxml.org/dtds/partwise.dtd">'
)
BODY = "<part-list/><part id='P1'><measure number='1'><note><lyric><text>né</text></lyric></note></measure></part>"
SCORE = f"<?xml version='1.0' encoding='UTF-8'?>{DOCTYPE}<score-partwise>{BODY}</score-partwise>"
CONTAINER = '<container><rootfiles><rootfile full-path="a/score.xml"/></rootfiles></container>'


def packed(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return sink.getvalue()


def packed_twice(name: str, *contents: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for content in contents:
            archive.writestr(name, content)
    return sink.getvalue()


def refused(data: bytes, why: str | None = None) -> None:
    with pytest.raises(DataError, match=why) as caught:
        musicxml.read(data, where="shard-0:7")
    assert "shard-0:7" in str(caught.value)


@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16", "ISO-8859-1", "windows-1252"])
def test_every_usual_encoding_gives_the_same_text(encoding: str) -> None:
    data = SCORE.replace("UTF-8", encoding).encode(encoding)
    assert musicxml.read(data, where="x").findtext("part/measure/note/lyric/text") == "né"


def test_packed_by_its_container_or_as_its_only_xml_file() -> None:
    both = {"META-INF/container.xml": CONTAINER.encode(), "a/score.xml": SCORE.encode(), "b.xml": b"<no/>"}
    for files in (both, {"some.musicxml": SCORE.encode()}):
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            root = musicxml.read(packed(files, method), where="x")
            assert [part.get("id") for part in root.findall("part")] == ["P1"]


def test_a_timewise_score_is_turned() -> None:
    measures = "".join(
        f"<measure number='{m}'>"
        + "".join(f"<part id='{p}'><note n='{p}{m}'/></part>" for p in "AB")
        + "</measure>"
        for m in (1, 2)
    )
    root = musicxml.read(f"<score-timewise>{measures}</score-timewise>".encode(), where="x")
    got = [[(m.get("number"), m[0].get("n")) for m in part] for part in root.findall("part")]
    assert got == [[("1", "A1"), ("2", "A2")], [("1", "B1"), ("2", "B2")]]


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha"}">' for i in range(10))


@pytest.mark.parametrize(
    "declarations",
    [
        LAUGHS,
        '<!ENTITY x SYSTEM "file:///etc/hostname">',
        '<!ENTITY % x SYSTEM "http://127.0.0.1:9/x.dtd"> %x;',
        '<!ATTLIST part id CDATA "P9">',
    ],
)
def test_a_document_type_with_declarations_is_refused(declarations: str, tmp_path: Path) -> None:
    text = f"<!DOCTYPE score-partwise [{declarations}]><score-partwise>{BODY}</score-partwise>"
    refused(text.replace("né", "&l9;").encode(), "document type with declarations")


def test_no_entity_is_dropped_without_a_word() -> None:
    refused(SCORE.replace("né", "&unknown;").encode(), "an entity it does not define|undefined entity")
    refused(SCORE.replace(DOCTYPE, "").replace("né", "&unknown;").encode(), "undefined entity")
    plain = SCORE.replace("né", "&lt;&#233;")
    assert musicxml.read(plain.encode(), where="x").findtext(".//text") == "<é"


@pytest.mark.parametrize("half", ["&#xD800;", "&#xDFFF;", "&#0;", "&#x110000;", "\ud800"])
def test_halves_of_pairs_and_other_characters_that_are_none_are_refused(half: str) -> None:
    refused(SCORE.replace("né", half).encode("utf-8", "surrogatepass"), "not well-formed")
    wide = SCORE.replace("UTF-8", "UTF-16").replace("né", half).encode("utf-16", "surrogatepass")
    refused(wide, "not well-formed")


def test_depth_elements_and_bytes_are_bounded() -> None:
    refused(b"<score-partwise>" + b"<a>" * 1_000_000, "nested deeper than 64")
    with pytest.raises(DataError, match="more than 100 elements"):
        musicxml.read(b"<score-partwise>" + b"<a/>" * 200, where="x", max_elements=100)
    with pytest.raises(DataError, match="limit 100"):
        musicxml.read(SCORE.encode(), where="x", max_bytes=100)
    refused(b"<score-partwise " + b" ".join(b'a%d=""' % i for i in range(99)) + b"/>", "99 attributes")
    parts = "".join(f"<part id='P{i}'><measure/></part>" for i in range(300))
    refused(f"<score-partwise>{parts}</score-partwise>".encode(), "300 parts, limit 256")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"not xml", "not well-formed"),
        (b"<svg/>", "root is <svg>"),
        (b"<score-partwise/>", "no measure"),
        (b"<score-partwise><part id='P1'/></score-partwise>", "no measure"),
        (b"<?xml version='1.0' encoding='utf-7'?><score-partwise/>", "not (readable|well-formed)"),
        (b"<?xml version='1.0' encoding='shift_jis'?><score-partwise/>", "not (readable|well-formed)"),
        (b"<?xml version='1.0' encoding='nonsense'?><score-partwise/>", "not (readable|well-formed)"),
        (SCORE.encode("latin-1"), "not well-formed"),
        (b"PK\x03\x04 and no more", "damaged .mxl"),
    ],
)
def test_what_is_no_score_is_refused(data: bytes, why: str) -> None:
    refused(data, why)


def test_a_cut_file_is_refused_wherever_it_is_cut() -> None:
    data, archive = SCORE.encode(), packed({"s.xml": SCORE.encode()})
    for end in range(len(data)):
        refused(data[:end])
    for end in range(0, len(archive), 7):
        refused(archive[:end])


def test_damage_in_a_packed_score_shows_in_its_checksum() -> None:
    archive = bytearray(packed({"s.xml": SCORE.encode()}, zipfile.ZIP_STORED))
    archive[archive.index(b"P1")] ^= 1
    refused(bytes(archive), "damaged .mxl")


def test_bombs_and_odd_archives_are_refused() -> None:
    bomb = packed({"s.xml": b"<a>" + b" " * (20 << 20) + b"</a>"})
    assert len(bomb) < 1 << 15
    refused(bomb, "unpacks from")
    lying = bytearray(bomb)
    size = (20 << 20) + 7
    for at in (lying.index(size.to_bytes(4, "little")), lying.rindex(size.to_bytes(4, "little"))):
        lying[at : at + 4] = (1000).to_bytes(4, "little")  # the declared size, in both headers
    refused(bytes(lying))
    refused(packed({"META-INF/container.xml": CONTAINER.encode()}), "does not hold it")
    refused(
        packed({"META-INF/container.xml": b"<container/>", "s.xml": SCORE.encode()}), "names no root file"
    )
    refused(packed({"a.xml": b"<a/>", "b.xml": b"<a/>"}), "2 XML files")
    refused(packed({"s.xml": SCORE.encode()}, zipfile.ZIP_LZMA), "packed by method 14")
    refused(packed({f"{i}.txt": b"" for i in range(1100)}), "1100 files")
    for name in ("../../../etc/hostname", "/etc/hostname", "file:///etc/hostname"):
        outside = CONTAINER.replace("a/score.xml", name).encode()
        refused(
            packed({"META-INF/container.xml": outside, "a/score.xml": SCORE.encode()}), "does not hold it"
        )
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = packed_twice("s.xml", SCORE.encode(), SCORE.replace("P1", "P2").encode())
    refused(twice, "two files of one name")
    hidden = bytearray(packed({"s.xml": SCORE.encode()}))
    hidden[hidden.rindex(b"PK\x01\x02") + 8] |= 1
    refused(bytes(hidden), "encrypted")
