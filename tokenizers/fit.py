"""Fit all codecs to training records, in closed form and in seconds; and measure them on held-out ones."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringweave.tokenizers import members as read
from ringweave.tokenizers.audio import AudioCodec, resample
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.image import ImageCodec
from ringweave.tokenizers.measure import measure
from ringweave.tokenizers.members import Members
from ringweave.tokenizers.rgba import RgbaCodec
from ringweave.tokenizers.score import ScoreCodec
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.symbols import MidiCodec, SymbolicCodec
from ringweave.tokenizers.text import ModelType, TextCodec
from ringweave.tokenizers.video import VideoCodec

__all__ = ["FitSizes", "fit_tokenizers", "measure"]

Samples = Mapping[str, Iterable[Members]]
#: Codecs that `learn_run.learn_codecs` can train, beyond their closed form; latents have none and are trained only.
LEARNABLE = ("image", "rgba", "audio", "score", "latents")


@dataclass(frozen=True)
class FitSizes:
    """How large the codecs become. The defaults give about 7,400 ids and fit a corpus of a few thousand
    records; `max_records` of a source are looked at (text: `max_characters`)."""

    text_pieces: int = 2048
    text_model: ModelType = "bpe"
    image_codes: int = 1024
    image_patch: int = 8
    rgba_alpha_books: int = 2
    rgba_alpha_codes: int = 256
    rgba_colour_codes: int = 512
    audio_rate: int = 16_000
    audio_hop: int = 640
    audio_bins: int = 160
    audio_books: int = 8
    audio_codes: int = 256
    audio_order: str = "frame-major"
    score_patch: int = 8
    score_books: int = 1
    score_codes: int = 1024
    midi_velocity_bins: int = 32
    latents_patch: int = 8  # pixels of a cell each way; 4, 8, 16, 32 or 64
    latents_channels: int = 8  # of the autoencoder: a cell has four times as many
    latents_base: int = 24  # its width
    video: bool = False  # later frames as what moved, where there is an image codec
    video_key_every: int = 0  # at most so many frames from one whole picture to the next; 0: no limit
    max_records: int = 2000
    max_characters: int = 4_000_000


class RecordReader:
    """Reads records of the sources, passing over (and counting) those that cannot be decoded."""

    def __init__(self, samples: Samples, limit: int) -> None:
        self._samples, self._limit = samples, limit
        self.skipped: dict[str, int] = {}

    def __call__(self, source: str, convert: Callable[..., Any]) -> Iterator[Any]:
        for number, members in enumerate(itertools.islice(self._samples.get(source, ()), self._limit)):
            try:
                yield convert(members, where=f"{source} record {number}")
            except DataError:
                self.skipped[source] = self.skipped.get(source, 0) + 1


def fit_tokenizers(
    samples: Samples,
    out_dir: Path,
    *,
    seed: int = 0,
    sizes: FitSizes | None = None,
    progress: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Fit a codec for each source that `samples` has, and save the set into `out_dir`.

    samples: source name ("text", "image", "rgba", "score", "audio", "video", "symbolic", "midi") -> its training
    records, which are gone through more than once. Text is fitted to captions too, images to video frames too. Returns
    {"seconds": {codec: s}, "vocabulary": ids, "hash": manifest hash, "skipped": {source: n}}. DataError when
    there is nothing to fit.
    """
    sizes = sizes or FitSizes()
    say = progress or (lambda _message: None)
    reader = RecordReader(samples, sizes.max_records)
    makers: dict[str, Callable[[], Any]] = {
        "text": lambda: _fit_text(reader, samples, sizes),
        "image": lambda: _fit_image(reader, sizes, seed),
        "rgba": lambda: _fit_rgba(reader, sizes, seed),
        "audio": lambda: _fit_audio(reader, sizes, seed),
        "score": lambda: _fit_score(reader, sizes, seed),
        "symbolic": lambda: SymbolicCodec() if "symbolic" in samples else None,
        "midi": lambda: MidiCodec(velocity_bins=sizes.midi_velocity_bins) if "midi" in samples else None,
        "video": lambda: _video_codec(sizes) if "image" in codecs else None,
    }
    codecs, seconds = {}, {}
    for name, make in makers.items():
        say(f"fitting the {name} tokenizer")
        started = time.perf_counter()
        codec = make()
        if codec is not None:
            codecs[name] = codec
            seconds[name] = round(time.perf_counter() - started, 2)
    if not codecs:
        raise DataError(
            "no records to fit tokenizers to",
            why=f"sources given: {', '.join(samples) or 'none'}; records skipped: {reader.skipped or 0}",
            fix="name sources text, image, rgba, score, audio, video, symbolic or midi",
        )
    tokenizers = TokenizerSet(codecs, audio_order=sizes.audio_order)
    tokenizers.save(Path(out_dir))
    return {
        "seconds": seconds,
        "vocabulary": tokenizers.manifest.size,
        "hash": tokenizers.manifest.hash,
        "skipped": reader.skipped,
    }


