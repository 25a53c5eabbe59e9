"""LMX: a score as a sequence of words, after MusicXML (Mayer et al., ICDAR 2024), written and read back.

A score with one part that plain LMX can say gives the tokens plain LMX has. What it loses is said by further tokens,
written only where they are needed:

    score     := part ("part" part)*
    part      := ("measure" ["staves:N"] item*)*
    item      := key | time | clef | transpose | note | move
    key       := "key:fifths:N" ["staff:N"]
    time      := "time" ("beats:N"+ "beat-type:N")+ ["staff:N"]  |  "time:senza-misura" ["staff:N"]
    clef      := "clef:SIGN" ["octave-change:N"] ["staff:N"]
    transpose := "transpose" "diatonic:N" "chromatic:N" ["transpose:double"] ["staff:N"]
    move      := ("forward" | "backup") (TYPE | "untyped" lasts)
    note      := ["print-object:no"] ["cue"] ["grace" ["grace:slash"]] ["chord"] head ["voice:N"] root [lasts]
                 [ratio] "dot"* [ACCIDENTAL] ["alter:N"] ["stem:WAY"] ["staff:N"] "beam:KIND"* ["tied:stop"]
                 ["tied:start"] "tuplet:KIND"* "slur:KIND"* MARK*
    head      := PITCH | "rest" | "unpitched" [PITCH]
    root      := TYPE | "rest:measure" | "untyped"
    lasts     := "lasts" number      quarters, where the type does not say the length
    ratio     := "3in2" ...  |  "ratio" number
    number    := "digit:D"+ ["over" "digit:D"+]

Voice, staff and stem are told when they change; a measure and a backup make them unknown again. Beams that go on, and
`<backup>` of more than one type, are rebuilt. A pitch is a place on the staff; its alteration follows from its
accidental, a tie, the measure and the key, and `alter:N` stands where the file says something else.

Against the package linearized-musicxml 1.0.0: parts, lengths that differ from the type, alterations without a printed
accidental, more than three staves, transposition, octave clefs and odd ratios are kept; `<tie>` counts as a tie even
without `<tied>`; a full-measure rest is `rest:measure` even where it has a type; neighbouring forwards (or backups)
become one; octaves of `<transpose>` are folded into its intervals; every key of an `<attributes>` is written.

Left out and counted by `dropped`: names, lyrics, dynamics, text, harmony, barlines (repeats too), layout, the mode of a
key, the symbol of a time, the voice of a forward, and further marks. DataError: pitches outside octaves 0 to 9, keys
beyond seven fifths, clefs and times LMX has no token for, notes without a length, and lengths of more than six digits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ringweave.tokenizers import lmx_read, lmx_write, musicxml
from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.lmx_tokens import NUMBER, SIZE, TOKENS, digest

__all__ = ["SIZE", "TOKENS", "decode", "digest", "dropped", "encode", "from_text", "linearize", "to_text"]


def linearize(xml: bytes, *, where: str) -> tuple[list[str], Counter[str]]:
    """(tokens, what was left out and how often) of a .musicxml or .mxl; DataError for what cannot be read or said."""
    written = lmx_write.write(musicxml.read(xml, where=where), where=where)
    return written.tokens, written.dropped


def encode(xml: bytes, *, where: str) -> NDArray[np.int32]:
    """Local ids int32 [n] in [0, SIZE) of a .musicxml or .mxl; DataError for what cannot be read or said."""
    tokens, _ = linearize(xml, where=where)
    return np.asarray([NUMBER[token] for token in tokens], np.int32)


def dropped(xml: bytes, *, where: str) -> Counter[str]:
    """What `encode` leaves out of a score, and how often; nothing of it is a note, a rest or a length."""
    return linearize(xml, where=where)[1]


def decode(ids: ArrayLike) -> tuple[str, bool]:
    """(MusicXML text, whether every id had its place) of any ids: what a model made is read as well as it can be."""
    values: Any = np.asarray(ids).ravel().tolist()
    tokens = [TOKENS[value] for value in values if isinstance(value, int) and 0 <= value < SIZE]
    return lmx_read.read(tokens, well=len(tokens) == len(values))


def to_text(ids: ArrayLike) -> str:
    """The tokens with spaces between them; VocabularyError for ids outside [0, SIZE)."""
    values = np.asarray(ids, np.int64).ravel()
    if values.size and (values.min() < 0 or values.max() >= SIZE):
        raise VocabularyError(f"ids from {values.min()} to {values.max()}", why=f"LMX has {SIZE} tokens")
    return " ".join(TOKENS[value] for value in values.tolist())


def from_text(text: str | Iterable[str]) -> NDArray[np.int32]:
    """Inverse of `to_text`, or ids of a list of tokens; VocabularyError naming a token that is none."""
    tokens = text.split() if isinstance(text, str) else list(text)
    for place, token in enumerate(tokens):
        if token not in NUMBER:
            raise VocabularyError(f"LMX has no token {token[:60]!r}", where=f"token {place + 1}")
    return np.asarray([NUMBER[token] for token in tokens], np.int32)
