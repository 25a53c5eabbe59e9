"""How well codecs give back held-out records, at what rate and speed: one dict of plain numbers per modality."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, permutations
from math import ceil, log2
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ringweave.tokenizers import members as read
from ringweave.tokenizers.audio import resample
from ringweave.tokenizers.codec import pad_to, to_patches, to_uint8
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.manifest import Block
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


class _Timed:
    """A tokenizer set that adds up the processor time of encoding and of decoding: seconds of one core, on however
    many threads they were spent. Media decoding is not in them."""

    def __init__(self, tokenizers: TokenizerSet) -> None:
        self.tokenizers, self.codecs = tokenizers, tokenizers.codecs
        self.encode_s = self.decode_s = 0.0

    def segment(self, modality: str, *values: Any) -> Segment:
        """`<modality>_segment` of the set."""
        begun = time.process_time()
        segment: Segment = getattr(self.tokenizers, f"{modality}_segment")(*values)
        self.encode_s += time.process_time() - begun
        return segment

    def decode(self, segment: Segment) -> Any:
        """The value of the first item; None if there is none."""
        begun = time.process_time()
        items = self.tokenizers.decode(segment.ids)
        self.decode_s += time.process_time() - begun
        return items[0].value if items else None


def _image(timed: _Timed, members: Members, where: str) -> tuple[Segment, Figures]:
    image = read.image_of(members, where=where)
    segment = timed.segment("image", image)
    decoded = timed.decode(segment)[: image.shape[0], : image.shape[1]]
    patch = timed.codecs["image"].patch
    splits = bit_splits(timed.codecs["image"].codes)
    floor = max(psnr(image, rate_floor(image, patch, bits)) for bits in splits)
    pixels = image.shape[0] * image.shape[1]
    return segment, {"psnr": psnr(image, decoded), "floor_psnr": floor, "pixels": pixels}


def _rgba(timed: _Timed, members: Members, where: str) -> tuple[Segment, Figures]:
    layers = read.layers_of(members, where=where)
    height, width = layers[0].shape[:2]
    segment = timed.segment("rgba", layers)
    decoded = [layer[:height, :width] for layer in timed.decode(segment)]
    figures: Figures = {}
    for name, ground in grounds(height, width).items():
        figures[f"psnr_{name}"] = psnr(composite(layers, ground), composite(decoded, ground))
    figures["alpha_mae"] = alpha_mae(layers, decoded)
    return segment, figures | {"pixels": height * width * len(layers)}


def grounds(height: int, width: int) -> dict[str, NDArray[np.float64]]:
    """What layers are laid over to be compared."""
    return {
        "black": np.zeros((height, width, 3)),
        "white": np.full((height, width, 3), 255.0),
        "checker": checkerboard(height, width),
    }


def alpha_mae(layers: Iterable[U8], decoded: Iterable[U8]) -> float:
    """Mean absolute error of alpha, 0 to 1."""
    errors = [np.abs(a[..., 3] - b[..., 3].astype(np.float64)).mean() / 255 for a, b in zip(layers, decoded)]
    return float(np.mean(errors))


def _video(timed: _Timed, members: Members, where: str) -> tuple[Segment, Figures]:
    frames, times = read.video_of(members, where=where)
    segment = timed.segment("video", frames, times)
    decoded = timed.decode(segment)
    cut = decoded[:, : frames.shape[1], : frames.shape[2]]
    lost = len(frames) - len(decoded)
    # The last frame is on screen as long as the others are on average.
    seconds = float(times[-1] - times[0]) * len(times) / max(1, len(times) - 1)
    size = {"frames": len(frames), "seconds": seconds, "pixels": int(np.prod(frames.shape[:3]))}
    return segment, {"psnr": psnr(frames, cut) if not lost else 0.0, "frames_lost": lost, **size}


def _audio(timed: _Timed, members: Members, where: str) -> tuple[Segment, Figures]:
    samples, rate = read.audio_of(members, where=where)
    segment = timed.segment("audio", samples, rate)
    decoded, target = timed.decode(segment)
    original = resample(samples, rate, target)
    decoded = decoded[: len(original)]
    return segment, {"si_sdr": si_sdr(original, decoded), "seconds": len(samples) / rate}


def _score(timed: _Timed, members: Members, where: str) -> tuple[Segment, Figures]:
    page = read.score_of(members, where=where)
    segment = timed.segment("score", page)
    decoded = timed.decode(segment)[: page.shape[0], : page.shape[1]]
    return segment, {"ink_f1": ink_f1(page, decoded), "pixels": page.size}


def _text(timed: _Timed, members: Members, where: str) -> tuple[Segment, Figures]:
    text = read.text_of(members, where=where)
    segment = timed.segment("text", text)
    back = timed.decode(segment) or ""
    return segment, {"lossy_documents": int(back != text), "bytes": len(text.encode("utf-8"))}


def _notes(modality: str, endings: tuple[str, ...]) -> Callable[..., tuple[Segment, Figures]]:
    """Notes as words: whether what comes back is written with the same ids again."""

    def measured(timed: _Timed, members: Members, where: str) -> tuple[Segment, Figures]:
        found = next((members[ending] for ending in endings if ending in members), None)
        if found is None:
            raise DataError(f"the record has no member {' or '.join(endings)}", where=where)
        segment = timed.segment(modality, found)
        back = timed.decode(segment)
        data = back.encode("utf-8") if isinstance(back, str) else back
        try:
            ids = getattr(timed.tokenizers, f"{modality}_segment")(data).ids
        except DataError:
            ids = np.zeros(0, np.int32)
        return segment, {"lossy_records": int(not np.array_equal(ids, segment.ids))}

    return measured


_MEASURES: dict[str, tuple[str, Callable[..., tuple[Segment, Figures]]]] = {
    "text": ("text", _text),
    "image": ("image", _image),
    "rgba": ("rgba", _rgba),
    "video": ("image", _video),
    "audio": ("audio", _audio),
    "score": ("score", _score),
    "symbolic": ("symbolic", _notes("symbolic", ("musicxml", "mxl"))),
    "midi": ("midi", _notes("midi", ("mid", "midi"))),
}
#: Plain colours that layers are laid over to be compared.
GROUNDS = {
    "grey": (128, 128, 128), "black": (0, 0, 0), "white": (255, 255, 255), "red": (255, 0, 0), "green": (0, 255, 0),
    "blue": (0, 0, 255), "yellow": (255, 255, 0), "cyan": (0, 255, 255), "magenta": (255, 0, 255),
}  # fmt: skip
#: Records that latents are measured on, at most: an autoencoder is slow beside the other codecs.
LATENT_RECORDS = 50
_SUMS = {"lossy_documents", "lossy_records", "frames_lost"}
#: What rates are taken over.
_UNITS = ("bytes", "pixels", "seconds", "frames")


def codec_of(tokenizers: TokenizerSet, source: str) -> str:
    """The codec that a modality's ids come from; for video that of pictures, unless the set has one for it."""
    return source if source in tokenizers.codecs else _MEASURES[source][0]


