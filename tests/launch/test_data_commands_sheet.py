"""`ringweave data show --out`: a page that shows what is there and lets nothing of the data act."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

sys.path.append(str(Path(__file__).parent))

from html_page import Page

from ringweave.launch.cli import run
from ringweave.launch.data_sheet import envelope, shrink

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">\' onload=alert(3) " &lt; \x1b[31m\u202e'


def picture(size: tuple[int, int], mode: str = "RGB", kind: str = "png") -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(out, kind)
    return out.getvalue()


def sound() -> bytes:
    out = io.BytesIO()
    wave = (np.sin(np.arange(8000) * 0.1) * 16_000).astype(np.int16)
    soundfile.write(out, np.stack([wave, wave], axis=1), 8000, format="FLAC")
    return out.getvalue()


def clip(frames: int = 12) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for n in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * n, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A few samples of every kind, hostile words wherever words can be, and two that do not decode."""
    sources: dict[str, list[tuple[str, bytes]]] = {
        "picture": [
            ("a.jpg", picture((900, 600), kind="jpeg")),
            ("a.txt", EVIL.encode()),
            ("b<i>.png", picture((8, 8))),
        ]
        + [("c.png", b"\x89PNG\r\n\x1a\n<script>"), ("c.json", json.dumps({"caption": EVIL}).encode())],
        "layers": [(f"d.layer{n}.png", picture((16, 16), "RGBA")) for n in range(3)]
        + [("d.txt", b"three layers")],
        "sound": [("e.flac", sound()), ("e.json", b'{"text": "<b>hum</b>"}')],
        "clip": [("f.mp4", clip()), ("f.txt", b"a clip")],
        "words": [("g.txt", b"word " * 2000), ("h.txt", b"\xff\xfe"), ("i.pkl", b"\x80\x04.")],
    }
    for name, members in sources.items():
        with tarfile.open(tmp_path / f"{name}-train-0000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert run(["data", "index", str(tmp_path)]) == 0
    return tmp_path


def page_of(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[str, Page, dict]:
    out = folder / "sheet.html"
    capsys.readouterr()
    assert run(["data", "show", str(folder), "--out", str(out), "--json", *more]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    text = out.read_text(encoding="utf-8")
    return text, Page(text), facts


def test_nothing_of_the_data_acts_on_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, page, _ = page_of(folder, capsys)
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "h1",
        "h2",
        "p",
        "nav",
        "a",
        "section",
        "small",
    }
    allowed |= {
        "div",
        "article",
        "figure",
        "figcaption",
        "img",
        "svg",
        "line",
        "path",
        "audio",
        "b",
        "details",
    }
    allowed |= {"summary", "pre", "code", "br", "footer"}
    assert {tag for tag, _ in page.tags} <= allowed
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert "xlink:href" not in attributes
        for name in ("src", "href"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("data:image/", "data:audio/", "#")), (tag, value[:50])
    assert "\x1b" not in text and "\u202e" not in text
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy and "script" not in policy
    assert "<script>alert(1)</script>" in "".join(page.words), "the words themselves are still there to read"
    assert not re.search(r"https?://|@import|url\(", text.partition("</style>")[0])


def test_every_kind_is_shown_and_made_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, page, facts = page_of(folder, capsys)
    assert facts["sources"] == {"clip": 1, "layers": 1, "picture": 3, "sound": 1, "words": 3}
    assert facts["shown"] == 9 and facts["failed"] == 2
    alts = [a["alt"] for t, a in page.tags if t == "img"]
    assert "all layers of d" in alts and "layer 2 of d" in alts and sum(a == "frame 7" for a in alts) == 1
    for tag, attributes in page.tags:
        source = attributes.get("src") or ""
        if tag == "img":
            kind, data = source.split(";base64,")
            with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                assert max(image.size) <= 384 and f"data:image/{(image.format or '').lower()}" == kind
        if tag == "audio":
            samples, rate = soundfile.read(io.BytesIO(base64.b64decode(source.split(",")[1])), always_2d=True)
            assert rate == 8000 and samples.shape == (8000, 1)
    words = "".join(page.words)
    assert "png: cannot decode this image" in words and "text is not UTF-8" in words
    assert "900×600" in words and "1.0 s, 8 kHz, 2 ch" in words and "12 frames, 32×32" in words
    checks = [a for t, a in page.tags if t == "img" and "check" in (a.get("class") or "")]
    assert len(checks) == 4, "layers lie over a checkerboard"


def test_the_seed_chooses_and_repeats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = page_of(folder, capsys, "--per-source", "1")[0]
    assert page_of(folder, capsys, "--per-source", "1")[0] == first
    others = {page_of(folder, capsys, "--per-source", "1", "--seed", str(n))[0] for n in range(6)}
    assert len(others) > 2


def test_a_png_sheet_and_wrong_endings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "show", str(folder), "--out", str(folder / "s.png"), "--json"]) == 0
    with Image.open(folder / "s.png") as image:
        assert image.width > 500 and image.height > 300
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100
    assert run(["data", "show", str(folder), "--out", str(folder / "s.svg")]) == 2
    assert run(["data", "show", str(folder), "--out", str(folder / "s.html"), "--per-source", "0"]) == 2


def test_damage_keeps_its_place_on_the_sheet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder / "clip-train-0000.tar"
    data = bytearray(shard.read_bytes())
    data[512 + 100] ^= 1
    shard.write_bytes(data)
    _, page, facts = page_of(folder, capsys)
    assert facts["failed"] == 3 and "damaged sample" in "".join(page.words)


def test_small_helpers() -> None:
    wide = np.zeros((10, 1000, 3), np.uint8)
    assert shrink(wide, 100).shape == (1, 100, 3) and shrink(wide, 2000) is wide
    shape = envelope(np.asarray([0, 16384, -32768, 0], np.int16), 2)
    assert shape.tolist() == [[0.0, 0.5], [-1.0, 0.0]]
    assert envelope(np.asarray([5], np.int16), 300).shape == (300, 2), "fewer samples than columns"
