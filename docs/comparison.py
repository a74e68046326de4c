"""Writes the tables and figures of selectors.md from finished runs of the selector comparison, and their rows:

    python docs/comparison.py runs/selectors-flux runs/selectors-pixart runs/partial-flux

Needs the `eval` extra.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from dit_accel.eval.drawing import COLORS, style
from dit_accel.eval.fidelity import decibels
from dit_accel.eval.folder import RunFolder
from dit_accel.eval.spec import FULL
from dit_accel.eval.statistics import compare, per_prompt
from dit_accel.eval.summary import summarize
from dit_accel.pipelines.pictures import side_by_side, write_atomically

HERE = Path(__file__).parent
INTERVALS, REFERENCE = (5, 3, 10), "random"
SHOWN = ("attention", "k-norm", "v-norm", "random", "similarity", "stratified", "none")  # in the pictures
KEPT = ["method", "kind", "prompt", "seed", "squared_error", "ssim"]  # of the rows, with the score


def label(interval: int, selector: str, age: float = 0) -> str:
    """The method of a run that computes these tokens."""
    if selector == "none":
        return f"cache interval={interval} cache_ratio=1"
    return f"cache interval={interval} cache_ratio=0.9 selector={selector} age_weight={age:g}"


def setting(method: str) -> tuple[int, str, float] | None:
    """Interval, selector and age weight of a method; nothing for a baseline."""
    found = re.fullmatch(r"cache interval=(\d+) cache_ratio=(?:1|0\.9 selector=([\w-]+) age_weight=([\d.]+))", method)
    return (int(found[1]), found[2] or "none", float(found[3] or 0)) if found else None


class Family:
    """One finished run: its summary, and its pictures compared with those of `random`."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.spec = self.folder.begun["spec"]
        self.name, self.score = self.spec["pipelines"][0], self.spec["scores"][0]
        self.rows, times = (pd.read_parquet(path / f"{kind}.parquet") for kind in ("results", "timing"))
        self.summary = summarize(self.rows, times, score=self.score, margin=self.spec["margin"]).set_index("method")
        maps = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((path / "maps").glob("*.json"))]
        self.maps = {one["method"]: one for one in maps}
        self.scores = per_prompt(self.rows, self.score)
        errors = per_prompt(self.rows[self.rows["kind"] == "method"], "squared_error")
        self.likeness = -10 * np.log10(errors)  # of a prompt, in dB: the mean squared error of its pictures

    def against(self, table: pd.DataFrame, interval: int) -> pd.DataFrame:
        """Methods of an interval, at age weight 0, against `random`, paired over prompts; by selector."""
        methods = {method: found[1] for method in table if (found := setting(method)) and found[::2] == (interval, 0)}
        compared = compare(table[list(methods)], label(interval, REFERENCE), margin=self.spec["margin"])
        return compared.rename(index=methods)


def main(paths: list[str]) -> None:
    runs = [Family(Path(path)) for path in paths]
    families = [run for run in runs if label(INTERVALS[0], REFERENCE) in run.scores]
    page = HERE / "selectors.md"
    text = page.read_text(encoding="utf-8")
    for family in families:
        columns = [*KEPT, family.score]
        family.rows[columns].to_parquet(HERE / "data" / f"selectors-{family.name}.parquet", index=False, compression="zstd")
        for interval in INTERVALS:
            text = filled(text, f"{family.name} {interval}", table(family, interval))
        text = filled(text, f"{family.name} age", ages(family))
        text = filled(text, f"{family.name} steps", steps(family))
        write_atomically(HERE / "figures" / f"selectors-{family.name}.webp", pictures(family))
    for run in runs:
        if run not in families:
            text = filled(text, "partial", methods(run))
    with style():
        for name, figure in {"against-random": forest(families), "uniformity": scatter(families)}.items():
            figure.savefig(HERE / "figures" / f"selectors-{name}.png", dpi=150)
    write_atomically(page, text.encode())


