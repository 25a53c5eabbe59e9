"""LWM's two overlapping tables of ids, converted from and to the one space of a manifest.

LWM (Liu et al., 2024) keeps a text table and a vision table, both from 0, and a mask that says which one an id is
of. Its vision table is the codebook (8192), then `eof` between frames and `eov` after the last, with room for 256
rows behind the codebook. So the conversion is an offset:

| ours                 | table  | id there         |
|----------------------|--------|------------------|
| block "text"         | text   | id - start       |
| pad, bos, eos        | text   | size + 0, 1, 2   |
| block "image"        | vision | id - start       |
| eof, eov             | vision | codebook + 0, 1  |

(LWM's text table has its own <s> and </s> among its pieces; ours are control ids, so they come after the pieces.)

Our pictures say their shape: `boi`, an `eol` after every row, `eoi`; LWM's frames are all of one size (16 x 16) and
a picture is a video of one frame. `strip` drops what has no row there and `restore` puts it back, given the size.
What `restore` could not give back is refused by `strip`, so the two are exact inverses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.manifest import CONTROL, VocabularyManifest

I32 = NDArray[np.int32]
Mask = NDArray[np.bool_]
Still = Literal["image", "video"]
SPARE = 256
_TEXT_CONTROL = ("pad", "bos", "eos")
_VISION_CONTROL = ("eof", "eov")
BOI, EOI, BOV, EOV = (CONTROL[name] for name in ("boi", "eoi", "bov", "eov"))
EOL, EOF = CONTROL["eol"], CONTROL["eof"]


@dataclass(frozen=True, slots=True)
class LwmTables:
    """text_start, text_size: the text block; image_start, codebook: the image block."""

    text_start: int
    text_size: int
    image_start: int
    codebook: int

    @property
    def text_rows(self) -> int:
        """Rows of the text table."""
        return self.text_size + len(_TEXT_CONTROL)

    @property
    def vision_rows(self) -> int:
        """Rows of the vision table: 8448 for LWM's codebook."""
        return self.codebook + SPARE

    @property
    def eof(self) -> int:
        """Vision id between two frames."""
        return self.codebook

    @property
    def eov(self) -> int:
        """Vision id after the last frame."""
        return self.codebook + 1

    def to_lwm(self, ids: I32) -> tuple[I32, Mask]:
        """Global ids [n] -> (ids of their tables int32 [n], whether that is the vision table bool [n]).

        VocabularyError for an id that has no row: `strip` the delimiters first.
        """
        ids = np.asarray(ids)
        out = np.full(ids.shape, -1, np.int32)
        vision = np.zeros(ids.shape, np.bool_)
        for start, size, is_vision in (
            (self.text_start, self.text_size, False),
            (self.image_start, self.codebook, True),
        ):
            inside = (ids >= start) & (ids < start + size)
            out[inside], vision[inside] = ids[inside] - start, is_vision
        for names, first, is_vision in self._controls():
            for row, name in enumerate(names, first):
                inside = ids == CONTROL[name]
                out[inside], vision[inside] = row, is_vision
        if (lost := np.flatnonzero(out.reshape(-1) < 0)).size:
            number = int(ids.reshape(-1)[lost[0]])
            name = next((n for n, i in CONTROL.items() if i == number), "an id of another block")
            raise VocabularyError(
                f"id {number} at place {int(lost[0])} has no row in LWM's tables",
                why=f"it is {name}; they hold text, {', '.join(_TEXT_CONTROL)}, image codes, eof and eov",
                fix="drop the delimiters of pictures with strip; other modalities do not exist there",
            )
        return out, vision

    def from_lwm(self, ids: I32, is_vision: Mask) -> I32:
        """Inverse of `to_lwm`; VocabularyError for ids that are no row in use of their table."""
        ids, vision = np.asarray(ids), np.asarray(is_vision, np.bool_)
        if ids.shape != vision.shape:
            raise ValueError(
                f"ids {list(ids.shape)} and vision mask {list(vision.shape)} must have one shape"
            )
        used = np.where(vision, self.eov + 1, self.text_rows)
        if (bad := np.flatnonzero((ids < 0) | (ids >= used))).size:
            at = int(bad[0])
            table = "vision" if vision.reshape(-1)[at] else "text"
            raise VocabularyError(
                f"{table} id {int(ids.reshape(-1)[at])} at place {at} means nothing",
                why=f"the text table has ids below {self.text_rows}, the vision table below {self.eov + 1}",
                fix="use the tokenizers these ids were made with",
            )
        out = np.where(vision, ids + self.image_start, ids + self.text_start).astype(np.int32)
        for names, first, is_vision_table in self._controls():
            for row, name in enumerate(names, first):
                out[(vision == is_vision_table) & (ids == row)] = CONTROL[name]
        return out

    def _controls(self) -> tuple[tuple[tuple[str, ...], int, bool], ...]:
        return (_TEXT_CONTROL, self.text_size, False), (_VISION_CONTROL, self.codebook, True)

    def strip(self, ids: I32, *, grid: tuple[int, int], still: Still = "image") -> I32:
        """Drop `boi`, `bov` and the `eol` of every picture and video, and end a picture with `eov`, as LWM does.

        grid: rows and columns of every frame. still: what one frame by itself is. DataError for ids that
        `restore` would not give back: another size, a broken picture, one frame that is not `still`.
        """
        ids = np.asarray(ids, np.int32)
        kept = ids[~np.isin(ids, (BOI, BOV, EOL))]
        kept = np.where(kept == EOI, EOV, kept).astype(np.int32)
        back = self.restore(kept, grid=grid, still=still)
        if not np.array_equal(back, ids):
            shared = min(len(back), len(ids))
            at = int(np.argmax(np.append(back[:shared] != ids[:shared], True)))
            raise DataError(
                f"the ids at place {at} would not come back from LWM's form",
                why=f"a picture is broken there, or one frame stands for another thing than {still}",
                fix="leave this document out, or say with `still` what one frame is",
            )
        return kept

    def restore(self, ids: I32, *, grid: tuple[int, int], still: Still = "image") -> I32:
        """Inverse of `strip`. DataError for a run of image codes that is not whole frames of `grid` and an `eov`."""
        ids = np.asarray(ids, np.int32)
        codes = (ids >= self.image_start) & (ids < self.image_start + self.codebook)
        vision = codes | (ids == EOF) | (ids == EOV)
        cuts = np.flatnonzero((vision[1:] != vision[:-1]) | (ids[:-1] == EOV)) + 1
        out: list[I32] = []
        for at, part in zip((0, *cuts.tolist()), np.split(ids, cuts)):
            out += _framed(part, grid, still, at) if len(part) and vision[at] else [part]
        return np.concatenate(out)


