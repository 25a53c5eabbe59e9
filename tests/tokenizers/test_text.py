"""Text comes back character for character, or is refused."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import HARD as HARD_PARTS
from text_samples import documents

from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.members import text_of
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.text import (
    SCORE_STEP,
    UNIGRAM_CHUNK,
    UNKNOWN_PENALTY,
    ModelType,
    TextCodec,
    escape,
    unescape,
)
from ringweave.tokenizers.text_model import NORMAL, changed, pieces_of, type_of

HARD = [
    "",
    " ",
    "  two  spaces ",
    "\n\n\nlines\r\n\ttabs\x00\x07",
    "\u2581 a literal lower block \u2581\u2581",
    "\ue000 \ue0000 \ue0001 \u2581\ue000",
    "<0x41><unk><s></s> ⁇ \ufffd",
    "\ufeff\u200b\u00a0\u3000\u2028",
    "e\u0301 \u00e9 \ufb01 \u212b",
    "\U0001f469\u200d\U0001f469\u200d\U0001f466 \U0010ffff",
    "\u6f22\u5b57 \u0639\u0631\u0628\u064a",
]


@pytest.mark.parametrize("text", HARD)
def test_hard_text_comes_back(tokenizers: TokenizerSet, text: str) -> None:
    codec = tokenizers.codecs["text"]
    assert codec.decode(codec.encode(text)) == text


def test_any_text_comes_back(tokenizers: TokenizerSet) -> None:
    codec = tokenizers.codecs["text"]

    @settings(max_examples=300, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    def check(text: str) -> None:
        assert codec.decode(codec.encode(text)) == text
        assert unescape(escape(text)) == text

    check()


def test_every_character_comes_back(tokenizers: TokenizerSet) -> None:
    codec = tokenizers.codecs["text"]
    everything = "".join(chr(c) for c in range(0, sys.maxunicode + 1, 7) if not 0xD800 <= c < 0xE000)
    assert codec.decode(codec.encode(everything)) == everything


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogates_are_refused(tokenizers: TokenizerSet, text: str) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizers.text_segment(text)
    with pytest.raises(DataError, match="cannot train the text tokenizer") as caught:
        TextCodec.fit(["plain words\n"] * 20 + [text], size=300)
    assert "text 20 holds a lone surrogate" in caught.value.why
    with pytest.raises(DataError, match="not UTF-8"):
        text_of({"txt": text.encode("utf-8", "surrogatepass")}, where="x")


def test_random_ids_decode_to_some_text(tokenizers: TokenizerSet) -> None:
    codec = tokenizers.codecs["text"]
    ids = np.random.default_rng(0).integers(0, codec.size, 500, dtype=np.int32)
    assert isinstance(codec.decode(ids), str)


def test_equal_training_gives_equal_pieces() -> None:
    texts = [f"line {i} of some text, again and again\n" * 3 for i in range(50)]
    first, second = (TextCodec.fit(texts, size=300) for _ in range(2))
    assert first.piece_hash() == second.piece_hash()
    assert first.piece_hash() != TextCodec.fit(texts, size=290).piece_hash()


def test_long_lines_are_not_dropped_in_training() -> None:
    codec = TextCodec.fit(["quixotic " * 4000, "plain\n"], size=300)
    assert len(codec.encode("quixotic quixotic")) <= 4


def test_a_model_that_normalises_is_refused() -> None:
    sink = io.BytesIO()
    lines = iter(["some words to learn from\n"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=sink, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(VocabularyError, match="loses characters"):
        TextCodec(sink.getvalue())
    with pytest.raises(VocabularyError):
        TextCodec(b"not a model")


TYPES: tuple[ModelType, ...] = get_args(ModelType)


@pytest.fixture(scope="module", params=TYPES)
def trained(request: pytest.FixtureRequest) -> TextCodec:
    """A codec of each type, of 160 KB of text."""
    return TextCodec.fit(documents(300, seed=1), size=900, model_type=request.param)


def test_types(trained: TextCodec) -> None:
    assert trained.model_type == type_of(trained.model) in TYPES
    assert TextCodec.from_bytes(trained.to_bytes(), where="").piece_hash() == trained.piece_hash()
    with pytest.raises(DataError, match="no text tokenizer of type 'word'"):
        TextCodec.fit(["text"], size=300, model_type="word")  # type: ignore[arg-type]


def test_5000_documents_come_back(trained: TextCodec) -> None:
    texts = documents(5000)
    assert len(set(texts)) == 5000
    joined = "".join(texts)
    assert all(part in joined for part in HARD_PARTS)
    assert [text for text in texts if trained.decode(trained.encode(text)) != text] == []


def test_any_text_of_any_type_comes_back(trained: TextCodec) -> None:
    characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from(HARD_PARTS)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(characters, max_size=30))
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        assert trained.decode(trained.encode(text)) == text

    check()


TRAIN = """
import sys
sys.path.append(sys.argv[1])
from text_samples import documents
from ringweave.tokenizers.text import TextCodec
print(*(TextCodec.fit(documents(30, seed=2), size=600, model_type=t).piece_hash() for t in ("bpe", "unigram")))
"""


def test_three_processes_of_other_threads_train_the_same_pieces() -> None:
    """And another random seed of the hash tables of each, which sentencepiece goes through in training."""
    found = set()
    for threads in ("1", "2", "4"):
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        argv = [sys.executable, "-c", TRAIN, str(Path(__file__).parent)]
        made = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
        found.add(made.stdout)
    [hashes] = found
    assert len(set(hashes.split())) == 2


def test_the_hash_of_a_bpe_vocabulary_is_what_it_was() -> None:
    """Made before there were other types; this number is in manifests."""
    codec = TextCodec.fit([f"line {i} of some text, again and again\n" * 3 for i in range(50)], size=300)
    assert codec.piece_hash() == "ebf9c69a79c3a221163111c1d4329c040e101ffa636bbe260eae9b3611e186f7"


def best_path(text: str, pieces: dict[str, tuple[int, int]], unknown: int) -> list[str]:
    """Pieces of the highest sum, in whole numbers; of equal sums the one whose last piece is longest."""
    best: list[tuple[int, int] | None] = [(0, 0)] + [None] * len(text)
    for start in range(len(text)):
        so_far = best[start]
        assert so_far is not None
        for stop in range(start + 1, min(start + 16, len(text)) + 1):
            piece = text[start:stop]
            if piece in pieces or stop == start + 1:
                total = so_far[0] + (pieces[piece][1] if piece in pieces else unknown)
                other = best[stop]
                if other is None or total > other[0]:
                    best[stop] = (total, start)
    out, stop = [], len(text)
    while stop:
        node = best[stop]
        assert node is not None
        out.append(text[node[1] : stop])
        stop = node[1]
    return out[::-1]


def plain_unigram(codec: TextCodec, text: str) -> list[int]:
    """What `encode` of a unigram codec must give, by `best_path` over each part of the text."""
    listed = pieces_of(codec.model)
    pieces = {p.text: (i, round(p.score / SCORE_STEP)) for i, p in enumerate(listed) if p.kind == NORMAL}
    unknown = min(score for _, score in pieces.values()) - round(UNKNOWN_PENALTY / SCORE_STEP)
    numbers = {p.text: i for i, p in enumerate(listed)}
    ids: list[int] = []
    left = escape(text).replace(" ", "\u2581")
    while left:
        newline = left.rfind("\n", 0, UNIGRAM_CHUNK) + 1
        end = len(left) if len(left) <= UNIGRAM_CHUNK else newline or UNIGRAM_CHUNK
        for piece in best_path(left[:end], pieces, unknown):
            if piece in pieces:
                ids.append(pieces[piece][0])
            else:
                ids += [numbers[f"<0x{byte:02X}>"] for byte in piece.encode("utf-8")]
        left = left[end:]
    return ids


def test_unigram_is_the_best_path_in_whole_numbers() -> None:
    """Scores are exact, so ids are what a plain Viterbi in integers gives, on runs of equal sums too."""
    codec = TextCodec.fit(
        [*documents(60, seed=1), "=" * 400, " " * 400, "abab" * 100], size=700, model_type="unigram"
    )
    assert all((p.score / SCORE_STEP).is_integer() for p in pieces_of(codec.model))
    long = "".join(documents(45, seed=3)).replace("\n", " ")
    assert len(long) > 15 * UNIGRAM_CHUNK
    for text in (
        *HARD,
        *documents(15, seed=4),
        "\n".join(documents(9, seed=8)),
        long,
        *(c * n for c in "=- a" for n in range(1, 60)),
        "ab" * 777,
    ):
        assert codec.encode(text).tolist() == plain_unigram(codec, text), text[:40]


def test_a_model_file_is_read_as_sentencepiece_reads_it(trained: TextCodec) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.model)
    pieces = pieces_of(trained.model)
    assert len(pieces) == model.get_piece_size() == trained.size
    for i, piece in enumerate(pieces):
        assert (piece.text, piece.score) == (model.id_to_piece(i), model.get_score(i))
        assert (piece.kind == 6, piece.kind == 2) == (model.is_byte(i), model.is_unknown(i))
    others = [replace(p, score=-float(i), kind=1 if p.kind == 4 else p.kind) for i, p in enumerate(pieces)]
    model = sentencepiece.SentencePieceProcessor(model_proto=changed(trained.model, others))
    assert [model.get_score(i) for i in range(len(pieces))] == [p.score for p in others]
    assert pieces_of(changed(trained.model, others)) == others
    with pytest.raises(ValueError, match="for a model of"):
        changed(trained.model, others[1:])
    for bad in (trained.model[:-3], trained.model[: len(trained.model) // 2 + 1], b"\x0a\xff", b"\xff" * 20):
        with pytest.raises(VocabularyError, match="not a sentencepiece model"):
            pieces_of(bad)
