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


#: Names of sources that say what is in them.
NAMED = ("text", "image", "rgba", "video", "audio", "score", "symbolic", "midi")


def latents_by_source(groups: Mapping[str, Records]) -> dict[str, Records]:
    """Of `records_by_source`, those that an autoencoder of layers learns from.

    "rgba", "image" and, of other names than those of modalities, sources whose first record holds layers or a picture.
    """
    from ringweave.tokenizers.members import PICTURES, has_layers

    found = {}
    for name, records in groups.items():
        if name in NAMED:
            if name in ("rgba", "image"):
                found[name] = records
            continue
        first: Mapping[str, bytes] = next(iter(records), {})
        if has_layers(first) or any(ending in first for ending in (*PICTURES, "flat.png")):
            found[name] = records
    return found


def by_content(groups: Mapping[str, Records]) -> dict[str, Records]:
    """`records_by_source` as it is; where no source is named after a modality, under what their first records hold."""
    from ringweave.tokenizers.members import CLIPS, PICTURES, SOUNDS, has_layers

    if any(name in NAMED for name in groups):
        return dict(groups)
    found: dict[str, Records] = {}
    endings = (("image", (*PICTURES, "flat.png")), ("video", CLIPS), ("audio", SOUNDS), ("text", ("txt",)))
    for records in groups.values():
        first: Mapping[str, bytes] = next(iter(records), {})
        kinds = [kind for kind, wanted in endings if any(ending in first for ending in wanted)]
        kind = "rgba" if has_layers(first) else next(iter(kinds), "")
        if kind:
            found.setdefault(kind, Records([])).shards.extend(records.shards)
    return found or dict(groups)


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
    from ringweave.tokenizers.members import is_layer

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
        elif entry.item == "embeddings":
            continue
        elif entry.argument and (entry.item != "latents" or "." in entry.argument):  # no view has a dot
            ending = entry.argument.rpartition(".")[2]
            kept = members if entry.item == "latents" else {}  # its layers may be in the plan too
            members = {name: data for name, data in kept.items() if is_layer(name)}
            members[ending] = member_of(sample, entry.text, (entry.argument,))
    return members | ({"txt": "\n".join(words).encode()} if words else {})


class LatentRecords:
    """Re-iterable records of one source as its plan's latents read them: `{}` for one that has not what they name.

    parts: (shard, members in the order they are looked for, of which the first that is there is read). No members
    stand for all layers.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Any, tuple[str, ...]]] = []

    def __iter__(self) -> Iterator[Mapping[str, bytes]]:
        from ringweave.data_pipes.store import reader_of
        from ringweave.tokenizers.members import is_layer

        for shard, wanted in self.parts:
            with reader_of(shard) as reader:
                for i in range(len(reader)):
                    members = reader.read(i).members
                    names = [name for name in wanted if name in members][:1]
                    if wanted:
                        yield {name.rpartition(".")[2]: members[name] for name in names}
                    else:
                        yield {name: data for name, data in members.items() if is_layer(name)}


def latents_of_config(config: Path, *, heldout: bool = False) -> dict[str, LatentRecords]:
    """`{source: records}` of what an autoencoder of layers learns from: whatever the plans of a config read as latents,
    and their layers and pictures that become ids. Sources that read the same of a shard count once."""
    from ringweave.data_pipes.plan_items import WORDS, parse_entry
    from ringweave.data_pipes.shard_names import address_of
    from ringweave.pretrain.config import load_config
    from ringweave.pretrain.data_store import source_shards, store_of_data

    data = load_config(config).data
    store = store_of_data(data)
    groups: dict[str, LatentRecords] = {}
    taken: set[tuple[tuple[str, ...], str]] = set()
    for source in sorted(data.sources, key=lambda source: not _has(source.plan, WORDS)):
        wanted = [_read_as_pixels(parse_entry(entry)) for entry in source.plan]
        for shard in source_shards(data, source, store, heldout=heldout):
            for members in wanted:
                if members is not None and (members, address_of(shard)) not in taken:
                    taken.add((members, address_of(shard)))
                    groups.setdefault(source.name, LatentRecords()).parts.append((shard, members))
    return groups


def _read_as_pixels(entry: Any) -> tuple[str, ...] | None:
    """Members that hold the pictures or clips of an entry (none: all layers); None for entries of other things."""
    from ringweave.data_pipes.plan_items import CLIPS, PICTURES, read_by_view

    pictures, view = (*PICTURES, "flat.png"), entry.argument
    if entry.item == "latents":
        kind = read_by_view(view)
        if kind == "rgba":
            return ()
        return (pictures if kind == "image" else CLIPS) if view == kind else (view,)
    if entry.item == "rgba":
        return ()
    return ((view,) if view else pictures) if entry.item == "image" else None


def records_by_modality(config: Path, *, heldout: bool = False) -> dict[str, PlannedRecords]:
    """`{modality: records}` of the sources of a config, by what their plans hold beside text."""
    from ringweave.data_pipes.formats import resolve_plan
    from ringweave.data_pipes.plan_items import NO_MEDIA, WORDS, parse_entry, read_by_view
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
            if e.item not in NO_MEDIA
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
