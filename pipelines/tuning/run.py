"""Search recipes, measure them on other prompts, and write what came out."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import dit_accel
from dit_accel import OutputCacheConfig
from dit_accel.pipelines.catalog import find
from dit_accel.pipelines.generation import Picture, Settings, compare, denoise, is_flux
from dit_accel.pipelines.pictures import psnr, side_by_side, write_atomically
from dit_accel.pipelines.progress import now_and_then
from dit_accel.pipelines.prompt_sets import read_prompt_set
from dit_accel.pipelines.tuning.candidates import Candidate, fewer
from dit_accel.pipelines.tuning.search import BEST, TRIALS, Bench, search
from dit_accel.recipe import own_folder

HERE = Path(__file__).parent
REACHED = 0.97  # share of the speed asked for that is near enough: full steps come one by one
STRIP = 3  # prompts on the page, with a picture at every speed
# What tells models of one class apart, where their configurations have it.
SHAPE = ("num_layers", "num_single_layers", "n_layers", "num_attention_heads", "attention_head_dim", "guidance_embeds")


def prompts_for(pipeline: str, file: Path | None, searched: int, measured: int) -> list[str]:
    """Prompts to search on, and then to measure on: those of a file, or of a set that fits the pipeline.

    Raises:
        ValueError: if there are too few.
    """
    entry = find(pipeline)
    prompts = read_prompt_set(file or HERE / ("emoji.txt" if entry is not None and entry.embedded else "general.txt"))
    if min(searched, measured) < 2:
        raise ValueError("Search on two prompts or more, and measure on two or more.")
    if len(prompts) < searched + measured:
        raise ValueError(f"There are {len(prompts)} prompts, of {searched + measured} that are to be searched and measured on.")
    return prompts[: searched + measured]


def two_branches(pipe: Any, settings: Settings) -> bool:
    """Whether guidance computes an unconditional branch, too."""
    distilled = is_flux(pipe) and pipe.transformer.config.guidance_embeds
    return settings.guidance > 1 and not distilled


def tune(
    pipe: Any,
    name: str,
    prompts: Sequence[str],
    searched: int,
    settings: Settings,
    speedups: Sequence[float],
    minutes: float,
    output: Path,
    keep: bool,
    log: Console,
) -> Table:
    """Search and measure a recipe for every speed, the slowest first; a table of what came out.

    Writes recipes.json after every speed, then a page with pictures; evaluations.jsonl is what an interrupted search goes on from.

    Args:
        name: what the user called the pipeline.
        prompts: the first `searched` to search on, the others to measure on.
        minutes: of evaluating for all speeds together, what an interrupted search has spent of it included.
        keep: whether the recipes are put where `dit_accel.apply` looks for them.
    """
    held, calls = list(prompts[searched:]), 0
    output.mkdir(parents=True, exist_ok=True)

    def on_step() -> None:
        nonlocal calls
        calls += 1

    bench = Bench(pipe, list(prompts[:searched]), settings, output / "evaluations.jsonl", on_step)
    whole = len(held) * (len(speedups) + sum(2 / speedup for speedup in speedups))
    log.print(
        f"Timing steps costs up to {TRIALS} uncached pictures, and measuring, after {minutes:g} minutes of searching on {searched} "
        f"prompts, as much as {whole + searched:.0f}.",
        soft_wrap=True,
        highlight=False,
    )
    about = conditions(pipe, settings, len(held))
    known = [Candidate.of(one.of(settings.steps)) for one in dit_accel.recipes(pipe)]
    found, first, spent = list[Found](), list[Candidate](), 0.0
    with now_and_then(
        log, lambda: f"{len(found)} of {len(speedups)} speeds, {bench.spent / 60:.1f} of {minutes:g} minutes of searching"
    ):
        along = bench.along()
        for i, speedup in enumerate(speedups):
            share = (60 * minutes - spent) / (len(speedups) - i)
            best, used = search(
                bench,
                bench.room(REACHED * speedup),
                share,
                two_branches(pipe, settings),
                along,
                first=[*first, *filter(None, known)],
            )
            spent += used
            found.append(one := checked(bench, best, speedup, held))
            first = [fewer(best, bench.room(REACHED * following)) for following in speedups[i + 1 : i + 2]]
            data = json.dumps(content(pipe, name, along[1][:-1], found, about), indent=1) + "\n"
            write_atomically(output / "recipes.json", data.encode())
            log.print(one.line(settings.steps), soft_wrap=True, highlight=False)
        plain = fewer_steps(bench, held, speedups)
    path = page(name, found, plain, about, output)
    if keep:
        write_atomically(own_folder() / f"{Path(name).name}.json", data.encode())
        log.print(f"dit_accel.apply(pipe, speedup=N) takes these recipes from {own_folder()} now.", soft_wrap=True, highlight=False)
    log.print(f"Page: {path}", soft_wrap=True, highlight=False)
    table = Table("asked", "measured", "by FLOPs", "PSNR, dB", "95 %", "full steps", title=f"Recipes for {name}")
    for one in found:
        mean, low, high = one.interval
        steps = ", ".join(map(str, one.config.full_steps or ()))
        table.add_row(
            f"{one.speedup:g}x", f"{one.seconds:.2f}x", f"{one.flops:.2f}x", f"{mean:.1f}", f"{low:.1f} to {high:.1f}", steps
        )
    for seconds, likeness in plain:
        table.add_row("fewer steps", f"{seconds:.2f}x", "", f"{likeness:.1f}", "", "")
    return table


def conditions(pipe: Any, settings: Settings, pictures: int) -> dict[str, Any]:
    """How and where it is measured."""
    device, on_cpu = torch.device(pipe._execution_device), f"{platform.machine()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    return {
        "pictures": pictures,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "size": [settings.height, settings.width],
        "dtype": str(next(pipe.transformer.parameters()).dtype).removeprefix("torch."),
        "machine": machine,
        "date": date.today().isoformat(),
        "versions": {package: version(package) for package in ("dit-accel", "torch", "diffusers")},
    }


@dataclass(frozen=True)
class Found:
    """What was found for one speed, and what its pictures of other prompts are like."""

    speedup: float
    config: OutputCacheConfig
    searched: float  # PSNR in dB on the prompts of the search
    flops: float  # speed-up
    seconds: float  # speed-up of denoising, measured in turns
    psnr: tuple[float, ...]  # in dB, of every held-out prompt
    pictures: tuple[tuple[Picture, Picture], ...] = ()  # of the first ones, uncached and faster

    @property
    def interval(self) -> tuple[float, float, float]:
        """Mean of the PSNR, and the ends of its 95 % interval over prompts (percentile bootstrap)."""
        values = np.minimum(self.psnr, BEST)
        means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
        low, high = np.percentile(means, (2.5, 97.5))
        return float(values.mean()), float(low), float(high)

    def line(self, steps: int) -> str:
        (mean, low, high), full = self.interval, len(self.config.full_steps or ())
        return (
            f"{self.speedup:g}x: {self.seconds:.2f}x measured, {self.flops:.2f}x by FLOPs; PSNR {mean:.1f} dB ({low:.1f} to "
            f"{high:.1f}) on {len(self.psnr)} other prompts; {full} of {self.config.run_steps or steps} steps in full"
        )


def apart(bench: Bench) -> Settings:
    """For pictures that are timed one by one, of noise that the search did not see."""
    return replace(bench.settings, batch_size=1, seed=bench.settings.seed + len(bench.prompts))


def checked(bench: Bench, best: Candidate, speedup: float, held: Sequence[str]) -> Found:
    """A candidate on prompts that the search did not see, timed against the uncached pipeline in turns."""
    settings = apart(bench)
    pairs = list(compare(bench.pipe, list(held), best.config, settings, bench.on_step))
    plain, quick = (sum(picture.denoising_seconds for picture in side) for side in zip(*pairs, strict=True))
    work = [faster.work for _, faster in pairs if faster.work is not None]
    flops = sum(one["full_flops"] for one in work) / sum(one["flops"] for one in work)
    likeness = tuple(psnr(full.image, faster.image) for full, faster in pairs)
    return Found(speedup, best.config, bench.mean(best.config), flops, plain / quick, likeness, tuple(pairs[:STRIP]))


def fits_of(transformer: Any) -> dict[str, Any]:
    """By what a model like this one is known: class, depth, width and whether guidance is distilled."""
    config = dict(transformer.config)
    return {"class": type(transformer).__name__, **{name: config[name] for name in SHAPE if config.get(name) is not None}}


def content(pipe: Any, name: str, levels: Sequence[float], found: Sequence[Found], about: dict[str, Any]) -> dict[str, Any]:
    """A file of recipes, as `dit_accel.recipe.read` reads it."""
    rows, defaults = [], OutputCacheConfig().to_dict()
    for one in found:
        changed = {key: value for key, value in one.config.to_dict().items() if value != defaults[key]}
        measured = {"flops": round(one.flops, 3), "seconds": round(one.seconds, 3), "psnr": [round(v, 2) for v in one.interval]}
        rows.append({"speedup": one.speedup, "config": changed, "measured": measured})
    return {
        "model": Path(name).name,
        "transformer": fits_of(pipe.transformer),
        "scheduler": type(pipe.scheduler).__name__,
        "levels": [round(level, 5) for level in levels],
        "measured": about,
        "recipes": rows,
    }


def page(name: str, found: Sequence[Found], plain: Sequence[tuple[float, float]], about: dict[str, Any], folder: Path) -> Path:
    """A page about what was found: the Pareto curve, a table, and pictures at every speed; returns its path.

    Args:
        plain: speed-up and PSNR of fewer steps of the uncached pipeline on the same prompts.
    """
    means = [one.interval for one in found]
    curve(name, [(one.seconds, *interval) for one, interval in zip(found, means, strict=True)], plain, folder / "tune.png")
    for i, (whole, _) in enumerate(found[0].pictures):
        panels = [(whole.image, ["uncached", f"{whole.denoising_seconds:.2f} s"])]
        for one in found:
            quick = one.pictures[i][1]
            panels.append(
                (quick.image, [f"{one.speedup:g}x", f"{quick.denoising_seconds:.2f} s, {psnr(whole.image, quick.image):.1f} dB"])
            )
        side_by_side(whole.prompt, panels).save(folder / f"tune-{i + 1}.png")
    ends = [f"{mean:.1f} ({low:.1f} to {high:.1f})" for mean, low, high in means]
    rows = "\n".join(
        f"| {one.speedup:g}x | {one.seconds:.2f}x | {one.flops:.2f}x | {likeness} "
        f"| {one.searched:.1f} | {', '.join(map(str, one.config.full_steps or ()))} |"
        for one, likeness in zip(found, ends, strict=True)
    )
    strips = "\n\n".join(f"![{whole.prompt}](tune-{i + 1}.png)" for i, (whole, _) in enumerate(found[0].pictures))
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    text = f"""# Recipes for {name}

