"""How many tokens a sample has, from the headers of its media: for plans whose lengths follow from sizes.

A picture's tokens, and the cells of latents, follow from its width and height, a sound's from its number of samples and
their rate; text is tokenized. The rest (layers and pages as ids, whose empty cells are written shorter; video, whose
frames must be counted; formats whose headers do not tell) is not probed: `probe_length` gives None, and the sample has
to be tokenized. A damaged record may have a length all the same; that it cannot be read shows when it is.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from ringweave.data_pipes.documents import parse_plan
from ringweave.data_pipes.embeddings import shape_of_embeddings
from ringweave.data_pipes.formats import member_of, text_of
from ringweave.data_pipes.plan_items import PICTURES, SOUNDS, WORDS, Entry, parse_entry, read_by_view
from ringweave.data_pipes.sample import Sample
from ringweave.tokenizers.segment import Segment

#: Ids around a segment of media.
_DELIMITERS = 2
_ORIENTATION = 0x0112
_LAYER = re.compile(r"layer\d+\.png")


def probe_length(sample: Sample, plan: Sequence[str], tokenizers: Any) -> int | None:
    """Tokens of the sample's document, or None if that takes tokenizing it.

    Raises DataError for a missing member and for text that cannot be used, as encoding does.
    """
    segments: list[Segment] = []
    codecs = getattr(tokenizers, "codecs", {})
    parsed = [parse_entry(text) for text, _ in parse_plan(plan)]
    if any(entry.item == "latents" for entry in parsed):
        return _latents(sample, parsed, tokenizers) if "latents" in codecs else None
    for entry in parsed:
        if entry.item in ("text", "caption"):
            segments.append(tokenizers.text_segment(text_of(sample, entry)))
            continue
        wanted = (entry.argument,) if entry.argument else None
        tokens: int | None = None
        if entry.item == "image" and "image" in codecs:
            data = member_of(sample, entry.text, wanted or (*PICTURES, "flat.png"))
            tokens = _picture(data, codecs["image"])
        elif entry.item == "audio" and "audio" in codecs:
            tokens = _sound(member_of(sample, entry.text, wanted or SOUNDS), codecs["audio"])
        if tokens is None:
            return None
        segments.append(Segment(np.zeros(tokens, np.int32), entry.item, np.zeros((tokens, 4), np.int32)))
    return len(tokenizers.document(sample.key, segments))


def _latents(sample: Sample, plan: Sequence[Entry], tokenizers: Any) -> int | None:
    """Tokens of a document of latents: bos and the words, or their vectors, and the cells of each grid.

    None where there is a clip.
    """
    layers = sum(_LAYER.fullmatch(name) is not None for name in sample.members)
    words = "\n".join(text_of(sample, entry) for entry in plan if entry.item in WORDS)
    tokens = 1 + (len(tokenizers.text_segment(words)) if words else 0)
    patch = tokenizers.codecs["latents"].patch
    for entry in plan:
        if entry.item in WORDS:
            continue
        if entry.item == "embeddings":
            tokens += shape_of_embeddings(sample, entry)[0] - 1  # no bos in front of vectors
            continue
        made_of = read_by_view(entry.argument)
        wanted: tuple[str, ...] = ("layer0.png",) if made_of == "rgba" else (entry.argument,)
        wanted = (*PICTURES, "flat.png") if entry.argument == "image" else wanted
        size = None if made_of == "video" else _size(member_of(sample, entry.text, wanted))
        if size is None:
            return None
        grids = {"layers": layers, "lower": layers - 1}.get(entry.argument, 1)
        tokens += grids * -(-size[0] // patch) * -(-size[1] // patch)
    return tokens


def _picture(data: bytes, codec: Any) -> int | None:
    """Tokens of an image segment, from the header of a PNG or JPEG."""
    size = _size(data)
    if size is None:
        return None
    return _DELIMITERS + -(-size[1] // codec.patch) * (-(-size[0] // codec.patch) + 1)


def _size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a PNG or JPEG as it is to be seen, from its header."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            width, height = image.size
            if image.format == "PNG":
                if b"eXIf" in data or b"acTL" in data:  # may stand behind the pixels, and turn them
                    return None
            elif image.getexif().get(_ORIENTATION, 1) not in range(1, 5):
                width, height = height, width
    except Exception:
        return None
    return width, height


def _sound(data: bytes, codec: Any) -> int | None:
    """Tokens of an audio segment, from the header of a FLAC or WAV."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.format not in ("WAV", "WAVEX", "FLAC") or file.frames < 1 or file.samplerate <= 0:
                return None
            frames, rate = int(file.frames), int(file.samplerate)
    except Exception:
        return None
    return _DELIMITERS + codec.frames(-(-frames * codec.rate // rate)) * codec.books
