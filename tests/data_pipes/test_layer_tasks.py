"""Tasks on layers as plans: the table, the grammar of `latents`, and the documents that records become."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ringweave.data_pipes import layer_tasks
from ringweave.data_pipes.documents import encode_sample, parse_plan
from ringweave.data_pipes.layer_tasks import TASKS, plan_of_task
from ringweave.data_pipes.layer_views import over
from ringweave.data_pipes.pack import PackPlan, Piece
from ringweave.data_pipes.packing import materialise
from ringweave.data_pipes.plan_items import LAYER_VIEWS, parse_entry, read_by_view
from ringweave.data_pipes.sample import Sample
from ringweave.data_pipes.token_block import BlockWriter, TokenBlock
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.manifest import BOS
from ringweave.tokenizers.segment import LATENT, Document, Segment

ROOT = Path(__file__).resolve().parents[2]
U8 = np.ndarray[Any, np.dtype[np.uint8]]
CELL = 4


class Pooling:
    """Stands in for a tokenizer set: a cell is the mean of 4 x 4 pixels, a word a byte."""

    def __init__(self) -> None:
        self.given: list[U8] = []

    def encode_layer(self, layer: U8) -> np.ndarray[Any, Any]:
        self.given.append(layer)
        return pooled(layer)

    def text_segment(self, text: str, *, role: Any = "target", weight: float = 1.0) -> Segment:
        ids = 300 + np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        places = np.zeros((len(ids), 4), np.int32)
        places[:, 0] = np.arange(len(ids))
        return Segment(ids, "text", places, role, "causal", weight)


def pooled(layer: U8) -> np.ndarray[Any, Any]:
    assert layer.dtype == np.uint8 and layer.ndim == 3 and layer.shape[2] == 4
    height, width = (-(-side // CELL) * CELL for side in layer.shape[:2])
    padded = np.zeros((height, width, 4), np.float32)
    padded[: layer.shape[0], : layer.shape[1]] = layer
    return padded.reshape(height // CELL, CELL, width // CELL, CELL, 4).mean((1, 3)).astype(np.float32)


def png(array: U8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "png")
    return out.getvalue()


def drawn(seed: int, height: int = 8, width: int = 12) -> U8:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)


LAYERS = [drawn(n) for n in range(3)]
LAYERS[0][..., 3] = 255


def record(layers: list[U8] = LAYERS, /, **more: bytes) -> Sample:
    members = {f"layer{n}.png": png(layer) for n, layer in enumerate(layers)}
    members |= {"txt": b"a fish on a plate"} | {name.replace("__", "."): data for name, data in more.items()}
    return Sample("k7", members, "s-0000.tar", 7)


def encode(sample: Sample, *plan: str, tokenizers: Any = None) -> Document:
    return encode_sample(sample, plan, tokenizers or Pooling())


def grids_of(document: Document) -> list[Segment]:
    return [segment for segment in document.segments if segment.latents is not None]


# ---- the table ----


def test_the_table_holds_distinct_tasks_of_six_kinds() -> None:
    kinds = [
        layer_tasks.GENERATION,
        layer_tasks.COMPLETION,
        layer_tasks.MATTING,
        layer_tasks.REMOVAL,
        layer_tasks.DECOMPOSITION,
        layer_tasks.RECOMPOSITION,
    ]
    assert sum(map(len, kinds)) == len(TASKS) >= 21
    assert len(set(TASKS.values())) == len(TASKS), "two names for one task"
    assert "own" in str(layer_tasks.__doc__) and "not the list of OmniAlpha" in str(layer_tasks.__doc__)
    seen = {name: {e.removesuffix("?") for e in plan if e.endswith("?")} for name, plan in TASKS.items()}
    made = {name: {e for e in plan if not e.endswith("?")} for name, plan in TASKS.items()}
    for name in TASKS:
        assert made[name] and not seen[name] & made[name], f"{name} shows what it asks for"
        assert not {"caption", "text"} & made[name]
        said = "text" in name or name in layer_tasks.COMPLETION
        assert ("caption" in seen[name]) == said, name
        masked = any(view.endswith("mask") for view in seen[name])
        assert masked == ("mask" in name and name != "matting_to_mask"), name
        assert ("latents:trimap" in seen[name]) == name.endswith("with_trimap"), name
    for name in layer_tasks.MATTING:
        assert "latents:composite" in seen[name]
        assert made[name] <= {"latents:foreground", "latents:alpha", "latents:mask"}
    for name in layer_tasks.REMOVAL:
        assert "latents:composite" in seen[name] and made[name] <= {"latents:background", "latents:removed"}
    for name in layer_tasks.DECOMPOSITION:
        assert "latents:composite" in seen[name]
        assert "latents:layers" in made[name] or len(made[name]) == 2
    for name in layer_tasks.RECOMPOSITION:
        assert made[name] == {"latents:composite"}
    assert TASKS["matting_with_trimap"] == ("latents:composite?", "latents:trimap?", "latents:foreground")


def test_the_docs_list_every_task() -> None:
    rows = [line.split("|") for line in (ROOT / "docs" / "config.md").read_text().splitlines()]
    shown = {row[2].strip(" `"): (row[3].strip(), row[4].strip()) for row in rows if len(row) == 6}
    words = {"caption": "text"}
    for name, plan in TASKS.items():
        parts: dict[bool, list[str]] = {True: [], False: []}
        for entry in plan:
            view = entry.removesuffix("?").removeprefix("latents:")
            parts[entry.endswith("?")].append(words.get(view, view))
        assert shown.get(name) == (", ".join(parts[True]), ", ".join(parts[False])), name


def test_an_unknown_task_has_a_nearest_one() -> None:
    for wrong, meant in (
        ("mating", "matting"),
        ("removal_with_masks", "removal_with_mask"),
        ("Recomposition", "reco"),
    ):
        with pytest.raises(ValueError, match=f"no task '{wrong}'; did you mean {meant}"):
            plan_of_task(wrong)
    with pytest.raises(ValueError, match=r"no task 'zzzz'$"):
        plan_of_task("zzzz")


# ---- the grammar ----


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("latents", "name a view"),
        ("latents?", "name a view"),
        ("latents:", "nothing stands behind the colon"),
        ("latents:layer", "did you mean `latents:layers`"),
        ("latents:fourground", "did you mean `latents:foreground`"),
        ("latents:layer0.png", "without its ending: `latents:layer0`"),
        ("latents:layer01", "takes a view"),
        ("latents:a.flac", "takes a view"),
        ("latents:image:a.png", "takes a view"),
        ("latents:../a.png", "takes a view"),
    ],
)
def test_views_that_are_none(entry: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_entry(entry)


def test_views_that_are_one() -> None:
    for view in (
        "layers",
        "layer0",
        "layer17",
        "trimap",
        "image",
        "seg.png",
        "composite.png",
        "a.b.jpg",
        "clip.mp4",
    ):
        assert parse_entry(f"latents:{view}?").argument == view
    assert [read_by_view(v) for v in ("image", "seg.png", "jpg")] == ["image"] * 3
    assert [read_by_view(v) for v in ("video", "a.b.mp4")] == ["video"] * 2
    assert {read_by_view(v) for v in (*LAYER_VIEWS, "layer4")} == {"rgba"}


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (["latents:layers", "image"], "'image' cannot stand beside latents"),
        (["audio?", "latents:layers"], "'audio' cannot stand beside latents"),
        (["fields:a", "latents:layers"], "cannot stand beside latents"),
        (["caption", "latents:composite?"], "no latents to train on"),
        (["latents:composite?"], "no latents to train on"),
    ],
)
def test_plans_that_make_no_document(plan: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse_plan(plan)


# ---- documents ----


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_a_document(task: str) -> None:
    """bos and words, then what is made, then what is seen; each grid numbered; loss on what is made alone."""
    document = encode(record(), *TASKS[task])
    first, grids = document.segments[0], grids_of(document)
    assert document.key == "k7" and [first, *grids] == list(document.segments)
    said = b"a fish on a plate" if "caption?" in TASKS[task] else b""
    assert first.ids.tolist() == [BOS, *(300 + byte for byte in said)]
    assert (first.role, first.weight) == ("condition", 0.0)
    sizes = {"layers": 3, "lower": 2}
    counts = {
        ending: sum(sizes.get(e.removesuffix("?").partition(":")[2], 1) for e in TASKS[task]
                    if e.startswith("latents") and e.endswith("?") == ending)
        for ending in (False, True)
    }  # fmt: skip
    made, seen = grids[: counts[False]], grids[counts[False] :]
    assert len(seen) == counts[True]
    assert all((g.role, g.weight) == ("target", 1.0) for g in made)
    assert all((g.role, g.weight) == ("condition", 0.0) for g in seen)
    numbers = [*range(len(made)), *(-1 - n for n in range(len(seen)))]
    assert [g.positions[:, 3].tolist() for g in grids] == [[n] * 6 for n in numbers]
    for grid in grids:
        assert grid.positions[:, :3].tolist() == [[0, y, x] for y in range(2) for x in range(3)]
        assert (grid.ids == LATENT).all() and grid.attends == "bidirectional"


def test_grids_hold_the_views() -> None:
    front, flat = over(LAYERS[1:]), over(LAYERS)
    document = encode(record(), "latents:composite?", "latents:trimap?", "latents:foreground")
    wanted = [front, flat]
    for grid, picture in zip(grids_of(document), wanted):
        assert (grid.latents == pooled(picture).reshape(-1, 4)).all()
    assert [g.modality for g in grids_of(document)] == ["rgba", "rgba", "image"]
    document = encode(record(), "latents:composite?", "latents:layers")
    for grid, picture in zip(grids_of(document), [*LAYERS, flat], strict=True):
        assert (grid.latents == pooled(picture).reshape(-1, 4)).all()


def test_words_are_a_condition_marked_or_not() -> None:
    plain = encode(record(), "caption", "latents:composite")
    marked = encode(record(), "latents:composite", "caption?")
    assert [s.ids.tolist() for s in plain.segments] == [s.ids.tolist() for s in marked.segments]
    assert parse_plan(["caption", "latents:composite"])[0] == ("caption", "condition")
    two = encode(record(md=b"second"), "caption", "text:md", "latents:composite").segments[0]
    assert bytes((two.ids[1:] - 300).astype(np.uint8)) == b"a fish on a plate\nsecond"
    silent = encode(record(txt=b""), "text", "latents:composite").segments[0]
    assert silent.ids.tolist() == [BOS], "an empty text is the empty prompt"


def test_pictures_and_clips_are_grids() -> None:
    rgb = drawn(5)[..., :3].copy()
    seg = np.zeros((4, 4, 4), np.uint8)
    seg[0, 0] = (10, 20, 30, 255)
    sample = Sample("k", {"png": png(rgb), "seg.png": png(seg), "txt": b"x"}, "s.tar", 0)
    tokenizers = Pooling()
    document = encode(sample, "caption", "latents:image", "latents:seg.png?", tokenizers=tokenizers)
    assert [g.modality for g in grids_of(document)] == ["image", "image"]
    assert (tokenizers.given[0] == np.dstack([rgb, np.full((8, 12), 255, np.uint8)])).all()
    assert tokenizers.given[1][0, 0].tolist() == [10, 20, 30, 255]
    assert tokenizers.given[1][2, 2].tolist() == [255] * 4, "transparency lies on white"


def test_a_clip_is_one_grid_of_its_frames() -> None:
    from ringweave.data_pipes.demo.clips import encode_mp4
    from ringweave.tokenizers.media import decode_video

    frames = np.stack([np.full((16, 16, 3), 40 * n, np.uint8) for n in range(5)])
    data = encode_mp4(frames, np.arange(5) / 4)
    sample = Sample("k", {"mp4": data, "txt": b"x"}, "s.tar", 0)
    [grid] = grids_of(encode(sample, "caption", "latents:video"))
    assert grid.modality == "video" and len(grid) == 5 * 16
    assert grid.positions[:, 0].tolist() == [t for t in range(5) for _ in range(16)]
    decoded, _ = decode_video(data, where="x")
    assert grid.latents is not None
    assert (grid.latents[::16, 0] == decoded[:, :4, :4, 0].mean((1, 2))).all()


def test_documents_of_tasks_survive_caches_and_packs() -> None:
    """Negative layers and latents come back from a block of tokens, and a pack trains on targets alone."""
    documents = [
        encode(record(), *TASKS[t]) for t in ("matting_with_trimap", "text_to_layers", "recomposition")
    ]
    writer = BlockWriter()
    for document in documents:
        writer.add(document.key, document)
    back = TokenBlock.from_bytes(writer.block("test").to_bytes(), "test")
    for number, document in enumerate(documents):
        for mine, theirs in zip(document.segments, back.document(number).segments, strict=True):
            assert (mine.ids == theirs.ids).all() and (mine.positions == theirs.positions).all()
            assert (mine.role, mine.weight, mine.modality) == (theirs.role, theirs.weight, theirs.modality)
            assert mine.latents is None or (mine.latents == theirs.latents).all()
    document = back.document(0)
    pack = materialise(PackPlan(0, 32, (Piece("s", 0, 0, 0, len(document)),)), lambda _: document)
    assert pack.latents is not None and pack.latent_weights is not None
    assert pack.latent_weights.tolist() == [0.0] + [1.0] * 6 + [0.0] * 25
    assert (pack.weights == 0).all(), "no id is predicted"
    assert (pack.latents[1:7] == pooled(over(LAYERS[1:])).reshape(-1, 4)).all()
    assert pack.positions[[1, 7, 13], 3].tolist() == [0, -1, -2]


# ---- bad input ----


def refused(sample: Sample, *plan: str, tokenizers: Any = None) -> str:
    with pytest.raises(DataError) as caught:
        encode(sample, *plan, tokenizers=tokenizers)
    assert "s-0000.tar#k7" in caught.value.where
    return str(caught.value)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_a_layer_without_alpha_is_named(mode: str, channels: int) -> None:
    flat = np.asarray(Image.fromarray(LAYERS[1]).convert(mode))
    sample = record()
    sample.members["layer1.png"] = png(flat)
    said = refused(sample, *TASKS["matting"])
    assert "s-0000.tar#k7:layer1.png" in said and f"it has {channels} channel" in said and "RGBA" in said
    assert "'latents:composite'" in said


def test_layers_of_unequal_size_and_gaps() -> None:
    said = refused(record([LAYERS[0], LAYERS[1][:6]]), *TASKS["matting"])
    assert "different sizes" in said and "12x8, 12x6" in said
    sample = record()
    del sample.members["layer1.png"]
    assert "without a gap" in refused(sample, *TASKS["matting"])
    assert "'latents:layers'" in refused(Sample("k7", {"txt": b"x"}, "s-0000.tar", 7), "latents:layers")
    sample = record()
    sample.members["layer2.png"] = b"no png"
    assert "s-0000.tar#k7:layer2.png" in refused(sample, *TASKS["matting"])


@pytest.mark.parametrize("name", ["flat__png", "composite__png"])
def test_a_composite_that_differs_is_named(name: str) -> None:
    flat = over(LAYERS)
    sample = record(**{name: png(flat)})
    assert len(grids_of(encode(sample, *TASKS["decomposition"]))) == 4
    opaque = record(**{name: png(np.ascontiguousarray(flat[..., :3]))})
    assert len(grids_of(encode(opaque, *TASKS["decomposition"]))) == 4, "without alpha it is opaque"
    within, beyond = flat.astype(int), flat.astype(int)
    away = np.where(flat[0, 0, 0] < 128, 1, -1)
    within[0, 0, 0] += away
    beyond[0, 0, 0] += 4 * away
    encode(record(**{name: png(within.astype(np.uint8))}), *TASKS["decomposition"])
    said = refused(record(**{name: png(beyond.astype(np.uint8))}), *TASKS["text_to_background"])
    assert f"s-0000.tar#k7:{name.replace('__', '.')}" in said and "do not add up" in said and "/255" in said
    turned = record(LAYERS[::-1], **{name: png(flat)})
    assert "do not add up" in refused(turned, *TASKS["decomposition"]), "bottom first"
    assert "differ in size" in refused(record(**{name: png(flat[:4])}), *TASKS["decomposition"])


def test_empty_layers_are_layers_but_no_foreground() -> None:
    empty = np.zeros_like(LAYERS[0])
    sample = record([LAYERS[0], empty])
    assert len(grids_of(encode(sample, *TASKS["decomposition"]))) == 3
    for task in layer_tasks.MATTING:
        said = refused(sample, *TASKS[task])
        assert "the foreground is empty" in said and "'latents:" in said
    assert "1 layer has no foreground" in refused(record(LAYERS[:1]), *TASKS["matting"])


def test_one_pixel_and_a_hundred_layers() -> None:
    dots = [layer[:1, :1] for layer in LAYERS]
    dots[1][..., 3] = 200
    for plan in TASKS.values():
        assert all(len(g) == 1 for g in grids_of(encode(record(dots), *plan)))
    many = [drawn(n, 4, 4) for n in range(100)]
    grids = grids_of(encode(record(many, flat__png=png(over(many))), "latents:composite?", "latents:layers"))
    assert [int(g.positions[0, 3]) for g in grids] == [*range(100), -1]
    for number, layer in enumerate(many):
        assert (grids[number].latents == pooled(layer).reshape(-1, 4)).all()


def test_missing_and_empty_captions() -> None:
    sample = record()
    del sample.members["txt"]
    assert "'caption' finds no member txt" in refused(sample, *TASKS["text_to_layers"])
    assert "finds no text" in refused(record(txt=b" \n"), *TASKS["text_to_layers"])


class Broken(Pooling):
    """Gives the second picture it is asked for a value of its own, or refuses it."""

    def __init__(self, value: float | DataError) -> None:
        super().__init__()
        self.value = value

    def encode_layer(self, layer: U8) -> np.ndarray[Any, Any]:
        cells = super().encode_layer(layer)
        if len(self.given) == 2:
            if isinstance(self.value, DataError):
                raise self.value
            cells[1, 2, 3] = self.value
        return cells


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_not_finite_name_sample_and_layer(value: float) -> None:
    said = refused(record(), "latents:layers", tokenizers=Broken(value))
    assert "s-0000.tar#k7:layer1.png" in said and "not finite" in said
    assert "1 of 24 numbers, the first at [0, 1, 2, 3]" in said


@pytest.mark.parametrize("place", ["", "latents.rgba"])
def test_an_encoder_that_refuses_names_sample_and_layer(place: str) -> None:
    said = refused(
        record(), "latents:layers", tokenizers=Broken(DataError("too small", where=place, why="tiny"))
    )
    assert "too small" in said and "s-0000.tar#k7:layer1.png" in said
    assert (f"{place}: tiny" if place else "tiny") in said
