"""The grammar of plan entries: `item`, `item:argument`, and either with a trailing "?" for a condition.

No numpy and no decoder is imported here, so that a config can be checked before anything heavy loads.
`documents.py` says what each item reads; `formats.py` holds the forms of public sets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

#: Every item a plan may name, in the order of the docs.
ITEMS = ("text", "caption", "image", "rgba", "score", "audio", "video", "symbolic", "midi", "fields")

PICTURES = ("png", "jpg", "jpeg", "webp")
SOUNDS = ("flac", "wav", "ogg", "mp3")
CLIPS = ("mp4", "webm", "mkv", "mov")
SHEETS = ("musicxml", "mxl", "xml")
SONGS = ("mid", "midi")
_ENDINGS = {
    "image": PICTURES,
    "score": PICTURES,
    "audio": SOUNDS,
    "video": CLIPS,
    "symbolic": SHEETS,
    "midi": SONGS,
}
_MEMBER = re.compile(r"[^\s/\\?:,\x00-\x1f]+")
#: Bytes of one entry; a class list of ImageNet's 1,000 names takes about 30,000.
_MAX_ENTRY = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One parsed plan entry. argument: "" when none is given; condition: seen, without loss."""

    item: str
    argument: str
    condition: bool

    @property
    def text(self) -> str:
        """`item:argument` without the mark of a condition."""
        return f"{self.item}:{self.argument}" if self.argument else self.item


def parse_entry(entry: str) -> Entry:
    """Parses `caption`, `caption:json.caption`, `image:seg.png?`, ... ValueError says what is wrong."""
    plain, condition = entry.removesuffix("?"), entry.endswith("?")
    item, colon, argument = plain.partition(":")
    if item not in ITEMS or len(entry) > _MAX_ENTRY:
        raise ValueError(f"use one of {', '.join(ITEMS)}")
    if colon and not argument:
        raise ValueError("nothing stands behind the colon")
    if argument:
        _check_argument(item, argument)
    if item == "fields" and condition:
        raise ValueError("`fields` marks its own conditions: put [brackets] around a field without loss")
    return Entry(item, argument, condition)


def _check_argument(item: str, argument: str) -> None:
    if item == "fields":
        parse_fields(argument)
        return
    if item == "rgba":
        raise ValueError("`rgba` takes no argument: it reads layer0.png, layer1.png, ...")
    if item in _ENDINGS:
        endings = _ENDINGS[item]
        if not _MEMBER.fullmatch(argument) or argument.rpartition(".")[2] not in endings:
            raise ValueError(f"`{item}:` takes the name of a member that ends in {', '.join(endings)}")
        return
    member, field = split_json(argument)
    if member is not None:
        if not field:
            raise ValueError(f"name the field, as in `{item}:json.caption`")
        return
    if not argument.startswith(("cls=", "cls@")) and not _MEMBER.fullmatch(argument):
        raise ValueError(f"`{item}:` takes a member (`txt`), a field (`json.caption`) or `cls`")
    if argument in ("cls=", "cls@"):
        raise ValueError("nothing stands behind `cls`")


def split_json(argument: str) -> tuple[str | None, str]:
    """`json.a.b` -> ("json", "a.b"), `meta.json.a` -> ("meta.json", "a"), `txt` -> (None, "").

    The member ends at the first part that is `json`; what follows is the path of the field.
    """
    parts = argument.split(".")
    if argument.startswith(("cls=", "cls@")) or "json" not in parts:
        return None, ""
    end = parts.index("json") + 1
    return ".".join(parts[:end]), ".".join(parts[end:])


def parse_fields(spec: str) -> list[tuple[str, bool]]:
    """LWM's field list `[question],[vision],answer+more` -> [(field, trained)].

    "," joins fields in tokens, "+" joins their texts with a space, [brackets] mean no loss. ValueError for an
    empty list or field.
    """
    parsed = []
    for entry in spec.split(","):
        free = entry.startswith("[") and entry.endswith("]")
        field = entry[1:-1] if free else entry
        if not field or any(not part for part in field.split("+")) or "[" in field or "]" in field:
            raise ValueError(f"bad field {entry!r}: write it as `[question],answer`")
        parsed.append((field, not free))
    return parsed


def entries(plan: Sequence[str]) -> list[Entry]:
    """All entries of a plan. ValueError names the first bad one."""
    parsed = []
    for entry in plan:
        try:
            parsed.append(parse_entry(entry))
        except ValueError as error:
            raise ValueError(f"plan entry {entry[:80]!r}: {error}") from None
    return parsed
