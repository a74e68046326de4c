"""The command `dit-accel tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.pipelines import options
from dit_accel.pipelines.asked import loaded
from dit_accel.pipelines.terminal import err, plain_errors, quiet, show, usage


def tune(
    pipeline: Annotated[
        str, typer.Argument(help="A name of `dit-accel pipelines`, a hub id, or a diffusers folder.")
    ] = "emoji-flux",
    speedup: Annotated[
        Any, typer.Option(parser=options.numbers(float), metavar="N,N,...", help="Speeds to search a recipe for.")
    ] = "1.5,2,3,4",
    prompts_file: Annotated[
        Path | None, typer.Option(help="Prompts, as of generate; the first ones are searched on, the others measured on.")
    ] = None,
    searched: Annotated[int, typer.Option(help="Prompts to search on.")] = 8,
    measured: Annotated[int, typer.Option(help="Prompts to measure on.")] = 24,
    budget: Annotated[float, typer.Option(help="Minutes of searching, for all speeds together; measuring comes on top.")] = 10.0,
    output: Annotated[Path, typer.Option(help="Folder of the page and of what a search that is interrupted goes on from.")] = Path(
        "out/tune"
    ),
    keep: Annotated[bool, typer.Option(help="Put the recipes where dit_accel.apply(pipe, speedup=N) looks for them.")] = True,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: Annotated[int, typer.Option(help="Random seed of the first prompt's noise.", rich_help_panel=options.PICTURE)] = 0,
    batch_size: Annotated[
        int, typer.Option(help="Pictures denoised together while searching.", rich_help_panel=options.PICTURE)
    ] = 4,
    height: options.Pixels = None,
    width: options.Pixels = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offload: options.Offload = "none",
    debug: options.Debug = False,
) -> None:
    """Search recipes for a pipeline: the full steps and the forecasts that keep its pictures closest, for every speed asked for.

    Candidates are judged by final pictures, on few prompts first. What comes out is measured on other prompts, beside fewer steps
    of the plain pipeline, and written to a page. The same command goes on where it was interrupted.

    [bold]Examples[/]

      dit-accel tune emoji-flux --speedup 2,3,4 --budget 10

      dit-accel tune black-forest-labs/FLUX.1-dev --speedup 3 --prompts-file mine.txt --steps 28 --budget 120
    """
    with plain_errors(debug, "eval"):
        from dit_accel.pipelines.generation import settings_for
        from dit_accel.pipelines.loading import understand
        from dit_accel.pipelines.pictures import check_folder
        from dit_accel.pipelines.tuning import run

        quiet()
        if not speedup or min(speedup) <= 1:
            raise typer.BadParameter("--speedup must be numbers above 1, as in 2,3,4.")
        with usage(options.SETTINGS):
            understand(dtype, device, offload)
            check_folder(output)
        with usage():
            prompts = run.prompts_for(pipeline, prompts_file, searched, measured)
        log = err()
        pipe = loaded(log, pipeline, dtype, device, offload)
        asked = dict(steps=steps, guidance=guidance, seed=seed, batch_size=batch_size, height=height, width=width)
        with usage(options.SETTINGS):
            settings = settings_for(pipe, pipeline, **asked)
        show(run.tune(pipe, pipeline, prompts, searched, settings, sorted(speedup), budget, output, keep, log))