def blocks_of(tokenizers: TokenizerSet, source: str) -> list[Block]:
    """The blocks that a modality's ids come from: a codec of video writes ids of pictures too."""
    names = (source, _MEASURES[source][0])
    return [block for block in tokenizers.manifest.blocks if block.codec in names]


def code_bits(blocks: Iterable[Block], ids: NDArray[np.int32]) -> float:
    """Bits that the ids of these blocks carry: log2 of the size of its block for each. Ids that mark ends of rows,
    frames or records count nothing: shapes say where they stand."""
    return sum(
        int(((ids >= block.start) & (ids < block.stop)).sum()) * log2(max(2, block.size)) for block in blocks
    )


def measure(
    tokenizers: TokenizerSet,
    samples: Mapping[str, Iterable[Members]],
    *,
    latents: Mapping[str, Iterable[Members]] | None = None,
    limit: int = 200,
    speed: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """{modality: figures} over at most `limit` held-out records of each source; for "latents" see `measure_latents`.

    latents: sources of any names that the codec of latents is measured on, else "rgba" of `samples`.

    psnr, floor_psnr (see `rate_floor`), si_sdr in dB; alpha_mae of 0..1; tokens_per_record; codes_used, the
    share of a modality's ids that occurred; bits (see `code_bits`) per record, pixel, second or byte; everything else
    counts (lossy_records: notes that are written with other ids when they come back).
    Damaged records are counted as skipped. speed: also records encoded and decoded in a second of one core, and
    seconds of sound or film, or bytes of text, in such a second. progress: called with (source, records done).
    """
    out: dict[str, Any] = {}
    for source, (codec, function) in _MEASURES.items():
        if source not in samples or codec not in tokenizers.codecs:
            continue
        rows: list[Figures] = []
        lengths: list[int] = []
        used: set[int] = set()
        skipped, bits, timed = 0, 0.0, _Timed(tokenizers)
        blocks = blocks_of(tokenizers, source)
        for number, members in enumerate(samples[source]):
            if number >= limit:
                break
            try:
                segment, figures = function(timed, members, f"{source} record {number}")
            except DataError:
                skipped += 1
                continue
            rows.append(figures)
            lengths.append(len(segment))
            used.update(np.unique(segment.ids).tolist())
            bits += code_bits(blocks, segment.ids)
            if progress is not None:
                progress(source, number + 1)
        units = Counter({unit: sum(row.pop(unit, 0) for row in rows) for unit in _UNITS})
        out[source] = _summary(blocks, rows, lengths, used) | {"skipped": skipped}
        if rows:
            out[source]["bits_per_record"] = round(bits / len(rows), 1)
            out[source] |= _rates(units, sum(lengths), bits)
            out[source] |= _speeds(timed, units, len(rows)) if speed else {}
    held = {"rgba": samples["rgba"]} if latents is None and "rgba" in samples else latents
    if held and "latents" in tokenizers.codecs:
        if progress is not None:
            progress("latents", 0)
        records = _in_turn(_layered(held))
        found = measure_latents(tokenizers, records, limit=min(limit, LATENT_RECORDS), speed=speed)
        out["latents"] = found
    return out


def _layered(sources: Mapping[str, Iterable[Members]]) -> list[Iterable[Members]]:
    """The sources whose first record holds layers; all of them if none does."""
    layered = [some for some in sources.values() if read.has_layers(next(iter(some), {}))]
    return layered or list(sources.values())


def _in_turn(sources: Iterable[Iterable[Members]]) -> Iterator[Members]:
    """A record of each source in turn, until all are read."""
    readers = [iter(source) for source in sources]
    while readers:
        left = []
        for reader in readers:
            for members in islice(reader, 1):
                left.append(reader)
                yield members
        readers = left


def measure_latents(
    tokenizers: TokenizerSet, records: Iterable[Members], *, limit: int, speed: bool = False
) -> Figures:
    """What latents read of `records` (`members.latent_pictures_of`) through their codec: psnr_nine, over the plain
    GROUNDS in 8 bits, the mean over grounds and layers; alpha_mae of 0..1; cells_per_record; numbers_per_pixel. Damaged
    records are counted as skipped.
    """
    rows: list[tuple[float, float]] = []
    done, skipped, cells, pixels, timed = 0, 0, 0, 0, [0.0, 0.0]
    tokenizers.encode_layer(np.zeros((1, 1, 4), np.uint8))  # the model is made now, outside of what is timed
    for number, members in enumerate(islice(records, limit)):
        try:
            layers = read.latent_pictures_of(members, where=f"record {number}")
        except DataError:
            skipped += 1
            continue
        done += 1
        for layer in layers:
            begun = time.process_time()
            encoded = tokenizers.encode_layer(layer, afresh=True)
            middle = time.process_time()
            decoded = tokenizers.decode_layer(encoded)[: layer.shape[0], : layer.shape[1]]
            timed = [timed[0] + middle - begun, timed[1] + time.process_time() - middle]
            cells, pixels = cells + encoded[..., 0].size, pixels + layer[..., 0].size
            rows.append((psnr_nine(layer, decoded), alpha_mae([layer], [decoded])))
    figures: Figures = {"records": done, "skipped": skipped}
    if rows:
        figures["psnr_nine"] = round(float(np.mean([row[0] for row in rows])), 4)
        figures["alpha_mae"] = round(float(np.mean([row[1] for row in rows])), 4)
        figures["cells_per_record"] = round(cells / done, 1)
        figures["numbers_per_pixel"] = round(cells * tokenizers.codecs["latents"].channels / pixels, 3)
    if rows and speed:
        for name, seconds in zip(("encode", "decode"), timed):
            figures[f"{name}_per_s"] = round(done / max(seconds, 1e-6), 1)
    return figures


def psnr_nine(layer: U8, decoded: U8) -> float:
    """Mean PSNR in dB of layers [H, W, 4] laid over each of GROUNDS, rounded to 8 bits (AlphaVAE's nine, as PNG)."""
    found = []
    for colour in GROUNDS.values():
        ground = np.broadcast_to(np.array(colour, np.float64), (*layer.shape[:2], 3))
        found.append(psnr(*(to_uint8(composite([part], ground)) for part in (layer, decoded))))
    return float(np.mean(found))


def _summary(
    blocks: list[Block], rows: list[Figures], lengths: list[int], used: set[int]
) -> dict[str, float | int]:
    figures: dict[str, float | int] = {"records": len(rows)}
    if not rows:
        return figures
    for name in rows[0]:
        values = [row[name] for row in rows]
        figures[name] = int(sum(values)) if name in _SUMS else round(float(np.mean(values)), 4)
    figures["tokens_per_record"] = round(float(np.mean(lengths)), 1)
    figures["tokens_max"] = max(lengths)
    ids = sum(block.size for block in blocks)
    hit = sum(1 for i in used for block in blocks if block.start <= i < block.stop)
    figures["codes_used"] = round(hit / ids, 4)
    return figures


def _rates(units: Mapping[str, float], tokens: int, bits: float) -> Figures:
    """Tokens and bits of each unit that there is."""
    rates: Figures = {}
    if units["bytes"]:
        rates["bytes_per_token"] = round(units["bytes"] / max(1, tokens), 3)
        rates["bits_per_byte"] = round(bits / units["bytes"], 3)
    if units["pixels"]:
        rates["pixels_per_token"] = round(units["pixels"] / max(1, tokens), 2)
        rates["bits_per_pixel"] = round(bits / units["pixels"], 4)
    if units["seconds"]:
        rates["tokens_per_s"] = round(tokens / units["seconds"], 1)
        rates["bits_per_s"] = round(bits / units["seconds"], 1)
    if units["frames"]:
        rates["tokens_per_frame"] = round(tokens / units["frames"], 2)
    return rates


def _speeds(timed: _Timed, units: Mapping[str, float], records: int) -> Figures:
    speeds: Figures = {}
    for name, seconds in (("encode", timed.encode_s), ("decode", timed.decode_s)):
        seconds = max(seconds, 1e-6)
        speeds[f"{name}_per_s"] = round(records / seconds, 1)
        if units["seconds"]:
            speeds[f"{name}_x_real_time"] = round(units["seconds"] / seconds, 1)
        if units["bytes"]:
            speeds[f"{name}_bytes_per_s"] = round(units["bytes"] / seconds)
    return speeds
