"""The `dit-accel` command. Torch and diffusers are imported inside the commands, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.pipelines import options
from dit_accel.pipelines.terminal import err, plain_errors, quiet, show, usage

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make pictures with diffusion transformers, faster, by computing only some of the tokens on most denoising steps.",
)


def show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"dit-accel {version('dit-accel')}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
@options.with_options_of("token-cache", "output-cache", "token-merge")
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to make; several prompts make several pictures.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Read more prompts from a file, one a line; # starts a comment.")
    ] = None,
    pipeline: options.Pipeline = "emoji-flux",
    output: Annotated[Path, typer.Option(help="Folder of the pictures; made if needed, nothing in it is overwritten.")] = Path(
        "out"
    ),
    compare: Annotated[
        bool, typer.Option("--compare", help="Also make each picture in full, and one of both side by side.")
    ] = False,
    method: Annotated[
        options.Method,
        typer.Option(
            help="none computes everything; token-cache reuses most tokens between full steps; output-cache forecasts the "
            "transformer's output there; token-merge attends to fewer tokens on every step; with token-cache it merges on the "
            "full steps."
        ),
    ] = options.Method.token_cache,
    selector_file: options.SelectorFile = None,
    preset: options.Preset = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: Annotated[
        int, typer.Option(help="The i-th picture of a prompt starts from the noise of seed + i.", rich_help_panel=options.PICTURE)
    ] = 0,
    num_images: Annotated[int, typer.Option(help="Pictures of each prompt.", rich_help_panel=options.PICTURE)] = 1,
    batch_size: Annotated[
        int, typer.Option(help="Pictures denoised together; changes the speed, not the noise.", rich_help_panel=options.PICTURE)
    ] = 1,
    height: options.Pixels = None,
    width: options.Pixels = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offload: options.Offload = "none",
    debug: options.Debug = False,
    **given: Any,
) -> None:
    """Make pictures of prompts, and write each with its settings inside and in a JSON file beside it.

    [bold]Examples[/]

      dit-accel generate "red apple, 3d style"

      dit-accel generate "tiger face" "crab" --num-images 4 --compare

      dit-accel generate --prompts-file prompts.txt --pipeline emoji-pixart --interval 3 --cache-ratio 0.7

      dit-accel generate "crab" --preset taylorseer --compare

      dit-accel generate "crab" --method output-cache --full-steps 0,1,2,5,9,14,20 --order 1 --compare

      dit-accel generate "crab" --method token-merge --merge-ratio 0.5 --merge-keys-only --compare

      dit-accel generate "a red apple" --pipeline black-forest-labs/FLUX.1-schnell --offload model --method none
    """
    given |= dict(preset=preset, selector_file=selector_file)
    options.refuse_idle(method, given)
    if method is options.Method.none and compare:
        raise typer.BadParameter("--compare needs a method other than none.")
    with plain_errors(debug):
        prompts = list(prompts or [])
        if prompts_file:
            from dit_accel.pipelines.prompts import read_prompts

            with usage():
                prompts += read_prompts(prompts_file)
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise typer.BadParameter(
                'Give at least one prompt, and none that is empty, as in: dit-accel generate "red apple, 3d style".'
            )
        from dit_accel.pipelines.generation import settings_for
        from dit_accel.pipelines.job import Job
        from dit_accel.pipelines.loading import load, understand

        quiet()
        config = options.configured(method, given)
        with usage():
            understand(dtype, device, offload)
        pipe = load(pipeline, dtype, device, offload)
        asked = dict(steps=steps, guidance=guidance, seed=seed, num_images=num_images, batch_size=batch_size)
        with usage():
            settings = settings_for(pipe, pipeline, height=height, width=width, **asked)
        job = Job(pipe, pipeline, prompts, config, settings, output, err())
        job.warn()
        show(job.compare() if compare else job.generate())


@app.command()
@options.with_options_of("token-cache")
def inspect(
    prompt: Annotated[str, typer.Argument(help="What to make.")],
    pipeline: options.Pipeline = "emoji-flux",
    output: Annotated[Path, typer.Option(help="Folder of the picture; made if needed, nothing in it is overwritten.")] = Path(
        "out"
    ),
    selector: Annotated[list[str] | None, typer.Option(help="May be repeated.", show_default="all that can be used")] = None,
    selector_file: options.SelectorFile = None,
    preset: options.Preset = None,
    age_weight: Annotated[
        float, typer.Option(help="How much longer-cached tokens are preferred; 0 shows the selector alone.")
    ] = 0.0,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: Annotated[int, typer.Option(help="Random seed for the initial noise.", rich_help_panel=options.PICTURE)] = 0,
    height: options.Pixels = None,
    width: options.Pixels = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offload: options.Offload = "none",
    debug: options.Debug = False,
    **given: Any,
) -> None:
    """Draw how often each place of a picture was computed, selector by selector.

    Uniformity is the entropy of the computed tokens over tiles of the image, 1 when every tile gets equally many each time. Row
    and column are the correlations of how often a place was computed with its row and its column, 0 without position bias.

    [bold]Example[/]

      dit-accel inspect "red apple, 3d style" --selector random --selector attention
    """
    with plain_errors(debug):
        from dataclasses import replace

        from dit_accel.pipelines.generation import settings_for
        from dit_accel.pipelines.inspection import draw, usable
        from dit_accel.pipelines.job import Job
        from dit_accel.pipelines.loading import load, understand

        quiet()
        if not prompt.strip():
            raise typer.BadParameter("Give a prompt that is not empty.")
        given |= dict(selector_file=selector_file, preset=preset, age_weight=age_weight)
        [config] = options.configured(options.Method.token_cache, given)
        if not 0 < config.cache_ratio < 1 or config.interval == 1:
            raise typer.BadParameter("Nothing would be selected: --cache-ratio must lie between 0 and 1, --interval be at least 2.")
        with usage():
            configs = [replace(config, selector=name) for name in selector] if selector else None
            understand(dtype, device, offload)
        pipe = load(pipeline, dtype, device, offload)
        with usage():
            settings = settings_for(pipe, pipeline, steps=steps, guidance=guidance, seed=seed, height=height, width=width)
        Job(pipe, pipeline, [prompt], config, settings, output, err()).warn()
        show(draw(pipe, pipeline, prompt, configs or usable(pipe, config), settings, output, err()))


@app.command()
def pipelines() -> None:
    """List the pipelines known by name. Any other FLUX or PixArt checkpoint works by its hub id or folder."""
    from rich.table import Column, Table

    from dit_accel.pipelines.catalog import CATALOG

    table = Table(Column("name", overflow="fold"), "class", "steps", "guidance", "size", "about")
    for entry in CATALOG.values():
        table.add_row(
            entry.name, entry.pipeline_class, f"{entry.steps}", f"{entry.guidance:g}", f"{entry.size} x {entry.size}", entry.about
        )
    show(table)


@app.command()
def selectors() -> None:
    """List the ways to choose the tokens that are computed on a partial step."""
    with plain_errors():
        from rich.table import Table

        import dit_accel

        table = Table("name", "chooses")
        for name, description in dit_accel.selectors().items():
            table.add_row(name, description)
        show(table)


@app.command()
def families() -> None:
    """List the transformers of diffusers, and what works on each."""
    with plain_errors():
        from rich.table import Table

        from dit_accel.families.table import FAMILIES, MODULE_SCOPE

        table = Table(
            *("family", "transformer", "forecast", "guidance", "packed, reuse", "packed, fresh", "module scope"),
            caption="Forecast, guidance and packed tokens (--compute-ratio, with --attention reuse or fresh) are of output-cache; "
            "module scope is token-cache and token-merge.",
        )
        for name, row in FAMILIES.items():
            guidance = "yes, in one batch" if row.batched_guidance else "yes, in two calls"
            fresh = f"no: {row.stale_only}" if row.stale_only else "yes"
            module = "yes" if name in MODULE_SCOPE else "no"
            table.add_row(name.split("Transformer")[0], name, "yes", guidance, "yes", fresh, module)
        table.add_row("any other", "of diffusers", "yes", "yes, in two calls", "no", "no", "no")
        show(table)


DEMO = ("emoji-flux", "emoji-pixart")
DEMO_PROMPTS = ("red apple, 3d style", "tiger face, flat style", "cactus, cartoon style")


@app.command()
def demo(
    pipeline: Annotated[list[str] | None, typer.Option(help="Instead of both embedded pipelines.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Instead of the demo's prompts.")] = None,
    seed: int = 0,
    height: Annotated[int | None, typer.Option(hidden=True)] = None,
    width: Annotated[int | None, typer.Option(hidden=True)] = None,
    output: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("out/demo"),
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Make a few pictures in full and with nine of ten tokens cached, and show how long each took."""
    with plain_errors(debug):
        from dit_accel import TokenCacheConfig
        from dit_accel.pipelines.generation import settings_for
        from dit_accel.pipelines.job import Job
        from dit_accel.pipelines.loading import load

        quiet()
        config = TokenCacheConfig(interval=4, cache_ratio=0.9, selector="random")
        table: Any = None
        for name in pipeline or DEMO:
            pipe = load(name)
            settings = settings_for(pipe, name, seed=seed, height=height, width=width)
            job = Job(pipe, name, list(prompt or DEMO_PROMPTS), config, settings, output / Path(name).name, err(), overwrite=True)
            job.warn()
            table = job.compare(table)
        show(table)


def main() -> None:
    app(prog_name="dit-accel")


if __name__ == "__main__":
    main()
