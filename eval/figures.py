"""The figures of a report: quality against seconds, seconds against FLOPs, differences by prompt, selection maps.

`part` is always the rows of `dit_accel.eval.summary.summarize` of one pipeline, with a `number` and a `key` for each method.
"""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from dit_accel.eval.drawing import WIDTH, Drawing, canvas, finish, gid, legend, looks, points, wrapped

DOTS = 100  # prompts that are drawn one by one; of more, their distribution
FIGURES = ("uniformity", "coverage", "row_bias", "column_bias", "pictures")


def quality_latency(name: str, part: pd.DataFrame, margin: float, score: str) -> Drawing | None:
    """Score against measured seconds, with the front of the methods that none is both faster and better than.

    Vertical bars are the interval of the paired difference to full, drawn around the score: the unpaired one says how much prompts
    differ, not methods. Horizontal bars are the quartiles of the seconds.
    """
    known = part[part["score"].notna() & part["seconds"].notna()]
    if known.empty:
        return None
    table = known[["number", "method", "kind", "seconds", "seconds_low", "seconds_high", "score"]].copy()
    for column in ("difference", "low", "high"):
        table[column] = known[column].astype(float)
    table["bar_low"], table["bar_high"] = (table["score"] - table["difference"] + table[end] for end in ("low", "high"))
    table["pareto"] = known["pareto"]
    shades = looks(part)
    figure, axes = canvas(known, shades)
    full = known.loc[known["kind"] == "full", "score"]
    if len(full):
        axes.axhline(full.iloc[0], color="#555555", lw=1, zorder=1)
        axes.axhline(full.iloc[0] - margin, color="#555555", lw=1, ls=(0, (4, 3)), zorder=1, gid="margin")
        keep_in_view(axes, table, full.iloc[0] - margin)
    front = table[table["pareto"]].sort_values("seconds")
    axes.plot(front["seconds"], front["score"], drawstyle="steps-post", color="#c4c4c4", lw=3, zorder=1.5, gid="front")
    bars = (table["seconds_low"], table["seconds_high"]), (table["bar_low"], table["bar_high"])
    axes.set(
        xlabel="seconds of denoising a picture, measured", ylabel=wrapped(score, 30), title=wrapped(part["pipeline"].iloc[0], 44)
    )
    axes.set_xlim(0, 1.06 * np.nanmax(table[["seconds", "seconds_high"]]))
    points(figure, axes, known, shades, table["seconds"], table["score"], *bars)
    return finish(name, figure, table)


def latency_flops(name: str, part: pd.DataFrame) -> Drawing | None:
    """How many times less time against how many times less arithmetic: on the dashed line both are the same."""
    known = part[part["speedup"].notna() & part["flops_ratio"].notna()]
    if known.empty:
        return None
    table = known[["number", "method", "kind", "flops_ratio", "speedup", "speedup_low", "speedup_high", "comparable"]]
    shades = looks(part)
    figure, axes = canvas(known, shades)
    top = 1.06 * max(known["speedup_high"].max(), 1.1)
    right = 1.06 * max(known["flops_ratio"].max(), 1.1)
    axes.plot([0, min(top, right)], [0, min(top, right)], color="#555555", lw=1, ls=(0, (4, 3)), gid="diagonal")
    axes.set(xlim=(0.0, right), ylim=(0.0, top), title=wrapped(part["pipeline"].iloc[0], 44))
    axes.set(xlabel="FLOPs ratio: full / method, counted", ylabel="latency ratio:\nfull / method, measured")
    points(figure, axes, known, shades, known["flops_ratio"], known["speedup"], None, (known["speedup_low"], known["speedup_high"]))
    return finish(name, figure, table)


