"""Scores and audio: two excerpts a chorale, engraved by verovio and played by tinysoundfont.

An excerpt gives a `score` record (image of one system, MusicXML, MIDI, timemap) and, for three of four, an
`audio` record of the same key, played from that MIDI.
"""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from ringweave.data_pipes.demo import chorales
from ringweave.data_pipes.demo.common import (
    Job,
    Record,
    is_heldout,
    json_bytes,
    on_white,
    package_folder,
    png_bytes,
    rank,
    shuffled,
    svg_to_rgba,
    trim,
    version,
)

SCORE, AUDIO = "score", "audio"
DISTRIBUTION = "music21"
LICENCE = "not stated in the package for this piece; corpus/license.txt: used by permission, see LICENSES.md"
FILES = 220
EXCERPTS = 2
HEIGHT, MAX_WIDTH = 128, 320
#: Pixels between two staff lines. Verovio draws a staff space as 18 units.
STAFF_SPACE = 5
RATE = 16_000
TAIL = 0.2  # seconds after the last note-off
MAX_SECONDS = 4.0
TEMPI = (108, 120, 132, 144)
#: MIDI programs, by piece: piano, harpsichord, church organ, strings, choir, horns, oboe, clarinet.
PROGRAMS = (0, 6, 19, 48, 52, 60, 68, 71)
#: Lines thick enough to survive 5 pixels a staff space.
ENGRAVING = {
    "adjustPageHeight": True,
    "adjustPageWidth": True,
    "barLineWidth": 0.4,
    "breaks": "none",
    "footer": "none",
    "header": "none",
    "ledgerLineThickness": 0.4,
    "pageHeight": 60_000,
    "pageMarginBottom": 10,
    "pageMarginLeft": 60,
    "pageMarginTop": 10,
    "pageWidth": 60_000,
    "scale": 100,
    "spacingStaff": 8,
    "staffLineWidth": 0.3,
    "stemWidth": 0.3,
    "svgViewBox": True,
}


@dataclass(frozen=True)
class Engraved:
    """One engraved excerpt: `bars` [first, last) from 0, image uint8 [128, W] with black ink on white."""

    bars: tuple[int, int]
    image: NDArray[np.uint8]
    musicxml: str
    midi: bytes
    timemap: list[dict[str, Any]]


def plan(limit: int | None = None) -> list[Job]:
    """One job a chorale file; variants of a work (`bwv145-a`) are the same piece."""
    folder = package_folder("music21", DISTRIBUTION) / "corpus" / "bach"
    jobs: list[Job] = []
    for path in (*folder.glob("bwv*.mxl"), *folder.glob("bwv*.xml")):
        piece = "bach/" + path.stem.split("-")[0]
        jobs.append(Job(SCORE, path.stem, piece, is_heldout(piece), (path,)))
    return trim(shuffled(jobs, by="chorales")[:FILES], limit)


def render(job: Job) -> list[Record]:
    """Score and audio records of a chorale; none for files that are no plain four-part chorale."""
    (path,) = job.args
    records: list[Record] = []
    try:
        bars = chorales.read_chorale(path)
    except chorales.UnusableScoreError:
        return []
    program = PROGRAMS[rank(f"{job.piece}/program") % len(PROGRAMS)]
    found = 0
    for first in shuffled(range(0, len(bars[0]) - 1, 2), by=job.name):
        tempo_rank = rank(f"{job.name}/{first}/tempo")
        engraved = _longest_fit(bars, first, tempo_rank, program)
        if engraved is None:
            continue
        records += _records(job, path, bars, engraved, _tempo(bars, engraved.bars, tempo_rank), program)
        found += 1
        if found == EXCERPTS:
            break
    return records


def _quarters(bars: list[list[chorales.Measure]], span: tuple[int, int]) -> Fraction:
    return sum((bars[0][i].duration for i in range(*span)), Fraction(0))


def _tempo(bars: list[list[chorales.Measure]], span: tuple[int, int], tempo_rank: int) -> int:
    """A tempo, in quarters a minute, at which the excerpt and its tail last at most MAX_SECONDS."""
    quarters = float(_quarters(bars, span))
    fitting = [t for t in TEMPI if quarters * 60 / t + TAIL <= MAX_SECONDS] or [TEMPI[-1]]
    return fitting[tempo_rank % len(fitting)]


def _longest_fit(
    bars: list[list[chorales.Measure]], first: int, tempo_rank: int, program: int
) -> Engraved | None:
    """Three or two bars (at most nine quarters) from `first` that fit the image; None when neither does."""
    for count in (3, 2):
        span = (first, first + count)
        if span[1] > len(bars[0]) or not chorales.usable(bars, first, count) or _quarters(bars, span) > 9:
            continue
        tempo = _tempo(bars, span, tempo_rank)
        engraved = engrave(chorales.excerpt_xml(bars, first, count, tempo=tempo, program=program), span)
        if engraved is not None:
            return engraved
    return None


