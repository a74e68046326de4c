"""The `dit-accel` command. Torch and diffusers are imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.pipelines import lists, options
from dit_accel.pipelines.asked import asked_for, by_recipe, loaded, replay
from dit_accel.pipelines.extras import start
from dit_accel.pipelines.terminal import err, plain_errors, quiet, show, usage, version_option
from dit_accel.pipelines.tuning.command import tune
from dit_accel.pipelines.ui import ui

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make pictures with diffusion transformers, faster, by computing only some of the tokens on most denoising steps.",
)


@app.callback()
def root(version: Annotated[bool, version_option("dit-accel")] = False) -> None:
    pass


@app.command()
@options.with_options_of("token-cache", "output-cache", "token-merge")
def generate(
    context: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; several prompts make several pictures.")] = None,
    prompts_file: options.PromptsFile = None,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=replay,
            is_eager=True,
            help="Make an earlier picture again, from its PNG or JSON file; options and prompts given as well replace its own.",
        ),
    ] = None,
    pipeline: options.Pipeline = "emoji-flux",
    output: options.Output = Path("out"),
    compare: Annotated[
        bool, typer.Option("--compare", help="Also make the uncached baseline of each picture, and one of both side by side.")
    ] = False,
    as_json: options.AsJson = False,
    method: Annotated[
        options.Method,
        typer.Option(
            help="none computes everything; token-cache reuses most tokens between full steps; output-cache forecasts the "
            "transformer's output there; token-merge attends to fewer tokens on every step; with token-cache it merges on the "
            "full steps."
        ),
    ] = options.Method.token_cache,
    speedup: Annotated[
        float | None,
        typer.Option(help="In place of a method: the closest recipe for this pipeline that makes it at least so much faster."),
    ] = None,
    min_psnr: Annotated[
        float | None,
        typer.Option(help="In place of a method: the fastest recipe that was measured to be so like the uncached picture, in dB."),
    ] = None,
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
    **knobs: Any,
) -> None:
    """Make pictures of prompts, and write each with its settings inside and in a JSON file beside it.

    [bold]Examples[/]

      dit-accel generate "red apple, 3d style"

      dit-accel generate "red apple, 3d style" --speedup 3 --compare

      dit-accel generate "tiger face" "crab" --num-images 4 --compare

      dit-accel generate --prompts-file prompts.txt --pipeline emoji-pixart --interval 3 --cache-ratio 0.7

      dit-accel generate "crab" --preset taylorseer --compare

      dit-accel generate "crab" --method output-cache --full-steps 0,1,2,5,9,14,20 --order 1 --compare

      dit-accel generate "crab" --method token-merge --merge-ratio 0.5 --merge-keys-only --compare

      dit-accel generate "a red apple" --pipeline flux-schnell --offload model --method none

      dit-accel generate --config out/crab-seed0.png --interval 6
    """
    knobs |= dict(preset=preset, selector_file=selector_file)
    given = options.given(context, knobs)
    if as_recipe := speedup is not None or min_psnr is not None:
        options.refuse_beside_recipe(speedup, min_psnr, {**given, **options.given(context, {"method": method})})
        method = options.Method.output_cache
    options.refuse_idle(method, given)
    if method is options.Method.none and compare:
        raise typer.BadParameter("--compare needs a method other than none.")
    with plain_errors(debug):
        prompts = asked_for(prompts, prompts_file, config)
        from dit_accel.pipelines.checks import doubtful, refuse_unused
        from dit_accel.pipelines.generation import check, settings_for
        from dit_accel.pipelines.job import Job
        from dit_accel.pipelines.loading import understand
        from dit_accel.pipelines.pictures import check_folder

        quiet()
        configs = options.configured(method, {} if as_recipe else given if preset else knobs)
        refuse_unused(configs, given)
        with usage(options.SETTINGS):
            understand(dtype, device, offload)
            check_folder(output)
        log = err()
        pipe = loaded(log, pipeline, dtype, device, offload)
        asked = dict(steps=steps, guidance=guidance, seed=seed, num_images=num_images, batch_size=batch_size)
        with usage(options.SETTINGS):
            settings = settings_for(pipe, pipeline, height=height, width=width, **asked)
        if as_recipe:
            configs = by_recipe(log, pipe, speedup, min_psnr, settings.steps)
        with usage(options.flags_of(*method.parts)):
            check(pipe, configs)
        tell = (lambda record: typer.echo(json.dumps(record))) if as_json else (lambda record: None)
        job = Job(pipe, pipeline, prompts, configs, settings, output, log, tell=tell)
        job.warn(doubtful(pipe, pipeline, configs, given, settings.steps))
        with usage(options.flags_of(*method.parts)):  # what shows with the picture's size alone, as too large a stride
            table = job.compare() if compare else job.generate()
        if not as_json:
            show(table)


@app.command()
@options.with_options_of("token-cache")
def inspect(
    context: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw.")] = None,
    prompts_file: options.PromptsFile = None,
    pipeline: options.Pipeline = "emoji-flux",
    output: options.Output = Path("out"),
    as_json: options.AsJson = False,
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
    **knobs: Any,
) -> None:
    """Draw how often each place of a picture was computed, selector by selector.

    Uniformity is the entropy of the computed tokens over tiles of the image, 1 when every tile gets equally many each time. Row
    and column are the correlations of how often a place was computed with its row and its column, 0 without position bias.

    [bold]Example[/]

      dit-accel inspect "red apple, 3d style" --selector random --selector attention
    """
    with plain_errors(debug):
        from dataclasses import replace

        prompts = asked_for(prompts, prompts_file)
        from dit_accel.pipelines.checks import doubtful, refuse_unused
        from dit_accel.pipelines.generation import check, settings_for
        from dit_accel.pipelines.inspection import draw, usable
        from dit_accel.pipelines.job import Job
        from dit_accel.pipelines.loading import understand
        from dit_accel.pipelines.pictures import check_folder

        quiet()
        given = options.given(context, knobs := knobs | dict(selector_file=selector_file, preset=preset, age_weight=age_weight))
        [config] = options.configured(options.Method.token_cache, knobs)
        if not 0 < config.cache_ratio < 1 or config.interval == 1:
            raise typer.BadParameter("Nothing would be selected: --cache-ratio must lie between 0 and 1, --interval be at least 2.")
        refuse_unused([config], given.keys() - {"query_share"})  # which those selectors use that look at attention
        with usage(options.SETTINGS):
            configs = [replace(config, selector=name) for name in selector] if selector else None
            understand(dtype, device, offload)
            check_folder(output)
        log = err()
        pipe = loaded(log, pipeline, dtype, device, offload)
        with usage(options.SETTINGS):
            settings = settings_for(pipe, pipeline, steps=steps, guidance=guidance, seed=seed, height=height, width=width)
        chosen = configs or usable(pipe, config)
        with usage(options.flags_of("token-cache")):
            for each in chosen:
                check(pipe, each)
        job = Job(pipe, pipeline, prompts, config, settings, output, log)
        job.warn(doubtful(pipe, pipeline, [config], given, settings.steps))
        for prompt in prompts:
            show(draw(pipe, pipeline, prompt, chosen, settings, output, log), as_json)


for command in (tune, ui, lists.pipelines, lists.selectors, lists.families):
    app.command()(command)


DEMO = ("emoji-flux", "emoji-pixart")
DEMO_PROMPTS = ("red apple, 3d style", "tiger face, flat style", "cactus, cartoon style")


@app.command()
def demo(
    pipeline: Annotated[list[str] | None, typer.Option(help="Instead of both embedded pipelines.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Instead of the demo's prompts.")] = None,
    speedup: Annotated[float, typer.Option(help="The closest recipe that makes the pipeline at least so much faster.")] = 3,
    seed: int = 0,
    height: Annotated[int | None, typer.Option(hidden=True)] = None,
    width: Annotated[int | None, typer.Option(hidden=True)] = None,
    output: Annotated[Path, typer.Option(help="Folder of the pictures; those of an earlier demo in it are replaced.")] = Path(
        "out/demo"
    ),
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Make a few pictures in full and three times as fast, and show how long each took and how alike they are."""
    with plain_errors(debug):
        from dit_accel.pipelines.generation import settings_for
        from dit_accel.pipelines.job import Job
        from dit_accel.pipelines.pictures import check_folder

        quiet()
        prompts = asked_for(prompt or list(DEMO_PROMPTS))
        with usage():
            check_folder(output)
        log = err()
        table: Any = None
        for name in pipeline or DEMO:
            pipe = loaded(log, name)
            with usage(options.SETTINGS):
                settings = settings_for(pipe, name, seed=seed, height=height, width=width)
            configs = by_recipe(log, pipe, speedup, None, settings.steps)
            job = Job(pipe, name, prompts, configs, settings, output / Path(name).name, log, overwrite=True)
            job.warn()
            table = job.compare(table)
        show(table)


def main() -> None:
    app(prog_name="dit-accel")


if __name__ == "__main__":
    start("dit_accel.pipelines.cli", "cli")
