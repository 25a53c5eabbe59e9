"""MIDI to events and back: within the bins, by the stated rules, judged by pretty_midi where it can be."""

from __future__ import annotations

import io
import random

import numpy as np
import pretty_midi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringweave.tokenizers import midi_events, midi_file
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.midi_file import Note

END = b"\x00\xff\x2f\x00"


def smf(*tracks: bytes, form: int | None = None, division: int = 480) -> bytes:
    """A file; 480 ticks a quarter of 0.5 s make a tick 1/960 s."""
    form = int(len(tracks) > 1) if form is None else form
    head = b"MThd" + b"".join(
        n.to_bytes(w, "big") for n, w in ((6, 4), (form, 2), (len(tracks), 2), (division, 2))
    )
    return head + b"".join(b"MTrk" + len(t).to_bytes(4, "big") + t for t in tracks)


def song(track: bytes) -> list[tuple[int, int, int, int]]:
    notes = midi_file.read(smf(track), where="x").notes
    return [(n.start, n.end, n.pitch, n.velocity) for n in notes]


def named(data: bytes, **options: int) -> list[str]:
    names = midi_events.tokens(**options)
    return [names[i] for i in midi_events.encode(data, where="x", **options)]


def refused(data: bytes, why: str) -> None:
    with pytest.raises(DataError, match=why) as caught:
        midi_events.encode(data, where="shard-0:3")
    assert "shard-0:3" in str(caught.value)


# what a file says ----------------------------------------------------------------------------------------------


def test_events_of_a_small_file_by_hand() -> None:
    track = (
        b"\x00\xc0\x28"  # violin
        b"\x00\x90\x3c\x40"  # C4 begins at 0
        b"\x83\x60\x3c\x00"  # running status: it ends after 480 ticks = 0.5 s
        b"\x00\x99\x24\x7f"  # bass drum
        b"\x93\x60\x90\x40\x01"  # E4 begins 2528 ticks later, at 3.1333 s
        b"\xaa\x00\x80\x40\x40"  # and ends after 5376 ticks, at 8.7333 s
        b"\x90\x00\x90\x43\x02"  # G4 begins at 10.8667 s
        b"\x00\x80\x43\x00" + END  # and ends at once
    )
    first = "segment tie program:40 velocity:16 pitch:60 shift:50 velocity:0 pitch:60 velocity:32 drum:36"
    first += " shift:313 velocity:1 pitch:64 shift:873 velocity:0 pitch:64"
    second = "segment tie shift:87 program:40 velocity:1 pitch:67 shift:88 velocity:0 pitch:67"
    assert named(smf(track)) == f"{first} {second}".split()


def test_a_note_over_the_border_of_segments_is_in_the_tie_section() -> None:
    note = Note(9_000_000, 31_000_000, 60, 64, 5, False)
    names = midi_events.tokens()
    ids = midi_events.encode_notes([note])
    tie = ["segment", "program:5", "pitch:60", "tie"]
    end = ["shift:100", "program:5", "velocity:0", "pitch:60"]
    begin = ["segment", "tie", "shift:900", "program:5", "velocity:16", "pitch:60"]
    assert [names[i] for i in ids] == [*begin, *tie, *tie, *tie, *end]
    assert midi_events.decode_notes(ids) == ([note._replace(velocity=62)], True)


def test_tempo_changes_of_one_track_hold_for_all() -> None:
    tempo = (
        b"\x00\xff\x51\x03\x0f\x42\x40" + b"\x83\x60\xff\x51\x03\x03\xd0\x90" + END
    )  # 1 s, then 0.25 s a quarter
    notes = b"\x83\x60\x90\x3c\x40" + b"\x83\x60\x80\x3c\x40" + END
    got = midi_file.read(smf(tempo, notes), where="x").notes
    assert [(n.start, n.end) for n in got] == [(1_000_000, 1_250_000)]