def _fit_text(reader: RecordReader, samples: Samples, sizes: FitSizes) -> TextCodec | None:
    texts, room = [], sizes.max_characters
    for source in [name for name in ("image", "rgba", "video", "text") if name in samples]:
        for text in reader(source, _optional_text):
            if text and room > 0:
                texts.append(text[:room])
                room -= len(texts[-1])
    return TextCodec.fit(texts, size=sizes.text_pieces, model_type=sizes.text_model) if texts else None


def _optional_text(members: Members, *, where: str) -> str:
    return read.text_of(members, where=where) if "txt" in members else ""


def training_images(reader: RecordReader) -> list[Any]:
    """Pictures uint8 [H, W, 3], and two frames of each video."""
    images = list(reader("image", read.image_of))
    for frames, _ in reader("video", read.video_of):
        images += [frames[0], frames[len(frames) // 2]]
    return images


def training_layers(reader: RecordReader) -> list[Any]:
    """Layers uint8 [H, W, 4] of all records."""
    return [layer for record in reader("rgba", read.layers_of) for layer in record]


def training_latents(reader: RecordReader, sources: Iterable[str]) -> tuple[list[Any], list[Any]]:
    """(layers, opaque pictures), uint8 [H, W, 4] each, of what latents read of the records of these sources."""

    def convert(members: Members, *, where: str) -> tuple[bool, list[Any]]:
        return read.has_layers(members), read.latent_pictures_of(members, where=where)

    layers: list[Any] = []
    pictures: list[Any] = []
    for source in sources:
        for layered, found in reader(source, convert):
            (layers if layered else pictures).extend(found)
    return layers, pictures


def _fit_image(reader: RecordReader, sizes: FitSizes, seed: int) -> ImageCodec | None:
    images = training_images(reader)
    if not images:
        return None
    return ImageCodec.fit(images, codes=sizes.image_codes, patch=sizes.image_patch, seed=seed)


def _fit_rgba(reader: RecordReader, sizes: FitSizes, seed: int) -> RgbaCodec | None:
    layers = training_layers(reader)
    if not layers:
        return None
    return RgbaCodec.fit(
        layers,
        books=sizes.rgba_alpha_books,
        alpha_codes=sizes.rgba_alpha_codes,
        colour_codes=sizes.rgba_colour_codes,
        patch=sizes.image_patch,
        seed=seed,
    )


def _fit_audio(reader: RecordReader, sizes: FitSizes, seed: int) -> AudioCodec | None:
    clips = [resample(clip, rate, sizes.audio_rate) for clip, rate in reader("audio", read.audio_of)]
    if not clips:
        return None
    return AudioCodec.fit(
        clips,
        rate=sizes.audio_rate,
        hop=sizes.audio_hop,
        bins=sizes.audio_bins,
        books=sizes.audio_books,
        codes=sizes.audio_codes,
        seed=seed,
    )


def _video_codec(sizes: FitSizes) -> VideoCodec | None:
    return VideoCodec(config={"key_every": sizes.video_key_every}) if sizes.video else None


def _fit_score(reader: RecordReader, sizes: FitSizes, seed: int) -> ScoreCodec | None:
    pages = list(reader("score", read.score_of))
    if not pages:
        return None
    return ScoreCodec.fit(
        pages, books=sizes.score_books, codes=sizes.score_codes, patch=sizes.score_patch, seed=seed
    )
