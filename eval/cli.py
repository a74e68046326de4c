"""The `dit-accel-eval` command: measure quality against speed, and see what came out."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.pipelines.terminal import err, plain_errors, quiet, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dit_accel.eval.timing import Watcher

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure what acceleration costs in quality and gains in seconds, with paired statistics.",
)
CHANGES, MACHINE = "Instead of the specification's", "Machine"


@app.callback()
def root() -> None:
    pass


@app.command()
def run(
    spec: Annotated[Path | None, typer.Argument(help="A YAML file; see eval/specs/. Without one, give --method.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run.", show_default="runs/ and the specification's name")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Make pictures again that failed before.")] = False,
    pipeline: Annotated[
        list[str] | None, typer.Option(help="Name, hub id or folder; may be repeated.", rich_help_panel=CHANGES)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompt set: text, JSON, JSON lines, CSV or TSV.", rich_help_panel=CHANGES)
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=r"YAML of one grid, as 'cache: {selector: \[random, drift]}'; may be repeated.", rich_help_panel=CHANGES),
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            help="emoji-reward, or image-reward or clip-score, perhaps with a checkpoint after a colon; may be repeated.",
            rich_help_panel=CHANGES,
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Pictures of every prompt.", rich_help_panel=CHANGES)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=CHANGES)] = None,
    margin: Annotated[
        float | None, typer.Option(help="The largest loss of score that does not matter, declared now.", rich_help_panel=CHANGES)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pictures made together where time is not measured.", rich_help_panel=CHANGES)
    ] = None,
    timing_rounds: Annotated[int | None, typer.Option(help="How often every method is timed.", rich_help_panel=CHANGES)] = None,
    selector_file: Annotated[
        Path | None, typer.Option(help="A Python file that registers selectors of your own.", rich_help_panel=CHANGES)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MACHINE)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=MACHINE)] = None,
    offload: Annotated[str | None, typer.Option(help="none, model, group or sequential.", rich_help_panel=MACHINE)] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.", rich_help_panel=MACHINE)] = False,
) -> None:
    r"""Make, score, compare and time the pictures of every method. Interrupted at any moment, the same command goes on.

    Runs in full, with fewer steps and with a cache that caches nothing are added by themselves. On several GPUs or machines, put
    [bold]accelerate launch -m dit_accel.eval[/] in place of dit-accel-eval.

    [bold]Examples[/]

      dit-accel-eval run eval/specs/quick.yaml

      dit-accel-eval run --pipeline emoji-flux --prompts my.txt --method 'cache: {selector: \[random, drift], interval: \[3, 5]}'

    The exit code is 1 if a picture or a method failed; the rows say why.
    """
    with plain_errors(debug, extra="eval"):
        from dit_accel.eval.spec import read_spec

        quiet()
        changes: dict[str, Any] = dict(
            pipelines=pipeline or None,
            prompts=None if prompts is None else str(prompts.absolute()),
            methods=[parsed(text) for text in method] if method else None,
            scores=score or None,
            selector_file=None if selector_file is None else str(selector_file.absolute()),
        )
        changes |= dict(seeds=seeds, steps=steps, margin=margin, batch_size=batch_size, timing_rounds=timing_rounds)
        asked = read_spec(spec, **changes, dtype=dtype, device=device, offload=offload)

        from dit_accel.eval.folder import RunFolder
        from dit_accel.eval.runs import Evaluation

        folder = RunFolder(output or Path("runs") / (spec.stem if spec else "evaluation"))
        with watching() as watcher:
            evaluation = Evaluation(asked, folder, watcher, retry_failed=retry_failed)
            rows = evaluation.run()
        if not evaluation.state.is_main_process:
            return
        show(overview(folder, asked))
        failed = rows[rows["error"].notna()]
        if len(failed):
            first = failed.iloc[0]
            err().print(
                f"[red]{len(failed)} of {len(rows)} pictures failed[/], first {first['prompt']!r} with {first['method']}: "
                f"{first['error']}\nTry them again with --retry-failed.",
                highlight=False,
                markup=True,
            )
            raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    output: Annotated[Path | None, typer.Option(help="Folder of the report.", show_default="RUN/report")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Write one HTML page about a run that needs nothing but itself, and its figures as PNG and CSV.

    Quality against measured seconds, seconds against FLOPs, differences prompt by prompt, the worst and the best pictures beside
    their twins in full, selection maps, and how all of it was measured. Of a run that is not finished, what is there.
    """
    with plain_errors(debug, extra="eval"):
        from dit_accel.eval.folder import RunFolder
        from dit_accel.eval.report import write_report

        typer.echo(write_report(RunFolder(folder), output or folder / "report"))


@contextmanager
def watching() -> Iterator[Watcher]:
    """A bar for every stage, with the time that is left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from dit_accel.eval.timing import Watcher

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), speed_estimate_period=600) as bar:

        class Bars(Watcher):
            task: Any = None
            done: float = 0

            def stage(self, name: str, total: int, done: int = 0) -> None:
                self.task, self.done = bar.add_task(name, total=total, completed=done), done

            def advance(self, amount: float) -> None:
                self.done += amount
                bar.update(self.task, completed=round(self.done, 3))

        yield Bars()


def parsed(text: str) -> Any:
    """The YAML of an option."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{text!r} is not YAML: {error}") from None


def overview(folder: Any, spec: Any) -> Any:
    """One row a method, for the terminal."""
    import pandas as pd
    from rich.markup import escape
    from rich.table import Table

    from dit_accel.eval.summary import summarise

    rows, times = (pd.read_parquet(folder.path / f"{name}.parquet") for name in ("results", "timing"))
    summary = summarise(rows, times, score=spec.scores[0], margin=spec.margin)
    table = Table(
        "pipeline",
        "method",
        spec.scores[0],
        "difference to full (95 %)",
        "p (Holm)",
        "PSNR",
        "speed-up",
        "FLOPs ratio",
        caption="Speed-up: measured seconds of denoising, full over method, median over rounds. "
        f"Every figure with its interval: dit-accel-eval report {folder.path}",
    )
    for row in summary.to_dict("records"):
        number = lambda name, form, row=row: format(row[name], form) if pd.notna(row.get(name)) else ""  # noqa: E731
        difference = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" if pd.notna(row.get("difference")) else ""
        table.add_row(
            escape(str(row["pipeline"])),
            escape(str(row["method"])),
            number("score", ".3f"),
            difference,
            number("p_holm", ".3f"),
            "identical" if row.get("identical") == 1 else number("psnr", ".1f"),
            number("speedup", ".2f") + ("" if row.get("comparable", True) else " (shared device)"),
            number("flops_ratio", ".2f"),
        )
    return table


def main() -> None:
    app(prog_name="dit-accel-eval")


if __name__ == "__main__":
    main()
