"""`TokenizerSet`: all codecs under one vocabulary; arrays and text to `Segment`s of global ids, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.audio import AudioCodec, resample
from ringweave.tokenizers.codec import kind_of, sha256
from ringweave.tokenizers.conv_codecs import ConvAudioCodec, ConvImageCodec, ConvScoreCodec
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.grid import write_grid
from ringweave.tokenizers.image import ImageCodec
from ringweave.tokenizers.manifest import BOS, CONTROL, EOS, Block, VocabularyManifest
from ringweave.tokenizers.parse import BLANK_ID, DELIMITERS, EOF, EOL, LAYER, Decoded, Parser
from ringweave.tokenizers.rgba import RgbaCodec
from ringweave.tokenizers.score import ScoreCodec
from ringweave.tokenizers.segment import Document, Role, Segment
from ringweave.tokenizers.text import TextCodec

MANIFEST_NAME = "tokenizers.json"
#: Unit of the time axis of positions.
TIME_UNIT_MS = 40
#: Order of the blocks in the vocabulary.
CODECS: dict[str, Any] = {
    "text": TextCodec,
    "image": ImageCodec,
    "rgba": RgbaCodec,
    "audio": AudioCodec,
    "score": ScoreCodec,
}
#: Codecs that may stand in for those of CODECS: the kind that their file names -> class.
LEARNED: dict[str, Any] = {codec.kind: codec for codec in (ConvImageCodec, ConvScoreCodec, ConvAudioCodec)}
I32 = NDArray[np.int32]


def codec_class(name: str, data: bytes) -> Any:
    """The class that reads the file `data` of the codec `name`: a learned one where it says so."""
    kind = kind_of(data) if name != "text" else ""
    return LEARNED[kind] if kind in LEARNED and kind.partition(".")[0] == name else CODECS[name]


def file_name(codec: str) -> str:
    """The codec's file in a tokenizer folder."""
    return "text.model" if codec == "text" else f"{codec}.safetensors"


class TokenizerSet:
    """codecs: name -> codec, any subset of CODECS (video uses the image codec).

    `files` are the bytes each codec was loaded from; they are written back unchanged, so that a saved copy
    has the same manifest whatever library versions are installed.
    """

    def __init__(self, codecs: dict[str, Any], *, files: dict[str, bytes] | None = None) -> None:
        self.codecs = {name: codecs[name] for name in CODECS if name in codecs}
        self.files = files or {name: codec.to_bytes() for name, codec in self.codecs.items()}

    @cached_property
    def manifest(self) -> VocabularyManifest:
        """The vocabulary these codecs make."""
        parts = []
        for name, codec in self.codecs.items():
            digest = codec.piece_hash() if name == "text" else sha256(self.files[name])
            parts += [(block, size, name, name, digest) for block, size in _blocks_of(name, codec)]
        text = self.codecs.get("text")
        return VocabularyManifest.build(
            parts, text_pieces=text.piece_hash() if text else "", preprocessing=_preprocessing(self.codecs)
        )

    def save(self, folder: Path) -> None:
        """Write `tokenizers.json` and one file per codec into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / file_name(name)).write_bytes(data)
        self.manifest.save(folder / MANIFEST_NAME)

    @classmethod
    def load(cls, folder: Path) -> TokenizerSet:
        """Read a folder that `save` wrote.

        VocabularyError when a file is missing or damaged, naming its codec, or is not the one the manifest
        was made with.
        """
        folder = Path(folder)
        manifest = VocabularyManifest.load(folder / MANIFEST_NAME)
        codecs, files = {}, {}
        for name in dict.fromkeys(block.codec for block in manifest.blocks):
            path = folder / file_name(name)
            if name not in CODECS:
                raise VocabularyError(f"the manifest names an unknown codec {name!r}", where=str(folder))
            try:
                files[name] = path.read_bytes()
            except OSError as error:
                raise VocabularyError(
                    f"the {name} codec is missing", where=str(path), why=str(error)
                ) from error
            expected = next(block.sha256 for block in manifest.blocks if block.codec == name)
            if name != "text":
                _same(name, expected, sha256(files[name]), path)
            try:
                codecs[name] = codec_class(name, files[name]).from_bytes(files[name], where=str(path))
            except (KeyError, ValueError, TypeError, IndexError) as error:
                raise VocabularyError(
                    f"the {name} codec is malformed", where=str(path), why=f"{type(error).__name__}: {error}"
                ) from error
            if name == "text":
                _same(name, expected, codecs[name].piece_hash(), path)
        loaded = cls(codecs, files=files)
        if loaded.manifest != manifest:
            raise VocabularyError(
                "the vocabulary manifest does not describe the codecs beside it",
                where=str(folder / MANIFEST_NAME),
                fix="restore the folder from a copy, or train tokenizers again: ringweave tokenizer train",
            )
        return loaded

    def _codec(self, name: str) -> Any:
        if name not in self.codecs:
            known = ", ".join(self.codecs) or "none"
            raise VocabularyError(
                f"this tokenizer set has no {name} codec",
                why=f"its codecs: {known}",
                fix=f"train one on shards that hold {name}: ringweave tokenizer train",
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

        A frame has the ids of `image_segment`. `time` counts units of 40 ms from the first frame.
        """
        _check(frames, "video", 4, 3)
        seconds = np.asarray(times, np.float64)
        if seconds.shape != (len(frames),) or not np.isfinite(seconds).all() or (np.diff(seconds) <= 0).any():
            raise DataError(f"a video of {len(frames)} frames needs as many increasing times")
        units = np.rint((seconds - seconds[0]) * (1000 / TIME_UNIT_MS)).astype(int)
        codes = self._codec("image").encode(frames)
        grids = [self._picture_ids(grid, time=int(t)) for grid, t in zip(codes, units)]
        return self._framed("video", _joined(grids, EOF), role, weight)

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
        image block has `codebook` ids, DataError for codes outside it.
        """
        size = self._blocks_or_raise("image")[0].size
        if size != codebook:
            raise VocabularyError(
                f"codes of a codebook of {codebook} do not fit these tokenizers",
                why=f"their image block has {size} ids",
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
        """int16 [T] mono at `rate` Hz (resampled if need be): `boa`, frames book by book, `eoa`.

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
        part = ((codes + starts).reshape(-1).astype(np.int32), places.reshape(-1, 4))
        return self._framed("audio", [part], role, weight)

    def _blocks_or_raise(self, name: str) -> list[Block]:
        self._codec(name)
        return self._blocks[name]

    def _picture_ids(self, codes: I32, *, time: int = 0) -> tuple[I32, I32]:
        start = np.int32(self._blocks["image"][0].start)
        return write_grid(codes[..., None] + start, eol=EOL, blank=BLANK_ID, time=time)

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


