"""The vocabulary manifest: which global id means what, and under which weights.

Global ids are laid out as ``control [0, 256) | text | one block per codebook``. The control ids are fixed
forever; every further block starts at a multiple of 128 (so that a vocabulary splits evenly over tensor
ranks), and a new block is only ever appended.

`VocabularyManifest.hash` is the sha256 of the canonical JSON. It covers the sha256 of every codec's file, so
changing one codec weight changes the hash that checkpoints, token caches and exports carry. Text is the
exception: its hash is taken over pieces, scores and the normaliser, because the bytes of a sentencepiece
``.model`` differ between trainings whose vocabularies are equal.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.segment import LATENT, MODALITY_ID

FORMAT_VERSION = 1
ALIGN = 128
CONTROL_SIZE = 256

#: Fixed forever. Numbers that are missing here, up to CONTROL_SIZE, are reserved.
CONTROL: dict[str, int] = {
    "pad": 0,
    "bos": 1,
    "eos": 2,
    "eol": 3,
    "eof": 4,
    "eov": 5,
    "layer": 6,
    "blank": 7,
    "boi": 8,
    "eoi": 9,
    "bor": 10,
    "eor": 11,
    "bov": 12,
    "boa": 14,
    "eoa": 15,
    "bos_score": 16,
    "eos_score": 17,
    "bos_symbolic": 18,
    "eos_symbolic": 19,
    "bos_midi": 20,
    "eos_midi": 21,
    "latent": LATENT,
}
PAD, BOS, EOS = CONTROL["pad"], CONTROL["bos"], CONTROL["eos"]


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def align(n: int) -> int:
    """`n` rounded up to a multiple of ALIGN."""
    return -(-n // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class Block:
    """A run of global ids that belongs to one codebook.

    name: "text", "image", "audio.q0" …; start, size: ids [start, start + size); modality: a name of
    `MODALITIES`; codec: file stem of the codec in the tokenizer folder; sha256: of that codec's file (text:
    of its pieces).
    """

    name: str
    start: int
    size: int
    modality: str
    codec: str
    sha256: str

    @property
    def stop(self) -> int:
        """One past the last id."""
        return self.start + self.size


@dataclass(frozen=True)
class VocabularyManifest:
    """blocks: in order of `start`; preprocessing: what happens to bytes before a codec sees them."""

    blocks: tuple[Block, ...]
    text_pieces: str = ""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION
    #: The control ids known when it was made: CONTROL, or that of an older version, which had fewer.
    control: dict[str, int] = field(default_factory=CONTROL.copy)

    def __post_init__(self) -> None:
        if self.version != FORMAT_VERSION:
            raise VocabularyError(
                f"vocabulary manifest has format {self.version}, this version reads {FORMAT_VERSION}",
                fix="install the version that wrote it, or train tokenizers again: ringweave tokenizer train",
            )
        for name, number in self.control.items():
            if CONTROL.get(name) != number:
                raise VocabularyError(
                    "the manifest has other control ids than this version",
                    why=f"{name!r} is {number} there, {CONTROL.get(name, 'unknown')} here",
                    fix="install the version that wrote it",
                )
        end, names = CONTROL_SIZE, set()
        for block in self.blocks:
            if block.name in names or block.size <= 0 or block.start % ALIGN or block.start < end:
                raise VocabularyError(
                    f"block {block.name!r} [{block.start}, {block.stop}) overlaps, repeats or is misaligned",
                    why=f"blocks start at multiples of {ALIGN} and the next free id is {end}",
                )
            if block.modality not in MODALITY_ID:
                raise VocabularyError(f"block {block.name!r} has the unknown modality {block.modality!r}")
            names.add(block.name)
            end = block.stop

    @classmethod
    def build(
        cls,
        parts: list[tuple[str, int, str, str, str]],
        *,
        text_pieces: str,
        preprocessing: dict[str, Any],
        control: dict[str, int] | None = None,
    ) -> VocabularyManifest:
        """Lay out (name, size, modality, codec, sha256) parts one after another. control: CONTROL, or an older one."""
        blocks, start = [], CONTROL_SIZE
        for name, size, modality, codec, sha256 in parts:
            blocks.append(Block(name, start, size, modality, codec, sha256))
            start = align(start + size)
        return cls(
            tuple(blocks), text_pieces, preprocessing, control=CONTROL.copy() if control is None else control
        )

    def append(
        self,
        parts: list[tuple[str, int, str, str, str]],
        *,
        text_pieces: str = "",
        preprocessing: dict[str, Any] | None = None,
    ) -> VocabularyManifest:
        """This vocabulary with further (name, size, modality, codec, sha256) parts after its blocks.

        preprocessing: keys to add; text_pieces: for the first text block. VocabularyError when they would change
        what is there. Whatever comes of it `extends` this one.
        """
        added = VocabularyManifest.build(parts, text_pieces=text_pieces, preprocessing={}).blocks
        shift = self.size - CONTROL_SIZE
        blocks = (*self.blocks, *(replace(block, start=block.start + shift) for block in added))
        newer = VocabularyManifest(
            blocks,
            text_pieces or self.text_pieces,
            self.preprocessing | (preprocessing or {}),
            control=self.control,
        )
        if not newer.extends(self):
            raise VocabularyError(
                "these parts change the vocabulary they should extend",
                why=self.difference(newer, mine="before", theirs="after") or "",
                fix="give new codecs names and preprocessing keys of their own",
            )
        return newer

    def extends(self, older: VocabularyManifest) -> bool:
        """Whether every id of `older` means here what it means there: its blocks unchanged, and others only after.

        Preprocessing and control ids may have got new keys, never other values; a text hash stays.
        """
        before = {key: value for key, value in older.preprocessing.items() if key != "control_size"}
        kept = {key: value for key, value in self.preprocessing.items() if key in before}
        return (
            self.blocks[: len(older.blocks)] == older.blocks
            and canonical_json(kept) == canonical_json(before)
            and older.control.items() <= self.control.items()
            and older.text_pieces in ("", self.text_pieces)
        )

    def difference(
        self, other: VocabularyManifest, *, mine: str = "this one", theirs: str = "the other"
    ) -> str | None:
        """The first thing in which the two differ, and how, naming both sides; None when their hashes are equal."""
        for here, there in zip_longest(self.blocks, other.blocks):
            if here is None or there is None:
                return f"block {(here or there).name!r} is only in {mine if here else theirs}"
            for field_ in ("name", "start", "size", "modality", "codec", "sha256"):
                a, b = getattr(here, field_), getattr(there, field_)
                if a != b:
                    a, b = (_short(a), _short(b)) if field_ == "sha256" else (a, b)
                    return f"block {here.name!r}: {_NAMES.get(field_, field_)} {a} in {mine}, {b} in {theirs}"
        for what, a, b in (
            ("control", self.control, other.control),
            ("text_pieces", self.text_pieces, other.text_pieces),
            ("preprocessing", self.preprocessing, other.preprocessing),
        ):
            if found := _value_difference(what, a, b, mine, theirs):
                return found
        return None

    @property
    def size(self) -> int:
        """Number of ids a model's embedding needs: all of them, rounded up to a multiple of 128."""
        return align(self.blocks[-1].stop if self.blocks else CONTROL_SIZE)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def block(self, name: str) -> Block:
        """The block called `name`; VocabularyError when there is none."""
        for block in self.blocks:
            if block.name == name:
                return block
        known = ", ".join(b.name for b in self.blocks) or "none"
        raise VocabularyError(f"the vocabulary has no block {name!r}", why=f"its blocks: {known}")

    @cached_property
    def _modality_table(self) -> NDArray[np.int8]:
        table = np.zeros(self.size, np.int8)
        for block in self.blocks:
            table[block.start : block.stop] = MODALITY_ID[block.modality]
        return table

    def modality_of(self, ids: NDArray[np.int32]) -> NDArray[np.int8]:
        """MODALITY_ID of each id, int8 [n]; control ids, and ids between two blocks, are 0.

        Whole frames of a video are written with the ids of the image block, so this says "image" for them (and
        "video" for moves and runs); a segment's own `modality` tells them apart.
        """
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= self.size):
            raise VocabularyError(
                f"ids from {ids.min()} to {ids.max()} do not fit a vocabulary of {self.size}",
                fix="use the tokenizers these ids were made with",
            )
        return self._modality_table[ids]

    def to_json(self) -> str:
        """Canonical JSON; `from_json` reads it back to an equal manifest."""
        return canonical_json(
            {
                "version": self.version,
                "control": self.control,
                "blocks": [asdict(block) for block in self.blocks],
                "text_pieces": self.text_pieces,
                "preprocessing": self.preprocessing,
            }
        )

    @classmethod
    def from_json(cls, text: str, *, where: str = "") -> VocabularyManifest:
        """Parse `to_json`'s output; VocabularyError on anything else."""
        try:
            raw = json.loads(text)
            control = dict(raw["control"])
            if any(type(number) is not int for number in control.values()):
                raise ValueError("a control id is not a whole number")
            fields = ("name", "start", "size", "modality", "codec", "sha256")
            kinds = (str, int, int, str, str, str)
            blocks = []
            for entry in raw["blocks"]:
                if set(entry) != set(fields) or any(type(entry[f]) is not k for f, k in zip(fields, kinds)):
                    raise ValueError(f"block {entry!r} does not have the fields {fields}")
                blocks.append(Block(**entry))
            return cls(
                tuple(blocks), str(raw["text_pieces"]), dict(raw["preprocessing"]), raw["version"], control
            )
        except VocabularyError as error:
            raise VocabularyError(
                error.what, where=error.where or where, why=error.why, fix=error.fix
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise VocabularyError(
                "not a vocabulary manifest", where=where, why=f"{type(error).__name__}: {error}"
            ) from error

    def save(self, path: Path) -> None:
        """Write the canonical JSON to `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> VocabularyManifest:
        """Read `path`; VocabularyError naming it when missing or malformed."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise VocabularyError(
                "cannot read the vocabulary manifest",
                where=str(path),
                why=str(error),
                fix="train tokenizers first: ringweave tokenizer train",
            ) from error
        return cls.from_json(text, where=str(path))


