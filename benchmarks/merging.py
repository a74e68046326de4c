"""What does merging gain, and how good are the pictures?

    python benchmarks/merging.py blocks --output out/merging-blocks.json
    python benchmarks/merging.py pictures --output out/merging-pictures.json
    python benchmarks/merging.py rematching --output out/merging-rematching.json

`blocks` times the blocks of FLUX.1 at their real width, in turn without the library and merged, beside the most that the saved
arithmetic allows, and what matching, merging and unmerging cost by themselves. `pictures` denoises on the embedded pipelines, in
turn in full and merged. `rematching` does the same for matchings that serve more and more steps and layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import typer
from blocks import TEXT, WIDTHS, Stopwatch, inputs
from recording import fast_dtype, save
from rich.progress import track
from rich.table import Table

import dit_accel
from dit_accel import TokenCacheConfig, TokenMergeConfig, merging
from dit_accel.pipelines.generation import compare, settings_for
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.methods import Config, describe, settings_of
from dit_accel.pipelines.pictures import psnr
from dit_accel.pipelines.terminal import quiet, show

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
STEPS = 5  # that a matching serves
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {},
    "keys and values": {"keep_queries": True},
    "attention and MLP": {"merge_mlp": True},
    "proportional": {"proportional_attention": True},
}
PROMPTS = ("red apple, 3d style", "tiger face, flat style", "cactus, cartoon style")


def arithmetic(tokens: int, config: TokenMergeConfig | None) -> dict[str, int]:
    """FLOPs of a call that makes no matching, by the block's class: matrix products of tokens and attention, nothing else."""
    every = tokens + TEXT["flux"]
    fewer = every - int(tokens * config.ratio) if config is not None else every
    keys_only, mlp = (config.keep_queries, config.merge_mlp) if config is not None else (False, False)
    square = 2 * 3072**2
    asked = every if keys_only else fewer
    attention, forward = 4 * asked * fewer * 3072, fewer if mlp else every
    double = (2 * asked + 2 * fewer) * square + attention + 8 * forward * square
    single = (asked + 2 * fewer) * square + attention + 9 * forward * square
    return {"FluxTransformerBlock": double, "FluxSingleTransformerBlock": single}


def own_cost(config: TokenMergeConfig, tokens: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Any]]:
    """A matching, and merging and unmerging once, of one picture of so many tokens at FLUX's width."""
    side = round(tokens**0.5)
    image = torch.randn(1, tokens, 3072, dtype=dtype, device=device)
    count = merging.merged_away(tokens, (side, side), config.stride, config.ratio)
    into = merging.destinations((side, side), config.stride).to(device)
    matching = merging.match(image, into, count)
    return {
        "matching": lambda: merging.match(image, into, count),
        "merge and unmerge": lambda: merging.unmerge(merging.merge(image, matching), matching),
    }