![Likeness against speed](tune.png)

PSNR is the mean over {about["pictures"]} prompts that the search did not see, with its 95 % interval; *searched* is that of those
it saw.

| asked | measured | by FLOPs | PSNR, dB | searched | full steps |
| --- | --- | --- | --- | --- | --- |
{rows}

{strips}

{facts}
"""
    write_atomically(folder / "tune.md", text.encode())
    return folder / "tune.md"


def curve(name: str, points: Sequence[tuple[float, ...]], plain: Sequence[tuple[float, float]], path: Path) -> None:
    """Draw likeness against speed.

    Args:
        points: speed-up, PSNR, and both ends of its interval, of every recipe.
        plain: speed-up and PSNR of fewer steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    speeds, means, lows, highs = np.array(points).T
    axes.errorbar(speeds, means, (means - lows, highs - means), fmt="o-", capsize=3, label="recipes")
    if plain:
        axes.plot(*zip(*sorted(plain), strict=True), "s--", color="gray", label="fewer steps")
    axes.set(xlabel="speed-up of denoising, measured", ylabel="PSNR to the uncached picture, dB", title=name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def fewer_steps(bench: Bench, held: Sequence[str], speedups: Sequence[float]) -> list[tuple[float, float]]:
    """Speed-up in seconds and mean PSNR of fewer steps of the uncached pipeline, on the prompts that recipes are measured on."""
    settings = apart(bench)
    counts = sorted({max(1, math.floor(settings.steps / speedup)) for speedup in speedups})
    seconds, likeness = dict.fromkeys((settings.steps, *counts), 0.0), dict.fromkeys(counts, 0.0)
    dit_accel.remove(bench.pipe)
    for prompt in held:
        pair = [(prompt, settings.seed)]
        made = {n: denoise(bench.pipe, pair, replace(settings, steps=n), bench.on_step, applied=False)[0] for n in seconds}
        for n, picture in made.items():
            seconds[n] += picture.denoising_seconds
            if n in likeness:
                likeness[n] += min(BEST, psnr(made[settings.steps].image, picture.image)) / len(held)
    return [(seconds[settings.steps] / seconds[n], likeness[n]) for n in counts]
