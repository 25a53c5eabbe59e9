"""The grammar of plan entries: `item`, `item:argument`, and either with a trailing "?" for a condition.

No numpy and no decoder is imported here, so that a config can be checked before anything heavy loads.
`documents.py` says what each item reads; `formats.py` holds the forms of public sets; `layer_views.py` makes the
views that `latents` names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

#: Every item a plan may name, in the order of the docs.
ITEMS = (
    "text", "caption", "image", "rgba", "score", "audio", "video", "symbolic", "midi", "latents", "embeddings",
    "fields",
)  # fmt: skip

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
#: What `latents:` may name beside layer0, layer1, ... and a member: views of the record's layers, then its picture and
#: its clip.
LAYER_VIEWS = (
    "layers", "composite", "background", "foreground", "alpha", "trimap", "mask",
    "top", "top_mask", "lower", "removed",
)  # fmt: skip
VIEWS = (*LAYER_VIEWS, "image", "video")
ONE_LAYER = re.compile(r"layer(0|[1-9]\d{0,3})")
_LAYER_FILE = re.compile(r"layer\d+\.png")
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
    if item == "latents" and not argument:
        raise ValueError(f"name a view, as in `latents:layers`: {_KNOWN_VIEWS}")
    if item == "fields" and condition:
        raise ValueError("`fields` marks its own conditions: put [brackets] around a field without loss")
    return Entry(item, argument, condition)


def _check_argument(item: str, argument: str) -> None:
    if item == "fields":
        parse_fields(argument)
        return
    if item == "rgba":
        raise ValueError("`rgba` takes no argument: it reads layer0.png, layer1.png, ...")
    if item == "latents":
        _check_view(argument)
        return
    if item == "embeddings":
        if not _MEMBER.fullmatch(argument) or not argument.endswith(".npy"):
            raise ValueError("`embeddings:` takes the name of a member that ends in .npy")
        return
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


def read_by_view(view: str) -> str:
    """What a view of `latents` is made of: "video", "image", or "rgba", the record's layers."""
    ending = view.rpartition(".")[2]
    if view == "video" or ending in CLIPS:
        return "video"
    return "image" if view == "image" or ending in PICTURES else "rgba"


#: In messages.
_KNOWN_VIEWS = f"{', '.join(VIEWS)}, or one layer (`layer0` is the bottom)"


def _check_view(argument: str) -> None:
    """ValueError unless `latents:` takes the argument: a view, a layer, or a member with a picture or clip."""
    if argument in VIEWS or ONE_LAYER.fullmatch(argument):
        return
    if _LAYER_FILE.fullmatch(argument):
        raise ValueError(f"a layer is named without its ending: `latents:{argument.removesuffix('.png')}`")
    if _MEMBER.fullmatch(argument) and argument.rpartition(".")[2] in (*PICTURES, *CLIPS):
        return
    near = difflib.get_close_matches(argument, VIEWS, n=1)
    hint = f"did you mean `latents:{near[0]}`? " if near else ""
    raise ValueError(
        f"{hint}`latents:` takes a view ({_KNOWN_VIEWS}), or a member that ends in {', '.join((*PICTURES, *CLIPS))}"
    )


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


#: Items that hold words.
WORDS = ("text", "caption")
#: Items that are no medium: words, in whatever form.
NO_MEDIA = (*WORDS, "embeddings", "fields")


def of_latents(plan: Sequence[Entry]) -> bool:
    """Whether a plan makes documents of latents. Words and embeddings are always a condition in those, marked or not.

    ValueError for a plan that holds other items beside them, both words and embeddings, or no latents to train on.
    """
    given = [entry.text for entry in plan if entry.item == "embeddings"]
    if not any(entry.item == "latents" for entry in plan):
        if given:
            raise ValueError(
                f"{given[0][:80]!r} stands without latents: only documents of latents hold vectors of words"
            )
        return False
    if given and (others := [entry.text for entry in plan if entry.item in WORDS] + given[1:]):
        raise ValueError(
            f"{given[0][:80]!r} and {others[0][:80]!r} in one plan: the words of a document are given once, as vectors "
            "or as text"
        )
    strange = [entry.text for entry in plan if entry.item not in ("latents", "embeddings", *WORDS)]
    if strange:
        raise ValueError(
            f"{strange[0][:80]!r} cannot stand beside latents: a document of latents holds only those and words "
            "(text, caption, or embeddings); `latents:image` reads a picture"
        )
    if all(entry.condition for entry in plan if entry.item == "latents"):
        raise ValueError("no latents to train on: leave the `?` off what is to be generated")
    return True


def entries(plan: Sequence[str]) -> list[Entry]:
    """All entries of a plan. ValueError names the first bad one."""
    parsed = []
    for entry in plan:
        try:
            parsed.append(parse_entry(entry))
        except ValueError as error:
            raise ValueError(f"plan entry {entry[:80]!r}: {error}") from None
    return parsed
