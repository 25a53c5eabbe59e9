"""From member names to samples, by WebDataset's rule, with a stated answer where that rule is silent.

The key ends at the first dot of the base name and holds the folders; what follows is the extension, read in
lower case. Members of a sample are adjacent and a key occurs once in a shard.

| in the shard                              | answer                                                        |
|-------------------------------------------|---------------------------------------------------------------|
| `a/b.seg.png`                             | member `seg.png` of sample `a/b`                              |
| `./a.jpg`                                 | sample `a`                                                    |
| `a.JPG`                                   | member `jpg`; beside `a.jpg` it is the same member twice      |
| `A.jpg`, `a.jpg`                          | two samples: keys keep their case                             |
| `a.json.gz`, `a.txt.zst`                  | members `json` and `txt`, decompressed when read              |
| `img.v1.0.jpg`, `img.v2.0.jpg`            | refused: two samples would merge into `img` (`dotted="keep"`) |
| `a.flat.png`, `a.layer0.png`, `a.seg.png` | one sample: what stands before the last dot is a word         |
| the same member twice                     | refused with both places                                      |
| a sample whose members are not adjacent   | refused, or gathered by key (`interleaved="regroup"`)         |
| `.DS_Store`, `d/._a.jpg`                  | refused, or left out and counted (`hidden="skip"`)            |
| `README`, `a.`                            | refused: no extension, so it belongs to no sample             |
| `/a.jpg`, `../a.jpg`, `a\\b.jpg`, control characters | refused: unsafe or ambiguous                       |
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ringweave.data_pipes.compression import plain_extension
from ringweave.data_pipes.tar import BLOCK, HeaderError, Members
from ringweave.tokenizers.errors import DataError

#: What may stand before the last dot of an extension without looking like part of a file name.
_WORD = re.compile(r"(?!v\d)[a-z][a-z_-]*\d*")


@dataclass(frozen=True, slots=True)
class Policy:
    """What to do with shards that others made. The defaults refuse whatever could be read in two ways."""

    hidden: Literal["refuse", "skip"] = "refuse"
    interleaved: Literal["refuse", "regroup"] = "refuse"
    dotted: Literal["refuse", "keep"] = "refuse"


@dataclass(slots=True)
class Groups:
    """keys of the samples; starts int64 [n + 1], first member of each; extensions and each member's number there.

    order: int64 [m], the members of the walk in the order of the samples; None when nothing moved or was left out.
    skipped: what was left out and why: {"hidden": how many, "first": the first of them}.
    exact: whether every name is surely spelled `key.ext`.
    """

    keys: list[str]
    starts: NDArray[np.int64]
    extensions: list[str]
    extension_ids: NDArray[np.int64]
    order: NDArray[np.int64] | None = None
    skipped: dict[str, int | str] = field(default_factory=dict)
    exact: bool = False


def split_name(name: str) -> tuple[str, str]:
    """`dir/a.seg.png` -> (`dir/a`, `seg.png`): the key ends at the first dot of the base name.

    Extensions are lower case, as webdataset reads them. Raises HeaderError for names that would be lost or
    point outside the shard.
    """
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    if name.startswith("/") or "\\" in name or ".." in folder.split("/"):
        raise HeaderError(f"unsafe member name {name!r}")
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise HeaderError(f"control character in member name {name!r}")
    stem, dot, ext = base.partition(".")
    if not stem or not dot or not ext:
        raise HeaderError(f"member name {name!r} is not key.extension, so it belongs to no sample")
    return folder + slash + stem, ext.lower()


def describe(name: str) -> str:
    """`dir/a.seg.png` -> `dir/a/seg.png`, the way messages name a member; other names stay as they are."""
    try:
        return "/".join(split_name(name))
    except HeaderError:
        return name


def group(members: Members, policy: Policy, error: Callable[..., DataError]) -> Groups:
    """The samples of a shard, by the table above.

    error: `Walk.error`, which adds the shard. Raises DataError for everything the table refuses.
    """
    order, skipped = _kept(members, policy)
    names = members.names if order is None else [members.names[i] for i in order.tolist()]
    keys, exts, exact = _split(names, _places(members, order), error)
    firsts = _firsts(keys)
    if len({keys[i] for i in firsts}) != len(firsts):
        if policy.interleaved == "refuse":
            raise _apart(keys, exts, firsts, _places(members, order), error)
        seen: dict[str, int] = {}
        numbers = np.fromiter((seen.setdefault(key, len(seen)) for key in keys), np.int64, len(keys))
        moved = np.argsort(numbers, kind="stable")
        order = moved if order is None else order[moved]
        keys, exts = [keys[i] for i in moved.tolist()], [exts[i] for i in moved.tolist()]
        firsts = _firsts(keys)
    known = {ext: number for number, ext in enumerate(dict.fromkeys(exts))}
    ids = np.asarray([known[ext] for ext in exts], np.int64)
    starts = np.asarray([*firsts, len(keys)], np.int64)
    groups = Groups([keys[i] for i in firsts], starts, list(known), ids, order, skipped, exact)
    _refuse_twice(groups, members, error)
    if policy.dotted == "refuse":
        _refuse_dotted(groups, members, error)
    return groups


def _places(members: Members, order: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Where the header of each member begins, in the order of the samples."""
    places = np.asarray(members.offsets, np.int64) - BLOCK
    return places if order is None else places[order]


