"""How do time and memory grow with the tokens? At the real width of FLUX.1, and of PixArt-XL for the selector that is PixArt's own.

    python benchmarks/growth.py --output out/growth.json --figure out/growth.png

Steps are those of one double and one single block of FLUX.1 with random weights. A selection is what one layer does for it: what
the full step observes (attention received less the norm and rotation of queries and keys), the scores, and the largest of them.
Matching and merging stand beside those of tomesd (https://github.com/dbolya/tomesd), which holds all similarities at once.

Memory is the peak of what was allocated meanwhile; weights, inputs and, on a partial step, the cache were there before. Its
exponent e says that it grew as (image tokens)^e from one size to the next: at most 1 if it is linear, less the more the 512 text
tokens weigh. Rows that the output holds already are not measured again.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import typer
from blocks import TEXT, WIDTHS, Stopwatch, inputs
from meter import Meter
from recording import fast_dtype, rows_of, save
from rich.progress import track
from rich.table import Table

import dit_accel
from dit_accel import SelectionContext, TokenCacheConfig, importance, merging, when, which
from dit_accel.families import flux
from dit_accel.families.attention import key_and_value_observations
from dit_accel.pipelines.pictures import write_atomically
from dit_accel.pipelines.terminal import show

Row = dict[str, Any]
Work = Callable[[], Any]
FROM, MOST = 1024, 1.05  # from so many image tokens on, no exponent of ours may be larger
OURS, STRIDE, RATIO = "dit-accel", (2, 2), 0.5  # the latter two of a matching
CACHE = TokenCacheConfig(interval=1000, cache_ratio=0.9)  # after one full step, partial steps without end
FULL = TokenCacheConfig(interval=1000, cache_ratio=0.9, warmup_steps=1000)


@dataclass(frozen=True)
class Layer:
    """Where tokens are selected: image tokens, and in front of them the text where the stream is "joint"."""

    channels: int
    heads: int
    text: int
    stream: str


LAYERS = {"flux": Layer(3072, 24, TEXT["flux"], "joint"), "pixart": Layer(1152, 16, TEXT["pixart"], "feed-forward")}


def selecting(name: str, layer: Layer, tokens: int, config: TokenCacheConfig, **like: Any) -> Work:
    """One selection among so many image tokens, a square, from random inputs of type and device `like`; returns index [1, k]."""
    selector, side = which.get(name), math.isqrt(tokens)
    text = layer.text if layer.stream == "joint" else 0
    total, shape = tokens + text, (layer.heads, layer.channels // layer.heads)
    states, heads, words = (
        torch.randn(1, n, *rest, **like) for n, *rest in ((total, layer.channels), (total, *shape), (layer.text, *shape))
    )
    noise, ages = torch.rand(1, total, device=heads.device), torch.ones(1, total, device=heads.device)
    asked = importance.sample(total, importance.query_stride(total, config.query_share), heads.device)
    count = when.tokens_to_compute(1 - config.cache_ratio, total)

    def observe(need: str) -> torch.Tensor:
        if need == "attention":
            return importance.attention_received(heads[:, asked], heads)
        if need == "entropy":
            return importance.attention_entropy(heads, words, None, False)
        if need == "last_tokens":
            return states.clone()
        return key_and_value_observations(lambda _: heads, frozenset({need}))[need]

    def work() -> torch.Tensor:
        where = SimpleNamespace(layer=0, stream=layer.stream, step=1)
        observed = {need: observe(need) for need in selector.needs}
        context = SelectionContext(states, ages, noise, count, (side, side), text, where, observed)
        scores = which.total_scores(selector.score(context), ages, config.age_weight, config.interval)
        return scores.topk(count, dim=-1, sorted=False).indices

    return work


def matching(layer: Layer, tokens: int, then_merge: bool, **like: Any) -> Work:
    """A matching of the tokens of a square picture, or merging and unmerging them by one that was made before."""
    image, side, count = torch.randn(1, tokens, layer.channels, **like), math.isqrt(tokens), int(tokens * RATIO)
    into = merging.destinations((side, side), STRIDE).to(image.device)
    if not then_merge:
        return lambda: merging.match(image, into, count)
    match = merging.match(image, into, count)
    return lambda: merging.unmerge(merging.merge(image, match), match)


def matching_of_tomesd(layer: Layer, tokens: int, then_merge: bool, **like: Any) -> Work:
    """The same by the public package, which chooses the same destinations."""
    from tomesd.merge import bipartite_soft_matching_random2d

    image, side, count = torch.randn(1, tokens, layer.channels, **like), math.isqrt(tokens), int(tokens * RATIO)
    match = partial(bipartite_soft_matching_random2d, image, side, side, *STRIDE, count, no_rand=True)
    if not then_merge:
        return match
    merge, unmerge = match()
    return lambda: unmerge(merge(image))


def stepping(config: TokenCacheConfig | None, ahead: int, tokens: int, **like: Any) -> Work:
    """Steps of one double and one single block of FLUX.1, after so many ahead; each call makes one more."""
    torch.manual_seed(0)
    torch.set_default_dtype(like["dtype"])
    with torch.device(like["device"]):
        model = WIDTHS["flux"]().eval()
    torch.set_default_dtype(torch.float32)
    arguments, times = inputs("flux", tokens, TEXT["flux"], **like), iter(torch.linspace(1, 0, 1001))
    if config is not None:
        dit_accel.apply(model, config)

    def step() -> None:
        model(**arguments, timestep=next(times)[None].to(like["device"]), return_dict=False)

    for _ in range(ahead):
        step()
    return step


def works() -> dict[tuple[str, str], Callable[..., Work]]:
    """What is measured, by its name and whose code it is; called with `tokens`, `dtype` and `device`."""
    found: dict[tuple[str, str], Callable[..., Work]] = {}
    for what, by, config, ahead in (("step", "stock", None, 0), ("full step", OURS, FULL, 0), ("partial step", OURS, CACHE, 1)):
        found[what, by] = partial(stepping, config, ahead)
    for name in dit_accel.selectors():
        family = "flux" if which.get(name).needs <= flux.OBSERVATIONS else "pixart"
        found[f"selection: {name}", OURS] = partial(selecting, name, LAYERS[family], config=CACHE)
    for what, then_merge in (("matching", False), ("merge and unmerge", True)):
        for by, make in ((OURS, matching), ("tomesd", matching_of_tomesd)):
            found[what, by] = partial(make, LAYERS["flux"], then_merge=then_merge)
    return found


def measure(work: Work, repeats: int, limit: float, device: str) -> Row:
    """Seconds of some repeats, or of the metered first call where that took longer than the limit; bytes and FLOPs of the first."""
    watch = Stopwatch(device)
    with Meter() as meter:
        first = watch.call(work)
    seconds: list[float] = []
    while first <= limit and len(seconds) < repeats and sum(seconds) <= limit:
        seconds.append(watch.call(work))
    return {"seconds": seconds or [first], "peak_bytes": meter.peak_bytes, "flops": meter.flops}


def exponent(before: tuple[int, int], after: tuple[int, int]) -> float:
    """e in bytes ~ tokens^e, from two pairs of tokens and bytes."""
    return math.log(after[1] / before[1]) / math.log(after[0] / before[0])


def add_exponents(rows: list[Row]) -> None:
    """Every row gets that of its memory since the next smaller size; the smallest has None."""
    last: dict[str, tuple[int, int]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        name, point = json.dumps([row["what"], row["by"], row["config"]]), (row["tokens"], row["peak_bytes"])
        row["exponent"] = exponent(last[name], point) if name in last else None
        last[name] = point


def draw(rows: list[Row], path: Path) -> None:
    """Seconds and bytes by tokens, both logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    from dit_accel.eval.drawing import COLORS, MARKERS, style

    names = list(dict.fromkeys((row["what"], row["by"]) for row in rows))
    sizes, lines = sorted({row["tokens"] for row in rows}), []
    with style():
        figure = Figure(figsize=(11, 5), layout="constrained")
        for panel, title, unit in zip(figure.subplots(1, 2), ("Time", "Peak of memory"), ("s", "B"), strict=True):
            lines = []
            for number, (what, by) in enumerate(names):
                own = sorted((row for row in rows if (row["what"], row["by"]) == (what, by)), key=lambda row: row["tokens"])
                values = [statistics.median(row["seconds"]) if unit == "s" else row["peak_bytes"] for row in own]
                color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
                looks = {"color": "black", "lw": 2} if what.endswith("step") else {"color": color}
                looks |= {"ls": ":" if by == "tomesd" else "--" if what.startswith("m") else "-", "marker": marker, "ms": 5}
                label = what if by == OURS else f"{what}, {by}"
                lines += panel.loglog([row["tokens"] for row in own], values, label=label, **looks)
            low = panel.get_ylim()[0] / 4
            for power, place in ((1, "as the tokens"), (2, "as their square")):
                ends = [low * (size / sizes[0]) ** power for size in (sizes[0], sizes[-1])]
                panel.loglog((sizes[0], sizes[-1]), ends, color="#767676", lw=0.8, ls="-.", zorder=0)
                panel.annotate(place, (sizes[-1], ends[-1]), ha="right", va="bottom", color="#767676", fontsize=9)
            panel.set(title=title, xlabel="Image tokens")
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
            panel.yaxis.set_major_formatter(EngFormatter(unit))
            panel.minorticks_off()
        figure.legend(handles=lines, loc="outside right center", handlelength=3)
        figure.savefig(png := BytesIO(), format="png", dpi=150)
    write_atomically(path, png.getvalue())


