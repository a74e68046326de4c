"""Fewer tokens early: what merging the first full steps of a recipe costs and brings.

    python benchmarks/input_merge.py measure    # makes, times, compares and scores the pictures
    python benchmarks/input_merge.py page       # renews the table in docs/model-scope.md

Beside them the stock pipeline at half the side, enlarged. One picture at a time, one thread; every picture is timed against one in
full of the same prompt just before it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import recording
import torch
import typer
from PIL import Image
from rich.progress import track

import dit_accel
from dit_accel import recipe
from dit_accel.eval.fidelity import decibels, squared_error
from dit_accel.eval.prompt_sets import read_prompt_set
from dit_accel.eval.rewards import load_reward
from dit_accel.eval.spec import noise_seed
from dit_accel.eval.statistics import mean_interval, paired
from dit_accel.pipelines.generation import denoise, settings_for, switched
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.pictures import write_atomically
from dit_accel.pipelines.terminal import quiet
from dit_accel.pipelines.tuning.search import BEST

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
ROOT = Path(__file__).parent.parent
PIPELINES, SPEEDS, SCORE = ["emoji-flux", "emoji-pixart"], (3, 4, 6), "emoji-reward"
PROMPTS = read_prompt_set(ROOT / "eval" / "specs" / "embedded.txt")
Output = typer.Option(ROOT / "docs" / "data" / "input-merge.json", help="File of the measurements.")
MARKS = "<!-- made by benchmarks/input_merge.py page -->", "<!-- end -->"


def settings(name: str) -> list[tuple[str, Any, float]]:
    """What is compared: its name, the configuration, and the side of the picture beside that of the pipeline."""
    found: list[tuple[str, Any, float]] = []
    for one in recipe.read(recipe.SHIPPED / f"{name}.json"):
        if one.speedup in SPEEDS:
            full = one.config.full_steps or ()
            for merged in sorted({0, 1, (len(full) + 1) // 2, len(full) - 1}):
                config = replace(one.config, merged_steps=full[:merged] or None)
                found.append((f"recipe for {one.speedup:g}x, {merged} of {len(full)} full steps merged", config, 1.0))
    return [*found, ("half the side, enlarged", None, 0.5)]


@app.command()
def measure(
    prompts: int = typer.Option(24, min=2, max=len(PROMPTS), help="How many prompts, spread over the set."), output: Path = Output
) -> None:
    """Make the pictures."""
    torch.set_num_threads(1)
    quiet()
    reward, rows = load_reward(SCORE), recording.rows_of(output)
    for name in PIPELINES:
        pipe = load(name, "float32")
        best, cells = settings_for(pipe, name), settings(name)
        for number in track(range(prompts), description=name):
            prompt = PROMPTS[number * len(PROMPTS) // prompts]
            if any(row["pipeline"] == name and row["prompt"] == prompt for row in rows):
                continue
            made = []
            for label, config, side in cells:
                small = replace(best, height=int(side * best.height), width=int(side * best.width))
                pair, seed = [], noise_seed(prompt, 0)
                for one, size in ((None, best), (config, small)):
                    with switched(pipe, one):
                        pair += denoise(pipe, [(prompt, seed)], size, lambda: None, applied=False)
                        flops = dit_accel.report(pipe).flops_ratio if one is not None else None
                full, faster = pair
                image = faster.image.resize(full.image.size, Image.Resampling.LANCZOS)
                scores = reward.score([prompt] * 2, [full.image, image])
                row = {"pipeline": name, "prompt": prompt, "setting": label, "flops": flops, SCORE: float(scores[1] - scores[0])}
                row |= {"speedup": full.denoising_seconds / faster.denoising_seconds}
                made.append(row | {"psnr": min(BEST, decibels(squared_error(full.image, image)))})
            rows += made
            recording.save(output, rows)


def table(rows: pd.DataFrame) -> list[str]:
    """In Markdown."""
    lines = ["| | by FLOPs | measured | PSNR, dB | score beside the full run's |", "| --- | --- | --- | --- | --- |"]
    for label, some in rows.groupby("setting", sort=False):
        likeness, score = mean_interval(some["psnr"]), paired(some[SCORE])
        flops = f"{some['flops'].median():.2f}x" if some["flops"].notna().all() else ""
        cells = [
            label,
            flops,
            f"{some['speedup'].median():.2f}x",
            f"{likeness.mean:.1f} ({likeness.low:.1f} to {likeness.high:.1f})",
        ]
        lines.append(f"| {' | '.join(cells)} | {score.mean:+.2f} ({score.low:+.2f} to {score.high:+.2f}) |")
    return lines


@app.command()
def page(output: Path = Output, path: Path = typer.Option(ROOT / "docs" / "model-scope.md", help="The page.")) -> None:
    """Renew the tables between the marks."""
    rows, lines = pd.DataFrame(recording.rows_of(output)), [MARKS[0]]
    for name, some in rows.groupby("pipeline", sort=False):
        lines += ["", f"{name}, {some['prompt'].nunique()} prompts, one seed each:", "", *table(some)]
    before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    write_atomically(path, (before + "\n".join(lines) + "\n\n" + MARKS[1] + rest.split(MARKS[1])[1]).encode())


if __name__ == "__main__":
    app()
