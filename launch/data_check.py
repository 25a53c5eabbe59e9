"""`ringweave data check`: every byte against its index, and on request every member through its decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringweave.launch.data_sources import name_of, source_of
from ringweave.tokenizers.errors import DataError

if TYPE_CHECKING:
    from ringweave.data_pipes.shard_names import Shard

Report = Callable[[str, int, int], None]
_TEXTS = ("txt", "cls", "md", "xml", "musicxml")


@dataclass
class SourceRow:
    """One line of the table: what the shards of a source hold, and what is wrong with them."""

    source: str
    shards: int = 0
    samples: int = 0
    tokens: int | None = None
    bytes: int = 0
    damaged: int = 0
    undecodable: int = 0
    problems: list[DataError] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "shards": self.shards,
            "samples": self.samples,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "damaged": self.damaged,
            "undecodable": self.undecodable,
        }


def check_shards(shards: Sequence[Shard], *, decode: bool, progress: Report | None = None) -> list[SourceRow]:
    """Checks shards one after the other and goes on after damage. One row a source, in order of name.

    decode: also decodes every member whose ending is known, and parses json members strictly.
    """
    from ringweave.data_pipes.reader import check_shard

    rows: dict[str, SourceRow] = {}
    for done, shard in enumerate(shards, 1):
        if progress is not None:
            progress(f"checking {name_of(shard)}", done - 1, len(shards))
        row = rows.setdefault(source_of(shard), SourceRow(source_of(shard)))
        row.shards += 1
        try:
            found = check_shard(shard)
        except DataError as error:
            found = [error]
        row.damaged += len(found)
        row.problems += found
        _count(shard, row)
        if decode:
            inside = [error for error in _undecodable(shard) if error.render() not in _texts(found)]
            row.undecodable += len(inside)
            row.problems += inside
        if progress is not None:
            progress(f"checking {name_of(shard)}", done, len(shards))
    return [rows[name] for name in sorted(rows)]


def _texts(errors: list[DataError]) -> set[str]:
    return {error.render() for error in errors}


def _count(shard: Shard, row: SourceRow) -> None:
    """Adds what is known of a shard without reading it again; a broken index counts for nothing."""
    from ringweave.data_pipes.store import index_of

    try:
        index = index_of(shard)
    except DataError:
        return
    row.samples += index.count
    row.bytes += index.shard_size
    tokens = cached_tokens(shard)
    if tokens is not None:
        row.tokens = (row.tokens or 0) + tokens


def cached_tokens(shard: Shard) -> int | None:
    """Tokens in the newest token cache beside a shard, None without one. Only its header is read."""
    from safetensors import SafetensorError, safe_open

    from ringweave.data_pipes.shard_names import local_path

    path = local_path(shard)
    if path is None:
        return None
    stem = path.name.partition(".tar")[0]
    caches = sorted(path.parent.glob(f"{stem}.tokens-*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
    for cache in reversed(caches):
        try:
            return int(safe_open(cache, framework="numpy").get_slice("ids").get_shape()[0])
        except (SafetensorError, OSError, IndexError):
            continue
    return None


def _undecodable(shard: Shard) -> Iterator[DataError]:
    """What is wrong inside the members of a shard; members that cannot be read were reported before."""
    from ringweave.data_pipes.reader import ShardReader

    try:
        reader = ShardReader(shard)
    except DataError:
        return
    with reader:
        for i in range(len(reader)):
            try:
                sample = reader.read(i)
            except DataError:
                continue
            for ext, data in sample.members.items():
                try:
                    decode_member(ext, data, where=f"{sample.where}:{ext}")
                except DataError as error:
                    yield error


def decode_member(ext: str, data: bytes, *, where: str) -> Any:
    """The value of a member by its ending, None for one of an unknown ending. Raises DataError."""
    from ringweave.data_pipes.embeddings import MEMBER, read_embeddings
    from ringweave.data_pipes.formats import load_json
    from ringweave.data_pipes.plan_items import CLIPS, PICTURES, SOUNDS
    from ringweave.tokenizers import media

    ending = ext.rpartition(".")[2]
    if ending in PICTURES:
        return media.decode_image(data, where=where)
    if ending in SOUNDS:
        return media.decode_audio(data, where=where)
    if ending in CLIPS:
        return media.decode_video(data, where=where)
    if ext == MEMBER:
        return read_embeddings(data, where=where)
    if ending == "json":
        return load_json(data, where=where)
    if ending in _TEXTS:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError("text is not UTF-8", where=where, why=str(error)) from None
    return None


def check_jsonl(path: Path, *, fields: str) -> SourceRow:
    """The same for a JSONL file: every line parsed, and its fields held against `fields`."""
    from ringweave.data_pipes.jsonl import check_line, read_lines

    row = SourceRow(path.stem, shards=1)
    for line in read_lines(path):
        row.samples += 1
        row.bytes += len(line.data) + 1
        try:
            check_line(line, path, fields, key=line.key(path.stem))
        except DataError as error:
            row.damaged += 1
            row.problems.append(error)
    return row
