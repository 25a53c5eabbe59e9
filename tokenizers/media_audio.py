"""Sound from bytes: WAV, FLAC, OGG and MP3 by soundfile.

- Whatever the width, int16 comes back: 24 and 32 bits are rounded, 8 bits are spread. A DC offset stays.
- Floating point, and what lossy codecs decode to, can pass full scale (1.0). Then the whole clip is turned down until
  its peak is full scale: no sample is clipped. A clip within full scale is not touched (1.0 itself is 32767).
- NaN and infinity, no samples at all, and files that are not whole are errors: a WAV by its chunks, an OGG by the
  checksums of its pages, a FLAC by its MD5, an MP3 by its frames. WAV and MP3 have no checksums, so changed bytes
  inside their samples can go unseen.
- All channels come back. To mono it is their mean, rounded down (`members.as_mono`), the low-frequency one included.
"""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from ringweave.tokenizers import ogg
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.media_error import Damage, refuse
from ringweave.tokenizers.mp3 import find_cut, is_mp3

MAX_SAMPLES = 1 << 28  # of one clip, all channels: 93 minutes of 48 kHz mono
MAX_SECONDS = 4 * 3600  # of one clip: a rate of 1 Hz would grow without bound when it is resampled
SAMPLE_RATES = (1000, 768_000)  # Hz, lowest and highest
MAX_CHANNELS = 64
AUDIO_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
_AT_ONCE = 1 << 20  # samples of all channels decoded at a time
#: How whole numbers are read, and how many of their lowest bytes are padding; all else is read as floating point.
_WHOLE = {
    "PCM_U8": ("int16", 1), "PCM_S8": ("int16", 1), "PCM_16": ("int16", 0),
    "PCM_24": ("int32", 1), "PCM_32": ("int32", 0),
}  # fmt: skip
I16 = NDArray[np.int16]


def decode_audio(data: bytes, *, where: str, max_samples: int = MAX_SAMPLES) -> tuple[I16, int]:
    """(int16 [T, channels], sample rate in Hz), T > 0. The rules stand at the top of this module.

    Raises DataError for other formats, damage, non-finite samples and a file that ends early.
    """
    try:
        _check_whole(data)
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file, max_samples)
            rate, wanted = int(file.samplerate), file.frames
            samples, peak = _read(file, _digest_of(data))
        if peak > 1:
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                samples, _ = _read(file, gain=1 / peak)
        if len(samples) != wanted:
            raise Damage(f"{len(samples)} of {wanted} samples could be read")
        if not len(samples):
            raise Damage(f"no samples at {rate} Hz")
        return samples, rate
    except DataError:
        raise
    except Damage as error:
        raise refuse("audio", where, str(error), error.fix) from error
    except Exception as error:
        raise refuse("audio", where, f"{type(error).__name__}: {error}") from error


def _check_header(file: Any, max_samples: int) -> None:
    """Before anything is decoded."""
    rate, wanted, channels = int(file.samplerate), file.frames, file.channels
    if file.format not in AUDIO_FORMATS:
        raise Damage(f"format {file.format}; readable: {', '.join(AUDIO_FORMATS)}")
    if wanted > MAX_SECONDS * rate:
        raise Damage(f"{wanted} samples at {rate} Hz, limit {MAX_SECONDS} s")
    if channels > MAX_CHANNELS or not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
        raise Damage(f"{channels} channels at {rate} Hz")
    if wanted * channels > max_samples:
        raise Damage(f"{wanted} x {channels} samples, limit {max_samples}")


def _read(file: Any, digest: bytes = b"", gain: float = 1.0) -> tuple[I16, float]:
    """(int16 [T, channels], peak, 0 for whole numbers), piece by piece: a header that lies costs no memory.

    `digest`, where given, is the MD5 that the samples must have.
    """
    pieces, peak, md5 = [np.zeros((0, file.channels), np.int16)], 0.0, hashlib.md5(usedforsecurity=False)
    dtype, padding = _WHOLE.get(file.subtype, ("float64", 0))
    count = max(1, _AT_ONCE // file.channels)
    while True:
        piece = file.read(count, dtype=dtype, always_2d=True)
        if digest:
            width = piece.dtype.itemsize
            stored = np.ascontiguousarray(piece).astype(f"<i{width}").view(np.uint8).reshape(-1, width)
            md5.update(stored[:, padding:].tobytes())
        if dtype == "float64":
            if not np.isfinite(piece).all():
                raise Damage("it holds non-finite samples")
            peak = max(peak, float(np.abs(piece).max(initial=0.0)))
            piece = _rounded(piece * gain * 32768)
        elif dtype == "int32":
            piece = _rounded(piece / 65536)
        pieces.append(piece)
        if len(piece) < count:
            break
    if digest and md5.digest() != digest:
        raise Damage("the samples are not those of its MD5")
    return np.concatenate(pieces), peak


def _rounded(values: NDArray[np.float64]) -> I16:
    """The top half step of the scale has no number of its own: +1.0 becomes 32767."""
    return np.clip(np.rint(values), -32768, 32767).astype(np.int16)


def _digest_of(data: bytes) -> bytes:
    """The MD5 of the samples that a FLAC states in its first block (RFC 9639, 8.2); b"" when there is none."""
    stated = data[26:42] if data[:4] == b"fLaC" and data[4] & 0x7F == 0 else b""
    return stated if any(stated) else b""


def _check_whole(data: bytes) -> None:
    """The reader takes a cut WAV, OGG or MP3 for a short one; their own framing says otherwise."""
    if data[:4] == b"RIFF":
        position = 12
        while position + 8 <= len(data):
            size = int.from_bytes(data[position + 4 : position + 8], "little")
            if position + 8 + size > len(data):
                name = data[position : position + 4].decode("latin-1")
                raise Damage(f"chunk {name!r} needs {size} bytes, the file ends before")
            position += 8 + size + size % 2
    elif data[:4] == b"OggS":
        if damage := ogg.find_damage(data):
            raise Damage(damage)
    elif is_mp3(data) and (cut := find_cut(data)):
        raise Damage(cut)
