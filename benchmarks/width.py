"""How much sooner, and with how much memory, at the real width? Whole denoising loops of FLUX.1-dev's and PixArt-XL's blocks.

    python benchmarks/width.py loops --model flux --pixels 1024 --output out/width.json
    python benchmarks/width.py memory --output out/memory.json

Stock pipelines run around transformers of the published width, heads and text length, with random weights and as many blocks as
there is time for: FLUX with two single blocks for each double one, PixArt with guidance in one batch. `loops` runs every method
in turn between two runs in full, and counts in the same loop the multiply-adds that were executed, the peak of the memory
allocated and what a method holds between steps. Efficiency is the speed-up in seconds over the one in FLOPs. `memory` measures
what is held at two depths and two sizes, from which the same formula gives any depth and size: full FLUX.1-dev.

Random weights make no pictures, and what a cache that looks at differences decides on them means nothing: those run at one
setting, and what counts of them is the efficiency.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from blocks import TEXT
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from meter import Meter
from peers import METHODS, applied, calibrate, steps_of
from recording import fast_dtype, rows_of, save
from rich.progress import track
from rich.table import Table

from dit_accel.pipelines.terminal import quiet, show

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
STEPS = 20
FULL = ("full", "stock", {})
FLUX_DEV = {"units": 19, "tokens": 4096}  # 19 double and 38 single blocks, 1024 px

Choice = tuple[str, str, dict[str, Any]]  # method, whose, setting


# One setting of about the same speed each, three of the cache whose efficiency is at issue; the middle one of what is missing here.
PICKED: dict[str, list[dict[str, Any]]] = {
    "token cache, random": [{"interval": n} for n in (4, 5, 6)],
    **{f"token cache, {kind}": [{"interval": 5}] for kind in ("attention", "drift", "nothing computed", "forecast", "forecast 2")},
    "token cache + merge": [{"interval": 5}],
    "TaylorSeer": [{"cache_interval": 5}],
    "TaylorSeer lite": [{"cache_interval": 5}],
    "fewer steps": [{"speedup": 4.2}],
    "DBCache": [{"residual_diff_threshold": 0.8}],  # of random weights; less skips nothing
    "DBCache + TaylorSeer": [{"residual_diff_threshold": 0.8}],
    "step mask": [{"mask_policy": "fast"}],
    "step mask + TaylorSeer": [{"mask_policy": "fast"}],
}


def choices(model: str) -> list[Choice]:
    """What is compared on a model, from the ladders of the methods."""
    found = []
    for name, method in METHODS.items():
        wanted = PICKED.get(name, [method.ladder[len(method.ladder) // 2]])
        settings = [next(own for own in method.ladder if part.items() <= own.items()) for part in wanted]
        found += [(name, method.by, setting) for setting in settings if model in method.families]
    return found


def build(model: str, units: int, dtype: torch.dtype, device: str) -> Any:
    """A stock pipeline around random weights: `units` double and twice as many single blocks of FLUX, or layers of PixArt."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        if model == "flux":
            transformer = FluxTransformer2DModel(num_layers=units, num_single_layers=2 * units, guidance_embeds=True).eval()
        else:
            extra = dict(caption_channels=4096, use_additional_conditions=False, sample_size=128)
            transformer = PixArtTransformer2DModel(num_layers=units, **extra).eval()
    torch.set_default_dtype(torch.float32)
    nothing = dict(vae=None, text_encoder=None, tokenizer=None)
    if model == "flux":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # FLUX.1-dev's
        pipe: Any = FluxPipeline(scheduler, transformer=transformer, text_encoder_2=None, tokenizer_2=None, **nothing)
    else:
        pipe = PixArtSigmaPipeline(transformer=transformer, scheduler=DPMSolverMultistepScheduler(), **nothing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, pixels: int, steps: int) -> None:
    """One picture's latents from the same noise and text every time."""
    transformer = pipe.transformer
    generator = torch.Generator().manual_seed(0)

    def text(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(transformer.device, transformer.dtype)

    arguments: dict[str, Any] = dict(height=pixels, width=pixels, num_inference_steps=steps, output_type="latent")
    if isinstance(transformer, FluxTransformer2DModel):
        arguments |= dict(prompt_embeds=text(1, TEXT["flux"], 4096), pooled_prompt_embeds=text(1, 768))
    else:
        mask = torch.ones(1, TEXT["pixart"], device=transformer.device)
        arguments |= dict(negative_prompt=None, prompt_embeds=text(1, TEXT["pixart"], 4096), prompt_attention_mask=mask)
        arguments |= dict(negative_prompt_embeds=text(1, TEXT["pixart"], 4096), negative_prompt_attention_mask=mask)
        arguments |= dict(use_resolution_binning=False)
    pipe(generator=generator, **arguments)


def measured(pipe: Any, choice: Choice, pixels: int, steps: int) -> dict[str, Any]:
    """Seconds from the first call of the transformer to the end of the last; FLOPs; bytes at their peak and between calls."""
    name, _, setting = choice
    device = pipe.transformer.device.type
    moments: list[float] = []
    held: list[int] = []

    def now(*_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())

    gc.collect()
    with Meter() as meter:
        handles = [
            pipe.transformer.register_forward_pre_hook(now, prepend=True),
            pipe.transformer.register_forward_hook(lambda *_: (now(), held.append(meter.live_bytes)) and None),
        ]
        if choice == FULL:
            run(pipe, pixels, steps)
        else:
            with applied(pipe, METHODS[name], setting, steps):
                run(pipe, pixels, steps_of(METHODS[name], setting, steps))
    for handle in handles:
        handle.remove()
    return {"seconds": moments[-1] - moments[0], "flops": meter.flops, "peak_bytes": meter.peak_bytes, "held_bytes": max(held)}


def places(rows: list[dict[str, Any]], **same: Any) -> Iterator[dict[str, Any]]:
    return (row for row in rows if all(row[key] == value for key, value in same.items()))


@app.command()
@torch.no_grad()
def loops(
    models: list[str] = typer.Option(["flux", "pixart"], "--model", help="flux or pixart; may be repeated."),
    pixels: list[int] = typer.Option([512, 1024], help="Side of the picture; may be repeated."),
    units: int = typer.Option(1, help="Double blocks of FLUX, with twice as many single ones."),
    layers: int = typer.Option(4, help="Blocks of PixArt."),
    methods: list[str] = typer.Option([], "--method", help="Only this one; may be repeated."),
    steps: int = typer.Option(STEPS),
    rounds: int = typer.Option(1, min=1, help="Runs of every method; runs in full are twice as many."),
    dtype: str = typer.Option(fast_dtype(), help="What is computed in; by default what the machine is fast in."),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu"),
    output: Path = typer.Option(Path("out/width.json"), help="Where the measurements are written; rounds it has are not repeated."),
) -> None:
    """Seconds, FLOPs, efficiency and memory of whole denoising loops."""
    quiet()
    rows = rows_of(output)
    for model in models:
        pipe = build(model, units if model == "flux" else layers, getattr(torch, dtype), device)
        compared = [choice for choice in choices(model) if not methods or choice[0] in methods]
        if any(name == "MagCache" for name, *_ in compared):
            calibrate(pipe, steps, lambda pipe=pipe: run(pipe, 256, steps))
        for side in pixels:
            common = {"model": model, "pixels": side, "steps": steps, "units": units if model == "flux" else layers, "dtype": dtype}
            todo = []
            for number in range(rounds):
                order = list(compared)
                random.Random(number).shuffle(order)
                todo += [(number, choice) for choice in (FULL, *order, FULL)]
            run(pipe, side, 1)  # warms up
            for number, choice in track(todo, description=f"{model}, {side} px"):
                key = common | {"round": number, "method": choice[0], "setting": choice[2]}
                if len(list(places(rows, **key))) < (2 if choice == FULL else 1):
                    rows.append(key | {"by": choice[1]} | measured(pipe, choice, side, steps))
                    save(output, rows)
        del pipe
    show(table_of(rows))
    typer.echo(f"Measurements: {output}")


def table_of(rows: list[dict[str, Any]]) -> Table:
    columns = ("model", "px", "method", "by", "full s", "method s", "speed-up", "FLOPs ratio", "efficiency", "peak MB", "held MB")
    table = Table(*columns)
    for row in summary(rows):
        figures = [f"{row[key]:.2f}" for key in ("full", "seconds", "speedup", "flops_ratio", "efficiency")]
        name = f"{row['method']} {' '.join(map(str, row['setting'].values()))}"
        memory = [f"{row[key] / 1e6:.0f}" for key in ("peak_bytes", "held_bytes")]
        table.add_row(row["model"], f"{row['pixels']}", name, row["by"], *figures, *memory)
    return table


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a model, size, method and setting: the median over rounds of the ratios to the mean of the round's runs in full."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[key] for key in ("model", "pixels", "method", "setting")]), []).append(row)
    found = []
    for group in groups.values():
        speedups, ratios, fulls = [], [], []
        for number in sorted({row["round"] for row in group}):
            own = list(places(group, round=number))
            full = list(places(rows, model=own[0]["model"], pixels=own[0]["pixels"], round=number, method="full"))
            fulls.append(statistics.mean(row["seconds"] for row in full))
            speedups.append(fulls[-1] / statistics.mean(row["seconds"] for row in own))
            ratios.append(full[0]["flops"] / own[0]["flops"])
        medians = {key: statistics.median(row[key] for row in group) for key in ("seconds", "flops", "peak_bytes", "held_bytes")}
        gain, ratio = statistics.median(speedups), statistics.median(ratios)
        gains = {"full": statistics.median(fulls), "speedup": gain, "flops_ratio": ratio, "efficiency": gain / ratio}
        found.append(group[0] | medians | gains)
    return found


@app.command()
@torch.no_grad()
def memory(
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu"),
    output: Path = typer.Option(Path("out/memory.json"), help="Where the measurements are written."),
) -> None:
    """What every method holds between the steps of FLUX, at two depths and two sizes, and so for full FLUX.1-dev at 1024 px."""
    quiet()
    rows: list[dict[str, Any]] = []
    compared = {name: (by, METHODS[name].ladder[0]) for name, by, _ in choices("flux")}  # the setting changes nothing that is held
    for units in (1, 2):
        pipe = build("flux", units, torch.bfloat16, device)
        calibrate(pipe, 8, lambda pipe=pipe: run(pipe, 128, 8))
        for name, (by, setting) in track(compared.items(), description=f"{units} double, {2 * units} single blocks"):
            for pixels in (128, 256):
                found = measured(pipe, (name, by, setting), pixels, 8)["held_bytes"]
                row = {"method": name, "by": by, "setting": setting, "units": units, "tokens": (pixels // 16) ** 2}
                rows.append(row | {"held_bytes": found})
                save(output, rows)
        del pipe
    table = Table("method", "by", "GB", caption="Held between steps by full FLUX.1-dev at 1024 px, one picture in bfloat16.")
    for name, (by, size) in flux_dev(rows).items():
        table.add_row(name, by, f"{size / 1e9:.2f}")
    show(table)
    typer.echo(f"Measurements: {output}")


def flux_dev(rows: list[dict[str, Any]]) -> dict[str, tuple[str, float]]:
    """Whose each method is, and the bytes that it holds more than a run without one, for full FLUX.1-dev at 1024 px."""
    held: dict[str, dict[tuple[int, int], int]] = {}
    for row in rows:
        held.setdefault(row["method"], {})[row["units"], row["tokens"]] = row["held_bytes"]
    plain = held["fewer steps"]
    owners = {row["method"]: row["by"] for row in rows}
    more = {name: {place: size - plain[place] for place, size in sizes.items()} for name, sizes in held.items()}
    return {name: (owners[name], extrapolated(sizes, **FLUX_DEV)) for name, sizes in more.items()}


def extrapolated(held: dict[tuple[int, int], int], units: int, tokens: int) -> float:
    """Bytes at another depth and size, from those at two of each: linear in both, and in their product."""
    (u, n), (v, m) = min(held), max(held)
    a, b = (units - u) / (v - u), (tokens - n) / (m - n)
    return (1 - a) * ((1 - b) * held[u, n] + b * held[u, m]) + a * ((1 - b) * held[v, n] + b * held[v, m])


if __name__ == "__main__":
    app()
