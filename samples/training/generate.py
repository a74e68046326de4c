"""Pipelines and their pictures, for the scripts that measure them."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import torch
import typer
from diffusers import AutoencoderTiny, DiffusionPipeline, FluxPipeline
from rich.progress import Progress, TimeElapsedColumn

from common import load_checkpoint
from data import RELATIONS, STYLES, WORK, Scene, color_names, concepts, held_together
from train import Flux, PixArt

FAMILIES = {"flux": Flux, "pixart": PixArt}


def background_scenes(count: int, seed: int = 0) -> list[Scene]:
    """One concept on a named background each, the styles in turn."""
    rng = random.Random(f"backgrounds {seed}")
    return [Scene((rng.choice(concepts()),), list(STYLES)[i % len(STYLES)], background=color_names(rng)) for i in range(count)]


def pair_scenes(count: int, held: bool) -> list[Scene]:
    """Two concepts each that training shows together or (`held`) does not, styles and relations in turn."""
    rng, made = random.Random(f"pairs {held}"), []
    while len(made) < count:
        first, second = rng.sample(concepts(), 2)
        if held_together(first, second) == held:
            relation = RELATIONS[len(made) % len(RELATIONS)]
            made.append(Scene((first, second), list(STYLES)[len(made) % len(STYLES)], relation))
    return made


def from_checkpoint(family: str, dtype: torch.dtype = torch.float32) -> tuple[DiffusionPipeline, int]:
    """The pipeline of the averaged weights so far, and after how many steps."""
    path = WORK / f"emoji-{family}.pt"
    state = load_checkpoint(path)
    if state is None:
        raise SystemExit(f"There is no {path}: start train.py {family} first.")
    model = FAMILIES[family]()
    parameters = list(model.parameters())
    for p, average in zip(parameters, state["average"][: len(parameters)], strict=True):  # the training's own head comes last
        p.data.copy_(average)
    vae = AutoencoderTiny.from_pretrained(WORK / "vae-cured", dtype=dtype)
    return model.eval().to(dtype).pipeline(vae), state["step"]


def open_pipeline(folder: Path | None, checkpoint: str | None, dtype: torch.dtype = torch.float32) -> tuple[DiffusionPipeline, str]:
    """A finished pipeline or that of a running training, and what to call it."""
    if (folder is None) == (checkpoint is None):
        raise typer.BadParameter("Give either a pipeline folder or --checkpoint flux or --checkpoint pixart.")
    if checkpoint:
        pipe, done = from_checkpoint(checkpoint, dtype)
        name = f"{checkpoint} after {done} steps"
    else:
        pipe, name = DiffusionPipeline.from_pretrained(folder, dtype=dtype), folder.name
    pipe.set_progress_bar_config(disable=True)
    return pipe, name


def defaults(pipe: DiffusionPipeline) -> tuple[int, float]:
    """Native steps and guidance; a FLUX without a guidance embedding has none."""
    if not isinstance(pipe, FluxPipeline):
        return PixArt.steps, PixArt.guidance
    return Flux.steps, Flux.guidance if pipe.transformer.config.guidance_embeds else 1.0


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline, prompts: list[str], seeds: list[int], size: tuple[int, int], steps: int, guidance: float
) -> torch.Tensor:
    """Pictures [n, 3, height, width] in -1..1, each from the noise of its seed.

    A FLUX without a guidance embedding is guided by a second pass with an empty prompt where the guidance is not 1.
    """
    if not isinstance(pipe, FluxPipeline):
        extra = {"use_resolution_binning": False, "clean_caption": False}
    elif pipe.transformer.config.guidance_embeds or guidance == 1:
        extra = {}
    else:
        extra = {"true_cfg_scale": guidance, "negative_prompt": [""] * len(prompts)}
    tokenizer = getattr(pipe, "tokenizer_2", pipe.tokenizer)
    longest = inspect.signature(pipe.__call__).parameters["max_sequence_length"].default
    images = pipe(
        prompts,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=min(longest, tokenizer.model_max_length),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        **extra,
    ).images
    return images.float().cpu() * 2 - 1


def generate_all(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    size: tuple[int, int],
    steps: int,
    guidance: float,
    batch: int,
    note: str = "pictures",
) -> torch.Tensor:
    """As `generate`, a batch at a time with a progress bar."""
    parts = [torch.empty(0, 3, *size)]
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        bar = progress.add_task(note, total=len(prompts))
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            parts.append(generate(pipe, prompts[part], seeds[part], size, steps, guidance))
            progress.advance(bar, len(parts[-1]))
    return torch.cat(parts)
