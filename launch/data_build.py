"""`ringweave data build --folder|--jsonl`: the facts for people, and the lines to paste into a config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ringweave.launch.console import Output, Progress
from ringweave.tokenizers.errors import DataError, printable

_SHOWN = 10


def build_source(
    source: Path | None,
    out: Path,
    *,
    lines: bool,
    fields: str,
    name: str,
    shard_bytes: int,
    heldout: float,
    max_skip_rate: float,
    progress: Progress,
) -> dict[str, Any]:
    """Makes the shards; see `data_pipes.folder`. Adds "name", "plan" and "config" (YAML) to its facts."""
    from ringweave.data_pipes.folder import build_from_folder, build_from_jsonl

    assert source is not None
    if lines and not source.is_file():
        raise DataError("no such file", where=str(source), fix="give a JSONL file")
    if not lines and not source.is_dir():
        raise DataError("no such folder", where=str(source), fix="give a folder of files")
    stem = source.resolve().name if not lines else source.name.partition(".")[0]
    name = name or re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "data"
    if lines:
        facts = build_from_jsonl(
            source, out, name=name, fields=fields, shard_bytes=shard_bytes, heldout=heldout,
            max_skip_rate=max_skip_rate, progress=progress,
        )  # fmt: skip
    else:
        facts = build_from_folder(
            source, out, name=name, shard_bytes=shard_bytes, heldout=heldout, progress=progress
        )
    plan = _plan(out / facts["shards"][0], facts["members"], fields if lines else "")
    return {"name": name, **facts, "plan": list(plan), "config": _config(out, name, facts["shards"], plan)}


def _plan(shard: Path, members: dict[str, int], fields: str) -> tuple[str, ...]:
    """A plan that fits the first sample."""
    from ringweave.data_pipes.formats import guess_plan, load_json
    from ringweave.data_pipes.reader import ShardReader

    if fields:
        return (f"fields:{fields}",)
    record = None
    with ShardReader(shard) as reader:
        sample = reader.read(0)
    if "json" in sample.members:
        try:
            record = load_json(sample.members["json"], where=sample.where)
        except DataError:
            record = None
    return guess_plan(members, record)


def _config(out: Path, name: str, shards: list[str], plan: tuple[str, ...]) -> str:
    """The `data` section that reads these shards."""

    def pattern(split: str) -> str:
        numbers = [shard for shard in shards if shard.startswith(f"{name}-{split}-")]
        last = numbers[-1].removesuffix(".tar").rpartition("-")[2] if numbers else ""
        return f"{name}-{split}-{{0000..{last}}}.tar" if len(numbers) > 1 else (numbers or [""])[0]

    entries = ", ".join(f'"{entry}"' for entry in plan) or '"?"'
    heldout = f', heldout: "{pattern("heldout")}"' if pattern("heldout") else ""
    return (
        f'data:\n  dir: {out}\n  sources:\n    - {{name: {name}, shards: "{pattern("train")}"{heldout}, '
        f"plan: [{entries}]}}"
    )


def report(printer: Output, out: Path, made: dict[str, Any]) -> None:
    """What was written and left out, and what to do next."""
    members = ", ".join(f"{ext} {count:,}" for ext, count in made["members"].items())
    printer.say(f"wrote {out}: {len(made['shards'])} shards, {made['bytes'] / 1e6:,.2f} MB")
    printer.say(f"  samples: {made['samples']:,} to train on, {made['heldout']:,} held out")
    printer.say(f"  members: {members}")
    if made["hidden"]:
        printer.say(f"  hidden files left out: {made['hidden']}")
    if made["skipped"]:
        printer.say(f"  skipped: {len(made['skipped'])}")
        for entry in made["skipped"][:_SHOWN]:
            place = entry.get("file") or f"line {entry['line']} @{entry['offset']}"
            printer.say(printable(f"    {place!s}: {entry['reason']}").replace("\n", " "))
        if len(made["skipped"]) > _SHOWN:
            printer.say(f"    ... and {len(made['skipped']) - _SHOWN} more (--json lists all)")
    if made["plan"]:
        printer.say("\nIn the config:\n\n" + made["config"] + "\n")
    else:
        printer.say("\nNo member is of a known kind: write a plan for it (docs/data.md, Plans).")
    printer.say(f"Next: ringweave data check {out} --decode; ringweave data show {out} --out sheet.html")