def differences(name: str, part: pd.DataFrame, table: pd.DataFrame, margin: float, score: str) -> Drawing | None:
    """Differences to full of every prompt, mean of its seeds, and their mean with its interval.

    Args:
        table: differences [prompts, methods]; NaN where a picture is missing.
    """
    known = part[part["method"].isin(table.columns[table.notna().any()])]
    if known.empty:
        return None
    height = 0.46 * len(known) + 1.0
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(ylim=(len(known) - 0.25, -0.75), title=wrapped(part["pipeline"].iloc[0], 44))
    axes.set_xlabel(wrapped(f"difference of {score} to full", 52))
    axes.grid(False, axis="y")
    axes.tick_params(left=False, labelleft=False)
    axes.axvline(0, color="#555555", lw=1)
    axes.axvline(-margin, color="#555555", lw=1, ls=(0, (4, 3)), gid="margin")
    shades = looks(part)
    for y, row in enumerate(known.itertuples()):
        values = table[row.method].dropna().to_numpy()
        strip(axes, values, y + 0.18, shades[row.key][0], row.key)
        if pd.notna(row.difference):
            axes.plot([row.low, row.high], [y + 0.18] * 2, color="black", lw=2, solid_capstyle="butt", gid=gid(row.key, "bar"))
            axes.plot(row.difference, y + 0.18, "D", color="black", ms=5, gid=gid(row.key, "point"))
        label = textwrap.shorten(f"#{row.number}  {row.method}", 58, placeholder=" …")
        place = axes.get_yaxis_transform()
        text = axes.text(0.005, y - 0.25, label, transform=place, va="center", fontsize=9, gid=gid(row.key, "label"))
        text.set(in_layout=False, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5})
    long = table[known["method"]].melt(ignore_index=False, var_name="method", value_name="difference").dropna().reset_index()
    return finish(name, figure, known[["number", "method"]].merge(long, on="method"))


def strip(axes: Axes, values: NDArray[np.float64], y: float, color: str, key: str) -> None:
    """Dots, moved apart at random but always alike; of many prompts, the outline of their distribution."""
    if len(values) <= DOTS:
        apart = np.random.default_rng(0).uniform(-0.15, 0.15, len(values))
        axes.plot(values, y + apart, "o", color=color, alpha=0.55, ms=4, mew=0, gid=gid(key, "dots"))
        return
    for body in axes.violinplot([values], [y], orientation="horizontal", widths=0.45, showextrema=False)["bodies"]:
        body.set(facecolor=color, edgecolor=color, alpha=0.5, gid=gid(key, "dots"))


def selection_maps(name: str, part: pd.DataFrame, maps: list[dict[str, Any]]) -> Drawing | None:
    """How often each place was computed between full steps: one map a method, all in the same colors.

    Args:
        maps: as a run records them: `method`, `share` [H, W], `uniformity`, `coverage`, `row_bias`, `column_bias`, `pictures`.
    """
    found = [(row, one) for row in part.itertuples() for one in maps if one["method"] == row.method]
    if not found:
        return None
    columns = 3
    lines = -(-len(found) // columns)
    height, width = found[0][1]["grid"]
    figure, keys = legend([row for row, _ in found], looks(part), marks=False)
    tall = lines * (0.5 + WIDTH / columns * height / width) + 1.0 + keys
    figure.set_size_inches(WIDTH, tall)
    grid = figure.subplots(lines, columns, squeeze=False)
    most = max(float(np.max(one["share"])) for _, one in found) or 1.0
    for axes in grid.flat[len(found) :]:
        axes.set_axis_off()
    for axes, (row, one) in zip(grid.flat, found, strict=False):
        image = axes.imshow(one["share"], vmin=0, vmax=most, cmap="viridis", interpolation="none")
        axes.set(xticks=[], yticks=[], gid=gid(row.key, "map"))
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_title(f"#{row.number}\nuniformity {one['uniformity']:.3f}{covered(one)}", fontsize=9, loc="center")
    figure.suptitle(wrapped(part["pipeline"].iloc[0], 44), x=0.02, ha="left", fontsize=10)
    bar = figure.colorbar(image, ax=grid, location="bottom", aspect=25, pad=0.1 / tall, format=PercentFormatter(1.0, decimals=0))
    bar.set_label("share of the selections that computed a place")
    rows = [
        {"number": row.number, "method": row.method, "row": i, "column": j, "share": value, **{k: one.get(k) for k in FIGURES}}
        for row, one in found
        for i, line in enumerate(one["share"])
        for j, value in enumerate(line)
    ]
    return finish(name, figure, pd.DataFrame(rows))


def covered(one: dict[str, Any]) -> str:
    """The coverage of a map, which runs of earlier versions have not recorded."""
    return f"\ncoverage {one['coverage']:.0%}" if "coverage" in one else ""


def keep_in_view(axes: Axes, table: pd.DataFrame, margin: float) -> None:
    """Vertical limits that show all points, and bars and the margin unless these would squeeze everything else."""
    low, high = table["score"].min(), table["score"].max()
    ends = table[["score", "bar_low", "bar_high"]].to_numpy()
    reach = max(high - low, 0.3 * float(np.nanmax(ends) - np.nanmin(ends)))
    low, high = max(low - reach, np.nanmin(ends)), min(high + reach, np.nanmax(ends))
    if low - margin < 1.5 * (high - low):
        low, high = min(low, margin), max(high, margin)
    space = 0.08 * ((high - low) or 1.0)
    axes.set_ylim(low - space, high + space)
