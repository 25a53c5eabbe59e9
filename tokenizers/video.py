"""Video codec: the image codec, and for later frames what moved.

Frame 0 is a picture as the image codec writes it. A later frame is such a picture again, or one move of the whole
frame before it and the codes of those cells that the moved picture does not give well enough (conditional
replenishment; Mounts, 1969, with one motion vector). The frame before is the decoded one, so nothing drifts.

Decoding a frame: each cell without a code is copied from the moved picture, each cell with one is decoded by the image
codec, whose smoothing over the cells around sees at the copied cells the codes that their pixels came from.

Encoding holds every frame to the squared error that the image codec alone would make of it: a cell may be taken
although a fresh code were better, as long as others pay for it. So the error of a clip is never above frame-wise
coding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.codec import pack_codec, unpack_codec
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.grid import MISSING
from ringweave.tokenizers.sub_ids import block_sizes
from ringweave.tokenizers.video_plan import Move, cell_errors, cheapest, likely_moves, runs, shifted

U8 = NDArray[np.uint8]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
#: reach: largest move in pixels, down and right; runs: longest run of one id; key_every: at most so many frames from
#: one whole picture to the next, 0 for no limit; tolerance: squared error of a taken cell in percent of a fresh one's.
DEFAULTS = {"reach": 15, "runs": 127, "key_every": 0, "tolerance": 200}
#: Squared levels a value that no taken cell is refused for (45 dB).
INVISIBLE = 2
#: Moves that are compared by what they give cell by cell.
CANDIDATES = 6
#: Times that a choice of cells is drawn back before the frame is written whole.
ROUNDS = 8


@dataclass(frozen=True, slots=True)
class VideoFrame:
    """codes: int32 [h, w] of the image codec, MISSING where the moved frame before is taken; move: (down, right) of
    its content in pixels, None for a picture of its own (where MISSING is a damaged cell)."""

    codes: I32
    move: Move | None = None


class VideoCodec:
    """uint8 [T, H, W, 3] <-> T frames, over an image codec (encode, decode, patch, codes).

    The file holds the settings alone, so `image` may be None, and `on` gives a codec that can encode.
    """

    kind = "video.moves"

    def __init__(self, image: Any = None, config: dict[str, int] | None = None) -> None:
        self.image, self.config = image, DEFAULTS | (config or {})
        ranges = {"reach": (0, 63), "runs": (1, 4095), "key_every": (0, 1 << 30), "tolerance": (100, 10_000)}
        for name, value in self.config.items():
            if (
                name not in ranges
                or type(value) is not int
                or not ranges[name][0] <= value <= ranges[name][1]
            ):
                raise ValueError(f"a video codec has no setting {name}: {value!r}, only {ranges}")
        self.reach, self.runs = self.config["reach"], self.config["runs"]
        self.key_every, self.tolerance = self.config["key_every"], self.config["tolerance"]
        #: Number of ids of moves, and of runs: 0 is "all cells that are left", n is n cells.
        self.move_size, self.run_size = (2 * self.reach + 1) ** 2, self.runs + 1

    def on(self, image: Any) -> VideoCodec:
        """The same settings over an image codec."""
        return VideoCodec(image, self.config)

    @property
    def columns(self) -> int:
        """Ids of a fresh cell."""
        return len(block_sizes(self.image.codes))

    def move_id(self, move: Move) -> int:
        """Number of a move, row by row from (-reach, -reach)."""
        return (move[0] + self.reach) * (2 * self.reach + 1) + move[1] + self.reach

    def move_of(self, number: int) -> Move:
        """Inverse of `move_id`."""
        return number // (2 * self.reach + 1) - self.reach, number % (2 * self.reach + 1) - self.reach

    def bearable(self, errors: I64, own: I64) -> NDArray[np.bool_]:
        """Whether a cell may be taken, by its squared error and that of its own code."""
        invisible = INVISIBLE * 3 * self.image.patch**2
        return errors <= np.maximum(own * self.tolerance // 100, invisible)

    def ids(self, frame: VideoFrame) -> int:
        """How many ids a frame is written with, without what stands between frames."""
        taken = frame.codes < 0
        if frame.move is None:
            return frame.codes.size * self.columns + len(frame.codes)
        return 1 + int((~taken).sum()) * self.columns + len(runs(taken.reshape(-1), self.runs))

    def encode(self, frames: U8) -> list[VideoFrame]:
        """One frame for each of uint8 [T, H, W, 3]."""
        return self.stream().push(frames)

    def stream(self) -> VideoEncoder:
        """An encoder that takes the frames in pieces of any size and gives the same; it keeps one picture."""
        return VideoEncoder(self)

    def decode(self, frames: Sequence[VideoFrame]) -> U8:
        """uint8 [T, p*h, p*w, 3] of frames of one size; a missing cell is that of the frame before, and of the first
        frame the image codec's. `VideoDecoder` gives them one by one."""
        height, width = frames[0].codes.shape if frames else (0, 0)
        out = np.empty((len(frames), height * self.image.patch, width * self.image.patch, 3), np.uint8)
        decoder = VideoDecoder(self)
        for number, frame in enumerate(frames):
            out[number] = decoder.push(frame)
        return out

    def to_bytes(self) -> bytes:
        """The codec file."""
        return pack_codec(self.kind, self.config, {})

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> VideoCodec:
        """Load `to_bytes`, without an image codec; VocabularyError when it is something else."""
        return cls(None, unpack_codec(data, cls.kind, where=where)[0])


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture: pixels uint8 [p*h, p*w, 3]; labels int32 [p*h, p*w], the code each pixel was decoded from.

    Labels move with their pixels, and tell the smoothing of a fresh cell what stands around it.
    """

    pixels: U8
    labels: I32

    @classmethod
    def of(cls, image: Any, codes: I32) -> Picture:
        """The picture of codes [h, w] alone."""
        return cls(image.decode(codes), _spread(codes, image.patch))

    def moved(self, move: Move) -> Picture:
        """The same with its content moved (down, right), edges repeated."""
        return Picture(shifted(self.pixels, move), shifted(self.labels, move))

    def painted(self, image: Any, codes: I32) -> Picture:
        """The same with the cells that have a code in `codes` [h, w] decoded anew."""
        lost, middle = codes < 0, slice(image.patch // 2, None, image.patch)
        if lost.all():
            return self
        fresh = Picture.of(image, np.where(lost, self.labels[middle, middle], codes))
        kept = _spread(lost, image.patch)
        return Picture(
            np.where(kept[..., None], self.pixels, fresh.pixels), np.where(kept, self.labels, fresh.labels)
        )


def _spread(cells: NDArray[Any], patch: int) -> NDArray[Any]:
    """[h, w] -> [p*h, p*w], each cell's value at all its pixels."""
    return cells.repeat(patch, 0).repeat(patch, 1)


