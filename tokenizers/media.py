"""Bytes to arrays, for input nobody vouches for.

Images by Pillow (PNG, JPEG, WEBP), audio by soundfile (WAV, FLAC, OGG, MP3), video by PyAV (MP4/MOV, Matroska/
WebM, AVI). The container is recognised by its first bytes and given to the library by name, so nothing is
probed: FFmpeg's playlist formats, which would open other files, are out of reach. Sizes are checked before
pixels are decoded. Whatever goes wrong is a `DataError` naming `where`; a cut-off file is an error, never a
shorter result.
"""

from __future__ import annotations

import io
import logging
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.mp3 import find_cut, is_mp3

MAX_PIXELS = 1 << 26  # of one image: 64 megapixels
MAX_SAMPLES = 1 << 28  # of one clip, all channels: 93 minutes of 48 kHz mono
MAX_SECONDS = 4 * 3600  # of one clip: a rate of 1 Hz would grow without bound when it is resampled
MAX_VIDEO_PIXELS = 1 << 30  # of one clip, all frames
MAX_VIDEO_SECONDS = 24 * 3600  # from the first frame to the last
SAMPLE_RATES = (1000, 768_000)  # Hz, lowest and highest
MAX_CHANNELS = 64
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
AUDIO_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
_AUDIO_AT_ONCE = 1 << 20  # samples of all channels decoded at a time

av.logging.set_level(av.logging.PANIC)
logging.getLogger("libav").setLevel(logging.CRITICAL)


def _refuse(kind: str, where: str, why: str, fix: str = "") -> DataError:
    return DataError(
        f"cannot decode this {kind}", where=where, why=why, fix=fix or "remove the record, or write it again"
    )


