"""Commands about records and tokens: `data build|index|check|show`, `tokenizer train|encode|decode|show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ringweave.launch.console import JsonOption, Output, Progress, existing_folder
from ringweave.pretrain.errors import ConfigError
from ringweave.tokenizers.errors import DataError

data_app = typer.Typer(
    name="data", no_args_is_help=True, help="Build, index, check and look at shards.",
    epilog="Example: ringweave data check runs/demo/data",
)  # fmt: skip
tokenizer_app = typer.Typer(
    name="tokenizer", no_args_is_help=True, help="Fit tokenizers on shards, encode and decode single files.",
    epilog="Example: ringweave tokenizer train --data runs/demo/data --out runs/demo/tokenizers",
)  # fmt: skip

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that holds the shards (*.tar).")]
TokenizersOption = Annotated[
    Path, typer.Option("--tokenizers", "-t", metavar="DIR", help="Folder of a tokenizer set.")
]


def register(app: typer.Typer) -> None:
    """Adds this module's command groups to `app`."""
    app.add_typer(data_app)
    app.add_typer(tokenizer_app)


def _shards(folder: Path) -> list[Path]:
    existing_folder(folder, what="data folder", fix="`ringweave data build DIR` makes the demo data")
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(
            "no shards", where=str(folder), why="no *.tar in it", fix="give the folder that holds the shards"
        )
    return shards


def source_of(shard: Path) -> str:
    """`image` of `image-train-0000.tar`; the whole stem when the name has no split in it."""
    stem = shard.name.removesuffix(".tar")
    for split in ("-train-", "-heldout-"):
        if split in stem:
            return stem.partition(split)[0]
    return stem.rpartition("-")[0] or stem


@data_app.command("build", epilog="Example: ringweave data build runs/demo/data")
def build(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the shards into.")],
    as_json: JsonOption = False,
) -> None:
    """Make the demo data: shards of text, images, layers, scores, audio, video from installed packages."""
    from ringweave.data_pipes.demo import build_demo

    printer = Output(as_json)
    with Progress() as progress:
        facts = build_demo(out, progress=progress)
    printer.say(f"wrote {out}")
    for name, value in facts.items():
        printer.say(f"  {name}: {_brief(value)}")
    printer.result({"out": str(out), **facts})


