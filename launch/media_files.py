"""Single files on disk ↔ token ids, for `ringweave tokenizer encode|decode`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.pretrain.errors import ConfigError
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.members import as_grey, as_mono, as_rgb, as_rgba

BY_ENDING = {
    ".txt": "text", ".md": "text", ".png": "image", ".jpg": "image", ".jpeg": "image", ".webp": "image",
    ".wav": "audio", ".flac": "audio", ".ogg": "audio", ".mp3": "audio", ".mp4": "video", ".mkv": "video",
    ".webm": "video", ".mov": "video", ".avi": "video", ".musicxml": "symbolic", ".mxl": "symbolic",
    ".mid": "midi", ".midi": "midi",
}  # fmt: skip
MODALITIES = ("text", "image", "rgba", "score", "audio", "video", "symbolic", "midi")
#: Larger inputs belong into shards.
MAX_BYTES = 1 << 30


def encode_file(path: Path, tokenizers: Any, *, modality: str | None = None) -> Any:
    """The Segment of one file. `modality` is guessed from the ending when not given (a .png is an image).

    Raises ConfigError for an unknown modality, DataError for what cannot be read or decoded.
    """
    chosen = modality or BY_ENDING.get(path.suffix.lower(), "")
    if chosen not in MODALITIES:
        what = (
            f"unknown modality {modality!r}"
            if modality
            else f"no modality known for {path.suffix or 'this file'}"
        )
        raise ConfigError(what, where=str(path), fix=f"give --modality: {', '.join(MODALITIES)}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError("the file is too large", where=str(path), why=f"more than {MAX_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise DataError("cannot read the file", where=str(path), why=error.strerror or str(error)) from error
    if chosen == "text":
        try:
            return tokenizers.text_segment(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError("not UTF-8 text", where=str(path), why=str(error)) from error
    import ringweave.tokenizers.media as media

    where = str(path)
    if chosen == "audio":
        samples, rate = media.decode_audio(data, where=where)
        return tokenizers.audio_segment(as_mono(samples), rate)
    if chosen == "video":
        frames, times = media.decode_video(data, where=where)
        return tokenizers.video_segment(frames, times)
    if chosen == "symbolic":
        return tokenizers.symbolic_segment(data, where=where)
    if chosen == "midi":
        return tokenizers.midi_segment(data, where=where)
    image = media.decode_image(data, where=where)
    # The same conversions as in training, so that a file gives the ids it has there.
    if chosen == "rgba":
        return tokenizers.rgba_segment([as_rgba(image)])
    if chosen == "score":
        return tokenizers.score_segment(as_grey(image))
    return tokenizers.image_segment(as_rgb(image))


def read_ids(path: Path) -> NDArray[np.int32]:
    """int32 [n] from JSON: a plain list, or an object with `ids`. Raises DataError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            "cannot read token ids", where=str(path), why=str(error), fix="give JSON from `encode`"
        ) from error
    ids = raw.get("ids") if isinstance(raw, dict) else raw
    whole = isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    if not whole:
        raise DataError(
            "not a list of token ids", where=str(path), fix="give JSON from `ringweave tokenizer encode`"
        )
    return np.asarray(ids, np.int32)


def write_decoded(decoded: Sequence[Any], out: Path) -> list[dict[str, Any]]:
    """Writes each decoded part into `out`: .txt, .musicxml, .mid, .wav, .png (frames and layers numbered)."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, part in enumerate(decoded):
        stem = f"{number:03d}-{part.modality}"
        files = [str(path) for path in _write_part(out, stem, part.modality, part.value)]
        written.append({"modality": part.modality, "files": files, "complete": bool(part.complete)})
    return written


def _write_part(out: Path, stem: str, modality: str, value: Any) -> list[Path]:
    if isinstance(value, bytes):
        path = out / f"{stem}.mid"
        path.write_bytes(value)
        return [path]
    if isinstance(value, str):
        path = out / f"{stem}.{'musicxml' if modality == 'symbolic' else 'txt'}"
        path.write_text(value, encoding="utf-8")
        return [path]
    if modality == "audio":
        import soundfile

        samples, rate = value if isinstance(value, tuple) else (value, 16_000)
        path = out / f"{stem}.wav"
        soundfile.write(path, np.asarray(samples), int(rate))
        return [path]
    if modality == "video" and isinstance(value, tuple):
        value = value[0]
    from PIL import Image

    pictures = list(value) if isinstance(value, list) or np.ndim(value) == 4 else [value]
    paths = []
    for i, picture in enumerate(pictures):
        path = out / (f"{stem}.png" if len(pictures) == 1 else f"{stem}-{i:03d}.png")
        Image.fromarray(np.asarray(picture)).save(path)
        paths.append(path)
    return paths
