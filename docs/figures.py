"""Draws the figures of token-caching.md from real runs of the embedded pipelines: python docs/figures.py

Needs matplotlib (pip install -e ".[eval]").
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import dit_accel
from dit_accel import TokenCacheConfig
from dit_accel.pipelines.generation import denoise, settings_for
from dit_accel.pipelines.inspection import draw, usable
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.pictures import write_atomically
from dit_accel.pipelines.terminal import err, quiet
from dit_accel.when import Mode

FIGURES = Path(__file__).parent / "figures"
PROMPT, LAYER = "tiger face, flat style", 1
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


if __name__ == "__main__":
    quiet()
    FIGURES.mkdir(exist_ok=True)
    steps()
    for embedded in ("emoji-flux", "emoji-pixart"):
        places(embedded)
