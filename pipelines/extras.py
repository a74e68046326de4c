"""Packages that come with an extra of the installation, and what to say when they are missing."""

from __future__ import annotations

import importlib
import io
import sys


def start(module: str, extra: str) -> None:
    """Run the command of a module, or exit with one sentence if a package that the module imports is not installed.

    Letters that the encoding of standard output lacks, as that of a file on Windows may, are replaced by question marks.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        sys.exit(f"Error: {missing(error, extra)}")
    command.main()


def missing(error: ModuleNotFoundError, extra: str) -> str:
    package = str(error.name).split(".")[0]
    return f'{package} is not installed; install what this needs with: pip install "dit-accel[{extra}]"'
