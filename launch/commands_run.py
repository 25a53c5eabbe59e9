"""Commands about runs: demo, train, launch, verify, eval, export, sample, report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringweave.launch.console import JsonOption, Output, Progress, Session, SetOption, existing_run
from ringweave.pretrain.errors import ConfigError

if TYPE_CHECKING:
    from ringweave.pretrain.config import RunConfig

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder (`run.dir` of the config).")]
ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
AllowOption = Annotated[
    bool,
    typer.Option("--allow-change", help="Resume although the training settings changed (they are listed)."),
]


def register(app: typer.Typer) -> None:
    """Adds this module's commands to `app`."""
    app.command("demo", epilog="Example: ringweave demo --out runs/demo")(demo)
    app.command(
        "train", epilog="Example: ringweave train launch/recipes/demo.yaml --set stages.0.tokens=50K"
    )(train)
    app.command("launch", epilog="Example: ringweave launch run.yaml --to slurm --nodes 2 --script job.sh")(
        launch
    )
    app.command("verify", epilog="Example: ringweave verify parallel --world 4 --json")(verify)
    app.command("eval", epilog="Example: ringweave eval runs/demo")(evaluate)
    app.command("export", epilog="Example: ringweave export runs/demo --out runs/demo/export")(export)
    app.command("sample", epilog="Example: ringweave sample runs/demo --modality image")(sample)
    app.command("report", epilog="Example: ringweave report runs/demo")(report)


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run.")] = Path("runs/demo"),
    as_json: JsonOption = False,
) -> None:
    """Make data, fit tokenizers, train through growing contexts, stop and resume, and write a report."""
    from ringweave.launch.demo import run_demo

    printer = Output(as_json)
    with Progress() as progress:
        result = run_demo(out, progress)
    if not as_json:
        for name, value in result.items():
            printer.say(f"{name}: {_plain(value)}")
    printer.result(result)
    if result.get("ok") is False:
        raise typer.Exit(1)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def started_world(env: dict[str, str] | os._Environ[str]) -> int | None:
    """Number of processes when a launcher (torchrun and those like it) started this one, else None.

    Raises ConfigError when RANK and WORLD_SIZE are there but make no sense.
    """
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    try:
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        raise ConfigError(
            "the launcher's environment makes no sense",
            where=f"RANK={env['RANK']} WORLD_SIZE={env['WORLD_SIZE']}",
            fix="unset both, or start through torchrun",
        )
    return world


