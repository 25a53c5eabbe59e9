"""Pictures, sound and text files of the run folder, embedded in the page within a budget."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

from ringweave.pretrain.report.inputs import MEDIA_BUDGET, Inputs
from ringweave.pretrain.report.markup import missing
from ringweave.pretrain.report.safe_text import text

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"RIFF": "audio/wav",
    b"fLaC": "audio/flac",
    b"OggS": "audio/ogg",
}


def media(inputs: Inputs, path: Path, *, alt: str, room: int = 440) -> str:
    """A picture or sound as a data URI. The type is read from the bytes, never from the name; files outside
    the run folder (by link or `..`), of another type or over the budget are named, not embedded. Small
    pictures are enlarged by a whole factor to at most `room` px and kept pixelated."""
    name, data = path.name, b""
    if not inside(inputs, path):
        return missing(f"{name} is absent or lies outside the run folder")
    try:
        data = path.read_bytes() if path.stat().st_size <= MEDIA_BUDGET else b""
    except OSError as error:
        return missing(f"{name} cannot be read ({type(error).__name__})")
    kind = next((k for magic, k in _MAGIC.items() if data.startswith(magic)), "")
    coded = base64.b64encode(data).decode("ascii")
    if data and not kind:
        return missing(f"{name} is not a PNG, JPEG, WAV, FLAC or OGG file")
    if not data or len(coded) > inputs.media_left:
        return missing(
            f"{name} left out ({path.stat().st_size / 1000:,.0f} kB), the page would grow too large"
        )
    inputs.media_left -= len(coded)
    if kind.startswith("audio"):
        source = f"data:{kind};base64,{coded}"
        return f'<audio controls preload="metadata" aria-label="{text(alt)}" src="{source}"></audio>'
    css, size = "", ""
    if kind == "image/png" and len(data) > 26:
        width, height = struct.unpack(">II", data[16:24])
        factor = max(1, room // max(1, width))
        css = ("px " if factor > 1 else "") + ("check" if data[25] in (4, 6) else "")
        size = f' width="{width * factor}" height="{height * factor}"'
    return f'<img class="{css.strip()}"{size} alt="{text(alt)}" src="data:{kind};base64,{coded}">'


def inside(inputs: Inputs, path: Path) -> bool:
    """Whether `path` is a file of the run folder, links followed."""
    try:
        return path.resolve().is_relative_to(inputs.run_dir.resolve()) and path.is_file()
    except (OSError, ValueError):  # ValueError: a NUL in a name
        return False


def beginning(path: Path, limit: int = 6000) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        return f"(unreadable: {type(error).__name__})"
    return raw[:limit].decode("utf-8", errors="replace") + ("\n…" if len(raw) > limit else "")
