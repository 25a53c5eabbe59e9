"""The video codec on held-out pictures and clips, beside the image codec on each frame.

Codecs are fitted to the demo's training pictures, clips and some of its music, without five of the photographs. Still
clips (clean, and with noise) and panning clips (whole and broken pixels a frame) are cut out of those five; the real
clips are the demo's held-out ones. Each is also encoded in pieces, and each frame's error is compared. Then: T = 1 to
40 frames of each kind; the memory of a stream of 2,000 frames; flashes at odd times of a variable-rate clip against
clicks in the sound. `--tiny` takes few of each and writes no row.
"""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from _harness import Proof, arguments, prove_with
from numpy.typing import NDArray
from PIL import Image

from ringweave.data_pipes.demo import clips, images, music
from ringweave.data_pipes.demo.common import Job, package_folder
from ringweave.tokenizers.fit import FitSizes, fit_tokenizers
from ringweave.tokenizers.manifest import CONTROL
from ringweave.tokenizers.measure import psnr
from ringweave.tokenizers.members import video_of
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.video import VideoCodec

U8 = NDArray[np.uint8]
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "ihc.png")
#: Pixels a frame, down and right.
STEPS = ((0, 1), (1, 0), (1, 2), (-2, 3), (4, 4), (0, 0.5), (0.3, -0.7), (1.5, 2.25))
SIZE, FRAMES = 64, 16
#: Clicks and flashes may stand so far apart in token time, s.
APART = 0.020


def fitted(folder: Path, *, tiny: bool) -> TokenizerSet:
    """A set with image, audio and video codecs, fitted to training records of the demo."""

    def wanted(job: Job) -> bool:
        return not job.heldout and not (job.args[0] == "photo" and job.args[1] in PHOTOS)

    limit = 60 if tiny else None
    plans = {
        "image": (images, [job for job in images.plan(limit) if wanted(job)]),
        "video": (clips, [job for job in clips.plan(limit) if not job.heldout]),
        "audio": (music, [job for job in music.plan(12 if tiny else 60) if not job.heldout]),
    }
    samples = {
        source: [r.members for job in jobs for r in module.render(job) if r.source == source]
        for source, (module, jobs) in plans.items()
    }
    sizes = FitSizes(video=True, image_codes=128 if tiny else 1024, text_pieces=300 if tiny else 2048)
    fit_tokenizers(samples, folder, sizes=sizes)
    return TokenizerSet.load(folder)


def photo(name: str) -> Image.Image:
    """One of the held-out photographs, short side 320."""
    with Image.open(package_folder("skimage", images.PHOTO_DISTRIBUTION) / "data" / name) as stored:
        image = stored.convert("RGB")
    scale = 320 / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def panned(image: Image.Image, step: tuple[float, float], side: int) -> U8:
    """A window of `side` pixels, seen at SIZE, that slides by `step` seen pixels a frame through the middle."""
    scale = side / SIZE
    shown = []
    for k in range(FRAMES):
        top = image.height / 2 - side / 2 + (k - FRAMES / 2) * step[0] * scale
        left = image.width / 2 - side / 2 + (k - FRAMES / 2) * step[1] * scale
        box = (left, top, left + side, top + side)
        shown.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)))
    return np.stack(shown)


def made_clips(kind: str, *, tiny: bool) -> Iterator[U8]:
    """The clips of a kind."""
    rng = np.random.default_rng(6)
    if kind == "real":
        jobs = [job for job in clips.plan() if job.heldout]
        records = [record for job in jobs for record in clips.render(job)]
        for record in records[: 2 if tiny else None]:
            yield video_of(record.members, where=record.key)[0]
        return
    for name in PHOTOS[: 1 if tiny else None]:
        for side in (96, 128):
            for step in STEPS[:: 4 if tiny else 1] if kind == "panning" else [(0, 0)]:
                clip = panned(photo(name), step, side)
                if kind == "noisy":
                    clip = np.clip(clip + np.rint(rng.normal(0, 2, clip.shape)), 0, 255).astype(np.uint8)
                yield clip


def compare(kind: str, tokenizers: TokenizerSet, proof: Proof, *, tiny: bool) -> U8:
    """Ids and PSNR of all clips of a kind beside frame-wise coding; returns one of them."""
    codec: VideoCodec = tokenizers.codecs["video"]
    alone = TokenizerSet({"image": tokenizers.codecs["image"]})
    ids = plain = worse = changed = 0
    ours, theirs, ratios = [], [], []
    for clip in made_clips(kind, tiny=tiny):
        times = np.arange(len(clip)) / 8
        segment, framewise = tokenizers.video_segment(clip, times), alone.video_segment(clip, times)
        shown, base = tokenizers.decode(segment.ids)[0], alone.decode(framewise.ids)[0].value
        proof.holds(shown.complete, f"{kind}: a clip does not come back whole")
        first = tokenizers.image_segment(clip[0]).ids[1:-1]
        proof.holds(np.array_equal(segment.ids[1 : 1 + len(first)], first), f"{kind}: frame 0 is no image")
        errors = [((clip - value.astype(np.int64)) ** 2).sum((1, 2, 3)) for value in (shown.value, base)]
        worse += int((errors[0] > errors[1]).sum())
        stream = codec.stream()
        pieces = [stream.push(part) for part in np.split(clip, [1, 3, 4, 9])]
        whole = codec.encode(clip)
        changed += sum(
            a.move != b.move or not np.array_equal(a.codes, b.codes)
            for a, b in zip((f for piece in pieces for f in piece), whole, strict=True)
        )
        ids, plain = ids + len(segment), plain + len(framewise)
        ratios.append(len(segment) / len(framewise))
        ours.append(psnr(clip, shown.value))
        theirs.append(psnr(clip, base))
    proof.found(
        **{
            f"{kind}_clips": len(ratios),
            f"{kind}_ids": round(ids / plain, 3),
            f"{kind}_ids_worst": round(max(ratios), 3),
            f"{kind}_psnr": round(float(np.mean(ours)), 2),
            f"{kind}_framewise": round(float(np.mean(theirs)), 2),
        }
    )
    proof.holds(worse == 0, f"{kind}: {worse} frames have more error than alone")
    proof.holds(changed == 0, f"{kind}: {changed} frames differ when encoded in pieces")
    proof.holds(all(a >= b for a, b in zip(ours, theirs)), f"{kind}: a clip is worse than frame by frame")
    if kind != "real":
        proof.holds(max(ratios) <= 0.5, f"{kind}: a clip takes {max(ratios):.3f} of the ids")
    return clip


