"""`ringweave tokenizer eval|show|encode-shards`: tables, a page that loads alone, and caches that a run reads."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import sys
from math import log2
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image
from safetensors.numpy import load_file

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("data_pipes", "tokenizers", "launch")]

from html_page import Page
from token_fixtures import write_shard
from tokenizer_samples import SMALL, records

from ringweave.data_pipes.token_cache import TokenCache
from ringweave.launch.cli import run
from ringweave.launch.console import Progress
from ringweave.launch.data_records import records_by_source
from ringweave.launch.outside_table import OUTSIDE
from ringweave.launch.tokenizer_clip import beside, encode_clip
from ringweave.launch.tokenizer_eval import evaluate, markdown
from ringweave.launch.tokenizer_page import ink_changes, mark_pieces
from ringweave.launch.tokenizer_page_html import _pieces
from ringweave.tokenizers.fit import fit_tokenizers
from ringweave.tokenizers.measure import measure
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.symbols import SymbolicCodec
from ringweave.tokenizers.text import TextCodec

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">\' onload=alert(3) \x1b[31m\u202e é\n'
MODALITIES = ("text", "image", "rgba", "score", "audio", "video")


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, dict, str]:
    """(exit code, the JSON object, what people see)."""
    capsys.readouterr()
    code = run([*map(str, argv), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(tokenizers, folder of held-out shards of every modality, hostile words and one broken record in them)."""
    base = tmp_path_factory.mktemp("evil <b>&")
    fit_tokenizers(records(0, 24), base / "tok", sizes=SMALL)
    heldout = records(1000, 3)
    heldout["text"].append({"txt": EVIL.encode()})
    heldout["image"][0]["txt"] = EVIL.encode()
    heldout["image"].append({"png": b"\x89PNG<script>"})
    (base / "data").mkdir()
    for name, members in heldout.items():
        write_shard(base / "data" / f"{name}-heldout-0000.tar", members)
    return base / "tok", base / "data"


# --- eval --------------------------------------------------------------------------------------------------