def filled(text: str, name: str, lines: list[str]) -> str:
    """The page with what stands between the marks of this name replaced."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if first not in text or last not in text:
        raise ValueError(f"selectors.md lacks the marks {first} and {last}.")
    before, rest = text.split(first)
    return f"{before}{first}\n" + "\n".join(lines) + f"\n{last}{rest.split(last)[1]}"


def interval_text(row: Any, form: str) -> str:
    return f"{row['difference']:{form}} [{row['low']:{form}}, {row['high']:{form}}]".replace("-", "−")


def bold(row: Any, form: str) -> str:
    """A difference with its interval, bold where Holm's p is at most 0.05."""
    text = interval_text(row, form)
    return f"**{text}**" if row["p_holm"] <= 0.05 else text


def table(family: Family, interval: int) -> list[str]:
    """All selectors at age weight 0, best score first."""
    scores, likeness = (family.against(found, interval) for found in (family.scores, family.likeness))
    names = [REFERENCE, *scores.index]
    summary = family.summary.loc[[label(interval, name) for name in names]].assign(selector=names)
    lines = [
        f"| computed | {family.score} | against full | against `random` | PSNR, dB | PSNR against `random`, dB "
        "| uniformity | speed-up | FLOPs ratio |",
        "| --- |" + " --- |" * 8,
    ]
    for method, row in summary.sort_values("score", ascending=False).iterrows():
        name = row["selector"]
        own = ["", ""] if name == REFERENCE else [bold(scores.loc[name], "+.3f"), bold(likeness.loc[name], "+.2f")]
        uniform = f"{family.maps[method]['uniformity']:.3f}" if method in family.maps else ""
        shown = "nothing" if name == "none" else f"`{name}`"
        lines.append(
            f"| {shown} | {row['score']:.3f} | {interval_text(row, '+.3f')} | {own[0]} | {row['psnr']:.2f} | {own[1]} | {uniform} "
            f"| {row['speedup']:.2f} | {row['flops_ratio']:.2f} |".replace("| -", "| −")
        )
    return lines


def ages(family: Family) -> list[str]:
    """What an age weight of 0.25 changes, selector by selector."""
    lines = [
        f"| selector | {family.score}, 0.25 against 0 | PSNR, 0.25 against 0, dB | uniformity at 0 | at 0.25 |",
        "| --- |" + " --- |" * 4,
    ]
    for method in family.scores:
        if not (found := setting(method)) or found[2] != 0.25:
            continue
        pair = [label(found[0], found[1], age) for age in (0, 0.25)]
        changes = [
            compare(values[pair], pair[0], margin=family.spec["margin"]).iloc[0] for values in (family.scores, family.likeness)
        ]
        uniform = [f"{family.maps[one]['uniformity']:.3f}" for one in pair]
        lines.append(
            f"| `{found[1]}` | {interval_text(changes[0], '+.3f')} | {interval_text(changes[1], '+.2f')} | {' | '.join(uniform)} |"
        )
    return lines


def methods(run: Family) -> list[str]:
    """All methods of a run, as they come."""
    lines = [f"| method | {run.score} | against full | PSNR, dB |", "| --- | --- | --- | --- |"]
    for method, row in run.summary[run.summary["kind"] == "method"].iterrows():
        lines.append(f"| {method} | {row['score']:.3f} | {interval_text(row, '+.3f')} | {row['psnr']:.2f} |")
    return lines


def steps(family: Family) -> list[str]:
    """The runs in full, also with fewer steps."""
    plain = family.summary[family.summary["kind"].isin(["full", "fewer steps"])].sort_values("flops", ascending=False)
    lines = [f"| steps | {family.score} | against full | PSNR, dB | speed-up | FLOPs ratio |", "| --- |" + " --- |" * 5]
    for method, row in plain.iterrows():
        difference, psnr = ("", "") if method == FULL else (interval_text(row, "+.3f"), f"{row['psnr']:.2f}")
        count = "all" if method == FULL else str(method).removesuffix(" steps")
        score = f"{row['score']:.3f}".replace("-", "−")
        lines.append(f"| {count} | {score} | {difference} | {psnr} | {row['speedup']:.2f} | {row['flops_ratio']:.2f} |")
    return lines


