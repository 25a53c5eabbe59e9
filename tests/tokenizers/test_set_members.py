"""Members of a set beside the fitted ones: notes, codecs from outside, orders of sound; and sets that grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import picture, prose, tone
from transformers import EncodecConfig, EncodecModel

from ringweave.tokenizers import lmx, midi_events
from ringweave.tokenizers.brought import Brought
from ringweave.tokenizers.codec import pack_codec, sha256
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.image import ImageCodec
from ringweave.tokenizers.manifest import CONTROL
from ringweave.tokenizers.midi_file import Note, write
from ringweave.tokenizers.segment import Document
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.set_files import AUDIO_ORDERS
from ringweave.tokenizers.symbols import MidiCodec, SymbolicCodec
from ringweave.tokenizers.video import VideoCodec

XML = b"""<score-partwise version="4.0"><part-list><score-part id="P1"><part-name/></score-part></part-list>
<part id="P1"><measure number="1"><attributes><divisions>1</divisions><key><fifths>0</fifths></key>
<time><beats>2</beats><beat-type>4</beat-type></time><clef><sign>G</sign><line>2</line></clef></attributes>
<note><pitch><step>C</step><octave>5</octave></pitch><duration>1</duration><voice>1</voice><type>quarter</type></note>
<note><pitch><step>E</step><octave>5</octave></pitch><duration>1</duration><voice>1</voice><type>quarter</type></note>
</measure></part></score-partwise>"""
MIDI = write([Note(0, 500_000, 60, 64, 0, False), Note(12_340_000, 13_000_000, 64, 100, 0, False)])


@pytest.fixture(scope="module")
def musical(tokenizers: TokenizerSet) -> TokenizerSet:
    return tokenizers.extended({"symbolic": SymbolicCodec(), "midi": MidiCodec(velocity_bins=16)})


# ---- notes ----


def test_notes_stand_in_documents_and_come_back(musical: TokenizerSet) -> None:
    segments = [musical.text_segment("play this"), musical.symbolic_segment(XML), musical.midi_segment(MIDI)]
    document: Document = musical.document("k", segments)
    ids = np.concatenate([segment.ids for segment in document.segments])
    text, score, song = musical.decode(ids)
    assert (text.value, score.modality, song.modality) == ("play this", "symbolic", "midi")
    assert score.complete and song.complete
    assert lmx.to_text(lmx.encode(score.value.encode(), where="")) == lmx.to_text(lmx.encode(XML, where=""))
    want, have = (midi_events.encode(data, where="", velocity_bins=16) for data in (MIDI, song.value))
    assert want.tolist() == have.tolist()
    kinds = musical.manifest.modality_of(segments[1].ids[1:-1])
    assert set(kinds.tolist()) == {7}
    assert (segments[2].ids[0], segments[2].ids[-1]) == (CONTROL["bos_midi"], CONTROL["eos_midi"])


def test_midi_stands_at_its_time(musical: TokenizerSet) -> None:
    """The second note begins at 12.34 s: unit 308 of 40 ms, where the sound of that moment stands."""
    segment = musical.midi_segment(MIDI)
    names = midi_events.tokens(16)
    local = segment.ids[1:-1] - musical.manifest.block("midi").start
    at = {names[i]: int(t) for i, t in zip(local, segment.positions[1:-1, 0])}
    assert at["pitch:64"] == 13_000 // 40  # its end, the last time it is named
    places = [int(t) for i, t in zip(local, segment.positions[1:-1, 0]) if names[i] == "pitch:64"]
    assert places == [12_340 // 40, 13_000 // 40]
    sound = musical.audio_segment(np.zeros(16_000 * 13, np.int16), 16_000)
    assert sound.positions[1:-1, 0].max() == 13_000 // 40
    assert (np.diff(segment.positions[:, 0]) >= 0).all()


@given(st.lists(st.integers(-5, 2000), max_size=60))
@settings(max_examples=60, deadline=None)
def test_times_never_run_backwards(ids: list[int]) -> None:
    times = midi_events.milliseconds(ids)
    assert len(times) == len(ids) and (np.diff(times) >= 0).all()


def test_random_ids_of_notes_are_read(musical: TokenizerSet) -> None:
    rng = np.random.default_rng(0)
    for name in ("symbolic", "midi"):
        block = musical.manifest.block(name)
        for _ in range(30):
            ids = rng.integers(block.start, block.stop, 40).astype(np.int32)
            (item,) = musical.decode(ids)
            assert (item.modality, item.complete) == (name, False)


def test_notes_that_cannot_be_read_are_named(musical: TokenizerSet, tokenizers: TokenizerSet) -> None:
    for call in (musical.symbolic_segment, musical.midi_segment):
        with pytest.raises(DataError) as caught:
            call(b"nothing of the kind", where="s-0.tar#k")
        assert "s-0.tar#k" in str(caught.value)
    with pytest.raises(DataError, match="nothing of this midi record"):
        musical.midi_segment(write([]), where="s-0.tar#k")
    with pytest.raises(VocabularyError, match="no symbolic codec"):
        tokenizers.symbolic_segment(XML)


def test_other_words_are_refused_by_name(musical: TokenizerSet, tmp_path: Path) -> None:
    for name, kind, config in (
        ("symbolic", "symbolic.lmx", {"size": 1}),
        ("midi", "midi.events", {"velocity_bins": 16}),
    ):
        data = pack_codec(kind, config, {"words": np.zeros(32, np.uint8)})
        codec: Any = SymbolicCodec if name == "symbolic" else MidiCodec
        with pytest.raises(VocabularyError, match="are not those of this version"):
            codec.from_bytes(data, where="x")
        musical.save(tmp_path / name)
        (tmp_path / name / f"{name}.safetensors").write_bytes(data)
        with pytest.raises(VocabularyError, match=f"the {name} codec is not the one"):
            TokenizerSet.load(tmp_path / name)


# ---- sets that grow ----


def test_a_grown_set_keeps_every_id(tokenizers: TokenizerSet, musical: TokenizerSet, tmp_path: Path) -> None:
    assert musical.manifest.extends(tokenizers.manifest)
    segment = tokenizers.image_segment(picture(3))
    assert (musical.image_segment(picture(3)).ids == segment.ids).all()
    musical.save(tmp_path)
    loaded = TokenizerSet.load(tmp_path)
    assert loaded.manifest.hash == musical.manifest.hash
    assert list(loaded.codecs) == list(musical.codecs)
    with pytest.raises(VocabularyError, match="already has a codec for image"):
        musical.extended({"image": tokenizers.codecs["image"]})


def test_what_is_added_comes_last_whatever_its_place_in_a_new_set(
    tokenizers: TokenizerSet, tmp_path: Path
) -> None:
    """An image codec given to a set of score and notes takes ids after theirs, and keeps them when loaded."""
    first = TokenizerSet({"score": tokenizers.codecs["score"], "midi": MidiCodec()})
    grown = first.extended({"image": tokenizers.codecs["image"], "text": tokenizers.codecs["text"]})
    names = [block.name for block in grown.manifest.blocks]
    assert names == ["score.q0", "score.q1", "midi", "text", "image"]
    grown.save(tmp_path)
    assert TokenizerSet.load(tmp_path).manifest == grown.manifest


def test_a_set_of_an_older_version_loads_and_grows(tokenizers: TokenizerSet, tmp_path: Path) -> None:
    """Saved when control ids ended at 17: it keeps its hash, and what it grows into extends it."""
    older = TokenizerSet(
        tokenizers.codecs, files=tokenizers.files, control={n: i for n, i in CONTROL.items() if i < 18}
    )
    older.save(tmp_path)
    loaded = TokenizerSet.load(tmp_path)
    assert loaded.manifest.hash == older.manifest.hash != tokenizers.manifest.hash
    grown = loaded.extended({"midi": MidiCodec()})
    assert grown.manifest.extends(loaded.manifest)
    assert grown.manifest.control == CONTROL


def test_a_codec_in_the_place_of_another_keeps_order_and_layout(
    tokenizers: TokenizerSet, tmp_path: Path
) -> None:
    grown = TokenizerSet({"score": tokenizers.codecs["score"]}, audio_order="delay").extended(
        {name: tokenizers.codecs[name] for name in ("text", "image", "audio")}
    )
    image = ImageCodec.fit([picture(n) for n in range(4)], codes=32)
    new = grown.replaced({"image": image})
    new.save(tmp_path)
    loaded = TokenizerSet.load(tmp_path)
    assert list(loaded.codecs) == list(grown.codecs)
    assert (loaded.audio_order, loaded.manifest.block("image").size) == ("delay", 32)
    assert loaded.manifest.block("image").sha256 == sha256(image.to_bytes())


# ---- orders of sound ----


@pytest.mark.parametrize("order", AUDIO_ORDERS)
def test_orders_of_books_come_back(tokenizers: TokenizerSet, tmp_path: Path, order: str) -> None:
    plain = tokenizers.audio_segment(tone(4), 16_000)
    ordered = TokenizerSet(tokenizers.codecs, files=tokenizers.files, audio_order=order)
    ordered.save(tmp_path)
    loaded = TokenizerSet.load(tmp_path)
    assert loaded.audio_order == order
    segment = loaded.audio_segment(tone(4), 16_000)
    assert sorted(segment.ids) == sorted(plain.ids)
    (item,) = loaded.decode(segment.ids)
    (whole,) = tokenizers.decode(plain.ids)
    assert item.complete and (item.value[0] == whole.value[0]).all()
    if order != "frame-major":
        assert loaded.manifest.hash != tokenizers.manifest.hash
        assert (segment.ids != plain.ids).any()
        (torn,) = loaded.decode(np.delete(segment.ids, 5))
        assert not torn.complete
        swapped = segment.ids.copy()
        place = (
            int(np.flatnonzero(np.diff(segment.positions[1:-1, 1]))[0]) + 1
        )  # where one book follows another
        swapped[[place, place + 1]] = swapped[[place + 1, place]]
        (out_of_order,) = loaded.decode(swapped)
        assert not out_of_order.complete
    books, frames = 3, (len(plain) - 2) // 3
    column = segment.positions[1:-1, 1].tolist()
    expected = {
        "frame-major": [0, 1, 2] * frames,
        "coarse-first": [q for q in range(books) for _ in range(frames)],
        "delay": [0, 0, 1] + [0, 1, 2] * (frames - 2) + [1, 2, 2],
    }[order]
    assert column == expected


def test_an_unknown_order_is_named(tokenizers: TokenizerSet) -> None:
    with pytest.raises(VocabularyError, match="frame-major, coarse-first, delay"):
        TokenizerSet(tokenizers.codecs, audio_order="random")


# ---- codecs from outside ----


@pytest.fixture(scope="module")
def vqmodel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = diffusers.VQModel(
        block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,        latent_channels=4, num_vq_embeddings=20_000, norm_num_groups=4,
    )  # fmt: skip
    with torch.no_grad():
        model.quantize.embedding.weight.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("vqmodel")
    model.save_pretrained(folder)
    (folder / "notes.bin").write_bytes(b"not copied")
    return folder


@pytest.fixture(scope="module")
def encodec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encodec")
    EncodecModel(
        EncodecConfig(hidden_size=8, num_filters=4, upsampling_ratios=[4, 2], num_lstm_layers=1, codebook_size=16,
                      sampling_rate=8000, target_bandwidths=[8.0, 12.0])
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_codecs_from_outside_are_members_of_a_set(
    tokenizers: TokenizerSet, vqmodel: Path, encodec: Path, tmp_path: Path
) -> None:
    image, audio = Brought.load("image", vqmodel), Brought.load("audio", encodec, books=2)
    made = TokenizerSet(
        {"text": tokenizers.codecs["text"], "image": image, "audio": audio}, audio_order="delay"
    )
    made.save(tmp_path)
    made.save(tmp_path)  # onto itself
    assert sorted(path.name for path in (tmp_path / "image").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    loaded = TokenizerSet.load(tmp_path)
    assert loaded.manifest == made.manifest
    assert [block.name for block in loaded.manifest.blocks] == [
        "text",
        "image.coarse",
        "image.fine",
        "audio.q0",
        "audio.q1",
    ]
    assert loaded.manifest.block("image.fine").sha256 == image.sha256
    assert loaded.manifest.preprocessing["image"]["codec"] == "image.vqmodel"
    drawn, sound = picture(2), tone(1)
    segments = [
        loaded.text_segment(prose(1)),
        loaded.image_segment(drawn),
        loaded.audio_segment(sound, 16_000),
    ]
    codes = image.codec.encode(drawn)
    start = loaded.manifest.block("image.coarse").start
    assert int(segments[1].ids[1] - start) == codes[0, 0] // loaded.manifest.block("image.fine").size
    items = loaded.decode(np.concatenate([segment.ids for segment in segments]))
    assert [item.modality for item in items] == ["text", "image", "audio"]
    assert all(item.complete for item in items)
    assert (items[1].value == image.codec.decode(codes)).all()
    assert items[2].value[1] == 8000
    # A torn picture is still read.
    (torn,) = loaded.decode(np.delete(segments[1].ids, [3, 4, 9]))
    assert torn.modality == "image" and not torn.complete


def test_a_missing_cell_is_read_as_code_0(vqmodel: Path) -> None:
    """Model output may end a row early: the class itself refuses -1."""
    codec = Brought.load("image", vqmodel)
    codes = np.array([[5, -1], [7, 9]], np.int32)
    assert (codec.decode(codes) == codec.codec.decode(np.maximum(codes, 0))).all()
    made = TokenizerSet({"image": codec})
    ids = made.image_segment(picture(2)).ids
    first = int(np.flatnonzero(ids == CONTROL["eol"])[0])
    (item,) = made.decode(
        np.delete(ids, [first - 2, first - 1])
    )  # the last cell of the first row, both sub-ids
    assert item.value.shape == (48, 48, 3) and not item.complete


def test_one_flipped_weight_is_found(tokenizers: TokenizerSet, vqmodel: Path, tmp_path: Path) -> None:
    TokenizerSet({"image": Brought.load("image", vqmodel)}).save(tmp_path)
    weights = tmp_path / "image" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(VocabularyError, match="the image codec is not the one the vocabulary was made with"):
        TokenizerSet.load(tmp_path)
    # And how they are read is part of the vocabulary.
    description = tmp_path / "image.outside.json"
    data[-1] ^= 1
    weights.write_bytes(data)
    TokenizerSet.load(tmp_path)
    raw = json.loads(description.read_bytes())
    description.write_text(json.dumps(raw | {"options": {"pixels": "unit"}}))
    with pytest.raises(VocabularyError, match="the image codec is not the one"):
        TokenizerSet.load(tmp_path)
    description.write_text("[]")
    with pytest.raises(VocabularyError, match="not a description of a codec from outside"):
        TokenizerSet.load(tmp_path)


def test_moves_over_pictures_of_two_sub_ids(vqmodel: Path) -> None:
    """A clip that stands still: the second frame is two ids, and all of it comes back."""
    made = TokenizerSet({"image": Brought.load("image", vqmodel), "video": VideoCodec()})
    frames = np.stack([picture(2), picture(2)])
    segment = made.video_segment(frames, np.array([0, 0.1]))
    assert len(segment) == len(made.image_segment(picture(2))) + 1 + 2  # the picture, `eof`, the still frame
    (item,) = made.decode(segment.ids)
    assert item.complete and item.value.shape == frames.shape
    (still,) = made.decode(made.image_segment(picture(2)).ids)
    assert (item.value[0] == still.value).all() and (item.value[1] == still.value).all()


def test_what_cannot_stand_for_a_codec_is_named(vqmodel: Path, encodec: Path) -> None:
    with pytest.raises(VocabularyError, match=r"kind 'audio\.encodec' cannot stand for image"):
        Brought.load("image", encodec)
    with pytest.raises(VocabularyError, match=r"kind 'image\.vqmodel' cannot stand for audio"):
        Brought.load("audio", vqmodel)


def test_a_fitted_codec_takes_the_place_of_one_from_outside(
    tokenizers: TokenizerSet, vqmodel: Path, tmp_path: Path
) -> None:
    """The description of the old one must not be left to be read in the place of the new one."""
    TokenizerSet({"image": Brought.load("image", vqmodel)}).save(tmp_path)
    fitted = TokenizerSet({"image": tokenizers.codecs["image"]})
    fitted.save(tmp_path)
    assert TokenizerSet.load(tmp_path).manifest == fitted.manifest
