"""Text codec: sentencepiece, BPE or unigram, that gives every string back.

Byte fallback, identity normalisation, no dummy prefix, whitespace kept, newline as a piece of its own. What
sentencepiece cannot tell apart is a literal U+2581 from a space (it uses that character for spaces inside),
so U+2581 is written as U+E000 "1" and a literal U+E000 as U+E000 "0" before encoding, and back after.
Lone surrogates are not text in UTF-8 and are refused.

A unigram model takes the path of the highest sum of scores. sentencepiece adds them up in float32 over the
whole string, so where two paths are equal or near, rounding decides, and a library that adds in float64 decides
otherwise (in 2 to 6 % of documents). Here the scores are rounded to 1/256 and the text is cut into
at most 1,024 characters, after a newline if it can be: all sums are exact, so ids do not depend on the library.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from ringweave.tokenizers.codec import sha256
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.manifest import canonical_json
from ringweave.tokenizers.text_model import NORMAL, USER_DEFINED, Piece, changed, pieces_of, type_of

ModelType = Literal["bpe", "unigram"]
ESCAPE, SPACE = "\ue000", "\u2581"
_ESCAPED = re.compile(f"{ESCAPE}([01])")
#: What the trainer and every loaded model must use: anything else loses characters.
NORMALIZER: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}
#: A unigram model sees at most this many characters at once: what is left if it fits, else up to the last newline
#: that fits, else so many.
UNIGRAM_CHUNK = 1024
#: The same as a pattern that Python and Oniguruma (Hugging Face's tokenizers) read alike.
CHUNK_PATTERN = (
    rf"[\s\S]{{1,{UNIGRAM_CHUNK}}}(?![\s\S])|[\s\S]{{0,{UNIGRAM_CHUNK - 1}}}\n|[\s\S]{{{UNIGRAM_CHUNK}}}"
)
SCORE_STEP = 1 / 256
#: sentencepiece's penalty, below the lowest score, of a character that is no piece.
UNKNOWN_PENALTY = 10.0
#: Pieces of every unigram model: "<0x41>" in a text must never need the byte pieces of its own characters,
#: because Hugging Face's unigram would find the byte piece of that name (see text_export.py).
UNIGRAM_CHARACTERS = "".join(map(chr, range(33, 127)))
PROBE = (
    " two  spaces\n\n\ttab\r\n\x00 \u00e9 e\u0301 \u2581 \ue000 \ue0001 \U0001f469\u200d\U0001f4bb <0x41> "
)


def escape(text: str) -> str:
    """`text` without U+2581."""
    if ESCAPE not in text and SPACE not in text:
        return text
    return text.replace(ESCAPE, ESCAPE + "0").replace(SPACE, ESCAPE + "1")


def unescape(text: str) -> str:
    """Inverse of `escape`; a stray U+E000 (possible in generated text only) stays as it is."""
    if ESCAPE not in text:
        return text
    return _ESCAPED.sub(lambda found: ESCAPE if found[1] == "0" else SPACE, text)


def chunks(text: str, *, reach: int = UNIGRAM_CHUNK) -> Iterator[str]:
    """The parts of `text` that a unigram model sees: the matches of CHUNK_PATTERN, without its backtracking (which
    took half as long as sentencepiece itself).

    A cut after a newline changes no id while sums are exact, so parts that meet in one are given together, up to
    `reach` characters: fewer calls.
    """
    held = start = 0
    while len(text) - start > UNIGRAM_CHUNK:
        newline = text.rfind("\n", start, start + UNIGRAM_CHUNK) + 1
        stop = newline or start + UNIGRAM_CHUNK
        if held < start and stop - held > reach:
            yield text[held:start]
            held = start
        if not newline:
            yield text[held:stop]
            held = stop
        start = stop
    if held < start and len(text) - held > reach:
        yield text[held:start]
        held = start
    if held < len(text):
        yield text[held:]


def exact_reach(pieces: Iterable[Piece]) -> int:
    """Characters over which no sum of a unigram model's scores rounds in float32; at least UNIGRAM_CHUNK.

    UNIGRAM_CHUNK also where this cannot be said: scores of other steps, or a piece that reaches over a newline.
    """
    normal = [piece for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)]
    lowest = min((piece.score for piece in normal), default=0.0)
    if any(
        piece.kind == USER_DEFINED
        or piece.score > 0
        or not (piece.score / SCORE_STEP).is_integer()
        or ("\n" in piece.text and piece.text != "\n")
        for piece in normal
    ):
        return UNIGRAM_CHUNK
    return max(UNIGRAM_CHUNK, int(SCORE_STEP * 2**24 / (UNKNOWN_PENALTY - lowest)))


def training_lines(texts: Iterable[str], *, limit: int = 4096) -> Iterator[str]:
    """Lines of at most `limit` characters: the trainer would skip longer ones without a word."""
    for number, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            why = f"text {number} holds a lone surrogate at character {error.start}"
            raise ValueError(why) from error
        for line in escape(text).splitlines(keepends=True):
            for start in range(0, len(line), limit):
                yield line[start : start + limit].replace("\x00", "")


def _with_exact_scores(model: bytes) -> bytes:
    """A unigram model whose scores are multiples of SCORE_STEP, small enough for exact sums in float32.

    The newline becomes a normal piece: no other holds it, so every path goes over it all the same, and
    sentencepiece gives user-defined pieces a score of its own that is no such multiple.
    """
    pieces = []
    for piece in pieces_of(model):
        kind = NORMAL if piece.kind == USER_DEFINED else piece.kind
        pieces.append(Piece(piece.text, round(piece.score / SCORE_STEP) * SCORE_STEP, kind))
    lowest = min((piece.score for piece in pieces if piece.kind == NORMAL), default=0.0)
    if (UNKNOWN_PENALTY - lowest) * UNIGRAM_CHUNK >= SCORE_STEP * 2**24:
        raise DataError(
            "cannot train the text tokenizer",
            why=f"a piece has the score {lowest:.1f}, too low for exact sums",
            fix="use model_type bpe, or a smaller vocabulary",
        )
    return changed(model, pieces)


class TextCodec:
    """text <-> local ids [0, size)."""

    kind = "text"

    def __init__(self, model: bytes, *, where: str = "") -> None:
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # the wrapper raises RuntimeError or TypeError, by version
            raise VocabularyError("not a sentencepiece model", where=where, why=str(error)) from error
        self.model_type = type_of(model)
        self._reach = exact_reach(pieces_of(model)) if self.model_type == "unigram" else 0
        if self.decode(self.encode(PROBE, where=where)) != PROBE:
            raise VocabularyError(
                "this sentencepiece model loses characters",
                where=where,
                why="it normalises, strips whitespace, or has no byte fallback",
                fix="train one with: ringweave tokenizer train",
            )

    @classmethod
    def fit(cls, texts: Iterable[str], *, size: int, model_type: ModelType = "bpe") -> TextCodec:
        """Train on `texts`; equal texts give equal pieces. A corpus too small for `size` pieces gives fewer.

        A unigram model has every printable ASCII character as a piece, so it needs 352 pieces and more.
        """
        if model_type not in get_args(ModelType):
            raise DataError(
                f"there is no text tokenizer of type {model_type!r}",
                fix=f"use {' or '.join(get_args(ModelType))}",
            )
        sink = io.BytesIO()
        required = {"required_chars": UNIGRAM_CHARACTERS} if model_type == "unigram" else {}
        settings: dict[str, Any] = NORMALIZER | required
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=training_lines(texts),
                model_writer=sink,
                model_type=model_type,
                vocab_size=size,
                hard_vocab_limit=False,
                byte_fallback=True,
                user_defined_symbols=["\n"],
                allow_whitespace_only_pieces=True,
                max_sentence_length=1 << 20,
                num_threads=1,  # the vocabulary of some trainers depends on it
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                minloglevel=2,
                **settings,
            )
        except RuntimeError as error:
            raise DataError(
                "cannot train the text tokenizer",
                why=str(error).partition("\n")[0],  # behind it stands where the texts come from
                fix="give it more text, or another size of the vocabulary (text_pieces)",
            ) from error
        model = sink.getvalue()
        return cls(_with_exact_scores(model) if model_type == "unigram" else model)

    @property
    def size(self) -> int:
        """Number of pieces."""
        return self._processor.get_piece_size()

    def piece_hash(self) -> str:
        """sha256 over pieces, scores, kinds and the normaliser; equal vocabularies have equal hashes."""
        model = self._processor
        pieces = [
            [
                model.id_to_piece(i),
                float(model.get_score(i)).hex(),
                [model.is_unknown(i), model.is_control(i), model.is_byte(i), model.is_unused(i)],
            ]
            for i in range(self.size)
        ]
        meaning: dict[str, Any] = {"pieces": pieces, "normalizer": NORMALIZER}
        if self.model_type == "unigram":
            meaning["unigram_chunk"] = UNIGRAM_CHUNK
        return sha256(canonical_json(meaning).encode("utf-8"))

    def encode(self, text: str, *, where: str = "") -> NDArray[np.int32]:
        """Local ids of the whole of `text`, int32 [n]; DataError for a lone surrogate."""
        if not text.isascii():  # which takes no time: a string knows it of itself
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"the text holds a lone surrogate at character {error.start}",
                    where=where,
                    why="it has no UTF-8 form, so it could not be given back",
                    fix="decode the source with the right encoding",
                ) from error
            text = escape(text)
        parts = chunks(text, reach=self._reach) if self.model_type == "unigram" else [text]
        # One by one: sentencepiece makes a pool of threads for a list of texts, which costs more than it saves.
        # Its array shares its memory with bytes, so a single one is copied too.
        ids = [self._processor.encode(part, out_type="numpy") for part in parts]
        return np.concatenate(ids) if ids else np.zeros(0, np.int32)

    def decode(self, ids: NDArray[np.int32]) -> str:
        """Inverse of `encode`; byte pieces that are not UTF-8 become U+FFFD. Ids must lie in [0, size)."""
        return unescape(self._processor.decode(np.asarray(ids).tolist()))

    def to_bytes(self) -> bytes:
        """The sentencepiece model (protobuf)."""
        return self.model

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> TextCodec:
        """Load `to_bytes`."""
        return cls(data, where=where)
