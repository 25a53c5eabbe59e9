"""The index beside each shard: where every member lies, how long it is and its crc32.

A shard is a WebDataset tar (`key.ext`, members of a sample adjacent; the rule and its edges: `grouping.py`).
`build_index` walks all of it (`tar.py`) and refuses what it does not fully understand. The result is stored as
`X.tar.idx` (`index_file.py`) and is a function of the shard's bytes alone, so that a copied pair stays valid.

Stale indexes are refused by name. Size counts everywhere. A local file's time does not count: it changes with a
copy, and every read checks the crc32 of what it reads. A remote shard's etag counts where both the index and the
store know one.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ringweave.data_pipes.compression import codec_of_shard
from ringweave.data_pipes.grouping import Groups, Policy, describe, group
from ringweave.data_pipes.index_columns import MemberEntry, SampleEntry, ShardIndex, hash_keys
from ringweave.data_pipes.index_file import FORMAT, Columns, parse_index
from ringweave.data_pipes.storage import ByteSource, LocalFile, open_source, redact
from ringweave.data_pipes.tar import LocalBytes, Members, Walk
from ringweave.tokenizers.errors import DataError

if TYPE_CHECKING:
    from ringweave.data_pipes.store import Store

__all__ = [
    "MemberEntry",
    "SampleEntry",
    "ShardIndex",
    "build_index",
    "index_folder",
    "index_path",
    "load_index",
    "shard_files",
    "shard_name",
    "write_index",
]

_SUFFIX = ".idx"
_MAX_EXTENSIONS = 1 << 16


def index_path(shard: Path) -> Path:
    """`X.tar` -> `X.tar.idx`, or the `X.tar.idx.json` of an earlier version while only that is there."""
    path, earlier = shard.with_name(shard.name + _SUFFIX), shard.with_name(shard.name + _SUFFIX + ".json")
    return earlier if earlier.is_file() and not path.is_file() else path


def build_index(
    shard: Path | str | ByteSource,
    *,
    hidden: Literal["refuse", "skip"] = "refuse",
    interleaved: Literal["refuse", "regroup"] = "refuse",
    dotted: Literal["refuse", "keep"] = "refuse",
    tail: Literal["refuse", "quarantine"] = "refuse",
    probe: bool = False,
) -> ShardIndex:
    """Walk every header and payload of a shard and return its index (nothing is written).

    shard: a path, a URL or an open byte source. hidden, interleaved, dotted: see `grouping.py`. tail: what to do
    with a shard that is damaged or ends early; "quarantine" keeps the samples that are whole before the damage
    (`made["quarantined"]` says what was lost and why). probe: also read sizes and durations of media.

    Raises DataError for a missing file and for anything in it that is not a plain, whole, well-formed shard:
    wrong header checksum, truncation, missing end of archive, links, devices, unsafe names, a repeated member, a
    sample whose members are not adjacent.
    """
    policy = Policy(hidden, interleaved, dotted)
    where = shard_name(shard)
    if isinstance(shard, Path | str) and codec_of_shard(where) is not None:
        why, fix = (
            "compressed shards have no random access",
            "unpack it, or list it in a config: it is unpacked once",
        )
        raise DataError("compressed shard", where=where, why=why, fix=fix)
    try:
        source: Any = LocalBytes(Path(str(shard))) if _is_local(shard) else _open(shard)
    except OSError as error:
        raise DataError("cannot read shard", where=where, why=str(error), fix="check the path") from None
    try:
        walk = Walk(source, where, describe=describe)
        lost: dict[str, Any] = {}
        try:
            members = walk.run()
        except DataError as error:
            if tail == "refuse" or interleaved == "regroup":
                raise
            members, lost = _before_damage(walk, error)
        groups = group(members, policy, walk.error)
        made: dict[str, Any] = {"policy": {"hidden": hidden, "interleaved": interleaved, "dotted": dotted}}
        made |= {"skipped": groups.skipped} if groups.skipped else {}
        made |= {"quarantined": lost} if lost else {}
        version = "" if _is_local(shard) else _version_of(source)
        columns = _columns(members, groups, walk)
        index = ShardIndex(
            columns,
            {"shard_size": walk.size, "version": version, "extensions": groups.extensions, "made": made},
        )
        if probe:
            from ringweave.data_pipes.media_probe import probe_shard

            columns["media"] = probe_shard(index, source)
    except OSError as error:
        raise DataError("cannot read shard", where=where, why=str(error), fix="check the path") from None
    finally:
        if _is_local(shard) or isinstance(shard, str):
            source.close()
    return index


def _before_damage(walk: Walk, error: DataError) -> tuple[Members, dict[str, Any]]:
    """The members of the samples that are surely whole: all but those of the last key."""
    members = walk.members
    keys = [describe(name).rpartition("/")[0] for name in members.names]
    whole = len(keys)
    while whole and keys[whole - 1] == keys[-1]:
        whole -= 1
    dropped = members.names[whole:]
    for column in (members.names, members.offsets, members.sizes, members.crc32, members.header_crc32):
        del column[whole:]
    members.headers = {number: name for number, name in members.headers.items() if number < whole}
    return members, {"why": error.why, "where": error.where.rpartition(" ")[2], "members": dropped}


def _columns(members: Members, groups: Groups, walk: Walk) -> Columns:
    """The columns of a shard, members in the order of the samples."""
    if len(groups.extensions) >= _MAX_EXTENSIONS:
        why = f"{len(groups.extensions)} different extensions: the names are probably not key.extension"
        raise walk.error(why, 0, fix="rename the members and write the shard again")
    order = groups.order
    columns: Columns = {
        "keys": np.frombuffer("\n".join(groups.keys).encode("utf-8"), np.uint8),
        "key_hash": hash_keys(groups.keys),
        "starts": groups.starts,
        "extension": groups.extension_ids.astype(np.uint16),
    }
    for name, column, kind in (
        ("offsets", members.offsets, np.int64),
        ("sizes", members.sizes, np.int64),
        ("crc32", members.crc32, np.uint32),
        ("header_crc32", members.header_crc32, np.uint32),
    ):
        array = np.asarray(column, kind)
        columns[name] = array if order is None else array[order]
    odd = _odd_headers(members, groups)
    if odd:
        columns["header_names"] = np.frombuffer(json.dumps(odd).encode(), np.uint8)
    return columns


def _odd_headers(members: Members, groups: Groups) -> dict[int, str]:
    """Member -> name in its tar header, where that is not `key.ext`."""
    order = groups.order
    if groups.exact and not members.headers:
        return {}
    exts = [groups.extensions[i] for i in groups.extension_ids.tolist()]
    keys = itertools.chain.from_iterable(map(itertools.repeat, groups.keys, np.diff(groups.starts).tolist()))
    expected = map("{}.{}".format, keys, exts)
    walked = range(len(members)) if order is None else order.tolist()
    names = [members.headers.get(i, members.names[i]) for i in walked]
    return {at: name for at, (name, wanted) in enumerate(zip(names, expected)) if name != wanted}


def _is_local(shard: Path | str | ByteSource) -> bool:
    return isinstance(shard, Path) or (isinstance(shard, str) and "://" not in shard)


def _open(shard: Path | str | ByteSource) -> ByteSource:
    """A source as it is, a URL opened with the usual options."""
    return open_source(shard) if isinstance(shard, str | Path) else shard


def shard_name(shard: Path | str | ByteSource) -> str:
    """How messages name a shard: a path as it is, a URL without its secrets."""
    if isinstance(shard, Path) or _is_local(shard):
        return str(shard)
    return redact(shard)


def write_index(shard: Path, index: ShardIndex) -> Path:
    """Store the index beside the shard: temporary file, fsync, rename. Returns the sidecar's path.

    A sidecar of format 1 is taken away afterwards: two of them could disagree.
    """
    target = shard.with_name(shard.name + _SUFFIX)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(index.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    target.with_name(target.name + ".json").unlink(missing_ok=True)
    return target


def load_index(
    shard: Path | str | ByteSource, *, sidecar: Path | str | ByteSource | None = None
) -> ShardIndex:
    """The index of a shard, checked against the shard's size (and etag, where both are known).

    sidecar: where the index lies, if not beside the shard. Raises DataError when the shard is missing, and when
    the index is missing, malformed or stale, with `ringweave data index DIR` as the fix.
    """
    where = shard_name(shard)
    fix = f"run `ringweave data index {Path(where).parent}`"
    if not _is_local(shard):
        fix = "run `ringweave data index DIR` on a copy on disk, and put its .idx files beside the shards"
    if _is_local(shard):
        path = Path(str(shard))
        try:
            size, version = os.stat(path).st_size, ""
        except OSError as error:
            raise DataError("missing shard", where=where, why=str(error), fix="check the path") from None
        sidecar = sidecar if sidecar is not None else index_path(path)
        name = Path(str(sidecar)).name if _is_local(sidecar) else shard_name(sidecar)
        data = _sidecar_bytes(sidecar, where, name, fix)
    else:
        source = _open(shard)
        try:
            size, version = source.size(), _version_of(source)
            sidecar = sidecar if sidecar is not None else source.sibling(_SUFFIX)
            name = shard_name(sidecar)
            data = _sidecar_bytes(sidecar, where, name, fix)
        finally:
            if isinstance(shard, str):
                source.close()
    try:
        index = ShardIndex(*parse_index(data))
    except ValueError as error:
        why = f"not an index of format {FORMAT}: {error}"
        raise DataError("malformed index", where=shard_name(sidecar), why=why, fix=fix) from None
    if index.shard_size != size:
        why = f"it was made for a shard of {index.shard_size} bytes, the shard has {size}"
        raise DataError("stale index", where=f"{where} ({name})", why=why, fix=fix)
    if index.version and version and index.version != version:
        why = f"it was made for version {index.version} of the shard, the store has {version}"
        raise DataError("stale index", where=f"{where} ({name})", why=why, fix=fix)
    return index


def _version_of(source: ByteSource) -> str:
    """The etag of a remote shard; "" for a file, whose time says nothing about its bytes."""
    return "" if isinstance(source, LocalFile) else source.version()


def _sidecar_bytes(sidecar: Path | str | ByteSource, where: str, name: str, fix: str) -> bytes:
    try:
        if _is_local(sidecar):
            return Path(str(sidecar)).read_bytes()
        source = _open(sidecar)
        try:
            return bytes(source.read(0, source.size()))
        finally:
            if isinstance(sidecar, str):
                source.close()
    except FileNotFoundError:
        raise DataError("shard without an index", where=where, why=f"no {name}", fix=fix) from None
    except OSError as error:
        raise DataError("unreadable index", where=shard_name(sidecar), why=str(error), fix=fix) from None
    except DataError as error:
        why = f"{name} cannot be read: {error.what}; {error.why}"
        raise DataError("shard without an index", where=where, why=why, fix=fix) from None


def index_folder(
    folder: Path,
    *,
    rebuild: bool = False,
    store: Store | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> list[Path]:
    """Index every shard of a folder whose index is missing, malformed or stale (all with `rebuild`).

    store: for packed shards, whose indexes lie in its cache. options: those of `build_index`. Returns the sidecars
    written. Raises DataError at the first damaged shard, and for a packed one without a cache; those before it stay
    indexed.
    """
    from ringweave.data_pipes.store import stored

    written: list[Path] = []
    shards = shard_files(folder)
    for done, shard in enumerate(shards, start=1):
        packed = stored(store.shard(shard)) if store is not None else stored(shard)
        if packed is not None:
            made = packed.ensure_index(rebuild=rebuild, **options)
            written += [made] if made is not None else []
        elif rebuild or not _has_index(shard):
            written.append(write_index(shard, build_index(shard, **options)))
        if progress is not None:
            progress(shard.name, done, len(shards))
    return written


def shard_files(folder: Path) -> list[Path]:
    """The shards of a folder by name, packed ones too. Raises DataError for no folder."""
    if not folder.is_dir():
        raise DataError("no such folder", where=str(folder), fix="give the folder that holds the shards")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return [folder / n for n in names if n.endswith(".tar") or codec_of_shard(n) is not None]


def _has_index(shard: Path) -> bool:
    try:
        load_index(shard)
    except DataError:
        return False
    return True
