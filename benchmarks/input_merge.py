"""Fewer tokens early: what merging the first full steps of a recipe costs and brings.

    python benchmarks/input_merge.py measure    # makes, times, compares and scores the pictures
    python benchmarks/input_merge.py page       # renews the table in docs/model-scope.md

Beside them token merging as ToMe-SD has it, and the stock pipeline at half the side, enlarged. One picture at a time, one thread;
the pictures of a prompt are timed, shuffled, between two in full. A run goes on where it was interrupted.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import recording
import torch
import typer
from PIL import Image
from rich.progress import track
from width import build, run

import dit_accel
from dit_accel import OutputCacheConfig, TokenMergeConfig, recipe
from dit_accel.eval.fidelity import decibels, squared_error
from dit_accel.eval.prompt_sets import read_prompt_set
from dit_accel.eval.rewards import load_reward
from dit_accel.eval.spec import noise_seed
from dit_accel.eval.statistics import mean_interval, paired
from dit_accel.pipelines.generation import DenoisingClock, denoise, settings_for, switched
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.terminal import quiet
from dit_accel.pipelines.tuning.search import BEST

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
ROOT = Path(__file__).parent.parent
PIPELINES, SPEEDS = ["emoji-flux", "emoji-pixart"], (2, 3, 4, 6)
SCORES = {  # beside those of the full run, and their columns
    "emoji-reward": "score",
    "judge": "all right",
    "judge:object": "object",
    "judge:background": "background",
    "judge:places": "places",
    "judge:detail": "small strokes, log-odds",
}
KEPT = (2, 4)  # speeds at which some cells keep their tokens, too
MOST = 6  # and from which on no larger cells are tried
STEPS: dict[str, dict[str, Any]] = {
    "all cells merged": {},
    "all cells of 4 x 4 merged": {"merged_side": 4},
    "a quarter of the cells kept": {"merged_keep": 0.25, "selector": "variance"},
    "half of the cells kept": {"merged_keep": 0.5, "selector": "variance"},
}
# As fast as a recipe with merged steps, without them.
PLAIN = {"emoji-pixart": {"three steps": OutputCacheConfig(sampler_steps=(0.0, 0.291, 0.4952), full_steps=(0, 1, 2), order=0)}}
PROMPTS = read_prompt_set(ROOT / "eval" / "specs" / "compression.txt")
Output = typer.Option(ROOT / "docs" / "data" / "input-merge.json", help="File of the measurements.")


def settings(name: str) -> list[tuple[str, Any, float]]:
    """What is compared: its name, the configuration, and the side of the picture beside that of the pipeline."""
    found: list[tuple[str, Any, float]] = []
    for one in recipe.read(recipe.SHIPPED / f"{name}.json"):
        if one.speedup in SPEEDS:
            full = one.config.full_steps or ()
            for merged in sorted({0, 1, (len(full) + 1) // 2, len(full) - 1, len(one.config.merged_steps or ())}):
                config = replace(one.config, merged_steps=full[:merged] or None)
                label = f"recipe for {one.speedup:g}x, {merged} of {len(full)} full steps merged"
                found.append((label, config, 1.0))
                if merged and one.speedup < MOST and merged == (1 if one.speedup < 4 else (len(full) + 1) // 2):
                    found.append((f"{label} by 4 x 4", replace(config, merged_side=4), 1.0))
                if "flux" in name and one.speedup in KEPT and merged == (len(full) + 1) // 2:  # whole tokens beside merged ones
                    for share, selector in (
                        (0.25, "variance"),
                        (0.5, "variance"),
                        (0.25, "random"),
                        (0.25, "attention"),
                        (0.25, "drift"),
                    ):
                        kept = replace(config, merged_keep=share, selector=selector)
                        found.append((f"{label}, {share:.0%} of the cells kept by {selector}", kept, 1.0))
    found += [(label, config, 1.0) for label, config in PLAIN.get(name, {}).items()]
    merging: Any = TokenMergeConfig(ratio=0.5, merge_cross_attention="pixart" in name, merge_mlp=True)
    return [*found, ("ToMe-SD, half of the tokens merged in every module", merging, 1.0), ("half the side, enlarged", None, 0.5)]


@app.command()
def measure(
    pipelines: list[str] = typer.Option(PIPELINES, "--pipeline", help="emoji-flux or emoji-pixart; may be repeated."),
    prompts: int = typer.Option(48, min=2, max=len(PROMPTS), help="How many prompts, spread over the set."),
    output: Path = Output,
) -> None:
    """Make the pictures."""
    torch.set_num_threads(1)
    quiet()
    rewards, rows = {name: load_reward(name) for name in SCORES}, recording.rows_of(output)
    for name in pipelines:
        pipe = load(name, "float32")
        best, cells = settings_for(pipe, name), settings(name)

        def picture(prompt: str, config: Any, side: float, pipe: Any = pipe, best: Any = best) -> tuple[Any, float | None]:
            size = replace(best, height=int(side * best.height), width=int(side * best.width))
            with switched(pipe, config):
                made = denoise(pipe, [(prompt, noise_seed(prompt, 0))], size, lambda: None, applied=False)[0]
                return made, dit_accel.report(pipe).flops_ratio if config is not None else None

        for number, prompt in recording.left(rows, name, PROMPTS, prompts, [label for label, _, _ in cells]):
            missing = [cell for cell in cells if cell[0] not in recording.known(rows, name, prompt)]
            order = random.Random(number).sample(missing, len(missing))
            full = picture(prompt, None, 1.0)[0]
            made = [(label, side, *picture(prompt, config, side)) for label, config, side in order]
            seconds = (full.denoising_seconds + picture(prompt, None, 1.0)[0].denoising_seconds) / 2
            images = [full.image, *(one.image.resize(full.image.size, Image.Resampling.LANCZOS) for _, _, one, _ in made)]
            scores = {key: reward.score([prompt] * len(images), images) for key, reward in rewards.items()}
            for i, (label, _, one, flops) in enumerate(made, 1):
                row = {"pipeline": name, "prompt": prompt, "setting": label, "flops": flops}
                row |= {"speedup": seconds / one.denoising_seconds}
                row |= {"psnr": min(BEST, decibels(squared_error(full.image, images[i])))}
                rows.append(row | {key: none(found[i] - found[0]) for key, found in scores.items()})
            recording.save(output, rows)


@app.command()
def width(
    pixels: list[int] = typer.Option([512, 1024], help="Side of the picture; may be repeated: 1,024 and 4,096 tokens."),
    rounds: int = typer.Option(3, min=1, help="Runs of each kind of step, in turn."),
    output: Path = typer.Option(ROOT / "docs" / "data" / "input-merge-width.json", help="File of the measurements."),
) -> None:
    """Time merged steps against full ones at FLUX's width: one double and two single blocks with random weights."""
    quiet()
    pipe, rows = build("flux", 1, torch.bfloat16, "cpu"), recording.rows_of(output)
    for side in pixels:
        for number in track(range(rounds), description=f"{side} px"):
            if any(row["pixels"] == side and row["round"] == number for row in rows):
                continue
            for label, more in random.Random(number).sample(list(STEPS.items()), len(STEPS)):
                config = OutputCacheConfig(interval=1, merged_steps=(1,), **more)
                with switched(pipe, config), DenoisingClock(pipe) as clock:
                    run(pipe, side, 3)
                    report = dit_accel.report(pipe)
                taken = [end - start for start, end in zip(clock.begun, clock.ended, strict=True)]
                row = {"pixels": side, "tokens": report.grid[0] * report.grid[1], "round": number, "step": label}
                row |= {"seconds": taken[1], "full": taken[2], "flops": report.flops[2] / report.flops[1]}
                rows.append(row)
            recording.save(output, rows)


