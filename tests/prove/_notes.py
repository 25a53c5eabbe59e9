"""Notes of a score as music21 reads them, to compare two scores note by note."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

#: part, measure, voice, onset, length (both quarters), pitch, tie, grace
Note = tuple[int, int, str, Fraction, Fraction, str, str, bool]


def notes(score: Any) -> Counter[Note]:
    """Every note and every written rest of a music21 score; a staff is a part of its own there.

    Pitches are spelled; each note of a chord counts, with its own tie. Spacers that music21 makes of <forward> are not
    written rests, chord symbols are not notes, and a voice has a name only beside another one.
    """
    found: Counter[Note] = Counter()
    for number, part in enumerate(score.parts):
        for place, measure in enumerate(part.getElementsByClass("Measure")):
            streams = {"": measure, **{str(voice.id): voice for voice in measure.voices}}
            voices = {name: written for name, stream in streams.items() if (written := _written(stream))}
            for name, elements in voices.items():
                for element in elements:
                    where = (number, place, name if len(voices) > 1 else "", Fraction(element.offset))
                    found.update(_heads(element, where))
    return found


def _written(stream: Any) -> list[Any]:
    return [
        element
        for element in stream.notesAndRests
        if "Harmony" not in element.classes and not (element.isRest and element.style.hideObjectOnPrint)
    ]


def _heads(element: Any, where: tuple[int, int, str, Fraction]) -> list[Note]:
    length, grace = Fraction(element.quarterLength), bool(element.duration.isGrace)
    if element.isRest:
        return [(*where, length, "rest", "", grace)]
    heads = getattr(element, "notes", [element])
    return [
        (
            *where,
            length,
            head.pitch.nameWithOctave if hasattr(head, "pitch") else f"unpitched {head.displayName}",
            head.tie.type if head.tie else "",
            grace,
        )
        for head in heads
    ]


def agree(one: Counter[Note], other: Counter[Note]) -> tuple[int, int]:
    """(notes in both, notes in the larger of both)."""
    return (one & other).total(), max(one.total(), other.total())
