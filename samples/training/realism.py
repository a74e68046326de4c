"""Measure whether a pipeline behaves as a large one does: it starts from a blur and sharpens, seeds differ, fewer steps cost.

    python samples/training/realism.py samples/emoji-flux
    python samples/training/realism.py --checkpoint flux          # how far is the training?
    python samples/training/realism.py FOLDER --prompts prompts.txt --size 1024 --device cuda --bf16    # any FLUX or PixArt

Prints a table and writes JSON. Prompts of one's own (one a line) are measured without the judge, which knows the embedded
pipelines' scenes only.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from autoencoder import psnr
from border import ring_errors
from common import write_json
from data import STYLES, WORK, Scene, color_names, concepts, scene_prompt
from dit_accel.eval.rewards.judge import Verdict, load_judge
from generate import defaults, generate, generate_all, open_pipeline, pair_scenes
from judge import OUT, shares, verdicts

MUST = {  # what it is called, how it is written, and what it must be
    "first detail": ("fine detail, first prediction to final: cosine", ".2f", "at most", 0.3),
    "fifth detail": ("fine detail after a fifth of the steps", ".2f", "at most", 0.75),
    "ring": ("border: latents' outermost ring, in spreads", ".2f", "at most", 0.1),
    "next ring": ("border: the next ring", ".2f", "at most", 0.1),
    "seeds": ("two seeds of a prompt: PSNR in dB", ".1f", "at most", 15),
    "half": ("half of the steps to all: mean PSNR in dB", ".1f", "at most", 36),
    "quarter": ("a quarter of the steps to all", ".1f", "at most", 28),
    "object": ("judge: the object", ".1%", "at least", 0.9),
    "background": ("judge: the background's colors", ".1%", "at least", 0.9),
    "both": ("judge: both objects of two", ".1%", "reported", None),
    "places": ("judge: both objects, in the right places", ".1%", "reported", None),
}


@contextmanager
def predictions(pipe: DiffusionPipeline) -> Iterator[list[torch.Tensor]]:
    """Collects the finished latents that each step predicts from the guided output of the transformer."""
    scheduler, step, kept = pipe.scheduler, pipe.scheduler.step, []

    @functools.wraps(step)
    def traced(output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, *args: object, **settings: object) -> object:
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            kept.append((sample - scheduler.sigmas[scheduler.step_index] * output).cpu())
        else:
            kept.append(scheduler.convert_model_output(output, sample=sample).cpu())
        return step(output, timestep, sample, *args, **settings)

    scheduler.step = traced
    try:
        yield kept
    finally:
        del scheduler.step


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The sampler's latents as pictures [n, 3, height, width] in -1..1."""
    latents = latents.to(pipe.vae.device, pipe.vae.dtype)
    if isinstance(pipe, FluxPipeline):
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    settings = pipe.vae.config
    latents = latents / settings.scaling_factor + (getattr(settings, "shift_factor", None) or 0)
    return pipe.vae.decode(latents).sample.float().cpu().clamp(-1, 1)


@torch.no_grad()
def encode(pipe: DiffusionPipeline, pictures: torch.Tensor) -> torch.Tensor:
    """Latents [n, channels, h, w] of pictures in -1..1, as the autoencoder gives them."""
    encoded = pipe.vae.encode(pictures.to(pipe.vae.device, pipe.vae.dtype))
    return (encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()).float().cpu()


