"""Public sets as they are: captions in txt, json or cls members, and LWM's field lists.

A caption is never empty in silence: a missing field, an empty string, a number where a text should be, a
class outside its list are all `DataError`s that name sample, member and field, so the sample is skipped and
journaled like any other that cannot be used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringweave.data_pipes.plan_items import CLIPS, PICTURES, SOUNDS, Entry, parse_fields, split_json
from ringweave.data_pipes.sample import Sample
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.manifest import BOS, EOS
from ringweave.tokenizers.segment import Role, Segment

if TYPE_CHECKING:
    from ringweave.data_pipes.documents import Tokenizers

#: Larger json members are refused before they are parsed.
MAX_JSON = 1 << 26
#: LWM's vision lists: codes of its VQGAN, 16 x 16 a frame, 4 frames a second (arXiv 2402.08268).
LWM_CODEBOOK, LWM_SIDE, LWM_RATE = 8192, 16, 4
_SPECIAL = {"<|bos|>": BOS, "<|eos|>": EOS}
_LAYERS = re.compile(r"layer\d+\.png")


# ---- json ----


def load_json(data: bytes, *, where: str) -> Any:
    """The value of a json member, parsed strictly.

    Raises DataError with line, column and byte offset for anything that is not JSON (RFC 8259), and for what
    parsers disagree about or choke on: a key twice in one object, NaN, numbers of more than 4,300 digits,
    nesting beyond the parser's stack, more than 64 MiB, text that is not UTF-8.
    """
    if len(data) > MAX_JSON:
        raise _bad_json(where, f"it has {len(data)} bytes, the limit is {MAX_JSON}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad_json(where, f"not UTF-8 at offset {error.start}: {error.reason}") from None
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        at = len(text[: error.pos].encode())
        why = f"{error.msg} at line {error.lineno}, column {error.colno} (offset {at})"
        raise _bad_json(where, why) from None
    except RecursionError:
        raise _bad_json(where, "nested too deeply") from None
    except ValueError as error:
        raise _bad_json(where, str(error)) from None


def _bad_json(where: str, why: str) -> DataError:
    return DataError("not usable JSON", where=where, why=why, fix="correct the record, or leave it out")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} occurs twice in one object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def field_text(value: Any, path: str, *, where: str, item: str) -> str:
    """The text at `path` ("caption", "meta.title", "captions.0") of a parsed json member.

    Raises DataError when a part is missing, or what is there is not a text with something in it.
    """
    at: list[str] = []
    for part in path.split("."):
        inside = where + (f" field {'.'.join(at)!r}" if at else "")
        if isinstance(value, list) and part.isdecimal() and len(part) < 10 and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            raise DataError(
                f"plan item {item!r} finds no field {path!r}",
                where=inside,
                why=_holds(value),
                fix="correct the plan of this source, or the record",
            )
        at.append(part)
    return require_text(value, where=f"{where} field {path!r}", item=item)


def require_text(value: Any, *, where: str, item: str) -> str:
    """`value` when it is a text with something in it; DataError otherwise."""
    if isinstance(value, str) and value.strip():
        return value
    kind = "it is empty" if isinstance(value, str) else f"it is {_kind(value)}, not a text"
    raise DataError(
        f"plan item {item!r} finds no text", where=where, why=kind, fix="leave the record out, or fill it in"
    )


def _kind(value: Any) -> str:
    names = {bool: "true or false", dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value), "a number")


def _holds(value: Any) -> str:
    if isinstance(value, dict):
        keys = ", ".join(repr(key[:40]) for key in list(value)[:12])
        return f"the object holds: {keys or 'nothing'}{', ...' if len(value) > 12 else ''}"
    return f"there is {_kind(value)}" if not isinstance(value, list) else f"a list of {len(value)} is there"


# ---- text and captions ----


def text_of(sample: Sample, entry: Entry) -> str:
    """The text that a `text` or `caption` entry names.

    Without an argument the txt member, which may be empty as documents of a text source sometimes are;
    `:json.FIELD` a field of the json member; `:cls` a class; any other argument names a member. Raises
    DataError for whatever is missing or empty.
    """
    argument, item = entry.argument or "txt", entry.text[:80]
    member, path = split_json(argument)
    if member is not None:
        data = member_of(sample, item, (member,))
        where = f"{sample.where}:{member}"
        return field_text(load_json(data, where=where), path, where=where, item=item)
    if argument == "cls" or argument.startswith(("cls=", "cls@")):
        return _class_text(sample, item, argument)
    text = _utf8(member_of(sample, item, (argument,)), f"{sample.where}:{argument}")
    return require_text(text, where=f"{sample.where}:{argument}", item=item) if item != "text" else text


def member_of(sample: Sample, item: str, wanted: Sequence[str]) -> bytes:
    """The first member present out of `wanted`. Raises DataError naming what the sample holds instead."""
    for extension in wanted:
        if extension in sample.members:
            return sample.members[extension]
    raise missing_member(sample, item, " or ".join(wanted))


def missing_member(sample: Sample, item: str, wanted: str) -> DataError:
    """The error for a sample without the member an item wants."""
    return DataError(
        f"plan item {item!r} finds no member {wanted}",
        where=sample.where,
        why=f"the sample holds: {', '.join(sorted(sample.members)) or 'nothing'}",
        fix="correct the plan of this source, or the shard",
    )


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("text is not UTF-8", where=where, why=str(error)) from None


def _class_text(sample: Sample, item: str, argument: str) -> str:
    """The cls member itself, or the name its number has in the list behind `cls=`."""
    where = f"{sample.where}:cls"
    label = require_text(_utf8(member_of(sample, item, ("cls",)), where), where=where, item=item).strip()
    if argument == "cls":
        return label
    if argument.startswith("cls@"):
        raise DataError(
            f"the class list {argument[4:]!r} was not read", where=where, fix="call resolve_plan first"
        )
    names = argument[4:].split("|")
    if label in names:
        return label
    if label.isdecimal() and len(label) < 10 and int(label) < len(names):
        return names[int(label)]
    raise DataError(
        f"class {label[:80]!r} is not in the list of {len(names)} classes",
        where=where,
        why="the cls member must be a number from 0, or one of the names",
        fix="correct the class list of this source, or the record",
    )


def resolve_plan(plan: Sequence[str], base: Path | str) -> tuple[str, ...]:
    """The plan with every `cls@FILE` (one name a line, the first is class 0) replaced by its names.

    The names become part of the plan, so tokens cached under another list are never used. `FILE` is relative
    to `base`, or to the current folder if `base` is a URL. Raises DataError for a file that cannot be read, is empty,
    or holds "|".
    """
    return tuple(_with_names(entry, base) for entry in plan)


def _with_names(entry: str, base: Path | str) -> str:
    head, mark, rest = entry.partition(":cls@")
    if not mark:
        return entry
    path = Path("." if "://" in str(base) else base) / rest.removesuffix("?")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "cannot read the class list", where=str(path), why=str(error), fix="correct the plan"
        ) from None
    while names and not names[-1]:
        names.pop()
    if not names or not all(names) or any("|" in name for name in names):
        raise DataError("malformed class list", where=str(path), why="one name a line, none empty, no '|'")
    return f"{head}:cls={'|'.join(names)}{'?' if entry.endswith('?') else ''}"


# ---- LWM's field lists ----


def fields_segments(sample: Sample, entry: Entry, tokenizers: Tokenizers) -> list[Segment]:
    """The segments of a record of LWM's JSONL (`lwm/data.py` of LargeWorldModel/LWM), one or more.

    The list of fields is the entry's argument, else the record's own `fields`: a text, or a list to choose
    from (by a hash of the sample's key, the same in every epoch). A field whose name holds "vision" is a flat
    list of VQGAN codes. As there, only the end of the document is trained on whatever the last field says.
    Raises DataError for missing or malformed fields, VocabularyError for codes of a codebook that the
    tokenizers do not have.
    """
    where = f"{sample.where}:json"
    record = load_json(member_of(sample, entry.item, ("json",)), where=where)
    return record_segments(record, entry.argument, tokenizers, key=sample.key, where=where)


def record_segments(record: Any, spec: str, tokenizers: Tokenizers, *, key: str, where: str) -> list[Segment]:
    """As `fields_segments`, for a parsed record."""
    parts: list[Segment] = []
    fields = record_fields(record, spec, key=key, where=where)
    for number, (field, trained) in enumerate(fields):
        role: Role = "target" if trained else "condition"
        weight = 1.0 if trained else 0.0
        value = field_value(record, field, where=where)
        if field in _SPECIAL:
            # A document begins with bos and ends with eos anyway; only those in the middle are added.
            outer = (field == "<|bos|>" and number == 0) or (field == "<|eos|>" and number == len(fields) - 1)
            if not outer:
                parts.append(_control(_SPECIAL[field], role, weight))
        elif isinstance(value, list):
            frames = np.asarray(value, np.int32).reshape(-1, LWM_SIDE, LWM_SIDE)
            times = np.arange(len(frames)) / LWM_RATE if len(frames) > 1 else None
            parts.append(
                tokenizers.codes_segment(frames, codebook=LWM_CODEBOOK, times=times, role=role, weight=weight)
            )
        else:
            parts.append(tokenizers.text_segment(value, role=role, weight=weight))
    if not parts:
        raise DataError("the record's fields hold nothing", where=where)
    if parts[-1].role != "target":
        parts.append(tokenizers.text_segment("", role="target", weight=1.0))  # takes the eos of the document
    return parts


def _control(number: int, role: Role, weight: float) -> Segment:
    return Segment(np.asarray([number], np.int32), "text", np.zeros((1, 4), np.int32), role, "causal", weight)


def record_fields(record: Any, spec: str, *, key: str, where: str) -> list[tuple[str, bool]]:
    """[(field, trained)] of a record: by `spec`, else by its own `fields`. DataError when there is none."""
    if not isinstance(record, dict):
        raise DataError("the record is no JSON object", where=where, why=f"it is {_kind(record)}")
    chosen: Any = spec
    if not spec:
        chosen = record.get("fields")
        if isinstance(chosen, list) and chosen:
            digest = blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            chosen = chosen[int.from_bytes(digest, "big") % len(chosen)]
    try:
        return parse_fields(require_text(chosen, where=f"{where} field 'fields'", item="fields"))
    except ValueError as error:
        raise DataError("malformed list of fields", where=f"{where} field 'fields'", why=str(error)) from None


def field_value(record: dict[str, Any], field: str, *, where: str) -> str | list[int]:
    """The text of a field (`a+b`: joined by a space), or the codes of a vision field.

    Raises DataError for a missing field, one of another type, codes outside [0, 8192) and a list that is not
    a whole number of frames of 256.
    """
    if field in _SPECIAL:
        return ""
    if "vision" not in field:
        return " ".join(_plain(record, part, where) for part in field.split("+"))
    codes = _entry(record, field, where)
    inside, size = f"{where} field {field!r}", LWM_SIDE * LWM_SIDE
    if not isinstance(codes, list) or any(type(code) is not int for code in codes):
        raise DataError("vision codes must be a flat list of whole numbers", where=inside)
    if not codes or len(codes) % size:
        raise DataError(
            f"{len(codes)} vision codes are no whole number of frames",
            where=inside,
            why=f"a frame has {LWM_SIDE} x {LWM_SIDE} = {size} codes",
        )
    wrong = next((i for i, code in enumerate(codes) if not 0 <= code < LWM_CODEBOOK), None)
    if wrong is not None:
        why = f"number {wrong} is {str(codes[wrong])[:20]}, the codebook has {LWM_CODEBOOK}"
        raise DataError("a vision code outside its codebook", where=inside, why=why)
    return codes


def _entry(record: dict[str, Any], field: str, where: str) -> Any:
    if field not in record:
        raise DataError(f"the record has no field {field!r}", where=where, why=_holds(record))
    return record[field]


def _plain(record: dict[str, Any], field: str, where: str) -> str:
    value = _entry(record, field, where)
    if not isinstance(value, str):
        raise DataError(f"field {field!r} is no text", where=where, why=f"it is {_kind(value)}")
    return value


# ---- what a set looks like ----


def guess_plan(extensions: Iterable[str], record: Any = None) -> tuple[str, ...]:
    """A plan for samples with these members, () when nothing in them is known.

    record: the json member of one of them, parsed. What comes last is the richest member; in front of it a
    caption from txt, else a field "caption" or "text" of json, else cls.
    """
    have = set(extensions)
    if isinstance(record, dict) and "fields" in record and have == {"json"}:
        return ("fields",)
    named = next(
        (f for f in ("caption", "text") if isinstance(record, dict) and isinstance(record.get(f), str)), ""
    )
    source = "txt" if "txt" in have else f"json.{named}" if named else "cls" if "cls" in have else ""
    caption: tuple[str, ...] = ()
    if source:
        caption = ("caption",) if source == "txt" else (f"caption:{source}",)
    if any(_LAYERS.fullmatch(ext) for ext in have):
        return (*caption, "rgba")
    for item, endings in (("video", CLIPS), ("audio", SOUNDS), ("image", (*PICTURES, "flat.png"))):
        if have & set(endings):
            return (*caption, item)
    if not source or source == "cls":
        return ()
    return ("text",) if source == "txt" else (f"text:{source}",)