def none(value: float) -> float | None:
    """A number, or None for NaN, which JSON has not."""
    return None if math.isnan(value) else float(value)


def width_table(rows: pd.DataFrame) -> list[str]:
    """In Markdown."""
    lines = ["| tokens | step | a full step, s | this one, s | times as fast | by FLOPs |", "| --- | --- | --- | --- | --- | --- |"]
    for (tokens, step), some in rows.groupby(["tokens", "step"], sort=True):
        ratio = (some["full"] / some["seconds"]).median()
        cells = [f"{tokens:,}", str(step), f"{some['full'].median():.1f}", f"{some['seconds'].median():.1f}", f"{ratio:.2f}"]
        cells.append(f"{some['flops'].median():.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(rows: pd.DataFrame, order: list[str]) -> list[str]:
    """In Markdown."""
    columns = ["", "by FLOPs", "measured", "PSNR, dB", *SCORES.values()]
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
    for label in order:
        some = rows[rows["setting"] == label]
        likeness = mean_interval(some["psnr"])
        flops = f"{some['flops'].median():.2f}x" if some["flops"].notna().all() else ""
        cells = [label, flops, f"{some['speedup'].median():.2f}x"]
        cells.append(f"{likeness.mean:.1f} ({likeness.low:.1f} to {likeness.high:.1f})")
        for key in SCORES:
            lost = paired(some[key].dropna().astype(float))
            cells.append(f"{lost.mean:+.2f} ({lost.low:+.2f} to {lost.high:+.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@app.command()
def page(output: Path = Output, path: Path = typer.Option(ROOT / "docs" / "model-scope.md", help="The page.")) -> None:
    """Renew the tables between the marks."""
    rows, lines = pd.DataFrame(recording.rows_of(output)), list[str]()
    for name, some in rows.groupby("pipeline", sort=False):
        about = f"{name}, {some['prompt'].nunique()} prompts of eval/specs/compression.txt, one seed each:"
        lines += ["", about, "", *table(some, [label for label, _, _ in settings(str(name))])]
    if (wide := output.with_name("input-merge-width.json")).exists():
        lines += ["", "At FLUX.1's width, one double and two single blocks with random weights, bfloat16:", ""]
        lines += width_table(pd.DataFrame(recording.rows_of(wide)))
    recording.renew(path, "benchmarks/input_merge.py page", lines[1:])


if __name__ == "__main__":
    app()
