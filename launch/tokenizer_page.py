"""`ringweave tokenizer show`: held-out records as they are, as they come back from their ids, and what differs.

Every picture, film and sound on the page is written anew from decoded arrays; a record that cannot be read keeps its
place and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringweave.launch.data_records import Records
from ringweave.launch.data_sources import name_of
from ringweave.launch.tokenizer_clip import Clip, beside, encode_clip
from ringweave.tokenizers import members as read
from ringweave.tokenizers.audio import resample
from ringweave.tokenizers.codec import to_uint8
from ringweave.tokenizers.errors import DataError, printable
from ringweave.tokenizers.measure import (
    alpha_mae,
    blocks_of,
    code_bits,
    codec_of,
    composite,
    grounds,
    ink_f1,
    psnr,
    psnr_nine,
    si_sdr,
)
from ringweave.tokenizers.segment import Segment
from ringweave.tokenizers.text_model import BYTE, pieces_of

if TYPE_CHECKING:
    from ringweave.tokenizers.set import TokenizerSet

U8 = NDArray[np.uint8]
#: Characters of a text, layers of a record, seconds of a sound and frames of a film that are shown; longest side of a
#: film's panel.
CHARACTERS, LAYERS, SECONDS, FRAMES, PANEL = 700, 3, 20, 120, 256
_PAPER, _LOST, _ADDED = (255, 255, 255), (209, 73, 24), (24, 105, 201)


@dataclass(frozen=True, slots=True)
class Sound:
    """int16 [T] mono."""

    label: str
    samples: NDArray[np.int16]
    rate: int


@dataclass
class Card:
    """One record. rows: pictures uint8 [H, W, 3 | 4] beside each other, with labels; pieces: (text, "piece" | "byte" |
    "line"); facts: (name, value) of the record; problem: why it cannot be shown."""

    key: str
    where: str
    caption: str = ""
    rows: list[list[tuple[str, U8]]] = field(default_factory=list)
    clip: Clip | None = None
    labels: tuple[str, ...] = ()
    sounds: list[Sound] = field(default_factory=list)
    pieces: list[tuple[str, str]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """One modality. codec: what made the ids, in words; note: how to read the cards."""

    source: str
    title: str
    codec: str
    note: str
    cards: list[Card]


def _facts(
    tokenizers: TokenizerSet, source: str, segment: Segment, unit: str, size: float
) -> list[tuple[str, str]]:
    """Ids and bits of a record, and bits of each of its `size` units."""
    bits = code_bits(blocks_of(tokenizers, source), segment.ids)
    each = f"{bits / size:,.0f}" if bits >= 100 * size else f"{bits / size:.3g}"
    return [("ids", f"{len(segment):,}"), ("bits", f"{bits:,.0f}"), (f"bits a {unit}", each)]


def difference(original: NDArray[Any], decoded: NDArray[Any], amplify: int) -> U8:
    """|original - decoded|, `amplify` times as large, cut off at 255."""
    return to_uint8(amplify * np.abs(original.astype(np.float64) - decoded.astype(np.float64)))


def _image(tokenizers: TokenizerSet, members: read.Members, where: str, card: Card, amplify: int) -> None:
    image = read.image_of(members, where=where)
    segment = tokenizers.image_segment(image)
    decoded = tokenizers.decode(segment.ids)[0].value[: image.shape[0], : image.shape[1]]
    lost = difference(image, decoded, amplify)
    card.rows = [[("original", image), ("decoded", decoded), (f"difference ×{amplify}", lost)]]
    size = image.shape[0] * image.shape[1]
    card.facts = [
        ("PSNR", f"{psnr(image, decoded):.1f} dB"),
        *_facts(tokenizers, "image", segment, "pixel", size),
        ("size", f"{image.shape[1]}×{image.shape[0]}"),
    ]


def _rgba(tokenizers: TokenizerSet, members: read.Members, where: str, card: Card, amplify: int) -> None:
    layers = read.layers_of(members, where=where)
    height, width = layers[0].shape[:2]
    segment = tokenizers.rgba_segment(layers)
    decoded = [layer[:height, :width] for layer in tokenizers.decode(segment.ids)[0].value]
    grey = np.full((height, width, 3), 128.0)
    flat = [composite(part, grey) for part in (layers, decoded)]
    whole = [_flattened(part) for part in (layers, decoded)]
    card.rows = [
        [
            ("all layers", whole[0]),
            ("decoded", whole[1]),
            (f"difference ×{amplify}", difference(flat[0], flat[1], amplify)),
        ]
    ]
    for n, (layer, back) in enumerate(zip(layers[:LAYERS], decoded)):
        alpha = difference(layer[..., 3:], back[..., 3:], amplify).repeat(3, axis=2)
        card.rows.append([(f"layer {n}", layer), ("decoded", back), (f"alpha diff. ×{amplify}", alpha)])
    found = {
        name: psnr(composite(layers, g), composite(decoded, g)) for name, g in grounds(height, width).items()
    }
    card.facts = [(f"PSNR on {name}", f"{value:.1f} dB") for name, value in found.items()]
    card.facts += [
        ("alpha MAE", f"{alpha_mae(layers, decoded):.3f}"),
        *_facts(tokenizers, "rgba", segment, "pixel", height * width * len(layers)),
        ("size", f"{width}×{height}, {len(layers)} layers"),
    ]


def _latents(tokenizers: TokenizerSet, members: read.Members, where: str, card: Card, amplify: int) -> None:
    layers = read.latent_pictures_of(members, where=where)
    cells = [tokenizers.encode_layer(layer) for layer in layers]
    decoded = [
        tokenizers.decode_layer(some)[: layer.shape[0], : layer.shape[1]]
        for some, layer in zip(cells, layers)
    ]
    grey = np.full((*layers[0].shape[:2], 3), 128.0)
    for n, (layer, back) in enumerate(zip(layers[:LAYERS], decoded)):
        lost = difference(composite([layer], grey), composite([back], grey), amplify)
        card.rows.append([(f"layer {n}", layer), ("decoded", back), (f"difference ×{amplify}", lost)])
    height, width = layers[0].shape[:2]
    numbers, pixels = sum(some.size for some in cells), sum(layer[..., 0].size for layer in layers)
    card.facts = [
        ("PSNR over nine grounds", f"{np.mean([psnr_nine(a, b) for a, b in zip(layers, decoded)]):.1f} dB"),
        ("alpha MAE", f"{alpha_mae(layers, decoded):.3f}"),
        ("cells", f"{sum(some[..., 0].size for some in cells):,}"),
        ("numbers a pixel", f"{numbers / pixels:.2f}"),
        ("size", f"{width}×{height}, {len(layers)} layer{'s'[: len(layers) != 1]}"),
    ]


def _flattened(layers: Iterable[U8]) -> U8:
    """All layers as one with alpha."""
    from PIL import Image

    first, *rest = (Image.fromarray(layer) for layer in layers)
    for layer in rest:
        first.alpha_composite(layer)
    return np.asarray(first)


def _video(tokenizers: TokenizerSet, members: read.Members, where: str, card: Card, amplify: int) -> None:
    frames, times = read.video_of(members, where=where)
    segment = tokenizers.video_segment(frames, times)
    decoded = tokenizers.decode(segment.ids)[0].value[: len(frames), : frames.shape[1], : frames.shape[2]]
    if decoded.shape != frames.shape:
        raise DataError("the decoded clip has another shape", where=where)
    panels = [part[:FRAMES] for part in (frames, decoded, difference(frames, decoded, amplify))]
    card.clip = encode_clip(beside(panels, side=PANEL), times[:FRAMES].tolist())
    card.labels = ("original", "decoded", f"difference ×{amplify}")
    shown = f", first {FRAMES} shown" if len(frames) > FRAMES else ""
    card.facts = [
        ("PSNR", f"{psnr(frames, decoded):.1f} dB"),
        *_facts(tokenizers, "video", segment, "pixel", float(np.prod(frames.shape[:3]))),
        ("ids a frame", f"{len(segment) / len(frames):.1f}"),
        ("size", f"{frames.shape[2]}×{frames.shape[1]}, {len(frames)} frames{shown}"),
    ]


def _audio(tokenizers: TokenizerSet, members: read.Members, where: str, card: Card, amplify: int) -> None:
    samples, rate = read.audio_of(members, where=where)
    segment = tokenizers.audio_segment(samples, rate)
    decoded, target = tokenizers.decode(segment.ids)[0].value
    original = resample(samples, rate, target)
    decoded = decoded[: len(original)]
    lost = np.clip(original.astype(np.int32) - decoded, -32768, 32767).astype(np.int16)
    parts = (("original", original), ("decoded", decoded), ("difference ×1", lost))
    card.sounds = [Sound(label, part[: SECONDS * target], target) for label, part in parts]
    seconds = len(original) / target
    shown = f", first {SECONDS} s here" if seconds > SECONDS else ""
    card.facts = [
        ("SI-SDR", f"{si_sdr(original, decoded):.1f} dB"),
        *_facts(tokenizers, "audio", segment, "second", seconds),
        ("length", f"{seconds:.1f} s at {target / 1000:g} kHz{shown}"),
    ]


def _score(tokenizers: TokenizerSet, members: read.Members, where: str, card: Card, amplify: int) -> None:
    page = read.score_of(members, where=where)
    segment = tokenizers.score_segment(page)
    decoded = tokenizers.decode(segment.ids)[0].value[: page.shape[0], : page.shape[1]]
    three = [("original", page), ("decoded", decoded)]
    card.rows = [
        [(label, part[..., None].repeat(3, axis=2)) for label, part in three]
        + [("ink lost and added", ink_changes(page, decoded))]
    ]
    card.facts = [
        ("ink-F1", f"{ink_f1(page, decoded):.3f}"),
        *_facts(tokenizers, "score", segment, "pixel", page.size),
        ("size", f"{page.shape[1]}×{page.shape[0]}"),
    ]


def ink_changes(page: U8, decoded: U8) -> U8:
    """[H, W] and [H, W] -> [H, W, 3]: ink of both in light grey, ink that is lost and ink that was added in colour."""
    before, after = page < 128, decoded < 128
    out = np.empty((*page.shape, 3), np.uint8)
    out[:] = _PAPER
    out[before & after] = (205, 208, 213)
    out[before & ~after], out[after & ~before] = _LOST, _ADDED
    return out


def _text(tokenizers: TokenizerSet, members: read.Members, where: str, card: Card, amplify: int) -> None:
    words = read.text_of(members, where=where)
    segment = tokenizers.text_segment(words)
    items = tokenizers.decode(segment.ids)
    same = (items[0].value if items else "") == words
    size = len(words.encode("utf-8"))
    card.pieces = mark_pieces(tokenizers, segment)
    card.caption = ""
    card.facts = [
        ("after decoding", "identical" if same else "DIFFERENT"),
        ("bytes", f"{size:,}"),
        *_facts(tokenizers, "text", segment, "byte", max(1, size)),
        ("bytes a token", f"{size / max(1, len(segment)):.2f}"),
    ]


def mark_pieces(tokenizers: TokenizerSet, segment: Segment) -> list[tuple[str, str]]:
    """The pieces of about CHARACTERS characters, in order: ("piece", text), ("line", "\\n") or ("byte", "E2")."""
    [block] = blocks_of(tokenizers, "text")
    codec = tokenizers.codecs["text"]
    known = pieces_of(codec.model)
    found: list[tuple[str, str]] = []
    length = 0
    for i in (segment.ids - block.start).tolist():
        if length > CHARACTERS:
            found.append(("…", "more"))
            break
        piece = known[i]
        if piece.kind == BYTE:
            found.append((piece.text[3:5], "byte"))
        else:
            plain = piece.text.replace("\u2581", " ")
            found.append((plain, "line" if plain == "\n" else "piece"))
        length += len(found[-1][0])
    return found


#: Title, what makes a card, how to read it.
_KINDS: dict[str, tuple[str, Callable[[TokenizerSet, read.Members, str, Card, int], None], str]] = {
    "text": ("Text", _text, "Each tint is one piece. ↵ is a newline, a small box a single byte of a character."),
    "image": ("Images", _image, "The difference is |original - decoded|, amplified as it says."),
    "rgba": (
        "RGBA layers", _rgba,
        "Differences are those of all layers over grey, then of each layer's alpha, amplified as they say.",
    ),
    "video": ("Video", _video, "One film of three panels, at true times. The difference is amplified as it says."),
    "audio": (
        "Audio", _audio,
        "Spectrograms show the lower half of the band, over 70 dB. The difference is original - decoded, as it is.",
    ),
    "score": ("Scores", _score, "Ink that is lost is red, ink that was added is blue; not amplified."),
    "latents": (
        "Continuous latents", _latents,
        "Each layer through the autoencoder; it has no ids. Differences are those over grey, amplified as they say.",
    ),
}  # fmt: skip


def sections(
    tokenizers: TokenizerSet,
    samples: Mapping[str, Records],
    *,
    count: int,
    amplify: int = 2,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Section]:
    """The cards of up to `count` records of each modality, evenly spread over its held-out records.

    samples: by modality; "latents" are records of layers or pictures.
    amplify: how many times as large differences of pictures are shown.
    """
    made = []
    wanted = [
        s for s in _KINDS if s in samples and (s in tokenizers.codecs or s == "video") and len(samples[s])
    ]
    wanted = [s for s in wanted if s == "latents" or codec_of(tokenizers, s) in tokenizers.codecs]
    for done, source in enumerate(wanted):
        if progress is not None:
            progress(f"decoding {source}", done, len(wanted))
        title, make, note = _KINDS[source]
        codec = _file_of(tokenizers, source)
        cards = [_card(tokenizers, make, amplify, *item) for item in samples[source].spread(count)]
        made.append(Section(source, title, codec, note, cards))
    return made


def _file_of(tokenizers: TokenizerSet, source: str) -> str:
    """Kind and file of the codec of a modality."""
    if source == "latents":  # it has no ids, so no block
        about = tokenizers.manifest.preprocessing["latents"]
        return f"{about['kind']}, file {about['sha256'][:12]}"
    name = codec_of(tokenizers, source)
    block = next(block for block in tokenizers.manifest.blocks if block.codec == name)
    return f"{tokenizers.codecs[name].kind}, file {block.sha256[:12]}"


def _card(
    tokenizers: TokenizerSet, make: Callable[..., None], amplify: int, shard: Path, number: int, sample: Any
) -> Card:
    """sample: what was read, or the DataError that reading it ended in."""
    if isinstance(sample, DataError):
        return Card(f"sample {number}", name_of(shard), problem=_line(sample))
    card = Card(sample.key, f"{name_of(shard)}#{number}")
    card.caption = sample.members.get("txt", b"").decode("utf-8", errors="replace")[:200].strip()
    try:
        make(tokenizers, sample.members, sample.where, card, amplify)
    except DataError as error:
        return Card(sample.key, card.where, caption=card.caption, problem=_line(error))
    return card


def _line(error: DataError) -> str:
    return printable(error.what + (f": {error.why}" if error.why else ""))
