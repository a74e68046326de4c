"""What `dit-accel-eval` shows on a terminal. Names, paths and errors are never read as markup."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dit_accel.pipelines.terminal import err, show

if TYPE_CHECKING:
    from dit_accel.eval.checking import Plan
    from dit_accel.eval.folder import RunFolder
    from dit_accel.eval.spec import Spec
    from dit_accel.eval.timing import Watcher


def show_all(parts: list[Any]) -> None:
    """Tables, and sentences between them."""
    for part in parts:
        if isinstance(part, str):
            typer.echo(part)
        else:
            show(part)


def say(text: str) -> None:
    err().print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def watching() -> Iterator[Watcher]:
    """A bar for every stage, with the time that is left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from dit_accel.eval.timing import Watcher

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err(), speed_estimate_period=600) as bar:

        class Bars(Watcher):
            task: Any = None
            done: float = 0

            def stage(self, name: str, total: int, done: int = 0) -> None:
                self.task, self.done = bar.add_task(name, total=total, completed=done), done

            def advance(self, amount: float) -> None:
                self.done += amount
                bar.update(self.task, completed=round(self.done, 3))

            def note(self, text: str) -> None:
                bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield Bars()


def planned(plans: list[Plan], spec: Spec, path: Path, resolved: dict[str, str]) -> list[Any]:
    """For the terminal: a table with one row a method and pipeline, and sentences about what is left and how long it takes."""
    from datetime import timedelta

    from rich.markup import escape
    from rich.table import Table

    total = timedelta(seconds=round(sum(plan.seconds for plan in plans)))
    more = max(plan.most for plan in plans)
    table = Table("pipeline", "method", "pictures")
    for plan in plans:
        for cell in plan.methods:
            table.add_row(escape(plan.pipeline), escape(cell.label), f"{len(spec.prompts) * spec.seeds}")
    return [
        table,
        f"{len(spec.prompts)} prompts, {spec.seeds} seeds, {spec.timing_rounds} timing rounds, {' on '.join(resolved.values())}.",
        *([f"Fewer steps that match the methods' seconds and FLOPs are added: at most {more}."] if more else []),
        f"Made already: {sum(plan.done for plan in plans)} pictures in {path}.",
        f"About {total} (h:mm:ss) at most, as if every method were as slow as the uncached run, without scoring.",
    ]


def overview(folder: RunFolder, spec: Spec) -> list[Any]:
    """For the terminal: a table with one row a method, and a sentence about each against fewer steps at its seconds."""
    import pandas as pd
    from rich.markup import escape
    from rich.table import Table

    from dit_accel.eval.summary import non_inferior_text, summarize, verdict

    rows, times = (pd.read_parquet(folder.path / f"{name}.parquet") for name in ("results", "timing"))
    summary = summarize(rows, times, score=spec.scores[0], margin=spec.margin, baselines=folder.baselines())
    table = Table(
        "pipeline",
        "method",
        escape(spec.scores[0]),
        "difference to full (95 %)",
        "p (Holm)",
        "non-inferior",
        "PSNR",
        "speed-up",
        "FLOPs ratio",
        caption=escape(
            "Speed-up: measured seconds of denoising, full over method, median over rounds. "
            f"Every figure with its interval: dit-accel-eval report {folder.path}"
        ),
    )
    lines = []
    for row in summary.to_dict("records"):
        number = lambda name, form, row=row: format(row[name], form) if pd.notna(row.get(name)) else ""  # noqa: E731
        difference = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" if pd.notna(row.get("difference")) else ""
        table.add_row(
            escape(str(row["pipeline"])),
            escape(str(row["method"])),
            number("score", ".3f"),
            escape(difference),
            number("p_holm", ".3f"),
            non_inferior_text(row),
            "identical" if row.get("identical") == 1 else number("psnr", ".1f"),
            number("speedup", ".2f") + ("" if row.get("comparable", True) else " (shared device)"),
            number("flops_ratio", ".2f"),
        )
        if said := verdict(row):
            lines.append(f"{row['pipeline']}, {row['method']}: {said}")
    return [table, *lines]