class VideoDecoder:
    """Decodes frame after frame; keeps the last picture."""

    def __init__(self, codec: VideoCodec) -> None:
        self._image = codec.image
        self._before: Picture | None = None

    def push(self, frame: VideoFrame) -> U8:
        """The picture uint8 [p*h, p*w, 3] of a frame of the size of the ones before."""
        before = self._before
        if before is None and frame.move is not None:
            before = Picture.of(self._image, np.full_like(frame.codes, MISSING))
        if before is None or not (frame.codes < 0).any():
            self._before = Picture.of(self._image, frame.codes)
        else:
            self._before = before.moved(frame.move or (0, 0)).painted(self._image, frame.codes)
        return self._before.pixels


class VideoEncoder:
    """Encodes a stream: `push` frames as they come; there is nothing to flush."""

    def __init__(self, codec: VideoCodec) -> None:
        if codec.image is None:
            raise ValueError("this video codec has no image codec: use `on`")
        self._codec = codec
        self._size: tuple[int, ...] | None = None
        self._before: Picture | None = None  # as the decoder has it
        self._since = 0  # frames since the last whole picture

    def push(self, frames: U8) -> list[VideoFrame]:
        """The frames of uint8 [n, H, W, 3], all of the size of the first. DataError for other arrays."""
        if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[-1] != 3 or 0 in frames.shape[1:]:
            raise DataError(f"video must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
        self._size = self._size or frames.shape[1:]
        if frames.shape[1:] != self._size:
            raise DataError(f"a frame of {list(frames.shape[1:])} in a video of {list(self._size)}")
        return [self._one(frame) for frame in frames]

    def _one(self, frame: U8) -> VideoFrame:
        codec = self._codec
        whole = VideoFrame(codec.image.encode(frame))
        picture = Picture.of(codec.image, whole.codes)
        self._since += 1
        if self._before is not None and not (codec.key_every and self._since >= codec.key_every):
            found = self._moved(frame, whole, picture, self._before)
            if found is not None:
                self._before = found[1]
                return found[0]
        self._before, self._since = picture, 0
        return whole

    def _moved(
        self, frame: U8, whole: VideoFrame, picture: Picture, before: Picture
    ) -> tuple[VideoFrame, Picture] | None:
        """The frame as a move and its picture, or None when that takes as many ids as the cells of `whole` (whose row
        ends are not counted, so that a cut gives a whole picture) or cannot be held to its error."""
        codec, image = self._codec, self._codec.image
        own = cell_errors(frame, picture.pixels, image.patch)
        move, errors = self._best_move(frame, before, own)
        moved = before.moved(move)
        harm = (errors - own).reshape(-1)
        choices = cheapest(harm, codec.bearable(errors, own).reshape(-1), codec.columns)
        totals, room = choices @ harm, 0
        for _ in range(ROUNDS):
            fitting = np.flatnonzero(totals <= room)
            if not len(fitting):
                return None
            taken = choices[fitting[-1]].reshape(own.shape)
            found = VideoFrame(np.where(taken, MISSING, whole.codes).astype(np.int32), move)
            if codec.ids(found) >= found.codes.size * codec.columns:
                return None
            painted = moved.painted(image, found.codes)
            over = int(cell_errors(frame, painted.pixels, image.patch).sum() - own.sum())
            if over <= 0:
                return found, painted
            room = int(totals[fitting[-1]]) - over
        return None

    def _best_move(self, frame: U8, before: Picture, own: I64) -> tuple[Move, I64]:
        """The move from which most cells can be taken at no more error in all, and each cell's squared error then; of
        equals the one of least error, then the smaller. No move, where all cells can be taken without."""
        codec = self._codec

        def tried(move: Move) -> tuple[int, int, Move, I64]:
            errors = cell_errors(frame, shifted(before.pixels, move), codec.image.patch)
            harm = np.sort((errors - own)[codec.bearable(errors, own)])
            cells = int((harm.cumsum() <= 0).sum())
            return -cells, int(harm[:cells].sum()), move, errors

        found = [tried((0, 0))]
        if -found[0][0] < own.size:
            moves = likely_moves(frame, before.pixels, reach=codec.reach, count=CANDIDATES)
            found += [tried(move) for move in moves]
        return min(found, key=lambda entry: entry[:2])[2:]
