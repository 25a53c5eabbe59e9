"""Files of tokens: names, the metadata that tie them to shard, plan and vocabulary, whole-or-absent writing.

A file is one block (`token_block.py`) as safetensors. Its metadata (one JSON object under `ringweave`, so that the
same shard gives the same bytes) hold the full manifest hash, the plan, the shard's size and the crc32 of its index;
a part of a shard adds `first` and `count`. A file of another vocabulary or of another state of the shard is refused
by name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ringweave.data_pipes.index import index_path, load_index
from ringweave.data_pipes.index_file import read_identity
from ringweave.data_pipes.shard_names import Shard, is_remote, local_path, shard_name, shown, stem_of
from ringweave.data_pipes.store import stored
from ringweave.data_pipes.token_block import LATENT_TABLE, Tensors, TokenBlock, crc_of, tables_of
from ringweave.data_pipes.token_vocabulary import FIX, other_vocabulary
from ringweave.tokenizers.errors import DataError

#: By whether there are latents: the first form of those held one width only, and is made anew.
FORMAT, FORMAT_OF_LATENTS = "ringweave-tokens/1", "ringweave-tokens/2"
METADATA = "ringweave"
FIX_DAMAGED = f"delete it and {FIX}"
#: Bytes that hold the metadata of nearly every index.
_HEAD = 1 << 14


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a file of tokens belongs to: a shard of this size whose index has this crc32."""

    name: str
    size: int
    index_crc32: int


def stamp_of(shard: Shard) -> Stamp:
    """The stamp of a shard as it is now. Raises DataError as `load_index`, most of all if shard or index is missing.

    Of the sidecar only the header is read where that is enough: a job may have tens of thousands of shards.
    """
    if (held := stored(shard)) is not None:
        return Stamp(held.name, *held.identity())
    path = local_path(shard)
    assert path is not None
    with contextlib.suppress(OSError), open(index_path(path), "rb") as file:
        found = read_identity(head := file.read(_HEAD))
        if isinstance(found, int):
            found = read_identity(head + file.read(found - len(head)))
        if isinstance(found, tuple) and found[0] == path.stat().st_size:
            return Stamp(path.name, *found)
    index = load_index(path)
    return Stamp(path.name, index.shard_size, index.crc32)


def plan_hash(plan: Sequence[str], manifest_hash: str) -> str:
    """12 hex digits that stand for a plan and a vocabulary in names of files.

    Of a plan of latents for the format too, so that files of the first form are passed over.
    """
    told: list[Any] = [manifest_hash, list(plan)]
    if any(entry.partition(":")[0] == "latents" for entry in plan):
        told.append(FORMAT_OF_LATENTS)
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def stem_in(shard: Shard, folder: Path | None, stamp: Stamp | None) -> Path:
    """Beside the shard (`folder` None): its path without `.tar`. In a common folder the name tells shards of the
    same name apart by the crc32 of their index."""
    name, path = stem_of(shard_name(shard)), local_path(shard)
    if folder is None:
        if path is None:
            raise DataError(
                "nowhere to keep the tokens of a shard",
                where=shown(shard),
                why="nothing can be written beside it, and there is no folder of caches",
                fix="set data.cache.dir in the config (--cache DIR)",
            )
        return path.with_name(name)
    stamp = stamp or stamp_of(shard)
    return Path(folder) / f"{name}-{stamp.index_crc32:08x}"


def places(shard: Shard, folder: Path | None) -> list[Path | None]:
    """Where to look for a shard's tokens: beside it (None), then the common folder."""
    beside: list[Path | None] = [] if is_remote(shard) else [None]
    return [*beside, folder] if folder is not None else beside


def writable(shard: Shard, folder: Path | None) -> list[Path | None]:
    """The first of `places` that may be written to, or nothing. The common folder is made."""
    for place in places(shard, folder):
        if place is None:
            path = local_path(shard)
            if path is not None and os.access(path.parent, os.W_OK):
                return [None]
        else:
            with contextlib.suppress(OSError):
                place.mkdir(parents=True, exist_ok=True)
                if os.access(place, os.W_OK):
                    return [place]
    return []


