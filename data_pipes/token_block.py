"""Documents as a handful of arrays: their form in token caches, between processes and between ranks.

With N tokens, S segments and D documents (one a sample):

    ids              int32 [N]
    positions        int16 [N, 4], int32 if a position needs it
    document_offsets int64 [D + 1], first token of each document
    segment_offsets  int64 [D + 1], first segment of each document
    segments         int64 [S, 4], (length, modality, role, attends)
    segment_weights  float64 [S]
    document_crc32   uint32 [D], over the bytes of ids and positions (and latents)
    names            uint8, JSON {"keys": [D names], "skipped": [{"key", "reason"}]}

and, where a document holds continuous latents, of which segments may have other widths (cells of a picture, vectors of
words), M numbers in all,

    segments         int64 [S, 5], (length, modality, role, attends, numbers of a latent or 0)
    latents          float32 [M], latent after latent in the order of their placeholders in ids
    latent_offsets   int64 [D + 1], first of these numbers of each document

A skipped entry may have "offset", where its sample begins in the shard, "damage": true if the shard could not be
read, and "lasting": false where another try may end otherwise (a decoder that ran out of time, a store that stalled):
in a stored part it is made again when it is wanted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ringweave.data_pipes.checksum import crc32
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import LATENT, MODALITIES, MODALITY_ID, Attends, Document, Role, Segment

_ROLES: tuple[Role, ...] = get_args(Role)
_ATTENDS: tuple[Attends, ...] = get_args(Attends)
#: Everything but the tokens themselves.
TABLES = ("document_offsets", "segment_offsets", "segments", "segment_weights", "document_crc32", "names")
#: In addition, in blocks with latents.
LATENT_TABLE = "latent_offsets"
#: Tokens held at a time while target ids are counted.
_COUNT_AT_ONCE = 1 << 22
Tensors = dict[str, NDArray[Any]]


def tables_of(names: Iterable[str]) -> tuple[str, ...]:
    """The tables of a block with these arrays."""
    return (*TABLES, LATENT_TABLE) if LATENT_TABLE in names else TABLES


def crc_of(*arrays: NDArray[Any]) -> int:
    """crc32 over the bytes of the arrays, one after the other."""
    value = 0
    for array in arrays:
        value = crc32(np.ascontiguousarray(array).tobytes(), value)
    return value


def _crcs(
    ids: NDArray[Any],
    positions: NDArray[Any],
    ends: Sequence[int],
    latents: NDArray[Any] | None,
    latent_ends: Sequence[int],
) -> list[int]:
    """crc32 of each document."""
    if latents is None:
        return [crc_of(ids[a:b], positions[a:b]) for a, b in pairwise(ends)]
    spans = zip(pairwise(ends), pairwise(latent_ends))
    return [crc_of(ids[a:b], positions[a:b], *([latents[c:d]] if d > c else [])) for (a, b), (c, d) in spans]


class BlockWriter:
    """Collects the tensors of a block, document by document."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self.skipped: list[dict[str, Any]] = []
        self._ids: list[NDArray[np.int32]] = []
        self._positions: list[NDArray[np.int32]] = []
        self._segments: list[tuple[int, ...]] = []
        self._weights: list[float] = []
        self._token_ends, self._segment_ends, self._latent_ends = [0], [0], [0]
        self._latents: list[NDArray[np.float32]] = []
        self._latent_count = 0

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, document: Document) -> None:
        """The next document."""
        for segment in document.segments:
            self._ids.append(segment.ids.astype(np.int32, copy=False))
            self._positions.append(segment.positions.astype(np.int32, copy=False))
            numbers = (
                MODALITY_ID[segment.modality],
                _ROLES.index(segment.role),
                _ATTENDS.index(segment.attends),
            )
            channels = 0 if segment.latents is None else segment.latents.shape[1]
            self._segments.append((len(segment), *numbers, channels))
            self._weights.append(segment.weight)
            if segment.latents is not None:
                self._latents.append(segment.latents.ravel())
                self._latent_count += segment.latents.size
        self._end(key, len(document))

    def skip(
        self,
        key: str,
        reason: str,
        *,
        lasting: bool = True,
        damage: bool = False,
        offset: int | None = None,
    ) -> None:
        """The next document cannot be made: it has length 0 and a reason.

        lasting: whether another try would end alike; damage: whether the shard itself could not be read; offset: of
        the sample in the shard.
        """
        entry: dict[str, Any] = {"key": key, "reason": reason}
        more = {"lasting": False} if not lasting else {}
        more |= {"damage": True} if damage else {}
        self.skipped.append(entry | more | ({"offset": offset} if offset is not None else {}))
        self._end(key, 0)

    def _end(self, key: str, tokens: int) -> None:
        self._keys.append(key)
        self._token_ends.append(self._token_ends[-1] + tokens)
        self._segment_ends.append(len(self._segments))
        self._latent_ends.append(self._latent_count)

    def tensors(self) -> Tensors:
        """The arrays of this module's docstring."""
        ids = np.concatenate([np.zeros(0, np.int32), *self._ids])
        positions = np.concatenate([np.zeros((0, 4), np.int32), *self._positions])
        bounds = np.iinfo(np.int16)
        if not positions.size or (positions.min() >= bounds.min and positions.max() <= bounds.max):
            positions = positions.astype(np.int16)
        ends = self._token_ends
        more: Tensors = {}
        segments = np.asarray(self._segments, np.int64).reshape(-1, 5)
        if self._latents:
            more = {
                "latents": np.concatenate(self._latents),
                LATENT_TABLE: np.asarray(self._latent_ends, np.int64),
            }
        crcs = _crcs(ids, positions, ends, more.get("latents"), self._latent_ends)
        names = {"keys": self._keys, "skipped": self.skipped}
        return {
            **more,
            "ids": ids,
            "positions": positions,
            "document_offsets": np.asarray(ends, np.int64),
            "segment_offsets": np.asarray(self._segment_ends, np.int64),
            "segments": segments if more else segments[:, :4].copy(),
            "segment_weights": np.asarray(self._weights, np.float64),
            "document_crc32": np.asarray(crcs, np.uint32),
            "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
        }

    def block(self, where: str) -> TokenBlock:
        """What was collected, to be read."""
        return TokenBlock.of(self.tensors(), where)


