"""The `dit-accel-eval` command: measure quality against speed, and report it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.eval.console import overview, planned, say, show_all, watching
from dit_accel.pipelines.terminal import err, plain_errors, quiet, usage, version_option

if TYPE_CHECKING:
    from dit_accel.eval.spec import Spec

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure what acceleration costs in quality and gains in seconds, with paired statistics.",
)
CHANGES, MACHINE = "Instead of the specification's", "Machine"


@app.callback()
def root(version: Annotated[bool, version_option("dit-accel-eval")] = False) -> None:
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
    baselines: Annotated[
        bool | None,
        typer.Option(
            "--baselines/--no-baselines", help="Add runs with fewer steps at each method's seconds.", rich_help_panel=CHANGES
        ),
    ] = None,
    selector_file: Annotated[
        Path | None, typer.Option(help="A Python file that registers selectors of your own.", rich_help_panel=CHANGES)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MACHINE)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=MACHINE)] = None,
    offload: Annotated[str | None, typer.Option(help="none, model, group or sequential.", rich_help_panel=MACHINE)] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.", rich_help_panel=MACHINE)] = False,
) -> None:
    r"""Make, score, compare and time the pictures of every method. Interrupted at any moment, the same command resumes the run.

    Uncached runs, a cache that caches nothing and, unless told otherwise, runs with fewer steps are added automatically. On several
    GPUs or machines, put [bold]accelerate launch -m dit_accel.eval[/] in place of dit-accel-eval.

    [bold]Examples[/]

      dit-accel-eval run eval/specs/quick.yaml

      dit-accel-eval run --pipeline emoji-flux --prompts my.txt --method 'cache: {selector: \[random, drift], interval: \[3, 5]}'

    The exit code is 1 if a picture or a method failed, and the rows say why; 2 if something was asked for that cannot be had.
    """
    with plain_errors(debug, extra="eval"):
        asked, folder = understood(locals())
        from dit_accel.eval.folder import RunFolder
        from dit_accel.eval.runs import Evaluation

        run_folder = RunFolder(folder, say)
        with watching() as watcher:
            with usage():
                evaluation = Evaluation(asked, run_folder, watcher, retry_failed=retry_failed)
                evaluation.prepare()
            rows = evaluation.run()
        if not evaluation.state.is_main_process:
            return
        show_all(overview(run_folder, asked))
        failed = rows[rows["error"].notna()]
        if len(failed):
            from rich.markup import escape

            first = failed.iloc[0]
            what = escape(f"{first['prompt']!r} with {first['method']}: {first['error']}")
            err().print(
                f"[red]{len(failed)} of {len(rows)} pictures failed[/], first {what}\nTry them again with --retry-failed.",
                highlight=False,
                soft_wrap=True,
            )
            raise typer.Exit(1)


def like_run(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `run`, except those that are about pictures that were made."""
    parameters = inspect.signature(run, eval_str=True).parameters
    kept = [one for name, one in parameters.items() if name != "retry_failed"]
    command.__signature__ = inspect.signature(run).replace(parameters=kept)  # type: ignore[attr-defined]
    return command


@app.command("check")
@like_run
def check_command(**given: Any) -> None:
    """Show what `run` would do with the same arguments, and roughly how long it takes. Nothing is written.

    Every method is tried on the pipeline's transformer without weights, and two denoising steps are timed.

    [bold]Example[/]

      dit-accel-eval check eval/specs/quick.yaml
    """
    with plain_errors(given["debug"], extra="eval"):
        asked, path = understood(given)
        from dit_accel.eval.checking import bench_of, check, plan, resolve
        from dit_accel.eval.folder import RunFolder

        folder = RunFolder(path, say)
        with usage():
            resolved = resolve(asked)
            check(asked)
            folder.compare(asked, resolved)
        plans = []
        for name in asked.pipelines:
            with usage():
                bench = bench_of(asked, name)
            plans.append(plan(asked, folder, bench))
            del bench
        show_all(planned(plans, asked, path, resolved))


def understood(given: dict[str, Any]) -> tuple[Spec, Path]:
    """The evaluation that the arguments of `run` describe, and its folder."""
    from dit_accel.eval.spec import read_spec

    quiet()
    spec, output = given["spec"], given["output"]
    absolute = {name: None if given[name] is None else str(given[name].absolute()) for name in ("prompts", "selector_file")}
    same = ("seeds", "steps", "margin", "batch_size", "timing_rounds", "baselines", "dtype", "device", "offload")
    with usage():
        asked = read_spec(
            spec,
            pipelines=given["pipeline"] or None,
            methods=[parsed(text) for text in given["method"]] if given["method"] else None,
            scores=given["score"] or None,
            **absolute,
            **{name: given[name] for name in same},
        )
    return asked, output or Path("runs") / (spec.stem if spec else "evaluation")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    output: Annotated[Path | None, typer.Option(help="Folder of the report.", show_default="RUN/report")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="A method as the table names it, to which all others are compared, too, prompt by prompt; may be repeated.",
            metavar="METHOD",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Write one self-contained HTML page about a run, and its figures as PNG and CSV.

    Quality against measured seconds, seconds against FLOPs, differences prompt by prompt, the worst and the best pictures beside
    their uncached baselines, selection maps, and the protocol. Of an unfinished run, the report shows what is there.
    """
    with plain_errors(debug, extra="eval"):
        from dit_accel.eval.against import check_methods
        from dit_accel.eval.folder import RunFolder
        from dit_accel.eval.report import read_run, write_report

        run_folder = RunFolder(folder, say)
        with usage():
            run_folder.begun  # noqa: B018  whether this is a run
            if against:
                check_methods(list(dict.fromkeys(read_run(run_folder).rows["method"])), against)
        typer.echo(write_report(run_folder, output or folder / "report", against=against or []))


def parsed(text: str) -> Any:
    """The YAML of an option."""
    from dit_accel.eval.strict_yaml import read_yaml

    return read_yaml(text, f"--method {text!r}").value


def main() -> None:
    app(prog_name="dit-accel-eval")


if __name__ == "__main__":
    main()
