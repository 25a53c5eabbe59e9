"""Records of shards as the tokenizers are fitted to them: `{modality: iterable of members}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ringweave.launch.data_sources import shards_in, source_of
from ringweave.tokenizers.errors import DataError


class Records:
    """Re-iterable records of some shards: each pass yields `dict[extension, bytes]` in order."""

    def __init__(self, shards: list[Path]) -> None:
        self.shards = shards

    def __iter__(self) -> Any:
        from ringweave.data_pipes.store import reader_of

        for shard in self.shards:
            with reader_of(shard) as reader:
                for i in range(len(reader)):
                    yield reader.read(i).members

    def __len__(self) -> int:
        from ringweave.data_pipes.store import index_of

        return sum(index_of(shard).count for shard in self.shards)

    def spread(self, count: int) -> Iterator[tuple[Path, int, Any]]:
        """(shard, number in it, its Sample or the DataError of reading it) of `count` records, evenly spread."""
        from ringweave.data_pipes.store import index_of, reader_of

        sizes = [index_of(shard).count for shard in self.shards]
        last, many = sum(sizes) - 1, min(count, sum(sizes))
        # No numpy: the command line must not wait for it before a config is checked.
        places = [round(i * last / max(1, many - 1)) for i in range(many)]
        first = 0
        for shard, size in zip(self.shards, sizes):
            inside = [place - first for place in places if first <= place < first + size]
            first += size
            if not inside:
                continue
            with reader_of(shard) as reader:
                for number in inside:
                    try:
                        yield shard, number, reader.read(number)
                    except DataError as error:
                        yield shard, number, error


def records_by_source(folder: Path, split: str) -> dict[str, Records]:
    """`{source: records}` of the shards `<source>-<split>-*.tar` in `folder`, sources in order of name."""
    groups: dict[str, list[Path]] = {}
    for shard in shards_in(folder):
        if f"-{split}-" in shard.name:
            groups.setdefault(source_of(shard), []).append(shard)
    if not groups:
        raise DataError(
            f"no {split} shards", where=str(folder), why=f"none is named <source>-{split}-0000.tar"
        )
    return {name: Records(shards) for name, shards in sorted(groups.items())}


class PlannedRecords:
    """Records of sources of one modality, as their plans read them: text is in `txt`, whatever member it is from.

    A record that its plan cannot be applied to is empty, so that it counts as skipped.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Any, tuple[str, ...]]] = []  # (shard, plan)

    def __iter__(self) -> Iterator[Mapping[str, bytes]]:
        from ringweave.data_pipes.store import reader_of

        for shard, plan in self.parts:
            with reader_of(shard) as reader:
                for i in range(len(reader)):
                    sample = reader.read(i)
                    try:
                        yield _as_planned(sample, plan)
                    except DataError:
                        yield {}


def _as_planned(sample: Any, plan: tuple[str, ...]) -> dict[str, bytes]:
    from ringweave.data_pipes.formats import field_value, load_json, member_of, record_fields, text_of
    from ringweave.data_pipes.plan_items import parse_entry

    words: list[str] = []
    members = {ext: data for ext, data in sample.members.items() if ext not in ("txt", "json")}
    for text in plan:
        entry = parse_entry(text)
        if entry.item in ("text", "caption"):
            words.append(text_of(sample, entry))
        elif entry.item == "fields":
            where = f"{sample.where}:json"
            record = load_json(member_of(sample, "fields", ("json",)), where=where)
            for field, _ in record_fields(record, entry.argument, key=sample.key, where=where):
                value = field_value(record, field, where=where)
                words += [value] if isinstance(value, str) else []
        elif entry.argument and entry.item != "latents":
            ending = entry.argument.rpartition(".")[2]
            members = {ending: member_of(sample, entry.text, (entry.argument,))}
    return members | ({"txt": "\n".join(words).encode()} if words else {})


def records_by_modality(config: Path, *, heldout: bool = False) -> dict[str, PlannedRecords]:
    """`{modality: records}` of the sources of a config, by what their plans hold beside text."""
    from ringweave.data_pipes.formats import resolve_plan
    from ringweave.data_pipes.plan_items import WORDS, parse_entry, read_by_view
    from ringweave.data_pipes.shard_names import address_of
    from ringweave.pretrain.config import load_config
    from ringweave.pretrain.data_store import source_shards, store_of_data

    data = load_config(config).data
    store = store_of_data(data)
    groups: dict[str, PlannedRecords] = {}
    taken: set[tuple[str, str]] = set()
    # Tasks read the same layers: each shard once, with its captions if any of them has some.
    for source in sorted(data.sources, key=lambda source: not _has(source.plan, WORDS)):
        entries = [parse_entry(entry) for entry in source.plan]
        media = [
            read_by_view(e.argument) if e.item == "latents" else e.item
            for e in entries
            if e.item not in (*WORDS, "fields")
        ] or ["text"]
        for shard in source_shards(data, source, store, heldout=heldout):
            for modality in dict.fromkeys(media):
                if _has(source.plan, ("latents",)) and (modality, address_of(shard)) in taken:
                    continue
                taken.add((modality, address_of(shard)))
                plan = resolve_plan(source.plan, data.dir)
                groups.setdefault(modality, PlannedRecords()).parts.append((shard, plan))
    return dict(sorted(groups.items()))


def _has(plan: tuple[str, ...], items: tuple[str, ...]) -> bool:
    from ringweave.data_pipes.plan_items import parse_entry

    return any(parse_entry(entry).item in items for entry in plan)