def lwm_tables(manifest: VocabularyManifest) -> LwmTables:
    """The tables for a vocabulary; VocabularyError when it lacks a text or an image block."""
    text, image = manifest.block("text"), manifest.block("image")
    return LwmTables(text.start, text.size, image.start, image.size)


def _framed(part: I32, grid: tuple[int, int], still: Still, at: int) -> list[I32]:
    """A run of vision ids with its lines and delimiters; at: its place, for the error."""
    ended = bool(part[-1] == EOV)
    body = part[:-1] if ended else part
    frames = np.split(body[body != EOF], np.flatnonzero(body == EOF) - np.arange(np.sum(body == EOF)))
    if not ended or any(len(frame) != grid[0] * grid[1] for frame in frames):
        sizes = ", ".join(str(len(frame)) for frame in frames[:4])
        raise DataError(
            f"what begins at place {at} of LWM's form is not whole frames of {grid[0]} x {grid[1]}",
            why=f"its frames have {sizes} codes" + ("" if ended else ", and no eov follows"),
            fix="give the grid these ids were made with; all frames must have one size",
        )
    begin, end = (BOI, EOI) if len(frames) == 1 and still == "image" else (BOV, EOV)
    out = [np.array([begin], np.int32)]
    for number, frame in enumerate(frames, 1):
        lines = np.pad(frame.reshape(grid), ((0, 0), (0, 1)), constant_values=EOL)
        out += [lines.reshape(-1), np.array([end if number == len(frames) else EOF], np.int32)]
    return out
