"""Commands that compare files, beside `ringweave eval RUN` of a run: `eval rgba`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ringweave.launch.console import JsonOption, Output, Progress
from ringweave.pretrain.errors import ConfigError
from ringweave.tokenizers.errors import printable

#: Samples printed for people; `--json` holds all of them.
_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Adds this module's commands to `app`, which finds names of two words (`cli.Commands`)."""
    app.command("eval rgba", epilog="Example: ringweave eval rgba samples/ heldout/ --region unknown --json")(
        eval_rgba
    )


def eval_rgba(
    predicted: Annotated[
        Path,
        typer.Argument(
            metavar="PREDICTED",
            help="Folder of RGBA PNGs, or of a folder a sample with layer0.png, layer1.png ... (bottom first).",
        ),
    ],
    reference: Annotated[
        Path,
        typer.Argument(
            metavar="REFERENCE",
            help="Folder of the same names; a sample may also hold trimap.png and composite.png.",
        ),
    ],
    region: Annotated[
        str,
        typer.Option(
            "--region", help="Where alpha is compared: whole, or unknown (pixels of trimap.png that are 128)."
        ),
    ] = "whole",
    merges: Annotated[
        int, typer.Option("--merges", min=0, max=100, help="Merges of neighbouring layers allowed, at most.")
    ] = 5,
    as_json: JsonOption = False,
) -> None:
    """Compare RGBA pictures or layers with true ones: alpha, looks on nine backgrounds, layers, composite.

    Alpha is compared in the top layer, PSNR and SSIM are those of the whole stack.

    A run folder that is called rgba is evaluated with `ringweave eval ./rgba`.
    """
    if region not in ("whole", "unknown"):
        raise ConfigError(f"unknown region {region!r}", where="--region", fix="name whole or unknown")
    for folder, what in ((predicted, "folder of predictions"), (reference, "reference folder")):
        if not folder.is_dir():
            fix = "see `ringweave eval rgba --help` for what it holds"
            raise ConfigError(f"no such {what}", where=printable(str(folder)), fix=fix)
    from ringweave.launch.eval_rgba import evaluate_folders

    printer = Output(as_json)
    with Progress() as progress:
        result = evaluate_folders(predicted, reference, region=region, merges=merges, progress=progress)
    _print(printer, result)
    printer.result(result)


def _print(printer: Output, result: dict[str, Any]) -> None:
    """Tables for people."""
    alpha, looks = result["matting"], result["reconstruction"]
    stacks = result["kind"] == "layers"
    # In lines of their own: a title is folded to the width of its table.
    printer.say(
        f"{result['samples']} {'samples of layers' if stacks else 'pictures'}; alpha"
        f"{' of the top layer' if stacks else ''} is compared over the {alpha['region']} region"
    )
    printer.table(
        "Alpha",
        ("SAD / 1000", "MSE", "Grad / 1000", "Conn / 1000"),
        [[_cell(alpha[key]) for key in ("sad", "mse", "grad", "conn")]],
    )
    printer.table(
        "Looks over backgrounds",
        ("background", "PSNR dB", "SSIM"),
        [
            [name, _cell(figures["psnr"], 2), _cell(figures["ssim"])]
            for name, figures in [*looks["backgrounds"].items(), ("mean of nine", looks)]
        ],
    )
    printer.table(
        "Layers matched in order",
        ("merges allowed", "taken", "cost", "RGB L1", "alpha soft IoU"),
        [
            [
                f"{row['allowed']:g}",
                f"{row['taken']:g}",
                *(_cell(row[k]) for k in ("cost", "rgb_l1", "alpha_iou")),
            ]
            for row in result["decomposition"]
        ],
    )
    if (whole := result["composite"]) is not None:
        printer.say(f"{whole['samples']} of {result['samples']} samples have a composite.png")
        printer.table(
            "Composite",
            ("RGB L1", "PSNR dB", "alpha L1"),
            [[_cell(whole["l1"]), _cell(whole["psnr"], 2), _cell(whole["alpha_l1"])]],
        )
    _print_samples(printer, result["per_sample"])
    if result["ignored"]:
        printer.say(f"{result['ignored']} other files were not looked at")


def _print_samples(printer: Output, rows: list[dict[str, Any]]) -> None:
    printer.table(
        "Samples",
        ("name", "layers", "SAD / 1000", "PSNR dB", "RGB L1", "alpha soft IoU"),
        [
            [
                row["name"], "/".join(map(str, row["layers"])), _cell(row["matting"]["sad"]),
                _cell(row["reconstruction"]["psnr"], 2),
                *(_cell(row["decomposition"][-1][key]) for key in ("rgb_l1", "alpha_iou")),
            ]
            for row in rows[:_SHOWN]
        ],
    )  # fmt: skip
    if len(rows) > _SHOWN:
        printer.say(f"and {len(rows) - _SHOWN} more; --json holds all of them")


def _cell(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}"
