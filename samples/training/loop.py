"""How the generators learn, first from scenes (train.py) and then from a teacher (distill.py): one loop."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from rich.progress import Progress, TimeElapsedColumn

from common import load_checkpoint, save_checkpoint
from data import GRID, WORK, Scene, compose, pairs, scene, scene_caption

DROPOUT = 0.1  # share of empty captions, for classifier-free guidance
SIZES = [(128, 128), (96, 96), (64, 64), (128, 96), (96, 128), (128, 64), (64, 128)]  # of pictures, height and width in pixels
SHARES = [16, 2, 2, 1, 1, 1, 1]  # how often each comes
SMOOTHING = 400  # steps that the averaged weights look back, about


class Scenes:
    """The training's scenes: the n-th one of a size is always the same, and is composed and encoded when it is first asked for.

    Latents are kept in float16 in files beside the checkpoints, so that the other family and a resumed training find them there.
    """

    def __init__(self, vae: AutoencoderTiny, count: int, folder: Path = WORK / "scenes") -> None:
        self.vae, self.count, self.folder, self.rows = vae, count, folder, pairs()[0]
        self.files: dict[tuple[int, int], list[np.memmap]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, size: tuple[int, int]) -> list[np.memmap]:
        if size not in self.files:
            h, w = size
            latents, layout = (self.vae.config.latent_channels, h // 4, w // 4), (5, h // GRID, w // GRID)
            self.files[size] = []
            for kind, dtype, extent in (("latents", np.float16, latents), ("layout", np.float16, layout), ("made", np.bool_, ())):
                path = self.folder / f"{h}x{w}-{self.count}.{kind}"
                self.files[size].append(np.memmap(path, dtype, "r+" if path.exists() else "w+", shape=(self.count, *extent)))
        return self.files[size]

    def __call__(self, places: list[int], size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, list[Scene]]:
        """Of the scenes at these places: latents [n, 8, height / 4, width / 4], layouts [n, 5, height / 8, width / 8] (see
        `layout_of`) and what they show."""
        latents, layouts, made = self.open(size)
        generators = [random.Random(f"{size} {place}") for place in places]
        scenes = [scene(rng, self.rows) for rng in generators]
        if new := [i for i, place in enumerate(places) if not made[place]]:
            composed = [compose(scenes[i], *size, generators[i]) for i in new]
            images = torch.stack([image for image, _ in composed])
            with torch.no_grad():
                encoded = self.vae.encode(images.contiguous(memory_format=torch.channels_last)).latents
            where = [places[i] for i in new]
            latents[where] = encoded.half().numpy()
            layouts[where] = torch.stack([layout_of(boxes, size) for _, boxes in composed]).half().numpy()
            made[where] = True
        return torch.from_numpy(latents[places]).float(), torch.from_numpy(layouts[places]).float(), scenes


def layout_of(boxes: list[tuple[int, int, int, int]], size: tuple[int, int]) -> torch.Tensor:
    """What each token of a scene of this size shows, [5, height / 8, width / 8]: whether of the first subject and whether of the
    second (0 or 1); which part of it, down and across (0 to 1); and how large that subject is, over 128 px."""
    layout = torch.zeros(5, size[0] // GRID, size[1] // GRID)
    y, x = (GRID * (torch.arange(n) + 0.5) for n in layout.shape[1:])
    for subject, (top, left, tall, wide) in enumerate(boxes):
        down, across = ((y - top) / tall)[:, None], ((x - left) / wide)[None]
        inside = (down > 0) & (down < 1) & (across > 0) & (across < 1)
        layout[subject][inside] = 1
        for row, value in zip(layout[2:], (down, across, torch.tensor(max(tall, wide) / 128)), strict=True):
            row[inside] = value.expand_as(inside)[inside]
    return layout


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: constant after a short rise, then falling in a line to a fiftieth over the last quarter."""
    return min(1.0, (step + 1) / 100, 0.02 + 0.98 * (steps - step) / (0.25 * steps))


def run(
    name: str,
    path: Path,
    learner: torch.nn.Module,
    loss: Callable[[torch.Tensor, torch.Tensor, list[str], torch.Generator], torch.Tensor],
    show: Callable[[Path], None],
    pool: Scenes,
    *,
    steps: int,
    tokens: int,
    lr: float,
    bf16: bool,
    checkpoint_minutes: float,
) -> str:
    """Train what of `learner` wants a gradient up to this many steps, and leave it with its averaged weights; a line that says how
    long that took.

    Each step sees about `tokens` tokens, all of pictures of one size. `loss` gets latents, layouts, captions and a generator. At a
    checkpoint in `path`, `show` writes a sheet of pictures to the file it is given, with the averaged weights so far.
    """
    parameters = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    average = [p.detach().clone() for p in parameters]
    done, step, spent = 0, 0, 0.0
    if state := load_checkpoint(path):
        learner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        done, step, spent = state["done"], state["step"], state["spent"]

    def swap_average() -> None:
        for p, a in zip(parameters, average, strict=True):
            p.data, a.data = a.data, p.data

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), "{task.fields[note]}") as progress:
        bar = progress.add_task(name, total=steps, completed=step, note="")
        clock = saved = time.monotonic()
        running = 0.0
        while step < steps:
            generator, rng = torch.Generator().manual_seed(step), random.Random(f"{name} {step}")
            size = rng.choices(SIZES, SHARES)[0]
            count = max(1, tokens * GRID**2 // (size[0] * size[1]))
            latents, layouts, rows = pool([rng.randrange(pool.count) for _ in range(count)], size)
            captions = ["" if rng.random() < DROPOUT else scene_caption(row, rng) for row in rows]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                value = loss(latents, layouts, captions, generator)
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = lr * learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
            step, done = step + 1, done + count
            torch._foreach_lerp_(average, [p.data for p in parameters], max(1 / (step + 1), 1 / SMOOTHING))
            running = 0.99 * running + 0.01 * value.item() if running else value.item()
            minutes = (spent + time.monotonic() - clock) / 60
            progress.update(bar, completed=step, note=f"{done} pictures, loss {running:.4f}")
            if time.monotonic() - saved > checkpoint_minutes * 60 or step >= steps:
                state = {"model": learner.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
                save_checkpoint(path, **state, done=done, step=step, spent=60 * minutes)
                swap_average()
                show(WORK / f"sheets/{name}-{step:06d}.png")
                swap_average()
                progress.console.print(f"{name}: {step} steps, {done} pictures, {minutes:.0f} minutes, loss {running:.4f}")
                saved = time.monotonic()
    swap_average()
    return f"{name}: {step} steps, {done} pictures, {(spent + time.monotonic() - clock) / 60:.0f} minutes"
