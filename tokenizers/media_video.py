"""Clips from bytes: MP4/MOV, Matroska/WebM and AVI by PyAV.

- The first video stream that is no cover picture; its sound is not decoded here.
- Every frame comes with its own time. None is dropped or made up: a cut file, a frame without a time or with one not
  after its predecessor's, a frame of another size and one too many are errors.
- Frames come upright: a display matrix of quarter turns and mirrors is applied, any other is an error.
- Colour: the matrix and range that the file states; a matrix it leaves open is BT.601 below 720 lines and BT.709 from
  there on; a range it leaves open is the limited one (of grey without colour: the full one). HDR (PQ, HLG) and alpha
  are errors: 8 bits of RGB hold neither. 8-bit video is converted by FFmpeg's fast path, which is off by up to two
  steps of 255, deeper video to one step.
- Interlaced frames come woven, pixels that are not square stay as stored.
"""

from __future__ import annotations

import io
import logging
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation
from numpy.typing import NDArray

from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.media_error import Damage, refuse
from ringweave.tokenizers.media_image import MAX_PIXELS

MAX_VIDEO_PIXELS = 1 << 30  # of one clip, all frames
MAX_VIDEO_SECONDS = 24 * 3600  # from the first frame to the last
HD_LINES = 720
_STATED_MATRICES = (1, 4, 5, 6, 7, 9)  # of ITU-T H.273: BT.709, FCC, BT.601 (two), SMPTE 240M, BT.2020
_UNSTATED = 2
_LIMITED = 1  # range
_HDR = (16, 18)  # its transfer curves PQ and HLG
_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
U8 = NDArray[np.uint8]

av.logging.set_level(av.logging.PANIC)
logging.getLogger("libav").setLevel(logging.CRITICAL)


def decode_video(
    data: bytes, *, where: str, max_frames: int = 512, max_pixels: int = MAX_VIDEO_PIXELS
) -> tuple[U8, NDArray[np.float64]]:
    """(uint8 [T, H, W, 3], float64 [T] seconds): every frame and its own time, the first at its stored time.

    Times come from the frames and not from an average rate, which is wrong for variable-rate video. Raises
    DataError for other containers, damage, more than `max_frames` frames (none is dropped in silence), a
    change of size, and times that do not increase.
    """
    container = _container(data)
    if container is None:
        raise refuse("video", where, "not an MP4/MOV, Matroska/WebM or AVI file")
    try:
        if _declared_size(data, container) > len(data):
            raise Damage("the file ends early")
        with av.open(io.BytesIO(data), mode="r", format=container) as file:
            return _read(file, max_frames, max_pixels)
    except DataError:
        raise
    except Damage as error:
        raise refuse("video", where, str(error), error.fix) from error
    except Exception as error:
        raise refuse("video", where, f"{type(error).__name__}: {error}") from error


def _container(data: bytes) -> str | None:
    """FFmpeg's name of the container, by its first bytes."""
    if data[4:8] == b"ftyp":
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    return None


def _declared_size(data: bytes, container: str) -> int:
    """Bytes the container says it has; 0 when it leaves that open."""
    if container == "avi":
        return 8 + int.from_bytes(data[4:8], "little")
    position = 0
    if container == "mp4":
        while position + 8 <= len(data):
            size = int.from_bytes(data[position : position + 4], "big")
            if size == 1:
                size = int.from_bytes(data[position + 8 : position + 16], "big")
            if size < 8:  # 0: this box reaches to the end
                return 0
            position += size
        return position if position >= len(data) else len(data) + 1
    for _ in range(2):  # EBML header, then the segment: 4 bytes of id, a length of 1 to 8 bytes
        if position + 5 > len(data):
            return len(data) + 1
        width = 9 - data[position + 4].bit_length()
        field = int.from_bytes(data[position + 4 : position + 4 + width], "big")
        size = field & ((1 << 7 * width) - 1)
        if size == (1 << 7 * width) - 1:
            return 0
        position += 4 + width + size
    return position


