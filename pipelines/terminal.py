"""How the commands talk: tables, errors as one sentence, and nothing from the libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from dit_accel.pipelines.extras import missing


def show(table: Any) -> None:
    """On a terminal as wide as it is; in a file or a pipe as wide as needed."""
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(table)


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

        err().print(f"[red]Error:[/] {escape(sentence(error, extra))}", highlight=False)
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
def usage() -> Iterator[None]:
    """A ValueError in here is the fault of an option."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def quiet() -> None:
    """Keep the libraries from talking: what matters is reported in the command's own words."""
    import warnings

    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="diffusers|transformers")
