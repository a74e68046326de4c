"""What commands share: the prompts that they are asked for, the pipeline, and a picture to be made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from dit_accel.pipelines.terminal import usage


def asked_for(prompts: list[str] | None, file: Path | None = None, config: Path | None = None) -> list[str]:
    """The prompts on the command line and of a file; without either that of a picture made before. BadParameter if wrong."""
    from dit_accel.pipelines.prompt_sets import is_prompt, read_prompt_set

    found = list(prompts or [])
    with usage():
        if file:
            found += read_prompt_set(file)
        elif config and not found:
            from dit_accel.pipelines.pictures import read_record

            found = [read_record(config)["prompt"]]
    if not found or not all(map(is_prompt, found)):
        raise typer.BadParameter(
            'Give at least one prompt, and none that is empty, as in: dit-accel generate "red apple, 3d style".'
        )
    return found


def loaded(log: Console, pipeline: str, *machine: str) -> Any:
    """A pipeline, announced while it is loaded; BadParameter if it does not exist."""
    from dit_accel.pipelines.loading import load
    from dit_accel.pipelines.progress import loading

    with usage(), loading(log, pipeline):
        return load(pipeline, *machine)


def by_recipe(log: Console, pipe: Any, speedup: float | None, min_psnr: float | None, steps: int) -> list[Any]:
    """What the recipe that was asked for does in so many steps, announced; BadParameter if there is none."""
    from dit_accel.pipelines.generation import recipe_of

    with usage():
        said, configs = recipe_of(pipe, speedup, min_psnr, steps)
    log.print(said, soft_wrap=True, highlight=False)
    return configs


def replay(context: typer.Context, path: Path | None) -> Path | None:
    """What a picture was made with takes the place of the options' defaults."""
    if path is not None:
        from dit_accel.pipelines.replay import defaults_of

        with usage():
            context.default_map = defaults_of(path)
    return path
