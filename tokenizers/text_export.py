"""A `TextCodec` as a Hugging Face `tokenizer.json` that gives the same ids, and the proof that it does.

The file is written as JSON, without that library; `check` loads it with it. What has to be said in its terms:

- The escape of U+2581 and U+E000, and spaces as U+2581, become `Replace` normalizers; there is no dummy prefix.
- BPE: sentencepiece joins whichever neighbours make the piece of the best score, leftmost first. The file has
  ranked pairs instead, so every split of a piece into two pieces becomes a pair, in order of the piece's score.
  Where two pairs of one piece overlap (x|y|z with xy = yz) the file prefers a split and sentencepiece the left
  one; `check` encodes every such string. None was ever found that a text can reach.
- Unigram: the chunks of `TextCodec.encode` become a `Split`. Hugging Face looks for *all* pieces in the text,
  byte pieces and control ids too, so those get a score that no path takes. Its sums are float64: exact like ours.
- The newline is a piece of its own: no pair and no chunk crosses it.
- Control ids have names in the vocabulary but are not "added tokens": those would be matched in the text, and
  "<|eos|>" in a document would end it.

Decoding agrees on all ids that `encode` writes. Of other ids (made by a model) it differs in one thing: in a run
of byte pieces that is not UTF-8 as a whole, sentencepiece keeps the characters that are whole, and Hugging Face's
`ByteFallback` writes U+FFFD for every byte of the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.manifest import CONTROL, CONTROL_SIZE
from ringweave.tokenizers.text import CHUNK_PATTERN, ESCAPE, PROBE, SPACE, TextCodec, unescape
from ringweave.tokenizers.text_model import NORMAL, UNKNOWN, USER_DEFINED, Piece, pieces_of

#: Of what must never be found in a text; an integer, so sums with it stay exact in float64.
NEVER = -100_000.0
#: What sentencepiece decodes its unknown id to. The raw spaces keep it from matching normalised text.
UNKNOWN_TEXT = " \u2047 "
SAMPLES = (
    PROBE,
    "In the beginning God created the heaven and the earth.",
    "\u2581\u2581 \ue0000 \ue000\ue0001",
    "<0x41><unk><|eos|>\r\n\n\t x" + "=" * 41 + " " * 67 + "a" * 33,
    "",
)


def control_name(name: str) -> str:
    """The vocabulary entry of a control id."""
    return f"<|{name}|>"


def tokenizer_json(
    codec: TextCodec, *, start: int = CONTROL_SIZE, control: Mapping[str, int] = CONTROL
) -> str:
    """The text of `tokenizer.json`. start: global id of the codec's first piece; control: names of lower ids.

    VocabularyError for a model that the format cannot express.
    """
    pieces = pieces_of(codec.model)
    for piece in pieces:
        if piece.kind == USER_DEFINED and len(piece.text) > 1:
            raise _inexpressible(f"it has the user-defined piece {piece.text!r} of several characters")
    names = {number: control_name(name) for name, number in control.items() if number < start}
    if codec.model_type == "bpe":
        model, split = _bpe(pieces, start, names), None
    elif codec.model_type == "unigram":
        model, split = _unigram(pieces, start, names), CHUNK_PATTERN
    else:
        raise _inexpressible(f"it is of type {codec.model_type}")
    return json.dumps(_around(model, split), ensure_ascii=False, indent=1)


def write_tokenizer_json(
    codec: TextCodec,
    path: Path,
    *,
    start: int = CONTROL_SIZE,
    control: Mapping[str, int] = CONTROL,
    texts: Iterable[str] = (),
) -> None:
    """Write `path` and `check` it, on `texts` too."""
    Path(path).write_text(tokenizer_json(codec, start=start, control=control), encoding="utf-8")
    check(codec, path, texts, start=start)


def check(codec: TextCodec, path: Path, texts: Iterable[str] = (), *, start: int = CONTROL_SIZE) -> int:
    """Compare ids and decoded text of `path` with the codec's on its own pieces, hard strings and `texts`.

    The number of strings compared; VocabularyError at the first that differs.
    """
    from tokenizers import Tokenizer  # Hugging Face's package, not this folder

    theirs = Tokenizer.from_file(str(path))
    count = 0
    for text in _all_texts(codec, texts):
        ours = (codec.encode(text) + start).tolist()
        found = theirs.encode(text, add_special_tokens=False).ids
        back = theirs.decode(found, skip_special_tokens=False)
        if ours != found or back != text:
            at = next((i for i, (a, b) in enumerate(zip(ours, found)) if a != b), min(len(ours), len(found)))
            raise VocabularyError(
                "the exported text tokenizer disagrees with ours",
                where=str(path),
                why=f"on {text[:40]!r}, from id {at}: {found[at : at + 6]} instead of {ours[at : at + 6]}"
                if ours != found
                else f"{text[:40]!r} is decoded as {back[:40]!r}",
                fix="train the text tokenizer with: ringweave tokenizer train",
            )
        count += 1
    return count


def _all_texts(codec: TextCodec, texts: Iterable[str]) -> Iterator[str]:
    pieces = [piece.text for piece in pieces_of(codec.model) if piece.kind in (NORMAL, USER_DEFINED)]
    yield from SAMPLES
    for text in (*pieces, *_overlaps(pieces)):
        yield unescape(text.replace(SPACE, " "))
    yield from texts


def _overlaps(pieces: list[str]) -> Iterator[str]:
    """x + y + z for all pieces with xy = yz a piece and x != y: where pairs of equal score overlap."""
    known = set(pieces)
    for piece in pieces:
        for cut in range(1, len(piece)):
            x, y = piece[:cut], piece[cut:]
            z = piece[len(y) :]
            if x != y and piece.startswith(y) and {x, y, z} <= known:
                yield x + y + z


def _inexpressible(why: str) -> VocabularyError:
    return VocabularyError(
        "this sentencepiece model has no equal tokenizer.json",
        why=why,
        fix="train one with: ringweave tokenizer train",
    )


def _bpe(pieces: list[Piece], start: int, names: dict[int, str]) -> dict[str, Any]:
    normal = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in sorted(normal, key=lambda text: -normal[text])  # stable: equal scores by id
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    vocab = {name: number for number, name in names.items()}
    for number, piece in enumerate(pieces, start):
        if (text := _entry(piece)) in vocab:
            raise _inexpressible(f"two ids have the name {text!r}")
        vocab[text] = number
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True, "ignore_merges": False,
        "vocab": vocab, "merges": merges,
    }  # fmt: skip


def _unigram(pieces: list[Piece], start: int, names: dict[int, str]) -> dict[str, Any]:
    normal = {piece.text for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)}
    reserved = [names.get(number, control_name(f"reserved_{number}")) for number in range(start)]
    vocab: list[tuple[str, float]] = [(name, NEVER) for name in reserved]
    vocab += [(_entry(p), p.score if p.kind in (NORMAL, USER_DEFINED) else NEVER) for p in pieces]
    if len({text for text, _ in vocab}) != len(vocab):
        raise _inexpressible("two ids have the same name")
    for text in [*reserved, *(piece.text for piece in pieces if piece.kind != UNKNOWN)]:
        # With a character that is no piece, the only path might lead over an entry meant never to be taken.
        if lacking := set(text) - normal:
            raise _inexpressible(f"{min(lacking)!r} stands in {text!r} but is no piece")
    unknown = next((i for i, piece in enumerate(pieces, start) if piece.kind == UNKNOWN), None)
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": True}


def _entry(piece: Piece) -> str:
    return UNKNOWN_TEXT if piece.kind == UNKNOWN else piece.text


def _around(model: dict[str, Any], split: str | None) -> dict[str, Any]:
    """The whole file around a model."""

    def replace(what: str, content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": {"String": what}, "content": content}

    chunks = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                replace(ESCAPE, ESCAPE + "0"), replace(SPACE, ESCAPE + "1"), replace(" ", SPACE)
            ],
        },
        "pre_tokenizer": chunks if split else None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                replace(SPACE, " "),  # first: bytes of a literal U+2581 are not a space
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                replace(ESCAPE + "1", SPACE),
                replace(ESCAPE + "0", ESCAPE),
            ],
        },
        "model": model,
    }  # fmt: skip


def transformers_config(*, context: int) -> dict[str, Any]:
    """The `tokenizer_config.json` beside it, by which transformers' AutoTokenizer finds the file.

    transformers makes bos, eos and pad into added tokens; `split_special_tokens` keeps it from finding them in text.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": control_name("bos"),
        "eos_token": control_name("eos"),
        "pad_token": control_name("pad"),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