def _brief(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


@data_app.command(
    "index", epilog="Example: ringweave data index runs/demo/data --tokenizers runs/demo/tokenizers"
)
def index(
    folder: FolderArgument,
    tokenizers: Annotated[
        Path | None, typer.Option("--tokenizers", "-t", help="Also tokenise every shard.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Take each source's plan from this config.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Index every shard (members, sizes, checksums); with a tokenizer set also write the token caches."""
    from ringweave.data_pipes.index import index_folder

    out = Output(as_json)
    shards = _shards(folder)
    caches: list[str] = []
    with Progress() as progress:
        written = index_folder(folder, progress=progress)
        if tokenizers is not None:
            caches = _build_caches(
                shards, tokenizers, plans=_plans(shards, folder, config), progress=progress
            )
    out.say(f"{len(shards)} shards, {len(written)} newly indexed, {len(caches)} token caches")
    out.result({"shards": len(shards), "indexed": [str(path) for path in written], "caches": caches})


def _plans(shards: list[Path], folder: Path, config: Path | None) -> dict[Path, list[str]]:
    """The plan of each shard: by the config's patterns, else by the source's name. Others are left out."""
    from ringweave.pretrain.config import DEFAULT_PLANS, load_config

    if config is None:
        plans = {
            shard: list(DEFAULT_PLANS[source_of(shard)])
            for shard in shards
            if source_of(shard) in DEFAULT_PLANS
        }
        if not plans:
            raise ConfigError(
                "no plan for any shard", where=str(folder),
                why=f"sources are not named {', '.join(DEFAULT_PLANS)}",
                fix="give --config with the plan of each source",
            )  # fmt: skip
        return plans
    from ringweave.data_pipes.reader import expand_shards

    known = {shard.resolve(): shard for shard in shards}
    plans = {}
    for source in load_config(config).data.sources:
        for pattern in filter(None, (source.shards, source.heldout)):
            for shard in expand_shards(pattern, folder):
                plans[known.get(shard.resolve(), shard)] = list(source.plan)
    return plans


def _build_caches(
    shards: list[Path], folder: Path, *, plans: dict[Path, list[str]], progress: Any
) -> list[str]:
    from ringweave.data_pipes.token_cache import build_cache

    tokenizers = load_tokenizers(folder)
    chosen = [shard for shard in shards if shard in plans]
    written = []
    for done, shard in enumerate(chosen, 1):
        progress(f"tokens of {shard.name}", done - 1, len(chosen))
        written.append(str(build_cache(shard, plans[shard], tokenizers, progress=None)))
        progress(f"tokens of {shard.name}", done, len(chosen))
    return written


def load_tokenizers(folder: Path) -> Any:
    """The tokenizer set in `folder`; ConfigError when there is no such folder."""
    existing_folder(
        folder, what="tokenizer folder", fix="`ringweave tokenizer train --data DIR --out OUT` makes one"
    )
    from ringweave.tokenizers.set import TokenizerSet

    return TokenizerSet.load(folder)


@data_app.command("check", epilog="Example: ringweave data check runs/demo/data --json")
def check(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Read every byte of every shard against its index; exit 3 when anything is damaged."""
    from ringweave.data_pipes.reader import check_shard

    out = Output(as_json)
    shards, found = _shards(folder), []
    with Progress() as progress:
        for done, shard in enumerate(shards, 1):
            found += check_shard(shard)
            progress(f"checked {shard.name}", done, len(shards))
    for error in found:
        out.say(error.render())
    out.say(f"{len(shards)} shards read, {len(found)} problems")
    out.result({"shards": len(shards), "problems": [error.as_dict() for error in found], "ok": not found})
    raise typer.Exit(DataError.exit_code if found else 0)


@data_app.command(
    "show", epilog="Example: ringweave data show runs/demo/data --sample image-train-0000.tar#0"
)
def show(
    folder: FolderArgument,
    sample: Annotated[
        str | None, typer.Option(metavar="SHARD#N", help="Show record N of this shard.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List shards with their records and bytes, and the members of one record."""
    from ringweave.data_pipes.index import load_index

    out = Output(as_json)
    shards = _shards(folder)
    rows: list[dict[str, Any]] = []
    for shard in shards:
        entry = load_index(shard)
        rows.append(
            {
                "shard": shard.name,
                "source": source_of(shard),
                "records": entry.count,
                "bytes": entry.shard_size,
            }
        )
    cells = [(row["shard"], row["source"], row["records"], f"{row['bytes'] / 1e6:.2f}") for row in rows]
    out.table(str(folder), ("shard", "source", "records", "MB"), cells)
    shown = _one_record(folder, shards, sample)
    out.table(
        f"{shown['where']}",
        ("member", "bytes", "start"),
        [(m["ext"], m["bytes"], m["start"]) for m in shown["members"]],
    )
    out.result({"folder": str(folder), "shards": rows, "sample": shown})


def _one_record(folder: Path, shards: list[Path], wanted: str | None) -> dict[str, Any]:
    """Members of one record: extension, size, and the start of what is text."""
    from ringweave.data_pipes.reader import ShardReader

    name, _, number = (wanted or f"{shards[0].name}#0").rpartition("#")
    if not name or not number.isdigit():
        raise ConfigError(
            "--sample must be SHARD#N", where=f"--sample {wanted}", fix=f"e.g. {shards[0].name}#0"
        )
    if name not in {shard.name for shard in shards}:
        raise ConfigError(f"no shard {name}", where=str(folder), fix=f"e.g. {shards[0].name}#0")
    with ShardReader(folder / name) as reader:
        if int(number) >= len(reader):
            raise ConfigError(
                f"{name} has {len(reader)} records", where=f"--sample {wanted}", fix="count from 0"
            )
        record = reader.read(int(number))
    members = []
    for ext, data in record.members.items():
        text = data[:80].decode("utf-8", errors="replace") if ext in ("txt", "json", "musicxml") else ""
        members.append({"ext": ext, "bytes": len(data), "start": " ".join(text.split())})
    return {"where": record.where, "key": record.key, "members": members}


class Records:
    """Re-iterable records of some shards: each pass yields `dict[extension, bytes]` in order."""

    def __init__(self, shards: list[Path]) -> None:
        self.shards = shards

    def __iter__(self) -> Any:
        from ringweave.data_pipes.reader import ShardReader

        for shard in self.shards:
            with ShardReader(shard) as reader:
                for i in range(len(reader)):
                    yield reader.read(i).members

    def __len__(self) -> int:
        from ringweave.data_pipes.index import load_index

        return sum(load_index(shard).count for shard in self.shards)


def records_by_source(folder: Path, split: str) -> dict[str, Records]:
    """`{source: records}` of the shards `<source>-<split>-*.tar` in `folder`, sources in order of name."""
    groups: dict[str, list[Path]] = {}
    for shard in _shards(folder):
        if f"-{split}-" in shard.name:
            groups.setdefault(source_of(shard), []).append(shard)
    if not groups:
        raise DataError(
            f"no {split} shards", where=str(folder), why=f"none is named <source>-{split}-0000.tar"
        )
    return {name: Records(shards) for name, shards in sorted(groups.items())}


@tokenizer_app.command(
    "train", epilog="Example: ringweave tokenizer train --data runs/demo/data --out runs/demo/tokenizers"
)
def train(
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Folder with <source>-train-*.tar shards.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the tokenizer set.")],
    as_json: JsonOption = False,
) -> None:
    """Fit the tokenizers of all modalities on the train shards, then measure them on the held-out shards."""
    printer = Output(as_json)
    samples, heldout = records_by_source(data, "train"), records_by_source(data, "heldout")
    from ringweave.tokenizers.fit import fit_tokenizers, measure

    with Progress() as progress:
        fitted = fit_tokenizers(samples, out, progress=progress)
        progress("measuring on held-out records")
        measured = measure(load_tokenizers(out), heldout)
    printer.say(f"wrote {out}")
    for title, figures in (("fitted", fitted), ("held out", measured)):
        for name, value in figures.items():
            printer.say(f"  {title} {name}: {_brief(value)}")
    printer.result({"out": str(out), "fitted": fitted, "heldout": measured})


@tokenizer_app.command(
    "show",
    epilog="Example: ringweave tokenizer show -t runs/demo/tokenizers --data runs/demo/data --out seen",
)
def show_tokens(
    tokenizers: TokenizersOption,
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Folder with <source>-heldout-*.tar shards.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the pictures.")],
    as_json: JsonOption = False,
) -> None:
    """Write held-out originals beside what the tokenizers give back, one picture or sound a modality."""
    from ringweave.tokenizers.show import show as show_set

    printer = Output(as_json)
    paths = show_set(load_tokenizers(tokenizers), records_by_source(data, "heldout"), out)
    for path in paths:
        printer.say(str(path))
    printer.result({"files": [str(path) for path in paths]})


@tokenizer_app.command(
    "encode", epilog="Example: ringweave tokenizer encode photo.png -t runs/demo/tokenizers --out ids.json"
)
def encode(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A text, image, audio, video or layer file.")],
    tokenizers: TokenizersOption,
    modality: Annotated[
        str | None, typer.Option(help="text, image, rgba, score, audio or video; else by ending.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the ids here instead of printing them.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn one file into token ids (JSON)."""
    from ringweave.launch.media_files import encode_file

    printer = Output(as_json)
    segment = encode_file(file, load_tokenizers(tokenizers), modality=modality)
    payload = {
        "file": str(file),
        "modality": segment.modality,
        "count": len(segment),
        "ids": segment.ids.tolist(),
    }
    if out is not None:
        out.write_text(json.dumps(payload) + "\n", encoding="utf-8")
        printer.say(f"{len(segment)} ids of {segment.modality} in {out}")
    elif not as_json:
        printer.say(json.dumps(payload["ids"]))
    printer.result(payload)


@tokenizer_app.command(
    "decode", epilog="Example: ringweave tokenizer decode ids.json -t runs/demo/tokenizers --out back"
)
def decode(
    file: Annotated[Path, typer.Argument(metavar="IDS", help="JSON: a list of ids, or what `encode` wrote.")],
    tokenizers: TokenizersOption,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the decoded files.")],
    as_json: JsonOption = False,
) -> None:
    """Turn token ids back into text, images, sound or video frames."""
    from ringweave.launch.media_files import read_ids, write_decoded

    printer = Output(as_json)
    decoded = load_tokenizers(tokenizers).decode(read_ids(file))
    written = write_decoded(decoded, out)
    for item in written:
        printer.say(
            f"{item['modality']}: {', '.join(item['files'])}{'' if item['complete'] else ' (incomplete)'}"
        )
    printer.result({"decoded": written})
