"""How well codecs give back held-out records: one dict of plain numbers per modality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import permutations
from math import ceil, log2
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ringweave.tokenizers import members as read
from ringweave.tokenizers.audio import resample
from ringweave.tokenizers.codec import pad_to, to_patches
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.members import Members
from ringweave.tokenizers.segment import Segment
from ringweave.tokenizers.set import TokenizerSet

U8 = NDArray[np.uint8]
Figures = dict[str, float | int]


def psnr(original: NDArray[Any], decoded: NDArray[Any]) -> float:
    """Peak signal to noise in dB over 8-bit values; 100 for equal arrays."""
    error = float(((original.astype(np.float64) - decoded.astype(np.float64)) ** 2).mean())
    return 100.0 if error == 0 else float(10 * np.log10(255.0**2 / error))


def si_sdr(original: NDArray[Any], decoded: NDArray[Any]) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al., 2019)."""
    wanted = original.astype(np.float64) - original.mean()
    found = decoded.astype(np.float64) - decoded.mean()
    target = wanted * ((found @ wanted) / max(float(wanted @ wanted), 1e-9))
    noise = found - target
    return float(10 * np.log10(max(float(target @ target), 1e-9) / max(float(noise @ noise), 1e-9)))


def ink_f1(original: U8, decoded: U8) -> float:
    """F1 of the pixels darker than mid-grey; 1 when both pages are blank."""
    a, b = original < 128, decoded < 128
    total = int(a.sum() + b.sum())
    return 1.0 if total == 0 else 2 * int((a & b).sum()) / total


def bit_splits(codes: int) -> list[tuple[int, ...]]:
    """All near-equal ways to spend the bits of one of `codes` ids on red, green and blue."""
    each, extra = divmod(ceil(log2(codes)), 3)
    return sorted(set(permutations([each + 1] * extra + [each] * (3 - extra))))


def rate_floor(image: U8, patch: int, bits: tuple[int, ...]) -> U8:
    """What the same rate buys without any learning: each patch's mean colour in `bits`, drawn bilinearly."""
    grid = to_patches(pad_to(image, patch), patch)
    means = grid.reshape(*grid.shape[:2], -1, 3).mean(2)
    steps = 2.0 ** np.array(bits)
    coded = (np.clip(np.floor(means * steps / 256), 0, steps - 1) + 0.5) * 256 / steps
    small = Image.fromarray(np.clip(np.rint(coded), 0, 255).astype(np.uint8))
    size = (grid.shape[1] * patch, grid.shape[0] * patch)
    drawn = np.asarray(small.resize(size, Image.Resampling.BILINEAR))
    return drawn[: image.shape[0], : image.shape[1]]


def composite(layers: Iterable[U8], background: NDArray[np.float64]) -> NDArray[np.float64]:
    """Straight-alpha layers, bottom first, over `background` [H, W, 3] (0..255)."""
    out = background
    for layer in layers:
        alpha = layer[..., 3:] / 255.0
        out = layer[..., :3] * alpha + out * (1 - alpha)
    return out


def checkerboard(height: int, width: int, *, cell: int = 8) -> NDArray[np.float64]:
    """Light and grey squares [H, W, 3]."""
    rows, columns = np.arange(height)[:, None] // cell, np.arange(width)[None] // cell
    return np.where((rows + columns) % 2, 204.0, 255.0)[..., None].repeat(3, axis=2)


def _image(tokenizers: TokenizerSet, members: Members, where: str) -> tuple[Segment, Figures]:
    image = read.image_of(members, where=where)
    segment = tokenizers.image_segment(image)
    decoded = tokenizers.decode(segment.ids)[0].value[: image.shape[0], : image.shape[1]]
    patch = tokenizers.codecs["image"].patch
    splits = bit_splits(tokenizers.codecs["image"].codes)
    floor = max(psnr(image, rate_floor(image, patch, bits)) for bits in splits)
    return segment, {"psnr": psnr(image, decoded), "floor_psnr": floor}


def _rgba(tokenizers: TokenizerSet, members: Members, where: str) -> tuple[Segment, Figures]:
    layers = read.layers_of(members, where=where)
    height, width = layers[0].shape[:2]
    segment = tokenizers.rgba_segment(layers)
    decoded = [layer[:height, :width] for layer in tokenizers.decode(segment.ids)[0].value]
    figures: Figures = {}
    grounds = {
        "black": np.zeros((height, width, 3)),
        "white": np.full((height, width, 3), 255.0),
        "checker": checkerboard(height, width),
    }
    for name, ground in grounds.items():
        figures[f"psnr_{name}"] = psnr(composite(layers, ground), composite(decoded, ground))
    errors = [np.abs(a[..., 3] - b[..., 3].astype(np.float64)).mean() / 255 for a, b in zip(layers, decoded)]
    figures["alpha_mae"] = float(np.mean(errors))
    return segment, figures