def every_length(kinds: dict[str, U8], tokenizers: TokenizerSet, proof: Proof) -> None:
    """T = 1 to 40 frames of each kind, at times of no fixed rate: as many come back."""
    lost = 0
    times = np.cumsum(np.random.default_rng(0).uniform(0.04, 1, 40))
    for clip in kinds.values():
        frames = np.concatenate([clip, clip[::-1]] * 3)[:40, :37, :50]  # no whole patches
        for count in range(1, 41):
            segment = tokenizers.video_segment(frames[:count], times[:count])
            (item,) = tokenizers.decode(segment.ids)
            lost += item.value.shape != (count, 40, 56, 3) or not item.complete
    proof.found(lengths_lost=lost)
    proof.holds(lost == 0, f"{lost} of {40 * len(kinds)} clips of 1 to 40 frames do not come back")


def memory(clip: U8, tokenizers: TokenizerSet, proof: Proof, *, frames: int) -> None:
    """Peak memory of a stream after a tenth of the frames and after all of them."""
    stream = tokenizers.codecs["video"].stream()
    tracemalloc.start()
    for number in range(frames):
        stream.push(clip[number % len(clip)][None].copy())
        if number + 1 == frames // 10:
            early = tracemalloc.get_traced_memory()[1]
    late = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    proof.found(stream_frames=frames, peak_kb_at_a_tenth=early // 1024, peak_kb_at_the_end=late // 1024)
    proof.holds(late < 1.2 * early, f"a stream grows from {early} to {late} bytes")


def flashes(picture: U8, tokenizers: TokenizerSet, proof: Proof, *, count: int) -> None:
    """Flashes and clicks at the same odd moments, found again in what the ids decode to, by the ids' positions."""
    rng = np.random.default_rng(7)
    times = np.cumsum(rng.uniform(0.03, 0.3, 12 * count))
    times -= times[0]
    lit = np.sort(rng.choice(np.arange(2, len(times) - 2, 4), count, replace=False))
    frames = np.repeat((picture // 2)[None], len(times), 0)
    frames[lit] = 255 - frames[lit] // 4
    sound = np.rint(rng.normal(0, 20, int(16_000 * (times[-1] + 1)))).astype(np.int16)
    for moment in times[lit]:
        at = round(16_000 * moment)
        sound[at : at + 8] = 30_000
    video, audio = tokenizers.video_segment(frames, times), tokenizers.audio_segment(sound, 16_000)
    shown = tokenizers.decode(video.ids)[0].value.mean((1, 2, 3))
    found = np.flatnonzero(shown > (shown.min() + shown.max()) / 2)
    begins = np.flatnonzero(np.append(True, video.ids[:-1] == CONTROL["eof"])) + np.append(
        1, [0] * (len(times) - 1)
    )
    seen = video.positions[begins[found], 0] * 0.04
    codec = tokenizers.codecs["audio"]
    codes = codec.encode(sound)
    energy = (codec.quantizer.decode(codes) ** 2).sum(1)
    heard = audio.positions[1 + codec.books * np.flatnonzero(energy > energy.max() / 20), 0] * 0.04
    apart = np.abs(seen[:, None] - heard[None]).min(1).max()
    stray = np.abs(seen[:, None] - heard[None]).min(0).max()
    off = np.abs(seen - times[lit]).max() if len(seen) == count else np.inf
    proof.found(
        flashes=count, flash_to_click_ms=round(1000 * apart, 2), flash_to_true_time_ms=round(1000 * off, 2)
    )
    proof.holds(np.array_equal(found, lit), "the flashes do not come back")
    proof.holds(
        apart <= APART + 1e-9, f"a flash is {1000 * apart:.1f} ms from the nearest click in token time"
    )
    proof.holds(off <= APART + 1e-9, f"a flash stands {1000 * off:.1f} ms off its time")
    proof.holds(stray <= 2 * APART + 1e-9, f"a click {1000 * stray:.1f} ms from any flash")


def main() -> None:
    parser = arguments(__doc__, tiny="few clips")
    options = parser.parse_args()
    claim = (
        "video: no frame worse than frame-wise, ≤ half the ids on still and panning clips, any T, true times"
    )
    with prove_with(options, "codec_video", claim) as proof, tempfile.TemporaryDirectory() as folder:
        tokenizers = fitted(Path(folder) / "set", tiny=options.tiny)
        kinds = {
            kind: compare(kind, tokenizers, proof, tiny=options.tiny)
            for kind in ("still", "noisy", "panning", "real")
        }
        every_length(kinds, tokenizers, proof)
        memory(kinds["panning"], tokenizers, proof, frames=200 if options.tiny else 2000)
        flashes(kinds["still"][0], tokenizers, proof, count=4 if options.tiny else 25)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