def _read(file: Any, max_frames: int, max_pixels: int) -> tuple[U8, NDArray[np.float64]]:
    covers = av.stream.Disposition.attached_pic
    streams = [stream for stream in file.streams.video if not stream.disposition & covers]
    if not streams:
        raise Damage("it has no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise Damage("its video has no codec that is known here")
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"err_detect": "explode"}
    width, height = stream.codec_context.width, stream.codec_context.height
    if width <= 0 or height <= 0 or width * height > min(max_pixels, MAX_PIXELS):
        raise Damage(f"frames of {width}x{height}")
    declared = int(stream.frames or 0)
    allowed = min(max_frames, max_pixels // (width * height))
    frames: list[U8] = []
    times: list[float] = []
    for frame in file.decode(stream):
        number = len(frames)
        if number >= allowed:
            fix = "cut it into shorter clips, or lower its frame rate"
            raise Damage(f"more than {allowed} frames of {width}x{height}", fix)
        if (frame.width, frame.height) != (width, height):
            raise Damage(f"frame {number} changes size to {frame.width}x{frame.height}")
        if frame.is_corrupt:
            raise Damage(f"frame {number} is damaged")
        times.append(_time_of(frame, number, times))
        frames.append(_upright(_rgb(frame), _matrix_of(frame)))
        if frames[-1].shape != frames[0].shape:
            raise Damage(f"frame {number} is turned another way")
    if not frames:
        raise Damage("no frame could be decoded")
    if declared > len(frames):
        raise Damage(f"{len(frames)} of {declared} frames could be decoded")
    return np.stack(frames), np.asarray(times)


def _time_of(frame: Any, number: int, times: list[float]) -> float:
    """Seconds of the frame as stored."""
    if frame.time is None or (times and not frame.time > times[-1]):
        raise Damage(f"frame {number} has no time after its predecessor's")
    if frame.time - (times[0] if times else frame.time) > MAX_VIDEO_SECONDS:
        raise Damage(f"frame {number} comes {frame.time:.0f} s in")
    return float(frame.time)


def _rgb(frame: Any) -> U8:
    """uint8 [H, W, 3] by the stated colour matrix, or the one that its lines let expect."""
    form = frame.format
    if any(part.is_alpha for part in form.components):
        fix = "store its frames as layers, or lay them over one colour"
        raise Damage(f"its frames have an alpha channel ({form.name})", fix)
    if frame.color_trc in _HDR:
        raise Damage("its colours are HDR (PQ or HLG)", "map them to BT.709 first")
    options: dict[str, Any] = {"format": "rgb24", "threads": 1}
    if form.components[0].bits > 8:
        options["interpolation"] = _EXACT
    if not form.is_rgb and len(form.components) > 1:
        if frame.colorspace == _UNSTATED:
            options["src_colorspace"] = Colorspace.ITU601 if frame.height < HD_LINES else Colorspace.ITU709
        elif frame.colorspace not in _STATED_MATRICES:
            raise Damage(
                f"its colour matrix {frame.colorspace} (ITU-T H.273) is none of BT.601, BT.709 and BT.2020"
            )
    pixels: U8 = frame.to_ndarray(**options)
    if len(form.components) == 1 and frame.color_range == _LIMITED:  # FFmpeg takes all grey for full range
        wide = (pixels.astype(np.int32) - 16) * 510 + 219
        pixels = (wide // 438).clip(0, 255).astype(np.uint8)
    return pixels


def _matrix_of(frame: Any) -> tuple[float, float, float, float]:
    """(a, b, c, d) of the display matrix: a stored pixel (x, y) is seen at (ax + cy, bx + dy)."""
    for part in frame.side_data:
        if part.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(part), "=i4")[:5] / 65536
            return a, b, c, d
    return 1.0, 0.0, 0.0, 1.0


def _upright(pixels: U8, matrix: tuple[float, float, float, float]) -> U8:
    """The frame as it is to be seen: quarter turns and mirrors, whatever the scale."""
    a, b, c, d = matrix
    scale = max(map(abs, matrix))
    turned = abs(a) + abs(d) < 0.01 * scale and min(abs(b), abs(c)) > 0.99 * scale
    if not turned and not (abs(b) + abs(c) < 0.01 * scale and min(abs(a), abs(d)) > 0.99 * scale):
        raise Damage(f"its display matrix ({a:.3f}, {b:.3f}, {c:.3f}, {d:.3f}) is no quarter turn")
    if turned:
        pixels = pixels.swapaxes(0, 1)
    if (c if turned else a) < 0:
        pixels = pixels[:, ::-1]
    if (b if turned else d) < 0:
        pixels = pixels[::-1]
    return pixels