def _kept(members: Members, policy: Policy) -> tuple[NDArray[np.int64] | None, dict[str, int | str]]:
    """Which members remain when hidden ones are left out (None: all), and what was left out."""
    if policy.hidden == "refuse":
        return None, {}
    hidden = [name.rpartition("/")[2].startswith(".") for name in members.names]
    if not any(hidden):
        return None, {}
    skipped: dict[str, int | str] = {"hidden": sum(hidden), "first": members.names[hidden.index(True)]}
    return np.flatnonzero(~np.asarray(hidden)), skipped


def _split(
    names: Sequence[str], places: NDArray[np.int64], error: Callable[..., DataError]
) -> tuple[list[str], list[str], bool]:
    """Key and extension of every name, and whether all are spelled so: at once if every name is plain."""
    found = split_plain(names)
    if found is not None:
        keys, exts = found
        lower = {ext: ext.lower() for ext in dict.fromkeys(exts)}
        exact = all(map(operator.eq, lower, lower.values()))
        return keys, exts if exact else [lower[ext] for ext in exts], exact
    keys, exts = [], []
    for number, name in enumerate(names):
        try:
            key, ext = split_name(name)
        except HeaderError as why:
            fix = "rename or leave out this member and write the shard again"
            if name.rpartition("/")[2].startswith("."):
                fix += "; hidden files can be left out at indexing (hidden=skip)"
            raise error(str(why), int(places[number]), name, fix=fix) from None
        keys.append(key)
        exts.append(ext)
    return keys, exts, False