def test_smpte_time() -> None:
    track = b"\x64\x90\x3c\x40" + b"\x32\x80\x3c\x40" + END  # 25 frames of 40: 1 ms a tick
    got = midi_file.read(smf(track, division=0xE728), where="x").notes
    assert [(n.start, n.end) for n in got] == [(100_000, 150_000)]


def test_program_of_the_own_track_before_that_of_another() -> None:
    setup = b"\x00\xc0\x07" + b"\x00\xc1\x08" + END
    one = b"\x00\xc0\x09" + b"\x00\x90\x3c\x40" + b"\x60\x80\x3c\x40" + END
    two = b"\x00\x91\x3e\x40" + b"\x60\x81\x3e\x40" + b"\x00\x92\x40\x40" + b"\x60\x82\x40\x40" + END
    got = midi_file.read(smf(one, setup, two), where="x").notes
    assert {n.pitch: n.program for n in got} == {60: 9, 62: 8, 64: 0}


def test_stuck_overlapping_stray_and_zero_length_notes() -> None:
    tick = 500_000 / 480
    stuck = b"\x00\x90\x3c\x40" + b"\x83\x60\xff\x2f\x00"
    assert song(stuck) == [(0, 500_000, 60, 64)]
    # two overlapping C4: the first off ends the older one
    overlap = b"\x00\x90\x3c\x40" + b"\x60\x3c\x20" + b"\x60\x3c\x00" + b"\x60\x3c\x00" + END
    assert song(overlap) == [(0, round(192 * tick), 60, 64), (round(96 * tick), round(288 * tick), 60, 32)]
    # as events the second cuts the first short
    assert named(smf(overlap)) == [
        *("segment", "tie", "program:0", "velocity:16", "pitch:60", "shift:10", "velocity:0", "pitch:60"),
        *("velocity:8", "pitch:60", "shift:30", "velocity:0", "pitch:60"),
    ]
    zero = b"\x00\x90\x3c\x40" + b"\x00\x80\x3c\x40" + END
    assert song(zero) == [(0, 0, 60, 64)]
    assert midi_events.decode_notes(midi_events.encode(smf(zero), where="x"))[0][0][:2] == (0, 10_000)
    stray = b"\x00\x80\x3c\x40" + END
    assert named(smf(stray)) == []
    assert midi_events.dropped(smf(stray), where="x") == {"note-off without a note": 1}
    assert midi_events.dropped(smf(stuck), where="x") == {"stuck note (ended with the file)": 1}


def test_many_stuck_notes_end_with_the_file() -> None:
    """Every pitch of every channel, twice, under a tempo change; only those of pitch 60 are ever ended, once."""
    begin = b"".join(
        bytes([0, 0x90 | c, pitch, 64]) for _ in range(2) for c in range(16) for pitch in range(128)
    )
    faster = b"\x83\x60\xff\x51\x03\x03\xd0\x90"  # after 0.5 s: 0.25 s a quarter
    finish = b"\x83\x60" + b"\0".join(bytes([0x80 | c, 60, 0]) for c in range(16))
    data = smf(begin + faster + finish + b"\x83\x60\xff\x2f\x00")
    found = midi_file.read(data, where="x")
    assert len(found.notes) == 2 * 16 * 128
    ends = {note.end for note in found.notes if note.pitch != 60}
    assert ends == {1_000_000}
    assert sorted(note.end for note in found.notes if note.pitch == 60) == [750_000] * 16 + [1_000_000] * 16
    assert found.dropped == {"stuck note (ended with the file)": 2 * 16 * 128 - 16}
    notes, complete = midi_events.decode_notes(midi_events.encode(data, where="x"))
    assert complete
    assert {note.end for note in notes if not note.drum} == {1_000_000}


