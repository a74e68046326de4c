"""Progress: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

MINUTE = 60.0


@contextmanager
def loading(log: Console, name: str) -> Iterator[None]:
    """Says that a pipeline is being loaded, inside a `with` block; the hub's library shows its downloads itself."""
    if log.is_terminal:
        log.print(f"Loading {escape(name)} ...", soft_wrap=True, highlight=False)
        yield
    else:
        with now_and_then(log, lambda: f"Loading {name} ..."):
            yield


@contextmanager
def denoising(log: Console, total: int) -> Iterator[Callable[[], None]]:
    """Shows how many of all denoising steps are done, inside a `with` block; gives what to call after each."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if log.is_terminal:
            bar.advance(task)

    if not log.is_terminal:
        with now_and_then(log, lambda: f"Denoising: {done} of {total} steps"):
            yield advance
        return
    columns = (TextColumn("denoising"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=log, transient=True, expand=True) as bar:
        task = bar.add_task("", total=total)
        yield advance


@contextmanager
def now_and_then(log: Console, line: Callable[[], str]) -> Iterator[None]:
    """Prints a line and the time so far every minute, inside a `with` block."""
    over, start = threading.Event(), time.monotonic()

    def talk() -> None:
        while not over.wait(MINUTE):
            minutes, seconds = divmod(int(time.monotonic() - start), 60)
            log.print(f"{escape(line())}, {minutes}:{seconds:02}", soft_wrap=True, highlight=False)

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
