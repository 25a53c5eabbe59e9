"""How many tokens a sample has, from the headers of its media: for plans whose lengths follow from sizes.

A picture's tokens follow from its width and height, a sound's from its number of samples and their rate; text is
tokenized. The rest (layers and pages, whose empty cells are written shorter; video, whose frames must be counted;
formats whose headers do not tell) is not probed: `probe_length` gives None, and the sample has to be tokenized.
A damaged record may have a length all the same; that it cannot be read shows when it is.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from ringweave.data_pipes.documents import parse_plan
from ringweave.data_pipes.formats import member_of, text_of
from ringweave.data_pipes.plan_items import PICTURES, SOUNDS, parse_entry
from ringweave.data_pipes.sample import Sample
from ringweave.tokenizers.segment import Segment

#: Ids around a segment of media.
_DELIMITERS = 2
_ORIENTATION = 0x0112


def probe_length(sample: Sample, plan: Sequence[str], tokenizers: Any) -> int | None:
    """Tokens of the sample's document, or None if that takes tokenizing it.

    Raises DataError for a missing member and for text that cannot be used, as encoding does.
    """
    segments: list[Segment] = []
    codecs = getattr(tokenizers, "codecs", {})
    for text, _ in parse_plan(plan):
        entry = parse_entry(text)
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


def _picture(data: bytes, codec: Any) -> int | None:
    """Tokens of an image segment, from the header of a PNG or JPEG."""
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
    patch = codec.patch
    return _DELIMITERS + -(-height // patch) * (-(-width // patch) + 1)


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