def test_pedals_sysex_texts_and_other_chunks_are_left_out() -> None:
    track = (
        b"\x00\xb0\x40\x7f"
        + b"\x00\x40\x00"
        + b"\x00\xe0\x00\x40"
        + b"\x00\xf0\x03\x01\x02\xf7"
        + b"\x00\xff\x03\x01a"
    )
    note = b"\x00\x90\x3c\x40" + b"\x60\x80\x3c\x40" + END
    data = smf(track + note)
    expected = {"controller": 2, "pitch bend": 1, "sysex": 1, "meta event": 1}
    assert midi_events.dropped(data, where="x") == expected
    alien = data[:14] + b"XFIH\x00\x00\x00\x02ab" + data[14:]
    assert named(alien) == named(data) == named(smf(note))


def test_damaged_files_are_refused() -> None:
    note = b"\x00\x90\x3c\x40" + b"\x60\x80\x3c\x40" + END
    data = smf(note, note)
    for end in range(len(data)):
        refused(data[:end], "ends inside track|MThd")
    refused(b"RIFF" + data, "MThd")
    refused(smf(note, form=2), "format 2")
    refused(smf(note, note, form=0), "format 0 with 2 tracks")
    refused(smf(note, division=0), "division")
    refused(smf(note, division=0x9528), "division")
    refused(smf(note[:-4]), "no end-of-track")
    refused(smf(b"\x00\x3c\x40" + END), "without a status byte")
    refused(smf(b"\x00\xf0\x00" + b"\x00\x3c\x40" + END), "without a status byte")
    refused(smf(b"\x00\x90\x3c\x90" + END), "status byte at")
    refused(smf(b"\x00\xf4" + END), "no MIDI file may hold")
    refused(smf(b"\xff\xff\xff\xff\x00\x90\x3c\x40" + END), "longer than four bytes")
    refused(smf(b"\x00\xff\x51\x03\x00\x00\x00" + END), "a tempo of 000000")
    refused(smf(b"\x00\xff\x01\x7fshort" + END), "an event of 127 bytes")


def test_huge_delta_times_are_refused_and_long_silences_are_not() -> None:
    refused(smf(b"\x00\x90\x3c\x40" + b"\xff\xff\xff\x7f\x80\x3c\x40" + END), "limit 14400")
    # 2^21 - 1 ticks = 2184.53 s
    late = midi_file.read(smf(b"\xff\xff\x7f\x90\x3c\x40" + b"\x60\x80\x3c\x40" + END), where="x").notes
    notes, complete = midi_events.decode_notes(midi_events.encode_notes(late))
    assert complete
    assert notes[0].start == 2_184_530_000
    assert len(midi_events.encode_notes(late)) == 2 * 219 + 7


# the round trip ------------------------------------------------------------------------------------------------


@st.composite
def songs(draw: st.DrawFn) -> list[tuple[float, float, int, int, int, bool]]:
    """(start, end in seconds, pitch, velocity, program, drum); one pitch of a program never sounds twice at once."""
    notes, ends = [], {}
    for _ in range(draw(st.integers(0, 40))):
        drum = draw(st.booleans())
        program = 0 if drum else draw(st.integers(0, 127))
        pitch = draw(st.integers(0, 127))
        start = ends.get((program, pitch, drum), 0.0) + draw(st.floats(0.02, 25))
        end = start + draw(st.floats(0.02, 25))
        ends[program, pitch, drum] = end
        notes.append((start, end, pitch, draw(st.integers(1, 127)), program, drum))
    return notes


