"""Commands about tokenizers: `tokenizer train|encode|decode|show`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from ringweave.launch.console import JsonOption, Output, Progress
from ringweave.launch.data_records import records_by_modality, records_by_source
from ringweave.launch.data_sources import brief, load_tokenizers
from ringweave.pretrain.errors import ConfigError

tokenizer_app = typer.Typer(
    name="tokenizer", no_args_is_help=True, help="Fit tokenizers on shards, encode and decode single files.",
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
        typer.Option("--learn", metavar="LIST", help="Train these as convolutions too: image,audio,score."),
    ] = "",
    steps: Annotated[int, typer.Option("--steps", min=1, help="With --learn: steps of each codec.")] = 2000,
    as_json: JsonOption = False,
) -> None:
    """Fit the tokenizers of all modalities on the train shards, then measure them on the held-out shards.

    With --learn, a stopped training goes on from its last state when the command is given again.
    """
    printer = Output(as_json)
    names = [name.strip() for name in learn.split(",") if name.strip()]
    if (data is None) == (config is None):
        raise ConfigError(
            "tokenizers are fitted to --data DIR or to --config YAML", fix="give one of the two"
        )
    from ringweave.tokenizers.fit import LEARNABLE, fit_tokenizers, measure

    strange = [name for name in names if name not in LEARNABLE]
    if strange:
        raise ConfigError(
            f"--learn: {', '.join(strange)} cannot be learned", fix=f"name some of {', '.join(LEARNABLE)}"
        )
    samples: Mapping[str, Iterable[Mapping[str, bytes]]]
    heldout: Mapping[str, Iterable[Mapping[str, bytes]]]
    if config is not None:
        samples, heldout = records_by_modality(config), records_by_modality(config, heldout=True)
    else:
        assert data is not None
        samples, heldout = records_by_source(data, "train"), records_by_source(data, "heldout")

    with Progress() as progress:
        fitted = fit_tokenizers(samples, out, progress=progress)
        learned = _learned(names, samples, out, steps, progress) if names else {}
        progress("measuring on held-out records")
        measured = measure(load_tokenizers(out), heldout) if heldout else {}
    printer.say(f"wrote {out}")
    for title, figures in (("fitted", fitted), ("learned", learned), ("held out", measured)):
        for name, value in figures.items():
            printer.say(f"  {title} {name}: {brief(value)}")
    printer.result({"out": str(out), "fitted": fitted, "learned": learned, "heldout": measured})


def _learned(
    names: list[str],
    samples: Mapping[str, Iterable[Mapping[str, bytes]]],
    out: Path,
    steps: int,
    progress: Progress,
) -> dict[str, object]:
    from ringweave.tokenizers.learn import Schedule  # here, because it imports torch
    from ringweave.tokenizers.learn_run import learn_codecs

    return learn_codecs(samples, out, names=names, schedule=Schedule(steps=steps), progress=progress)


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
