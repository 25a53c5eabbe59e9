"""Standard MIDI Files (format 0 and 1) to notes and back; own reader, for bytes nobody vouches for.

Rules where a file leaves room:

- A note-off ends the oldest sounding note of its channel and pitch. A note-on of velocity 0 is a note-off.
- A note that is never ended (stuck) ends with the file. A note-off without a note is left out and counted.
- The program of a note is the last one set on its channel in its own track, or else in any track; 0 without one.
- Channel 10 is drums. Pedals, bends, pressure, sysex and texts are left out and counted.
- Tempo changes of every track hold for all; times are exact fractions of a second until they are rounded once.

A cut or malformed file, format 2 and a file longer than `MAX_SECONDS` are a `DataError`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from ringweave.tokenizers.errors import DataError

MAX_BYTES = 1 << 26
MAX_TRACKS = 1024
MAX_EVENTS = 1 << 22
MAX_SECONDS = 4 * 3600
DRUMS = 9  # MIDI channel 10
_TEMPO = 500_000  # µs a quarter until a file says otherwise
_TICKS = 480  # a quarter, of files written here
_TICK_US = 500  # so a tick is half a millisecond: 480 ticks of 240 ms
_DATA_BYTES = {0x8: 2, 0x9: 2, 0xA: 2, 0xB: 2, 0xC: 1, 0xD: 1, 0xE: 2}
_KINDS = {0xA: "pressure", 0xB: "controller", 0xD: "pressure", 0xE: "pitch bend"}


class Note(NamedTuple):
    """One note: times in µs from the start, velocity 1 to 127; `program` is 0 for drums."""

    start: int
    end: int
    pitch: int
    velocity: int
    program: int
    drum: bool


@dataclass
class Song:
    """Notes by start, and how many of what were left out."""

    notes: list[Note] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


class _Event(NamedTuple):
    tick: int
    kind: int  # high half of the status byte; 0xF is a meta event
    channel: int  # with the port in its upper bits; the type of a meta event
    data: bytes


def refuse(where: str, why: str) -> DataError:
    """The error of this module."""
    return DataError(
        "cannot read this MIDI file", where=where, why=why, fix="remove the record, or export it again"
    )


def read(data: bytes, *, where: str) -> Song:
    """The notes of a Standard MIDI File; DataError for what is not one, or not whole."""
    division, tracks = _tracks(data, where)
    song = Song()
    events = [_events(track, where=f"{where}: track {i + 1}", dropped=song.dropped) for i, track in tracks]
    clock = _Clock(division, events, where)
    last = max((track[-1].tick for track in events if track), default=0)
    end = clock.microseconds(last)
    if end > MAX_SECONDS * 1_000_000:
        raise refuse(where, f"it lasts {end / 1e6:.0f} seconds, limit {MAX_SECONDS}")
    everywhere: dict[int, list[tuple[int, int]]] = {}
    for track in events:
        for event in track:
            if event.kind == 0xC:
                everywhere.setdefault(event.channel, []).append((event.tick, event.data[0]))
    for changes in everywhere.values():
        changes.sort(key=lambda change: change[0])
    for track in events:
        _track_notes(track, everywhere, clock, last, song)
    song.notes.sort()
    return song


# chunks and events ---------------------------------------------------------------------------------------------


def _tracks(data: bytes, where: str) -> tuple[int, list[tuple[int, bytes]]]:
    """(division word, [(number, bytes of a track)])."""
    if len(data) > MAX_BYTES:
        raise refuse(where, f"{len(data)} bytes, limit {MAX_BYTES}")
    if data[:4] != b"MThd" or len(data) < 14:
        raise refuse(where, "it does not begin with an MThd chunk of 6 bytes")
    size = int.from_bytes(data[4:8], "big")
    form, count, division = (int.from_bytes(data[i : i + 2], "big") for i in (8, 10, 12))
    if size < 6 or form > 1 or (form == 0 and count != 1):
        raise refuse(
            where, f"format {form} with {count} tracks in a header of {size} bytes; readable: 0 and 1"
        )
    if count > MAX_TRACKS:
        raise refuse(where, f"{count} tracks, limit {MAX_TRACKS}")
    if not division & 0x7FFF or (division & 0x8000 and (not division & 0xFF or division >> 8 not in _FRAMES)):
        raise refuse(where, f"its division is {division:#06x}")
    found: list[tuple[int, bytes]] = []
    at = 8 + size
    while len(found) < count:
        head = data[at : at + 8]
        length = int.from_bytes(head[4:], "big")
        if len(head) < 8 or at + 8 + length > len(data):
            raise refuse(where, f"it ends inside track {len(found) + 1} of {count}")
        if head[:4] == b"MTrk":  # other chunks are to be skipped, says the standard
            found.append((len(found), data[at + 8 : at + 8 + length]))
        at += 8 + length
    return division, found


class _Cursor:
    """Bytes of one track, read in order; past the end is a DataError."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.at, self.where = data, 0, where

    def byte(self) -> int:
        """The next byte."""
        if self.at >= len(self.data):
            raise refuse(self.where, "it ends inside an event")
        self.at += 1
        return self.data[self.at - 1]

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if self.at + count > len(self.data):
            raise refuse(self.where, f"an event of {count} bytes, {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def variable(self) -> int:
        """A number of up to four bytes, seven bits each."""
        value = 0
        for _ in range(4):
            byte = self.byte()
            value = value << 7 | byte & 0x7F
            if byte < 0x80:
                return value
        raise refuse(self.where, f"a number longer than four bytes at byte {self.at}")


def _events(data: bytes, *, where: str, dropped: Counter[str]) -> list[_Event]:
    """The events of a track that matter here, up to its end-of-track event, which is the last."""
    cursor, tick, status, port = _Cursor(data, where), 0, 0, 0
    events: list[_Event] = []
    while True:
        if cursor.at >= len(data):
            raise refuse(where, "it has no end-of-track event")
        tick += cursor.variable()
        if len(events) > MAX_EVENTS:
            raise refuse(where, f"more than {MAX_EVENTS} events")
        first = cursor.byte()
        if first == 0xFF:
            kind = cursor.byte()
            content = cursor.take(cursor.variable())
            if kind == 0x2F:
                events.append(_Event(tick, 0xF, kind, b""))
                return events
            if kind == 0x51:
                if len(content) != 3 or not any(content):
                    raise refuse(where, f"a tempo of {content.hex() or 'nothing'}")
                events.append(_Event(tick, 0xF, kind, content))
            elif kind == 0x21 and len(content) == 1:
                port = content[0]
            else:
                dropped["meta event"] += 1
            continue
        if first in (0xF0, 0xF7):
            cursor.take(cursor.variable())
            dropped["sysex"] += 1
            status = 0
            continue
        if first > 0xF0:
            raise refuse(where, f"a byte {first:#04x} at {cursor.at - 1} that no MIDI file may hold")
        if first >= 0x80:
            status = first
        elif not status:
            raise refuse(
                where, f"a data byte {first:#04x} at {cursor.at - 1} without a status byte before it"
            )
        else:
            cursor.at -= 1
        content = cursor.take(_DATA_BYTES[status >> 4])
        if any(byte > 0x7F for byte in content):
            raise refuse(where, f"a status byte at {cursor.at - 1} where data should be")
        if status >> 4 in _KINDS:
            dropped[_KINDS[status >> 4]] += 1
            continue
        events.append(_Event(tick, status >> 4, port << 4 | status & 0xF, content))


#: First byte of a division in SMPTE frames -> frames a second.
_FRAMES = {
    256 - 24: Fraction(24),
    256 - 25: Fraction(25),
    256 - 29: Fraction(30_000, 1001),
    256 - 30: Fraction(30),
}


class _Clock:
    """Ticks to microseconds through the tempo map."""

    def __init__(self, division: int, tracks: list[list[_Event]], where: str) -> None:
        changes = sorted(
            (event.tick, int.from_bytes(event.data, "big"))
            for track in tracks
            for event in track
            if event.kind == 0xF and event.channel == 0x51
        )
        if division & 0x8000:
            rate = Fraction(1_000_000) / (_FRAMES[division >> 8] * (division & 0xFF))
            self.ticks, self.times, self.rates = [0], [Fraction(0)], [rate]
            return
        self.ticks, self.times, self.rates = [0], [Fraction(0)], [Fraction(_TEMPO, division)]
        for tick, tempo in changes:
            self.times.append(self.times[-1] + (tick - self.ticks[-1]) * self.rates[-1])
            self.ticks.append(tick)
            self.rates.append(Fraction(tempo, division))

    def microseconds(self, tick: int) -> int:
        """Time of a tick, rounded to 1 µs."""
        i = bisect_right(self.ticks, tick) - 1
        return round(self.times[i] + (tick - self.ticks[i]) * self.rates[i])


def _track_notes(
    track: list[_Event],
    everywhere: dict[int, list[tuple[int, int]]],
    clock: _Clock,
    last: int,
    song: Song,
) -> None:
    """Adds the notes of a track to `song`."""
    own: dict[int, int] = {}
    sounding: dict[tuple[int, int], deque[tuple[int, int, int]]] = {}

    def finish(channel: int, pitch: int, tick: int) -> None:
        start, velocity, program = sounding[channel, pitch].popleft()
        drum = channel & 0xF == DRUMS
        song.notes.append(
            Note(clock.microseconds(start), clock.microseconds(tick), pitch, velocity, program, drum)
        )

    for tick, kind, channel, data in track:
        if kind == 0xC:
            own[channel] = data[0]
        elif kind == 0x9 and data[1]:
            program = own.get(channel)
            if program is None:
                changes = everywhere.get(channel, [])
                i = bisect_right(changes, tick, key=lambda change: change[0])
                program = changes[i - 1][1] if i else 0
            if channel & 0xF == DRUMS:
                program = 0
            sounding.setdefault((channel, data[0]), deque()).append((tick, data[1], program))
        elif kind in (0x8, 0x9):
            if sounding.get((channel, data[0])):
                finish(channel, data[0], tick)
            else:
                song.dropped["note-off without a note"] += 1
    for (channel, pitch), notes in sounding.items():
        while notes:
            song.dropped["stuck note (ended with the file)"] += 1
            finish(channel, pitch, last)


# writing -------------------------------------------------------------------------------------------------------


def write(notes: Iterable[Note]) -> bytes:
    """A format 1 file: a track a program, then the drums. Times are kept to half a millisecond."""
    groups: dict[tuple[bool, int], list[Note]] = {}
    for note in sorted(notes):
        groups.setdefault((note.drum, note.program), []).append(note)
    tracks = [_variable(0) + b"\xff\x51\x03" + (_TICKS * _TICK_US).to_bytes(3, "big")]
    channels = [channel for channel in range(16) if channel != DRUMS]
    for number, ((drum, program), group) in enumerate(sorted(groups.items())):
        port, place = divmod(number, len(channels))
        channel = DRUMS if drum else channels[place]
        head = _variable(0) + b"\xff\x21\x01" + bytes([port]) if port and not drum else b""
        tracks.append(head + _variable(0) + bytes([0xC0 | channel, program]) + _track(group, channel))
    body = b""
    for track in tracks:
        track += _variable(0) + b"\xff\x2f\x00"
        body += b"MTrk" + len(track).to_bytes(4, "big") + track
    head = b"MThd" + (6).to_bytes(4, "big") + (1).to_bytes(2, "big") + len(tracks).to_bytes(2, "big")
    return head + _TICKS.to_bytes(2, "big") + body


def _track(notes: list[Note], channel: int) -> bytes:
    """Note events in time, ends before beginnings."""
    events: list[tuple[int, int, int, int]] = []
    for note in notes:
        start, end = round(note.start / _TICK_US), round(note.end / _TICK_US)
        events.append((start, 1, note.pitch, note.velocity))
        events.append((max(end, start + 1), 0, note.pitch, 64))
    written, before = bytearray(), 0
    for tick, on, pitch, velocity in sorted(events):
        written += _variable(tick - before) + bytes([(0x90 if on else 0x80) | channel, pitch, velocity])
        before = tick
    return bytes(written)


def _variable(value: int) -> bytes:
    """A number in seven-bit bytes, at most four."""
    value = min(value, (1 << 28) - 1)
    found = bytes([value & 0x7F])
    while value := value >> 7:
        found = bytes([value & 0x7F | 0x80]) + found
    return found
