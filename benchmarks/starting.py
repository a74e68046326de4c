"""What models get that nothing could be measured on: recipes to start from, or an error-controlled forecast.

    python benchmarks/starting.py transfer      # measures which shape goes over best from one embedded pipeline to the other
    python benchmarks/starting.py recipes       # writes dit_accel/recipes/*.json, with that shape
    python benchmarks/starting.py tolerances    # measures the TOLERANCES of dit_accel/recipe.py on the embedded pipelines

`dit_accel.apply` fits the full steps to the noise levels of the run, warns that nothing was measured on the model, and says that
`dit-accel tune` measures it.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import recording
import torch
import typer
from rich.progress import track

import dit_accel
from dit_accel import OutputCacheConfig, recipe
from dit_accel.eval.fidelity import decibels, squared_error
from dit_accel.eval.folder import write_json
from dit_accel.eval.prompt_sets import read_prompt_set
from dit_accel.pipelines.generation import denoise, settings_for, switched
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.terminal import quiet
from dit_accel.pipelines.tuning.search import BEST
from dit_accel.pipelines.tuning.starts import spaced
from dit_accel.recipe import SHIPPED, TOLERANCES, longest_interval

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
TRIED = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8)
SPEEDS, SHORTER = (2, 3, 4), 3  # at which speeds shapes are compared, and from which fewer steps are a recipe
ROOT = Path(__file__).parent.parent
PROMPT_SET = ROOT / "pipelines" / "tuning" / "emoji.txt"
PROMPTS = read_prompt_set(PROMPT_SET)[:4]
# Model: the embedded pipeline with its number of steps and kind of sampler, and what tells its transformer from others.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX.1-dev": (
        "emoji-flux",
        {"class": "FluxTransformer2DModel", "num_layers": 19, "num_single_layers": 38, "guidance_embeds": True},
    ),
    "FLUX.2-dev": ("emoji-flux", {"class": "Flux2Transformer2DModel", "num_layers": 8, "num_single_layers": 48}),
    "PixArt-Sigma": ("emoji-pixart", {"class": "PixArtTransformer2DModel", "num_layers": 28, "num_attention_heads": 16}),
    "Qwen-Image": ("emoji-flux", {"class": "QwenImageTransformer2DModel", "num_layers": 60}),
    "Stable-Diffusion-3.5-large": ("emoji-flux", {"class": "SD3Transformer2DModel", "num_layers": 38}),
    "Stable-Diffusion-3.5-medium": ("emoji-flux", {"class": "SD3Transformer2DModel", "num_layers": 24}),
    "Wan-2.2": ("emoji-flux", {"class": "WanTransformer3DModel", "num_layers": 40}),
    "Z-Image": ("emoji-flux", {"class": "ZImageTransformer2DModel", "n_layers": 30}),
}


def starting(model: str, folder: Path) -> dict[str, Any]:
    """The file of a model's recipes: what went over best between the embedded pipelines, see docs/recipes.md.

    That is evenly spaced full steps and a line; from SHORTER on, where the sampler is of second order, fewer steps.
    """
    source, transformer = MODELS[model]
    measured = json.loads((folder / f"{source}.json").read_text())
    steps, found = len(measured["levels"]), []
    for speedup in (one["speedup"] for one in measured["recipes"]):
        count = math.floor(steps / speedup)
        config: dict[str, Any] = {"full_steps": list(spaced(steps, count, lambda share: share))}
        if source == "emoji-pixart" and speedup >= SHORTER:
            config = {"sampler_steps": count, "full_steps": [*range(count)], "order": 0}
        found.append({"speedup": speedup, "config": config})
    return {
        "model": model,
        "transformer": transformer,
        "shape": "what went over best between emoji-flux and emoji-pixart; not measured on this model",
        "levels": measured["levels"],
        "recipes": found,
    }


def shapes(one: recipe.Recipe, steps: int) -> dict[str, Any]:
    """What a recipe for a run of so many steps may hand on to another model, and what there is without one."""
    config, count = one.config, len(one.config.full_steps or ())
    full, bare = round(count * steps / len(one.levels)), OutputCacheConfig(sampler_steps=config.sampler_steps)
    return {
        "all but the leads": replace(one, config=replace(config, lead=0.0)),
        "its full steps, forecast by a line": replace(one, config=replace(bare, full_steps=config.full_steps)),
        "as many full steps, evenly": OutputCacheConfig(full_steps=spaced(steps, full, lambda share: share)),
        "as many steps in all": OutputCacheConfig(interval=1, sampler_steps=full),
    }


@app.command()
def transfer(
    prompts: int = typer.Option(16, min=2, help="How many prompts, of those that recipes are searched on."),
    output: Path = typer.Option(ROOT / "docs" / "data" / "transfer.json", help="File of the measurements."),
    path: Path = typer.Option(ROOT / "docs" / "recipes.md", help="Page whose table is renewed."),
) -> None:
    """Try the recipes of one embedded pipeline on the other, whole and in part, and keep how like the pictures are."""
    torch.set_num_threads(1)
    quiet()
    rows, some = recording.rows_of(output), read_prompt_set(PROMPT_SET)[:prompts]
    for name, other in (("emoji-flux", "emoji-pixart"), ("emoji-pixart", "emoji-flux")):
        pipe = load(name, "float32")
        settings = settings_for(pipe, name)
        own = {one.speedup: one for one in recipe.read(SHIPPED / f"{name}.json")}
        tried = [
            (one.speedup, label, config)
            for one in recipe.read(SHIPPED / f"{other}.json")
            if one.speedup in SPEEDS
            for label, config in {**shapes(one, settings.steps), "the recipe searched on it": own[one.speedup]}.items()
        ]
        for number, prompt in recording.left(rows, name, some, prompts):
            call = [(prompt, number)]
            whole = denoise(pipe, call, settings, lambda: None, applied=False)[0].image
            for speedup, label, config in tried:
                with switched(pipe, config):
                    made = denoise(pipe, call, settings, lambda: None, applied=False)[0].image
                    flops = dit_accel.report(pipe).flops_ratio
                likeness = min(BEST, decibels(squared_error(whole, made)))
                rows.append(
                    {"pipeline": name, "prompt": prompt, "speedup": speedup, "shape": label, "flops": flops, "psnr": likeness}
                )
            recording.save(output, rows)
    recording.renew(path, "benchmarks/starting.py transfer", transferred(pd.DataFrame(rows)))


def transferred(rows: pd.DataFrame) -> list[str]:
    """The table of what went over, in Markdown."""
    speeds = sorted(rows["speedup"].unique())
    lines = [
        f"| on | of the other's recipe | {' | '.join(f'{speed:g}x' for speed in speeds)} |",
        "| --- " * (2 + len(speeds)) + "|",
    ]
    for (name, label), part in rows.groupby(["pipeline", "shape"], sort=False):
        cells = []
        for speed in speeds:
            own = part[part["speedup"] == speed]
            cells.append(f"{own['psnr'].mean():.1f} ({own['flops'].median():.2f}x)")
        lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    return lines


@app.command()
def recipes(folder: Path = typer.Option(SHIPPED, help="Folder of the recipes.")) -> None:
    """Write the recipes to start from."""
    for model in MODELS:
        path = folder / f"{model.lower()}.json"
        write_json(path, starting(model, folder))
        typer.echo(path)


def ratio(pipe: Any, name: str, config: OutputCacheConfig) -> float:
    """How many times fewer FLOPs the pictures of a few prompts take."""
    settings, ratios = settings_for(pipe, name), []
    with switched(pipe, config):
        for seed, prompt in enumerate(PROMPTS):
            denoise(pipe, [(prompt, seed)], settings, lambda: None, applied=False)
            ratios.append(1 / dit_accel.report(pipe).flops_ratio)
    return 1 / float(np.mean(ratios))


@app.command()
def tolerances() -> None:
    """Print which tolerance brings which speed-up by FLOPs on the embedded pipelines, and their geometric mean."""
    torch.set_num_threads(1)
    quiet()
    found: dict[float, list[float]] = {}
    for name in ("emoji-flux", "emoji-pixart"):
        pipe = load(name, "float32")
        for speed in track([speed for speed in TOLERANCES if speed > 1], description=name):
            most = longest_interval(speed)
            got = [ratio(pipe, name, OutputCacheConfig(interval=most, tolerance=tried)) for tried in TRIED]
            logs = [math.log(value) for value in np.maximum.accumulate(got)]
            found.setdefault(speed, []).append(math.exp(np.interp(math.log(speed), logs, np.log(TRIED))))
            brought = ", ".join(f"{tried:g}: {value:.2f}x" for tried, value in zip(TRIED, got, strict=True))
            typer.echo(f"{name}, {speed:g}x: {found[speed][-1]:.3f}; {brought}")
    typer.echo({speed: round(float(np.exp(np.mean(np.log(values)))), 3) for speed, values in found.items()})


if __name__ == "__main__":
    app()