def write_tokens(
    path: Path, tensors: Tensors, *, stamp: Stamp, plan: Sequence[str], manifest_hash: str, **more: Any
) -> None:
    """Temporary file, fsync, rename, fsync of the folder: a file is whole or absent.

    Raises DataError if it cannot be written, with `errno` of the cause as its attribute `code`.
    """
    metadata = {
        "format": FORMAT_OF_LATENTS if LATENT_TABLE in tensors else FORMAT,
        "manifest": manifest_hash,
        "plan": list(plan),
        "shard": stamp.name,
        "shard_size": stamp.size,
        "index_crc32": stamp.index_crc32,
        "tables_crc32": crc_of(*(tensors[name] for name in tables_of(tensors))),
        **more,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={METADATA: json.dumps(metadata)})
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise WriteError(
            "cannot write the token cache",
            where=str(path),
            why=str(error),
            fix="free space or change permissions",
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class WriteError(DataError):
    """A file of tokens could not be written; what it holds can be had without it."""


def sweep(folder: Path, stem: str) -> int:
    """Removes what killed writers of this machine left behind of files that begin with `stem`; gives their number."""
    removed = 0
    for path in folder.glob(f".{stem}*.tmp"):
        owner = path.name.removesuffix(".tmp").rpartition(".")[2]
        if owner.isdecimal() and not _alive(int(owner)):
            with contextlib.suppress(OSError):
                path.unlink()
                removed += 1
    return removed


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_metadata(file: Any) -> dict[str, Any]:
    """The JSON object in the header of a file. Raises ValueError if it is none."""
    metadata = json.loads((file.metadata() or {}).get(METADATA, "null"))
    if not isinstance(metadata, dict):
        raise ValueError("it holds no metadata of ringweave")
    return metadata


def open_tokens(
    path: Path, *, stamp: Stamp | None, shard: Shard, plan: Sequence[str], manifest_hash: str, **more: Any
) -> TokenBlock:
    """The block in a file; its tokens stay there. stamp: of the shard now, if known.

    Raises VocabularyError for a file of another manifest, DataError if it is damaged, if shard or index changed
    since, or if its metadata differ in `more`.
    """
    try:
        file = safe_open(path, framework="numpy")
        metadata = read_metadata(file)
        held = file.keys()
        tables = {name: file.get_tensor(name) for name in tables_of(held)}
        known = FORMAT_OF_LATENTS if LATENT_TABLE in held else FORMAT
        _check(path, metadata, known, stamp, shard, plan, manifest_hash, more)
        if metadata["tables_crc32"] != crc_of(*tables.values()):
            raise ValueError("crc32 of its tables differs")
        ids, positions = file.get_slice("ids"), file.get_slice("positions")
        latents = file.get_slice("latents") if "latents" in held else None
        block = TokenBlock(tables, ids, positions, latents, where=str(path))
        tokens = int(tables["document_offsets"][-1])
        if ids.get_shape() != [tokens] or positions.get_shape() != [tokens, 4]:
            raise ValueError("its tables and tokens disagree")
        if latents is not None and latents.get_shape() != [int(tables[LATENT_TABLE][-1])]:
            raise ValueError("its tables and latents disagree")
    except (SafetensorError, OSError, ValueError, KeyError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DamagedTokens("damaged token cache", where=str(path), why=why, fix=FIX_DAMAGED) from None
    return block


class DamagedTokens(DataError):
    """A file of tokens that is not what was written."""


def _check(
    path: Path,
    metadata: dict[str, Any],
    known: str,
    stamp: Stamp | None,
    shard: Shard,
    plan: Sequence[str],
    manifest_hash: str,
    more: dict[str, Any],
) -> None:
    if metadata.get("format") != known:
        raise ValueError(f"format {metadata.get('format')!r}, known {known!r}")
    if metadata["manifest"] != manifest_hash:
        raise other_vocabulary(path, str(metadata["manifest"]), manifest_hash, folder=path.parent)
    if metadata["plan"] != list(plan):
        raise ValueError(f"it was made for the plan {metadata['plan']}")
    stamp = stamp or stamp_of(shard)
    if (metadata["shard_size"], metadata["index_crc32"]) != (stamp.size, stamp.index_crc32):
        raise DataError(
            "stale token cache",
            where=str(path),
            why=f"{stamp.name} or its index changed since",
            fix=f"{FIX} again",
        )
    for name, value in more.items():
        if metadata.get(name) != value:
            raise ValueError(f"its {name} is {metadata.get(name)}, not {value}")
