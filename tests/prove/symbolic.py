"""Symbolic music comes back: MusicXML through LMX note for note, MIDI through events within their bins.

Every MusicXML file of music21's Bach folder (the chorales and what is kept with them), then every fourth of the other
composers': read by music21 before and after, each note compared by part, measure, voice, onset, length, spelled pitch,
tie and grace. LMX of the written score must be the same tokens, and verovio must load it. MIDI: the chorales as verovio
plays them, with times, lengths and velocities of a seeded player, written and read by pretty_midi. `--tiny` takes a few
files and writes no row.
"""

from __future__ import annotations

import base64
import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from _harness import Proof, arguments, prove_with
from _notes import agree, notes

from ringweave.tokenizers import lmx, midi_events
from ringweave.tokenizers.errors import DataError

SUFFIXES = (".mxl", ".xml", ".musicxml")
#: least share of notes that come back, in percent
CHORALES, OTHERS = 99.0, 99.0


def scores(folder: Path) -> list[Path]:
    """The MusicXML files under a folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)


def round_trips(files: list[Path], name: str, proof: Proof, verovio: Any) -> list[str]:
    """Figures of all files under `name`; returns the written scores."""
    from music21 import converter

    same = of = exact = unstable = unloaded = 0
    refused: list[str] = []
    written: list[str] = []
    for path in files:
        data = path.read_bytes()
        try:
            ids = lmx.encode(data, where=path.name)
        except DataError as error:
            refused.append(f"{path.name}: {error.why}")
            continue
        xml, complete = lmx.decode(ids)
        unstable += not (complete and np.array_equal(ids, lmx.encode(xml.encode(), where=path.name)))
        unloaded += not (verovio.loadData(xml) and verovio.getPageCount() > 0)
        before = notes(converter.parse(path, forceSource=True))
        both, larger = agree(before, notes(converter.parseData(xml, format="musicxml")))
        same, of, exact = same + both, of + larger, exact + (both == larger)
        if both != larger:
            print(f"{path.name}: {both} of {larger} notes", flush=True)
        written.append(xml)
    percent = round(100 * same / max(of, 1), 4)
    figures = {"files": len(files), "notes": of, "percent": percent, "files_exact": exact}
    figures |= {"refused": len(refused), "not_a_fixpoint": unstable, "not_loaded": unloaded}
    proof.found(**{f"{name}_{figure}": value for figure, value in figures.items()})
    proof.holds(unstable == 0, f"{name}: {unstable} scores give other tokens when written and read again")
    proof.holds(unloaded == 0, f"{name}: verovio does not load {unloaded}")
    for line in refused:
        print(f"refused: {line}", flush=True)
    return written


def performance(midi: bytes, rng: np.random.Generator) -> Any:
    """A pretty_midi of `midi` with a program a part, times off by some ms and velocities all over."""
    import pretty_midi

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        song = pretty_midi.PrettyMIDI(io.BytesIO(midi))
    for number, part in enumerate(song.instruments):
        part.program, part.is_drum = number % 128, False
        following: dict[int, float] = {}
        for note in sorted(part.notes, key=lambda n: n.start, reverse=True):
            note.start = max(0.0, note.start + rng.normal(0, 0.008))
            note.end = max(note.start + 0.03, note.end + rng.normal(0, 0.02))
            note.end = min(note.end, following.get(note.pitch, note.end))
            note.velocity = int(rng.integers(1, 128))
            following[note.pitch] = note.start
        part.notes = [note for note in part.notes if note.end - note.start >= 0.02]
    return song


def midi_round_trips(written: list[str], proof: Proof, verovio: Any) -> None:
    """Errors of MIDI events over all scores; judged by pretty_midi."""
    import pretty_midi

    rng = np.random.default_rng(6)
    count = lost = 0
    time = velocity = 0.0
    for xml in written:
        verovio.loadData(xml)
        song = performance(base64.b64decode(verovio.renderToMIDI()), rng)
        sink = io.BytesIO()
        song.write(sink)
        ids = midi_events.encode(sink.getvalue(), where="a performance")
        data, complete = midi_events.decode(ids)
        proof.holds(complete, "decoding says that its own ids are not whole")
        before = pretty_midi.PrettyMIDI(io.BytesIO(sink.getvalue()))
        after = pretty_midi.PrettyMIDI(io.BytesIO(data))
        parts = {part.program: part.notes for part in after.instruments}
        for part in before.instruments:
            one = sorted(part.notes, key=lambda n: (n.pitch, n.start))
            two = sorted(parts.get(part.program, []), key=lambda n: (n.pitch, n.start))
            count, lost = count + len(one), lost + abs(len(one) - len(two))
            for a, b in zip(one, two, strict=False):
                time = max(time, abs(a.start - b.start), abs(a.end - b.end)) if a.pitch == b.pitch else 1e9
                velocity = max(velocity, abs(a.velocity - b.velocity))
    proof.found(
        midi_notes=count, midi_lost=lost, midi_worst_ms=round(time * 1000, 2), midi_worst_velocity=velocity
    )
    proof.holds(lost == 0, f"{lost} of {count} MIDI notes are lost")
    proof.holds(time <= 0.0101, f"a MIDI time is off by {time * 1000:.2f} ms")
    proof.holds(velocity <= 2, f"a velocity is off by {velocity}, half a bin is 2")


def main() -> None:
    parser = arguments(__doc__, tiny="a few files of each kind")
    options = parser.parse_args()
    import verovio
    from music21 import corpus

    verovio.enableLog(verovio.LOG_OFF)
    toolkit = verovio.toolkit()
    root = Path(corpus.__file__).parent
    chorales = scores(root / "bach")
    others = [path for path in scores(root) if path not in set(chorales)][::4]
    if options.tiny:
        chorales, others = chorales[::60], others[::15]
    claim = (
        "MusicXML → LMX → MusicXML is note-exact (≥ 99 %); MIDI → events → MIDI within 10 ms and half a bin"
    )
    with prove_with(options, "symbolic", claim) as proof:
        written = round_trips(chorales, "chorales", proof, toolkit)
        midi_round_trips(written, proof, toolkit)
        round_trips(others, "others", proof, toolkit)
        for name, least in (("chorales", CHORALES), ("others", OTHERS)):
            percent = proof.figures[f"{name}_percent"]
            # Of a few files of the others, one that is hard decides.
            if name == "chorales" or not options.tiny:
                proof.holds(percent >= least, f"{name}: {percent} % of the notes, {least} wanted")
        proof.holds(proof.figures["chorales_refused"] == 0, "a chorale is refused")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