def pictures(family: Family) -> bytes:
    """The prompts at which `random` at interval 5 loses most, is in the middle, and loses least, with every selector."""
    reference = label(INTERVALS[0], REFERENCE)
    loss = (family.scores[reference] - family.scores[FULL]).sort_values(kind="stable")
    chosen = [loss.index[i] for i in (0, len(loss) // 2, len(loss) - 1)]
    made = family.rows[family.rows["seed"] == 0].set_index(["method", "prompt"])
    panels = []
    for prompt in chosen:
        for name in ("full", *SHOWN):
            row = made.loc[(FULL if name == "full" else label(INTERVALS[0], name), prompt)]
            likeness = [prompt] if name == "full" else [f"PSNR {decibels(row['squared_error']):.1f} dB, {row[family.score]:+.2f}"]
            with Image.open(family.folder.path / row["picture"]) as image:
                panels.append((image.convert("RGB"), [{"full": "in full", "none": "nothing"}.get(name, name), *likeness]))
    heading = f"{family.name}, interval 5, R = 0.9, age weight 0, seed 0: where random loses most, is in the middle, loses least"
    buffer = io.BytesIO()
    side_by_side(heading, panels, columns=len(SHOWN) + 1).save(buffer, "WEBP", quality=90)
    return buffer.getvalue()


def forest(families: list[Family]) -> Figure:
    """Differences to `random` of every selector, one panel for family and measure."""
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    axes = figure.subplots(len(families), 2, squeeze=False, sharey=True)
    for line, family in zip(axes, families, strict=True):
        for axis, values, what in zip(line, (family.scores, family.likeness), (family.score, "PSNR, dB"), strict=True):
            compared = {interval: family.against(values, interval) for interval in sorted(INTERVALS)}
            names = [name for name in compared[5].index if name != "none"] + ["none"]
            axis.axvline(0, color="#555555", lw=1)
            for i, (interval, rows) in enumerate(compared.items()):
                for y, name in enumerate(names):
                    if name in rows.index:
                        row, place = rows.loc[name], y + 0.22 * (i - 1)
                        solid = row["p_holm"] <= 0.05
                        axis.plot([row["low"], row["high"]], [place] * 2, color=COLORS[i], lw=2)
                        axis.plot(row["difference"], place, "o", color=COLORS[i], mfc=COLORS[i] if solid else "white", ms=6)
                axis.plot([], [], "o-", color=COLORS[i], label=f"interval {interval}")
            axis.set(
                title=family.name, xlabel=f"{what}: difference to random", yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5)
            )
            axis.set_yticklabels(["nothing" if name == "none" else name for name in names])
    axes[0][0].legend(loc="best")
    return figure


def scatter(families: list[Family]) -> Figure:
    """Difference to `random` at age weight 0 against uniformity at interval 5; a line joins a selector without and with age."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, family in zip(figure.subplots(1, len(families), squeeze=False)[0], families, strict=True):
        methods = [method for method in family.maps if (setting(method) or (0,))[0] == 5]
        reference = label(5, REFERENCE)
        compared = compare(family.scores[methods], reference, margin=family.spec["margin"])
        for name in dict.fromkeys(setting(method)[1] for method in methods):
            pair = [label(5, name, age) for age in (0, 0.25)]
            x = [family.maps[method]["uniformity"] for method in pair]
            rows = [
                compared.loc[method] if method in compared.index else dict.fromkeys(("difference", "low", "high"), 0)
                for method in pair
            ]
            y = [row["difference"] for row in rows]
            axis.plot(x, y, color="#999999", lw=1)
            for place, row, color, marker in zip(x, rows, COLORS, "os", strict=False):
                axis.plot([place] * 2, [row["low"], row["high"]], color=color, alpha=0.4)
                axis.plot(place, row["difference"], marker, color=color)
            axis.annotate(name, (x[0], y[0]), (5, 4), textcoords="offset points", fontsize=8)
        for age, color, marker in zip((0, 0.25), COLORS, "os", strict=False):
            axis.plot([], [], marker, color=color, label=f"age weight {age:g}")
        axis.set(title=family.name, xlabel="uniformity of a selection over the picture")
        axis.set_ylabel(f"{family.score}: difference to random, age weight 0")
        axis.margins(x=0.15)
        axis.legend(loc="best")
    return figure


if __name__ == "__main__":
    main(sys.argv[1:])
