"""Commands about records: `data build|index|check|show|stats`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringweave.launch.console import JsonOption, Output, Progress
from ringweave.launch.data_records import records_by_source
from ringweave.launch.data_sources import (
    CacheOption,
    brief,
    find_shards,
    load_tokenizers,
    name_of,
    source_of,
    store_for,
)
from ringweave.pretrain.errors import ConfigError, redact
from ringweave.pretrain.units import parse_bytes
from ringweave.tokenizers.errors import DataError, printable

if TYPE_CHECKING:
    from ringweave.data_pipes.shard_names import Shard
    from ringweave.launch.data_check import SourceRow

__all__ = ["data_app", "load_tokenizers", "records_by_source", "register", "source_of"]

data_app = typer.Typer(
    name="data", no_args_is_help=True, help="Build, index, check and look at shards.",
    epilog="Example: ringweave data check runs/demo/data",
)  # fmt: skip

FolderArgument = Annotated[
    str,
    typer.Argument(metavar="DIR", help="Folder (or its URL) that holds the shards: *.tar, or packed ones."),
]
ShardsArgument = Annotated[
    str,
    typer.Argument(metavar="SHARDS", help="A folder, a shard, or a pattern such as DIR/a-{0000..0003}.tar."),
]
#: The other answer to each question about shards that others made (`data_pipes/grouping.py`).
_LENIENT = {"hidden": "skip", "interleaved": "regroup", "dotted": "keep", "tail": "quarantine"}
#: Problems printed for people; `--json` holds all of them.
_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Adds this module's command group to `app`."""
    app.add_typer(data_app)


@data_app.command(
    "build", epilog="Example: ringweave data build data/cats --folder ~/pictures/cats --heldout 0.02"
)
def build(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the shards into.")],
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="Make shards of the files in DIR.")
    ] = None,
    jsonl: Annotated[
        Path | None, typer.Option("--jsonl", metavar="FILE", help="Make shards of the lines of FILE.")
    ] = None,
    fields: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="With --jsonl: what every line must have, as LWM writes it: '[question],answer' "
            "([..]: no loss).",
        ),
    ] = "",
    name: Annotated[str, typer.Option(help="Name of the source; else that of DIR or FILE.")] = "",
    shard_size: Annotated[str, typer.Option(help="Bytes of a shard, as 256MB or 1GiB.")] = "256MB",
    heldout: Annotated[float, typer.Option(help="Share of the samples to hold out, as 0.02.")] = 0.0,
    max_skips: Annotated[
        float, typer.Option(help="With --jsonl: share of bad lines that may be left out.")
    ] = 0.05,
    as_json: JsonOption = False,
) -> None:
    """Make shards of a folder or a JSONL file; without either the demo data, from installed packages."""
    printer = Output(as_json)
    if folder is None and jsonl is None:
        from ringweave.data_pipes.demo import build_demo

        with Progress() as progress:
            facts = build_demo(out, progress=progress)
        printer.say(f"wrote {out}")
        for title, value in facts.items():
            printer.say(f"  {title}: {brief(value)}")
        printer.result({"out": str(out), **facts})
        return
    if folder is not None and jsonl is not None:
        raise ConfigError(
            "--folder and --jsonl exclude each other", fix="build two sources, one after the other"
        )
    try:
        size = parse_bytes(shard_size)
    except ValueError as error:
        raise ConfigError(str(error), where="--shard-size", fix="give --shard-size 256MB") from None
    if not 0 <= heldout < 1 or not 0 <= max_skips <= 1:
        raise ConfigError("--heldout and --max-skips are shares", fix="give numbers from 0 to 1, as 0.02")
    from ringweave.launch.data_build import build_source, report

    with Progress() as progress:
        made = build_source(
            folder or jsonl, out, lines=jsonl is not None, fields=fields, name=name, shard_bytes=size,
            heldout=heldout, max_skip_rate=max_skips, progress=progress,
        )  # fmt: skip
    report(printer, out, made)
    printer.result({"out": str(out), **made})


