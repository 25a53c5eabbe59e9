"""Bach chorales of the music21 corpus as short closed scores: four parts on two staves, one system.

The corpus holds open scores (one staff a part). Hymn books print them closed: soprano and alto share the
treble staff, tenor and bass the bass staff, stems telling the voices apart. `excerpt_xml` writes a few bars
that way, as fresh MusicXML, so that image, MIDI, timemap and MusicXML of a record hold the same notes.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
import zipfile
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

#: Divisions of a quarter note in the MusicXML written here (a 64th is one).
DIVISIONS = 16


@dataclass(slots=True)
class Note:
    """A note of a voice: `duration` in quarters, `pitch` (step, alter, octave) or None for a rest."""

    duration: Fraction
    kind: str | None
    dots: int
    pitch: tuple[str, int, int] | None
    accidental: str | None
    beams: tuple[str, ...]
    fermata: bool
    tie_start: bool
    tie_stop: bool


@dataclass(slots=True)
class Measure:
    """One bar of one part, with the key and time signature in force."""

    notes: list[Note] = field(default_factory=list)
    fifths: int = 0
    time: tuple[int, int] = (4, 4)

    @property
    def duration(self) -> Fraction:
        return sum((note.duration for note in self.notes), Fraction(0))


class UnusableScoreError(Exception):
    """Why a score of the corpus cannot be printed as a closed score."""


def read_chorale(path: Path) -> list[list[Measure]]:
    """The bars of the four parts, [4][bars]. Raises UnusableScoreError for anything but a plain chorale."""
    root = _score_root(path)
    parts = root.findall("part")
    if len(parts) != 4:
        raise UnusableScoreError(f"{len(parts)} parts")
    bars = [_read_part(part) for part in parts]
    if len({len(part) for part in bars}) != 1:
        raise UnusableScoreError("parts of different lengths")
    return bars


def usable(bars: list[list[Measure]], first: int, count: int) -> bool:
    """Whether bars [first, first + count) are whole, equally long in all parts and hold notes in each."""
    for i in range(first, first + count):
        lengths = {part[i].duration for part in bars}
        if len(lengths) != 1 or not 0 < lengths.pop() <= 6:
            return False
        if any(not any(note.pitch for note in part[i].notes) for part in bars):
            return False
    return True


def signature(bars: list[list[Measure]], first: int, count: int) -> tuple[object, ...]:
    """What is equal for the same music in any key: durations, and semitones above the first bass note."""
    voices = [[note for bar in part[first : first + count] for note in bar.notes] for part in bars]
    base = next((midi_pitch(note.pitch) for note in voices[3] if note.pitch), 0)
    return tuple(
        tuple((note.duration, midi_pitch(note.pitch) - base if note.pitch else None) for note in voice)
        for voice in voices
    )


def midi_pitch(pitch: tuple[str, int, int]) -> int:
    """MIDI number of (step, alter, octave): C4 is 60."""
    step, alter, octave = pitch
    return 12 * (octave + 1) + {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[step] + alter


def excerpt_xml(bars: list[list[Measure]], first: int, count: int, *, tempo: int, program: int) -> str:
    """MusicXML of bars [first, first + count): one part of two staves, note ids `v<voice>n<number>`.

    tempo: quarters a minute; program: MIDI program, 0-based.
    """
    score = ET.Element("score-partwise", version="4.0")
    listed = ET.SubElement(ET.SubElement(score, "part-list"), "score-part", id="P1")
    ET.SubElement(listed, "part-name", attrib={"print-object": "no"}).text = "Chorale"
    ET.SubElement(ET.SubElement(listed, "score-instrument", id="P1-I1"), "instrument-name").text = "Organ"
    midi = ET.SubElement(listed, "midi-instrument", id="P1-I1")
    ET.SubElement(midi, "midi-channel").text = "1"
    ET.SubElement(midi, "midi-program").text = str(program + 1)
    part = ET.SubElement(score, "part", id="P1")
    counters = [0, 0, 0, 0]
    for i in range(first, first + count):
        measure = ET.SubElement(part, "measure", number=str(i - first + 1))
        bar = bars[0][i]
        if bar.duration != Fraction(4 * bar.time[0], bar.time[1]):
            measure.set("implicit", "yes")
        _attributes(measure, bar, bars[0][i - 1] if i > first else None)
        if i == first:
            ET.SubElement(ET.SubElement(measure, "direction"), "sound", tempo=str(tempo))
        for voice, voice_bars in enumerate(bars):
            if voice:
                backup = ET.SubElement(measure, "backup")
                ET.SubElement(backup, "duration").text = str(_ticks(bar.duration))
            for position, note in enumerate(voice_bars[i].notes):
                opening = i == first and position == 0
                closing = i == first + count - 1 and position == len(voice_bars[i].notes) - 1
                _note(measure, note, voice, counters[voice], opening=opening, closing=closing)
                counters[voice] += 1
        if i == len(bars[0]) - 1:
            barline = ET.SubElement(measure, "barline", location="right")
            ET.SubElement(barline, "bar-style").text = "light-heavy"
    ET.indent(score, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(score, encoding="unicode") + "\n"


def _score_root(path: Path) -> ET.Element:
    """Root of a .xml or compressed .mxl score."""
    if path.suffix != ".mxl":
        return ET.parse(path).getroot()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        container = ET.fromstring(archive.read("META-INF/container.xml"))
        listed = [e.get("full-path", "") for e in container.iter() if e.tag.endswith("rootfile")]
        # Some containers of the corpus name a file that was since renamed; then take the only score inside.
        name = next((n for n in listed if n in names), None)
        name = name or next(n for n in names if not n.startswith("META-INF") and not n.endswith("/"))
        return ET.fromstring(archive.read(name))


def _read_part(part: ET.Element) -> list[Measure]:
    bars: list[Measure] = []
    divisions, fifths, time = 1, 0, (4, 4)
    for element in part.findall("measure"):
        measure = Measure()
        for child in element:
            if child.tag == "attributes":
                divisions = int(child.findtext("divisions", str(divisions)))
                fifths = int(child.findtext("key/fifths", str(fifths)))
                if child.find("time/beats") is not None:
                    time = (
                        int(child.findtext("time/beats", "4")),
                        int(child.findtext("time/beat-type", "4")),
                    )
            elif child.tag == "note":
                measure.notes.append(_read_note(child, divisions))
            elif child.tag in ("backup", "forward"):
                raise UnusableScoreError(f"<{child.tag}> inside a part")
        measure.fifths, measure.time = fifths, time
        bars.append(measure)
    return bars


def _read_note(element: ET.Element, divisions: int) -> Note:
    if element.find("grace") is not None or element.find("chord") is not None:
        raise UnusableScoreError("grace notes or chords")
    duration = Fraction(int(element.findtext("duration", "0")), divisions)
    if (duration * DIVISIONS).denominator != 1 or duration <= 0:
        raise UnusableScoreError(f"a note of {duration} quarters")
    pitch = None
    if element.find("pitch") is not None:
        step, octave = element.findtext("pitch/step", "C"), int(element.findtext("pitch/octave", "4"))
        pitch = (step, int(element.findtext("pitch/alter", "0")), octave)
    ties = {tie.get("type") for tie in element.findall("tie")}
    return Note(
        duration=duration,
        kind=element.findtext("type"),
        dots=len(element.findall("dot")),
        pitch=pitch,
        accidental=element.findtext("accidental"),
        beams=tuple(beam.text or "" for beam in element.findall("beam")),
        fermata=element.find("notations/fermata") is not None,
        tie_start="start" in ties,
        tie_stop="stop" in ties,
    )


def _ticks(duration: Fraction) -> int:
    return int(duration * DIVISIONS)


def _attributes(measure: ET.Element, bar: Measure, before: Measure | None) -> None:
    """Clefs in the first bar, key and time there and wherever they change."""
    new_key = before is None or bar.fifths != before.fifths
    new_time = before is None or bar.time != before.time
    if not (new_key or new_time):
        return
    attributes = ET.SubElement(measure, "attributes")
    ET.SubElement(attributes, "divisions").text = str(DIVISIONS)
    if new_key:
        ET.SubElement(ET.SubElement(attributes, "key"), "fifths").text = str(bar.fifths)
    if new_time:
        time = ET.SubElement(attributes, "time")
        ET.SubElement(time, "beats").text, ET.SubElement(time, "beat-type").text = map(str, bar.time)
    if before is None:
        ET.SubElement(attributes, "staves").text = "2"
        for number, (sign, line) in enumerate((("G", "2"), ("F", "4")), start=1):
            clef = ET.SubElement(attributes, "clef", number=str(number))
            ET.SubElement(clef, "sign").text = sign
            ET.SubElement(clef, "line").text = line


def _note(measure: ET.Element, note: Note, voice: int, number: int, *, opening: bool, closing: bool) -> None:
    """One <note>. Ties that would leave the excerpt are dropped (`opening`, `closing`)."""
    element = ET.SubElement(measure, "note", id=f"v{voice + 1}n{number}")
    if note.pitch:
        pitch = ET.SubElement(element, "pitch")
        ET.SubElement(pitch, "step").text = note.pitch[0]
        if note.pitch[1]:
            ET.SubElement(pitch, "alter").text = str(note.pitch[1])
        ET.SubElement(pitch, "octave").text = str(note.pitch[2])
    else:
        ET.SubElement(element, "rest")
    ET.SubElement(element, "duration").text = str(_ticks(note.duration))
    ties = [
        t
        for t, on in (("stop", note.tie_stop and not opening), ("start", note.tie_start and not closing))
        if on
    ]
    for tie in ties:
        ET.SubElement(element, "tie", type=tie)
    ET.SubElement(element, "voice").text = str(voice + 1)
    if note.kind:
        ET.SubElement(element, "type").text = note.kind
    for _ in range(note.dots):
        ET.SubElement(element, "dot")
    if note.accidental:
        ET.SubElement(element, "accidental").text = note.accidental
    if note.pitch:
        ET.SubElement(element, "stem").text = "down" if voice % 2 else "up"
    ET.SubElement(element, "staff").text = "1" if voice < 2 else "2"
    for level, beam in enumerate(note.beams, start=1):
        ET.SubElement(element, "beam", number=str(level)).text = beam
    fermata = note.fermata and voice == 0  # printed once, above the system
    if ties or fermata:
        notations = ET.SubElement(element, "notations")
        for tie in ties:
            ET.SubElement(notations, "tied", type=tie)
        if fermata:
            ET.SubElement(notations, "fermata", type="upright")
