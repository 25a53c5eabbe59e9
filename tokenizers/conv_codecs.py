"""The learned codecs: pictures, score pages and sound in front of one `ConvCore`.

Each takes the place of its closed form (`image.py`, `score.py`, `audio.py`) in a tokenizer set: same input, same shape
of codes, same rules for blank paper, silence and edges. Which of the two a file holds is its `kind`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.audio import BASIS_SCALE, SAMPLES, Framer, frames_of, transform
from ringweave.tokenizers.codec import (
    Tensors,
    from_patches,
    pack_codec,
    pad_to,
    to_patches,
    to_uint8,
    unpack_codec,
)
from ringweave.tokenizers.conv_codec import ConvCore
from ringweave.tokenizers.grid import BLANK
from ringweave.tokenizers.score import ink_cells, ink_of_tone

F64 = NDArray[np.float64]
I16 = NDArray[np.int16]
U8 = NDArray[np.uint8]
#: Cell units of a learned audio codec per sample level.
AUDIO_CELL = 2


class _Conv:
    """config and tensors of a file, and the core they make."""

    kind = ""

    def __init__(self, config: dict[str, int], tensors: Tensors) -> None:
        self.config, self.tensors = config, tensors
        self.core = ConvCore(config, tensors)
        self.books, self.codes = self.core.books, self.core.codes

    def to_bytes(self) -> bytes:
        """The codec file."""
        return pack_codec(self.kind, self.config, self.tensors)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Any:
        """Load `to_bytes`; VocabularyError when it is something else."""
        return cls(*unpack_codec(data, cls.kind, where=where))


class ConvImageCodec(_Conv):
    """uint8 [..., H, W, 3] <-> codes int32 [..., ceil(H/p), ceil(W/p)], one code a patch."""

    kind = "image.conv"

    def __init__(self, config: dict[str, int], tensors: Tensors) -> None:
        super().__init__(config, tensors)
        self.patch = config["patch"]

    def encode(self, images: U8) -> NDArray[np.int32]:
        """Codes int32 [..., h, w] of uint8 [..., H, W, 3], edge-padded to whole patches."""
        rows, columns = (-(-side // self.patch) for side in images.shape[-3:-1])
        frames = images.reshape(-1, *images.shape[-3:])
        codes = np.empty((len(frames), rows, columns), np.int32)
        for n, frame in enumerate(frames):  # one by one: bounds memory
            cells = to_patches(pad_to(frame, self.patch), self.patch)
            codes[n] = self.core.encode(cells[None].astype(np.float64))[0, ..., 0]
        return codes.reshape(*images.shape[:-3], rows, columns)

    def decode(self, codes: NDArray[np.int32]) -> U8:
        """uint8 [..., p*h, p*w, 3] of codes [..., h, w]; a missing code (-1) is the mean patch and what is around."""
        grids = codes.reshape(-1, *codes.shape[-2:], 1)
        cells = np.concatenate([self.core.decode(grids[n : n + 1]) for n in range(len(grids))])
        return to_uint8(from_patches(cells.reshape(*codes.shape, -1), self.patch, 3))


class ConvScoreCodec(_Conv):
    """uint8 [H, W] grey <-> codes int32 [h, w, books]; BLANK throughout where the paper is blank.

    tensors hold `tone` [256] besides: what each level of ink is coded as (`score.ink_tone`); absent: itself.
    """

    kind = "score.conv"

    def __init__(self, config: dict[str, int], tensors: Tensors) -> None:
        super().__init__(config, tensors)
        self.patch = config["patch"]
        self._tone = tensors.get("tone", np.arange(256)).astype(np.float64)

    def encode(self, page: U8) -> NDArray[np.int32]:
        """Codes int32 [h, w, books] of grey uint8 [H, W], padded with paper to whole patches."""
        ink = ink_cells(page, self.patch)
        codes = self.core.encode(self._tone[ink][None])[0]
        codes[ink.max(-1) < self.config["blank_below"]] = BLANK
        return codes

    def decode(self, codes: NDArray[np.int32]) -> U8:
        """Grey uint8 [p*h, p*w]; blank and missing cells are white."""
        ink = ink_of_tone(self.core.decode(np.maximum(codes, -1)[None])[0], self._tone)
        ink[codes[..., 0] < 0] = 0
        return from_patches(255 - to_uint8(ink), self.patch, 1)[..., 0]


class ConvAudioCodec(_Conv):
    """int16 [T] mono at `rate` <-> codes int32 [F, books]; frames as in `audio.AudioCodec`.

    The code of a frame depends on `radius` frames before and after it. A frame of digital silence has code 0 in every
    book, and a frame whose codes are all 0 decodes to silence.
    """

    kind = "audio.conv"

    def __init__(self, config: dict[str, int], tensors: Tensors) -> None:
        super().__init__(config, tensors)
        self.rate, self.hop = config["rate"], config["hop"]
        self.radius = self.core.radius
        self._basis = tensors["basis"].astype(np.float64)

    def frames(self, samples: int) -> int:
        """Frames that `samples` samples give."""
        return frames_of(samples, self.hop)

    def encode(self, samples: I16) -> NDArray[np.int32]:
        """Codes int32 [F, books] of int16 [T]."""
        stream = self.stream()
        pieces = [stream.push(samples[k : k + SAMPLES]) for k in range(0, max(1, len(samples)), SAMPLES)]
        return np.concatenate([*pieces, stream.flush()])

    def stream(self) -> ConvAudioEncoder:
        """An encoder that takes the samples in pieces of any size and gives the same codes."""
        return ConvAudioEncoder(self)

    def cells(self, frames: I16) -> F64:
        """Frames of samples int16 [n, 2*hop] as cells: integers [n, bins]."""
        return transform(frames, self._basis, AUDIO_CELL)

    def encode_cells(self, cells: F64) -> NDArray[np.int32]:
        """Codes int32 [n, books] of cells [n, bins] that have their neighbours around them."""
        codes = self.core.encode(cells[None, None])[0, 0]
        codes[~cells.any(1)] = 0
        return codes

    def decode(self, codes: NDArray[np.int32]) -> I16:
        """int16 [(F - 1) hop] by overlap-add; a missing code (-1) adds nothing."""
        if len(codes) < 2:
            return np.zeros(0, np.int16)
        cells = self.core.decode(codes[None, None])[0, 0]
        cells[(codes <= 0).all(1)] = 0
        frames = cells @ self._basis.T / (BASIS_SCALE * AUDIO_CELL)
        out = frames[1:, : self.hop] + frames[:-1, self.hop :]
        return np.clip(np.rint(out), -32768, 32767).astype(np.int16).reshape(-1)


class ConvAudioEncoder:
    """Encodes a stream: `push` samples as they come, `flush` once at the end."""

    def __init__(self, codec: ConvAudioCodec) -> None:
        self._codec, self._framer = codec, Framer(codec.hop)
        self._held = np.zeros((0, codec.tensors["basis"].shape[1]))  # cells, from `radius` before the next
        self._before = 0  # cells in `_held` that have their codes

    def push(self, samples: I16) -> NDArray[np.int32]:
        """Codes int32 [n, books] of the frames whose surroundings are complete now (n may be 0)."""
        return self._emit(self._framer.push(samples), missing=self._codec.radius)

    def flush(self) -> NDArray[np.int32]:
        """Codes of the last frames, which reach past the end."""
        return self._emit(self._framer.flush(), missing=0)

    def _emit(self, frames: I16, *, missing: int) -> NDArray[np.int32]:
        """Codes of all held cells but the last `missing`; what is next to a cut edge is never used."""
        held = np.concatenate([self._held, self._codec.cells(frames)])
        stop = max(self._before, len(held) - missing)
        codes = np.zeros((0, self._codec.books), np.int32)
        if stop > self._before:
            codes = self._codec.encode_cells(held)[self._before : stop]
        keep = max(0, stop - self._codec.radius)
        self._held, self._before = held[keep:], stop - keep
        return codes