def train(
    ctx: typer.Context,
    config: ConfigArgument,
    overrides: SetOption = None,
    allow_change: AllowOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train, going on from the newest good checkpoint in the run folder. Starts local processes if needed."""
    from ringweave.pretrain.config import load_config

    session: Session = ctx.obj
    printer = Output(as_json)
    world = started_world(os.environ)
    checked = load_config(config, overrides or [], world=world)
    session.run_dir = Path(checked.run.dir)
    if world is None and checked.world > 1:
        code = _start_local(config, overrides, checked, allow_change=allow_change)
    else:
        from ringweave.pretrain import job

        code = job.main(checked, allow_change=allow_change)
    if os.environ.get("RANK", "0") == "0":
        printer.result(_outcome(session.run_dir, code))
    raise typer.Exit(code)


def _train_argv(config: Path, overrides: list[str] | None, *, allow_change: bool) -> list[str]:
    argv = ["train", str(config)]
    for item in overrides or []:
        argv += ["--set", item]
    return [*argv, "--allow-change"] if allow_change else argv


def _start_local(config: Path, overrides: list[str] | None, checked: RunConfig, *, allow_change: bool) -> int:
    from ringweave.launch.local import launch_local

    run_dir = Path(checked.run.dir)
    return launch_local(
        _train_argv(config, overrides, allow_change=allow_change),
        nproc=checked.world,
        run_dir=run_dir,
        log_dir=run_dir / "logs",
        grace=checked.timeout.stop,
    )


def _outcome(run_dir: Path, code: int) -> dict[str, Any]:
    from ringweave.launch.local import read_exit

    return {"run": str(run_dir), **(read_exit(run_dir) or {}), "exit_code": code}


def launch(
    ctx: typer.Context,
    config: ConfigArgument,
    overrides: SetOption = None,
    to: Annotated[
        str, typer.Option("--to", help="local (processes here) or slurm (write a job script).")
    ] = "local",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job (slurm).")] = 1,
    minutes: Annotated[int, typer.Option(min=1, help="Time limit of the job in minutes (slurm).")] = 60,
    script: Annotated[
        Path | None, typer.Option(help="Where to write the job script; else it is printed.")
    ] = None,
    allow_change: AllowOption = False,
    as_json: JsonOption = False,
) -> None:
    """Start a run through torchrun on this machine, or write the script that starts it on a Slurm cluster."""
    from ringweave.pretrain.config import load_config

    session: Session = ctx.obj
    printer = Output(as_json)
    checked = load_config(config, overrides or [])
    session.run_dir = Path(checked.run.dir)
    if to == "local":
        code = _start_local(config, overrides, checked, allow_change=allow_change)
        printer.result(_outcome(session.run_dir, code))
        raise typer.Exit(code)
    if to != "slurm":
        raise ConfigError(f"unknown launcher {to!r}", where="--to", fix="local or slurm")
    from ringweave.launch.slurm import job_script

    text = job_script(
        checked, _train_argv(config, overrides, allow_change=allow_change), nodes=nodes, minutes=minutes
    )
    if script is None:
        if not as_json:
            typer.echo(text, nl=False)
    else:
        script.write_text(text, encoding="utf-8")
        printer.say(f"wrote {script}; submit it with: sbatch {script}")
    printer.result({"script": text, "path": str(script) if script else None})


def verify(
    what: Annotated[
        str, typer.Argument(help="`laws`, or `parallel`: every layout of so many processes for two models.")
    ] = "laws",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer layouts and cases.")] = False,
    world: Annotated[int, typer.Option(min=1, help="Processes to check layouts with.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Prove on this machine that packed = separate, any layout = one process, and resumed = never stopped."""
    if what not in ("laws", "parallel"):
        raise ConfigError(
            f"there is nothing to verify called {what!r}",
            where="verify",
            fix="name laws or parallel, or nothing",
        )
    printer = Output(as_json)
    if what == "parallel":
        _verify_parallel(printer, world=started_world(os.environ) or world)
    from ringweave.pretrain.verify import run

    with Progress() as progress:
        result = run(quick=quick, world=world, progress=progress)
    printer.table(
        "ringweave verify",
        ("law", "case", "loss", "gradients", "also", "holds"),
        [_verify_row(row) for row in result["rows"]],
    )
    printer.say("all laws hold" if result["holds"] else "a law is broken: see the rows that do not hold")
    printer.result(result)
    raise typer.Exit(0 if result["holds"] else 1)


def _verify_parallel(printer: Output, *, world: int) -> None:
    """The matrix; under a launcher rank 0 speaks."""
    from ringweave.pretrain.verify_parallel import run

    with Progress() as progress:
        result = run(world=world, progress=progress)
    if os.environ.get("RANK", "0") == "0":
        printer.table(
            f"ringweave verify parallel, {result['world']} processes",
            ("model", "layout", "loss", "gradients", "norm", "seconds", "holds"),
            [
                [
                    r["model"], r["layout"], _short(r["max_rel_loss_diff"]), _short(r["max_rel_grad_diff"]),
                    _short(r["rel_norm_diff"]), str(r["seconds"]), "yes" if r["holds"] else "NO",
                ]
                for r in result["rows"]
            ],
        )  # fmt: skip
        printer.say(
            f"{sum(r['holds'] for r in result['rows'])} of {len(result['rows'])} layouts give one process's loss to "
            f"{result['bounds']['loss']:.0e} and gradients to {result['bounds']['gradient']:.0e}"
        )
        printer.result(result)
    raise typer.Exit(0 if result["holds"] else 1)


def _verify_row(row: dict[str, Any]) -> list[str]:
    """A check as cells: its differences, what else it counted, and the verdict."""
    known = ("law", "layout", "max_rel_loss_diff", "max_rel_grad_diff", "holds")
    also = ", ".join(f"{k.replace('_', ' ')} {_short(v)}" for k, v in row.items() if k not in known)
    differences = [_short(row[k]) if k in row else "" for k in known[2:4]]
    return [str(row["law"]), str(row["layout"]), *differences, also, "yes" if row["holds"] else "NO"]


def _short(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def evaluate(ctx: typer.Context, run: RunArgument, as_json: JsonOption = False) -> None:
    """Loss of the newest checkpoint on held-out records, by modality, beside the unigram entropy.

    `ringweave eval rgba` compares folders of RGBA pictures instead; a run folder of that name is given as ./rgba.
    """
    existing_run(run)
    ctx.obj.run_dir = run
    from ringweave.pretrain.evaluate import evaluate_run

    printer = Output(as_json)
    result = evaluate_run(run)
    heldout = result.get("heldout", {})
    if any("by_sigma" in item for item in heldout.values()):
        levels = list(next(iter(heldout.values()))["by_sigma"])
        rows = [
            (f"{name}{what}", *(_number(item[key][level]) for level in levels))
            for name, item in heldout.items()
            for what, key in (("", "by_sigma"), (", untrained", "untrained_by_sigma"))
        ]
        title = f"{run}: held-out mean square error of velocities, by noise level"
        printer.table(title, ("modality", *levels), rows)
        printer.result(result)
        return
    rows = [
        (name, *(_number(item.get(k)) for k in ("loss", "unigram_entropy", "tokens")))
        for name, item in heldout.items()
    ]
    printer.table(
        f"{run}: held-out loss (nats a token)", ("modality", "loss", "unigram entropy", "tokens"), rows
    )
    printer.result(result)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def export(
    ctx: typer.Context,
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder to write; default RUN/export.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Checkpoint to export; default the newest good one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as a model folder that `transformers` loads, or `diffusers` for a run of kind dit."""
    existing_run(run)
    ctx.obj.run_dir = run
    from ringweave.pretrain.export import export_run

    printer = Output(as_json)
    result = export_run(run, out=out, step=step)
    for name, value in result.items():
        printer.say(f"{name}: {value}")
    printer.result(result)


def sample(
    ctx: typer.Context,
    run: RunArgument,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to go on from. Repeatable.")
    ] = None,
    modality: Annotated[
        list[str] | None, typer.Option("--modality", help="Of an lwm: modality to make. Repeatable.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option("--source", help="Of a dit: held-out source to make anew. Repeatable.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Of a dit: documents of each source.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Of a dit: steps from noise to picture.")] = 20,
    guidance: Annotated[
        float, typer.Option(help="Of a dit: 1 is none, more follows the words closer.")
    ] = 4.0,
    solver: Annotated[str, typer.Option(help="Of a dit: euler, or heun with two passes a step.")] = "euler",
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of a dit: another seed, other pictures; default that of the run."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder; default RUN/samples.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Of a dit: checkpoint to sample; default the newest good one.")
    ] = None,
    by_stage: Annotated[
        bool, typer.Option("--by-stage", help="Of a dit: by the model of each stage's end, for the report.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Let the newest checkpoint write text and draw images; a dit makes layers, of words or held-out records."""
    existing_run(run)
    ctx.obj.run_dir = run
    given, printer, out = out, Output(as_json), out or run / "samples"
    if _kind(run) == "dit":
        from ringweave.pretrain.config import load_config
        from ringweave.pretrain.dit_sample import SOLVERS, SampleSettings
        from ringweave.pretrain.sample_dit import sample_diffusion

        if solver not in SOLVERS:
            raise ConfigError(
                f"no solver is called {solver[:40]!r}", where="--solver", fix=" or ".join(SOLVERS)
            )
        chosen = load_config(run / "config.yaml").run.seed if seed is None else seed
        settings = SampleSettings(steps=steps, guidance=guidance, solver=solver, seed=chosen)  # type: ignore[arg-type]
        if by_stage:
            _only_by_stage({"--prompt": prompt, "--source": source, "--out": given, "--step": step})
            from ringweave.pretrain.previews import draw_by_stage

            drawn = draw_by_stage(run, count=count, settings=settings, say=printer.say)
            result: dict[str, Any] = {"samples": drawn, "path": str(out)}
        else:
            result = sample_diffusion(
                run, prompt or [], out, sources=source or [], count=count, settings=settings, step=step
            )
    else:
        if by_stage or step is not None:
            raise ConfigError(
                "this run is no diffusion run", where="--by-stage" if by_stage else "--step",
                fix="leave it out: an lwm is sampled from its export, which `ringweave export --step` makes",
            )  # fmt: skip
        from ringweave.pretrain.sample import sample_run

        result = sample_run(run, prompt or [], modality or [], out)
    for name, value in result.items():
        printer.say(f"{name}: {_plain(value)}")
    printer.result(result)


def _only_by_stage(others: dict[str, Any]) -> None:
    """ConfigError for options that say nothing beside `--by-stage`."""
    if named := [name for name, value in others.items() if value not in (None, [])]:
        raise ConfigError(
            f"--by-stage with {', '.join(named)}",
            where="sample",
            fix="leave them out: every stage's checkpoint, every held-out source, in RUN/samples/stage-K",
        )


def _kind(run: Path) -> str:
    """The backbone of a run; "lwm" where its config does not say."""
    from ringweave.pretrain.config import load_config

    file = run / "config.yaml"
    return load_config(file).model.kind if file.is_file() else "lwm"


def report(ctx: typer.Context, run: RunArgument, as_json: JsonOption = False) -> None:
    """Write RUN/report.html: verdict, curves, stages, restarts, samples, environment, in one file."""
    existing_run(run)
    ctx.obj.run_dir = run
    from ringweave.pretrain.report import write_report

    printer = Output(as_json)
    path = write_report(run)
    printer.say(f"wrote {path}")
    printer.result({"report": str(path)})