_NAMES = {"start": "starts at", "size": "size", "sha256": "weights", "name": "name"}
_ABSENT = object()


def _short(digest: str) -> str:
    """Enough of a hash to tell two apart."""
    return f"{digest[:12]}…" if len(digest) > 12 else digest


def _value_difference(key: str, a: Any, b: Any, mine: str, theirs: str) -> str | None:
    """The first key, dotted, at which two JSON values differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted({*a, *b}):
            one, two = a.get(name, _ABSENT), b.get(name, _ABSENT)
            if found := _value_difference(f"{key}.{name}", one, two, mine, theirs):
                return found
        return None
    shown = ["absent" if v is _ABSENT else canonical_json(v) for v in (a, b)]
    if shown[0] == shown[1]:
        return None
    return f"{key}: {shown[0][:60]} in {mine}, {shown[1][:60]} in {theirs}"


def require_same(
    mine: VocabularyManifest | str,
    theirs: VocabularyManifest | str,
    *,
    mine_is: str,
    theirs_is: str,
    fix: str = "",
) -> None:
    """VocabularyError unless both vocabularies are equal.

    mine, theirs: a manifest, or its hash where only that is stored (the error then cannot name the block).
    mine_is, theirs_is: what each belongs to, as in "the tokenizers in runs/tok" and "the checkpoint step-100".
    """
    hashes = [side if isinstance(side, str) else side.hash for side in (mine, theirs)]
    if hashes[0] == hashes[1]:
        return
    why = f"{mine_is}: {_short(hashes[0])}; {theirs_is}: {_short(hashes[1])}"
    if isinstance(mine, VocabularyManifest) and isinstance(theirs, VocabularyManifest):
        why += f"; {mine.difference(theirs, mine=mine_is, theirs=theirs_is)}"
        if mine.extends(theirs):
            fix = (
                fix
                or f"{mine_is} only adds to the other: ids may be used as they are, a model needs more rows"
            )
    raise VocabularyError(
        f"{theirs_is} was made with another vocabulary than {mine_is}",
        why=why,
        fix=fix or f"use the tokenizers {theirs_is} was made with, or give a remap table",
    )


def remap(older: VocabularyManifest, newer: VocabularyManifest) -> NDArray[np.int32]:
    """Table int32 [older.size]: the id in `newer` of what each id of `older` means, -1 where nothing does.

    A block's counterpart is the block of equal size at the same place among those of the codec with the same
    sha256, whatever its name; a control id stays, unless `newer` does not know its name.
    """
    table = np.full(older.size, -1, np.int32)
    table[:CONTROL_SIZE] = np.arange(CONTROL_SIZE)
    table[[number for name, number in older.control.items() if name not in newer.control]] = -1
    counterparts = _places(newer)
    for place, block in _places(older).items():
        there = counterparts.get(place)
        if there is not None and there.size == block.size:
            table[block.start : block.stop] = np.arange(there.start, there.stop)
    return table


def _places(manifest: VocabularyManifest) -> dict[tuple[str, int], Block]:
    """(codec's sha256, number of the block in that codec) -> block."""
    seen: dict[str, int] = {}
    out = {}
    for block in manifest.blocks:
        seen[block.sha256] = seen.get(block.sha256, -1) + 1
        out[block.sha256, seen[block.sha256]] = block
    return out


def apply_remap(
    ids: NDArray[np.int32], table: NDArray[np.int32], *, older: VocabularyManifest
) -> NDArray[np.int32]:
    """`ids` [n] of `older` as ids of the newer vocabulary, by the table of `remap`.

    VocabularyError naming the block of the first id without a counterpart.
    """
    ids = np.asarray(ids)
    inside = (ids >= 0) & (ids < len(table))
    out = np.where(inside, table[np.where(inside, ids, 0)], -1).astype(np.int32)
    if (lost := np.flatnonzero(out.reshape(-1) < 0)).size:
        at = int(lost[0])
        number = int(ids.reshape(-1)[at])
        owner = next((f"block {b.name!r}" for b in older.blocks if b.start <= number < b.stop), "no block")
        raise VocabularyError(
            f"id {number} at place {at} has no counterpart in the newer vocabulary",
            why=f"it belongs to {owner}; {lost.size} of {ids.size} ids have none",
            fix="tokenize the source again with the newer tokenizers",
        )
    return out
