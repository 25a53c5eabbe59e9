"""`ringweave data show --out`: some samples of every source, decoded, as one page or one picture.

Nothing of a sample is embedded as it came: pictures, frames and sounds are decoded by the same guarded decoders
that training uses and written anew, text is escaped. A sample that cannot be decoded keeps its place and
says why.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ringweave.data_pipes.documents import layers_of
from ringweave.data_pipes.embeddings import MEMBER, read_embeddings
from ringweave.data_pipes.formats import load_json
from ringweave.data_pipes.plan_items import CLIPS, PICTURES, SOUNDS
from ringweave.data_pipes.reader import ShardReader
from ringweave.data_pipes.sample import Sample
from ringweave.data_pipes.shard_names import Shard
from ringweave.data_pipes.store import index_of, reader_of
from ringweave.launch.data_sources import name_of, source_of
from ringweave.pretrain.errors import ConfigError
from ringweave.tokenizers import media
from ringweave.tokenizers.errors import DataError, printable
from ringweave.tokenizers.members import as_mono, as_rgb

U8 = NDArray[np.uint8]
Report = Callable[[str, int, int], None]
#: Longest side of a picture on the sheet, frames of a strip, seconds of a sound, characters of a text.
SIDE, FRAMES, SECONDS, CHARACTERS = 384, 8, 20, 900
_TEXTS = ("txt", "cls", "md")


@dataclass
class Card:
    """One sample, decoded. pictures: (label, uint8 [H, W, 3 | 4]); sounds: (label, int16 [T] mono, rate)."""

    key: str
    where: str
    pictures: list[tuple[str, U8]] = field(default_factory=list)
    strip: list[U8] = field(default_factory=list)
    sounds: list[tuple[str, NDArray[np.int16], int]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    record: str = ""
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    layers: bool = False


def write_sheet(
    shards: Sequence[Shard],
    out: Path,
    *,
    title: str,
    per_source: int,
    seed: int,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Draws the sheet; returns {"sources": {name: samples shown}, "shown", "failed", "bytes"}.

    Raises ConfigError for another ending than .html or .png, DataError for shards without a usable index.
    """
    kind = out.suffix.lower()
    if kind not in (".html", ".png"):
        raise ConfigError("the sheet is .html or .png", where=str(out), fix="give --out sheet.html")
    groups: dict[str, list[Shard]] = {}
    for shard in shards:
        groups.setdefault(source_of(shard), []).append(shard)
    cards: dict[str, list[Card]] = {}
    totals: dict[str, int] = {}
    for done, (source, paths) in enumerate(sorted(groups.items()), 1):
        cards[source], totals[source] = pick(source, paths, count=per_source, seed=seed)
        if progress is not None:
            progress(f"decoding {source}", done, len(groups))
    if kind == ".html":
        from ringweave.launch.data_sheet_html import render

        out.write_text(render(title, cards, totals, seed=seed), encoding="utf-8")
    else:
        from ringweave.launch.data_sheet_png import draw

        draw(out, title, cards, totals)
    shown = [card for row in cards.values() for card in row]
    return {
        "sources": {source: len(row) for source, row in cards.items()},
        "shown": len(shown),
        "failed": sum(bool(card.problems) for card in shown),
        "bytes": out.stat().st_size,
    }


def pick(source: str, shards: Sequence[Shard], *, count: int, seed: int) -> tuple[list[Card], int]:
    """(`count` samples of a source, its number of samples): the same ones for the same seed."""
    counts = [index_of(shard).count for shard in shards]
    total = sum(counts)
    chosen = sorted(random.Random(f"{seed}/{source}").sample(range(total), min(count, total)))
    cards, start = [], 0
    for shard, size in zip(shards, counts):
        inside = [number - start for number in chosen if start <= number < start + size]
        start += size
        if inside:
            with reader_of(shard) as reader:
                cards += [_card(reader, number, name_of(shard)) for number in inside]
    return cards, total


