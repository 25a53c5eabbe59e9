"""The text vocabulary as a transformers fast tokenizer, id for id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.manifest import CONTROL
from ringweave.tokenizers.text import ESCAPE, PROBE, SPACE

SAMPLES = (
    PROBE,
    "In the beginning God created the heaven and the earth.",
    "a photograph: café\n\n\tx  y ",
    "\u2581\ue000",
    "",
)


def write_fast_tokenizer(tokenizers: Any, out: Path, *, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for the text ids of a TokenizerSet.

    Raises VocabularyError when the result would not give the same ids as ours.
    """
    from transformers import PreTrainedTokenizerFast

    codec, start = tokenizers.codecs["text"], tokenizers.manifest.block("text").start
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_build(codec.model, start), bos_token=_control("bos"), eos_token=_control("eos"),
        pad_token=_control("pad"), model_max_length=context, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    for text in SAMPLES:
        ours = (codec.encode(text) + start).tolist()
        theirs = fast.encode(text, add_special_tokens=False)
        if ours != theirs or fast.decode(theirs) != text:
            raise VocabularyError(
                "the exported text tokenizer disagrees with ours",
                where=str(out),
                why=f"on {text[:40]!r}: {theirs[:8]} instead of {ours[:8]}",
            )
    fast.save_pretrained(out)


def _control(name: str) -> str:
    return f"<|{name}|>"


def _build(model: bytes, start: int) -> Any:
    """A `tokenizers` BPE with the pieces of a sentencepiece model at their global ids."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    rank = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    special = {i for i in rank.values() if pieces.is_unknown(i) or pieces.is_byte(i) or pieces.is_control(i)}
    mergeable = {p for p, i in rank.items() if i not in special}
    # sentencepiece joins whichever neighbours make the best-scored piece: every split of a piece is a merge.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(mergeable, key=lambda p: rank[p])
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]
    vocab = {_control(name): number for name, number in CONTROL.items()} | {
        p: start + i for p, i in rank.items()
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(ESCAPE, ESCAPE + "0"),
            normalizers.Replace(SPACE, ESCAPE + "1"),
            normalizers.Replace(" ", SPACE),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(SPACE, " "),
            decoders.Replace(ESCAPE + "1", SPACE),
            decoders.Replace(ESCAPE + "0", ESCAPE),
        ]
    )
    return tokenizer
