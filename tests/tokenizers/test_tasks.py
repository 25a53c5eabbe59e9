"""A plan makes a task of a record: any subset, in any order, some of it seen and some of it trained on; no code."""

from __future__ import annotations

import numpy as np
import pytest
from test_set_members import MIDI, XML
from tokenizer_samples import clip, flac, mp4, page, picture, png, prose, tone

from ringweave.data_pipes.documents import encode_sample
from ringweave.data_pipes.pack import PackPlan, Piece
from ringweave.data_pipes.packing import materialise
from ringweave.data_pipes.sample import Sample
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import MODALITIES
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.symbols import MidiCodec, SymbolicCodec

LAYERS = [picture(n, "RGBA") for n in range(2)]
RECORD = {
    "txt": prose(1).encode(),
    "flat.png": png(picture(5)),
    "layer0.png": png(LAYERS[0]),
    "layer1.png": png(LAYERS[1]),
    "page.png": png(page(3)),
    "flac": flac(tone(2)),
    "mp4": mp4(clip(4, 4)),
    "musicxml": XML,
    "mid": MIDI,
}
TASKS = {
    "image to caption": ["image:flat.png?", "caption"],
    "caption to image": ["caption?", "image:flat.png"],
    "score to audio": ["score:page.png?", "audio"],
    "audio to score": ["audio?", "score:page.png"],
    "score to notes": ["score:page.png?", "symbolic"],
    "audio to midi": ["audio?", "midi"],
    "midi to audio": ["midi?", "audio"],
    "notes to page": ["symbolic?", "score:page.png"],
    "frames to text": ["video?", "caption"],
    "layers to composite": ["rgba?", "image:flat.png"],
    "composite to layers": ["image:flat.png?", "rgba"],
    "all of it": [
        "caption",
        "image:flat.png",
        "rgba",
        "score:page.png",
        "audio",
        "video",
        "symbolic",
        "midi",
    ],
}
MODALITY = {"caption": "text"}


@pytest.fixture(scope="module")
def full(tokenizers: TokenizerSet) -> TokenizerSet:
    return tokenizers.extended({"symbolic": SymbolicCodec(), "midi": MidiCodec()})


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_a_plan(full: TokenizerSet, task: str) -> None:
    """Modalities in the order of the plan, loss on the targets alone, and what is decoded is what was given."""
    plan = TASKS[task]
    document = encode_sample(Sample("k", RECORD, "s-0.tar", 0), plan, full)
    names = [entry.removesuffix("?").partition(":")[0] for entry in plan]
    assert [segment.modality for segment in document.segments] == [MODALITY.get(n, n) for n in names]
    roles = ["condition" if entry.endswith("?") else "target" for entry in plan]
    assert [segment.role for segment in document.segments] == roles
    size = len(document)
    pack = materialise(PackPlan(0, size + 8, (Piece("s", 0, 0, 0, size),)), lambda _: document)
    trained = {MODALITIES[m] for m in np.unique(pack.target_modality[pack.weights > 0])}
    wanted = {s.modality for s in document.segments if s.role == "target"}
    assert trained == wanted
    lost = sum(len(s) for s in document.segments if s.role == "target") - (roles[0] == "target")
    assert int((pack.weights > 0).sum()) == lost  # all but the first id of a document, which nothing predicts
    items = full.decode(np.concatenate([segment.ids for segment in document.segments]))
    assert [item.modality for item in items] == [s.modality for s in document.segments]
    assert all(item.complete for item in items)


@pytest.mark.parametrize(("item", "data"), [("symbolic", b"<score"), ("midi", b"MThd"), ("midi", b"")])
def test_notes_that_cannot_be_read_name_sample_and_member(full: TokenizerSet, item: str, data: bytes) -> None:
    member = {"symbolic": "musicxml", "midi": "mid"}[item]
    with pytest.raises(DataError) as caught:
        encode_sample(Sample("k", {member: data}, "s-0.tar", 0), [item], full)
    assert f"s-0.tar#k:{member}" in str(caught.value)
    with pytest.raises(DataError, match=f"plan item '{item}'"):
        encode_sample(Sample("k", {"txt": b"x"}, "s-0.tar", 0), [item], full)
