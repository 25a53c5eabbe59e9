"""Frames of a video as ids, and back: pure functions, as `grid.py` for pictures.

A whole picture is a grid of cells with `eol` after each row. Any other frame begins with the id of its move; then come
its cells in reading order, over the ends of rows: a run of taken cells as one id (0: all that are left), any other
cell as its code. A frame that is wholly taken is two ids.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers import sub_ids
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.grid import MISSING, GridReader, stack_grids, write_grid
from ringweave.tokenizers.video import VideoCodec, VideoFrame
from ringweave.tokenizers.video_plan import runs

I32 = NDArray[np.int32]
#: What an id of a video can be beside a column of the image codec (0, 1).
MOVE, RUN, LINE, NEXT = -1, -2, -3, -4
#: Pixels that a clip may have whatever few ids it is written with: 805 MB.
PIXELS = 1 << 28


def most_cells(ids: int, patch: int) -> int:
    """Cells of all frames that a clip of `ids` ids may have, so that no stream of ids decodes to more than memory."""
    return max(PIXELS // patch**2, 4 * ids)


def write_frame(
    codec: VideoCodec, frame: VideoFrame, *, image: I32, move: int, run: int, eol: int, blank: int, time: int
) -> tuple[I32, NDArray[np.int32]]:
    """(ids [n], positions [n, 4]). image: starts of the image codec's blocks; move, run: of the video codec's.

    A move stands at the first cell, a run at its first one, all ids of a cell at the cell.
    """
    parts = sub_ids.split(frame.codes, codebook=codec.image.codes)
    ids = np.where(parts == MISSING, MISSING, parts + image).astype(np.int32)
    if frame.move is None:
        return write_grid(ids, eol=eol, blank=blank, time=time)
    height, width, columns = ids.shape
    ids = ids.reshape(-1, columns)
    for first, length in runs((frame.codes < 0).reshape(-1), codec.runs):
        ids[first, 0] = run + length
    places = np.zeros((height, width, columns, 4), np.int32)
    places[..., 0] = time
    places[..., 1], places[..., 2] = np.indices((height, width, columns))[:2]
    written = ids != MISSING
    begin = np.array([[time, 0, 0, 0]], np.int32)
    return (
        np.append(np.int32(move + codec.move_id(frame.move)), ids[written]).astype(np.int32),
        np.concatenate([begin, places.reshape(-1, columns, 4)[written]]),
    )


def write_frames(
    codec: VideoCodec, frames: list[VideoFrame], times: list[int], *, starts: I32, eol: int, blank: int
) -> list[tuple[I32, NDArray[np.int32]]]:
    """`write_frame` of each, `starts` being those of the image codec's blocks, then of `video.move` and `video.run`.

    DataError for a clip that could not be read back: so long, and so still, that it passes `most_cells`.
    """
    *image, move, run = starts.tolist()
    parts = [
        write_frame(
            codec, frame, image=np.array(image, np.int32), move=move, run=run, eol=eol, blank=blank, time=time
        )
        for frame, time in zip(frames, times, strict=True)
    ]
    cells, most = (
        sum(f.codes.size for f in frames),
        most_cells(sum(len(p[0]) for p in parts), codec.image.patch),
    )
    if cells > most:
        raise DataError(
            f"a clip of {len(frames)} frames with {cells} cells in all",
            why=f"at most {most} can be read back",
            fix="cut it into shorter clips",
        )
    return parts


class FrameReader:
    """Collects the ids of one frame: (kind, code), a kind being a column of the image codec, MOVE, RUN or LINE.

    What the frame is shows when all is read: one in which a move or a run occurs is no whole picture.
    """

    def __init__(self, kinds: I32, codes: I32, *, columns: int) -> None:
        self._ids = list(zip(kinds.tolist(), codes.tolist()))
        self._columns = columns
        self.moved = bool(np.isin(kinds, (MOVE, RUN)).any())
        self.grid: GridReader | None = None if self.moved else self._read_grid()

    def _read_grid(self) -> GridReader:
        grid = GridReader(self._columns)
        for kind, code in self._ids:
            if kind == LINE:
                grid.line()
            else:
                grid.put(kind, code)
        grid.finish()
        return grid

    def cells(self, count: int) -> tuple[I32, bool]:
        """Sub-ids int32 [count, columns] of a moved frame, MISSING where taken, and whether all was in place."""
        out = np.full((count, self._columns), MISSING, np.int32)
        at = expected = 0  # cells begun; the column that comes next, 0 between cells
        whole = self._ids[0][0] == MOVE
        for kind, code in self._ids[whole:]:
            if kind in (MOVE, LINE):
                whole = False
            elif kind == RUN:
                length = code or count - at
                whole &= expected == 0 and 0 < length <= count - at
                at, expected = min(count, at + max(length, 0)), 0
            else:
                begins = expected == 0 or kind < expected
                whole &= kind == expected and (at < count or not begins)
                at += begins
                if at <= count:
                    out[at - 1, kind] = code
                expected = (kind + 1) % self._columns
        return out, bool(whole and at == count and expected == 0)

    def move(self, codec: VideoCodec) -> tuple[int, int]:
        """The first move; none where it was lost."""
        number = next((code for kind, code in self._ids if kind == MOVE), codec.move_id((0, 0)))
        return codec.move_of(number)


def read_frames(codec: VideoCodec, kinds: I32, codes: I32) -> tuple[list[VideoFrame], bool]:
    """Frames of what stands between `bov` and `eov`, kinds and codes [n], and whether nothing was out of place.

    Never raises. The size is the median of the whole pictures', one cell where there is none; a frame without ids is
    left out; a missing cell becomes MISSING; frames beyond `most_cells` are left out.
    """
    columns = codec.columns
    cuts = np.flatnonzero(kinds == NEXT)
    starts, stops = [0, *(cuts + 1).tolist()], [*cuts.tolist(), len(kinds)]
    readers = [FrameReader(kinds[a:b], codes[a:b], columns=columns) for a, b in zip(starts, stops)]
    used = [reader for reader in readers if reader.moved or (reader.grid and reader.grid.rows)]
    grids, whole = stack_grids([reader.grid for reader in used if reader.grid], columns)
    height, width = grids.shape[1:3]
    most = most_cells(len(kinds), codec.image.patch) // (height * width)
    whole &= 0 < len(used) == len(readers) and len(used) <= most and not used[0].moved
    pictures = iter(grids)
    frames = []
    for reader in used[:most]:
        if reader.moved:
            flat, complete = reader.cells(height * width)
            whole &= complete
            cells, move = flat.reshape(height, width, columns), reader.move(codec)
        else:
            cells, move = next(pictures), None
        frames.append(VideoFrame(sub_ids.join(cells, codebook=codec.image.codes), move))
    if not frames:
        return [VideoFrame(np.full((1, 1), MISSING, np.int32))], False
    return frames, bool(whole)