def test_eval_gives_one_table_a_modality(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    tok, data = made
    code, facts, said = call(capsys, "tokenizer", "eval", "-t", tok, "--data", data)
    assert code == 0 and set(facts["modalities"]) == set(MODALITIES) and facts["files"] == []
    rows = facts["modalities"]
    # By hand: 48x48 pixels in patches of 8, 96 codes; an id ends each row, two stand around.
    image = rows["image"]
    assert (image["records"], image["skipped"], image["kind"], image["codec"]) == (3, 1, "image", "image")
    assert image["tokens_per_record"] == 6 * 7 + 2
    assert image["bits_per_pixel"] == round(36 * log2(96) / 48**2, 4)
    assert image["pixels_per_token"] == round(48**2 / 44, 2)
    assert image["encode_per_s"] > 1 and image["decode_per_s"] > 1 and image["floor_psnr"] > 0
    # A second of sound: ceil(16000 / 640) + 1 frames of 3 books of 32 codes.
    assert rows["audio"]["bits_per_s"] == 26 * 3 * 5 and rows["audio"]["tokens_per_s"] == 26 * 3 + 2
    assert rows["video"]["tokens_per_frame"] > 1 and rows["video"]["encode_x_real_time"] > 0
    text = rows["text"]
    assert text["lossy_documents"] == 0
    assert text["bits_per_byte"] == pytest.approx(
        log2(TokenizerSet.load(tok).codecs["text"].size) / text["bytes_per_token"], rel=1e-3
    )
    tables = re.findall(r"\*\*(.+?)\*\* \((\d+) held-out records(.*?)\)\n\n\| codec", said)
    assert [t[0] for t in tables] == ["Text", "Images", "RGBA layers", "Video", "Audio", "Scores"]
    assert ("Images", "3", ", 1 skipped") in tables
    lines = [line for line in said.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in lines} == {5} and len(lines) == 6 * 3 + len(OUTSIDE)
    sha = TokenizerSet.load(tok).manifest.blocks[1].sha256[:12]
    assert f"`image` (closed form), file {sha} | 44 tokens a picture" in said
    for entry in OUTSIDE:
        assert any(entry.name in line and line.endswith(f"| {entry.licence} |") for line in lines)


def test_eval_updates_the_place_in_a_document(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tok, data = made
    page = tmp_path / "doc.md"
    page.write_text("before\n<!-- tokenizer eval -->\nold\n<!-- /tokenizer eval -->\nafter\n")
    argv = ["tokenizer", "eval", "-t", tok, "--data", data, "--limit", 1]
    code, facts, _ = call(capsys, *argv, "--update", page, "--out", tmp_path / "only.md")
    assert code == 0 and facts["files"] == [str(tmp_path / "only.md"), str(page)]
    whole, only = page.read_text(), (tmp_path / "only.md").read_text()
    assert whole.startswith("before\n<!-- tokenizer eval -->\n\n**Text**") and "old" not in whole
    assert whole.endswith("\n\n<!-- /tokenizer eval -->\nafter\n") and only.strip() in whole
    begin, end = "<!-- tokenizer eval -->", "<!-- /tokenizer eval -->"
    for wrong in ("nothing", f"{end} {begin}", begin, f"{begin} {end} {end}", f"{begin} {begin} {end}"):
        page.write_text(wrong)
        code, said, _ = call(capsys, *argv, "--update", page)
        assert (code, said["exit_code"]) == (2, 2) and "no place for the tables" in said["what"]
        assert page.read_text() == wrong
    assert run(["tokenizer", "eval", "-t", str(tok)]) == 2
    assert run(["tokenizer", "eval", "--data", str(data)]) == 2
    assert list(tmp_path.iterdir()) != [] and not list(tmp_path.glob(".*tmp"))


def test_speeds_are_left_out_unless_asked_for(made: tuple[Path, Path]) -> None:
    """Figures alone are the same each time."""
    tokenizers = TokenizerSet.load(made[0])
    heldout = {"audio": records(1000, 2)["audio"]}
    plain = measure(tokenizers, heldout)
    assert plain == measure(tokenizers, heldout)
    timed = measure(tokenizers, heldout, speed=True)["audio"]
    assert {name for name in timed if name not in plain["audio"]} == {
        "encode_per_s", "decode_per_s", "encode_x_real_time", "decode_x_real_time",
    }  # fmt: skip
    assert measure(tokenizers, {"image": [{"png": b"x"}]}, speed=True) == {
        "image": {"records": 0, "skipped": 1}
    }


NOTES = b"""<score-partwise version="3.1"><part-list><score-part id="P1"><part-name/></score-part></part-list>
<part id="P1"><measure number="1"><attributes><divisions>1</divisions><key><fifths>0</fifths></key><time>
<beats>2</beats>
<beat-type>4</beat-type></time><clef><sign>G</sign><line>2</line></clef></attributes><note><pitch><step>C</step>
<octave>4</octave></pitch><duration>1</duration><type>quarter</type></note><note><pitch><step>E</step><octave>4</octave>
</pitch><duration>1</duration><type>quarter</type></note></measure></part></score-partwise>"""


def test_notes_beside_scores_are_measured_too(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers = TokenizerSet.load(made[0]).extended({"symbolic": SymbolicCodec()})
    samples = {"score": [records(7, 1)["score"][0] | {"musicxml": NOTES}] * 2 + [{"musicxml": b"<no"}]}
    facts = evaluate(tokenizers, samples, limit=9, progress=Progress())
    row = facts["modalities"]["symbolic"]
    assert (row["records"], row["skipped"], row["lossy_records"]) == (2, 1, 0)
    ids = len(tokenizers.symbolic_segment(NOTES)) - 2
    assert (
        row["bits_per_record"] == round(ids * log2(SymbolicCodec().size), 1)
        and row["tokens_per_record"] == ids + 2
    )
    assert "**MusicXML** (2 held-out records, 1 skipped)" in markdown(facts)
    decode = SymbolicCodec.decode
    other = NOTES.replace(b"<step>E</step>", b"<step>F</step>").decode()
    monkeypatch.setattr(SymbolicCodec, "decode", lambda self, ids: (other, decode(self, ids)[1]))
    assert measure(tokenizers, {"symbolic": samples["score"]})["symbolic"]["lossy_records"] == 2


# --- show --------------------------------------------------------------------------------------------------


def bytes_of(page: Page, tag: str, kind: str) -> list[bytes]:
    """What the data URIs of these tags hold."""
    start = f"data:{kind};base64,"
    sources = [a.get("src") or "" for t, a in page.tags if t == tag]
    assert all(source.startswith(start) for source in sources), kind
    return [base64.b64decode(source.removeprefix(start)) for source in sources]


@pytest.fixture(scope="module")
def page(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    tok, data = made
    out = tmp_path_factory.mktemp("seen")
    assert (
        run(["tokenizer", "show", "-t", str(tok), "--data", str(data), "--out", str(out), "--amplify", "3"])
        == 0
    )
    assert {p.name for p in out.iterdir()} >= {"index.html", "image.png", "text.txt", "audio-decoded.wav"}
    text = (out / "index.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_loads_nothing_and_nothing_of_the_data_acts(
    page: tuple[str, Page], made: tuple[Path, Path]
) -> None:
    text, parsed = page
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "form", "b")
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "poster"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("data:image/", "data:audio/", "data:video/", "#"))
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy and "script" not in policy
    assert not re.search(r"https?://|@import|url\(", text.partition("</style>")[0])
    words = "".join(parsed.words)
    assert "\x1b" not in text and "\u202e" not in text and str(made[0]) in words and str(made[1]) in words
    assert words.count("<script>alert(1)</script>") == 1, "as a caption; in pieces its signs are bytes"
    assert "prefers-color-scheme:dark" in text and "1 cannot be read" in words
    assert "cannot decode this image" in words, "a broken record keeps its place"


def test_originals_decoded_and_differences_are_those_of_the_codecs(
    page: tuple[str, Page], made: tuple[Path, Path]
) -> None:
    parsed = page[1]
    tokenizers = TokenizerSet.load(made[0])
    pictures = bytes_of(parsed, "img", "image/png")
    alts = [a["alt"] or "" for t, a in parsed.tags if t == "img"]
    at = alts.index("original of image-heldout-0000-1")
    shown = [np.asarray(Image.open(io.BytesIO(data))) for data in pictures[at : at + 3]]
    record = list(records_by_source(made[1], "heldout")["image"])[1]
    original = np.asarray(Image.open(io.BytesIO(record["png"])))
    decoded = tokenizers.decode(tokenizers.image_segment(original).ids)[0].value[:48, :48]
    lost = np.clip(3 * np.abs(original.astype(int) - decoded), 0, 255)
    for ours, wanted in zip(shown, (original, decoded, lost), strict=True):
        np.testing.assert_array_equal(ours, wanted)
    assert alts[at + 2].startswith("difference ×3 of") and sum("alpha diff" in alt for alt in alts) == 6
    assert sum("check" in (a.get("class") or "") for t, a in parsed.tags if t == "img") == 3 * 2 * 3
    sounds = [
        soundfile.read(io.BytesIO(data), dtype="int16") for data in bytes_of(parsed, "audio", "audio/flac")
    ]
    assert len(sounds) == 9 and {rate for _, rate in sounds} == {16_000}
    first, second, third = (samples.astype(int) for samples, _ in sounds[:3])
    np.testing.assert_array_equal(third, first - second)
    assert sum("spectrogram" in alt for alt in alts) == 9


def test_films_play_original_decoded_and_difference_at_their_times(page: tuple[str, Page]) -> None:
    films = bytes_of(page[1], "video", "video/webm")
    assert len(films) == 3
    with av.open(io.BytesIO(films[0]), "r") as file:
        frames = list(file.decode(video=0))
    assert [round(float(frame.time), 3) for frame in frames] == [0, 0.25, 0.5, 0.75, 1.0], (
        "the last one twice"
    )
    assert (frames[0].width, frames[0].height) == (3 * 256 + 2 * 8, 256)


def test_a_film_keeps_pixels_and_knows_odd_sizes() -> None:
    ramp = np.linspace(40, 180, 21)[:, None, None] + np.array([0, 20, 40]) + np.zeros((21, 15, 3))
    panels = [np.stack([ramp + 10 * t for t in range(3)]).astype(np.uint8) for _ in range(2)]
    film = beside(panels, side=50)
    assert film.shape == (3, 42, 15 * 2 * 2 + 8, 3) and (film[:, :, 30:38] == 128).all()
    assert beside([np.zeros((1, 21, 15, 3), np.uint8)], side=8).shape == (1, 22, 16, 3)
    clip = encode_clip(film, [0.0, 0.1, 0.5])
    assert (clip.mime, clip.width, clip.height) == ("video/webm", 68, 42)
    with av.open(io.BytesIO(clip.data), "r") as file:
        frames = list(file.decode(video=0))
    back = np.stack([f.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray() for f in frames[:3]])
    inside = np.abs(back[:, :, :24].astype(int) - film[:, :, :24])
    assert inside.max() <= 4, "only the rounding of colours; at edges of colour, players smooth"
    assert [round(float(f.time), 2) for f in frames] == [0, 0.1, 0.5, 0.75]


def test_pieces_and_changes_of_ink() -> None:
    tokenizers = TokenizerSet({"text": TextCodec.fit(["a bird in the hand\n"] * 30, size=290)})
    words = "a bird\n€ <b>"
    pieces = mark_pieces(tokenizers, tokenizers.text_segment(words))
    assert [text for text, kind in pieces if kind == "byte"][:3] == ["E2", "82", "AC"]
    assert ("\n", "line") in pieces
    assert "".join(t for t, kind in pieces if kind in ("piece", "line")).startswith("a bird\n")
    html = _pieces(pieces)
    assert '<span class="byte">E2</span>' in html and "<b>" not in html and "↵" in html
    long = mark_pieces(tokenizers, tokenizers.text_segment("a bird " * 300))
    assert long[-1] == ("…", "more") and 100 < len(long) < 800
    before, after = np.array([[0, 0, 255, 255]], np.uint8), np.array([[0, 255, 0, 255]], np.uint8)
    both, lost, added, paper = ink_changes(before, after)[0].tolist()
    assert (
        paper == [255, 255, 255] and lost[0] > 200 > added[0] and added[2] > 200 > lost[2] and both[0] == 205
    )


# --- encode-shards -----------------------------------------------------------------------------------------


def job(folder: Path, tok: Path, *, bad: int = 1) -> Path:
    """A config of texts and pictures, training and held out, with a few records that cannot be used."""
    texts = [{"txt": f"the quick brown fox {i} jumps".encode()} for i in range(60)]
    pictures = [{"png": records(i, 1)["image"][0]["png"], "txt": b"the fox"} for i in range(8)] * 5
    for i in range(bad):
        pictures[3 + i] = {"png": b"broken", "txt": b"the dog"}
    (folder / "data").mkdir(parents=True)
    for name, samples in (("text", texts), ("image", pictures)):
        write_shard(folder / "data" / f"{name}-train-0000.tar", samples[8:])
        write_shard(folder / "data" / f"{name}-train-0001.tar", samples[: len(samples) // 2])
        write_shard(folder / "data" / f"{name}-heldout-0000.tar", samples[8:12])
    sources = [
        {"name": n, "shards": f"{n}-train-{{0000..0001}}.tar", "heldout": f"{n}-heldout-0000.tar", "plan": p}
        for n, p in (("text", ["text"]), ("image", ["caption", "image"]))
    ]
    config = folder / "job.yaml"
    values = {
        "run": {"name": "j", "seed": 1, "dir": str(folder / "run")},
        "tokenizers": {"dir": str(tok)},
        "data": {"dir": str(folder / "data"), "sources": sources, "workers": {"count": 1}},
        "model": {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2},
        "optimizer": {"lr": 1e-3},
        "stages": [{"context": 128, "batch": 4, "tokens": 40_960}],
    }
    config.write_text(yaml.safe_dump(values))
    return config


def tokens_of(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of what is made of shards: tokens and lengths."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if ".tokens-" in p.name or ".len-" in p.name}


@pytest.mark.slow
def test_a_run_reads_what_was_encoded_and_encodes_nothing(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ringweave.pretrain.config import load_config
    from ringweave.pretrain.job import open_corpus

    config = job(tmp_path, made[0])
    checked, manifest = load_config(config), TokenizerSet.load(made[0]).manifest
    for heldout in (False, True):  # what a run makes that tokenizes everything at its start
        open_corpus(checked, manifest, heldout=heldout, tokens=True).close()
    wanted = tokens_of(tmp_path / "data")
    assert len(wanted) == 12
    for name in wanted:
        (tmp_path / "data" / name).unlink()
    (
        tmp_path / "data" / "text-train-0000.tar.idx"
    ).unlink()  # one is missing, as after `data build` of others

    code, facts, said = call(capsys, "tokenizer", "encode-shards", "--config", config, "--workers", 2)
    assert code == 0 and (facts["shards"], facts["encoded"], facts["workers"]) == (6, 6, 2)
    assert (
        tokens_of(tmp_path / "data") == wanted
        and facts["samples"] == facts["made"] == 52 + 30 + 4 + 32 + 20 + 4
    )
    assert facts["tokens"] == sum(TokenCache.open(
        tmp_path / "data" / f"{n}-{s}.tar", ("text",) if n == "text" else ("caption", "image"), manifest.hash
    ).lengths.sum() for n in ("text", "image") for s in ("train-0000", "train-0001", "heldout-0000"))  # fmt: skip
    [skip] = facts["skipped"]
    assert (skip["source"], skip["shard"], skip["key"]) == (
        "image",
        "image-train-0001.tar",
        "image-train-0001-3",
    )
    assert "skipped image-train-0001.tar#image-train-0001-3: cannot decode" in said and "samples/s" in said

    again = call(capsys, "tokenizer", "encode-shards", "--config", config, "--workers", 0)[1]
    assert (again["made"], again["encoded"], again["samples_per_s"]) == (0, 0, None)
    assert again["caches"] == facts["caches"] and again["skipped"] == facts["skipped"]
    for heldout in (False, True):
        corpus = open_corpus(checked, manifest, heldout=heldout)
        everything = [
            (n, i) for n in corpus.lengths.names for i in np.flatnonzero(corpus.lengths[n]).tolist()
        ]
        blocks = corpus.make(corpus.units(everything))
        assert corpus.workers is not None and corpus.workers.counts.started == 0
        assert (corpus.read.stored, corpus.read.made) == (len(everything), 0)
        assert sum(map(len, blocks)) == len(everything)
        corpus.close()


def test_too_many_damaged_records_end_it_with_exit_3(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job(tmp_path, made[0], bad=4)
    code, said, _ = call(capsys, "tokenizer", "encode-shards", "--config", config, "--workers", 0)
    assert code == 3 and said["error"] == "DataError" and "cannot be used" in said["what"]
    assert "image-train-0001.tar" in said["where"] and "cannot decode this image" in said["why"]
    kept = {name.partition(".")[0] for name in tokens_of(tmp_path / "data")}
    assert kept == {"text-train-0000", "text-train-0001", "image-train-0000"}, "what was finished stays"
    assert run(["tokenizer", "encode-shards", "--config", str(tmp_path / "none.yaml")]) == 2


def test_what_lies_beside_no_shard_lies_in_the_cache(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed shards: unpacked, indexed and encoded once, all of it in the cache that is asked for."""
    config = job(tmp_path, made[0])
    data = tmp_path / "data"
    values = yaml.safe_load(config.read_text())
    shard = data / "text-train-0000.tar"
    (data / "packed.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    values["data"]["sources"] = [{"name": "t", "shards": "packed.tar.gz", "plan": ["text"]}]
    config.write_text(yaml.safe_dump(values))
    argv = ["tokenizer", "encode-shards", "--config", config, "--workers", 0]
    code, said, _ = call(capsys, *argv)
    assert code == 3 and "data.cache.dir" in said["next"]
    before = set(data.iterdir())
    code, facts, _ = call(capsys, *argv, "--cache", tmp_path / "cache")
    assert code == 0 and (facts["made"], facts["shards"]) == (52, 1) and set(data.iterdir()) == before
    [cache] = map(Path, facts["caches"])
    assert cache.parent == tmp_path / "cache" / "tokens" and cache.name.startswith("packed-")
    assert call(capsys, *argv, "--set", f"data.cache.dir={tmp_path / 'cache'}")[1]["made"] == 0
    values["data"]["sources"][0]["shards"] = shard.name
    config.write_text(yaml.safe_dump(values))
    beside = call(capsys, *argv)[1]["caches"][0]
    ours, other = (load_file(path) for path in (cache, beside))
    assert set(ours) == set(other) and all(np.array_equal(ours[name], other[name]) for name in ours)
