"""Commands about tokenizers: `tokenizer train|eval|show|encode|encode-shards|decode`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from ringweave.launch.console import JsonOption, Output, Progress, SetOption
from ringweave.launch.data_records import (
    Records,
    by_content,
    latents_by_source,
    latents_of_config,
    records_by_modality,
    records_by_source,
)
from ringweave.launch.data_sources import CacheOption, brief, load_tokenizers
from ringweave.pretrain.errors import ConfigError
from ringweave.tokenizers.errors import printable

#: Skipped records printed for people; `--json` holds all of them.
_SHOWN = 20

tokenizer_app = typer.Typer(
    name="tokenizer", no_args_is_help=True, help="Fit, learn, measure and show tokenizers; encode files and shards.",
    epilog="Example: ringweave tokenizer train --data runs/demo/data --out runs/demo/tokenizers",
)  # fmt: skip

TokenizersOption = Annotated[
    Path, typer.Option("--tokenizers", "-t", metavar="DIR", help="Folder of a tokenizer set.")
]


def register(app: typer.Typer) -> None:
    """Adds this module's command group to `app`."""
    app.add_typer(tokenizer_app)


@tokenizer_app.command(
    "train", epilog="Example: ringweave tokenizer train --data runs/demo/data --out runs/demo/tokenizers"
)
def train(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the tokenizer set.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Folder with text-train-*.tar, image-train-*.tar, ..."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="YAML", help="Fit to this config's sources, by their plans."),
    ] = None,
    learn: Annotated[
        str,
        typer.Option(
            "--learn",
            metavar="LIST",
            help="Train these as convolutions too: image,rgba,audio,score; latents trains the autoencoder of layers "
            "on every source of layers or pictures.",
        ),
    ] = "",
    steps: Annotated[int, typer.Option("--steps", min=1, help="With --learn: steps of each codec.")] = 2000,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--size", metavar="KEY=VALUE", help="A number of the codecs, as image_codes=4096. Repeatable."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit the tokenizers of all modalities on the train shards, then measure them on the held-out shards.

    With --learn, a stopped training goes on from its last state when the command is given again, and under torchrun
    all ranks share each step.
    """
    printer = Output(as_json)
    if (data is None) == (config is None):
        raise ConfigError(
            "tokenizers are fitted to --data DIR or to --config YAML", fix="give one of the two"
        )
    from ringweave.launch.tokenizer_sizes import parse_sizes
    from ringweave.launch.tokenizer_train import learnable, train_set

    names, chosen = learnable(learn), parse_sizes(sizes or [])
    samples, latents = _records(data, config, heldout=False)
    heldout, latents_heldout = _records(data, config, heldout=True)
    with Progress() as progress:
        made = train_set(
            samples, heldout, out, names=names, latents=latents, latents_heldout=latents_heldout, steps=steps,
            sizes=chosen, progress=progress,
        )  # fmt: skip
    if made is None:  # another rank than the first, which speaks for all
        return
    printer.say(f"wrote {out}")
    for title, figures in zip(("fitted", "learned", "held out"), made.values()):
        for name, value in figures.items():
            printer.say(f"  {title} {name}: {brief(value)}")
    printer.result({"out": str(out), **made})


Sources = Mapping[str, Iterable[Mapping[str, bytes]]]


def _records(data: Path | None, config: Path | None, *, heldout: bool) -> tuple[Sources, Sources]:
    """(records by modality, sources of what latents read) of a folder or of a config's sources."""
    if config is not None:
        return records_by_modality(config, heldout=heldout), latents_of_config(config, heldout=heldout)
    assert data is not None
    groups = records_by_source(data, "heldout" if heldout else "train")
    return by_content(groups), latents_by_source(groups)


