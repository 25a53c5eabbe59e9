"""LMX tokens to MusicXML, for tokens a model may have made: nothing raises, the best reading is given.

Tokens are grouped into items (what stands before a root, the root, what stands behind it) and every item becomes an
element. Whatever finds no place is left out and `complete` becomes False. The grammar stands in `lmx.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from ringweave.tokenizers.lmx_read_note import NoteReader
from ringweave.tokenizers.lmx_tokens import MAX_NUMBER, PREFIXES, ROOTS, TYPES

HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n'
MAX_DIVISIONS = 1 << 24  # units a quarter; beyond it lengths are rounded
_COARSE = 10080  # the units they are rounded to
_RANK = {"key": 1, "time": 2, "clef": 4, "transpose": 5}  # order inside <attributes>
_MODIFIERS = ("backup", "forward")


@dataclass
class Item:
    """A root token with the tokens before and behind it."""

    root: str
    before: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)

    def take(self, *prefixes: str) -> list[str]:
        """Takes out of `behind` the tokens that begin so."""
        found = [token for token in self.behind if token.startswith(prefixes)]
        self.behind = [token for token in self.behind if not token.startswith(prefixes)]
        return found

    def number(self, word: str) -> Fraction | None:
        """Takes out the number that digits spell behind `word`."""
        if word not in self.behind:
            return None
        start = at = self.behind.index(word)
        numbers = [""]
        for token in self.behind[start + 1 :]:
            if token == "over" and len(numbers) == 1:
                numbers.append("")
            elif token.startswith("digit:"):
                numbers[-1] += token[6:]
            else:
                break
            at += 1
        del self.behind[start : at + 1]
        top, bottom = numbers[0], numbers[1] if len(numbers) > 1 else "1"
        if not top or not bottom or max(len(top), len(bottom)) > len(str(MAX_NUMBER)):
            return Fraction(0)  # no number: the caller refuses it
        return Fraction(int(top), int(bottom)) if int(bottom) else Fraction(0)


def items(tokens: Iterable[str]) -> tuple[list[Item], bool]:
    """(items in order, whether every token found a place); "measure" and "part" are items too."""
    found: list[Item] = []
    before: list[str] = []
    well = True
    for token in tokens:
        if token in PREFIXES:
            before.append(token)
        elif token in ROOTS:
            found.append(Item(token, before))
            before = []
        elif found and not before:
            found[-1].behind.append(token)
        else:
            well = False
    return found, well and not before


def read(tokens: Iterable[str], *, well: bool = True) -> tuple[str, bool]:
    """(MusicXML text, whether every token was understood) of any sequence of tokens of the vocabulary."""
    found, fits = items(tokens)
    root = Element("score-partwise", {"version": "4.0"})
    names = SubElement(root, "part-list")
    groups: list[list[Item]] = [[]]
    for item in found:
        if item.root == "part":
            fits = fits and not item.before and not item.behind
            groups.append([])
        else:
            groups[-1].append(item)
    for number, group in enumerate(groups, 1):
        name = SubElement(names, "score-part", {"id": f"P{number}"})
        SubElement(name, "part-name").text = f"Part {number}"
        reader = _PartReader()
        part = reader.read(group)
        part.set("id", f"P{number}")
        root.append(part)
        fits = fits and reader.well
    indent(root)
    return HEAD + tostring(root, encoding="unicode") + "\n", fits and well


class _PartReader:
    """One part. Lengths are kept as quarters until the last measure, then written in the units they need."""

    def __init__(self) -> None:
        self.well = True
        self.part = Element("part")
        self.lengths: list[tuple[Element, Fraction]] = []
        self.notes = NoteReader(self.lengths)
        self.staves, self.staves_shown = 1, False
        self.attributes: Element | None = None
        self.rank = (0, 0)
        self.gap: tuple[str, int] = ("", 0)  # kind and place in `lengths` of the last element, if a gap

    def read(self, group: list[Item]) -> Element:
        """The <part>."""
        measure: Element | None = None
        for item in group:
            if item.root == "measure" or measure is None:
                self.well = self.well and (item.root == "measure")
                measure = self._measure()
            if item.root == "measure":
                self.well = self.well and not item.before
                self._head_of_measure(item)
                continue
            if item.root in TYPES or item.root in ("untyped", "rest:measure"):
                self._timed(measure, item)
            else:
                self._attribute(measure, item)
            self.well = self.well and not item.behind
        if measure is None:
            self.well = False
            self._measure()
        self._finish()
        self.well = self.well and self.notes.well
        return self.part

    def _measure(self) -> Element:
        self.attributes, self.gap = None, ("", 0)
        self.notes.measure()
        return SubElement(self.part, "measure", {"number": str(len(self.part) + 1)})

    def _head_of_measure(self, item: Item) -> None:
        for token in item.take("staves:"):
            self.staves = max(self.staves, int(token[7:]))
        self.well = self.well and not item.behind

    def _timed(self, measure: Element, item: Item) -> None:
        kinds = [token for token in item.before if token in _MODIFIERS]
        if not kinds:
            note = self.notes.note(item)
            if note is not None:
                measure.append(note)
                self.attributes, self.gap = None, ("", 0)
            return
        self.well = self.well and item.before == kinds[:1]
        kind = kinds[0]
        length = item.number("lasts") if item.root == "untyped" else TYPES.get(item.root)
        length = self.notes.move(kind, length or Fraction(0))
        if not length:
            return
        self.attributes = None
        if self.gap[0] == kind:
            place = self.gap[1]
            self.lengths[place] = (self.lengths[place][0], self.lengths[place][1] + length)
            return
        element = SubElement(SubElement(measure, kind), "duration")
        self.gap = (kind, len(self.lengths))
        self.lengths.append((element, length))

    # attributes ----------------------------------------------------------------------------------------------

    def _attribute(self, measure: Element, item: Item) -> None:
        """A key, time, clef or transposition; into the <attributes> before it where the order allows."""
        self.well = self.well and not item.before
        self.gap = ("", 0)
        staff = [int(token[6:]) for token in item.take("staff:")]
        self.well = self.well and len(staff) <= 1
        name, children = self._content(item)
        if not children:
            self.well = False
            return
        rank = (_RANK[name], (staff or [1])[0] if name == "clef" else 0)
        if self.attributes is None or rank < self.rank:
            self.attributes = SubElement(measure, "attributes")
        self.rank = rank
        element = SubElement(self.attributes, name)
        if staff:
            element.set("number", str(staff[0]))
            self.staves = max(self.staves, staff[0])
            self.staves_shown |= name == "clef"
        for tag, text in children:
            SubElement(element, tag).text = text
        if name == "key":
            self.notes.accidentals.key(int(children[0][1] or 0), staff[0] if staff else None)

    def _content(self, item: Item) -> tuple[str, list[tuple[str, str | None]]]:
        """(name of the element, its children as (tag, text)); no children where tokens are missing."""
        if item.root.startswith("key:"):
            return "key", [("fifths", item.root.rpartition(":")[2])]
        if item.root == "time:senza-misura":
            self.notes.bar = None
            return "time", [("senza-misura", None)]
        if item.root == "time":
            return "time", self._time(item)
        if item.root == "transpose":
            steps, tones = item.take("diatonic:"), item.take("chromatic:")
            if len(steps) != 1 or len(tones) != 1:
                return "transpose", []
            double = [("double", None)] if item.take("transpose:double") else []
            return "transpose", [("diatonic", steps[0][9:]), ("chromatic", tones[0][10:]), *double]
        sign = item.root[5:]
        children: list[tuple[str, str | None]] = [("sign", sign)]
        if sign[-1].isdigit():
            children = [("sign", sign[0]), ("line", sign[1:])]
        for token in item.take("octave-change:")[:1]:
            children.append(("clef-octave-change", token[14:]))
        return "clef", children

    def _time(self, item: Item) -> list[tuple[str, str | None]]:
        children: list[tuple[str, str | None]] = []
        beats: list[str] = []
        bar = Fraction(0)
        for token in item.take("beats:", "beat-type:"):
            name, _, number = token.rpartition(":")
            if name == "beats":
                beats.append(number)
            elif beats:
                children += [("beats", "+".join(beats)), ("beat-type", number)]
                bar += Fraction(4 * sum(map(int, beats)), int(number))
                beats = []
        self.well = self.well and not beats
        if children:
            self.notes.bar = bar
        return children

    # the end -------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """<divisions> and <staves> into the first measure, and every length in those units."""
        units = math.lcm(*{length.denominator for _, length in self.lengths})
        if units > MAX_DIVISIONS:
            self.well, units = False, _COARSE
        for element, length in self.lengths:
            element.text = str(max(1, round(length * units)))
        measure = self.part[0]
        if not len(measure) or measure[0].tag != "attributes":
            measure.insert(0, Element("attributes"))
        head = measure[0]
        divisions = Element("divisions")
        divisions.text = str(units)
        head.insert(0, divisions)
        staves = max(self.staves, self.notes.staves)
        if staves > 1 or self.staves_shown:
            element = Element("staves")
            element.text = str(staves)
            head.insert(sum(child.tag in ("divisions", "key", "time") for child in head), element)
