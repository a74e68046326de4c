"""The command, run on tiny pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dit_accel.pipelines.cli import app


@pytest.fixture
def run() -> Callable:
    """`run("generate", ...)` gives the result of the command: exit_code, stdout, stderr."""

    def command(*arguments: object, input: bytes | None = None):
        words = [str(argument) for argument in arguments]
        return CliRunner().invoke(app, words, input, prog_name="dit-accel", env={"COLUMNS": "200"})

    return command


@pytest.fixture
def make(run, flux_path, tmp_path) -> Callable:
    """`make(prompt, ...)` is `dit-accel generate` on the tiny FLUX, small and short, into tmp_path / "out"."""

    def generate(*arguments: object, pipeline: Path = flux_path):
        small = ("--height", 64, "--width", 48, "--steps", 3, "--output", tmp_path / "out")
        return run("generate", "--pipeline", pipeline, *small, *arguments)

    return generate
