"""Video from strangers: the right colours, upright, at true times, or a DataError that says why."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from media_samples import WHERE, movie
from tokenizer_samples import clip, mp4, picture

from ringweave.tokenizers import media_video
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.media import decode_video

RNG = np.random.default_rng(8)


def refused(data: bytes, why: str) -> None:
    with pytest.raises(DataError, match=why) as caught:
        decode_video(data, where=WHERE)
    assert caught.value.where == WHERE


# colour --------------------------------------------------------------------------------------------------------

#: Weights of red and blue in luma, by the number of the matrix (ITU-T H.273, table 4).
WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087),
           9: (0.2627, 0.0593)}  # fmt: skip
COLOURS = [(120, 90, 170), (200, 100, 140), (60, 160, 110), (16, 128, 128), (235, 128, 128)]


def rgb_of(code: tuple[int, int, int], matrix: int, full: bool, bits: int) -> np.ndarray:
    """0 to 255, by the formulas of H.273."""
    red, blue = WEIGHTS[matrix]
    one, (y, u, v) = 1 << (bits - 8), code
    top = (1 << bits) - 1
    luma = y / top if full else (y - 16 * one) / (219 * one)
    cb, cr = ((c - 128 * one) / (top if full else 224 * one) for c in (u, v))
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    return np.clip(np.array([r, (luma - red * r - blue * b) / (1 - red - blue), b]) * 255, 0, 255)


def flat(code: tuple[int, int, int], pix_fmt: str, size: tuple[int, int] = (32, 32), **tags: int) -> bytes:
    """A clip of one colour, given as Y, Cb, Cr."""
    dtype = np.uint8 if pix_fmt in ("yuv420p", "yuv422p", "yuv444p") else np.dtype("<u2")
    down = 2 if "420" in pix_fmt else 1, 1 if "444" in pix_fmt else 2
    small = (-(-size[0] // down[0]), -(-size[1] // down[1]))
    planes = [np.full(shape, value, dtype) for shape, value in zip((size, small, small), code, strict=True)]
    return movie([planes], pix_fmt, **tags)


@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize("full", [False, True])
def test_the_stated_matrix_and_range(matrix: int, full: bool) -> None:
    for pix_fmt, bits, off in (
        ("yuv420p", 8, 2),
        ("yuv444p", 8, 1),
        ("yuv420p10le", 10, 1.01),
        ("yuv422p12le", 12, 1.01),
    ):
        for code in COLOURS:
            y, u, v = (value << (bits - 8) for value in code)
            data = flat((y, u, v), pix_fmt, colorspace=matrix, color_range=2 if full else 1)
            frames, _ = decode_video(data, where=WHERE)
            assert np.abs(frames[0, 16, 16] - rgb_of((y, u, v), matrix, full, bits)).max() <= off + 0.5


@pytest.mark.parametrize(("lines", "matrix"), [(718, 6), (720, 1), (1080, 1)])
def test_a_matrix_left_open_goes_by_the_lines(lines: int, matrix: int) -> None:
    frames, _ = decode_video(flat(COLOURS[0], "yuv444p", (lines, 16)), where=WHERE)
    expected = [rgb_of(COLOURS[0], number, False, 8) for number in (1, 6)]
    assert np.abs(expected[0] - expected[1]).max() > 5
    assert np.abs(frames[0, 16, 8] - rgb_of(COLOURS[0], matrix, False, 8)).max() <= 1.5
    stated = flat(COLOURS[0], "yuv444p", (lines, 16), colorspace=9)
    assert (
        np.abs(decode_video(stated, where=WHERE)[0][0, 16, 8] - rgb_of(COLOURS[0], 9, False, 8)).max() <= 1.5
    )


def test_motion_jpeg_is_full_range() -> None:
    planes = [
        np.full(size, level, np.uint8) for size, level in zip([(32, 32), (16, 16), (16, 16)], COLOURS[1])
    ]
    frames, _ = decode_video(movie([planes], "yuvj420p", codec="mjpeg", form="avi"), where=WHERE)
    assert np.abs(frames[0, 16, 16] - rgb_of(COLOURS[1], 6, True, 8)).max() <= 3


def test_white_of_10_bits_is_white() -> None:
    frames, _ = decode_video(flat((940, 512, 512), "yuv420p10le"), where=WHERE)
    assert frames.min() == 255  # FFmpeg's fast path gives 253


@pytest.mark.parametrize("matrix", [8, 10, 14])
def test_matrices_that_are_not_known_are_refused(matrix: int) -> None:
    refused(flat(COLOURS[0], "yuv444p", colorspace=matrix), f"colour matrix {matrix}")


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_is_refused(transfer: int) -> None:
    refused(flat(COLOURS[0], "yuv420p10le", color_trc=transfer, colorspace=9), "HDR")


def test_grey_and_rgb_need_no_matrix() -> None:
    grey = RNG.integers(0, 256, (12, 16), dtype=np.uint8)
    for stated in ({}, {"color_range": 2}):
        frames, _ = decode_video(movie([[grey]], "gray", **stated), where=WHERE)
        np.testing.assert_array_equal(frames[0], np.repeat(grey[..., None], 3, axis=2))
    frames, _ = decode_video(movie([[grey]], "gray", color_range=1), where=WHERE)
    expected = np.clip((grey.astype(float) - 16) * 255 / 219, 0, 255)
    assert np.abs(frames[0, ..., 1] - expected).max() <= 0.5
    colours = RNG.integers(0, 256, (720, 16, 3), dtype=np.uint8)
    frames, _ = decode_video(movie([[colours]], "rgb24", codec="png", form="mp4"), where=WHERE)
    np.testing.assert_array_equal(frames[0], colours)


def test_alpha_is_not_dropped_without_a_word() -> None:
    layer = picture(1, "RGBA", 32)
    planes = [layer[..., 0], layer[..., 1], layer[..., 2], layer[..., 3]]
    refused(movie([planes], "yuva444p"), "alpha channel")


# sizes and turns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(31, 33), (1, 1), (17, 9), (2, 5)])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
def test_odd_sizes(pix_fmt: str, size: tuple[int, int]) -> None:
    frames, _ = decode_video(flat(COLOURS[1], pix_fmt, size), where=WHERE)
    assert frames.shape == (1, *size, 3)
    assert np.abs(frames - rgb_of(COLOURS[1], 6, False, 8)).max() <= 2.5


def with_matrix(data: bytes, a: float, b: float, c: float, d: float) -> bytes:
    """The file with another matrix in its track header (ISO 14496-12, 8.3.2)."""
    at = data.index(b"tkhd") + 4 + (52 if data[data.index(b"tkhd") + 4] else 40)
    values = [round(v * 65536) for v in (a, b, 0, c, d, 0, 0, 0)]
    return data[:at] + struct.pack(">9i", *values, 1 << 30) + data[at + 36 :]


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0),
        (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0), (0, 2, -2, 0),
    ],
)  # fmt: skip
def test_turned_and_mirrored_frames_come_upright(matrix: tuple[int, int, int, int]) -> None:
    a, b, c, d = (np.sign(v) for v in matrix)
    still = np.repeat(np.repeat(RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8), 16, 0), 16, 1)
    data = mp4(np.stack([still, still]))
    plain, _ = decode_video(data, where=WHERE)
    height, width = plain.shape[1:3]
    places = [(a * x + c * y, b * x + d * y) for y in range(height) for x in range(width)]
    left, top = (min(place[k] for place in places) for k in (0, 1))
    expected = np.zeros((2, height, width, 3) if a else (2, width, height, 3), np.uint8)
    for number, (x, y) in enumerate(places):
        expected[:, int(y - top), int(x - left)] = plain[:, number // width, number % width]
    np.testing.assert_array_equal(decode_video(with_matrix(data, *matrix), where=WHERE)[0], expected)


@pytest.mark.parametrize("matrix", [(0.7, 0.7, -0.7, 0.7), (1, 0, 0, 2), (1, 0.3, 0, 1), (1, 0, 0, 0)])
def test_other_display_matrices_are_refused(matrix: tuple[float, float, float, float]) -> None:
    refused(with_matrix(mp4(clip(1, 2)), *matrix), "display matrix")


# times ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_variable_times_start_late_and_frames_come_in_order(codec: str, form: str) -> None:
    """The codecs store frames out of order; each frame is told by its grey."""
    times = [5000, 5040, 5080, 5400, 6000, 6033, 6066, 6100, 7000]
    greys = [30 + 25 * k for k in range(9)]
    half = np.full((16, 16), 128, np.uint8)
    planes = [[np.full((32, 32), grey, np.uint8), half, half] for grey in greys]
    name = {"libx264": "x264-params", "libx265": "x265-params"}[codec]
    options = {name: "log-level=0:bframes=3:b-adapt=0:keyint=60:scenecut=0", "bf": "3", "g": "60"}
    data = movie(planes, "yuv420p", codec=codec, form=form, times=times, options=options)
    with av.open(io.BytesIO(data), "r") as file:
        order = [packet.pts for packet in file.demux(video=0) if packet.pts is not None]
    assert order != sorted(order)
    frames, seconds = decode_video(data, where=WHERE)
    assert np.abs(seconds * 1000 - times).max() < 1
    expected = [rgb_of((grey, 128, 128), 6, False, 8)[0] for grey in greys]
    assert np.abs(frames[:, 16, 16, 0] - expected).max() <= 6


def test_a_frame_without_a_time_and_times_that_stand_still_are_refused() -> None:
    for time in (None, 1.0, 0.5):
        with pytest.raises(ValueError, match="frame 3 has no time"):
            media_video._time_of(SimpleNamespace(time=time), 3, [0.0, 1.0])
    assert media_video._time_of(SimpleNamespace(time=1.5), 3, [0.0, 1.0]) == 1.5


# streams -------------------------------------------------------------------------------------------------------


def both(video: bool, audio: bool, cover: bool = False) -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as file:
        streams: list[Any] = []
        if video:
            stream: Any = file.add_stream("mjpeg" if cover else "mpeg4", rate=4)
            stream.width = stream.height = 32
            stream.pix_fmt = "yuvj420p" if cover else "yuv420p"
            if cover:
                stream.disposition = av.stream.Disposition.attached_pic
            streams.append(stream)
        if audio:
            sound: Any = file.add_stream("aac", rate=16_000)
            sound.layout = "mono"
            streams.append(sound)
        for stream in streams:
            if stream.type == "video":
                for pixels in clip(1, 1 if cover else 4):
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            else:
                for k in range(8):
                    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                    frame.sample_rate, frame.pts, frame.time_base = 16_000, 1024 * k, Fraction(1, 16_000)
                    file.mux(stream.encode(frame))
            file.mux(stream.encode())
    return sink.getvalue()


def test_video_with_and_without_sound_and_sound_alone() -> None:
    silent, _ = decode_video(both(True, False), where=WHERE)
    loud, times = decode_video(both(True, True), where=WHERE)
    np.testing.assert_array_equal(silent, loud)
    assert times.tolist() == [0, 0.25, 0.5, 0.75]
    refused(both(False, True), "no video stream")


def test_a_cover_picture_is_no_video() -> None:
    data = both(True, True, cover=True)
    with av.open(io.BytesIO(data)) as file:
        assert file.streams.video[0].disposition & av.stream.Disposition.attached_pic
    refused(data, "no video stream")
