"""The learned sound codec at 1.6 and 4 kbit/s: SI-SDR on chorales it never heard, and on speech where there is some.

Chorales as `ringweave demo` plays them, split by piece; `--data DIR` takes the audio shards of a folder instead of
playing them again. Speech is not in any package that ringweave installs: `--speech DIR` takes a folder of WAV files
(the eight prompts that Debian's alsa-utils puts into /usr/share/sounds/alsa, or others), learns from all but every
fourth and measures those; without it, speech is said to be not measured. `--tiny` takes few clips and writes no row.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from _codec_checks import SECONDS, flips_that_pass, learned, threads_differ
from _harness import Proof, arguments, prove_with

from ringweave.tokenizers import members as read
from ringweave.tokenizers.audio import resample
from ringweave.tokenizers.conv_codecs import ConvAudioCodec
from ringweave.tokenizers.learn_start import NetSizes, audio_start
from ringweave.tokenizers.measure import si_sdr

Clips = list[np.ndarray]
RATE = 16_000
#: kbit/s -> hop, bins, books of 256, least dB on chorales; the same on speech (a shorter hop: it changes faster).
MUSIC = {1.6: (640, 160, 8, 5.0), 4.0: (640, 240, 20, 9.0)}
SPEECH = {1.6: (320, 160, 4, 3.0), 4.0: (128, 128, 4, 8.0)}


def chorales(data: Path | None, limit: int | None) -> tuple[Clips, Clips]:
    """Clips int16 at RATE to train on and held out."""
    if data is not None:
        from ringweave.launch.data_records import records_by_source

        sides = [list(records_by_source(data, split)["audio"]) for split in ("train", "heldout")]
        train, heldout = sides[0][:limit], sides[1][: limit and max(2, limit // 4)]
    else:
        from ringweave.data_pipes.demo import music

        records = [record for job in music.plan(limit) for record in music.render(job)]
        sounds = [record for record in records if record.source == music.AUDIO]
        train = [r.members for r in sounds if not r.heldout]
        heldout = [r.members for r in sounds if r.heldout]
    first, second = (
        [resample(*read.audio_of(m, where="a clip"), RATE) for m in side] for side in (train, heldout)
    )
    return first, second


def speech(folder: Path | None) -> tuple[Clips, Clips]:
    """Clips of a folder of WAV files, every fourth held out; nothing without a folder."""
    files = sorted(folder.rglob("*.wav")) if folder is not None else []
    clips = [resample(*read.audio_of({"wav": f.read_bytes()}, where=f.name), RATE) for f in files]
    return [c for n, c in enumerate(clips) if n % 4], clips[::4]


def quality(codec: ConvAudioCodec, unseen: Clips) -> float:
    """Mean SI-SDR over clips in dB."""
    return round(float(np.mean([si_sdr(c, codec.decode(codec.encode(c))[: len(c)]) for c in unseen])), 2)


def ids_by_chunk(codec: ConvAudioCodec, unseen: Clips) -> int:
    """Ids that differ when a clip comes in pieces, and when it stands after others in one stream's memory."""
    differ = 0
    for number, clip in enumerate(unseen):
        whole = codec.encode(clip)
        stream, size = codec.stream(), (1, 639, 640, 4096, 10_007)[number % 5]
        if size == 1:
            clip = clip[:4000]
            whole = codec.encode(clip)
        parts = [stream.push(clip[k : k + size]) for k in range(0, len(clip), size)]
        differ += int((np.concatenate([*parts, stream.flush()]) != whole).sum())
    cells = [
        codec.cells(np.lib.stride_tricks.sliding_window_view(c, 2 * codec.hop)[:: codec.hop]) for c in unseen
    ]
    stack = np.stack([c[: min(map(len, cells))] for c in cells])[:, None]
    every = codec.core.encode(stack)
    for size in (1, 3, 8):
        batches = [codec.core.encode(stack[k : k + size]) for k in range(0, len(stack), size)]
        differ += int((np.concatenate(batches) != every).sum())
    return differ


def prove_rate(
    proof: Proof, name: str, sides: tuple[Clips, Clips], rate: float, options: argparse.Namespace
) -> None:
    """Learns a codec of one rate, measures it and holds it to its bar."""
    hop, bins, books, bar = (MUSIC if name == "chorales" else SPEECH)[rate]
    net = NetSizes(16, 1, 1) if options.tiny else NetSizes()
    codes = 16 if options.tiny else 256
    closed, codec, seconds = learned(
        lambda: audio_start(
            sides[0], rate=RATE, hop=hop, bins=bins, books=books, codes=codes, net=net, crop=64
        ),
        steps=options.steps,
    )
    title, found = f"{name}_{rate}_kbps".replace(".", "_"), quality(codec, sides[1])
    proof.found(**{f"{title}_dB": found, f"{title}_at_start": quality(closed, sides[1])})
    proof.found(**{f"{title}_core_seconds": seconds})
    differ, threads = ids_by_chunk(codec, sides[1]), threads_differ(codec, "audio", sides[1])
    passed = flips_that_pass(codec, "audio", flips=4 if options.tiny else 50)
    quiet = codec.decode(codec.encode(np.zeros(20_000, np.int16)))
    proof.found(**{f"{title}_ids_by_chunk": differ, f"{title}_ids_by_threads": int(threads)})
    proof.found(**{f"{title}_flips_not_found": passed})
    proof.holds(not quiet.any(), f"{title}: silence does not come back as silence")
    proof.holds(differ == 0, f"{title}: {differ} ids change with chunks or batches")
    proof.holds(not threads, f"{title}: ids change with the threads")
    proof.holds(passed == 0, f"{title}: {passed} flipped weights load, or fail without the codec's name")
    if not options.tiny:
        proof.holds(found >= bar, f"{title}: {found} dB, {bar} wanted")
        proof.holds(seconds <= SECONDS, f"{title}: training took {seconds} s of one core, {SECONDS} allowed")


def main() -> None:
    parser = arguments(__doc__, tiny="few clips and steps")
    parser.add_argument("--data", type=Path, help="folder with audio-train-*.tar and audio-heldout-*.tar")
    parser.add_argument("--speech", type=Path, help="folder with WAV files of speech")
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    if options.tiny:
        options.steps = 3
    claim = (
        "chorales at 1.6 kbit/s ≥ 5 dB and at 4 kbit/s ≥ 9 dB SI-SDR held out (speech ≥ 3 and 8 dB where given); "
        "silence stays; ids the same in any chunk, batch and thread; a flipped weight is found"
    )
    with prove_with(options, "codec_audio", claim) as proof:
        heard = chorales(options.data, 16 if options.tiny else None)
        spoken = speech(options.speech)
        proof.found(clips=len(heard[0]), held_out=len(heard[1]), steps=options.steps)
        proof.found(speech=f"{len(spoken[0])} and {len(spoken[1])} clips" if spoken[1] else "not measured")
        for rate in MUSIC:
            prove_rate(proof, "chorales", heard, rate, options)
            if spoken[0] and spoken[1]:
                prove_rate(proof, "speech", spoken, rate, options)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
