"""A `tokenizer.json` gives the ids of the codec it was made of, read by Hugging Face's own library."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import HARD, documents

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.manifest import CONTROL
from ringweave.tokenizers.text import ModelType, TextCodec
from ringweave.tokenizers.text_export import check, tokenizer_json, transformers_config, write_tokenizer_json
from ringweave.tokenizers.text_model import BYTE, changed, pieces_of
from tokenizers import Tokenizer  # Hugging Face's

START = 256
#: Runs and overlaps, on which pairs and sums of equal score are found.
PERIODIC = ("=" * 300, "ab" * 200, "aba abab aab " * 50, "-=" * 100, " " * 300, "abcabcab " * 40, "a" * 500)


def fit(model_type: ModelType) -> TextCodec:
    return TextCodec.fit([*documents(150, seed=1), *PERIODIC], size=900, model_type=model_type)


@pytest.fixture(scope="module")
def bpe() -> TextCodec:
    return fit("bpe")


@pytest.fixture(scope="module")
def unigram() -> TextCodec:
    return fit("unigram")


@pytest.fixture(scope="module", params=get_args(ModelType))
def codec(request: pytest.FixtureRequest) -> TextCodec:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def path(codec: TextCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "tokenizer.json"
    write_tokenizer_json(codec, path)
    return path


@pytest.fixture(scope="module")
def theirs(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def differs(codec: TextCodec, theirs: Tokenizer, text: str) -> bool:
    """Whether ids or decoded text differ."""
    ours = codec.encode(text) + START
    found = theirs.encode(text, add_special_tokens=False).ids
    return ours.tolist() != found or theirs.decode(found, skip_special_tokens=False) != text


def test_2000_documents(codec: TextCodec, theirs: Tokenizer) -> None:
    texts = documents(2000, seed=5)
    assert [text for text in texts if differs(codec, theirs, text)] == []


def test_long_text_of_one_line(codec: TextCodec, theirs: Tokenizer) -> None:
    """150,000 characters: where sums in float32 would have rounded, and nothing cuts the text."""
    text = "".join(documents(180, seed=6)).replace("\n", " ")
    assert len(text) > 100_000
    assert not differs(codec, theirs, text)
    assert not differs(codec, theirs, text.replace(" ", ""))


def test_random_unicode(codec: TextCodec, theirs: Tokenizer) -> None:
    characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from(HARD)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(characters, max_size=30))
    def check_one(parts: list[str]) -> None:
        assert not differs(codec, theirs, "".join(parts))

    check_one()


def test_runs_and_overlaps(codec: TextCodec, theirs: Tokenizer) -> None:
    rng = random.Random(0)
    alphabets = ("a", "ab", "ab ", " =", "-=", "abc", "<0x41>", "unk<|>", "\u2581\ue00001 ", "\n\r\t ")
    texts = [c * n for c in "a= -\t" for n in range(1, 120)]
    texts += ["".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 80))) for _ in range(3000)]
    assert [text for text in texts if differs(codec, theirs, text)] == []


@pytest.mark.parametrize(
    "text", ["<|eos|>", "<|bos|> x", "<0x41><0x0A>", "<unk>", "<|reserved_13|>", " \u2047 "]
)
def test_names_of_ids_in_a_text_are_text(codec: TextCodec, theirs: Tokenizer, text: str) -> None:
    found = np.array(theirs.encode(text, add_special_tokens=False).ids)
    assert found.min() >= START and not differs(codec, theirs, text)
    kinds = [piece.kind for piece in pieces_of(codec.model)]
    bytes_of_text = sum(len(c.encode()) for c in text if ord(c) > 127)
    assert sum(kinds[number - START] == BYTE for number in found) <= bytes_of_text


def test_ids_that_no_text_gives(codec: TextCodec, theirs: Tokenizer) -> None:
    """Decoding agrees on any pieces; on bytes only where a run of them is UTF-8 as a whole."""
    pieces = pieces_of(codec.model)
    rng = np.random.default_rng(0)
    plain = np.array([i for i, piece in enumerate(pieces) if piece.kind != BYTE])
    for _ in range(300):
        ids = rng.choice(plain, rng.integers(1, 30))
        assert theirs.decode((ids + START).tolist(), skip_special_tokens=False) == codec.decode(ids)
    byte = {piece.text: i for i, piece in enumerate(pieces) if piece.kind == BYTE}
    space = [byte[f"<0x{b:02X}>"] for b in "\u2581".encode()]
    assert theirs.decode([i + START for i in space]) == codec.decode(np.array(space)) == "\u2581"
    torn = [byte["<0x41>"], byte["<0xE2>"]]
    assert codec.decode(np.array(torn)) == "A\ufffd"
    assert theirs.decode([i + START for i in torn]) == "\ufffd\ufffd"  # what the module says of ByteFallback


def test_control_ids_have_names_but_are_not_in_the_way(theirs: Tokenizer) -> None:
    assert all(theirs.token_to_id(f"<|{name}|>") == number for name, number in CONTROL.items())
    assert theirs.get_added_tokens_decoder() == {}


def test_another_start(codec: TextCodec, tmp_path: Path) -> None:
    for start in (0, 1024):
        write_tokenizer_json(codec, tmp_path / "t.json", start=start, texts=["some text"])
        found = Tokenizer.from_file(str(tmp_path / "t.json")).encode("some text").ids
        assert found == (codec.encode("some text") + start).tolist()


def test_equal_codecs_give_equal_files(codec: TextCodec) -> None:
    again = TextCodec.from_bytes(codec.to_bytes(), where="")
    assert tokenizer_json(again) == tokenizer_json(codec)


def _other_merges(file: dict[str, Any]) -> None:
    file["model"]["merges"] = file["model"]["merges"][::-1]


def _no_escape(file: dict[str, Any]) -> None:
    del file["normalizer"]["normalizers"][1]


def _no_unescape(file: dict[str, Any]) -> None:
    del file["decoder"]["decoders"][-1]


def _scores_of_bytes(file: dict[str, Any]) -> None:
    file["model"]["vocab"] = [[text, max(score, -20.0)] for text, score in file["model"]["vocab"]]


@pytest.mark.parametrize(
    ("kind", "damage"),
    [("bpe", _other_merges), ("bpe", _no_escape), ("unigram", _no_unescape), ("unigram", _scores_of_bytes)],
)
def test_check_finds_what_is_wrong(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, damage: Callable[[dict[str, Any]], None]
) -> None:
    codec, path = request.getfixturevalue(kind), tmp_path / "tokenizer.json"
    file = json.loads(tokenizer_json(codec))
    path.write_text(json.dumps(file), encoding="utf-8")
    assert check(codec, path, ["more"]) > codec.size - 256
    damage(file)
    path.write_text(json.dumps(file), encoding="utf-8")
    with pytest.raises(VocabularyError, match="disagrees with ours"):
        check(codec, path)


def test_models_without_an_equal_file_are_refused(unigram: TextCodec) -> None:
    """A control id whose name has a character that is no piece."""
    with pytest.raises(VocabularyError) as caught:
        tokenizer_json(unigram, control={"\U00010300": 3})
    assert "'\U00010300' stands in '<|\U00010300|>' but is no piece" in caught.value.why


def test_rounding_matters_for_unigram(unigram: TextCodec) -> None:
    """Scores off their steps: sums in float32 and float64 differ, and so do ids (6 % of these documents)."""
    moved = [replace(p, score=p.score * 1.000123) for p in pieces_of(unigram.model)]
    inexact = TextCodec(changed(unigram.model, moved))
    theirs = Tokenizer.from_str(tokenizer_json(inexact))
    assert any(differs(inexact, theirs, text) for text in documents(2000, seed=5)[400:650])


@pytest.mark.slow
def test_transformers_loads_it(codec: TextCodec, path: Path) -> None:
    from transformers import AutoTokenizer

    config = transformers_config(context=4096)
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(path.parent)
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    for text in (*HARD, "the <|eos|> of\n\n  it", *documents(50, seed=7)):
        ids = (codec.encode(text) + START).tolist()
        assert loaded.encode(text, add_special_tokens=False) == ids
        assert loaded(text, add_special_tokens=False).input_ids == ids
        assert loaded.decode([1, *ids, 2], skip_special_tokens=True) == text
