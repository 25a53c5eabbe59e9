"""The bytes of a sentencepiece model: its pieces, its type, and new scores and kinds for them.

The file is a protobuf message (sentencepiece_model.proto): field 1 repeated pieces {1: text, 2: score as
float32, 3: kind}, field 2 trainer settings {3: model type}. Sixty lines read what is needed of it, so that
nothing here depends on the version of the protobuf library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ringweave.tokenizers.errors import VocabularyError

NORMAL, UNKNOWN, CONTROL_PIECE, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("number of more than 64 bits")


def _fields(data: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, value of a varint, start, stop of its bytes) of each field in data[at:stop]."""
    while at < stop:
        key, at = _varint(data, at)
        wire, value, begin = key & 7, 0, at
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 2:
            length, begin = _varint(data, at)
            at = begin + length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at > stop:
            raise ValueError("a field ends after its message")
        yield key >> 3, value, begin, at


def _read(model: bytes) -> tuple[list[Piece], list[tuple[int, int]], str]:
    """Pieces, where the bytes hold the (score, kind) of each (-1: left out), and the model's type."""
    pieces, places, kind = [], [], "unigram"
    try:
        for number, _, start, stop in _fields(model, 0, len(model)):
            if number == 1:
                text, place, kind_place, piece_kind = "", -1, -1, NORMAL
                for field, value, begin, end in _fields(model, start, stop):
                    if field == 1:
                        text = model[begin:end].decode("utf-8")
                    elif field == 2:
                        place = begin
                    elif field == 3:
                        kind_place, piece_kind = begin, value
                score = struct.unpack_from("<f", model, place)[0] if place >= 0 else 0.0
                pieces.append(Piece(text, score, piece_kind))
                places.append((place, kind_place))
            elif number == 2:
                for field, value, _, _ in _fields(model, start, stop):
                    if field == 3:
                        kind = _TYPES.get(value, str(value))
    except (ValueError, IndexError, struct.error) as error:
        raise VocabularyError("not a sentencepiece model", why=f"{type(error).__name__}: {error}") from error
    return pieces, places, kind


def pieces_of(model: bytes) -> list[Piece]:
    """All pieces, in order of their ids; VocabularyError for other bytes than a model's."""
    return _read(model)[0]


def type_of(model: bytes) -> str:
    """ "unigram", "bpe", "word" or "char"."""
    return _read(model)[2]


def changed(model: bytes, pieces: Sequence[Piece]) -> bytes:
    """The same model with the scores and kinds of `pieces`, one for each of its own; their texts stay.

    What the file leaves out (a score of 0, the kind NORMAL) cannot be changed: ValueError.
    """
    olds, places, _ = _read(model)
    if len(pieces) != len(olds):
        raise ValueError(f"{len(pieces)} pieces for a model of {len(olds)}")
    out = bytearray(model)
    for old, new, (score, kind) in zip(olds, pieces, places):
        if (score < 0 and new.score != old.score) or (kind < 0 and new.kind != old.kind):
            raise ValueError(f"the file leaves out the score or kind of {old.text!r}")
        if score >= 0:
            struct.pack_into("<f", out, score, new.score)
        if kind >= 0:
            out[kind] = new.kind
    return bytes(out)