@torch.no_grad()
def main(
    tokens: list[int] = typer.Option([256, 1024, 4096, 16384], help="Image tokens, squares of even numbers; may be repeated."),
    only: list[str] = typer.Option([""], help="Measure only what begins like this, 'selection' for example; may be repeated."),
    repeats: int = typer.Option(3, min=1, help="After the first call, which warms up and is metered."),
    limit: float = typer.Option(20.0, help="Seconds of a row after which it is not repeated."),
    dtype: str = typer.Option(fast_dtype(), help="What is computed in; by default what the machine is fast in."),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu"),
    fresh: bool = typer.Option(False, help="Measure again what the output holds already."),
    output: Path = typer.Option(Path("out/growth.json"), help="Where the measurements are written, row by row."),
    figure: Path = typer.Option(Path("out/growth.png"), help="Where they are drawn."),
) -> None:
    if odd := [number for number in tokens if math.isqrt(number) ** 2 != number or number % 4]:
        raise typer.BadParameter(f"{odd[0]} tokens make no square picture of 2 x 2 cells; 256, 1024 or 4096 would do.")
    config = {"dtype": dtype, "device": device, "threads": torch.get_num_threads()}
    names = [name for name in works() if name[0].startswith(tuple(only))]
    wanted = [{"what": what, "by": by, "tokens": n, "config": config} for what, by in names for n in sorted(tokens)]
    rows: list[Row] = rows_of(output)
    rows = [row for row in rows if not (fresh and any(head.items() <= row.items() for head in wanted))]
    missing = [head for head in wanted if not any(head.items() <= row.items() for row in rows)]
    for head in track(sorted(missing, key=lambda head: head["tokens"]), description="growth"):
        work = works()[head["what"], head["by"]](tokens=head["tokens"], dtype=getattr(torch, dtype), device=device)
        rows.append(head | measure(work, repeats, limit, device))
        del work  # before the next one is built beside it
        add_exponents(rows)
        save(output, rows)
    shown = [row for head in wanted for row in rows if head.items() <= row.items()]
    table = Table("what", "by", "image tokens", "seconds", "peak MiB", "exponent of memory", caption="Seconds: medians.")
    for row in shown:
        power = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
        numbers = f"{row['tokens']:,}", f"{statistics.median(row['seconds']):.4g}", f"{row['peak_bytes'] / 2**20:,.2f}"
        table.add_row(row["what"], row["by"], *numbers, power)
    show(table)
    for row in shown:
        if row["by"] == OURS and row["tokens"] > FROM and (row["exponent"] or 0) > MOST:
            typer.echo(f"Grows faster than the tokens: {row['what']} at {row['tokens']}, exponent {row['exponent']:.2f}.")
    draw(shown, figure)
    typer.echo(f"Measurements: {output}; figure: {figure}")


if __name__ == "__main__":
    typer.run(main)
