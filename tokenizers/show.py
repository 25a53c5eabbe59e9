"""Held-out originals beside what comes back from their ids: PNG sheets, WAV pairs and a text file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from ringweave.tokenizers import members as read
from ringweave.tokenizers.audio import resample
from ringweave.tokenizers.codec import to_uint8
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.measure import checkerboard, composite, ink_f1, psnr, psnr_nine, si_sdr
from ringweave.tokenizers.members import Members
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.sheet import Group, draw_sheet, spectrogram

U8 = NDArray[np.uint8]
Samples = Mapping[str, Iterable[Members]]


def spread(records: Iterable[Members], count: int, convert: Callable[..., Any]) -> list[Any]:
    """`count` decodable records, evenly spread over the first 400."""
    found = []
    for number, members in enumerate(itertools.islice(records, 400)):
        try:
            found.append(convert(members, where=f"record {number}"))
        except DataError:
            continue
    places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[i] for i in places]


def _images(tokenizers: TokenizerSet, records: Iterable[Members], out: Path) -> list[Path]:
    groups = []
    for image in spread(records, 12, read.image_of):
        segment = tokenizers.image_segment(image)
        decoded = tokenizers.decode(segment.ids)[0].value[: image.shape[0], : image.shape[1]]
        caption = f"{psnr(image, decoded):.1f} dB · {len(segment)} ids"
        groups.append(Group(caption, [("original", [image]), ("decoded", [decoded])]))
    note = "Held-out pictures: original above, decoded from its ids below."
    return [draw_sheet(out / "image.png", "Image", note, groups, zoom=2, columns=4)]


def _rgba(tokenizers: TokenizerSet, records: Iterable[Members], out: Path) -> list[Path]:
    groups = []
    for layers in spread(records, 6, read.layers_of):
        height, width = layers[0].shape[:2]
        segment = tokenizers.rgba_segment(layers)
        decoded = [layer[:height, :width] for layer in tokenizers.decode(segment.ids)[0].value]
        ground = checkerboard(height, width)
        flat = [to_uint8(composite(part, ground)) for part in (layers, decoded)]
        rows = []
        for label, whole, parts in (("original", flat[0], layers), ("decoded", flat[1], decoded)):
            rows.append((label, [whole, *[to_uint8(composite([layer], ground)) for layer in parts[:4]]]))
        caption = f"{psnr(flat[0], flat[1]):.1f} dB over checker · {len(segment)} ids · {len(layers)} layers"
        groups.append(Group(caption, rows))
    note = "Held-out drawings: the composite over a checkerboard, then each layer, bottom first."
    return [draw_sheet(out / "rgba.png", "RGBA layers", note, groups, zoom=2, columns=2)]


def _latents(tokenizers: TokenizerSet, records: Iterable[Members], out: Path) -> list[Path]:
    groups = []
    for layers in spread(records, 6, read.latent_pictures_of):
        height, width = layers[0].shape[:2]
        cells = [tokenizers.encode_layer(layer) for layer in layers]
        decoded = [tokenizers.decode_layer(some)[:height, :width] for some in cells]
        ground = checkerboard(height, width)
        rows = []
        for label, parts in (("original", layers), ("decoded", decoded)):
            rows.append((label, [to_uint8(composite([layer], ground)) for layer in parts[:4]]))
        nine = np.mean([psnr_nine(*pair) for pair in zip(layers, decoded)])
        caption = f"{nine:.1f} dB over nine grounds · {sum(some[..., 0].size for some in cells)} cells"
        groups.append(Group(caption, rows))
    note = "Held-out layers over a checkerboard, bottom first: original above, through the autoencoder below."
    return [draw_sheet(out / "latents.png", "Continuous latents", note, groups, zoom=2, columns=2)]


def _video(tokenizers: TokenizerSet, records: Iterable[Members], out: Path) -> list[Path]:
    groups = []
    for frames, times in spread(records, 3, read.video_of):
        segment = tokenizers.video_segment(frames, times)
        decoded = tokenizers.decode(segment.ids)[0].value[:, : frames.shape[1], : frames.shape[2]]
        caption = f"{psnr(frames, decoded):.1f} dB · {len(segment)} ids · {len(frames)} frames"
        rows = [("original", list(frames[:10])), ("decoded", list(decoded[:10]))]
        groups.append(Group(caption, rows))
    note = "Held-out clips, frame by frame: original above, decoded below."
    return [draw_sheet(out / "video.png", "Video", note, groups, zoom=2)]


def _score(tokenizers: TokenizerSet, records: Iterable[Members], out: Path) -> list[Path]:
    groups = []
    for page in spread(records, 3, read.score_of):
        segment = tokenizers.score_segment(page)
        decoded = tokenizers.decode(segment.ids)[0].value[: page.shape[0], : page.shape[1]]
        caption = f"ink F1 {ink_f1(page, decoded):.3f} · {len(segment)} ids"
        groups.append(Group(caption, [("original", [page]), ("decoded", [decoded])]))
    note = "Held-out systems of engraved scores: original above, decoded below."
    return [draw_sheet(out / "score.png", "Score", note, groups, zoom=2)]


def _audio(tokenizers: TokenizerSet, records: Iterable[Members], out: Path) -> list[Path]:
    groups, paths = [], []
    for number, (samples, rate) in enumerate(spread(records, 3, read.audio_of)):
        segment = tokenizers.audio_segment(samples, rate)
        decoded, target = tokenizers.decode(segment.ids)[0].value
        original = resample(samples, rate, target)
        decoded = decoded[: len(original)]
        seconds = len(original) / target
        caption = f"SI-SDR {si_sdr(original, decoded):.1f} dB · {len(segment)} ids for {seconds:.1f} s"
        rows = [("original", [spectrogram(original)]), ("decoded", [spectrogram(decoded)])]
        groups.append(Group(caption, rows))
        if number == 0:
            for label, sound in (("original", original), ("decoded", decoded)):
                paths.append(out / f"audio-{label}.wav")
                soundfile.write(paths[-1], sound, target)
    note = "Held-out clips as log spectrograms, 0 to 4 kHz upwards; the first one also as WAV files."
    if tokenizers.codecs["audio"].rate != 16_000:
        note = "Held-out clips as log spectrograms, up to a quarter of the sample rate."
    return [draw_sheet(out / "audio.png", "Audio", note, groups), *paths]


def _text(tokenizers: TokenizerSet, records: Iterable[Members], out: Path) -> list[Path]:
    parts = []
    for text in spread(records, 3, read.text_of):
        ids = tokenizers.text_segment(text).ids
        items = tokenizers.decode(ids)
        back = items[0].value if items else ""
        verdict = "identical" if back == text else "DIFFERENT"
        head = back if len(back) <= 600 else back[:600].rstrip() + " …"
        parts.append(f"[{verdict} after decoding: {len(text)} characters, {len(ids)} ids]\n{head}\n")
    path = out / "text.txt"
    path.write_text("\n".join(parts), encoding="utf-8")
    return [path]


_SHOWS: dict[str, tuple[str, Callable[[TokenizerSet, Iterable[Members], Path], list[Path]]]] = {
    "text": ("text", _text),
    "image": ("image", _images),
    "rgba": ("rgba", _rgba),
    "video": ("image", _video),
    "audio": ("audio", _audio),
    "score": ("score", _score),
    "latents": ("latents", _latents),
}


def show(tokenizers: TokenizerSet, samples: Samples, out_dir: Path) -> list[Path]:
    """Write `<modality>.png` (text: .txt; audio: also a pair of WAV files) into `out_dir`; their paths.

    samples: source name -> held-out records; "latents": of layers or pictures. Sources without a codec, or without a
    readable record, are left out.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for source, (codec, draw) in _SHOWS.items():
        if codec not in tokenizers.codecs or source not in samples:
            continue
        if any(True for _ in itertools.islice(samples[source], 1)):
            paths += draw(tokenizers, samples[source], out)
    return paths
