"""The demo data: the same bytes every time, split by piece, and each kind of member what it claims to be."""

from __future__ import annotations

import io
import itertools
import json
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pretty_midi
import pytest
import soundfile
from PIL import Image

from ringweave.data_pipes.demo import SOURCES, build, build_demo, layers, music, openmoji, passages
from ringweave.data_pipes.demo.common import is_heldout
from ringweave.data_pipes.index import load_index
from ringweave.data_pipes.reader import ShardReader, check_shard, expand_shards
from ringweave.data_pipes.sample import Sample
from ringweave.tokenizers.errors import UserError

LIMIT = 20
MEMBERS = {
    "text": {"txt", "json"},
    "image": {"png", "txt", "json"},
    "score": {"png", "musicxml", "mid", "timemap.json", "json"},
    "audio": {"flac", "json"},
    "video": {"mp4", "txt", "json"},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, int]]]:
    out = tmp_path_factory.mktemp("demo")
    return out, build_demo(out, limit=LIMIT, workers=1)


def samples(out: Path, source: str, side: str = "*") -> Iterator[Sample]:
    for path in sorted(out.glob(f"{source}-{side}-*.tar")):
        with ShardReader(path) as reader:
            yield from (reader.read(i) for i in range(len(reader)))


def about(sample: Sample) -> dict[str, object]:
    value = json.loads(sample.members["json"])
    assert isinstance(value, dict)
    return value


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.slow
def test_counts_shards_and_indexes(demo: tuple[Path, dict[str, dict[str, int]]]) -> None:
    out, counts = demo
    assert list(counts) == list(SOURCES) == ["text", "image", "rgba", "score", "audio", "video", "scenes"]
    for source, shards in SOURCES.items():
        train = expand_shards(f"{source}-train-{{0000..{shards - 1:04d}}}.tar", out)
        heldout = expand_shards(f"{source}-heldout-0000.tar", out)
        assert sum(load_index(p).count for p in train) == counts[source]["records"] >= 8
        assert sum(load_index(p).count for p in heldout) == counts[source]["heldout_records"] >= 1
        assert [problem for path in train + heldout for problem in check_shard(path)] == []


@pytest.mark.slow
def test_two_builds_are_byte_identical(demo: tuple[Path, dict[str, dict[str, int]]], tmp_path: Path) -> None:
    """The second one in two processes, and over the remains of an earlier build."""
    (tmp_path / "text-train-0099.tar").write_bytes(b"old")
    seen: list[tuple[str, int, int]] = []
    counts = build_demo(tmp_path, limit=LIMIT, workers=2, progress=lambda *step: seen.append(step))
    assert counts == demo[1]
    first = {p.name: p.read_bytes() for p in demo[0].iterdir()}
    second = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []
    assert {source for source, done, total in seen if done == total} == set(SOURCES) - {"audio"}


def test_split_is_by_piece_across_sources(demo: tuple[Path, dict[str, dict[str, int]]]) -> None:
    sides: dict[str, set[str]] = defaultdict(set)
    for source, side in itertools.product(SOURCES, ("train", "heldout")):
        for sample in samples(demo[0], source, side):
            facts = about(sample)
            assert facts["licence"]
            assert facts["source"]
            for piece in facts.get("pieces", [facts["piece"]]):  # type: ignore[attr-defined]
                sides[str(piece)].add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert {side for seen in sides.values() for side in seen} == {"train", "heldout"}


def test_whole_plans_split_pieces_once() -> None:
    """All jobs of the full build, without rendering: every piece on one side, 4 to 15 % of jobs held out."""
    sides: dict[str, set[bool]] = defaultdict(set)
    for name, plan in build._PLANS.items():
        jobs = plan(None)
        assert len({job.name for job in jobs}) == len(jobs)
        for job in jobs:
            sides[job.piece].add(job.heldout)
        if name != "video":  # one job a clip stretch there
            assert 0.04 < sum(job.heldout for job in jobs) / len(jobs) < 0.15, name
    assert [piece for piece, seen in sides.items() if len(seen) > 1] == []
    assert abs(sum(is_heldout(f"p{i}") for i in range(5000)) / 5000 - 0.09) < 0.015