def split_plain(names: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Keys and extensions (as spelled) of names that are all plain; None if one may not be."""
    text = "\n".join(names)
    octets = np.frombuffer(text.encode("utf-8"), np.uint8)
    controls = np.count_nonzero(octets < 32) + np.count_nonzero(octets == 127)
    line = f"\n{text}"
    odd = "\\" in text or "../" in text or "\n/" in line or "\n./" in line
    if odd or not names or controls != len(names) - 1:
        return None
    marks = octets[(octets == ord(".")) | (octets == ord("\n"))]
    if (
        len(marks) == 2 * len(names) - 1
        and (marks[::2] == ord(".")).all()
        and (marks[1::2] == ord("\n")).all()
    ):
        parts = text.replace("\n", ".").split(".")  # one dot in every name
        keys, exts = parts[::2], parts[1::2]
        if "/." not in text and "\n." not in line and not any(not e or "/" in e for e in dict.fromkeys(exts)):
            return keys, exts
    bases = [name.rfind("/") + 1 for name in names]
    dots = [name.find(".", base) for name, base in zip(names, bases)]
    exts = [name[dot + 1 :] for name, dot in zip(names, dots)]
    if "" in exts or not all(map(operator.gt, dots, bases)):
        return None
    return [name[:dot] for name, dot in zip(names, dots)], exts


def _firsts(keys: list[str]) -> list[int]:
    """Where a member's key differs from the one before."""
    if not keys:
        return []
    change = np.fromiter(map(operator.ne, keys, keys[1:]), np.bool_, len(keys) - 1)
    return [0, *(np.flatnonzero(change) + 1).tolist()]


def _apart(
    keys: list[str],
    exts: list[str],
    firsts: list[int],
    places: NDArray[np.int64],
    error: Callable[..., DataError],
) -> DataError:
    """Names the first key that comes again after another one; says whether a member is repeated with it."""
    began: dict[str, int] = {}
    for first in firsts:
        key = keys[first]
        if key not in began:
            began[key] = first
            continue
        at, was = int(places[first]), int(places[began[key]])
        same = [i for i in range(began[key], first) if (keys[i], exts[i]) == (key, exts[first])]
        why = f"the members of sample {key!r} are not adjacent (it began @{was})"
        fix = "write the members of a sample together, or index with interleaved=regroup; keys must be unique"
        if same:
            why = f"key {key!r} occurs twice: member {exts[first]!r} @{int(places[same[0]])} and @{at}, " + (
                "its members are not adjacent"
            )
            fix = "keys must be unique in a shard: rename one of the samples"
        return error(why, at, f"{key}/{exts[first]}", fix=fix)
    raise AssertionError("no key is repeated")


def _refuse_twice(groups: Groups, members: Members, error: Callable[..., DataError]) -> None:
    """A member that a sample has twice, also if only case or compression differs."""
    plain = [plain_extension(ext) for ext in groups.extensions]
    number = {ext: i for i, ext in enumerate(dict.fromkeys(plain))}
    same = np.asarray([number[ext] for ext in plain], np.int64)
    sample = np.repeat(np.arange(len(groups.keys)), np.diff(groups.starts))
    codes = sample * max(1, len(number)) + (same[groups.extension_ids] if len(same) else groups.extension_ids)
    ordered = np.sort(codes)
    if not (ordered[1:] == ordered[:-1]).any():
        return
    places = _places(members, groups.order)
    before: dict[int, int] = {}
    for i, code in enumerate(codes.tolist()):
        if code in before:
            key, ext = groups.keys[int(sample[i])], groups.extensions[int(groups.extension_ids[i])]
            at, was = int(places[i]), int(places[before[code]])
            why = f"member {plain_extension(ext)!r} occurs twice in sample {key!r}: @{was} and @{at}"
            raise error(
                why, at, f"{key}/{ext}", fix="keep one of them, or give the second sample its own key"
            )
        before[code] = i


def _refuse_dotted(groups: Groups, members: Members, error: Callable[..., DataError]) -> None:
    """`img.v1.0.jpg` and `img.v2.0.jpg`: one sample by the rule, two by the look of it."""
    ends = [plain_extension(ext).rpartition(".") for ext in groups.extensions]
    odd = [bool(front) and not all(_WORD.fullmatch(w) for w in front.split(".")) for front, _, _ in ends]
    if not any(odd):
        return
    sample = np.repeat(np.arange(len(groups.keys)), np.diff(groups.starts))
    for number in np.unique(sample[np.asarray(odd)[groups.extension_ids]]).tolist():
        first, last = groups.starts[number : number + 2].tolist()
        ids = groups.extension_ids[first:last].tolist()
        for i, one in enumerate(ids):
            if odd[one] and sum(ends[other][2] == ends[one][2] for other in ids) > 1:
                key = groups.keys[number]
                listed = ", ".join(groups.extensions[j] for j in ids[:4])
                why = f"the key ends at the first dot, so {key!r} holds {listed}: several samples would merge into one"
                fix = "write dots in names as `_`; if they are one sample, index with dotted=keep"
                at = int(_places(members, groups.order)[first + i])
                raise error(why, at, f"{key}/{groups.extensions[one]}", fix=fix)
