"""`TokenizerSet`: all codecs under one vocabulary; arrays and text to `Segment`s of global ids, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers import sub_ids
from ringweave.tokenizers.audio import resample
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.grid import write_grid
from ringweave.tokenizers.manifest import BOS, EOS, Block, VocabularyManifest
from ringweave.tokenizers.parse import BLANK_ID, DELIMITERS, EOF, EOL, LAYER, Decoded, Parser, audio_cells
from ringweave.tokenizers.segment import LATENT, Document, Role, Segment
from ringweave.tokenizers.set_files import (
    AUDIO_ORDERS,
    CODECS,
    MANIFEST_NAME,
    TIME_UNIT_MS,
    WITHOUT_IDS,
    make_manifest,
    read_codecs,
    write_files,
)
from ringweave.tokenizers.video_ids import write_frames

I32 = NDArray[np.int32]


class TokenizerSet:
    """codecs: name -> codec, any subset of CODECS (video uses the image codec, its own one besides if there is one).

    `files` are the bytes each codec was loaded from; they are written back unchanged, so that a saved copy
    has the same manifest whatever library versions are installed. `order`: codecs whose blocks come first, as in
    the vocabulary this set extends; `control`: the control ids of that vocabulary. `audio_order`: how the books of
    sound become one stream, a name of AUDIO_ORDERS.
    """

    def __init__(
        self,
        codecs: dict[str, Any],
        *,
        files: dict[str, bytes] | None = None,
        order: Sequence[str] = (),
        control: dict[str, int] | None = None,
        audio_order: str = "frame-major",
    ) -> None:
        self.codecs = {name: codecs[name] for name in dict.fromkeys([*order, *CODECS]) if name in codecs}
        if "video" in self.codecs:
            self.codecs["video"] = self.codecs["video"].on(self._codec("image"))
        given = files or {}
        self.files = {
            name: given[name] if name in given else codec.to_bytes() for name, codec in self.codecs.items()
        }
        self._control = control
        if audio_order not in AUDIO_ORDERS:
            raise VocabularyError(
                f"no order of audio books is called {audio_order!r}",
                fix=f"choose of {', '.join(AUDIO_ORDERS)}",
            )
        self.audio_order = audio_order

    @cached_property
    def manifest(self) -> VocabularyManifest:
        """The vocabulary these codecs make."""
        return make_manifest(self.codecs, self.files, control=self._control, audio_order=self.audio_order)

    def save(self, folder: Path) -> None:
        """Write `tokenizers.json` and one file per codec into `folder`."""
        folder = Path(folder)
        write_files(folder, self.codecs, self.files)
        self.manifest.save(folder / MANIFEST_NAME)

    @classmethod
    def load(cls, folder: Path) -> TokenizerSet:
        """Read a folder that `save` wrote.

        VocabularyError when a file is missing or damaged, naming its codec, or is not the one the manifest
        was made with.
        """
        folder = Path(folder)
        manifest = VocabularyManifest.load(folder / MANIFEST_NAME)
        codecs, files = read_codecs(folder, manifest)
        sound = manifest.preprocessing.get("audio")
        order = str(sound.get("order")) if isinstance(sound, dict) else "frame-major"
        loaded = cls(codecs, files=files, order=list(codecs), control=manifest.control, audio_order=order)
        if loaded.manifest != manifest:
            raise VocabularyError(
                "the vocabulary manifest does not describe the codecs beside it",
                where=str(folder / MANIFEST_NAME),
                why=manifest.difference(loaded.manifest, mine="the manifest", theirs="the codecs") or "",
                fix="restore the folder from a copy, or train tokenizers again: ringweave tokenizer train",
            )
        return loaded

    def extended(self, codecs: dict[str, Any]) -> TokenizerSet:
        """This set with further codecs, whose blocks come after its own: every id keeps its meaning.

        VocabularyError for a codec it already has.
        """
        twice = [name for name in codecs if name in self.codecs]
        if twice:
            raise VocabularyError(
                f"this tokenizer set already has a codec for {', '.join(twice)}",
                why="another codec in its place would change what ids mean",
                fix="make a new set: ringweave tokenizer train --out OTHER",
            )
        return TokenizerSet(
            {**self.codecs, **codecs},
            files=self.files,
            order=list(self.codecs),
            audio_order=self.audio_order,
        )

    def replaced(self, codecs: dict[str, Any]) -> TokenizerSet:
        """This set with other codecs in the place of its own, in the same order: another vocabulary."""
        files = {name: data for name, data in self.files.items() if name not in codecs}
        return TokenizerSet(
            {**self.codecs, **codecs}, files=files, order=list(self.codecs), audio_order=self.audio_order
        )

    def _codec(self, name: str) -> Any:
        if name not in self.codecs:
            known = ", ".join(self.codecs) or "none"
            raise VocabularyError(
                f"this tokenizer set has no {name} codec",
                why=f"its codecs: {known}",
                fix=f"train one on shards that hold {name}: ringweave tokenizer train"
                if name not in WITHOUT_IDS
                else f"train one on layers or pictures: ringweave tokenizer train --learn {name}",
            )
        return self.codecs[name]

    @cached_property
    def _blocks(self) -> dict[str, list[Block]]:
        return {
            name: [block for block in self.manifest.blocks if block.codec == name] for name in self.codecs
        }

    # ---- arrays and text to segments ----

    def text_segment(self, text: str, *, role: Role = "target", weight: float = 1.0) -> Segment:
        """The whole of `text`; no delimiters. `time` counts its ids. DataError for lone surrogates."""
        ids = self._codec("text").encode(text) + np.int32(self._blocks["text"][0].start)
        places = np.zeros((len(ids), 4), np.int32)
        places[:, 0] = np.arange(len(ids))
        return Segment(ids.astype(np.int32), "text", places, role, "causal", weight)

    def image_segment(
        self, image: NDArray[np.uint8], *, role: Role = "target", weight: float = 1.0
    ) -> Segment:
        """uint8 [H, W, 3]: `boi`, rows of ids each ended by `eol`, `eoi`."""
        _check(image, "image", 3, 3)
        grid = self._picture_ids(self._codec("image").encode(image))
        return self._framed("image", [grid], role, weight)

    def video_segment(
        self,
        frames: NDArray[np.uint8],
        times: NDArray[np.float64],
        *,
        role: Role = "target",
        weight: float = 1.0,
    ) -> Segment:
        """uint8 [T, H, W, 3] with times [T] in seconds: `bov`, frames with `eof` between them, `eov`.

        A frame has the ids of `image_segment`; with a video codec a later one may be what moved (`video_ids`).
        `time` counts units of 40 ms from the first frame.
        """
        _check(frames, "video", 4, 3)
        seconds = np.asarray(times, np.float64)
        if seconds.shape != (len(frames),) or not np.isfinite(seconds).all() or (np.diff(seconds) <= 0).any():
            raise DataError(f"a video of {len(frames)} frames needs as many increasing times")
        units = np.rint((seconds - seconds[0]) * (1000 / TIME_UNIT_MS)).astype(int)
        if "video" in self.codecs:
            codec = self.codecs["video"]
            starts = np.array([b.start for name in ("image", "video") for b in self._blocks[name]], np.int32)
            moved = codec.encode(frames)
            parts = write_frames(codec, moved, units.tolist(), starts=starts, eol=EOL, blank=BLANK_ID)
            return self._framed("video", _joined(parts, EOF), role, weight)
        codes = self._codec("image").encode(frames)
        grids = [self._picture_ids(grid, time=int(t)) for grid, t in zip(codes, units)]
        return self._framed("video", _joined(grids, EOF), role, weight)

    def latents_segment(
        self,
        latents: NDArray[np.float32],
        *,
        modality: str = "image",
        times: NDArray[np.float64] | None = None,
        role: Role = "target",
        weight: float = 1.0,
    ) -> Segment:
        """Continuous latents float32 [T, h, w, Z]: placeholders in the rows of a picture, seen both ways.

        T is 1 for an image, the layers (bottom first) for rgba, and frames at `times` [T] in seconds for video.
        weight: of the loss of each latent. DataError for other shapes and for what is not finite.
        """
        latents = np.asarray(latents)
        if latents.ndim != 4 or 0 in latents.shape or latents.dtype != np.float32:
            raise DataError(
                f"latents must be float32 [T, h, w, Z], got {latents.dtype} {list(latents.shape)}"
            )
        if not np.isfinite(latents).all():
            at = np.argwhere(~np.isfinite(latents))[0].tolist()
            raise DataError("latents are not finite", why=f"the first is at {at} of {list(latents.shape)}")
        count = len(latents)
        units = np.zeros(count, int)
        if modality == "video":
            seconds = np.zeros(0) if times is None else np.asarray(times, np.float64)
            if seconds.shape != (count,) or not np.isfinite(seconds).all() or (np.diff(seconds) <= 0).any():
                raise DataError(f"{count} frames of latents need as many increasing times")
            units = np.rint((seconds - seconds[0]) * (1000 / TIME_UNIT_MS)).astype(int)
        elif modality not in ("image", "rgba") or (modality == "image" and count > 1):
            raise DataError(f"{count} grids of latents are no {modality}", fix="name rgba or video")
        layers = range(count) if modality == "rgba" else [0] * count
        place = np.full((*latents.shape[1:3], 1), LATENT, np.int32)
        grids = [
            write_grid(place, eol=EOL, blank=BLANK_ID, time=int(time), layer=layer)
            for time, layer in zip(units, layers)
        ]
        framed = self._framed(modality, _joined(grids, LAYER if modality == "rgba" else EOF), role, weight)
        rows = np.ascontiguousarray(latents.reshape(-1, latents.shape[-1]))
        return replace(framed, attends="bidirectional", latents=rows)

    def encode_layer(self, layer: NDArray[np.uint8], *, afresh: bool = False) -> NDArray[np.float32]:
        """Cells float32 [h, w, Z] of one layer uint8 [H, W, 4] by the latents codec: see `LatentCodec.encode`."""
        cells: NDArray[np.float32] = self._codec("latents").encode(layer, afresh=afresh)
        return cells

    def decode_layer(self, cells: NDArray[np.float32]) -> NDArray[np.uint8]:
        """uint8 [h * patch, w * patch, 4] of cells [h, w, Z]; a layer of another size is cropped by who knows it."""
        layer: NDArray[np.uint8] = self._codec("latents").decode(cells)
        return layer

    def codes_segment(
        self,
        codes: I32,
        *,
        codebook: int,
        times: NDArray[np.float64] | None = None,
        role: Role = "target",
        weight: float = 1.0,
    ) -> Segment:
        """Codes int [T, H, W] made by another program with a codebook of `codebook` entries.

        With `times` [T] in seconds a video, else the one picture codes[0]. Raises VocabularyError unless the
        image codec has `codebook` codes, DataError for codes outside it.
        """
        size = self._codec("image").codes
        if size != codebook:
            raise VocabularyError(
                f"codes of a codebook of {codebook} do not fit these tokenizers",
                why=f"their image block has {size} codes",
                fix=f"use tokenizers whose image codec has {codebook} codes, or leave this source out",
            )
        codes = np.asarray(codes)
        if codes.ndim != 3 or not codes.size or codes.min() < 0 or codes.max() >= codebook:
            raise DataError(f"picture codes must be [T, H, W] in [0, {codebook}), got {list(codes.shape)}")
        if times is None:
            return self._framed("image", [self._picture_ids(codes[0].astype(np.int32))], role, weight)
        units = np.rint((times - times[0]) * (1000 / TIME_UNIT_MS)).astype(int)
        grids = [self._picture_ids(grid.astype(np.int32), time=int(t)) for grid, t in zip(codes, units)]
        return self._framed("video", _joined(grids, EOF), role, weight)

    def rgba_segment(
        self, layers: Sequence[NDArray[np.uint8]], *, role: Role = "target", weight: float = 1.0
    ) -> Segment:
        """Layers uint8 [H, W, 4] of one size, bottom first: `bor`, layers parted by `layer`, `eor`."""
        if not len(layers) or len({layer.shape for layer in layers}) > 1:
            raise DataError("an rgba record needs one or more layers of one size")
        starts = np.array([block.start for block in self._blocks_or_raise("rgba")], np.int32)
        grids = []
        for number, layer in enumerate(layers):
            _check(layer, "rgba", 3, 4)
            cells = self._codec("rgba").encode(layer)
            ids = np.where(cells >= 0, cells + starts, cells)
            grids.append(write_grid(ids, eol=EOL, blank=BLANK_ID, layer=number))
        return self._framed("rgba", _joined(grids, LAYER), role, weight)

    def score_segment(
        self, page: NDArray[np.uint8], *, role: Role = "target", weight: float = 1.0
    ) -> Segment:
        """Grey uint8 [H, W]: `bos_score`, rows each ended by `eol`, `eos_score`."""
        _check(page[..., None] if page.ndim == 2 else page, "score", 3, 1)
        starts = np.array([block.start for block in self._blocks_or_raise("score")], np.int32)
        codes = self._codec("score").encode(page)
        ids = np.where(codes >= 0, codes + starts, codes)
        return self._framed("score", [write_grid(ids, eol=EOL, blank=BLANK_ID)], role, weight)

    def audio_segment(
        self, samples: NDArray[np.int16], rate: int, *, role: Role = "target", weight: float = 1.0
    ) -> Segment:
        """int16 [T] mono at `rate` Hz (resampled if need be): `boa`, codes in `audio_order`, `eoa`.

        Positions: `time` in units of 40 ms, the book as `row`.
        """
        samples = np.asarray(samples)
        if samples.ndim != 1 or samples.dtype != np.int16 or not len(samples) or rate <= 0:
            raise DataError(
                f"audio must be int16 [T] mono, T > 0, got {samples.dtype} {list(samples.shape)} at {rate} Hz"
            )
        codec = self._codec("audio")
        codes = codec.encode(resample(samples, int(rate), codec.rate))
        starts = np.array([block.start for block in self._blocks["audio"]], np.int32)
        places = np.zeros((*codes.shape, 4), np.int32)
        unit = codec.rate * TIME_UNIT_MS // 1000  # samples
        places[..., 0] = (np.arange(len(codes)) * codec.hop // unit)[:, None]
        places[..., 1] = np.arange(codec.books)[None]
        cells = audio_cells(len(codes), codec.books, self.audio_order)
        part = ((codes + starts).reshape(-1)[cells].astype(np.int32), places.reshape(-1, 4)[cells])
        return self._framed("audio", [part], role, weight)

    def symbolic_segment(
        self, xml: bytes, *, where: str = "", role: Role = "target", weight: float = 1.0
    ) -> Segment:
        """MusicXML (.musicxml or .mxl): `bos_symbolic`, LMX words, `eos_symbolic`. `time` counts words."""
        return self._worded("symbolic", xml, where, role, weight)

    def midi_segment(
        self, data: bytes, *, where: str = "", role: Role = "target", weight: float = 1.0
    ) -> Segment:
        """A Standard MIDI File: `bos_midi`, events, `eos_midi`. `time` in units of 40 ms, as for sound."""
        return self._worded("midi", data, where, role, weight)

    def _worded(self, name: str, data: bytes, where: str, role: Role, weight: float) -> Segment:
        codec = self._codec(name)
        ids = codec.encode(data, where=where)
        if not len(ids):
            raise DataError(f"nothing of this {name} record can be written", where=where)
        places = np.zeros((len(ids), 4), np.int32)
        places[:, 0] = codec.times(ids, unit_ms=TIME_UNIT_MS)
        part = ((ids + np.int32(self._blocks[name][0].start)).astype(np.int32), places)
        return self._framed(name, [part], role, weight)

    def _blocks_or_raise(self, name: str) -> list[Block]:
        self._codec(name)
        return self._blocks[name]

    def _picture_ids(self, codes: I32, *, time: int = 0) -> tuple[I32, I32]:
        starts = np.array([block.start for block in self._blocks["image"]], np.int32)
        parts = sub_ids.split(codes, codebook=self.codecs["image"].codes)
        return write_grid(parts + starts, eol=EOL, blank=BLANK_ID, time=time)

    def _framed(self, modality: str, parts: list[tuple[I32, I32]], role: Role, weight: float) -> Segment:
        """The parts between the modality's delimiters; the closing one stands at the last position."""
        begin, end = DELIMITERS[modality]
        ids = [part[0] for part in parts]
        places = [part[1] for part in parts]
        last = places[-1][-1:]
        return Segment(
            np.concatenate([np.array([begin], np.int32), *ids, np.array([end], np.int32)]),
            modality,
            np.concatenate([np.zeros((1, 4), np.int32), *places, last]),
            role,
            "causal",
            weight,
        )

    def document(self, key: str, segments: Sequence[Segment]) -> Document:
        """`segments` in order, `bos` in front of the first and `eos` after the last, as part of those."""
        if not segments:
            raise DataError("a document needs at least one segment", where=key)
        parts = list(segments)
        first = parts[0]
        parts[0] = replace(
            first,
            ids=np.concatenate([np.array([BOS], np.int32), first.ids]),
            positions=np.concatenate([np.zeros((1, 4), np.int32), first.positions]),
        )
        last = parts[-1]
        parts[-1] = replace(
            last,
            ids=np.concatenate([last.ids, np.array([EOS], np.int32)]),
            positions=np.concatenate([last.positions, _after(last.positions)]),
        )
        return Document(key, tuple(parts))

    # ---- ids to values ----

    @cached_property
    def _parser(self) -> Parser:
        return Parser(self)

    def decode(self, ids: NDArray[np.int32]) -> list[Decoded]:
        """The items in a stream of global ids. Never raises on ids of any kind: see `parse`."""
        return self._parser.parse(ids)


def _after(positions: I32) -> I32:
    """The position of an id that ends a segment: the last one's."""
    return positions[-1:] if len(positions) else np.zeros((1, 4), np.int32)


def _joined(grids: list[tuple[I32, I32]], mark: int) -> list[tuple[I32, I32]]:
    """The grids with the control id `mark` between each two; it takes the position of the id before it."""
    out: list[tuple[I32, I32]] = []
    for number, grid in enumerate(grids):
        if number:
            out.append((np.array([mark], np.int32), out[-1][1][-1:]))
        out.append(grid)
    return out


def _check(array: NDArray[Any], what: str, dims: int, channels: int) -> None:
    """DataError unless uint8 with `dims` axes, none empty, the last of `channels`."""
    if array.dtype != np.uint8 or array.ndim != dims or array.shape[-1] != channels or 0 in array.shape:
        raise DataError(f"{what} must be uint8 [.., H, W, {channels}], got {array.dtype} {list(array.shape)}")