def fine_detail(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [n, 3, h, w] less their 9 x 9 mean, flat: [n, 3 h w]."""
    return (pictures - F.avg_pool2d(pictures, 9, stride=1, padding=4, count_include_pad=False)).flatten(1)


def singles(count: int, plain: bool) -> list[Scene]:
    """Different scenes of one concept, drawn from all concepts and styles; every other one on a named background unless `plain`."""
    rng = random.Random(0)
    rows = [(concept, style) for concept in concepts() for style in STYLES]
    chosen = rng.sample(rows, count)
    named = [() if plain or i % 2 else color_names(rng) for i in range(count)]
    return [Scene((concept,), style, background=names) for (concept, style), names in zip(chosen, named, strict=True)]


def measure(
    pipe: DiffusionPipeline, prompts: list[str], size: tuple[int, int], steps: int, guidance: float, batch: int, seed: int
) -> tuple[torch.Tensor, dict[str, float], list[float]]:
    """Pictures [n, 3, height, width] of all the prompts, what does not take a judge, and the fine detail's cosine step by step."""
    finals, curves, likeness = [], [], {"seeds": [], "half": [], "quarter": []}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        bar = progress.add_task("realism", total=len(prompts))
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            seeds = list(range(seed + start, seed + start + len(part)))
            make = functools.partial(generate, pipe, part, size=size, guidance=guidance)
            with predictions(pipe) as kept:
                final = make(seeds, steps=steps)
            wanted = fine_detail(final)
            curves.append(torch.stack([F.cosine_similarity(fine_detail(decode(pipe, x, size)), wanted) for x in kept]))
            others = {
                "seeds": make([one + len(prompts) for one in seeds], steps=steps),
                "half": make(seeds, steps=round(steps / 2)),
                "quarter": make(seeds, steps=round(steps / 4)),
            }
            for name, other in others.items():
                likeness[name] += psnr(other, final).tolist()
            finals.append(final)
            progress.advance(bar, len(part))
    pictures = torch.cat(finals)
    curve = torch.cat(curves, 1).mean(1).tolist()
    rings = ring_errors(encode(pipe, torch.ones(1, 3, 128, 128))[0], encode(pipe, pictures).std().item())
    result = {"first detail": curve[0], "fifth detail": curve[round(steps / 5)], "ring": rings[0], "next ring": rings[1]}
    return pictures, result | {name: sum(values) / len(values) for name, values in likeness.items()}, curve


def table(measured: dict[str, float], title: str) -> Table:
    page = Table("measure", "value", "must", title=title)
    for name, (words, form, relation, limit) in MUST.items():
        if name not in measured:
            continue
        value, right = format(measured[name], form), True
        if limit is not None:
            right = measured[name] <= limit if relation == "at most" else measured[name] >= limit
        page.add_row(words, value if right else f"[red]{value}[/red]", f"{relation} {format(limit, form)}" if limit else relation)
    return page


def main(
    folder: Path = typer.Argument(None, help="Pipeline in diffusers format."),
    checkpoint: str = typer.Option(None, help="flux or pixart: measure the averaged weights of the training so far."),
    count: int = typer.Option(40, help="Prompts of one object; the figures are means over them."),
    pairs: int = typer.Option(40, help="Prompts of two objects, for the judge."),
    everything: bool = typer.Option(False, "--all", help="The object of every concept in every style, not only of the prompts."),
    plain: bool = typer.Option(False, help="Neither backgrounds nor pairs: for a pipeline that knows none."),
    prompts: Path = typer.Option(None, help="File of prompts, one a line, instead of scenes; nothing is judged then."),
    accuracy: bool = typer.Option(True, help="Ask the judge."),
    judge_path: Path = typer.Option(OUT, "--judge"),
    size: int = typer.Option(128, help="Side of the pictures in pixels."),
    steps: int = typer.Option(None, help="[default: the embedded family's]"),
    guidance: float = typer.Option(None, help="[default: the embedded family's]"),
    batch: int = typer.Option(10),
    seed: int = typer.Option(0),
    device: str = typer.Option("cpu"),
    bf16: bool = typer.Option(False, help="Weights and arithmetic in bfloat16."),
    threads: int = typer.Option(torch.get_num_threads()),
    out: Path = typer.Option(None, help="JSON file [default: realism.json in the pipeline's folder]"),
) -> None:
    torch.set_num_threads(threads)
    pipe, name = open_pipeline(folder, checkpoint, torch.bfloat16 if bf16 else torch.float32)
    pipe.to(device)
    native = defaults(pipe)
    settings = {"size": (size, size), "steps": steps or native[0], "guidance": native[1] if guidance is None else guidance}
    scenes = singles(count, plain)
    texts = prompts.read_text().splitlines() if prompts else [scene_prompt(made) for made in scenes]
    pictures, measured, curve = measure(pipe, texts, **settings, batch=batch, seed=seed)
    judged = {}
    if accuracy and not prompts:
        judge = load_judge(judge_path)

        def judged_of(asked: list[Scene], note: str) -> list[Verdict]:
            seeds = list(range(seed, seed + len(asked)))
            made = generate_all(pipe, [scene_prompt(one) for one in asked], seeds, **settings, batch=batch, note=note)
            return verdicts(judge, made, asked)

        found = verdicts(judge, pictures, scenes)
        judged = shares(found if plain else found + judged_of(pair_scenes(pairs, held=False), "pairs"))
        if everything:
            every = [Scene((concept,), style) for concept in concepts() for style in STYLES]
            judged["object"] = shares(judged_of(every, "every concept and style"))["object"]
    console = Console()
    console.print(table(measured | judged, f"{name}: {len(texts)} prompts, {settings['steps']} steps"))
    path = out or (folder / "realism.json" if folder else WORK / f"realism-{checkpoint}.json")
    write_json(
        path,
        {
            "pipeline": name,
            **settings,
            "seed": seed,
            "dtype": "bfloat16" if bf16 else "float32",
            "prompts": texts,
            "spread": "standard deviation of the latents of the finished pictures, encoded again",
            "measured": {key: round(value, 4) for key, value in (measured | judged).items()},
            "must": {key: f"{relation} {limit}" for key, (_, _, relation, limit) in MUST.items() if limit},
            "fine detail by step": [round(value, 4) for value in curve],
        },
    )
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
