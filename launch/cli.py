"""The command `ringweave`: one sub-command a task, one handler for everything that fails.

Commands import what they need when they run, so `ringweave --help` and config mistakes never wait for torch.
Exit codes are those of docs/errors.md.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ringweave.launch import (
    commands_config,
    commands_data,
    commands_eval,
    commands_run,
    commands_tokenizer,
    commands_vocabulary,
)
from ringweave.launch.console import Session, print_json, report_crash, report_error
from ringweave.parallel.process import leave, print_on
from ringweave.tokenizers.errors import EXIT_CONFIG, UserError


class Commands(TyperGroup):
    """Finds commands of two words too: `eval rgba A B` is the command of that name, `eval RUN` stays `eval`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments name, and what is left of them."""
        for at, word in enumerate(args[1:], 1):
            if not word.startswith("-") and f"{args[0]} {word}" in self.commands:
                args = [f"{args[0]} {word}", *args[1:at], *args[at + 1 :]]
            if not word.startswith("-") or word == "--":
                break
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="ringweave",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pretraining for long multimodal contexts: data × pipeline × tensor × ring-sequence parallel.",
    epilog="Example: ringweave demo",
)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"ringweave {installed('ringweave')}")
        raise typer.Exit(0)


commands_run.register(app)
commands_eval.register(app)
commands_data.register(app)
commands_tokenizer.register(app)
commands_vocabulary.register(app)
commands_config.register(app)


def run(argv: Sequence[str]) -> int:
    """Runs one command line (without the program name) and returns its exit code; never raises."""
    session = Session()
    as_json = "--json" in argv
    try:
        code = app(args=list(argv), prog_name="ringweave", standalone_mode=False, obj=session)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UserError as error:
        report_error(error, as_json=as_json)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) went away; keep the interpreter's last flush from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of typer
            return _usage(error, as_json=as_json)
        report_crash(error, run_dir=session.run_dir, as_json=as_json)
        return 1


def _usage(error: Any, *, as_json: bool) -> int:
    """A mistyped command or option: typer's own message, exit 2."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return EXIT_CONFIG
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ringweave"
    if as_json:
        print_json(
            {"error": "UsageError", "exit_code": EXIT_CONFIG, "what": error.format_message(), "where": path}
        )
    print(f"error: {error.format_message()}\n  next:  `{path} --help` shows the options", file=sys.stderr)
    return EXIT_CONFIG


def main() -> None:
    """Entry point of the console script and of `python -m ringweave.launch.cli`."""
    rank = "RANK" in os.environ  # of a job, started by torchrun or srun
    print_on(log=rank)
    code = run(sys.argv[1:])
    if not rank:  # else its peers may be gone
        atexit._run_exitfuncs()
    leave(code)


if __name__ == "__main__":
    main()
