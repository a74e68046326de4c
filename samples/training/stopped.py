"""Pictures of both pipelines whose sampling was stopped early, for the reward: what has had more steps is the better picture.

    python samples/training/stopped.py

One run for every scene of `asked` and pipeline: every (concept, style) pair, named backgrounds, two concepts; some of them are held
out of every training. Writes `stopped-flux.safetensors` and `stopped-pixart.safetensors`, uint8 [scenes, 1 + stops, 3, 128, 128]
each, the finished picture first. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import typer
from diffusers import DiffusionPipeline, FluxPipeline
from rich.progress import Progress, TimeElapsedColumn
from safetensors.torch import save_file

from common import load_checkpoint, save_checkpoint
from data import STYLES, WORK, Scene, concepts, scene_prompt
from generate import FAMILIES, background_scenes, defaults, open_pipeline, pair_scenes
from text import LENGTH

SAMPLES = Path(__file__).parent.parent
SIZE = 128
STOPS = (0.9, 0.75, 0.6, 0.45)  # share of the steps that were taken
EACH = 96  # scenes with a named background, of two concepts seen together, and of two that are not


def asked() -> list[Scene]:
    """What the pipelines are asked for: every concept in every style, named backgrounds, two concepts."""
    singles = [Scene((concept,), style) for concept in concepts() for style in STYLES]
    return [*singles, *background_scenes(EACH), *pair_scenes(EACH, held=False), *pair_scenes(EACH, held=True)]


@torch.no_grad()
def stopped(pipe: DiffusionPipeline, prompts: list[str], steps: int, guidance: float, seeds: list[int]) -> torch.Tensor:
    """Pictures uint8 [n, 1 + stops, 3, 128, 128]: finished, then as they were after each share of the steps."""
    kept: dict[int, torch.Tensor] = {}

    def keep(step: int, time: object, latents: torch.Tensor) -> None:
        kept[step + 1] = latents.clone()

    def keep_flux(pipe: FluxPipeline, step: int, time: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        keep(step, time, tensors["latents"])
        return tensors

    flux = isinstance(pipe, FluxPipeline)
    extra = {"callback_on_step_end": keep_flux} if flux else {"callback": keep, "callback_steps": 1}
    pipe(
        prompts,
        height=SIZE,
        width=SIZE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=LENGTH,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **({} if flux else {"use_resolution_binning": False, "clean_caption": False}),
        **extra,
    )
    versions = []
    for share in (1, *STOPS):
        latents = kept[round(share * steps)]
        if flux:
            latents = pipe._unpack_latents(latents, SIZE, SIZE, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor if flux else 0)
        versions.append(((pipe.vae.decode(latents).sample.clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.stack(versions, 1)


def main(
    batch: int = typer.Option(15),
    threads: int = typer.Option(torch.get_num_threads()),
    bf16: bool = typer.Option(False, help="Weights and arithmetic in bfloat16."),
    folder: Path = typer.Option(SAMPLES, help="Where emoji-flux and emoji-pixart lie."),
) -> None:
    torch.set_num_threads(threads)
    prompts = [scene_prompt(scene) for scene in asked()]
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        for name in FAMILIES:
            target, path = WORK / f"stopped-{name}.safetensors", WORK / f"stopped-{name}.pt"
            if target.exists():
                continue
            pipe, _ = open_pipeline(folder / f"emoji-{name}", None, torch.bfloat16 if bf16 else torch.float32)
            state = load_checkpoint(path)
            parts = state["parts"] if state else []
            bar = progress.add_task(name, total=len(prompts), completed=sum(map(len, parts)))
            while (done := sum(map(len, parts))) < len(prompts):
                some = prompts[done : done + batch]
                seeds = list(range(done, done + len(some)))
                parts.append(stopped(pipe, some, *defaults(pipe), seeds))
                save_checkpoint(path, parts=parts)
                progress.advance(bar, len(some))
            save_file({"pictures": torch.cat(parts)}, part := target.with_suffix(".part"))
            os.replace(part, target)
            path.unlink()


if __name__ == "__main__":
    typer.run(main)