def _same(name: str, expected: str, found: str, path: Path) -> None:
    if expected != found:
        raise VocabularyError(
            f"the {name} codec is not the one the vocabulary was made with",
            where=str(path),
            why=f"its hash is {found[:12]}, the manifest says {expected[:12]}",
            fix="restore the file, or train tokenizers again: ringweave tokenizer train",
        )


def _blocks_of(name: str, codec: Any) -> list[tuple[str, int]]:
    """(block name, number of ids) of a codec, in the order its ids are written."""
    if name == "text":
        return [("text", codec.size)]
    if name == "image":
        return [("image", codec.codes)]
    if name == "rgba":
        labels = [f"rgba.alpha{i}" for i in range(codec.books)] + ["rgba.colour"]
        return list(zip(labels, codec.block_sizes))
    return [(f"{name}.q{i}", codec.codes) for i in range(codec.books)]


def _preprocessing(codecs: dict[str, Any]) -> dict[str, Any]:
    """What happens before the codecs, and the sizes a reader of ids needs."""
    out: dict[str, Any] = {"time_unit_ms": TIME_UNIT_MS, "control_size": len(CONTROL)}
    if "text" in codecs:
        out["text"] = {"normalisation": "identity", "escape": "U+2581 as U+E000 1, U+E000 as U+E000 0"}
    if "image" in codecs:
        out["image"] = {"patch": codecs["image"].patch, "pad": "edge", "colour": "RGB as stored"}
        out["video"] = {"codec": "image, each frame", "frames": "all, at their own times"}
    if "rgba" in codecs:
        out["rgba"] = {"patch": codecs["rgba"].patch, "pad": "edge", "alpha": "straight"}
    if "audio" in codecs:
        audio = codecs["audio"]
        out["audio"] = {"rate": audio.rate, "hop": audio.hop, "channels": "mono", "order": "frame-major"}
    if "score" in codecs:
        out["score"] = {"patch": codecs["score"].patch, "pad": "white", "colour": "grey"}
    for name, codec in codecs.items():
        if codec.kind in LEARNED:
            out[name]["codec"] = codec.kind
    return out