def measure(
    config: TokenMergeConfig, variant: str, tokens: int, model: Any, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """One row a block: seconds of all repeats, medians of their ratios to the stock block, and the ceiling."""
    device = next(model.parameters()).device.type
    arguments, watch = inputs("flux", tokens, TEXT["flux"], dtype, device), Stopwatch(device)
    stock_flops, merged_flops = arithmetic(tokens, None), arithmetic(tokens, config)

    def step(number: int) -> dict[str, float]:
        time = torch.full((1,), 1 - number / 100, device=device)
        return watch.blocks(model, lambda: model(**arguments, timestep=time, return_dict=False))

    seconds: dict[str, dict[str, list[float]]] = {}
    for repeat in track(range(repeats + 1), description=f"{tokens} tokens, {variant}, ratio {config.ratio:g}"):
        kinds = {"stock": step(0)}
        dit_accel.apply(model, config)
        step(1)
        kinds["merged"] = step(2)  # with the matching of the step before
        dit_accel.remove(model)
        own = {name: watch.call(work) for name, work in own_cost(config, tokens, dtype, device).items()}
        kinds |= {name: dict.fromkeys(kinds["stock"], value) for name, value in own.items()}
        for kind, blocks in kinds.items() if repeat else ():  # the first round warms up
            for block, value in blocks.items():
                seconds.setdefault(block, {}).setdefault(kind, []).append(value)
    rows = []
    for block, kinds in seconds.items():
        stock = kinds["stock"]
        median = {kind: statistics.median(v / s for v, s in zip(values, stock, strict=True)) for kind, values in kinds.items()}
        rows.append(
            {
                "block": block,
                "tokens": tokens,
                "variant": variant,
                "config": config.to_dict(),
                "seconds": kinds,
                "gain": 1 / (median["merged"] + median["matching"] / STEPS),
                "ceiling": stock_flops[block] / merged_flops[block],
                "own_cost": median["matching"] / STEPS + median["merge and unmerge"],
                "shares": median,
            }
        )
    return rows


@app.command()
@torch.no_grad()
def blocks(
    tokens: list[int] = typer.Option([1024, 4096], help="Image tokens; may be repeated."),
    ratios: list[float] = typer.Option([0.25, 0.5, 0.75], "--ratio", help="May be repeated."),
    variants: list[str] = typer.Option(list(VARIANTS), "--variant", help="May be repeated."),
    repeats: int = typer.Option(5, min=1, help="Rounds after the first, which warms up."),
    dtype: str = typer.Option(fast_dtype(), help="What is computed in; by default what the machine is fast in."),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu"),
    output: Path = Path("out/merging-blocks.json"),
) -> None:
    """Gain of one block of FLUX.1 beside its arithmetic ceiling."""
    columns = ("block", "image tokens", "merged", "ratio", "stock s", "gain", "ceiling", "matching", "merge, unmerge", "own cost")
    table = Table(
        *columns,
        caption=f"Gain: stock over merged, with a {STEPS}th of a matching. The last three are shares of the stock block's time: "
        f"one matching, one merge and unmerge, and the latter with a {STEPS}th of the former.",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = WIDTHS["flux"]().eval()
    torch.set_default_dtype(torch.float32)
    rows = []
    for number in tokens:
        for variant in variants:
            for ratio in ratios:
                config = TokenMergeConfig(ratio=ratio, rematch_every=(STEPS, 1), **VARIANTS[variant])
                for row in measure(config, variant, number, model, getattr(torch, dtype), repeats):
                    rows.append(row)
                    shares = [f"{100 * row['shares'][name]:.2f} %" for name in ("matching", "merge and unmerge")]
                    shares.append(f"{100 * row['own_cost']:.2f} %")
                    stock = f"{statistics.median(row['seconds']['stock']):.3f}"
                    gains = f"{row['gain']:.2f}x", f"{row['ceiling']:.2f}x"
                    table.add_row(row["block"], f"{number}", variant, f"{ratio:g}", stock, *gains, *shares)
                save(output, rows)
    show(table)
    typer.echo(f"Measurements: {output}")


def likeness(pipelines: Iterable[str], configs: list[Config | list[Config]], seeds: int, output: Path) -> None:
    """Speed-up and PSNR of every configuration against the twins in full, from the same noise."""
    quiet()
    table = Table(
        "pipeline", "method", "speed-up", "FLOPs ratio", "PSNR", "PSNR worst", caption="Medians; PSNR in dB: mean, worst."
    )
    rows = []
    for name in pipelines:
        pipe = load(name)
        settings = settings_for(pipe, name, num_images=seeds)
        for config in track(configs, description=name):
            pairs = list(compare(pipe, list(PROMPTS), config, settings))
            ratios = [full.denoising_seconds / faster.denoising_seconds for full, faster in pairs]
            decibels = [psnr(full.image, faster.image) for full, faster in pairs]
            works = [faster.work for _, faster in pairs if faster.work is not None]
            flops = works[0]["full_flops"] / works[0]["flops"]
            row = {"pipeline": name, **settings_of(config), "speedups": ratios, "psnr_db": decibels, "flops_ratio": flops}
            rows.append(row)
            shown = f"{statistics.median(ratios):.2f}x", f"{flops:.2f}", f"{statistics.mean(decibels):.1f}", f"{min(decibels):.1f}"
            table.add_row(name, describe(config), *shown)
            save(output, rows)
    show(table)
    typer.echo(f"Measurements: {output}")


PIPELINES = ["emoji-flux", "emoji-pixart"]


@app.command()
def pictures(
    pipelines: list[str] = typer.Option(PIPELINES, "--pipeline", help="Name, hub id or folder; may be repeated."),
    seeds: int = typer.Option(1, min=1, help="Pictures of each prompt."),
    output: Path = Path("out/merging-pictures.json"),
) -> None:
    """Time and likeness of merging, alone and with a cache, against the twin in full."""
    merges = [TokenMergeConfig(ratio=ratio, **variant) for variant in VARIANTS.values() for ratio in (0.25, 0.5, 0.75)]
    cache = TokenCacheConfig(interval=4, cache_ratio=0.9)
    both = [[cache, TokenMergeConfig(ratio=0.5, **VARIANTS[name])] for name in ("attention", "keys and values")]
    likeness(pipelines, [*merges, cache, *both], seeds, output)


@app.command()
def rematching(
    pipelines: list[str] = typer.Option(PIPELINES, "--pipeline", help="Name, hub id or folder; may be repeated."),
    ratio: float = typer.Option(0.5, help="Of the merge."),
    seeds: int = typer.Option(1, min=1, help="Pictures of each prompt."),
    output: Path = Path("out/merging-rematching.json"),
) -> None:
    """Time and likeness when a matching serves more and more steps and layers."""
    every = [*((steps, 1) for steps in (1, 2, 5, 10)), *((5, layers) for layers in (2, 4, 99))]
    variants = ("attention", "keys and values")
    likeness(
        pipelines,
        [TokenMergeConfig(ratio=ratio, rematch_every=pair, **VARIANTS[name]) for name in variants for pair in every],
        seeds,
        output,
    )


if __name__ == "__main__":
    app()
