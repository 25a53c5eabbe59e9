"""The words of LMX and what its writer and reader must agree on: lengths of notes, and which pitch a note head means.

The list is fixed and append-only: the number of a token is its place, so a new one goes at the end. Names up to
`_EXTENSIONS` are those of LMX (Mayer et al., ICDAR 2024); the rest say what plain LMX loses, and are written only then.
"""

from __future__ import annotations

from fractions import Fraction

from ringweave.tokenizers.codec import sha256
from ringweave.tokenizers.manifest import canonical_json

#: Quarters of each note type, longest first.
TYPES: dict[str, Fraction] = {
    name: Fraction(32) / 2**i
    for i, name in enumerate(
        (
            *("maxima", "long", "breve", "whole", "half", "quarter", "eighth"),
            *("16th", "32nd", "64th", "128th", "256th", "512th", "1024th"),
        )
    )
}
STEPS = "CDEFGAB"
PITCHES = tuple(f"{step}{octave}" for octave in range(10) for step in STEPS)
MAX_VOICES, MAX_STAVES, MAX_DOTS = 64, 40, 6
MAX_NUMBER = 999_999  # of a length or a ratio spelled in digits
#: What each accidental does to its step, in semitones.
ACCIDENTALS: dict[str, Fraction] = {
    "sharp": Fraction(1),
    "flat": Fraction(-1),
    "natural": Fraction(0),
    "double-sharp": Fraction(2),
    "flat-flat": Fraction(-2),
    "natural-sharp": Fraction(1),
    "natural-flat": Fraction(-1),
    "sharp-sharp": Fraction(2),
    "quarter-flat": Fraction(-1, 2),
    "quarter-sharp": Fraction(1, 2),
    "three-quarters-flat": Fraction(-3, 2),
    "three-quarters-sharp": Fraction(3, 2),
    "triple-sharp": Fraction(3),
    "triple-flat": Fraction(-3),
}
_PLAIN_ACCIDENTALS = tuple(ACCIDENTALS)[:7]
#: Tuplets: normal notes -> how many actual notes may take their time.
_PLAIN_RATIOS: dict[int, tuple[int, ...]] = {
    1: (2, 7),
    2: (3, 4, 5, 8, 9),
    3: (2, 4, 5),
    4: (5, 6, 7, 9, 10, 18),
    6: (4, 7),
    8: (7, 9, 10, 11, 12, 13, 15, 16),
    12: (11,),
    16: (22, 35),
}
_MORE_RATIOS: dict[int, tuple[int, ...]] = {
    3: (8,),
    4: (2, 3),
    5: (6, 7, 8),
    6: (5, 8, 9, 10, 11),
    7: (8,),
    8: (5, 14, 17),
    12: (7, 10, 13, 14, 16),
    16: (11, 12, 13, 15, 17, 19, 20, 21, 24, 25),
}
#: Semitones a note may differ from its step, by name.
ALTERS: dict[str, Fraction] = {f"alter:{n / 2:g}": Fraction(n, 2) for n in range(-6, 7)}
BEAMS = {
    "begin": "beam:begin",
    "end": "beam:end",
    "forward hook": "beam:forward-hook",
    "backward hook": "beam:backward-hook",
}
STEMS = ("up", "down", "none")
#: Marks written as they are: token -> path under <notations>, in the order of writing.
MARKS: dict[str, str] = {
    "fermata": "fermata",
    "arpeggiate": "arpeggiate",
    "staccato": "articulations/staccato",
    "accent": "articulations/accent",
    "strong-accent": "articulations/strong-accent",
    "tenuto": "articulations/tenuto",
    "trill-mark": "ornaments/trill-mark",
}
TREMOLOS = ("single", "start", "stop", "unmeasured")
MAX_TRANSPOSE = 36
SIGNS_WITHOUT_LINE = ("percussion", "TAB", "none", "jianpu")


def _ratios(table: dict[int, tuple[int, ...]]) -> list[str]:
    return [f"{actual}in{normal}" for normal, actuals in table.items() for actual in actuals]


def _numbered(prefix: str, first: int, last: int) -> list[str]:
    return [f"{prefix}{n}" for n in range(first, last + 1)]


