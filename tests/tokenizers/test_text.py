"""Text comes back character for character, or is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.text import TextCodec, escape, unescape

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
    import io

    import sentencepiece

    sink = io.BytesIO()
    lines = iter(["some words to learn from\n"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=sink, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(VocabularyError, match="loses characters"):
        TextCodec(sink.getvalue())
    with pytest.raises(VocabularyError):
        TextCodec(b"not a model")
