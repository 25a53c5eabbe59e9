"""MusicXML to LMX tokens. The grammar stands in `lmx.py`.

What sounds or gives structure (notes, lengths, ties, keys, times, clefs, transposition) is written or refused by a
`DataError`; what only decorates or names (lyrics, dynamics, layout, barlines, ...) is left out and counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from xml.etree.ElementTree import Element

from ringweave.tokenizers.lmx_tokens import MAX_STAVES, MAX_VOICES, NUMBER
from ringweave.tokenizers.lmx_write_note import NoteWriter

_ATTRIBUTES_KNOWN = ("divisions", "key", "time", "staves", "clef", "transpose")


@dataclass
class Written:
    """Tokens of a score, and how many of what were left out."""

    tokens: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def write(root: Element, *, where: str) -> Written:
    """The tokens of a <score-partwise>; DataError for what they cannot say."""
    written = Written()
    parts = root.findall("part")
    for child in root:
        if child.tag != "part":
            written.dropped[child.tag] += 1
    for number, part in enumerate(parts):
        if number:
            written.tokens.append("part")
        _Part(part, written, where=f"{where}: part {number + 1}").write()
    return written


class _Part(NoteWriter):
    """One part, measure by measure."""

    def __init__(self, part: Element, written: Written, *, where: str) -> None:
        super().__init__(written.tokens, written.dropped, where=where)
        self.part = part

    def write(self) -> None:
        """Every measure."""
        self.voices = self._voices()
        said, shown = self._staves()
        self.many_staves = bool(said) or shown > 1
        first = True
        for measure in self.part:
            if measure.tag != "measure":
                self.dropped[measure.tag] += 1
                continue
            self.number = measure.get("number", "?")[:20]
            self.emit("measure")
            if first and said > shown:
                self.emit(f"staves:{said}")
            first = False
            self._measure(measure)

    def _voices(self) -> dict[str, int]:
        """The number of each voice name: its own where all are small numbers, else by first appearance."""
        names = list(dict.fromkeys((e.text or "").strip() for e in self.part.iterfind("measure/note/voice")))
        if len(names) > MAX_VOICES:
            raise self.refuse(f"{len(names)} voices in one part, limit {MAX_VOICES}")
        if set(names) <= {str(number) for number in range(1, MAX_VOICES + 1)}:
            return {name: int(name) for name in names}
        self.dropped["voice (its name)"] += len(names)
        return {name: i + 1 for i, name in enumerate(names)}

    def _staves(self) -> tuple[int, int]:
        """(staves the part says it has, 0 where it does not; the highest that a note, clef, key or time stands on)."""
        said = [self.whole(e, e.text, 1, MAX_STAVES) for e in self.part.iterfind("measure/attributes/staves")]
        notes = [self.whole(e, e.text, 1, MAX_STAVES) for e in self.part.iterfind("measure/note/staff")]
        signs = [
            self.staff_of(e)
            for name in ("clef", "key", "time", "transpose")
            for e in self.part.iterfind(f"measure/attributes/{name}")
        ]
        return max(said, default=0), max([*notes, *signs], default=1)

    def _measure(self, measure: Element) -> None:
        self.forget()
        self.accidentals.measure()
        self.now = self.start = Fraction(0)
        self.can_chord = False
        for element in measure:
            if element.tag == "note":
                self.note(element)
            elif element.tag == "attributes":
                self._attributes(element)
            elif element.tag in ("forward", "backup"):
                self._move(element)
            else:
                self.dropped[element.tag] += 1
        self.write_gap()

    def _move(self, element: Element) -> None:
        """<forward> and <backup>: neighbours of one kind become one."""
        length = self.quarters(element)
        if length is None:
            raise self.refuse(f"a <{element.tag}> without <duration>")
        if not length:
            return
        self.move(element.tag, length)

    def _attributes(self, attributes: Element) -> None:
        divisions = attributes.find("divisions")
        if divisions is not None:
            self.divisions = self.fraction(divisions)
            if self.divisions <= 0:
                raise self.refuse(f"<divisions> is {self.divisions}")
        for key in attributes.findall("key"):
            self._key(key)
        for time in attributes.findall("time"):
            self._time(time)
        for clef in sorted(attributes.findall("clef"), key=self.staff_of):
            self._clef(clef)
        for transpose in attributes.findall("transpose"):
            self._transpose(transpose)
        for child in attributes:
            if child.tag not in _ATTRIBUTES_KNOWN:
                self.dropped[f"attributes/{child.tag}"] += 1

    def _emit_staff(self, element: Element) -> int | None:
        if element.get("number") is None:
            return None
        staff = self.staff_of(element)
        self.emit(f"staff:{staff}")
        return staff

    def _key(self, key: Element) -> None:
        fifths = key.find("fifths")
        if fifths is None:
            raise self.refuse("a key without <fifths> (not of the circle of fifths)")
        value = self.whole(fifths, fifths.text, -7, 7)
        for name in ("mode", "cancel"):
            if key.find(name) is not None:
                self.dropped[f"key/{name}"] += 1
        self.emit(f"key:fifths:{value}")
        self.accidentals.key(value, self._emit_staff(key))

    def _time(self, time: Element) -> None:
        if time.get("symbol") not in (None, "normal"):
            self.dropped["time (its symbol)"] += 1
        if time.find("senza-misura") is not None:
            self.emit("time:senza-misura")
            self.bar = None
            self._emit_staff(time)
            return
        self.emit("time")
        bar, beats = Fraction(0), 0
        for child in time:
            if child.tag == "beats":
                counts = [self.whole(child, text, 1, 64) for text in (child.text or "").split("+")[:16]]
                beats = sum(counts)
                for count in counts:
                    self.emit(f"beats:{count}")
            elif child.tag == "beat-type":
                unit = self.whole(child, child.text, 1, 128)
                self.emit(f"beat-type:{unit}")
                bar, beats = bar + Fraction(4 * beats, unit), 0
            else:
                self.dropped[f"time/{child.tag}"] += 1
        if not bar or beats:
            raise self.refuse("a <time> without <beats> and <beat-type>")
        self.bar = bar
        self._emit_staff(time)

    def _clef(self, clef: Element) -> None:
        sign, line = (clef.findtext("sign") or "").strip(), clef.find("line")
        plain = f"clef:{sign.upper()}"
        if sign in ("G", "F", "C", "g", "f", "c"):
            usual = {"G": 2, "F": 4, "C": 3}[sign.upper()]
            plain += str(usual if line is None else self.whole(line, line.text, 1, 5))
        elif f"clef:{sign}" in NUMBER:
            plain = f"clef:{sign}"
            if line is not None:
                self.dropped[f"clef/line of {sign}"] += 1
        self.emit(plain)
        octave = clef.find("clef-octave-change")
        if octave is not None and (shift := self.whole(octave, octave.text, -3, 3)):
            self.emit(f"octave-change:{shift}")
        if self.many_staves or clef.get("number") not in (None, "1"):
            self.emit(f"staff:{self.staff_of(clef)}")

    def _transpose(self, transpose: Element) -> None:
        """Octaves are folded into both intervals."""
        values = {}
        for name in ("diatonic", "chromatic", "octave-change"):
            child = transpose.find(name)
            values[name] = 0 if child is None else self.whole(child, child.text, -36, 36)
        self.emit("transpose")
        octaves = values["octave-change"]
        self.emit(f"diatonic:{values['diatonic'] + 7 * octaves}")
        self.emit(f"chromatic:{values['chromatic'] + 12 * octaves}")
        if transpose.find("double") is not None:
            self.emit("transpose:double")
        self._emit_staff(transpose)
