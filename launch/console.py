"""What the commands share: printing for people and for programs, progress, and messages of failures.

With `--json` the last line of stdout is one JSON object and everything for people goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ringweave.pretrain.errors import ConfigError, redact
from ringweave.tokenizers.errors import UserError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a config key, as stages.0.tokens=10K. Repeatable."
    ),
]


@dataclass
class Session:
    """State of one call of the command line: where a traceback may be written."""

    run_dir: Path | None = None


class Output:
    """Prints a command's result. Text and tables for people, or one JSON object."""

    def __init__(self, as_json: bool) -> None:
        from rich.console import Console

        self.as_json = as_json
        stream = sys.stderr if as_json else sys.stdout
        # Off a terminal there is no window to fit into; rich would fold tables at 80 columns.
        self.console = Console(file=stream, highlight=False, width=None if stream.isatty() else 160)

    def say(self, text: str) -> None:
        """One or more lines for people, printed as they are."""
        self.console.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table for people."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
        self.console.print(table)

    def result(self, payload: dict[str, Any]) -> None:
        """The command's answer to a program; nothing without `--json`."""
        if self.as_json:
            print_json(payload)


def print_json(payload: dict[str, Any]) -> None:
    """`payload` on one line of stdout; NaN and infinities become null, as JSON has none."""
    sys.stdout.write(json.dumps(_finite(payload), default=str, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


class Progress:
    """Callable `(message, done=None, total=None)`: on stderr, a bar or a line now and then."""

    #: Seconds between two lines when stderr is no terminal.
    QUIET = 2.0

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._last = -self.QUIET
        self._said = ""

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("…", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(
        self, message: str = "", done: float | None = None, total: float | None = None, **_: Any
    ) -> None:
        """`message` names the work; `done` of `total` units of it are finished."""
        if self._bar is not None:
            self._bar.update(self._task, description=message, completed=done or 0, total=total)
            return
        now = time.monotonic()
        ended = done is not None and done == total
        if now - self._last < self.QUIET and not ended:
            return
        text = f"{message} {done:g}/{total:g}" if done is not None and total else message
        if text != self._said:
            print(text, file=sys.stderr, flush=True)
            self._last, self._said = now, text


def report_error(error: UserError, *, as_json: bool) -> None:
    """What, where, why and what next, on stderr; with `--json` also as an object on stdout."""
    if as_json:
        print_json({key: redact(value) for key, value in error.as_dict().items()})
    rank = os.environ.get("RANK", "0")
    if isinstance(error, ConfigError) and rank != "0":
        return  # every rank reads the same config; one of them speaks
    prefix = "error: " if rank == "0" else f"rank {rank}: error: "
    text = redact(error.render())
    if not sys.stderr.isatty():
        print(f"{prefix}{text}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    first, _, rest = text.partition("\n")
    body = Text.assemble((prefix, "bold red"), (first, "bold"), ("\n" + rest if rest else ""))
    Console(stderr=True, highlight=False).print(body, soft_wrap=True)


def report_crash(error: BaseException, *, run_dir: Path | None, as_json: bool) -> None:
    """An unexpected exception: traceback into the run folder when there is one, else to stderr."""
    text = redact("".join(traceback.format_exception(error)))
    what = redact(f"{type(error).__name__}: {error}".splitlines()[0])
    rank = os.environ.get("RANK", "0")
    where = ""
    if run_dir is not None:
        target = run_dir / "logs" / f"crash-rank-{rank}-{os.getpid()}.txt"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            where = str(target)
        except OSError:
            where = ""
    if as_json:
        print_json({"error": type(error).__name__, "exit_code": 1, "what": what, "where": where})
    if not where:
        print(text, file=sys.stderr, end="")
    print(f"error: unexpected failure: {what}", file=sys.stderr)
    if where:
        print(f"  where: traceback in {where}", file=sys.stderr)
    print(
        "  next:  this is a bug; `ringweave doctor` shows the environment to report with it", file=sys.stderr
    )


def existing_folder(path: Path, *, what: str, fix: str) -> Path:
    """`path` when it is a folder; ConfigError otherwise."""
    if not path.is_dir():
        raise ConfigError(f"no such {what}", where=str(path), fix=fix)
    return path


def existing_run(path: Path) -> Path:
    """A run folder (it has metrics.jsonl, config.yaml or checkpoints/); ConfigError otherwise."""
    existing_folder(path, what="run folder", fix="give the `run.dir` of a config that was trained")
    if not any((path / name).exists() for name in ("metrics.jsonl", "config.yaml", "checkpoints")):
        raise ConfigError(
            "not a run folder", where=str(path), why="it has no metrics.jsonl, config.yaml or checkpoints/",
            fix="give the `run.dir` of a config that was trained",
        )  # fmt: skip
    return path