class TokenBlock:
    """Some documents, by number.

    where: how messages name the block; keys: names inside the shard; skipped: [{"key", "reason"}] of those of
    length 0; lengths: int64 [D], tokens of each document. ids and positions may be slices of a mapped file.
    """

    def __init__(
        self, tables: Mapping[str, NDArray[Any]], ids: Any, positions: Any, latents: Any = None, *, where: str
    ) -> None:
        """Raises ValueError (or KeyError) if the arrays do not belong together."""
        self.where = where
        self._tables = {name: tables[name] for name in tables_of(tables)}
        self._ids, self._positions, self._latents = ids, positions, latents
        places = self._tables.get(LATENT_TABLE)
        self._latent_starts: list[int] = [] if places is None else places.tolist()
        names = json.loads(self._tables["names"].tobytes())
        self.keys: list[str] = names["keys"]
        self.skipped: list[dict[str, Any]] = names["skipped"]
        offsets = self._tables["document_offsets"]
        self.lengths: NDArray[np.int64] = np.diff(offsets)
        self._starts: list[int] = offsets.tolist()
        rows = self._tables["segment_offsets"]
        if not (
            len(self._starts) == len(rows) == len(self.keys) + 1 == len(self._tables["document_crc32"]) + 1
            and (self.lengths >= 0).all()
            and (np.diff(rows) >= 0).all()
            and int(rows[-1]) == len(self._tables["segments"]) == len(self._tables["segment_weights"])
            and int(self._tables["segments"][:, 0].sum()) == self._starts[-1]
            and (places is None) == (latents is None)
            and self._tables["segments"].shape[1] == (4 if places is None else 5)
            and (self._tables["segments"] >= 0).all()
            and (places is None or (len(places) == len(self._starts) and (np.diff(places) >= 0).all()))
        ):
            raise ValueError("its tables disagree")

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]], where: str) -> TokenBlock:
        """A block in memory. Raises ValueError (or KeyError) as the constructor."""
        ids, positions, latents = tensors["ids"], tensors["positions"], tensors.get("latents")
        block = cls(tensors, ids, positions, latents, where=where)
        if latents is not None and latents.shape != (block._latent_starts[-1],):
            raise ValueError("its tables and latents disagree")
        if ids.shape != (block._starts[-1],) or positions.shape != (block._starts[-1], 4):
            raise ValueError("its tables and tokens disagree")
        return block

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> TokenBlock:
        """Inverse of `to_bytes`. Raises DataError on anything else."""
        try:
            return cls.of(load(data), where)
        except (SafetensorError, ValueError, KeyError, IndexError) as error:
            raise DataError(
                "malformed block of tokens", where=where, why=f"{type(error).__name__}: {error}"
            ) from None

    def to_bytes(self) -> bytes:
        """The block as safetensors."""
        return save(self.tensors())

    def tensors(self) -> Tensors:
        """The arrays of this module's docstring."""
        ids, positions = self._ids[:], self._positions[:]
        more = {} if self._latents is None else {"latents": self._latents[:]}
        return {"ids": ids, "positions": positions, **more, **self._tables}

    def __len__(self) -> int:
        return len(self.keys)

    def entry(self, i: int) -> dict[str, Any] | None:
        """The entry in `skipped` of document i; None if it could be made."""
        if self.lengths[i]:
            return None
        return next((e for e in self.skipped if e["key"] == self.keys[i]), None)

    def again(self, numbers: Sequence[int]) -> list[int]:
        """Those of these documents that could not be made, and that another try may make."""
        open_ends = {e["key"] for e in self.skipped if not e.get("lasting", True)}
        return [i for i in numbers if not self.lengths[i] and self.keys[i] in open_ends]

    def settled(self) -> TokenBlock:
        """The same block, with its skips as they are stored: no other try will be made."""
        names = {"keys": self.keys, "skipped": [{k: e[k] for k in ("key", "reason")} for e in self.skipped]}
        tables = {**self._tables, "names": np.frombuffer(json.dumps(names).encode(), np.uint8)}
        return TokenBlock(tables, self._ids, self._positions, self._latents, where=self.where)

    def document(self, i: int) -> Document:
        """Document i, equal to a fresh encoding of its sample. Raises DataError if its bytes changed."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.where}")
        begin, end = self._starts[i], self._starts[i + 1]
        ids, positions = self._ids[begin:end], self._positions[begin:end]
        latents = None
        if self._latents is not None:
            latents = self._latents[self._latent_starts[i] : self._latent_starts[i + 1]]
        held = [] if latents is None or not len(latents) else [latents]
        if crc_of(ids, positions, *held) != int(self._tables["document_crc32"][i]):
            raise DataError(
                "damaged token cache",
                where=f"{self.where}#{self.keys[i]}",
                why="crc32 of the tokens differs",
                fix="delete it and run `ringweave data index DIR --tokenizers TOKENIZERS`",
            )
        positions = positions.astype(np.int32)
        first, last = self._tables["segment_offsets"][i : i + 2].tolist()
        rows = self._tables["segments"][first:last].tolist()
        weights = self._tables["segment_weights"][first:last].tolist()
        segments, at, taken = [], 0, 0
        for (length, modality, role, attends, *channels), weight in zip(rows, weights):
            inside = slice(at, at + length)
            at += length
            own = None
            if latents is not None and channels[0]:
                end = taken + int((ids[inside] == LATENT).sum()) * channels[0]
                own = latents[taken:end].reshape(-1, channels[0])
                taken = end
            segments.append(
                Segment(
                    ids[inside],
                    MODALITIES[modality],
                    positions[inside],
                    role=_ROLES[role],
                    attends=_ATTENDS[attends],
                    weight=weight,
                    latents=own,
                )
            )
        return Document(self.keys[i], tuple(segments))

    def target_counts(self) -> dict[str, NDArray[np.int64]]:
        """modality -> int64 [largest id + 1], how often each id is predicted with a weight above 0."""
        segments, documents = self._tables["segments"], self._tables["document_offsets"]
        starts = np.concatenate([[0], np.cumsum(segments[:, 0])])
        trained = (self._tables["segment_weights"] > 0) & (segments[:, 2] == _ROLES.index("target"))
        # The first token of a document is nobody's target.
        begins = starts[:-1] + np.isin(starts[:-1], documents[:-1])
        counts: dict[str, NDArray[np.int64]] = {}
        waiting: dict[str, list[NDArray[np.int32]]] = {}
        tokens = 0
        for s in np.flatnonzero(trained & (begins < starts[1:])).tolist():
            begin, end = int(begins[s]), int(starts[s + 1])
            waiting.setdefault(MODALITIES[int(segments[s, 1])], []).append(self._ids[begin:end])
            tokens += end - begin
            if tokens >= _COUNT_AT_ONCE:
                _count(counts, waiting)
                tokens = 0
        _count(counts, waiting)
        return counts


def join_blocks(blocks: Sequence[TokenBlock], where: str) -> TokenBlock:
    """The documents of several blocks, one block after the other."""
    if len(blocks) == 1:
        return blocks[0]
    parts = [block.tensors() for block in blocks]
    kinds = {p["positions"].dtype for p in parts if len(p["ids"])}
    wide = np.dtype(np.int32 if np.dtype(np.int32) in kinds else np.int16)
    names: dict[str, list[Any]] = {"keys": [], "skipped": []}
    for block, part in zip(blocks, parts):
        names["keys"] += block.keys
        names["skipped"] += block.skipped
        if part["positions"].dtype != wide:
            part["positions"] = part["positions"].astype(wide)
            ends = part["document_offsets"].tolist()
            starts = part.get(LATENT_TABLE, np.zeros(1, np.int64)).tolist()
            crcs = _crcs(part["ids"], part["positions"], ends, part.get("latents"), starts)
            part["document_crc32"] = np.asarray(crcs, np.uint32)
    offsets = ["document_offsets", "segment_offsets"]
    if any("latents" in part for part in parts):
        offsets.append(LATENT_TABLE)
        for part in parts:
            if "latents" not in part:
                part["latents"] = np.zeros(0, np.float32)
                part[LATENT_TABLE] = np.zeros_like(part["document_offsets"])
                part["segments"] = np.pad(part["segments"], ((0, 0), (0, 1)))
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0] if name not in _SPECIAL}
    for name in offsets:
        shifts = np.cumsum([0, *(int(p[name][-1]) for p in parts)])
        joined[name] = np.concatenate([[0], *(p[name][1:] + shift for p, shift in zip(parts, shifts))])
        joined[name] = joined[name].astype(np.int64)
    joined["names"] = np.frombuffer(json.dumps(names).encode(), np.uint8)
    return TokenBlock.of(joined, where)


#: Arrays that are not simply put one after the other.
_SPECIAL = ("document_offsets", "segment_offsets", LATENT_TABLE, "names")


def add_counts(total: NDArray[np.int64] | None, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum of two histograms of ids of different lengths."""
    if total is None:
        return counts
    longer, shorter = (total, counts) if len(total) >= len(counts) else (counts, total)
    merged = longer.copy()
    merged[: len(shorter)] += shorter
    return merged


def _count(counts: dict[str, NDArray[np.int64]], waiting: dict[str, list[NDArray[np.int32]]]) -> None:
    """Moves the waiting ids into the histograms."""
    for modality, arrays in waiting.items():
        counts[modality] = add_counts(counts.get(modality), np.bincount(np.concatenate(arrays)))
    waiting.clear()
