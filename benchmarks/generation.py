"""How much sooner is the picture there? Whole denoising loops, in full and cached, side by side in one process.

    python benchmarks/generation.py --output out/generation.json

For every setting the two are run in turn, so that a machine whose speed drifts slows both; the ratio of each pair counts, and
the table gives its median and quartiles.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
import typer
from recording import save
from rich.progress import track
from rich.table import Table

import dit_accel
from dit_accel import TokenCacheConfig
from pipelines.generation import denoise, settings_for, switch, warm_up
from pipelines.loading import load
from pipelines.terminal import quiet, show

SETTINGS = [
    TokenCacheConfig(interval=interval, cache_ratio=ratio, selector=selector)
    for interval in (3, 4, 6)
    for ratio, selector in ((0.9, "random"), (0.9, "attention"), (1.0, "random"))
]


def main(
    pipelines: list[str] = typer.Option(
        ["emoji-flux", "emoji-pixart"], "--pipeline", help="Name, hub id or folder; may be repeated."
    ),
    repeats: int = typer.Option(5, min=2, help="Pairs of runs for each setting."),
    prompt: str = typer.Option("red apple, 3d style"),
    threads: int = typer.Option(torch.get_num_threads(), help="CPU threads."),
    output: Path = typer.Option(Path("out/generation.json"), help="Where the measurements are written."),
) -> None:
    torch.set_num_threads(threads)
    quiet()
    table = Table(
        "pipeline", "steps", "N", "R", "selector", "full s", "cached s", "speed-up", "quartiles", caption="Seconds of denoising."
    )
    rows = []
    for name in pipelines:
        pipe = load(name)
        settings = settings_for(pipe, name)
        for config in track(SETTINGS, description=name):
            warm_up(pipe, [prompt], config, settings)
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(repeats):
                for cached in (False, True):
                    switch(pipe, config if cached else None)
                    picture = denoise(pipe, [(prompt, 0)], settings, lambda: None, cached)[0]
                    seconds[cached].append(picture.denoising_seconds)
            dit_accel.remove(pipe)
            ratios = [full / cached for full, cached in zip(*seconds.values(), strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
            rows.append(
                {
                    "pipeline": name,
                    "steps": settings.steps,
                    "config": config.to_dict(),
                    "full": seconds[False],
                    "cached": seconds[True],
                    "speedup": [low, median, high],
                }
            )
            medians = [f"{statistics.median(times):.2f}" for times in seconds.values()]
            setting = [f"{config.interval}", f"{config.cache_ratio:g}", config.selector]
            table.add_row(name, f"{settings.steps}", *setting, *medians, f"{median:.2f}x", f"{low:.2f}-{high:.2f}")
    save(output, rows)
    show(table)
    typer.echo(f"Measurements: {output}")


if __name__ == "__main__":
    typer.run(main)
