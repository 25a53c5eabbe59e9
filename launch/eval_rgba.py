"""Two folders of RGBA pictures or stacks of layers, compared: for `ringweave eval rgba`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.pretrain.rgba_matching import decomposition
from ringweave.pretrain.rgba_metrics import matting
from ringweave.pretrain.rgba_pictures import BACKGROUNDS, PSNR_CAP, composite_consistency, reconstruction
from ringweave.tokenizers.errors import DataError, printable
from ringweave.tokenizers.media_image import decode_image

U8 = NDArray[np.uint8]
TRIMAP, COMPOSITE = "trimap.png", "composite.png"
_LAYER = re.compile(r"layer(0|[1-9][0-9]*)\.png")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_BYTES = 1 << 30  # of one file
_NAMED = 5  # files that an error names


@dataclass(frozen=True)
class Pair:
    """One sample: the files of both stacks, bottom first, and what the reference has beside them."""

    name: str
    predicted: list[Path]
    reference: list[Path]
    trimap: Path | None = None
    composite: Path | None = None


@dataclass(frozen=True)
class Found:
    """kind: "pictures" (one PNG a sample) or "layers" (a folder a sample); ignored: entries that are neither."""

    kind: str
    pairs: list[Pair]
    ignored: int


def find_pairs(predicted: Path, reference: Path) -> Found:
    """The samples of two folders, by name. DataError for empty folders, samples without a partner, and layers that are
    not numbered layer0.png, layer1.png and so on."""
    kind, names, ignored = _samples(reference)
    other, found, more = _samples(predicted)
    if kind != other:
        why = f"{_shown(predicted)} holds {other}, {_shown(reference)} holds {kind}"
        raise DataError("the two folders are not alike", why=why, fix="give two folders of the same form")
    for folder, missing in ((predicted, names - found), (reference, found - names)):
        if missing:
            raise DataError(
                f"{len(missing)} of {len(names | found)} samples have no partner",
                where=_shown(folder),
                why=f"it has no {_some(missing)}",
                fix="give both folders the same names",
            )
    ordered = sorted(names)
    if kind == "pictures":
        pairs = [Pair(_shown(name), [predicted / name], [reference / name]) for name in ordered]
        return Found(kind, pairs, ignored + more)
    pairs = []
    for name in ordered:
        ours, theirs = _layers(predicted / name), _layers(reference / name)
        more += len(ours[1] - {TRIMAP, COMPOSITE}) + len(theirs[1] - {TRIMAP, COMPOSITE})
        beside = [reference / name / file if file in theirs[1] else None for file in (TRIMAP, COMPOSITE)]
        pairs.append(Pair(_shown(name), ours[0], theirs[0], *beside))
    return Found(kind, pairs, ignored + more)


def _samples(folder: Path) -> tuple[str, set[str], int]:
    """("pictures" or "layers", names, other entries); names with a leading dot are not looked at."""
    entries = [entry for entry in _entries(folder) if not entry.name.startswith(".")]
    folders = {entry.name for entry in entries if entry.is_dir()}
    pictures = {entry.name for entry in entries if entry.suffix.lower() == ".png" and entry.is_file()}
    fix = (
        "give PNG files of RGBA pictures, or a folder a sample with layer0.png, layer1.png ... (bottom first)"
    )
    if folders and pictures:
        why = f"{_some(pictures)} beside folders such as {_some(folders, most=1)}"
        raise DataError(
            "the folder holds pictures and samples of layers", where=_shown(folder), why=why, fix=fix
        )
    if not folders and not pictures:
        raise DataError("the folder holds nothing to compare", where=_shown(folder), fix=fix)
    return ("layers" if folders else "pictures"), folders | pictures, len(entries) - len(folders | pictures)


def _layers(folder: Path) -> tuple[list[Path], set[str]]:
    """The layers of one sample, bottom first, and the names of what else it has."""
    entries = [entry.name for entry in _entries(folder) if not entry.name.startswith(".")]
    numbers = sorted(int(match[1]) for name in entries if (match := _LAYER.fullmatch(name)))
    odd = {name for name in entries if name.lower().startswith("layer") and not _LAYER.fullmatch(name)}
    fix = "name the layers layer0.png (the bottom), layer1.png and so on, without gaps"
    if odd:
        raise DataError(
            "a layer has no number", where=_shown(folder), why=f"its name is {_some(odd)}", fix=fix
        )
    if not numbers or numbers != list(range(len(numbers))):
        first = next(i for i in range(len(numbers) + 1) if i not in numbers)
        raise DataError(f"layer{first}.png is missing", where=_shown(folder), fix=fix)
    layers = [f"layer{number}.png" for number in numbers]
    return [folder / name for name in layers], set(entries) - set(layers)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError("cannot read the folder", where=_shown(folder), why=why) from error


def _shown(path: Path | str) -> str:
    """A path or name on one line; what a terminal would obey is gone."""
    return printable(str(path)).replace("\n", "\ufffd").replace("\t", "\ufffd")


def _some(names: set[str], *, most: int = _NAMED) -> str:
    listed = ", ".join(_shown(name) for name in sorted(names)[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def _read(path: Path) -> U8:
    """uint8 [H, W, C] of a PNG file. DataError for anything else."""
    where = _shown(path)
    try:
        if not path.is_file():
            raise DataError("not a file", where=where)
        if path.stat().st_size > MAX_BYTES:
            raise DataError("the file is too large", where=where, why=f"more than {MAX_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise DataError("cannot read the file", where=where, why=error.strerror or str(error)) from error
    if not data.startswith(_SIGNATURE):
        why = "whatever its name says; other formats change pixels"
        raise DataError("the file is no PNG", where=where, why=why, fix="write it as PNG")
    return decode_image(data, where=where)


def read_stack(paths: Sequence[Path]) -> list[U8]:
    """uint8 [H, W, 4] each, of one size. DataError names the file that has no alpha or another size."""
    layers: list[U8] = []
    for path in paths:
        pixels = _read(path)
        if pixels.shape[2] != 4:
            raise DataError(
                "the picture has no alpha channel",
                where=_shown(path),
                why=f"it is {'RGB' if pixels.shape[2] == 3 else 'grey'}, and opaque would be a guess",
                fix="write it as RGBA",
            )
        if layers:
            _same_size(pixels, path, layers[0], paths[0])
        layers.append(pixels)
    return layers


def _same_size(pixels: U8, path: Path, other: U8, beside: Path) -> None:
    if pixels.shape[:2] != other.shape[:2]:
        (h, w), (height, width) = pixels.shape[:2], other.shape[:2]
        why = f"it is {w}x{h}, {_shown(beside)} is {width}x{height}"
        raise DataError("two pictures of one sample differ in size", where=_shown(path), why=why)


def _read_trimap(path: Path) -> U8:
    """uint8 [H, W] of a grey picture, however it is stored."""
    pixels = _read(path)
    if pixels.shape[2] == 4 and (pixels[..., 3] < 255).any():
        raise DataError("the trimap is transparent", where=_shown(path), fix="write it as a grey picture")
    if not (pixels[..., :1] == pixels[..., :3]).all():
        raise DataError("the trimap is coloured", where=_shown(path), fix="write it as a grey picture")
    return pixels[..., 0]


def compare(pair: Pair, *, region: str, merges: int) -> dict[str, Any]:
    """The figures of one sample: {"name", "layers", "matting", "reconstruction", "decomposition", "composite"}.

    matting: of the top layers, which is what a trimap is drawn for; reconstruction: of the whole stacks; composite:
    None without a composite.png. Raises DataError, naming the file.
    """
    predicted, reference = read_stack(pair.predicted), read_stack(pair.reference)
    _same_size(predicted[0], pair.predicted[0], reference[0], pair.reference[0])
    trimap, composite = None, None
    if region == "unknown":
        if pair.trimap is None:
            raise DataError(
                "the unknown region needs a trimap",
                where=_shown(pair.reference[0]),
                fix=f"put {TRIMAP} beside layer0.png of each sample, or measure --region whole",
            )
        trimap = _read_trimap(pair.trimap)
        _same_size(trimap, pair.trimap, reference[0], pair.reference[0])
    if pair.composite is not None:
        picture = _read(pair.composite)
        picture = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture
        _same_size(picture, pair.composite, reference[0], pair.reference[0])
        composite = composite_consistency(predicted, picture, where=_shown(pair.composite))
    where = _shown(pair.trimap or pair.reference[-1])
    alphas = (predicted[-1][..., 3], reference[-1][..., 3])
    return {
        "name": pair.name,
        "layers": [len(predicted), len(reference)],
        "matting": matting(*alphas, region=region, trimap=trimap, where=where),
        "reconstruction": reconstruction(predicted, reference, where=where),
        "decomposition": decomposition(predicted, reference, merges=merges, where=where),
        "composite": composite,
    }


def evaluate_folders(
    predicted: Path,
    reference: Path,
    *,
    region: str = "whole",
    merges: int = 5,
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[str, Any]:
    """Means over the samples of two folders, and every sample's figures.

    {"kind", "samples", "ignored", "region", "psnr_cap", "matting", "reconstruction", "decomposition", "composite",
    "per_sample"}; see `compare`. Each sample counts once, whatever its size. progress: called with (name, done, of).
    """
    found = find_pairs(predicted, reference)
    rows = []
    for done, pair in enumerate(found.pairs):
        rows.append(compare(pair, region=region, merges=merges))
        if progress is not None:
            progress(pair.name, done + 1, len(found.pairs))
    composites = [row["composite"] for row in rows if row["composite"] is not None]
    return {
        "kind": found.kind,
        "samples": len(rows),
        "ignored": found.ignored,
        "region": region,
        "psnr_cap": PSNR_CAP,
        "matting": {"region": region, **_means([row["matting"] for row in rows])},
        "reconstruction": _means([row["reconstruction"] for row in rows])
        | {
            "backgrounds": {
                name: _means([row["reconstruction"]["backgrounds"][name] for row in rows])
                for name in BACKGROUNDS
            }
        },
        "decomposition": [
            _means([row["decomposition"][i] for row in rows]) | {"allowed": i} for i in range(merges + 1)
        ],
        "composite": {"samples": len(composites), **_means(composites)} if composites else None,
        "per_sample": rows,
    }


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of every number of the rows."""
    keys = [key for key, value in rows[0].items() if isinstance(value, (int, float))]
    return {key: float(np.mean([row[key] for row in rows])) for key in keys}
