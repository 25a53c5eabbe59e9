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
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.segment import MODALITY_ID

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

    def __post_init__(self) -> None:
        if self.version != FORMAT_VERSION:
            raise VocabularyError(
                f"vocabulary manifest has format {self.version}, this version reads {FORMAT_VERSION}",
                fix="install the version that wrote it, or train tokenizers again: ringweave tokenizer train",
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
        cls, parts: list[tuple[str, int, str, str, str]], *, text_pieces: str, preprocessing: dict[str, Any]
    ) -> VocabularyManifest:
        """Lay out (name, size, modality, codec, sha256) parts one after another."""
        blocks, start = [], CONTROL_SIZE
        for name, size, modality, codec, sha256 in parts:
            blocks.append(Block(name, start, size, modality, codec, sha256))
            start = align(start + size)
        return cls(tuple(blocks), text_pieces, preprocessing)

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

        Video frames are written with the ids of the image block, so this says "image" for them; a segment's
        own `modality` tells them apart.
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
                "control": CONTROL,
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
            if raw["control"] != CONTROL:
                raise VocabularyError("the manifest has other control ids than this version", where=where)
            fields = ("name", "start", "size", "modality", "codec", "sha256")
            kinds = (str, int, int, str, str, str)
            blocks = []
            for entry in raw["blocks"]:
                if set(entry) != set(fields) or any(type(entry[f]) is not k for f, k in zip(fields, kinds)):
                    raise ValueError(f"block {entry!r} does not have the fields {fields}")
                blocks.append(Block(**entry))
            return cls(tuple(blocks), str(raw["text_pieces"]), dict(raw["preprocessing"]), raw["version"])
        except VocabularyError:
            raise
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
