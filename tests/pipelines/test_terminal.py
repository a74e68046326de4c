"""What is shown on terminals of every width, and elsewhere."""

from __future__ import annotations

import io
import json
import threading

import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dit_accel.pipelines import progress, terminal

PATH = "/a/folder with/a long name/" + "red-apple-" * 12 + "seed0.png"


def table() -> Table:
    made = Table("prompt", "seed", Column("picture", no_wrap=True), caption="Seconds are of denoising.")
    made.add_row(escape("red apple [3d] style " * 4), "0", escape(PATH))
    return made


def shown(monkeypatch, made: Table, width: int, is_terminal: bool = True) -> str:
    file = io.StringIO()

    def console(width: int = width) -> Console:
        return Console(file=file, force_terminal=is_terminal, width=width, color_system=None)

    monkeypatch.setattr(terminal, "Console", console)
    terminal.show(made)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120, 400])
def test_paths_are_never_cut(monkeypatch, width):
    text = shown(monkeypatch, table(), width)
    assert PATH in text and "…" not in text and "Seconds are of denoising." in text
    if width == 400:
        assert "┃" in text, "a table where it fits"
    else:
        assert text.splitlines()[1] == "seed     0", "one value below another where it does not"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_what_can_be_wrapped_stays_a_table(monkeypatch, width):
    made = Table("name", "chooses")
    made.add_row("random", "a long sentence of short words " * 6)
    text = shown(monkeypatch, made, width)
    assert "┃" in text and max(map(len, text.splitlines())) <= width


def test_a_file_is_as_wide_as_needed(monkeypatch):
    text = shown(monkeypatch, table(), 40, is_terminal=False)
    assert any("red apple [3d] style " * 4 in line and PATH in line for line in text.splitlines())


def test_json(capsys):
    terminal.show(table(), as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"prompt": "red apple [3d] style " * 4, "seed": "0", "picture": PATH}]


class Log(io.StringIO):
    """A file that says when a line has come."""

    def __init__(self) -> None:
        super().__init__()
        self.line = threading.Event()

    def write(self, text: str) -> int:
        done = super().write(text)
        if "\n" in text:
            self.line.set()
        return done


def test_a_line_a_minute_where_there_is_no_terminal(monkeypatch):
    file = Log()
    log = Console(file=file, width=20)
    with progress.loading(log, "emoji-flux"), progress.denoising(log, 28) as advance:
        advance()
    assert file.getvalue() == "", "nothing within the first minute"
    monkeypatch.setattr(progress, "MINUTE", 0.001)
    with progress.loading(log, "a[b]"):
        assert file.line.wait(60)
    assert file.getvalue().startswith("Loading a[b] ..., 0:0")
    file.seek(0), file.truncate(), file.line.clear()
    with progress.denoising(log, 28) as advance:
        for _ in range(5):
            advance()
        file.line.clear()
        assert file.line.wait(60)
    assert "Denoising: 5 of 28 steps, 0:0" in file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_says_what_is_loaded_and_shows_a_bar(width):
    file = io.StringIO()
    log = Console(file=file, force_terminal=True, width=width, color_system=None)
    with progress.loading(log, PATH):
        assert file.getvalue() == f"Loading {PATH} ...\n"
    with progress.denoising(log, 28) as advance:
        for _ in range(28):
            advance()
    assert "28/28" in file.getvalue() and "…" not in file.getvalue()
