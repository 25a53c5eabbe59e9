"""Clips beside each other as one small film that browsers play, its pixels as they are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
#: (encoder, container, MIME type, options): the first one that this build of FFmpeg has. Both without loss.
_FORMS = (
    ("libvpx-vp9", "webm", "video/webm", {"lossless": "1", "cpu-used": "5"}),
    ("libx264", "mp4", "video/mp4", {"qp": "0", "preset": "veryfast", "movflags": "+faststart"}),
)
#: Pixels between two clips, and their grey.
GAP, _GREY = 8, 128


@dataclass(frozen=True, slots=True)
class Clip:
    """Bytes that a browser plays. share: width of one panel in parts of the whole width."""

    mime: str
    data: bytes
    width: int
    height: int


def beside(panels: Sequence[U8], *, side: int) -> U8:
    """Clips uint8 [T, H, W, 3] of one shape as [T, h, w, 3], enlarged by a whole factor towards `side` pixels.

    The factor is even where there is room: then the coarser colour of video formats loses nothing.
    """
    count, height, width = panels[0].shape[:3]
    factor = max(1, side // max(height, width))
    factor -= factor % 2 if factor > 1 else 0
    gap = np.full((count, height * factor, GAP, 3), _GREY, np.uint8)
    row: list[U8] = []
    for panel in panels:
        row += [panel.repeat(factor, axis=1).repeat(factor, axis=2), gap]
    whole = np.concatenate(row[:-1], axis=2)
    odd = [(0, 0), (0, whole.shape[1] % 2), (0, whole.shape[2] % 2), (0, 0)]
    return np.pad(whole, odd, mode="edge")


def encode_clip(frames: U8, times: Sequence[float]) -> Clip:
    """A film of frames uint8 [T, H, W, 3], H and W even, each shown from its time in seconds on; the last one as long
    as the others are on average. WebM or MP4; an animated WebP where neither can be made."""
    import av

    starts = [round(1000 * (time - times[0])) for time in times]
    mean = max(1, starts[-1] // max(1, len(starts) - 1)) if starts[-1] else 250
    for name, container, mime, options in _FORMS:
        try:
            data = _film(frames, [*starts, starts[-1] + mean], name, container, options)
        except (av.error.FFmpegError, ValueError):
            continue
        return Clip(mime, data, frames.shape[2], frames.shape[1])
    return Clip("image/webp", _webp(frames, np.diff([*starts, starts[-1] + mean])), *frames.shape[2:0:-1])


def _film(frames: U8, starts: list[int], name: str, container: str, options: dict[str, str]) -> bytes:
    """The last frame stands twice, so that players show it for its time."""
    import av

    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as file:
        stream: Any = file.add_stream(name, rate=1000, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        stream.codec_context.colorspace = stream.codec_context.color_primaries = 1  # BT.709
        stream.codec_context.color_trc = stream.codec_context.color_range = 1  # video range
        for pixels, start in zip([*frames, frames[-1]], starts):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            picture.pts, picture.time_base = start, Fraction(1, 1000)
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    return sink.getvalue()


def _webp(frames: U8, durations: Sequence[int] | NDArray[np.int64]) -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(
        sink, "WEBP", save_all=True, append_images=rest, lossless=True, loop=0, duration=[int(d) for d in durations]
    )  # fmt: skip
    return sink.getvalue()