@settings(max_examples=60, deadline=None)
@given(songs(), st.sampled_from([1, 8, 32, 127]))
def test_round_trip_through_files_of_pretty_midi(
    notes: list[tuple[float, float, int, int, int, bool]], bins: int
) -> None:
    source = pretty_midi.PrettyMIDI(resolution=960)
    for program, drum in sorted({(n[4], n[5]) for n in notes}):
        part = pretty_midi.Instrument(program, is_drum=drum)
        part.notes = [pretty_midi.Note(n[3], n[2], n[0], n[1]) for n in notes if n[4:] == (program, drum)]
        source.instruments.append(part)
    if len([p for p in source.instruments if not p.is_drum]) > 15:
        return  # pretty_midi itself runs out of channels
    sink = io.BytesIO()
    source.write(sink)
    ids = midi_events.encode(sink.getvalue(), where="x", velocity_bins=bins)
    assert ids.dtype == np.int32
    data, complete = midi_events.decode(ids, velocity_bins=bins)
    assert complete
    again = midi_events.encode(data, where="x", velocity_bins=bins)
    np.testing.assert_array_equal(ids, again)
    got = sorted(
        (part.is_drum, part.program, note.pitch, note.start, note.end, note.velocity)
        for part in pretty_midi.PrettyMIDI(io.BytesIO(data)).instruments
        for note in part.notes
    )
    want = sorted((drum, program, pitch, s, e, v) for s, e, pitch, v, program, drum in notes)
    assert len(got) == len(want)
    for one, two in zip(want, got, strict=True):
        assert one[:3] == two[:3]
        assert abs(one[3] - two[3]) <= 0.0061  # half a step, and half a tick of the source
        assert abs(one[5] - two[5]) <= -(-127 // bins) / 2
        if not one[0]:
            assert abs(one[4] - two[4]) <= 0.0061


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-5, midi_events.size() + 5), max_size=60))
def test_any_ids_give_a_readable_file(ids: list[int]) -> None:
    data, complete = midi_events.decode(ids)
    notes = midi_file.read(data, where="x").notes
    if complete:
        assert len(midi_events.decode_notes(midi_events.encode_notes(notes))[0]) == len(notes)


def test_random_ids_in_bulk_and_odd_input() -> None:
    rng = random.Random(0)
    ids = [rng.randrange(midi_events.size()) for _ in range(20_000)]
    assert midi_events.decode(ids)[1] is False
    assert midi_events.decode([0] * 5000)[1] is False  # 14 hours
    for odd in ([], np.zeros((0,), np.int32)):
        assert midi_events.decode(odd)[1] is True
    for odd in ([1.5, 2.5], [True], ["a"]):
        assert midi_events.decode(odd)[1] is False
    assert midi_events.decode([10**6])[1] is False


def test_more_programs_than_channels_keep_their_programs() -> None:
    notes = [Note(0, 500_000, 60, 62, program, False) for program in range(128)]
    data, _ = midi_events.decode(midi_events.encode_notes(notes))
    assert midi_file.read(data, where="x").notes == notes
    assert {part.program for part in pretty_midi.PrettyMIDI(io.BytesIO(data)).instruments} == set(range(128))


@pytest.mark.parametrize("bins", [1, 2, 31, 32, 127])
def test_a_velocity_is_off_by_at_most_half_a_bin(bins: int) -> None:
    seen = [midi_events.velocity_bin(v, bins) for v in range(1, 128)]
    assert sorted(set(seen)) == list(range(1, bins + 1))
    assert seen == sorted(seen)
    back = [midi_events.bin_velocity(n, bins) for n in seen]
    assert max(abs(a - b) for a, b in zip(back, range(1, 128), strict=True)) <= -(-127 // bins) / 2
    assert [midi_events.velocity_bin(v, bins) for v in back] == seen


def test_the_vocabulary_is_fixed() -> None:
    assert midi_events.size() == len(midi_events.tokens()) == 1418
    assert midi_events.size(8) == 1418 - 24
    assert midi_events.tokens(8) == midi_events.tokens()[:1394]
    assert midi_events.digest() != midi_events.digest(8)
    assert midi_events.digest() == DIGEST
    for bins in (0, 128):
        with pytest.raises(DataError, match=f"{bins} velocity bins"):
            midi_events.size(bins)


DIGEST = "e0d1aff9ce84fda516f8fbd3c4b588c50c71f742106d5451696cb57b75b3bc54"
