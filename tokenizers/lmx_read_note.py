"""LMX tokens of one note to its MusicXML element; used by `lmx_read.py`."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement

from ringweave.tokenizers.lmx_tokens import (
    ACCIDENTALS,
    ALTERS,
    BEAMS,
    MARKS,
    MAX_DOTS,
    PITCHES,
    RATIOS,
    TYPES,
    Accidentals,
    nominal,
)

if TYPE_CHECKING:
    from ringweave.tokenizers.lmx_read import Item

_BEAM_TEXTS = {token: text for text, token in BEAMS.items()}
_HEADS = frozenset([*PITCHES, "rest", "unpitched"])
_MAX_SLURS, _MAX_TUPLETS = 16, 6  # numbers MusicXML has for those open at once
_MAX_BEAMS, _QUARTER = 8, list(TYPES).index("quarter")
_STEMLESS = ("maxima", "long", "breve", "whole")


class NoteReader:
    """What the tokens so far have said of a part: voice, staff, stem, beams, ties, accidentals and the position."""

    def __init__(self, lengths: list[tuple[Element, Fraction]]) -> None:
        self.lengths = lengths  # (<duration>, quarters), to be written in their units later
        self.well = True
        self.bar: Fraction | None = None  # quarters a measure
        self.staves = 1  # the highest staff seen
        self.accidentals = Accidentals()
        self.slurs: list[tuple[int, str]] = []  # (number, voice) of the open ones
        self.tuplets = 0
        self.measure()

    def measure(self) -> None:
        """A measure begins."""
        self.now = self.start = Fraction(0)
        self.can_chord = False
        self.beams: dict[tuple[str, bool], int] = {}  # open ones by (voice, grace)
        self.accidentals.measure()
        self._forget()

    def _forget(self) -> None:
        self.voice = self.staff = self.stem = ""

    def move(self, kind: str, length: Fraction) -> Fraction:
        """Forward or backup; returns how far it may go (0 where it says nothing)."""
        if kind == "backup":
            self._forget()
            if length > self.now:
                self.well, length = False, self.now
        self.well = self.well and length > 0
        self.now += length if kind == "forward" else -length
        self.can_chord = False
        return length

    def note(self, item: Item) -> Element | None:
        """The <note>, or None for a root without a pitch, rest or unpitched before it."""
        heads = [token for token in item.before if token in _HEADS]
        unpitched = heads[:1] == ["unpitched"]
        if not heads or len(heads) > (2 if unpitched else 1):
            self.well = False
        if not heads:
            return None
        words = set(item.before)
        chord, grace = "chord" in words, "grace" in words
        if chord and not self.can_chord:
            self.well, chord = False, False
        note = Element("note", {"print-object": "no"} if "print-object:no" in words else {})
        if grace:
            SubElement(note, "grace", {"slash": "yes"} if "grace:slash" in words else {})
        if "cue" in words:
            SubElement(note, "cue")
        if chord:
            SubElement(note, "chord")
        for token in item.before:
            if token.startswith("voice:"):
                self.voice = token[6:]
        pitch = SubElement(note, "rest" if heads[0] == "rest" else "unpitched" if unpitched else "pitch")
        at = self.start if chord else self.now
        length = self._body(note, item, pitch, heads, grace, at)
        if not chord:
            self.start = self.now
            self.now += length
        self.can_chord = True
        return note

    def _body(
        self, note: Element, item: Item, pitch: Element, heads: list[str], grace: bool, at: Fraction
    ) -> Fraction:
        """Everything behind the head, in the order of MusicXML; returns quarters."""
        pitched, chord = heads[0] in PITCHES, note.find("chord") is not None
        lasts, ratio, ratio_text = item.number("lasts"), *self._ratio(item)
        dots = self._count(item, "dot", MAX_DOTS)
        accidental = self._one([token for token in item.behind if token in ACCIDENTALS])
        item.behind = [token for token in item.behind if token not in ACCIDENTALS]
        alter = self._one(item.take("alter:"))
        stem, staff = self._one(item.take("stem:")), self._one(item.take("staff:"))
        if staff:
            self.staff = staff[6:]
            self.staves = max(self.staves, int(self.staff))
        ties = [kind for kind in ("stop", "start") if self._one(item.take(f"tied:{kind}"))]
        if pitched:
            self._pitch(pitch, heads[0], accidental, alter, ties, at)
        elif heads[0] == "unpitched" and len(heads) > 1 and heads[1] in PITCHES:
            SubElement(pitch, "display-step").text = heads[1][0]
            SubElement(pitch, "display-octave").text = heads[1][1]
        elif alter or accidental:
            self.well = False
        length = Fraction(0)
        if not grace:
            length = self._length(item.root, dots, ratio, lasts, pitch)
            self.lengths.append((SubElement(note, "duration"), length))
        elif lasts is not None:
            self.well = False
        for kind in ties:
            SubElement(note, "tie", {"type": kind})
        if self.voice:
            SubElement(note, "voice").text = self.voice
        if item.root in TYPES:
            SubElement(note, "type").text = item.root
            for _ in range(dots):
                SubElement(note, "dot")
        if accidental and pitched:
            SubElement(note, "accidental").text = accidental
        if ratio_text:
            change = SubElement(note, "time-modification")
            SubElement(change, "actual-notes").text = ratio_text[0]
            SubElement(change, "normal-notes").text = ratio_text[1]
        if stem:
            self.stem = stem[5:]
        if self.stem and (stem or (pitched and item.root not in _STEMLESS)):
            SubElement(note, "stem").text = self.stem
        if self.staff:
            SubElement(note, "staff").text = self.staff
        self._beams(note, item, grace, chord, rest=heads[0] == "rest")
        self._notations(note, item, ties)
        return length

    def _one(self, tokens: list[str]) -> str:
        """The first, or ""; more than one is one too many."""
        self.well = self.well and len(tokens) <= 1
        return tokens[0] if tokens else ""

    def _count(self, item: Item, token: str, most: int) -> int:
        count = len(item.take(token))
        self.well = self.well and count <= most
        return min(count, most)

    def _ratio(self, item: Item) -> tuple[Fraction, tuple[str, str] | None]:
        """(normal over actual notes, their texts)."""
        spelled = item.number("ratio")
        named = self._one([token for token in item.behind if token in RATIOS])
        item.behind = [token for token in item.behind if token not in RATIOS]
        if spelled is not None and (spelled <= 0 or named):
            self.well = False
        if named:
            actual, _, normal = named.partition("in")
            return Fraction(int(normal), int(actual)), (actual, normal)
        if spelled:
            return 1 / spelled, (str(spelled.numerator), str(spelled.denominator))
        return Fraction(1), None

    def _length(
        self, root: str, dots: int, ratio: Fraction, lasts: Fraction | None, pitch: Element
    ) -> Fraction:
        if root == "rest:measure":
            if pitch.tag == "rest":
                pitch.set("measure", "yes")
            else:
                self.well = False
        if lasts:
            return lasts
        if root in TYPES:
            self.well = self.well and lasts is None
            return nominal(root, dots, ratio)
        if root == "untyped" or lasts is not None or self.bar is None:
            self.well = False
        return self.bar or Fraction(4)

    def _pitch(
        self, element: Element, pitch: str, accidental: str, alter: str, ties: list[str], at: Fraction
    ) -> None:
        staff = int(self.staff or 1)
        value = self.accidentals.expected(
            pitch, staff=staff, at=at, accidental=accidental or None, tied="stop" in ties
        )
        if alter:
            value = ALTERS[alter]
        self.accidentals.note(
            pitch,
            value,
            staff=staff,
            at=at,
            accidental=accidental or None,
            stop="stop" in ties,
            start="start" in ties,
        )
        SubElement(element, "step").text = pitch[0]
        if value:
            SubElement(element, "alter").text = f"{float(value):g}"
        SubElement(element, "octave").text = pitch[1:]

    def _beams(self, note: Element, item: Item, grace: bool, chord: bool, *, rest: bool) -> None:
        """Open beams go on, as far as the note has flags for them; then what begins and ends, in order.

        Not on a further note of a chord, and on a rest only with a token of its own.
        """
        texts = [_BEAM_TEXTS[token] for token in item.take("beam:")]
        key = (self.voice, grace)
        if not texts and (chord or rest):
            return
        flags = list(TYPES).index(item.root) - _QUARTER if item.root in TYPES else _MAX_BEAMS
        going = min(self.beams.get(key, 0) - texts.count("end"), flags - len(texts))
        beams = ["continue"] * max(0, going) + texts
        for number, text in enumerate(beams[:_MAX_BEAMS], 1):
            SubElement(note, "beam", {"number": str(number)}).text = text
        self.well = self.well and len(beams) <= _MAX_BEAMS
        self.beams[key] = max(0, going) + texts.count("begin")

    def _notations(self, note: Element, item: Item, ties: list[str]) -> None:
        marks: list[Element] = [Element("tied", {"type": kind}) for kind in ties]
        marks += self._tuplets(item) + self._slurs(item)
        groups: dict[str, Element] = {}
        words = set(item.behind)
        tremolo = self._tremolo(item)
        for token, path in MARKS.items():
            if token not in words:
                if token == "trill-mark" and tremolo is not None:
                    groups.setdefault("ornaments", Element("ornaments")).append(tremolo)
                continue
            self.well = self.well and item.behind.count(token) == 1
            group, _, name = path.rpartition("/")
            if not group:
                marks.append(Element(name))
                continue
            SubElement(groups.setdefault(group, Element(group)), name)
            if token == "trill-mark" and tremolo is not None:
                groups[group].append(tremolo)
        item.behind = [token for token in item.behind if token not in MARKS]
        marks += [groups[name] for name in sorted(groups)]
        if marks:
            SubElement(note, "notations").extend(marks)

    def _tuplets(self, item: Item) -> list[Element]:
        found = []
        for token in item.take("tuplet:"):
            kind = token[7:]
            if kind == "start":
                self.tuplets += 1
            number = min(max(self.tuplets, 1), _MAX_TUPLETS)
            found.append(Element("tuplet", {"type": kind, "number": str(number)}))
            if kind == "stop":
                self.tuplets = max(0, self.tuplets - 1)
        return found

    def _slurs(self, item: Item) -> list[Element]:
        """A stop ends the slur opened last in its voice, or else the one opened last."""
        found = []
        for token in item.take("slur:"):
            kind = token[5:]
            if kind == "start":
                free = sorted(set(range(1, _MAX_SLURS + 1)) - {number for number, _ in self.slurs})
                number = free[0] if free else _MAX_SLURS
                self.slurs.append((number, self.voice))
            else:
                mine = [slur for slur in self.slurs if slur[1] == self.voice] or self.slurs
                number = mine[-1][0] if mine else 1
                if mine:
                    self.slurs.remove(mine[-1])
            found.append(Element("slur", {"type": kind, "number": str(number)}))
        return found

    def _tremolo(self, item: Item) -> Element | None:
        tokens = [token[8:] for token in item.take("tremolo:")]
        kinds = [token for token in tokens if not token.isdigit()]
        marks = [token for token in tokens if token.isdigit()]
        if not tokens:
            return None
        self.well = self.well and len(kinds) == len(marks) == 1
        tremolo = Element("tremolo", {"type": (kinds or ["single"])[0]})
        tremolo.text = (marks or ["3"])[0]
        return tremolo
