"""The `dit-accel` command. Torch and diffusers are imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make pictures with diffusion transformers, faster, by computing only some of the tokens on most denoising steps.",
)


class Method(str, Enum):
    none = "none"
    token_cache = "token-cache"


def show(table: Any) -> None:
    """On a terminal as wide as it is; in a file or a pipe as wide as needed."""
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(table)


def err() -> Console:
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty())


@contextmanager
def plain_errors(debug: bool = False) -> Iterator[None]:
    """Errors as one sentence and an exit code: 1 for what went wrong, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        err().print("Interrupted. The pictures finished before are kept.")
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            raise
        from rich.markup import escape

        err().print(f"[red]Error:[/] {escape(sentence(error))}", highlight=False)
        raise typer.Exit(1) from None


def sentence(error: Exception) -> str:
    from pipelines.loading import LoadError

    if type(error).__name__ == "OutOfMemoryError":
        return "The device has too little memory for this: try --offload model, a smaller --height and --width, or --batch-size 1."
    if isinstance(error, (LoadError, ValueError)):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}."
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (--debug shows where)"


@contextmanager
def usage() -> Iterator[None]:
    """A ValueError in here is the fault of an option."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def quiet() -> None:
    """Keep the libraries from talking: what matters is reported in the command's own words."""
    import warnings

    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="diffusers|transformers")


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


# The options of the cache are None unless given, so that giving one without a cache is an error and not ignored.
@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to make; several prompts make several pictures.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Read more prompts from a file, one a line; # starts a comment.")
    ] = None,
    pipeline: Annotated[str, typer.Option(help="A name of `dit-accel pipelines`, a hub id, or a diffusers folder.")] = "emoji-flux",
    method: Annotated[Method, typer.Option(help="none computes everything; token-cache reuses most tokens.")] = Method.token_cache,
    interval: Annotated[int | None, typer.Option(help="Compute everything on every N-th step.", show_default="4")] = None,
    cache_ratio: Annotated[
        float | None, typer.Option(help="Share of tokens taken from the cache on the other steps, 0 to 1.", show_default="0.9")
    ] = None,
    selector: Annotated[
        str | None, typer.Option(help="How the tokens to compute are chosen; see `dit-accel selectors`.", show_default="random")
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Compute everything on the first steps.", show_default="1")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the pipeline's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the pipeline's")] = None,
    seed: Annotated[int, typer.Option(help="The i-th picture of a prompt starts from the noise of seed + i.")] = 0,
    num_images: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Pictures denoised together; changes the speed, not the noise.")] = 1,
    height: Annotated[int | None, typer.Option(help="In pixels.", show_default="the pipeline's")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", show_default="the pipeline's")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    offload: Annotated[str, typer.Option(help="none, model, group or sequential: less GPU memory, slower.")] = "none",
    output: Annotated[Path, typer.Option(help="Folder of the pictures; made if needed, nothing in it is overwritten.")] = Path(
        "out"
    ),
    compare: Annotated[
        bool, typer.Option("--compare", help="Also make each picture in full, and one of both side by side.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Make pictures of prompts, and write each with its settings inside and in a JSON file beside it.

    [bold]Examples[/]

      dit-accel generate "red apple, 3d style"

      dit-accel generate "tiger face" "crab" --num-images 4 --compare

      dit-accel generate --prompts-file prompts.txt --pipeline emoji-pixart --interval 3 --cache-ratio 0.7

      dit-accel generate "a red apple" --pipeline black-forest-labs/FLUX.1-schnell --offload model --method none
    """
    cache = dict(interval=interval, cache_ratio=cache_ratio, selector=selector, warmup_steps=warmup_steps)
    cache = {name: value for name, value in cache.items() if value is not None}
    if method is Method.none:
        if cache or compare:
            option = "--" + next(iter(cache), "compare").replace("_", "-")
            raise typer.BadParameter(f"{option} needs a cache: leave it out, or use --method token-cache.")
    with plain_errors(debug):
        prompts = list(prompts or [])
        if prompts_file:
            from pipelines.prompts import read_prompts

            with usage():
                prompts += read_prompts(prompts_file)
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise typer.BadParameter(
                'Give at least one prompt, and none that is empty, as in: dit-accel generate "red apple, 3d style".'
            )
        from dit_accel import TokenCacheConfig
        from pipelines.generation import settings_for
        from pipelines.job import Job
        from pipelines.loading import load, understand

        quiet()
        with usage():
            config = None if method is Method.none else TokenCacheConfig(**cache)
            understand(dtype, device, offload)
        pipe = load(pipeline, dtype, device, offload)
        given = dict(
            steps=steps, guidance=guidance, seed=seed, num_images=num_images, batch_size=batch_size, height=height, width=width
        )
        with usage():
            settings = settings_for(pipe, pipeline, **given)
        job = Job(pipe, pipeline, prompts, config, settings, output, err())
        job.warn()
        show(job.compare() if compare else job.generate())


@app.command()
def pipelines() -> None:
    """List the pipelines known by name. Any other FLUX or PixArt checkpoint works by its hub id or folder."""
    from rich.table import Column, Table

    from pipelines.catalog import CATALOG

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
        from pipelines.generation import settings_for
        from pipelines.job import Job
        from pipelines.loading import load

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
