"""Output of the commands: tables, errors as one sentence, and nothing from the libraries."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dit_accel.pipelines.extras import missing


def show(table: Table, as_json: bool = False) -> None:
    """In a file or a pipe as wide as needed, on a terminal as wide as it is; where that is too narrow, one row below another.

    Columns that are not to be wrapped, such as paths, are never cut.

    Args:
        table: cells are texts in rich's markup.
        as_json: a list with an object for every row in its place, for scripts.
    """
    columns = [(str(column.header), list(column.cells)) for column in table.columns]
    rows = [
        dict(zip([header for header, _ in columns], cells, strict=True)) for cells in zip(*(c for _, c in columns), strict=True)
    ]
    if as_json:
        return typer.echo(json.dumps([{key: Text.from_markup(str(cell)).plain for key, cell in row.items()} for row in rows]))
    console = Console()
    needed = Measurement.get(console, console.options.update(width=100_000), table)
    if not console.is_terminal:
        return Console(width=needed.maximum).print(table)
    if needed.minimum <= console.width:
        return console.print(table)
    width = max(len(header) for header, _ in columns)
    for row in rows:
        for header, cell in row.items():
            console.print(f"[bold]{header:{width}}[/]  {cell}", soft_wrap=True)
        console.print()
    if table.caption:
        console.print(f"[italic]{table.caption}[/]")


def version_option(command: str) -> Any:
    """`--version`, an option of this command."""

    def show_version(value: bool) -> None:
        if value:
            from importlib.metadata import version

            typer.echo(f"{command} {version('dit-accel')}")
            raise typer.Exit()

    return typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")


def err() -> Console:
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty())


@contextmanager
def plain_errors(debug: bool = False, extra: str = "cli") -> Iterator[None]:
    """Errors as one sentence and an exit code: 1 for what went wrong, 2 for wrong usage, 130 for Ctrl-C.

    `extra` is what to install if a package is missing.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        err().print("Interrupted. The pictures finished before are kept.")
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            raise
        from rich.markup import escape

        err().print(f"[red]Error:[/] {escape(sentence(error, extra))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def sentence(error: Exception, extra: str) -> str:
    if isinstance(error, ModuleNotFoundError):
        return missing(error, extra)
    from dit_accel.pipelines.loading import LoadError

    if type(error).__name__ == "OutOfMemoryError":
        return "The device has too little memory for this: try --offload model, a smaller --height and --width, or --batch-size 1."
    if isinstance(error, (LoadError, ValueError)) or (isinstance(error, FileNotFoundError) and not error.filename):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}."
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (--debug shows where)"


@contextmanager
def usage(flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """A ValueError in here, or a sentence that says that a file is not there, is the fault of an option.

    `flags` are names that the message may have for options, and how the options are written.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, OSError) and error.filename:  # of the system, not of ours
            raise
        raise typer.BadParameter(spelled(str(error), flags or {})) from None


def spelled(message: str, flags: Mapping[str, str]) -> str:
    """A message with options as they are written on the command line.

    Names with an underscore or a value are replaced anywhere, others, which may be plain words, only where the message begins with
    them, as in "full_steps, tolerance and when each say when a step is full".
    """
    if not flags:
        return message
    either = "|".join(sorted(map(re.escape, flags), key=len, reverse=True))
    first = re.match(rf"(?:(?:{either})\b(?:, | and )?)*", message)
    end = first.end() if first else 0

    def replaced(match: re.Match[str]) -> str:
        flag, value = flags[match[1]], match[2]
        if value is None:
            return flag if match.start() < end or "_" in match[1] else match[0]
        switches = {"True": flag, "False": flag.replace("--", "--no-", 1)}
        return switches.get(value, f"{flag} {value.strip(chr(39))}")

    return re.sub(rf"(?<![\w-])({either})\b(?:=('[^']*'|[\w+-]+(?:\.\w+)*))?", replaced, message)


def quiet() -> None:
    """Silence the libraries: what matters is reported in the command's own words, and warnings as sentences."""
    import warnings

    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="diffusers|transformers")
    warnings.showwarning = lambda message, *_, **__: warn(err(), str(message))


def warn(log: Console, sentence: str) -> None:
    from rich.markup import escape

    log.print(f"[yellow]Warning:[/] {escape(sentence)}", highlight=False)
