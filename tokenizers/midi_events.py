"""MIDI as events in the way of MT3 (Gardner et al., ICLR 2022), with velocity bins.

The song is cut into segments of 10 s, each readable without the others:

    song    := segment*
    segment := "segment" ([program:P] pitch:N)* "tie" (shift:T event*)*
    event   := [program:P] [velocity:V] pitch:N  |  [velocity:V] drum:N

The tie section names the notes that sound on from before. `shift:T` is the time since the start of the segment in
steps of 10 ms; a step of 0 is not written. `velocity:0` ends a note, `velocity:1` up to the number of bins begin one.
Program and velocity hold until the next one in the segment. A drum has no end. Within a step: ends, drums, beginnings,
each by program and pitch.

Rules: times are rounded to the step once, from the start of the song; a note lasts at least one step; a note that
begins while the same program sounds the same pitch ends the earlier one, and of two that begin in one step one remains,
with the louder velocity and the later end. Silence behind the last note is not kept. How a file becomes notes (stuck
notes, overlaps, programs) stands in `midi_file.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ringweave.tokenizers import midi_file
from ringweave.tokenizers.codec import sha256
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.manifest import canonical_json
from ringweave.tokenizers.midi_file import Note

STEP_US = 10_000
STEPS = 1000  # of a segment: 10 s
VELOCITY_BINS = 32
DRUM_US = 100_000  # length of a drum in a written file
_MAX_SEGMENTS = midi_file.MAX_SECONDS * 1_000_000 // (STEPS * STEP_US)  # number of the last one

_SEGMENT, _TIE, _SHIFT = 0, 1, 2  # shift:1 has id 2
_PROGRAM = _SHIFT + STEPS - 1
_PITCH, _DRUM, _VELOCITY = _PROGRAM + 128, _PROGRAM + 256, _PROGRAM + 384


def size(velocity_bins: int = VELOCITY_BINS) -> int:
    """Number of ids; the bins come last, so the others do not depend on them."""
    _check_bins(velocity_bins)
    return _VELOCITY + velocity_bins + 1


def tokens(velocity_bins: int = VELOCITY_BINS) -> list[str]:
    """Name of every id."""
    return [
        *("segment", "tie"),
        *(f"shift:{n}" for n in range(1, STEPS)),
        *(f"program:{n}" for n in range(128)),
        *(f"pitch:{n}" for n in range(128)),
        *(f"drum:{n}" for n in range(128)),
        *(f"velocity:{n}" for n in range(velocity_bins + 1)),
    ]


def digest(velocity_bins: int = VELOCITY_BINS) -> str:
    """sha256 of the names in order, and of what a step and a segment are."""
    _check_bins(velocity_bins)
    rules = {"tokens": tokens(velocity_bins), "step_us": STEP_US, "steps": STEPS, "drum_us": DRUM_US}
    return sha256(canonical_json(rules).encode("utf-8"))


def _check_bins(velocity_bins: int) -> None:
    if not 1 <= velocity_bins <= 127:
        raise DataError(
            f"{velocity_bins} velocity bins", why="MIDI has 127 velocities", fix="choose 1 to 127 bins"
        )


def velocity_bin(velocity: int, velocity_bins: int) -> int:
    """1 to `velocity_bins` of a velocity 1 to 127; the bins are equally wide, to one."""
    return 1 + (velocity - 1) * velocity_bins // 127


def bin_velocity(number: int, velocity_bins: int) -> int:
    """The middle of a bin: off by at most half a bin."""
    low = -(-(number - 1) * 127 // velocity_bins)
    high = -(-number * 127 // velocity_bins) - 1
    return 1 + (low + high) // 2


def encode(data: bytes, *, where: str, velocity_bins: int = VELOCITY_BINS) -> NDArray[np.int32]:
    """Ids int32 [n] of a Standard MIDI File; DataError for what is not one."""
    return encode_notes(midi_file.read(data, where=where).notes, velocity_bins=velocity_bins)


def dropped(data: bytes, *, where: str) -> Counter[str]:
    """What `encode` leaves out of a file, and how often."""
    return midi_file.read(data, where=where).dropped


def decode(ids: ArrayLike, *, velocity_bins: int = VELOCITY_BINS) -> tuple[bytes, bool]:
    """(Standard MIDI File, whether every id had its place) of any ids; never raises on them."""
    notes, complete = decode_notes(ids, velocity_bins=velocity_bins)
    return midi_file.write(notes), complete


# notes to ids --------------------------------------------------------------------------------------------------

_Key = tuple[bool, int, int]  # drum, program, pitch


def on_grid(notes: Iterable[Note]) -> list[tuple[int, int, _Key, int]]:
    """(first step, step behind the last, key, velocity) of each note, by the rules of this module; sorted."""
    merged: dict[tuple[int, _Key], tuple[int, int]] = {}
    for note in notes:
        start = _steps(note.start)
        end = start + 1 if note.drum else max(_steps(note.end), start + 1)
        place = (start, (note.drum, 0 if note.drum else note.program, note.pitch))
        other = merged.get(place, (0, 0))
        merged[place] = (max(end, other[0]), max(note.velocity, other[1]))
    following: dict[_Key, int] = {}
    cut = []
    for (start, key), (end, velocity) in sorted(merged.items(), reverse=True):
        if not key[0]:
            end = min(end, following.get(key, end))
        following[key] = start
        cut.append((start, end, key, velocity))
    return sorted(cut)


def _steps(microseconds: int) -> int:
    return (2 * microseconds + STEP_US) // (2 * STEP_US)


def encode_notes(notes: Iterable[Note], *, velocity_bins: int = VELOCITY_BINS) -> NDArray[np.int32]:
    """Ids int32 [n]; no notes give no ids."""
    _check_bins(velocity_bins)
    events: list[tuple[int, int, int, int, int]] = []  # step, order, program, pitch, velocity bin
    for start, end, (drum, program, pitch), velocity in on_grid(notes):
        number = velocity_bin(velocity, velocity_bins)
        events.append((start, 1 if drum else 2, program, pitch, number))
        if not drum:
            events.append((end, 0, program, pitch, 0))
    ids: list[int] = []
    sounding: set[tuple[int, int]] = set()
    segment, state = -1, _State()
    for step, order, program, pitch, number in sorted(events):
        while segment < step // STEPS:
            segment += 1
            ids += _tie_section(sounding)
            state = _State()
        ids += state.event(step % STEPS, order, program, pitch, number)
        if order == 2:
            sounding.add((program, pitch))
        elif order == 0:
            sounding.discard((program, pitch))
    return np.asarray(ids, np.int32)


def _tie_section(sounding: set[tuple[int, int]]) -> list[int]:
    ids, before = [_SEGMENT], -1
    for program, pitch in sorted(sounding):
        if program != before:
            ids.append(_PROGRAM + program)
            before = program
        ids.append(_PITCH + pitch)
    return [*ids, _TIE]


class _State:
    """What the ids of a segment have said: only changes are written."""

    def __init__(self) -> None:
        self.step, self.program, self.velocity = 0, -1, -1

    def event(self, step: int, order: int, program: int, pitch: int, number: int) -> list[int]:
        """Ids of one event: order 0 ends a note, 1 is a drum, 2 begins a note."""
        ids = []
        if step != self.step:
            ids.append(_SHIFT + step - 1)
            self.step = step
        if order != 1 and program != self.program:
            ids.append(_PROGRAM + program)
            self.program = program
        if number != self.velocity:
            ids.append(_VELOCITY + number)
            self.velocity = number
        return [*ids, (_DRUM if order == 1 else _PITCH) + pitch]


def milliseconds(ids: ArrayLike) -> NDArray[np.int64]:
    """Time of each id from the start of the song, int64 [n]; it never runs backwards, whatever the ids are."""
    values = np.asarray(ids, np.int64).ravel()
    segment = np.maximum(np.cumsum(values == _SEGMENT) - 1, 0)
    shift = np.where((values >= _SHIFT) & (values < _PROGRAM), values - _SHIFT + 1, 0)
    steps = np.maximum.accumulate(segment * STEPS + shift) if len(values) else segment
    return steps * (STEP_US // 1000)


# ids to notes --------------------------------------------------------------------------------------------------


def decode_notes(ids: ArrayLike, *, velocity_bins: int = VELOCITY_BINS) -> tuple[list[Note], bool]:
    """(notes by start, whether every id had its place). Notes left sounding end with the last event."""
    _check_bins(velocity_bins)
    reader = _Reader(velocity_bins)
    for value in _integers(ids):
        reader.read(value)
    return reader.finish()


def _integers(ids: ArrayLike) -> list[int]:
    values: Any = np.asarray(ids).ravel().tolist()
    return [int(value) if isinstance(value, int) else -1 for value in values]


class _Reader:
    """One id after the other."""

    def __init__(self, velocity_bins: int) -> None:
        self.bins = velocity_bins
        self.well = True
        self.notes: list[Note] = []
        self.sounding: dict[tuple[int, int], tuple[int, int]] = {}  # (program, pitch) -> (step, velocity)
        self.tied: set[tuple[int, int]] | None = None  # while in a tie section
        self.segment, self.step, self.program, self.velocity = -1, 0, 0, -1

    @property
    def now(self) -> int:
        """Steps from the start of the song."""
        return max(self.segment, 0) * STEPS + self.step

    def read(self, value: int) -> None:
        """One id; one that has no place is skipped."""
        if value == _SEGMENT and self.segment >= _MAX_SEGMENTS:
            self.well = False  # what follows would be read as a part of the last one
        elif value == _SEGMENT:
            self.well = self.well and self.tied is None
            self._close_ties()
            self.segment, self.step, self.program, self.velocity = self.segment + 1, 0, 0, -1
            self.tied = set()
        elif value == _TIE:
            self.well = self.well and self.tied is not None
            self._close_ties()
        elif self.segment < 0 or not 0 <= value <= _VELOCITY + self.bins:
            self.well = False
        elif value >= _VELOCITY:
            self.velocity = value - _VELOCITY
            self.well = self.well and self.tied is None
        elif value >= _DRUM:
            self._drum(value - _DRUM)
        elif value >= _PITCH:
            self._pitch(self.program, value - _PITCH)
        elif value >= _PROGRAM:
            self.program = value - _PROGRAM
        elif value - _SHIFT + 1 > self.step and self.tied is None:
            self.step = value - _SHIFT + 1
        else:
            self.well = False  # time does not run backwards

    def _drum(self, pitch: int) -> None:
        if self.velocity < 1 or self.tied is not None:
            self.well = False
            return
        start = self.now * STEP_US
        velocity = bin_velocity(self.velocity, self.bins)
        self.notes.append(Note(start, start + DRUM_US, pitch, velocity, 0, True))

    def _pitch(self, program: int, pitch: int) -> None:
        key = (program, pitch)
        if self.tied is not None:
            self.well = self.well and key in self.sounding and key not in self.tied
            self.tied.add(key)
        elif self.velocity < 0 or (self.velocity == 0 and key not in self.sounding):
            self.well = False
        else:
            if self.velocity:
                self.well = self.well and key not in self.sounding
            self._end(key)
            if self.velocity:
                self.sounding[key] = (self.now, bin_velocity(self.velocity, self.bins))

    def _end(self, key: tuple[int, int]) -> None:
        if key in self.sounding:
            start, velocity = self.sounding.pop(key)
            end = max(self.now, start + 1)
            self.notes.append(Note(start * STEP_US, end * STEP_US, key[1], velocity, key[0], False))

    def _close_ties(self) -> None:
        """What a tie section does not name has ended before it."""
        if self.tied is not None:
            for key in [key for key in self.sounding if key not in self.tied]:
                self.well = False
                self._end(key)
            self.tied = None

    def finish(self) -> tuple[list[Note], bool]:
        """Ends what still sounds."""
        self.well = self.well and not self.sounding and self.tied is None
        for key in list(self.sounding):
            self._end(key)
        return sorted(self.notes), self.well