def _video(tokenizers: TokenizerSet, members: Members, where: str) -> tuple[Segment, Figures]:
    frames, times = read.video_of(members, where=where)
    segment = tokenizers.video_segment(frames, times)
    decoded = tokenizers.decode(segment.ids)[0].value
    cut = decoded[:, : frames.shape[1], : frames.shape[2]]
    lost = len(frames) - len(decoded)
    return segment, {"psnr": psnr(frames, cut) if not lost else 0.0, "frames_lost": lost}


def _audio(tokenizers: TokenizerSet, members: Members, where: str) -> tuple[Segment, Figures]:
    samples, rate = read.audio_of(members, where=where)
    segment = tokenizers.audio_segment(samples, rate)
    decoded, target = tokenizers.decode(segment.ids)[0].value
    original = resample(samples, rate, target)
    return segment, {"si_sdr": si_sdr(original, decoded[: len(original)])}


def _score(tokenizers: TokenizerSet, members: Members, where: str) -> tuple[Segment, Figures]:
    page = read.score_of(members, where=where)
    segment = tokenizers.score_segment(page)
    decoded = tokenizers.decode(segment.ids)[0].value[: page.shape[0], : page.shape[1]]
    return segment, {"ink_f1": ink_f1(page, decoded)}


def _text(tokenizers: TokenizerSet, members: Members, where: str) -> tuple[Segment, Figures]:
    text = read.text_of(members, where=where)
    segment = tokenizers.text_segment(text)
    decoded = tokenizers.decode(segment.ids)
    back = decoded[0].value if decoded else ""
    return segment, {"lossy_documents": int(back != text), "bytes": len(text.encode("utf-8"))}


_MEASURES: dict[str, tuple[str, Callable[..., tuple[Segment, Figures]]]] = {
    "text": ("text", _text),
    "image": ("image", _image),
    "rgba": ("rgba", _rgba),
    "video": ("image", _video),
    "audio": ("audio", _audio),
    "score": ("score", _score),
}
_SUMS = {"lossy_documents", "frames_lost", "bytes"}


def measure(
    tokenizers: TokenizerSet, samples: Mapping[str, Iterable[Members]], *, limit: int = 200
) -> dict[str, Any]:
    """{modality: figures} over at most `limit` held-out records of each source.

    psnr, floor_psnr (see `rate_floor`), si_sdr in dB; alpha_mae of 0..1; tokens_per_record; codes_used, the
    share of a modality's ids that occurred; everything else counts. Damaged records are counted as skipped.
    """
    out: dict[str, Any] = {}
    for source, (codec, function) in _MEASURES.items():
        if source not in samples or codec not in tokenizers.codecs:
            continue
        rows: list[Figures] = []
        lengths: list[int] = []
        used: set[int] = set()
        skipped = 0
        for number, members in enumerate(samples[source]):
            if number >= limit:
                break
            try:
                segment, figures = function(tokenizers, members, f"{source} record {number}")
            except DataError:
                skipped += 1
                continue
            rows.append(figures)
            lengths.append(len(segment))
            used.update(np.unique(segment.ids).tolist())
        out[source] = _summary(tokenizers, codec, rows, lengths, used) | {"skipped": skipped}
    return out


def _summary(
    tokenizers: TokenizerSet, codec: str, rows: list[Figures], lengths: list[int], used: set[int]
) -> dict[str, float | int]:
    figures: dict[str, float | int] = {"records": len(rows)}
    if not rows:
        return figures
    for name in rows[0]:
        values = [row[name] for row in rows]
        figures[name] = int(sum(values)) if name in _SUMS else round(float(np.mean(values)), 4)
    figures["tokens_per_record"] = round(float(np.mean(lengths)), 1)
    figures["tokens_max"] = max(lengths)
    if "bytes" in figures:
        figures["bytes_per_token"] = round(figures.pop("bytes") / max(1, sum(lengths)), 3)
    blocks = [block for block in tokenizers.manifest.blocks if block.codec == codec]
    ids = sum(block.size for block in blocks)
    hit = sum(1 for i in used for block in blocks if block.start <= i < block.stop)
    figures["codes_used"] = round(hit / ids, 4)
    return figures
