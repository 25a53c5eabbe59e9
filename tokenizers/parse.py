"""Global ids back to text, pictures, sound: the reading half of `TokenizerSet`.

Built for model output. It never raises: an unknown, misplaced or missing id ends or dents the item it stands
in, which is then marked `complete=False`; ids between items that mean nothing there are passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers import sub_ids
from ringweave.tokenizers.grid import MISSING, GridReader, stack_grids
from ringweave.tokenizers.manifest import CONTROL
from ringweave.tokenizers.rvq_layout import LAYOUTS
from ringweave.tokenizers.video_ids import LINE, MOVE, NEXT, RUN, read_frames

if TYPE_CHECKING:
    from ringweave.tokenizers.set import TokenizerSet

#: (begin, end) of each modality that has them.
DELIMITERS: dict[str, tuple[int, int]] = {
    "image": (CONTROL["boi"], CONTROL["eoi"]),
    "rgba": (CONTROL["bor"], CONTROL["eor"]),
    "video": (CONTROL["bov"], CONTROL["eov"]),
    "audio": (CONTROL["boa"], CONTROL["eoa"]),
    "score": (CONTROL["bos_score"], CONTROL["eos_score"]),
    "symbolic": (CONTROL["bos_symbolic"], CONTROL["eos_symbolic"]),
    "midi": (CONTROL["bos_midi"], CONTROL["eos_midi"]),
}
EOL, EOF, LAYER, BLANK_ID = CONTROL["eol"], CONTROL["eof"], CONTROL["layer"], CONTROL["blank"]
#: Control ids that may stand inside an item.
INSIDE: dict[str, set[int]] = {
    "image": {EOL},
    "rgba": {EOL, LAYER, BLANK_ID},
    "video": {EOL, EOF},
    "audio": set(),
    "score": {EOL, BLANK_ID},
    "symbolic": set(),
    "midi": set(),
}


@dataclass(frozen=True)
class Decoded:
    """One item of a stream of ids.

    value: text -> str; image -> uint8 [H, W, 3]; rgba -> list of uint8 [H, W, 4], bottom first; video ->
    uint8 [T, H, W, 3]; audio -> (int16 [T], rate in Hz); score -> uint8 [H, W]; symbolic ->
    MusicXML as str; midi -> bytes of a Standard MIDI File.
    start, end: the ids [start, end) it was read from; complete: nothing was missing or out of place.
    """

    modality: str
    value: Any
    start: int
    end: int
    complete: bool


class Parser:
    """Reads ids for one `TokenizerSet`."""

    def __init__(self, tokenizers: TokenizerSet) -> None:
        self._set = tokenizers
        manifest = tokenizers.manifest
        # For each id: the codec it belongs to ("" for none), the column (book) in it, and the code.
        self._codec = np.full(manifest.size, -1, np.int16)
        self._column = np.zeros(manifest.size, np.int16)
        self._code = np.full(manifest.size, -1, np.int32)
        self._names = list(dict.fromkeys(block.codec for block in manifest.blocks))
        seen: dict[str, int] = {}
        for block in manifest.blocks:
            span = slice(block.start, block.stop)
            self._codec[span] = self._names.index(block.codec)
            self._column[span] = seen.get(block.codec, 0)
            self._code[span] = np.arange(block.size)
            seen[block.codec] = seen.get(block.codec, 0) + 1
        self._begins = {
            begin: name
            for name, (begin, _) in DELIMITERS.items()
            if ("image" if name == "video" else name) in self._names
        }

    def parse(self, ids: NDArray[np.int32]) -> list[Decoded]:
        """All items of `ids` [n], in order."""
        raw = np.asarray(ids).reshape(-1).astype(np.int64)
        known = (raw >= 0) & (raw < len(self._codec))
        stream = np.where(known, raw, CONTROL["pad"])
        owners = self._codec[stream]
        out: list[Decoded] = []
        at = 0
        while at < len(stream):
            owner = self._names[owners[at]] if owners[at] >= 0 else ""
            modality = owner or self._begins.get(int(stream[at]), "")
            if not modality:
                at += 1
                continue
            item = (
                self._text(stream, owners, at)
                if modality == "text"
                else self._item(stream, owners, at, modality, begun=not owner)
            )
            out.append(item)
            at = item.end
        return out

    def _text(self, stream: NDArray[np.int64], owners: NDArray[np.int16], start: int) -> Decoded:
        end = _run_end(start, len(stream), lambda part: owners[part] == owners[start])
        return Decoded(
            "text", self._set.codecs["text"].decode(self._code[stream[start:end]]), start, end, True
        )

    def _item(
        self, stream: NDArray[np.int64], owners: NDArray[np.int16], start: int, modality: str, *, begun: bool
    ) -> Decoded:
        """An item from `start`: its begin delimiter if `begun`, else an id of its codec (a torn-off tail)."""
        own = ("image", "video") if modality == "video" else (modality,)
        codecs = [number for number, name in enumerate(self._names) if name in own]
        first = start + begun

        def inside(part: slice) -> NDArray[np.bool_]:
            found = np.isin(owners[part], codecs)
            for control in INSIDE[modality]:
                found |= stream[part] == control
            return found

        end = _run_end(first, len(stream), inside)
        closed = end < len(stream) and stream[end] == DELIMITERS[modality][1]
        body = stream[first:end]
        value: Any
        if modality == "audio":
            value, whole = self._audio(body)
        elif modality in ("symbolic", "midi"):
            value, whole = self._set.codecs[modality].decode(self._code[body])
        elif modality == "video" and "video" in self._names:
            value, whole = self._video(body)
        else:
            value, whole = self._picture(body, modality)
        return Decoded(modality, value, start, end + closed, bool(begun and closed and whole))

    def _picture(self, body: NDArray[np.int64], modality: str) -> tuple[Any, bool]:
        columns = self._column_count("image" if modality == "video" else modality)
        skip = 0 if modality == "rgba" else None
        grids = [GridReader(columns, skip_on=skip)]
        for token, column, code in zip(body.tolist(), self._column[body].tolist(), self._code[body].tolist()):
            if token == EOL:
                grids[-1].line()
            elif token == BLANK_ID:
                grids[-1].blank()
            elif token in (EOF, LAYER):
                grids.append(GridReader(columns, skip_on=skip))
            else:
                grids[-1].put(column, code)
        for grid in grids:
            grid.finish()
        cells, whole = stack_grids(grids, columns)
        codecs = self._set.codecs
        if modality == "rgba":
            return list(codecs["rgba"].decode(cells)), whole
        if modality == "score":
            return codecs["score"].decode(cells[0]), whole
        pictures = codecs["image"].decode(sub_ids.join(cells, codebook=codecs["image"].codes))
        return (pictures if modality == "video" else pictures[0]), whole

    def _video(self, body: NDArray[np.int64]) -> tuple[NDArray[np.uint8], bool]:
        codec = self._set.codecs["video"]
        kinds = self._column[body].astype(np.int32)
        owned = self._codec[body] == self._names.index("video")
        kinds[owned] = np.array([MOVE, RUN], np.int32)[kinds[owned]]
        kinds[body == EOL], kinds[body == EOF] = LINE, NEXT
        frames, whole = read_frames(codec, kinds, self._code[body])
        return codec.decode(frames), whole

    def _column_count(self, codec: str) -> int:
        return sum(block.codec == codec for block in self._set.manifest.blocks)

    def _audio(self, body: NDArray[np.int64]) -> tuple[tuple[NDArray[np.int16], int], bool]:
        codec = self._set.codecs["audio"]
        books, columns, codes = codec.books, self._column[body], self._code[body]
        if self._set.audio_order == "frame-major":
            # A frame begins where the book does not go up; well-formed streams go up by one.
            begins = np.append(True, columns[1:] <= columns[:-1])[: len(body)]
            frame = np.cumsum(begins) - 1
            out = np.full((int(frame[-1]) + 1 if len(body) else 0, books), MISSING, np.int32)
            out[frame, columns] = codes
            return (codec.decode(out), codec.rate), bool(len(body)) and not (out == MISSING).any()
        # In the other orders the n-th id of a book is that of frame n.
        counts = np.bincount(columns, minlength=books)
        out = np.full((int(counts.max(initial=0)), books), MISSING, np.int32)
        for book in range(books):
            out[: counts[book], book] = codes[columns == book]
        cells = audio_cells(len(out), books, self._set.audio_order)
        whole = bool(len(body)) and len(cells) == len(body) and bool((cells % books == columns).all())
        return (codec.decode(out), codec.rate), whole


def audio_cells(frames: int, books: int, order: str) -> NDArray[np.int64]:
    """Places in the flattened [frames, books] of the codes of sound, in the order in which they are written."""
    places = np.arange(frames * books, dtype=np.int32).reshape(frames, books)
    name = {"frame-major": "flatten", "coarse-first": "coarse_first"}.get(order, order)
    written = LAYOUTS[name].write(places).reshape(-1)
    return written[written != MISSING].astype(np.int64)


def _run_end(start: int, stop: int, inside: Callable[[slice], NDArray[np.bool_]]) -> int:
    """First place from `start` where `inside` is False, or `stop`; in growing parts, linear in total."""
    size = 64
    while start < stop:
        part = slice(start, min(stop, start + size))
        others = np.flatnonzero(~inside(part))
        if len(others):
            return start + int(others[0])
        start, size = part.stop, size * 2
    return stop