def decode_image(data: bytes, *, where: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """uint8 [H, W, C]: C is 1 (grey), 3 (RGB) or 4 (straight alpha), as stored; EXIF orientation applied.

    Palettes become colour, a transparent colour (tRNS) becomes alpha, 16-bit grey is cut to 8 bits.
    Colour profiles are not applied. Raises DataError for other formats, animations and damage.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise _refuse(
                    "image", where, f"{image.width}x{image.height} is more than {max_pixels} pixels"
                )
            if getattr(image, "n_frames", 1) > 1:
                raise _refuse("image", where, "it is an animation", "store its frames as video")
            _check_image_end(data, where)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _as_stored(upright)
    except DataError:
        raise
    except Exception as error:
        raise _refuse("image", where, f"{type(error).__name__}: {error}") from error


def _check_image_end(data: bytes, where: str) -> None:
    """The reader is content once it has all rows; a file cut after them is damaged all the same."""
    if data[:4] == b"\x89PNG":
        complete = b"IEND\xaeB`\x82" in data
    elif data[:2] == b"\xff\xd8":  # the end-of-image mark, after the last start of scan
        complete = data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    else:
        complete = len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if not complete:
        raise _refuse("image", where, "the file ends early")


def _as_stored(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16") or image.mode == "I":
        return (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)[..., None]
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        mode = "RGBA"
    elif image.mode in ("1", "L"):
        mode = "L"
    else:
        mode = "RGB"
    pixels = np.asarray(image.convert(mode))
    return pixels[..., None].copy() if pixels.ndim == 2 else pixels.copy()


def decode_audio(data: bytes, *, where: str, max_samples: int = MAX_SAMPLES) -> tuple[NDArray[np.int16], int]:
    """(int16 [T, channels], sample rate in Hz). Wider samples are rounded to 16 bits, saturating.

    Raises DataError for other formats, damage, non-finite samples and a file that ends early.
    """
    try:
        _check_audio_end(data, where)
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.format not in AUDIO_FORMATS:
                raise _refuse("audio", where, f"format {file.format}; readable: {', '.join(AUDIO_FORMATS)}")
            rate, wanted = int(file.samplerate), file.frames
            if wanted > MAX_SECONDS * rate:
                raise _refuse("audio", where, f"{wanted} samples at {rate} Hz, limit {MAX_SECONDS} s")
            if file.channels > MAX_CHANNELS or not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
                raise _refuse("audio", where, f"{file.channels} channels at {rate} Hz")
            if wanted * file.channels > max_samples:
                raise _refuse("audio", where, f"{wanted} x {file.channels} samples, limit {max_samples}")
            samples = _read_audio(file, where)
        if len(samples) != wanted:
            raise _refuse("audio", where, f"{len(samples)} of {wanted} samples could be read")
        if not len(samples):
            raise _refuse("audio", where, f"no samples at {rate} Hz")
        return samples, rate
    except DataError:
        raise
    except Exception as error:
        raise _refuse("audio", where, f"{type(error).__name__}: {error}") from error


def _read_audio(file: Any, where: str) -> NDArray[np.int16]:
    """int16 [T, channels], piece by piece: a header that promises more than there is costs no memory."""
    pieces = [np.zeros((0, file.channels), np.int16)]
    exact = file.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
    while True:
        count = max(1, _AUDIO_AT_ONCE // file.channels)
        piece = file.read(count, dtype="int16" if exact else "float64", always_2d=True)
        if not exact:
            if not np.isfinite(piece).all():
                raise _refuse("audio", where, "it holds non-finite samples")
            piece = np.clip(np.rint(piece * 32768), -32768, 32767).astype(np.int16)
        pieces.append(piece)
        if len(piece) < count:
            return np.concatenate(pieces)


def _check_audio_end(data: bytes, where: str) -> None:
    """The reader takes a cut WAV or OGG for a short one; their own framing says otherwise."""
    if data[:4] == b"RIFF":
        position = 12
        while position + 8 <= len(data):
            size = int.from_bytes(data[position + 4 : position + 8], "little")
            if position + 8 + size > len(data):
                name = data[position : position + 4].decode("latin-1")
                raise _refuse("audio", where, f"chunk {name!r} needs {size} bytes, the file ends before")
            position += 8 + size + size % 2
    elif data[:4] == b"OggS":
        last = data.rfind(b"OggS")
        count = data[last + 26] if last + 27 <= len(data) else 0
        table = data[last + 27 : last + 27 + count]
        complete = len(table) == count and last + 27 + count + sum(table) <= len(data)
        if not complete or not data[last + 5] & 4:
            raise _refuse("audio", where, "the stream ends before its last page")
    elif is_mp3(data) and (cut := find_cut(data)):
        raise _refuse("audio", where, cut)


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


def decode_video(
    data: bytes, *, where: str, max_frames: int = 512, max_pixels: int = MAX_VIDEO_PIXELS
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """(uint8 [T, H, W, 3], float64 [T] seconds): every frame and its own time, the first at its stored time.

    Times come from the frames and not from an average rate, which is wrong for variable-rate video. Raises
    DataError for other containers, damage, more than `max_frames` frames (none is dropped in silence), a
    change of size, and times that do not increase.
    """
    container = _container(data)
    if container is None:
        raise _refuse("video", where, "not an MP4/MOV, Matroska/WebM or AVI file")
    try:
        if _declared_size(data, container) > len(data):
            raise _refuse("video", where, "the file ends early")
        with av.open(io.BytesIO(data), mode="r", format=container) as file:
            return _read_video(file, where, max_frames, max_pixels)
    except DataError:
        raise
    except Exception as error:
        raise _refuse("video", where, f"{type(error).__name__}: {error}") from error


def _read_video(
    file: Any, where: str, max_frames: int, max_pixels: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    if not file.streams.video:
        raise _refuse("video", where, "it has no video stream")
    stream = file.streams.video[0]
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"err_detect": "explode"}
    width, height = stream.codec_context.width, stream.codec_context.height
    if width <= 0 or height <= 0 or width * height > min(max_pixels, MAX_PIXELS):
        raise _refuse("video", where, f"frames of {width}x{height}")
    declared = int(stream.frames or 0)
    allowed = min(max_frames, max_pixels // (width * height))
    frames: list[NDArray[np.uint8]] = []
    times: list[float] = []
    for frame in file.decode(stream):
        if len(frames) >= allowed:
            fix = "cut it into shorter clips, or lower its frame rate"
            raise _refuse("video", where, f"more than {allowed} frames of {width}x{height}", fix)
        if (frame.width, frame.height) != (width, height):
            raise _refuse("video", where, f"frame {len(frames)} changes size to {frame.width}x{frame.height}")
        if frame.is_corrupt:
            raise _refuse("video", where, f"frame {len(frames)} is damaged")
        if frame.time is None or (times and not frame.time > times[-1]):
            raise _refuse("video", where, f"frame {len(frames)} has no time after its predecessor's")
        if frame.time - (times[0] if times else frame.time) > MAX_VIDEO_SECONDS:
            raise _refuse("video", where, f"frame {len(frames)} comes {frame.time:.0f} s in")
        pixels = frame.to_ndarray(format="rgb24")
        turns = round(getattr(frame, "rotation", 0) / 90) % 4
        frames.append(np.rot90(pixels, turns) if turns else pixels)
        times.append(float(frame.time))
    if not frames:
        raise _refuse("video", where, "no frame could be decoded")
    if declared > len(frames):
        raise _refuse("video", where, f"{len(frames)} of {declared} frames could be decoded")
    return np.stack(frames), np.asarray(times)