_LMX: list[str] = [
    "measure",
    *_numbered("key:fifths:", -7, 7),
    "time",
    *_numbered("beats:", 1, 16),
    *(f"beat-type:{n}" for n in (2, 4, 8, 16)),
    *(f"clef:{sign}{line}" for sign in "GCF" for line in range(1, 6)),
    *("print-object:no", "grace", "grace:slash", "chord", "rest", "forward", "backup"),
    *PITCHES,
    *_numbered("voice:", 1, 12),
    *TYPES,
    "rest:measure",
    *_ratios(_PLAIN_RATIOS),
    "dot",
    *_PLAIN_ACCIDENTALS,
    *(f"stem:{way}" for way in STEMS),
    *_numbered("staff:", 1, 3),
    *BEAMS.values(),
    *("tied:start", "tied:stop", "tuplet:start", "tuplet:stop", "slur:start", "slur:stop"),
    *MARKS,
    *(f"tremolo:{kind}" for kind in TREMOLOS),
    *_numbered("tremolo:", 1, 4),
]
_EXTENSIONS: list[str] = [
    "part",  # stands between two parts
    *("untyped", "lasts", "ratio", "over"),
    *_numbered("digit:", 0, 9),
    *ALTERS,
    *_numbered("staff:", 4, MAX_STAVES),
    *_numbered("voice:", 13, MAX_VOICES),
    *_numbered("staves:", 1, MAX_STAVES),
    *_numbered("beats:", 17, 64),
    *(f"beat-type:{n}" for n in (1, 32, 64, 128)),
    "time:senza-misura",
    *(f"clef:{sign}" for sign in SIGNS_WITHOUT_LINE),
    *(f"octave-change:{n}" for n in (-3, -2, -1, 1, 2, 3)),
    *("transpose", "transpose:double"),
    *_numbered("diatonic:", -MAX_TRANSPOSE, MAX_TRANSPOSE),
    *_numbered("chromatic:", -MAX_TRANSPOSE, MAX_TRANSPOSE),
    *("unpitched", "cue"),
    *_ratios(_MORE_RATIOS),
    *tuple(ACCIDENTALS)[7:],
    *_numbered("tremolo:", 5, 8),
]
#: Every token; its number is its place.
TOKENS: tuple[str, ...] = (*_LMX, *_EXTENSIONS)
NUMBER: dict[str, int] = {token: i for i, token in enumerate(TOKENS)}
RATIOS = frozenset([*_ratios(_PLAIN_RATIOS), *_ratios(_MORE_RATIOS)])
SIZE = len(TOKENS)
#: What stands before a root, and the roots; every other token stands behind one.
PREFIXES = frozenset(
    [
        *(
            "print-object:no",
            "grace",
            "grace:slash",
            "cue",
            "chord",
            "rest",
            "unpitched",
            "forward",
            "backup",
        ),
        *PITCHES,
        *(token for token in TOKENS if token.startswith("voice:")),
    ]
)
ROOTS = frozenset(
    [
        *("part", "measure", "time", "time:senza-misura", "transpose", "rest:measure", "untyped"),
        *TYPES,
        *(token for token in TOKENS if token.startswith(("key:", "clef:"))),
    ]
)


def digest() -> str:
    """sha256 of the list, in order."""
    return sha256(canonical_json(list(TOKENS)).encode("utf-8"))


def nominal(kind: str, dots: int, ratio: Fraction) -> Fraction:
    """Quarters of a note of this type, dotted, `ratio` = normal over actual notes of its tuplet."""
    return TYPES[kind] * (2 - Fraction(1, 2**dots)) * ratio


def spell(length: Fraction) -> tuple[str, int] | None:
    """(type, dots ≤ 3) that last exactly `length` quarters, or None."""
    for dots in range(4):
        base = length / (2 - Fraction(1, 2**dots))
        for name, value in TYPES.items():
            if value == base:
                return name, dots
    return None


def split(length: Fraction) -> list[str] | None:
    """Types that add up to `length` quarters, longest first, or None where they cannot."""
    if length <= 0 or 256 % length.denominator:
        return None
    names: list[str] = []
    for name, value in TYPES.items():
        count, length = divmod(length, value)
        names += [name] * count
    return names


class Accidentals:
    """Which alteration a note head means: its own accidental, else the tie it ends, else the measure, else the key.

    Positions are quarters from the start of the measure: an accidental holds from there on, on its own staff and
    octave, whatever the order in which voices are written. One object a part, told of every note in order.
    """

    def __init__(self) -> None:
        self._keys: dict[int, int] = {}  # fifths by staff; 0 is every staff
        self._seen: dict[tuple[int, str], list[tuple[Fraction, Fraction]]] = {}
        self._tied: dict[str, Fraction] = {}

    def measure(self) -> None:
        """A measure begins."""
        self._seen.clear()

    def key(self, fifths: int, staff: int | None) -> None:
        """A key signature, of one staff or of all."""
        if staff is None:
            self._keys = {}
        self._keys[staff or 0] = fifths

    def expected(
        self, pitch: str, *, staff: int, at: Fraction, accidental: str | None, tied: bool
    ) -> Fraction:
        """Semitones a reader of the page would take for this head."""
        if accidental is not None:
            return ACCIDENTALS[accidental]
        if tied and pitch in self._tied:
            return self._tied[pitch]
        before = [entry for entry in self._seen.get((staff, pitch), ()) if entry[0] <= at]
        if before:
            return max(before, key=lambda entry: entry[0])[1]
        fifths = self._keys.get(staff, self._keys.get(0, 0))
        sharps = "FCGDAEB"
        if fifths >= 0:
            return Fraction(int(pitch[0] in sharps[:fifths]))
        return Fraction(-int(pitch[0] in sharps[fifths:]))

    def note(
        self,
        pitch: str,
        alter: Fraction,
        *,
        staff: int,
        at: Fraction,
        accidental: str | None,
        stop: bool,
        start: bool,
    ) -> None:
        """Takes note of a note, with what it turned out to be."""
        if accidental is not None:
            entries = self._seen.setdefault((staff, pitch), [])
            entries[:] = [entry for entry in entries if entry[0] != at]
            entries.append((at, ACCIDENTALS[accidental]))
        if stop:
            self._tied.pop(pitch, None)
        if start:
            self._tied[pitch] = alter
