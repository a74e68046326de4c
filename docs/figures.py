"""Draws the figures of token-caching.md and the strip of the README from runs of the embedded pipelines: python docs/figures.py

Needs matplotlib (pip install -e ".[eval]").
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import dit_accel
from dit_accel import TokenCacheConfig
from dit_accel.pipelines.generation import Picture, denoise, settings_for, switched
from dit_accel.pipelines.inspection import draw, usable
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.pictures import png, psnr, psnr_text, side_by_side, write_atomically
from dit_accel.pipelines.terminal import err, quiet
from dit_accel.when import Mode

FIGURES = Path(__file__).parent / "figures"
PROMPT, LAYER = "tiger face, flat style", 1
STRIP = ("tiger face, flat style", "penguin, cartoon style, on a yellow background", "strawberry, 3d style")
SPEEDS, ROUNDS = (1, 2, 3, 4), 3
KINDS = {"in full": "#31446b", "selected": "#f28e2b", "from the cache": "#e9ecf1"}
SHOWN = {
    "random, age weight 0": TokenCacheConfig(selector="random", age_weight=0.0),
    "attention, age weight 0": TokenCacheConfig(selector="attention", age_weight=0.0),
    "attention, age weight 0.25": TokenCacheConfig(selector="attention"),
}


def computed(report: dit_accel.Report) -> np.ndarray:
    """[image tokens, steps]: 0 computed in full, 1 selected, 2 from the cache; in the feed-forward of one double block."""
    height, width = report.grid
    kinds = np.full((height * width, len(report.calls)), 2)
    for step, call in enumerate(report.calls):
        if call.mode is Mode.FULL:
            kinds[:, step] = 0
    for made in report.selections:
        if (made.stream, made.layer) == ("image", LAYER):
            kinds[made.tokens[0].numpy(), made.call] = 1
    return kinds


def steps() -> None:
    pipe = load("emoji-flux")
    settings = settings_for(pipe, "emoji-flux", steps=20)
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(11, 4), sharey=True, layout="constrained")
    for axis, (title, config) in zip(axes, SHOWN.items(), strict=True):
        dit_accel.apply(pipe, config, record=True)
        denoise(pipe, [(PROMPT, 0)], settings, lambda: None, applied=False)
        axis.imshow(
            computed(dit_accel.report(pipe)), aspect="auto", cmap=ListedColormap(list(KINDS.values())), interpolation="none"
        )
        axis.set(title=title, xlabel="denoising step", xticks=range(0, 20, 4))
    axes[0].set_ylabel("image token")
    figure.legend(handles=[Patch(color=color, label=kind) for kind, color in KINDS.items()], loc="outside lower center", ncols=3)
    figure.savefig(FIGURES / "steps.png", dpi=110)


def places(name: str) -> None:
    pipe = load(name)
    configs = usable(pipe, TokenCacheConfig(age_weight=0.0))
    made = FIGURES / "new"
    draw(pipe, name, PROMPT, configs, settings_for(pipe, name), made, err())
    (picture,) = made.glob("*.png")
    write_atomically(FIGURES / f"places-{name}.png", picture.read_bytes())
    for file in made.iterdir():
        file.unlink()
    made.rmdir()


def strip() -> None:
    """The same pictures in full and by the recipes for 2x, 3x and 4x, with what they took, in turns, and how like they are."""
    torch.set_num_threads(1)
    pipe = load("emoji-flux", "float32")
    settings, panels = settings_for(pipe, "emoji-flux"), []
    for seed, prompt in enumerate(STRIP):
        made: dict[int, list[Picture]] = {}
        for speed in SPEEDS * ROUNDS:
            with switched(pipe, None):
                if speed > 1:
                    dit_accel.apply(pipe, speedup=speed)
                made.setdefault(speed, []).append(denoise(pipe, [(prompt, seed)], settings, lambda: None, applied=False)[0])
        seconds = {speed: median(one.denoising_seconds for one in some) for speed, some in made.items()}
        full = made[1][0].image
        for speed in SPEEDS:
            took, image = f"{seconds[speed]:.2f} s", made[speed][0].image
            likeness = f"{seconds[1] / seconds[speed]:.2f}x, {psnr_text(psnr(full, image))}"
            panels.append((image, [f"speedup={speed}: {took}", likeness] if speed > 1 else [f"uncached: {took}", prompt]))
    heading = "emoji-flux, dit_accel.apply(pipe, speedup=N): seconds of denoising on one CPU core, and PSNR to the uncached picture"
    write_atomically(FIGURES / "strip.png", png(side_by_side(heading, panels, columns=len(SPEEDS)), {}))


if __name__ == "__main__":
    quiet()
    FIGURES.mkdir(exist_ok=True)
    strip()
    steps()
    for embedded in ("emoji-flux", "emoji-pixart"):
        places(embedded)