def engrave(musicxml: str, bars: tuple[int, int]) -> Engraved | None:
    """Engrave one system; None when it is larger than HEIGHT x MAX_WIDTH pixels."""
    toolkit = _toolkit()
    if not toolkit.loadData(musicxml):
        return None
    rgba = svg_to_rgba(toolkit.renderToSVG(1), zoom=STAFF_SPACE / 18)
    height, width = rgba.shape[:2]
    if height > HEIGHT or width > MAX_WIDTH:
        return None
    page = np.full((HEIGHT, -(-width // 16) * 16), 255, dtype=np.uint8)
    top, left = (HEIGHT - height) // 2, (page.shape[1] - width) // 2
    page[top : top + height, left : left + width] = on_white(rgba)[..., 0]
    midi = base64.b64decode(toolkit.renderToMIDI())
    return Engraved(bars, page, musicxml, midi, toolkit.renderToTimemap())


@lru_cache(maxsize=1)
def _toolkit() -> Any:
    import verovio

    verovio.enableLog(verovio.LOG_OFF)
    toolkit = verovio.toolkit()
    toolkit.setOptions(ENGRAVING)
    return toolkit


@lru_cache(maxsize=1)
def _soundfont() -> bytes:
    return (package_folder("pretty_midi", "pretty-midi") / "TimGM6mb.sf2").read_bytes()


def _records(
    job: Job,
    path: Path,
    bars: list[list[chorales.Measure]],
    engraved: Engraved,
    tempo: int,
    program: int,
) -> list[Record]:
    first, last = engraved.bars
    key = f"{path.stem.replace('.', '_')}-bar{first + 1:02d}"
    content = repr(chorales.signature(bars, first, last - first))
    about = {
        "piece": job.piece,
        "licence": LICENCE,
        "source": version(DISTRIBUTION),
        "file": f"music21/corpus/bach/{path.name}",
        "bars": [first + 1, last],
        "tempo": tempo,
        "program": program,
    }
    members = {
        "png": png_bytes(engraved.image),
        "musicxml": engraved.musicxml.encode(),
        "mid": engraved.midi,
        "timemap.json": json_bytes(engraved.timemap),
        "json": json_bytes({**about, "engraver": version("verovio"), "staff_space_px": STAFF_SPACE}),
    }
    records = [Record(SCORE, key, job.heldout, members, content)]
    if rank(f"{key}/audio") % 4:
        samples = play(engraved.midi, program=program)
        about |= {
            "soundfont": f"TimGM6mb.sf2 ({version('pretty-midi')}), licence not stated in the package",
            "player": version("tinysoundfont"),
            "seconds": len(samples) / RATE,
            "score_key": key,
        }
        sound = {"flac": flac_bytes(samples), "json": json_bytes(about)}
        records.append(Record(AUDIO, key, job.heldout, sound, content))
    return records


def play(midi: bytes, *, program: int) -> NDArray[np.int16]:
    """Play a MIDI file with one General MIDI program: int16 [T] mono at 16 kHz, peak 0.7 of full scale.

    A fresh synthesizer each time: a used one keeps the phases of its voices, and the bytes would depend on
    what was played before.
    """
    import pretty_midi
    import tinysoundfont

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verovio repeats the tempo on each track; pretty_midi remarks on it
        score = pretty_midi.PrettyMIDI(io.BytesIO(midi))
    events: list[tuple[int, int, int]] = []  # (sample, 0 off or 1 on, pitch): offs first at the same time
    for instrument in score.instruments:
        for note in instrument.notes:
            events += [(round(note.start * RATE), 1, note.pitch), (round(note.end * RATE), 0, note.pitch)]
    synth = tinysoundfont.Synth(samplerate=RATE, gain=-6)
    font = synth.sfload(_soundfont())
    synth.program_select(0, font, 0, program)
    blocks: list[NDArray[np.float32]] = []
    position = 0
    for at, on, pitch in sorted(events):
        if at > position:
            blocks.append(np.frombuffer(synth.generate_simple(at - position), dtype=np.float32))
            position = at
        if on:
            synth.noteon(0, pitch, 90)
        else:
            synth.noteoff(0, pitch)
    blocks.append(np.frombuffer(synth.generate_simple(round(TAIL * RATE)), dtype=np.float32))
    mono = np.concatenate(blocks).reshape(-1, 2).astype(np.float64).mean(axis=1)
    fade = round(TAIL * RATE / 2)
    mono[-fade:] *= np.linspace(1, 0, fade)
    return np.rint(mono / max(1e-9, float(np.abs(mono).max())) * 0.7 * 32767).astype(np.int16)


def flac_bytes(samples: NDArray[np.int16]) -> bytes:
    """FLAC of int16 [T] mono at 16 kHz."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
