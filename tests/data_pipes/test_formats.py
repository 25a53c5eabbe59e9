"""Public sets as they are: which member wins, captions out of json and cls, and never an empty one in silence."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from ringweave.data_pipes.documents import encode_sample, parse_plan
from ringweave.data_pipes.formats import MAX_JSON, field_text, guess_plan, load_json, resolve_plan
from ringweave.data_pipes.plan_items import parse_entry, parse_fields, split_json
from ringweave.data_pipes.sample import Sample
from ringweave.data_pipes.token_files import plan_hash
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.image import ImageCodec
from ringweave.tokenizers.manifest import BOS, EOS
from ringweave.tokenizers.media import decode_audio
from ringweave.tokenizers.mp3 import find_cut
from ringweave.tokenizers.segment import Document, Segment
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.text import TextCodec


class Recorder:
    """Stands in for a tokenizer set: one token a character or one a segment, and a note of what it was given."""

    manifest = SimpleNamespace(hash="0" * 64)

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        def segment(*values: Any, role: Any = "target", weight: float = 1.0, **more: Any) -> Segment:
            modality = name.removesuffix("_segment")
            self.calls.append((modality, values[0]))
            size = len(values[0]) if isinstance(values[0], str) else 1
            kind = "image" if modality == "codes" else modality
            ids, places = np.full(size, 300, np.int32), np.zeros((size, 4), np.int32)
            return Segment(ids, kind, places, role=role, weight=weight)

        return segment

    def document(self, key: str, segments: list[Segment]) -> Document:
        return Document(key, tuple(segments))

    @property
    def texts(self) -> list[str]:
        return [value for name, value in self.calls if name == "text"]


def sample(key: str = "k", **members: bytes | dict | list) -> Sample:
    made = {
        name.replace("__", "."): value if isinstance(value, bytes) else json.dumps(value).encode()
        for name, value in members.items()
    }
    return Sample(key, made, "s-0000.tar", 7)


def png(value: int, size: int = 4) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(out, "png")
    return out.getvalue()


def texts_of(members: Sample, *plan: str) -> list[str]:
    tokenizers = Recorder()
    encode_sample(members, plan, tokenizers)
    return tokenizers.texts


# --- captions ----------------------------------------------------------------------------------------------


def test_caption_comes_from_txt_json_or_cls_as_the_plan_says() -> None:
    """A LAION record: jpg, json and txt, the json repeating the caption among other things."""
    record = {
        "caption": "from json",
        "url": "http://x",
        "width": 4,
        "meta": {"title": "deep"},
        "captions": ["a", "b"],
    }
    laion = sample(
        jpg=png(1), json=record, txt=b"from txt", cls=b" 1\n", meta__json={"text": "other"}, md=b"# m"
    )
    for item, wanted in [
        ("caption", "from txt"),
        ("text", "from txt"),
        ("caption:txt", "from txt"),
        ("caption:json.caption", "from json"),
        ("caption:json.meta.title", "deep"),
        ("caption:json.captions.1", "b"),
        ("text:meta.json.text", "other"),
        ("caption:md", "# m"),
        ("caption:cls", "1"),
        ("caption:cls=cat|dog, or hound", "dog, or hound"),
    ]:
        assert texts_of(laion, item) == [wanted], item


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "webp"])
def test_every_picture_ending_pairs_with_every_caption(ending: str) -> None:
    for caption, more in [
        ("caption", {"txt": b"words"}),
        ("caption:json.text", {"json": b'{"text": "words"}'}),
        ("caption:cls=words", {"cls": b"0"}),
    ]:
        tokenizers = Recorder()
        document = encode_sample(sample(**{ending: png(9), **more}), [f"{caption}?", "image"], tokenizers)
        assert tokenizers.texts == ["words"]
        assert [s.role for s in document.segments] == ["condition", "target"]


def test_the_first_member_of_the_table_wins_and_an_argument_names_one() -> None:
    many = sample(webp=png(4), jpg=png(2), png=png(1), flat__png=png(5), seg__png=png(6))
    for item, value in [("image", 1), ("image:jpg", 2), ("image:flat.png", 5), ("image:seg.png", 6)]:
        tokenizers = Recorder()
        encode_sample(many, [item], tokenizers)
        assert int(tokenizers.calls[0][1][0, 0, 0]) == value
    with pytest.raises(DataError, match="'image:jpeg' finds no member jpeg"):
        encode_sample(many, ["image:jpeg"], Recorder())


@pytest.mark.parametrize(
    ("item", "members", "words"),
    [
        ("caption:json.caption", {"json": {"text": "x"}}, ("no field 'caption'", "'text'")),
        ("caption:json.caption", {"json": {"caption": ""}}, ("field 'caption'", "it is empty")),
        ("caption:json.caption", {"json": {"caption": " \n"}}, ("it is empty",)),
        ("caption:json.caption", {"json": {"caption": None}}, ("it is null",)),
        ("caption:json.caption", {"json": {"caption": 7}}, ("it is a number",)),
        ("caption:json.caption", {"json": {"caption": ["a"]}}, ("it is a list",)),
        ("caption:json.a.b", {"json": {"a": {"c": 1}}}, ("field 'a'", "'c'")),
        ("caption:json.a.2", {"json": {"a": ["x", "y"]}}, ("a list of 2",)),
        ("caption:json.caption", {"json": ["x"]}, ("a list of 1",)),
        ("caption:json.caption", {"txt": b"x"}, ("finds no member json", "txt")),
        ("caption", {"txt": b"  "}, ("it is empty",)),
        ("caption", {"json": {"caption": "x"}}, ("finds no member txt", "json")),
        ("caption:cls", {"cls": b""}, ("it is empty",)),
        ("caption:cls=cat|dog", {"cls": b"2"}, ("class '2'", "list of 2")),
        ("caption:cls=cat|dog", {"cls": b"-1"}, ("class '-1'",)),
        ("caption:cls=cat|dog", {"cls": b"bird"}, ("class 'bird'",)),
        ("caption:cls", {"cls": b"\xff"}, ("not UTF-8", "cls")),
        ("text:json.text", {"json": b"{"}, ("JSON", "line 1, column 2")),
    ],
)
def test_a_missing_or_empty_caption_is_an_error_that_names_sample_and_field(
    item: str, members: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as caught:
        encode_sample(sample(**members), [item], Recorder())
    for word in ("s-0000.tar#k", *words):
        assert word in str(caught.value), str(caught.value)


def test_a_class_list_beside_the_shards_becomes_part_of_the_plan(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("tench, Tinca tinca\ngoldfish\n\n")
    plan = resolve_plan(["caption:cls@names.txt?", "image"], tmp_path)
    assert plan == ("caption:cls=tench, Tinca tinca|goldfish?", "image")
    assert texts_of(sample(cls=b"0", jpg=png(1)), *plan) == ["tench, Tinca tinca"]
    first = plan_hash(plan, "m")
    (tmp_path / "names.txt").write_text("tench\ngoldfish\n")
    assert plan_hash(resolve_plan(["caption:cls@names.txt?", "image"], tmp_path), "m") != first
    with pytest.raises(DataError, match="was not read"):
        texts_of(sample(cls=b"0"), "caption:cls@names.txt")
    for bad in ("", "a\n\nb\n", "a|b\n"):
        (tmp_path / "names.txt").write_text(bad)
        with pytest.raises(DataError, match="class list"):
            resolve_plan(["caption:cls@names.txt"], tmp_path)
    with pytest.raises(DataError, match="cannot read the class list"):
        resolve_plan(["caption:cls@none.txt"], tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        "caption:",
        "caption:json",
        "caption:json.",
        "image:txt",
        "image:a/b.png",
        "rgba:png",
        "audio:json.x",
        "text:cls=",
    ]
    + ["fields:", "fields:a,,b", "fields:[a", "fields?", "fields:a?", "sound:wav", "video:mp4:", "text:a b"],
)
def test_bad_arguments_are_refused_before_anything_is_read(entry: str) -> None:
    with pytest.raises(DataError, match="plan item"):
        parse_plan([entry])


def test_json_members_are_found_by_their_first_json_part() -> None:
    assert split_json("json.a.b") == ("json", "a.b")
    assert split_json("meta.json.title") == ("meta.json", "title")
    assert split_json("json.json") == ("json", "json")
    assert split_json("transcript.txt") == (None, "")
    assert split_json("cls=json.a") == (None, "")
    assert parse_entry("caption:json.caption?").text == "caption:json.caption"


# --- json --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"b": {"a": 1, "a": 1}}', "'a' occurs twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": \n\n "x"', "line 3, column"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "4300"),
        (b'{"a": "\xff"}', "not UTF-8 at offset 7"),
        (b"", "offset 0"),
        (b"{} {}", "Extra data at line 1, column 4 (offset 3)"),
        ("{'é': 1}".encode(), "line 1, column 2"),
    ],
    ids=range(12),
)
def test_json_that_parsers_choke_on_or_disagree_about_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(DataError) as caught:
        load_json(data, where="s#k:json")
    assert why in str(caught.value) and "s#k:json" in str(caught.value)


def test_offsets_in_json_count_bytes_and_a_byte_order_mark_is_no_damage() -> None:
    with pytest.raises(DataError, match=r"column 12 \(offset 13\)"):
        load_json('{"é": "ü", 1}'.encode(), where="w")
    assert load_json(b'\xef\xbb\xbf{"a": "b"}', where="w") == {"a": "b"}
    with pytest.raises(DataError, match="the limit is"):
        load_json(b" " * (MAX_JSON + 1), where="w")


def test_field_of_a_list_index_never_leaves_the_list() -> None:
    for path in ("a.-1", "a.99999999999", "a.x", "a.²"):
        with pytest.raises(DataError, match="finds no field"):
            field_text({"a": ["x"]}, path, where="w", item="caption")


# --- LWM's field lists -------------------------------------------------------------------------------------

FRAME = list(range(256))


def encode_fields(record: Any, plan: str = "fields", key: str = "k") -> tuple[Document, Recorder]:
    tokenizers = Recorder()
    return encode_sample(sample(key, json=record), [plan], tokenizers), tokenizers


def test_fields_become_segments_with_their_loss() -> None:
    """`[question],answer+more` of LWM: brackets mean no loss, "+" joins texts with a space, "," in tokens."""
    record = {"question": "Q?", "answer": "A", "more": "B"}
    document, tokenizers = encode_fields(record, "fields:[question],answer+more")
    assert tokenizers.texts == ["Q?", "A B"]
    assert [(s.role, s.weight) for s in document.segments] == [("condition", 0.0), ("target", 1.0)]


def test_the_end_is_trained_on_even_behind_a_field_without_loss() -> None:
    document, tokenizers = encode_fields({"q": "Q", "a": "A"}, "fields:a,[q]")
    assert tokenizers.texts == ["A", "Q", ""]
    assert [len(s) for s in document.segments] == [1, 1, 0], "the last one takes the end of the document"
    assert [s.weight for s in document.segments] == [1.0, 0.0, 1.0]


def test_vision_lists_are_one_picture_or_frames_at_four_a_second() -> None:
    record = {"vision": FRAME, "clip_vision": FRAME * 3, "t": "x"}
    _, tokenizers = encode_fields(record, "fields:[vision],clip_vision,t")
    codes = [value for name, value in tokenizers.calls if name == "codes"]
    assert [c.shape for c in codes] == [(1, 16, 16), (3, 16, 16)]
    assert codes[1][2, 1, 0] == 16


def test_a_record_may_bring_its_own_fields_or_a_choice_of_them() -> None:
    assert encode_fields({"fields": "[a],b", "a": "1", "b": "2"})[1].texts == ["1", "2"]
    record = {"fields": ["a", "b"], "a": "1", "b": "2"}
    chosen = {encode_fields(record, key=f"k{n}")[1].texts[0] for n in range(30)}
    assert chosen == {"1", "2"}, "the choice goes by the sample's key"
    assert all(
        encode_fields(record, key="k3")[1].texts == encode_fields(record, key="k3")[1].texts for _ in range(3)
    )


def test_special_tokens_in_the_middle_are_kept_and_those_at_the_ends_not_doubled() -> None:
    document, _ = encode_fields({"a": "x", "b": "y"}, "fields:<|bos|>,[a],<|eos|>,<|bos|>,b,<|eos|>")
    ids = [s.ids.tolist() for s in document.segments]
    assert ids == [[300], [EOS], [BOS], [300]]


@pytest.mark.parametrize(
    ("record", "spec", "words"),
    [
        ({"a": "x"}, "a,b", ("no field 'b'", "'a'")),
        ({"a": 3}, "a", ("field 'a' is no text", "a number")),
        ({"vision": "abc"}, "vision", ("flat list",)),
        ({"vision": [1.5] * 256}, "vision", ("flat list",)),
        ({"vision": [True] * 256}, "vision", ("flat list",)),
        ({"vision": [[1] * 256]}, "vision", ("flat list",)),
        ({"vision": [1] * 255}, "vision", ("255 vision codes", "256")),
        ({"vision": []}, "vision", ("0 vision codes",)),
        ({"vision": [*FRAME[:-1], 8192]}, "vision", ("outside its codebook", "number 255 is 8192")),
        ({"vision": [-1, *FRAME[1:]]}, "vision", ("outside its codebook",)),
        ({"a": "x"}, "", ("field 'fields'",)),
        ({"fields": [], "a": "x"}, "", ("field 'fields'",)),
        ({"fields": "a,,b", "a": "x"}, "", ("malformed list of fields",)),
        (["a"], "a", ("no JSON object",)),
        ({"a": "x"}, "vision+a", ("no field 'vision+a'",)),
    ],
)
def test_bad_records_name_the_sample_and_the_field(record: Any, spec: str, words: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        encode_fields(record, f"fields:{spec}" if spec else "fields")
    for word in ("s-0000.tar#k:json", *words):
        assert word in str(caught.value), str(caught.value)


@pytest.fixture(scope="module")
def small_set() -> TokenizerSet:
    """Text and 32 codes of pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    text = TextCodec.fit(["abc def ghi " * 4] * 20, size=280)
    return TokenizerSet({"text": text, "image": ImageCodec.fit(list(pixels), codes=32)})


