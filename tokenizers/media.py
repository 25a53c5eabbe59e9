"""Bytes to arrays, for input nobody vouches for.

Pictures (`media_image.py`) by Pillow, sound (`media_audio.py`) by soundfile, video (`media_video.py`) by PyAV; the
rules of each stand at the top of its module. The container is recognised by its first bytes and given to the library
by name, so nothing is probed: FFmpeg's playlist formats, which would open other files, are out of reach. Sizes are
checked before pixels are decoded. Whatever goes wrong is a `DataError` naming `where`; a cut-off file is an error,
never a shorter result.
"""

from __future__ import annotations

from ringweave.tokenizers.media_audio import (
    AUDIO_FORMATS,
    MAX_CHANNELS,
    MAX_SAMPLES,
    MAX_SECONDS,
    SAMPLE_RATES,
    decode_audio,
)
from ringweave.tokenizers.media_image import IMAGE_FORMATS, MAX_PIXELS, decode_image
from ringweave.tokenizers.media_video import MAX_VIDEO_PIXELS, MAX_VIDEO_SECONDS, decode_video

__all__ = [
    "AUDIO_FORMATS",
    "IMAGE_FORMATS",
    "MAX_CHANNELS",
    "MAX_PIXELS",
    "MAX_SAMPLES",
    "MAX_SECONDS",
    "MAX_VIDEO_PIXELS",
    "MAX_VIDEO_SECONDS",
    "SAMPLE_RATES",
    "decode_audio",
    "decode_image",
    "decode_video",
]
