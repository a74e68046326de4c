"""Recipes for models that nothing could be measured on, to start from: those of an embedded pipeline, whose shape they take over.

    python benchmarks/starting.py

Writes dit_accel/recipes/*.json. `dit_accel.apply` fits the full steps to the noise levels of the run, warns that nothing was
measured on the model, and says that `dit-accel tune` measures it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from dit_accel.eval.folder import write_json
from dit_accel.recipe import SHIPPED

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
        "recipes": [{"speedup": one["speedup"], "config": one["config"]} for one in measured["recipes"]],
    }


def main(folder: Path = typer.Option(SHIPPED, help="Folder of the recipes.")) -> None:
    for model in MODELS:
        path = folder / f"{model.lower()}.json"
        write_json(path, starting(model, folder))
        typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