def test_vision_codes_of_another_codebook_stop_the_job_by_name(small_set: TokenizerSet) -> None:
    """A skip would drop every record of the source; this is a wrong choice of tokenizers."""
    tokenizers = small_set
    with pytest.raises(VocabularyError) as caught:
        encode_sample(sample(json={"vision": FRAME, "a": "x"}), ["fields:vision,a"], tokenizers)
    assert "8192" in str(caught.value) and "32 codes" in str(caught.value)


def test_errors_of_tokenizers_name_the_sample_too(small_set: TokenizerSet) -> None:
    with pytest.raises(DataError) as caught:
        encode_sample(sample(json={"text": "\ud800"}), ["text:json.text"], small_set)
    assert caught.value.where == "s-0000.tar#k"


def test_codes_become_the_grid_that_the_picture_itself_would_have(small_set: TokenizerSet) -> None:
    tokenizers = small_set
    image = np.random.default_rng(1).integers(0, 256, (32, 48, 3)).astype(np.uint8)
    codes = tokenizers.codecs["image"].encode(image)
    ours, theirs = tokenizers.codes_segment(codes[None], codebook=32), tokenizers.image_segment(image)
    assert ours.ids.tolist() == theirs.ids.tolist() and ours.positions.tolist() == theirs.positions.tolist()
    clip = np.stack([image, image[::-1]])
    frames = tokenizers.codecs["image"].encode(clip)
    ours = tokenizers.codes_segment(frames, codebook=32, times=np.asarray([0.0, 0.25]))
    theirs = tokenizers.video_segment(clip, np.asarray([0.0, 0.25]))
    assert ours.ids.tolist() == theirs.ids.tolist() and ours.positions.tolist() == theirs.positions.tolist()
    with pytest.raises(DataError, match="picture codes"):
        tokenizers.codes_segment(frames + 32, codebook=32)


