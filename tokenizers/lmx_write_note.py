"""MusicXML notes to LMX tokens, and what all writing of tokens needs; used by `lmx_write.py`."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from xml.etree.ElementTree import Element

from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.lmx_tokens import (
    ACCIDENTALS,
    ALTERS,
    BEAMS,
    MARKS,
    MAX_DOTS,
    MAX_NUMBER,
    MAX_STAVES,
    NUMBER,
    PITCHES,
    RATIOS,
    STEMS,
    TREMOLOS,
    TYPES,
    Accidentals,
    nominal,
    spell,
    split,
)
from ringweave.tokenizers.musicxml import refuse

_ALTER_NAMES = {value: name for name, value in ALTERS.items()}
_KNOWN = frozenset(
    [
        *("grace", "cue", "chord", "pitch", "unpitched", "rest", "duration", "tie", "voice", "type", "dot"),
        *("accidental", "time-modification", "stem", "staff", "beam", "notations"),
    ]
)
_NOTATIONS_KNOWN = frozenset([*MARKS.values(), "tied", "tuplet", "slur", "ornaments/tremolo"])
_GROUPS = ("articulations", "ornaments", "technical")  # under <notations>: their children are the marks
_MAX_GAP = 2048  # quarters of one forward or backup


class TokenWriter:
    """What the tokens of a part have said so far, so that only changes are written."""

    def __init__(self, tokens: list[str], dropped: Counter[str], *, where: str) -> None:
        self.tokens, self.dropped, self.where = tokens, dropped, where
        self.number = ""  # of the measure
        self.divisions: Fraction | None = None  # units a quarter
        self.bar: Fraction | None = None  # quarters a measure
        self.voices: dict[str, int] = {}  # by name
        self.accidentals = Accidentals()
        self.now = self.start = Fraction(0)  # quarters from the start of the measure; start of the last note
        self.can_chord = False
        self.gap: tuple[str, Fraction] = ("", Fraction(0))  # forward or backup not written yet
        self.forget()

    def forget(self) -> None:
        """At a measure and after a backup, voice, staff and stems are told anew."""
        self.voice: int | None = None
        self.staff: int | None = None
        self.stem: str | None = None

    def emit(self, token: str) -> None:
        """Adds a token, behind the gap before it."""
        if self.gap[0]:
            self.write_gap()
        if token not in NUMBER:
            raise self.refuse(f"LMX has no token {token[:60]!r}")
        self.tokens.append(token)

    def refuse(self, why: str) -> DataError:
        """An error that names the measure."""
        return refuse(
            f"{self.where}, measure {self.number}", why, "simplify this place, or leave the score out"
        )

    def whole(self, element: Element, text: str | None, low: int, high: int) -> int:
        """`text` of `element` as a whole number from `low` to `high`."""
        digits = (text or "").strip()
        try:
            value = int(digits if len(digits) <= 12 else "")
        except ValueError:
            raise self.refuse(f"<{element.tag}> holds {digits[:40]!r}, not a whole number") from None
        if not low <= value <= high:
            raise self.refuse(f"<{element.tag}> is {value}, not {low} to {high}")
        return value

    def staff_of(self, element: Element) -> int:
        """Its `number` attribute: the staff of a clef, key or time."""
        return self.whole(element, element.get("number", "1"), 1, MAX_STAVES)

    def fraction(self, element: Element) -> Fraction:
        """Its text as an exact number."""
        text = (element.text or "").strip()
        try:
            if len(text) > 24 or "e" in text.lower():
                raise ValueError
            return Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise self.refuse(f"<{element.tag}> holds {text[:40]!r}, not a number") from None

    def quarters(self, element: Element) -> Fraction | None:
        """The <duration> of a note, backup or forward."""
        duration = element.find("duration")
        if duration is None:
            return None
        if self.divisions is None:
            raise self.refuse("a <duration> stands before the first <divisions>")
        length = self.fraction(duration) / self.divisions
        if length < 0 or (length == 0 and element.tag == "note"):
            raise self.refuse(f"a <{element.tag}> lasts {length} quarters")
        return length

    def _digits(self, value: Fraction) -> None:
        if max(value.numerator, value.denominator) > MAX_NUMBER:
            raise self.refuse(f"a length or ratio of {value} needs more than six digits")
        for digit in str(value.numerator):
            self.emit(f"digit:{digit}")
        if value.denominator > 1:
            self.emit("over")
            for digit in str(value.denominator):
                self.emit(f"digit:{digit}")

    def move(self, kind: str, length: Fraction) -> None:
        """A forward or backup: written with the next token, so that neighbours of one kind become one."""
        if self.gap[0] != kind:
            self.write_gap()
        self.gap = (kind, self.gap[1] + length)
        self.now += length if kind == "forward" else -length
        if self.now < 0:
            raise self.refuse(f"a <backup> to {-self.now} quarters before the measure")
        self.can_chord = False

    def write_gap(self) -> None:
        """The tokens of the forward or backup that waits, if one does."""
        kind, length = self.gap
        self.gap = ("", Fraction(0))
        if not kind:
            return
        if length > _MAX_GAP:
            raise self.refuse(f"a <{kind}> of {length} quarters")
        names = split(length)
        for name in names or ["untyped"]:
            self.emit(kind)
            self.emit(name)
        if names is None:
            self.emit("lasts")
            self._digits(length)
        if kind == "backup":
            self.forget()


class NoteWriter(TokenWriter):
    """Adds the tokens of one note."""

    def note(self, note: Element) -> None:
        """All tokens of a <note>, and the position behind it."""
        grace, chord = note.find("grace"), note.find("chord") is not None
        if chord and not self.can_chord:
            raise self.refuse("a <chord/> without a note before it")
        if note.get("print-object") == "no":
            self.emit("print-object:no")
        if note.find("cue") is not None:
            self.emit("cue")
        if grace is not None:
            self.emit("grace")
            if grace.get("slash") == "yes":
                self.emit("grace:slash")
        if chord:
            self.emit("chord")
        at = self.start if chord else self.now
        pitch = self._head(note)
        self._voice(note)
        length = self._root(note, grace is not None)
        accidental = self._accidental(note)
        staff = note.find("staff")
        staff_number = (
            self.whole(staff, staff.text, 1, MAX_STAVES) if staff is not None else 1 if self.staff else None
        )
        ties = self._ties(note)
        if pitch is not None:
            self._alter(note, pitch, accidental, ties, staff=staff_number or 1, at=at)
        self._stem(note)
        if staff_number is not None and staff_number != self.staff:
            self.emit(f"staff:{staff_number}")
            self.staff = staff_number
        self._beams(note, chord)
        self._notations(note, ties)
        for child in note:
            if child.tag not in _KNOWN:
                self.dropped[child.tag] += 1
        if not chord:
            self.start = self.now
            self.now += length
        self.can_chord = True

    def _head(self, note: Element) -> str | None:
        """Pitch, rest or unpitched; returns the pitch without its alteration."""
        pitch, unpitched = note.find("pitch"), note.find("unpitched")
        if note.find("rest") is not None:
            self.emit("rest")
            if note.find("rest/display-step") is not None:
                self.dropped["rest (its height)"] += 1
            return None
        if unpitched is not None:
            self.emit("unpitched")
            step, octave = unpitched.findtext("display-step"), unpitched.findtext("display-octave")
            if step is not None and octave is not None:
                self.emit(f"{step.strip()}{octave.strip()}")
            return None
        if pitch is None:
            raise self.refuse("a <note> without <pitch>, <rest> or <unpitched>")
        name = f"{(pitch.findtext('step') or '').strip()}{(pitch.findtext('octave') or '').strip()}"
        if name not in PITCHES:
            raise self.refuse(f"a pitch {name[:20]!r}")
        self.emit(name)
        return name

    def _voice(self, note: Element) -> None:
        voice = note.find("voice")
        if voice is None:
            return
        number = self.voices[(voice.text or "").strip()]
        if number != self.voice:
            self.emit(f"voice:{number}")
            self.voice = number

    def _root(self, note: Element, grace: bool) -> Fraction:
        """Type, exact length where the type does not say it, tuplet ratio and dots; returns quarters."""
        ratio, ratio_token = self._ratio(note)
        kind: str | None = (note.findtext("type") or "").strip()
        dots = len(note.findall("dot"))
        if kind not in TYPES:
            if kind:
                self.dropped["type (its name)"] += 1
            kind, dots = None, 0
        length = None if grace else self.quarters(note)
        rest = note.find("rest")
        if length is None and not grace:
            if kind is None:
                raise self.refuse("a <note> with neither <duration> nor a known <type>")
            length = nominal(kind, dots, ratio)
        if rest is not None and not grace and length is not None:
            whole_bar = kind is None and self.bar == length and self.now == 0
            if rest.get("measure") == "yes" or whole_bar:
                self.emit("rest:measure")
                if length != self.bar:
                    self.emit("lasts")
                    self._digits(length)
                return length
        if kind is None and length is not None:
            kind, dots = spell(length / ratio) or (None, 0)
        if dots > MAX_DOTS:
            raise self.refuse(f"a note with {dots} dots")
        self.emit(kind or "untyped")
        if length is not None and (kind is None or length != nominal(kind, dots, ratio)):
            self.emit("lasts")
            self._digits(length)
        if ratio_token:
            self.emit(ratio_token)
        elif ratio != 1:
            self.emit("ratio")
            self._digits(1 / ratio)
        for _ in range(dots):
            self.emit("dot")
        return length or Fraction(0)

    def _ratio(self, note: Element) -> tuple[Fraction, str]:
        """(normal over actual notes, its token or "" where digits say it)."""
        change = note.find("time-modification")
        if change is None:
            return Fraction(1), ""
        actual, normal = change.find("actual-notes"), change.find("normal-notes")
        if actual is None or normal is None:
            raise self.refuse("a <time-modification> without its numbers")
        a, n = self.whole(actual, actual.text, 1, 9999), self.whole(normal, normal.text, 1, 9999)
        if change.find("normal-type") is not None:
            self.dropped["time-modification/normal-type"] += 1
        token = f"{a}in{n}"
        return Fraction(n, a), token if token in RATIOS else ""

    def _accidental(self, note: Element) -> str | None:
        element = note.find("accidental")
        name = "" if element is None else (element.text or "").strip()
        if name in ACCIDENTALS and note.find("pitch") is not None:
            self.emit(name)
            return name
        if element is not None:
            self.dropped["accidental (of another kind)"] += 1
        return None

    def _alter(
        self,
        note: Element,
        pitch: str,
        accidental: str | None,
        ties: list[str],
        *,
        staff: int,
        at: Fraction,
    ) -> None:
        """The alteration, where the page does not say it."""
        element = note.find("pitch/alter")
        alter = Fraction(0) if element is None else self.fraction(element)
        if alter not in _ALTER_NAMES:
            raise self.refuse(f"<alter> is {alter}")
        stop, start = "stop" in ties, "start" in ties
        if alter != self.accidentals.expected(pitch, staff=staff, at=at, accidental=accidental, tied=stop):
            self.emit(_ALTER_NAMES[alter])
        self.accidentals.note(pitch, alter, staff=staff, at=at, accidental=accidental, stop=stop, start=start)

    def _ties(self, note: Element) -> list[str]:
        """Of "stop" and "start" those the note has, heard (<tie>) or drawn (<tied>)."""
        kinds = {e.get("type") for e in [*note.findall("tie"), *note.findall("notations/tied")]}
        for other in kinds - {"start", "stop"}:
            self.dropped[f"tied ({str(other)[:20]})"] += 1
        return [kind for kind in ("stop", "start") if kind in kinds and note.find("rest") is None]

    def _stem(self, note: Element) -> None:
        stem = (note.findtext("stem") or "").strip()
        if stem in STEMS and stem != self.stem:
            self.emit(f"stem:{stem}")
            self.stem = stem
        elif stem and stem not in STEMS:
            self.dropped["stem (of another kind)"] += 1

    def _beams(self, note: Element, chord: bool) -> None:
        """Beams that go on are not written, nor those of further notes of a chord."""
        beams = note.findall("beam")
        if chord:
            return
        for beam in sorted(beams, key=lambda e: (e.get("number") or "1")[:2]):
            token = BEAMS.get((beam.text or "").strip())
            if token:
                self.emit(token)

    def _notations(self, note: Element, ties: list[str]) -> None:
        """Ties, tuplets, slurs and the marks that LMX has."""
        marks: dict[str, list[Element]] = {}
        for child in note.iterfind("notations/*"):
            if child.tag in _GROUPS:
                for inner in child:
                    marks.setdefault(f"{child.tag}/{inner.tag}", []).append(inner)
            else:
                marks.setdefault(child.tag, []).append(child)
        for kind in ties:
            self.emit(f"tied:{kind}")
        for name in ("tuplet", "slur"):
            for element in marks.get(name, ()):
                if element.get("type") in ("start", "stop"):
                    self.emit(f"{name}:{element.get('type')}")
        for token in ("fermata", "arpeggiate", "staccato", "accent", "strong-accent", "tenuto"):
            if MARKS[token] in marks:
                self.emit(token)
        self._tremolo(marks.get("ornaments/tremolo", []))
        if MARKS["trill-mark"] in marks:
            self.emit("trill-mark")
        for path, elements in marks.items():
            if path not in _NOTATIONS_KNOWN:
                self.dropped[f"notations/{path}"] += len(elements)

    def _tremolo(self, tremolos: list[Element]) -> None:
        for tremolo in tremolos[:1]:
            kind, marks = tremolo.get("type", "single"), (tremolo.text or "").strip()
            if kind in TREMOLOS and f"tremolo:{marks}" in NUMBER and marks.isdigit():
                self.emit(f"tremolo:{kind}")
                self.emit(f"tremolo:{marks}")
            else:
                self.dropped["notations/ornaments/tremolo"] += 1