@data_app.command(
    "index", epilog="Example: ringweave data index runs/demo/data --tokenizers runs/demo/tokenizers"
)
def index(
    target: ShardsArgument,
    tokenizers: Annotated[
        Path | None, typer.Option("--tokenizers", "-t", help="Also tokenise every shard.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Take each source's plan from this config.")
    ] = None,
    lengths_only: Annotated[
        bool,
        typer.Option(
            "--lengths-only", help="With --tokenizers: store token lengths, which is all that planning needs."
        ),
    ] = False,
    hidden: Annotated[str, typer.Option(help="Hidden files in shards: refuse, or skip.")] = "refuse",
    interleaved: Annotated[
        str, typer.Option(help="Samples whose members lie apart: refuse, or regroup.")
    ] = "refuse",
    dotted: Annotated[str, typer.Option(help="Names like img.v1.0.jpg: refuse, or keep.")] = "refuse",
    tail: Annotated[str, typer.Option(help="A shard that ends early: refuse, or quarantine.")] = "refuse",
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Index every shard (members, sizes, checksums); with a tokenizer set also write the token caches.

    Indexes lie beside local shards, and in the cache for packed ones and for remote ones that have none beside them.
    """
    from ringweave.launch.data_index import index_shards, make_tokens, plans_of

    out = Output(as_json)
    policy = {"hidden": hidden, "interleaved": interleaved, "dotted": dotted, "tail": tail}
    for option, value in policy.items():
        if value not in ("refuse", _LENIENT[option]):
            raise ConfigError(f"--{option} {value}", fix=f"give refuse or {_LENIENT[option]}")
    store = store_for(config, cache)
    shards = find_shards(target, store)
    lengths: list[str] = []
    with Progress() as progress:
        written = index_shards(shards, policy, progress)
        if tokenizers is not None:
            plans = plans_of(shards, target, config, store)
            lengths = make_tokens(
                shards, tokenizers, plans=plans, store_tokens=not lengths_only, folder=store.tokens_dir,
                progress=progress,
            )  # fmt: skip
    caches = [] if lengths_only else lengths
    kind = "with token lengths" if lengths_only else "token caches"
    out.say(f"{len(shards)} shards, {len(written)} newly indexed, {len(lengths)} {kind}")
    out.result({"shards": len(shards), "indexed": written, "caches": caches, "lengths": lengths})


@data_app.command("check", epilog="Example: ringweave data check runs/demo/data --decode --json")
def check(
    target: Annotated[
        str,
        typer.Argument(metavar="SHARDS", help="A folder, a shard, a pattern of shards, or a .jsonl file."),
    ],
    decode: Annotated[
        bool, typer.Option("--decode", help="Also decode every picture, sound, clip, json and text.")
    ] = False,
    fields: Annotated[
        str, typer.Option(metavar="LIST", help="For a .jsonl file: the fields every line must have.")
    ] = "",
    config: Annotated[
        Path | None, typer.Option("--config", help="Take storage limits and the cache from this config.")
    ] = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of every shard against its index; exit 3 when anything is damaged."""
    from ringweave.launch.data_check import check_jsonl, check_shards

    out = Output(as_json)
    if target.endswith(".jsonl"):
        rows = [check_jsonl(Path(target), fields=fields)]
    else:
        with Progress() as progress:
            shards = find_shards(target, store_for(config, cache))
            rows = check_shards(shards, decode=decode, progress=progress)
    _report_check(out, target, rows, decode=decode)


def _report_check(out: Output, target: str, rows: list[SourceRow], *, decode: bool) -> None:
    """Problems, then the table; ends the command with its exit code."""
    found = [error for row in rows for error in row.problems]
    for error in found[:_SHOWN]:
        out.say(printable(error.render()))
    if len(found) > _SHOWN:
        out.say(f"... and {len(found) - _SHOWN} more (--json lists all)")
    columns = ["source", "shards", "samples", "tokens", "MB", "damaged", *(["undecodable"] if decode else [])]
    cells = [
        (
            row.source, row.shards, f"{row.samples:,}", "" if row.tokens is None else f"{row.tokens:,}",
            f"{row.bytes / 1e6:,.2f}", row.damaged, *([row.undecodable] if decode else []),
        )
        for row in rows
    ]  # fmt: skip
    out.table(redact(target), columns, cells)
    shards = sum(row.shards for row in rows)
    out.say(f"{shards} shards read, {len(found)} problems")
    out.result(
        {
            "shards": shards,
            "sources": [row.as_dict() for row in rows],
            "problems": [error.as_dict() for error in found],
            "ok": not found,
        }
    )
    raise typer.Exit(DataError.exit_code if found else 0)


@data_app.command(
    "show", epilog="Example: ringweave data show runs/demo/data --out sheet.html --per-source 12"
)
def show(
    target: ShardsArgument,
    sample: Annotated[
        str | None, typer.Option(metavar="SHARD#N", help="Show record N of this shard.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Draw a contact sheet: .html or .png.")
    ] = None,
    per_source: Annotated[
        int, typer.Option(min=1, max=500, help="Samples of each source on the sheet.")
    ] = 12,
    seed: Annotated[int, typer.Option(help="Which samples: another number, another choice.")] = 0,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """List shards with their records and bytes, and the members of one record; or draw a contact sheet."""
    from ringweave.data_pipes.store import index_of

    out, where = Output(as_json), redact(target)
    shards = find_shards(target, store_for(None, cache))
    if sheet is not None:
        from ringweave.launch.data_sheet import write_sheet

        with Progress() as progress:
            facts = write_sheet(
                shards, sheet, title=where, per_source=per_source, seed=seed, progress=progress
            )
        sources = len(facts["sources"])
        out.say(
            f"{sheet}: {facts['shown']} samples of {sources} source{'s'[: sources != 1]}, "
            f"{facts['failed']} undecodable"
        )
        out.result({"out": str(sheet), **facts})
        return
    rows: list[dict[str, Any]] = []
    for shard in shards:
        entry = index_of(shard)
        rows.append(
            {
                "shard": name_of(shard),
                "source": source_of(shard),
                "records": entry.count,
                "bytes": entry.shard_size,
            }
        )
    cells = [(row["shard"], row["source"], row["records"], f"{row['bytes'] / 1e6:.2f}") for row in rows]
    out.table(where, ("shard", "source", "records", "MB"), cells)
    shown = _one_record(where, shards, sample)
    out.table(
        f"{shown['where']}",
        ("member", "bytes", "start"),
        [(m["ext"], m["bytes"], m["start"]) for m in shown["members"]],
    )
    out.result({"folder": where, "shards": rows, "sample": shown})


def _one_record(where: str, shards: list[Shard], wanted: str | None) -> dict[str, Any]:
    """Members of one record: extension, size, and the start of what is text."""
    from ringweave.data_pipes.store import reader_of

    known = {name_of(shard): shard for shard in shards}
    first = next(iter(known))
    name, _, number = (wanted or f"{first}#0").rpartition("#")
    if not name or not number.isdigit():
        raise ConfigError("--sample must be SHARD#N", where=f"--sample {wanted}", fix=f"e.g. {first}#0")
    if name not in known:
        raise ConfigError(f"no shard {name}", where=where, fix=f"e.g. {first}#0")
    with reader_of(known[name]) as reader:
        if int(number) >= len(reader):
            raise ConfigError(
                f"{name} has {len(reader)} records", where=f"--sample {wanted}", fix="count from 0"
            )
        record = reader.read(int(number))
    members = []
    for ext, data in record.members.items():
        text = data[:80].decode("utf-8", errors="replace") if ext in ("txt", "json", "musicxml") else ""
        members.append({"ext": ext, "bytes": len(data), "start": printable(" ".join(text.split()))})
    return {"where": record.where, "key": record.key, "members": members}


@data_app.command(
    "stats", epilog="Example: ringweave data stats runs/demo/data --config launch/recipes/demo.yaml"
)
def stats(
    folder: FolderArgument,
    config: Annotated[
        Path, typer.Option("--config", metavar="YAML", help="The run whose stages are predicted.")
    ],
    packs: Annotated[int, typer.Option(min=16, help="Packs planned of each stage, at most.")] = 4096,
    as_json: JsonOption = False,
) -> None:
    """Token lengths of every source, and the fill, balance and epochs each stage of a config will have."""
    from ringweave.launch.data_stats import predict, print_stats

    out = Output(as_json)
    with Progress() as progress:
        facts = predict(folder, config, packs=packs, progress=progress)
    print_stats(out, facts)
    out.result(facts)