def _card(reader: ShardReader, number: int, shard: str) -> Card:
    key = reader.keys[number]
    card = Card(key, f"{shard}#{number}")
    try:
        sample = reader.read(number)
    except DataError as error:
        card.problems.append(_line(error))
        return card
    card.facts.append(f"{sum(map(len, sample.members.values())) / 1000:,.1f} kB")
    if "layer0.png" in sample.members:
        _add_layers(card, sample)
    for ext, data in sorted(sample.members.items()):
        if card.layers and ext.startswith("layer"):
            continue
        try:
            _add(card, ext, data, f"{sample.where}:{ext}")
        except DataError as error:
            card.problems.append(_line(error))
    return card


def _line(error: DataError) -> str:
    """What and why, and the member it concerns; the card already says which sample."""
    member = error.where.rpartition("#")[2].partition(":")[2]
    return printable(
        f"{member + ': ' if member else ''}{error.what}" + (f": {error.why}" if error.why else "")
    )


def _add_layers(card: Card, sample: Sample) -> None:
    card.layers = True
    try:
        layers = layers_of(sample)
    except DataError as error:
        card.problems.append(_line(error))
        return
    height, width = layers[0].shape[:2]
    flat = Image.new("RGBA", (width, height))
    for layer in layers:
        flat.alpha_composite(Image.fromarray(layer))
    card.pictures.append(("all layers", np.asarray(flat)))
    card.pictures += [(f"layer {n}", layer) for n, layer in enumerate(layers[:7])]
    card.facts.append(f"{len(layers)} layers, {width}×{height}")


def _add(card: Card, ext: str, data: bytes, where: str) -> None:
    ending = ext.rpartition(".")[2]
    if ending in PICTURES:
        picture = media.decode_image(data, where=where)
        picture = as_rgb(picture) if picture.shape[2] == 1 else picture
        card.facts.append(f"{ext} {picture.shape[1]}×{picture.shape[0]}")
        if not (card.layers and ext == "flat.png"):
            card.pictures.append((ext, picture))
    elif ending in SOUNDS:
        samples, rate = media.decode_audio(data, where=where)
        card.facts.append(f"{ext} {len(samples) / rate:.1f} s, {rate / 1000:g} kHz, {samples.shape[1]} ch")
        card.sounds.append((ext, as_mono(samples), rate))
    elif ending in CLIPS:
        frames, times = media.decode_video(data, where=where)
        size = f"{frames.shape[2]}×{frames.shape[1]}"
        card.facts.append(f"{ext} {len(frames)} frames, {size}, {times[-1] - times[0]:.1f} s")
        places = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
        card.strip = [shrink(frames[i], SIDE // 2) for i in places]
    elif ext == MEMBER:
        count, numbers = read_embeddings(data, where=where).shape
        card.facts.append(f"{ext} {count} × {numbers}")
    elif ending == "json":
        value = load_json(data, where=where)
        card.record = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True)[:CHARACTERS]
    elif ending in _TEXTS:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError("text is not UTF-8", where=where, why=str(error)) from None
        card.texts.append((ext, text[:CHARACTERS] + (" …" if len(text) > CHARACTERS else "")))
        if not card.pictures and len(text) > CHARACTERS:
            card.facts.append(f"{len(text):,} characters")


def shrink(picture: U8, side: int) -> U8:
    """At most `side` pixels long, the shape kept; smaller pictures stay as they are."""
    height, width = picture.shape[:2]
    if max(height, width) <= side:
        return picture
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0))


def envelope(samples: NDArray[np.int16], columns: int) -> NDArray[np.float64]:
    """[columns, 2]: lowest and highest value of each stretch, -1 to 1."""
    places = np.linspace(0, len(samples), columns + 1).astype(int)
    low, high = np.zeros(columns), np.zeros(columns)
    for i in range(columns):
        part = samples[places[i] : max(places[i] + 1, places[i + 1])]
        low[i], high[i] = part.min() / 32768, part.max() / 32768
    return np.stack([low, high], axis=1)


def png_or_jpeg(picture: U8) -> tuple[str, bytes]:
    """(MIME type, bytes): PNG for small pictures and those with alpha, JPEG for photographs."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    if picture.shape[2] == 4 or picture.shape[0] * picture.shape[1] <= 160 * 160:
        image.save(buffer, "PNG", optimize=True)
        return "image/png", buffer.getvalue()
    image.save(buffer, "JPEG", quality=86)
    return "image/jpeg", buffer.getvalue()