def test_field_lists() -> None:
    assert parse_fields("[q],a+b,<|eos|>") == [("q", False), ("a+b", True), ("<|eos|>", True)]
    for bad in ("", "a,", "[]", "a+", "[a],[b", "a]b"):
        with pytest.raises(ValueError, match="bad field"):
            parse_fields(bad)


# --- mp3, and guesses --------------------------------------------------------------------------------------


def mp3(rate: int, seconds: float = 1.0) -> bytes:
    out = io.BytesIO()
    wave = (np.sin(np.arange(int(rate * seconds)) * 0.05) * 20_000).astype(np.int16)
    soundfile.write(out, wave, rate, format="MP3")
    return out.getvalue()


@pytest.mark.parametrize("rate", [44_100, 16_000, 8_000])
def test_an_mp3_is_read_whole_and_never_shorter(rate: int) -> None:
    data = mp3(rate)
    assert find_cut(data) == ""
    samples, found = decode_audio(data, where="w")
    assert found == rate and abs(len(samples) - rate) <= 1200
    tagged = b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10) + data + b"TAG" + bytes(125)
    assert find_cut(tagged) == ""
    for cut in range(0, len(data), 97):
        assert find_cut(data[:cut]) != "", cut
    for end in (len(data) - 1, len(data) // 2):
        with pytest.raises(DataError, match="audio"):
            decode_audio(data[:end], where="w")


def test_audio_sets_of_flac_or_mp3_with_json() -> None:
    out = io.BytesIO()
    soundfile.write(out, np.zeros(800, np.int16), 8000, format="FLAC")
    for ending, data in (("flac", out.getvalue()), ("mp3", mp3(16_000))):
        tokenizers = Recorder()
        members = sample(**{ending: data, "json": b'{"text": "rain"}'})
        encode_sample(members, ["caption:json.text?", "audio"], tokenizers)
        assert [name for name, _ in tokenizers.calls] == ["text", "audio"]


@pytest.mark.parametrize(
    ("members", "record", "plan"),
    [
        (["jpg", "txt", "json"], {"caption": "x"}, ("caption", "image")),
        (["jpg", "json"], {"caption": "x"}, ("caption:json.caption", "image")),
        (["jpg", "cls"], None, ("caption:cls", "image")),
        (["flac", "json"], {"text": "x"}, ("caption:json.text", "audio")),
        (["flac", "json"], {"speaker": 3}, ("audio",)),
        (["mp4", "json"], {"caption": "x"}, ("caption:json.caption", "video")),
        (["layer0.png", "layer1.png", "flat.png", "txt"], None, ("caption", "rgba")),
        (["txt"], None, ("text",)),
        (["json"], {"text": "x"}, ("text:json.text",)),
        (["json"], {"fields": "a", "a": "x"}, ("fields",)),
        (["csv"], None, ()),
        (["cls"], None, ()),
    ],
)
def test_guessed_plans(members: list[str], record: Any, plan: tuple[str, ...]) -> None:
    assert guess_plan(members, record) == plan
    if plan:
        parse_plan(plan)
