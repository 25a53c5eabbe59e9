"""Commands that only read and compute: `config show`, `config schema`, `plan`, `doctor`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ringweave.launch.console import JsonOption, Output, SetOption

config_app = typer.Typer(
    name="config", no_args_is_help=True, help="Show a checked config, or every key there is.",
    epilog="Example: ringweave config show launch/recipes/demo.yaml",
)  # fmt: skip

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
WorldOption = Annotated[
    int | None, typer.Option("--world", min=1, help="Number of processes to check layouts against.")
]


def register(app: typer.Typer) -> None:
    """Adds this module's commands to `app`."""
    app.add_typer(config_app)
    app.command("plan", epilog="Example: ringweave plan launch/recipes/demo.yaml --vocab 8192")(plan)
    app.command("doctor", epilog="Example: ringweave doctor --json")(doctor)


@config_app.command("show", epilog="Example: ringweave config show run.yaml --set optimizer.lr=1e-3")
def show(
    config: ConfigArgument,
    overrides: SetOption = None,
    world: WorldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a config and print every effective value, with steps per stage."""
    from ringweave.pretrain.config import explain_yaml, load_config

    out = Output(as_json)
    checked = load_config(config, overrides or [], world=world)
    out.say(explain_yaml(checked))
    out.result(
        {
            "config": checked.to_dict(),
            "hash": checked.hash(),
            "total_steps": checked.total_steps,
            "steps": [stage.steps for stage in checked.stages],
            "world": checked.world,
        }
    )


@config_app.command("schema", epilog="Example: ringweave config schema --json > schema.json")
def schema(as_json: JsonOption = False) -> None:
    """List every config key with its type and default (`--json`: a JSON Schema)."""
    from ringweave.pretrain.config import RunConfig
    from ringweave.pretrain.config_suggest import key_table

    out = Output(as_json)
    if not as_json:
        out.table("Config keys (N is an index)", ("key", "type", "default"), list(key_table(RunConfig)))
    out.result(RunConfig.model_json_schema())


def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    world: WorldOption = None,
    vocab: Annotated[
        int | None, typer.Option(min=1, help="Vocabulary size, if there is no tokenizer set yet.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Measure what recomputation saves and costs in each stage.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="With --recompute: a rank's memory, as 24GiB."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run will do: stages, layouts, steps, parameters and an estimate of memory."""
    from ringweave.launch.plan import make_plan, vocabulary_size
    from ringweave.pretrain.config import load_config

    out = Output(as_json)
    checked = load_config(config, overrides or [], world=world)
    limit = _bytes_of(memory, recompute=recompute)
    size, origin = (vocab, "--vocab") if vocab else vocabulary_size(Path(checked.tokenizers.dir))
    result = make_plan(checked, vocab=size)
    result["vocabulary_from"] = origin
    columns = (
        "stage",
        "context",
        "layout",
        "steps",
        "slots/step",
        "micro-batches/rank",
        "theta",
        "GiB/rank (estimate)",
    )
    rows: list[list[Any]] = [
        [s["stage"], s["context"], s["layout"], s["steps"], s["tokens_per_step"], s["micro_batches"],
         f"{s['rope_theta']:g}", f"{s['memory']['total_gib']:.2f}"]
        for s in result["stages"]
    ]  # fmt: skip
    out.table(
        f"{checked.run.name}: {result['world']} processes, {result['total_steps']} steps", columns, rows
    )
    out.say(f"parameters: {result['parameters']:,} with a vocabulary of {size:,} ({origin})")
    for line in result["notes"]:
        out.say(f"note: {line}")
    if recompute:
        from ringweave.launch.plan import recompute_tables

        for stage, table in zip(
            result["stages"], recompute_tables(checked, vocab=size, limit=limit), strict=True
        ):
            out.say("\n".join(table.lines()))
            stage["recompute"] = table.to_dict()
    out.result(result)


def _bytes_of(size: str | None, *, recompute: bool) -> int | None:
    """`--memory` as bytes. Raises ConfigError for what is no size, and without `--recompute`."""
    from ringweave.pretrain.errors import ConfigError
    from ringweave.pretrain.units import parse_bytes

    if size is None:
        return None
    if not recompute:
        raise ConfigError(
            f"--memory {size[:40]} without --recompute", where="--memory", fix="add --recompute"
        )
    try:
        return parse_bytes(size)
    except ValueError as error:
        raise ConfigError(str(error)[:200], where="--memory", fix="for example --memory 24GiB") from error


def doctor(as_json: JsonOption = False) -> None:
    """Check this machine: Python, packages, cores, memory, GPU, and a gloo collective."""
    from ringweave.launch.doctor import examine

    out = Output(as_json)
    result = examine(Path(os.getcwd()))
    rows = [
        (check["name"], "ok" if check["ok"] else check["level"], check["detail"])
        for check in result["checks"]
    ]
    out.table("ringweave doctor", ("check", "state", "found"), rows)
    for check in result["checks"]:
        if not check["ok"] and check["fix"]:
            out.say(f"next: {check['name']}: {check['fix']}")
    out.result(result)
    raise typer.Exit(0 if result["ok"] else 1)