@tokenizer_app.command(
    "eval",
    epilog="Example: ringweave tokenizer eval -t runs/demo/tokenizers --data runs/demo/data --out eval.md",
)
def evaluate(
    tokenizers: Annotated[
        Path | None,
        typer.Option(
            "--tokenizers", "-t", metavar="DIR", help="Folder of a tokenizer set; else that of --config."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Folder with <source>-heldout-*.tar shards.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="YAML", help="Held-out shards of this config, by their plans."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the tables here instead of printing them."),
    ] = None,
    update: Annotated[
        Path | None,
        typer.Option(
            "--update",
            metavar="FILE",
            help="Put the tables between `<!-- tokenizer eval -->` and `<!-- /tokenizer eval -->` of this document.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Records of each modality, at most.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Rate, quality and speed of each codec on held-out records, and the codecs that can be brought from outside."""
    from ringweave.launch.tokenizer_eval import evaluate as evaluate_set
    from ringweave.launch.tokenizer_eval import markdown, update_file

    printer = Output(as_json)
    if (data is None) == (config is None):
        raise ConfigError("codecs are measured on --data DIR or on --config YAML", fix="give one of the two")
    if config is not None:
        from ringweave.pretrain.config import load_config

        tokenizers = tokenizers or Path(load_config(config).tokenizers.dir)
    samples, latents = _records(data, config, heldout=True)
    if tokenizers is None:
        raise ConfigError("no tokenizers to measure", fix="give --tokenizers DIR")
    with Progress() as progress:
        facts = evaluate_set(
            load_tokenizers(tokenizers), samples, latents=latents, limit=limit, progress=progress
        )
    text = markdown(facts)
    if update is not None:
        update_file(update, text)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    written = [str(path) for path in (out, update) if path is not None]
    for line in [f"wrote {path}" for path in written] or [text]:
        printer.say(line)
    printer.result({"tokenizers": str(tokenizers), "files": written, **facts})


@tokenizer_app.command(
    "show",
    epilog="Example: ringweave tokenizer show -t runs/demo/tokenizers --data runs/demo/data --out seen",
)
def show_tokens(
    tokenizers: TokenizersOption,
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Folder with <source>-heldout-*.tar shards.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the page and the pictures.")],
    per_source: Annotated[
        int, typer.Option(min=1, max=100, help="Records of each modality on the page.")
    ] = 6,
    amplify: Annotated[
        int, typer.Option(min=1, max=64, help="Differences of pictures on the page, so many times as large.")
    ] = 2,
    as_json: JsonOption = False,
) -> None:
    """Show held-out originals beside what the tokenizers give back: one page, and a picture or sound a modality."""
    from ringweave.launch.tokenizer_page import sections
    from ringweave.launch.tokenizer_page_html import render
    from ringweave.tokenizers.show import show as show_set

    printer = Output(as_json)
    loaded, groups = load_tokenizers(tokenizers), records_by_source(data, "heldout")
    records = by_content(groups)
    shards = [shard for some in latents_by_source(groups).values() for shard in some.shards]
    if shards and "latents" in loaded.codecs:
        records["latents"] = Records(shards)
    with Progress() as progress:
        found = sections(loaded, records, count=per_source, amplify=amplify, progress=progress)
        progress("drawing sheets")
        paths = show_set(loaded, records, out)
    page = out / "index.html"
    page.write_text(
        render(found, tokenizers=str(tokenizers), data=str(data), vocabulary=loaded.manifest.hash),
        encoding="utf-8",
    )
    cards = [card for section in found for card in section.cards]
    for path in [page, *paths]:
        printer.say(str(path))
    failed = sum(bool(card.problem) for card in cards)
    printer.result(
        {"files": [str(path) for path in paths], "page": str(page), "shown": len(cards), "failed": failed}
    )


@tokenizer_app.command(
    "encode", epilog="Example: ringweave tokenizer encode photo.png -t runs/demo/tokenizers --out ids.json"
)
def encode(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A text, image, audio, video or layer file.")],
    tokenizers: TokenizersOption,
    modality: Annotated[
        str | None,
        typer.Option(help="text, image, rgba, score, audio, video, symbolic, midi; else by ending."),
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
    "encode-shards", epilog="Example: ringweave tokenizer encode-shards --config run.yaml --workers 8"
)
def encode_shards(
    config: Annotated[
        Path, typer.Option("--config", metavar="YAML", help="The run: sources, plans, tokenizers, cache.")
    ],
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=0, max=1024, help="Processes; else data.workers.count of the config."),
    ] = None,
    overrides: SetOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encode all shards of a config beforehand, so that its run reads every token from the cache.

    Give the command again after it was stopped: finished shards stay, and of the one under way what was kept.
    """
    from ringweave.launch.tokenizer_encode import encode_config
    from ringweave.pretrain.config import load_config
    from ringweave.pretrain.data_store import store_of

    printer = Output(as_json)
    checked = load_config(config, overrides or [])
    if cache is not None:
        settings = checked.data.cache.model_copy(update={"dir": str(cache)})
        data = checked.data.model_copy(update={"cache": settings})
        checked = checked.model_copy(update={"data": data})
    with Progress() as progress:
        facts = encode_config(checked, store=store_of(checked), workers=workers, progress=progress)
    for entry in facts["skipped"][:_SHOWN]:
        printer.say(printable(f"skipped {entry['shard']}#{entry['key']}: {entry['reason']}"))
    if len(facts["skipped"]) > _SHOWN:
        printer.say(f"... and {len(facts['skipped']) - _SHOWN} more (--json lists all)")
    rate = f" in {facts['seconds']:.1f} s, {facts['samples_per_s']:,.0f} samples/s" if facts["made"] else ""
    printer.say(
        f"{facts['shards']} shards, {facts['samples']:,} samples, {facts['tokens']:,} tokens, "
        f"{len(facts['skipped'])} skipped; encoded now: {facts['made']:,} samples of {facts['encoded']} shards{rate}"
    )
    printer.result(facts)


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
