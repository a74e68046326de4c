"""What models get that nothing could be measured on: an embedded pipeline's recipes to start from, or an error-controlled forecast.

    python benchmarks/starting.py recipes       # writes dit_accel/recipes/*.json, with the shape of an embedded pipeline's recipes
    python benchmarks/starting.py tolerances    # measures the TOLERANCES of dit_accel/recipe.py on the embedded pipelines

`dit_accel.apply` fits the full steps to the noise levels of the run, warns that nothing was measured on the model, and says that
`dit-accel tune` measures it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.progress import track

import dit_accel
from dit_accel import OutputCacheConfig
from dit_accel.eval.folder import write_json
from dit_accel.eval.prompt_sets import read_prompt_set
from dit_accel.pipelines.generation import denoise, settings_for, switched
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.terminal import quiet
from dit_accel.recipe import SHIPPED, TOLERANCES, longest_interval

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
TRIED = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8)
PROMPTS = read_prompt_set(Path(__file__).parent.parent / "pipelines" / "tuning" / "emoji.txt")[:4]
# Model: the embedded pipeline with its kind of sampler, and what tells its transformer from others, from its config.json.
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
    """The file of a model's recipes, from that of the embedded pipeline in a folder."""
    source, transformer = MODELS[model]
    measured = json.loads((folder / f"{source}.json").read_text())
    return {
        "model": model,
        "transformer": transformer,
        "shape": f"that of {source}'s recipes; not measured on this model",
        "levels": measured["levels"],
        "recipes": [{"speedup": one["speedup"], "config": shape(one["config"])} for one in measured["recipes"]],
    }


def shape(config: dict[str, Any]) -> dict[str, Any]:
    """What another model may have in common: all but the leads, which are fitted to the model that they were searched on."""
    return {name: value for name, value in config.items() if name != "lead"}


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