def test_members_are_those_documented(demo: tuple[Path, dict[str, dict[str, int]]]) -> None:
    for source, members in MEMBERS.items():
        for sample in samples(demo[0], source):
            assert set(sample.members) == members
    for sample in samples(demo[0], "rgba"):
        layer_names = {name for name in sample.members if re.fullmatch(r"layer\d\.png", name)}
        assert set(sample.members) - layer_names == {"flat.png", "txt", "json"}
        assert layer_names == {f"layer{i}.png" for i in range(len(layer_names))}
        assert 2 <= len(layer_names) <= 4
    for sample in samples(demo[0], "scenes"):
        assert set(sample.members) - {"layer2.png"} == {"layer0.png", "layer1.png", "flat.png", "txt", "json"}


def test_no_passage_twice_and_lengths_differ() -> None:
    jobs = passages.plan(None)
    texts = [str(job.args[1]) for job in jobs]
    verses = [line for text in texts for line in text.splitlines() if len(line) > 150]
    assert len(set(verses)) > 0.998 * len(
        verses
    )  # Kings, Chronicles and Isaiah repeat each other word for word
    assert not any(re.search(r"\d+:\d+", text) for text in texts)
    assert min(map(len, texts)) < 200
    assert 40_000 < max(map(len, texts)) < 70_000
    train = sum(len(text) for job, text in zip(jobs, texts) if not job.heldout)
    assert 1_000_000 < train < 2_000_000


def test_images_are_small_rgb(demo: tuple[Path, dict[str, dict[str, int]]]) -> None:
    captions = set()
    for sample in samples(demo[0], "image"):
        image = pixels(sample.members["png"])
        assert image.shape == (64, 64, 3)
        assert image.std() > 1
        captions.add(sample.members["txt"].decode().split(":")[0])
    assert captions == {"an emoji", "a photograph"}


def test_layers_add_up_to_the_drawing(demo: tuple[Path, dict[str, dict[str, int]]]) -> None:
    for sample in samples(demo[0], "rgba"):
        names = sorted(name for name in sample.members if name.startswith("layer"))
        stack = [pixels(sample.members[name]) for name in names]
        flat = pixels(sample.members["flat.png"])
        assert all(layer.shape == (64, 64, 4) and layer[..., 3].any() for layer in [*stack, flat])
        for background in (0.0, 255.0):
            page = np.full((64, 64, 3), background)
            for layer in stack:
                alpha = layer[..., 3:] / 255.0
                page = layer[..., :3] * alpha + page * (1 - alpha)
            alpha = flat[..., 3:] / 255.0
            wanted = flat[..., :3] * alpha + background * (1 - alpha)
            assert np.abs(np.rint(page) - np.rint(wanted)).max() <= 2
        assert layers.composite_error(stack, flat) <= 2
        assert layers.composite_error(stack[:1], flat) > 2  # the measure does tell a missing layer


def test_scores_show_the_notes_of_their_musicxml(demo: tuple[Path, dict[str, dict[str, int]]]) -> None:
    for sample in samples(demo[0], "score"):
        page = pixels(sample.members["png"])
        assert page.ndim == 2
        assert page.shape[0] == music.HEIGHT
        assert page.shape[1] % 16 == 0
        assert page.shape[1] <= music.MAX_WIDTH
        assert 0.02 < (page < 128).mean() < 0.3
        assert min(page[0].min(), page[-1].min(), page[:, 0].min(), page[:, -1].min()) == 255  # a white edge
        rows = (page < 160).mean(axis=1)
        assert (rows > 0.7).sum() >= 8  # the ten staff lines
        notes = ET.fromstring(sample.members["musicxml"]).findall(".//note")
        identifiers = {note.get("id") for note in notes if note.find("pitch") is not None}
        timemap = json.loads(sample.members["timemap.json"])
        assert {name for moment in timemap for name in moment.get("on", [])} <= identifiers
        midi = pretty_midi.PrettyMIDI(io.BytesIO(sample.members["mid"]))
        assert abs(midi.get_end_time() - timemap[-1]["tstamp"] / 1000) < 0.01


