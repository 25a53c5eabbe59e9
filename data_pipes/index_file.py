"""The sidecar beside a shard, as bytes: format 2 (columns in safetensors) and, to be read only, format 1 (JSON).

Format 2, `X.tar.idx`, with n samples and m members:

    keys         uint8          the n keys, UTF-8, a line feed between two
    key_hash     uint64 [n]     blake2b of each key, 8 bytes: finds keys that two shards share without reading them
    starts       int64  [n + 1] first member of each sample
    offsets      int64  [m]     where the member's data begin
    sizes        int64  [m]     bytes of data
    crc32        uint32 [m]     of the data
    header_crc32 uint32 [m]     of the 512 bytes before the data
    extension    uint16 [m]     number in the list `extensions`
    header_names uint8          JSON {member: name}: names in those 512 bytes that are not `key.extension`
    media        int64  [n, 4]  optional: width, height, frames, milliseconds of the sample's medium (0: unknown)

The metadata hold one JSON object under `ringweave`: format, shard_size (bytes), version (etag of a remote shard,
"" for a local one), extensions, made (policies, what was left out), content_crc32 (identity of the content, see
`content_crc`; not in files of earlier versions), and crc32 over all of these and the columns.

Format 1, `X.tar.idx.json`: {"format", "shard_size", "count", "crc32", "samples": [{"key", "members": [[ext, offset,
size, crc32, name in the header if it is not key.ext], ...]}]}.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ringweave.data_pipes.checksum import crc32
from ringweave.data_pipes.tar import BLOCK

FORMAT = "ringweave-shard-index/2"
FORMAT_1 = "ringweave-shard-index/1"
_METADATA = "ringweave"
_TYPES = {
    "keys": np.uint8,
    "key_hash": np.uint64,
    "starts": np.int64,
    "offsets": np.int64,
    "sizes": np.int64,
    "crc32": np.uint32,
    "header_crc32": np.uint32,
    "extension": np.uint16,
    "header_names": np.uint8,
    "media": np.int64,
}
_MAX_HEADER = 1 << 26
Columns = dict[str, NDArray[Any]]


def crc_of(parts: Iterable[bytes | NDArray[Any]]) -> int:
    """crc32 over some byte strings and the little-endian bytes of some arrays."""
    value = 0
    for part in parts:
        value = crc32(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes(), value)
    return value


def content_crc(columns: Columns, extensions: Sequence[str]) -> int:
    """crc32 that changes whenever a key, an extension, a place or a payload crc does, and with nothing else."""
    fixed = [columns[name] for name in ("starts", "offsets", "sizes", "crc32", "extension")]
    kinds = (np.int64, np.int64, np.int64, np.uint32, np.uint16)
    names = "\n".join(extensions).encode("utf-8")
    return crc_of([columns["keys"], names, *(a.astype(k, copy=False) for a, k in zip(fixed, kinds))])


def read_identity(head: bytes) -> tuple[int, int] | int | None:
    """(bytes of the shard, content_crc32) out of the first bytes of a sidecar, without its columns.

    The number of bytes that it takes, if `head` holds fewer; None if they do not tell (format 1, an earlier version,
    damage): then the index has to be loaded.
    """
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or not 2 <= length <= _MAX_HEADER:
        return None
    if len(head) < 8 + length:
        return 8 + length
    try:
        about = json.loads(json.loads(head[8 : 8 + length])["__metadata__"][_METADATA])
        if about["format"] != FORMAT:
            return None
        size, crc = about["shard_size"], about["content_crc32"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (size, crc) if type(size) is int and type(crc) is int else None


def pack_index(columns: Columns, about: dict[str, Any]) -> bytes:
    """The bytes of a sidecar of format 2: the same for the same columns and metadata."""
    arrays = {name: np.ascontiguousarray(columns[name], _TYPES[name]) for name in _TYPES if name in columns}
    about = {"format": FORMAT, **about}
    about["crc32"] = crc_of([_canonical(about), *(arrays[name] for name in sorted(arrays))])
    return save(arrays, metadata={_METADATA: json.dumps(about)})


def parse_index(data: bytes) -> tuple[Columns, dict[str, Any]]:
    """Columns and metadata of a sidecar of either format. Raises ValueError for anything that is not sound."""
    try:
        columns, about = _parse_2(data) if data[:1] != b"{" else _parse_1(data)
        _check(columns, about)
    except (SafetensorError, KeyError, TypeError, IndexError, RecursionError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return columns, about


def _canonical(about: dict[str, Any]) -> bytes:
    return json.dumps({k: v for k, v in about.items() if k != "crc32"}, sort_keys=True).encode()


def _parse_2(data: bytes) -> tuple[Columns, dict[str, Any]]:
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(len(data) - 8, _MAX_HEADER):
        raise ValueError("its header is damaged")
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"][_METADATA])
    if about["format"] != FORMAT:
        raise ValueError(f"format is {about['format']!r}")
    columns: Columns = load(data)
    for name, array in columns.items():
        if name not in _TYPES or array.dtype != _TYPES[name]:
            raise ValueError(f"column {name!r} of {array.dtype}")
    if about["crc32"] != crc_of([_canonical(about), *(columns[name] for name in sorted(columns))]):
        raise ValueError("its crc32 does not match its columns")
    return columns, about


def _check(columns: Columns, about: dict[str, Any]) -> None:
    """Shapes and bounds, so that nothing downstream can be led outside the shard or the columns."""
    size, starts, offsets, sizes = (
        about["shard_size"],
        columns["starts"],
        columns["offsets"],
        columns["sizes"],
    )
    members, exts = len(offsets), about["extensions"]
    if type(size) is not int or not isinstance(about["version"], str):
        raise ValueError("shard_size is not a whole number, or version not a string")
    if not isinstance(exts, list) or not all(isinstance(e, str) and e for e in exts):
        raise ValueError("extensions is not a list of names")
    for name in ("sizes", "crc32", "header_crc32", "extension"):
        if name in columns and columns[name].shape != (members,):
            raise ValueError(f"column {name} has shape {columns[name].shape}, members {members}")
    rising = (
        len(starts) > 0 and starts[0] == 0 and starts[-1] == members and bool((np.diff(starts) > 0).all())
    )
    if starts.ndim != 1 or offsets.ndim != 1 or not rising:
        raise ValueError("a sample has no members, or starts does not rise to the number of members")
    if members and not (
        sizes.min() >= 0 and offsets.min() >= BLOCK and bool((offsets <= size - sizes).all())
    ):
        raise ValueError("a member lies outside the shard")
    if members and int(columns["extension"].max()) >= len(exts):
        raise ValueError("a member's extension is not in the list")
    keys = columns["keys"].tobytes().decode("utf-8")
    if (keys.count("\n") + 1 if members else 0) != len(starts) - 1:
        raise ValueError("the number of keys is not the number of samples")
    if "media" in columns and columns["media"].shape != (len(starts) - 1, 4):
        raise ValueError(f"column media has shape {columns['media'].shape}")


def _parse_1(data: bytes) -> tuple[Columns, dict[str, Any]]:
    """JSON text -> columns. Any departure from the format is a ValueError, KeyError or TypeError."""
    raw = json.loads(data.decode("utf-8"))
    if raw["format"] != FORMAT_1:
        raise ValueError(f"format is {raw['format']!r}")
    keys: list[str] = []
    starts = [0]
    rows: list[tuple[int, int, int, int]] = []
    names: dict[int, str] = {}
    known: dict[str, int] = {}
    for sample in raw["samples"]:
        key = sample["key"]
        for ext, offset, length, crc, *rest in sample["members"]:
            if len(rest) > 1 or not all(isinstance(s, str) and "\n" not in s for s in (key, ext, *rest)):
                raise ValueError(f"bad member row of sample {key!r}")
            if not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, length, crc)) or crc >= 1 << 32:
                raise ValueError(f"bad numbers for member {ext!r} of sample {key!r}")
            if rest:
                names[len(rows)] = rest[0]
            rows.append((offset, length, crc, known.setdefault(ext, len(known))))
        keys.append(key)
        starts.append(len(rows))
    compact = [{"key": s["key"], "members": s["members"]} for s in raw["samples"]]
    if raw["count"] != len(keys) or raw["crc32"] != crc32(
        json.dumps(compact, separators=(",", ":")).encode()
    ):
        raise ValueError("its count or crc32 does not match its samples")
    table = np.asarray(rows, np.int64).reshape(-1, 4)
    columns: Columns = {
        "keys": np.frombuffer("\n".join(keys).encode("utf-8"), np.uint8),
        "starts": np.asarray(starts, np.int64),
        "offsets": table[:, 0].copy(),
        "sizes": table[:, 1].copy(),
        "crc32": table[:, 2].astype(np.uint32),
        "extension": table[:, 3].astype(np.uint16),
        "header_names": np.frombuffer(json.dumps(names).encode(), np.uint8),
    }
    about = {
        "shard_size": raw["shard_size"],
        "version": "",
        "extensions": list(known),
        "made": {"format": FORMAT_1},
    }
    return columns, about