def test_audio_is_the_sound_of_its_score(demo: tuple[Path, dict[str, dict[str, int]]]) -> None:
    scores = {sample.key: sample for sample in samples(demo[0], "score")}
    matched = 0
    for sample in samples(demo[0], "audio"):
        sound, rate = soundfile.read(io.BytesIO(sample.members["flac"]), dtype="int16")
        assert (sound.ndim, rate) == (1, 16_000)
        assert 1.5 <= len(sound) / rate <= 4.0
        assert 0.65 < np.abs(sound.astype(int)).max() / 32767 < 0.75
        score = scores.get(str(about(sample)["score_key"]))
        if score is None:
            continue  # trimmed away by LIMIT; the full build keeps it
        matched += 1
        midi = pretty_midi.PrettyMIDI(io.BytesIO(score.members["mid"]))
        assert abs(len(sound) / rate - midi.get_end_time() - music.TAIL) < 2 / rate
        pitches = [n.pitch for part in midi.instruments for n in part.notes if n.start < 0.01]
        assert _harmonic_share(sound[800 : 800 + 4096] / 32768, pitches) > 0.6
    assert matched >= 5


def _harmonic_share(sound: np.ndarray, pitches: list[int]) -> float:
    """Share of the spectral energy within 1.2 % of the first six harmonics of the pitches."""
    power = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 4 * len(sound))) ** 2
    frequencies = np.fft.rfftfreq(4 * len(sound), 1 / 16_000)
    near = np.zeros(len(frequencies), dtype=bool)
    for pitch, harmonic in itertools.product(pitches, range(1, 7)):
        centre = 440 * 2 ** ((pitch - 69) / 12) * harmonic
        near |= np.abs(frequencies - centre) < max(6, 0.012 * centre)
    return float(power[near].sum() / power.sum())


def test_video_keeps_true_frame_times(demo: tuple[Path, dict[str, dict[str, int]]]) -> None:
    for sample in samples(demo[0], "video"):
        facts = about(sample)
        with av.open(io.BytesIO(sample.members["mp4"])) as container:
            decoded = list(container.decode(video=0))
        times = np.array([float(frame.pts * frame.time_base) for frame in decoded])
        assert len(times) == 8
        assert (np.diff(times) > 0.2).all()
        assert np.abs(times - np.array(facts["times_s"])).max() < 1e-3
        assert abs(times[-1] - 7 * 0.25) < 0.05
        assert {(frame.width, frame.height) for frame in decoded} == {(64, 64)}


def test_licences_name_every_source(demo: tuple[Path, dict[str, dict[str, int]]]) -> None:
    text = (demo[0] / "LICENSES.md").read_text()
    for package in build.PACKAGES.values():
        assert package in text
    assert "CC-BY-SA-4.0" in text


def test_openmoji_bases_and_captions() -> None:
    assert openmoji.caption_of([0x1F600]) == "grinning face"
    assert openmoji.caption_of([0x1F468, 0x1F3FD, 0x200D, 0x1F692]) == "man, fire engine, medium skin tone"
    assert openmoji.caption_of([0x1F1F8, 0x1F1EA]) == "flag: se"
    assert openmoji.caption_of([0xE000]) == ""
    firefighters = ([0x1F468, 0x1F3FD, 0x200D, 0x1F692], [0x1F469, 0x200D, 0x1F692], [0x1F692])
    assert {openmoji.base_of(points) for points in firefighters} == {"1F692"}
    assert openmoji.base_of([0x1F468, 0x200D, 0x1F469, 0x200D, 0x1F467]) == "people"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = tmp_path / "text-train-0000.tar"
    keep.write_bytes(b"an earlier build")
    monkeypatch.setitem(build.PACKAGES, "no_such_package", "no-such-package")
    with pytest.raises(UserError, match=r"no-such-package") as caught:
        build_demo(tmp_path, limit=LIMIT)
    assert "pip install" in caught.value.fix
    assert keep.read_bytes() == b"an earlier build"
