"""Evaluations whose results are pages: selectors.md and compression.md.

    python docs/comparison.py keep runs/selectors-module-flux    # of a finished run, what selectors.md needs, in docs/data
    python docs/comparison.py page                               # writes its tables and figures
    python docs/comparison.py compression runs/compression       # both for compression.md, of all finished pipelines

Needs the `eval` extra.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import typer
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import spearmanr

from dit_accel.eval.drawing import COLORS, moves_apart, style
from dit_accel.eval.fidelity import decibels
from dit_accel.eval.folder import RunFolder
from dit_accel.eval.report import methods, read_run
from dit_accel.eval.spec import FULL
from dit_accel.eval.statistics import compare, per_prompt
from dit_accel.eval.summary import RESAMPLES, broken, cost
from dit_accel.pipelines.pictures import side_by_side, write_atomically

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
HERE = Path(__file__).parent
DATA, FIGURES, PAGE = HERE / "data" / "selectors", HERE / "figures", HERE / "selectors.md"
SCOPES = {"cache": "module", "output": "model"}
INTERVALS, AGES, REFERENCE, NOTHING = (6, 3), (0.0, 0.25), "random", "nothing"
SHOWN = ("attention", "k-norm", "v-norm", "random", "similarity", "drift", "variance", NOTHING)  # in the pictures
ASPECTS = {  # the scores of compression.yaml, in its order, and their columns
    "emoji-reward": "score",
    "judge": "all right",
    "judge:object": "object",
    "judge:background": "background",
    "judge:both": "both objects",
    "judge:places": "places",
    "judge:detail": "small strokes, log-odds",
}
KEPT = ["method", "prompt", "seed", "squared_error"]  # of the rows, with the score
METHOD = re.compile(
    r"(?P<section>cache|output) interval=(?P<interval>\d+) "
    r"(?:cache_ratio=1|order=0|(?:cache_ratio=0\.9|order=0 compute_ratio=0\.1) "
    r"selector=(?P<selector>[\w-]+) age_weight=(?P<age>[\d.]+))"
)
Setting = tuple[int, str, float]  # interval, selector and age weight


def setting(method: str) -> Setting | None:
    """Which tokens a method of a run computes; nothing for full and fewer steps."""
    found = METHOD.fullmatch(method)
    return (int(found["interval"]), found["selector"] or NOTHING, float(found["age"] or 0)) if found else None


class Kept:
    """What is kept of a run: of one pipeline at one scope."""

    def __init__(self, path: Path) -> None:
        self.path, self.record = path, json.loads(path.read_text(encoding="utf-8"))
        self.pipeline, self.scope, self.score, self.margin = (
            self.record[name] for name in ("pipeline", "scope", "score", "margin")
        )
        self.methods: dict[str, dict[str, float]] = self.record["methods"]

    @property
    def title(self) -> str:
        return f"{self.pipeline}, {self.scope} scope"

    @cached_property
    def rows(self) -> pd.DataFrame:
        return pd.read_parquet(self.path.with_suffix(".parquet"))

    @cached_property
    def scores(self) -> pd.DataFrame:
        return per_prompt(self.rows, self.score)

    @cached_property
    def likeness(self) -> pd.DataFrame:
        """Of a prompt, in dB: the mean squared error of its pictures."""
        return per_prompt(self.rows[self.rows["squared_error"].notna()], "squared_error").map(decibels)

    def label(self, *wanted: Any) -> str:
        return next(method for method in self.methods if setting(method) == wanted)

    def against(self, table: pd.DataFrame, interval: int, ages: tuple[float, ...] = (0.0,)) -> pd.DataFrame:
        """Methods of an interval, paired over prompts with `random` at age weight 0, by selector and age weight."""
        keys = {method: found[1:] for method in table if (found := setting(method)) and found[0] == interval and found[2] in ages}
        compared = compare(table[list(keys)], self.label(interval, REFERENCE, 0.0), margin=self.margin)
        compared.index = pd.MultiIndex.from_tuples([keys[method] for method in compared.index])
        return compared


def finished(path: Path) -> tuple[dict[str, Any], pd.DataFrame, Path]:
    """Of a finished run: what others must share to be put together with it, its rows, and where it is kept."""
    folder = RunFolder(path)
    spec, rows = folder.begun["spec"], pd.read_parquet(path / "results.parquet")
    pipeline = spec["pipelines"][0]
    [scope] = {SCOPES[found["section"]] for name in set(rows["method"]) if (found := METHOD.fullmatch(name))}
    same = {"pipeline": pipeline, "scope": scope, "score": spec["scores"][0], "margin": spec["margin"]}
    same |= {key: folder.begun[key] for key in ("resolved", "versions")}
    return same, rows[rows["kind"] != "no-op"], DATA / f"{scope}-{pipeline}.json"


@app.command()
def keep(runs: list[Path]) -> None:
    """Keep what the page needs of finished runs: rows, and of the first of a pipeline and scope also seconds, maps and pictures.

    The rows of a run with other prompts are added to those that are kept; one with any of the same prompts replaces all.
    """
    for path in runs:
        same, rows, record = finished(path)
        made, table = rows[[*KEPT, same["score"]]], record.with_suffix(".parquet")
        if record.exists() and not set((before := Kept(record)).rows["prompt"]) & set(made["prompt"]):
            other = {key for key, value in same.items() if before.record[key] != value}
            if other or set(made["method"]) != set(before.methods):
                raise ValueError(f"{path} and {record} differ in {', '.join(sorted(other)) or 'their methods'}.")
            pd.concat([before.rows, made], ignore_index=True).to_parquet(table, index=False, compression="zstd")
            continue
        costs = cost(pd.read_parquet(path / "timing.parquet"))[["speedup", "flops_ratio"]]
        figures = {name: costs.loc[name].to_dict() for name in made["method"].unique()}
        for file in (path / "maps").glob("*.json"):
            one = json.loads(file.read_text(encoding="utf-8"))
            figures[one["method"]] |= {key: one[key] for key in ("uniformity", "coverage")}
        DATA.mkdir(exist_ok=True)
        made.to_parquet(table, index=False, compression="zstd")
        write_atomically(record, json.dumps(same | {"methods": figures}, indent=1).encode())
        write_atomically(FIGURES / f"selectors-{same['scope']}-{same['pipeline']}.webp", pictures(Kept(record), rows, path))


@app.command()
def seconds(runs: list[Path]) -> None:
    """Take the speedups from finished runs, of a few prompts on an idle machine, say, in place of those that are kept."""
    for path in runs:
        _, _, record = finished(path)
        before, costs = Kept(record), cost(pd.read_parquet(path / "timing.parquet"))
        for name, figures in before.methods.items():
            figures["speedup"] = float(costs.loc[name, "speedup"])
        write_atomically(record, json.dumps(before.record, indent=1).encode())


@app.command()
def page(
    path: Path = typer.Option(PAGE, help="The page."), figures: bool = typer.Option(True, help="Draw the figures, too.")
) -> None:
    """Renew the tables between the marks, and the figures, of all runs that are kept."""
    text = path.read_text(encoding="utf-8")
    kept = sorted((Kept(file) for file in DATA.glob("*.json")), key=lambda one: (one.scope == "model", one.pipeline))
    for one in kept:
        name = f"{one.scope} {one.pipeline}"
        for interval in INTERVALS:
            text = filled(text, f"{name} {interval}", table(one, interval))
        text = filled(text, f"{name} age", ages(one))
        if one.scope == "module":
            text = filled(text, f"{one.pipeline} steps", steps(one))
    text = filled(text, "explained", explained(kept))
    with style():
        for scope in SCOPES.values() if figures else ():
            if some := [one for one in kept if one.scope == scope]:
                forest(some).savefig(FIGURES / f"selectors-against-random-{scope}.png", dpi=130)
                scatter(some).savefig(FIGURES / f"selectors-coverage-{scope}.png", dpi=100)
    write_atomically(path, text.encode())


@app.command()
def compression(
    runs: list[Path] | None = typer.Argument(
        None, help="Of which to keep what the page needs: one, or several with other prompts, the first of which was timed."
    ),
    path: Path = typer.Option(HERE / "compression.md", help="The page."),
    add: bool = typer.Option(False, help="Add what was kept of earlier runs with other prompts, whose seconds go."),
) -> None:
    """Renew compression.md, from runs or from what was kept of them."""
    data = HERE / "data" / "compression"
    if runs:
        data.mkdir(exist_ok=True)
        read, *more = (read_run(RunFolder(run)) for run in runs)
        rows = pd.concat([one.rows for one in (read, *more)], ignore_index=True)
        whole = dict.fromkeys(rows["pipeline"], sum(len(one.spec["prompts"]) * one.spec["seeds"] for one in (read, *more)))
        for name in whole if add else ():
            made = rows[rows["pipeline"] == name]
            kept = pd.read_parquet(data / f"{name}.parquet")
            kept = kept[~kept["prompt"].isin(made["prompt"])]
            kinds = made.drop_duplicates("method").set_index("method")["kind"]
            rows = pd.concat([rows, kept.assign(pipeline=name, kind=kept["method"].map(kinds))], ignore_index=True)
            whole[name] += len(kept[["prompt", "seed"]].drop_duplicates())
        for name, table in methods(replace(read, rows=rows), RESAMPLES).groupby("pipeline", sort=False):
            made = rows[(rows["pipeline"] == name) & (rows["kind"] != "no-op")]
            if (made.groupby("method").size() == whole[name]).all() and table["seconds"].notna().all():
                made[[*KEPT, *ASPECTS]].to_parquet(data / f"{name}.parquet", index=False, compression="zstd")
                known = table[table["kind"] != "no-op"].drop(columns="key")
                write_atomically(data / f"{name}.csv", known.to_csv(index=False).encode())
            else:
                typer.echo(f"{name} lacks pictures or seconds and stays as it was on the page.")
    text = path.read_text(encoding="utf-8")
    for file in sorted(data.glob("*.csv")):
        text = filled(text, file.stem, broken_by(pd.read_csv(file)), path.name)
    write_atomically(path, text.encode())


def broken_by(table: pd.DataFrame) -> list[str]:
    """What every method loses, the fastest last, with the first thing that breaks."""
    rows = []
    for row in table[table["method"] != FULL].sort_values("speedup").to_dict("records"):
        cells = [str(row["method"]), f"{row['speedup']:.2f}", f"{row['psnr']:.1f}"]
        for i in range(len(ASPECTS)):
            part = {name: row[f"{i}: {name}" if i else name] for name in ("difference", "low", "high")}
            text = interval_text(part, "+.2f")
            cells.append(f"**{text}**" if part["high"] < 0 else text)
        lost = broken(row, list(ASPECTS))
        parts = [ASPECTS[score] for score in lost if ":" in score]  # of the picture
        rows.append([*cells, parts[0] if parts else "nothing but the score" if lost else "nothing"])
    return rows_of(["method", "measured", "PSNR, dB", *ASPECTS.values(), "first to break"], rows)


def filled(text: str, name: str, lines: list[str], page: str = PAGE.name) -> str:
    """The page with what stands between the marks of this name replaced."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if first not in text or last not in text:
        raise ValueError(f"{page} lacks the marks {first} and {last}.")
    before, rest = text.split(first)
    return f"{before}{first}\n" + "\n".join(lines) + f"\n{last}{rest.split(last)[1]}"


def interval_text(row: Any, form: str) -> str:
    return f"{row['difference']:{form}} [{row['low']:{form}}, {row['high']:{form}}]".replace("-", "−")


def bold(row: Any, form: str) -> str:
    """A difference with its interval, bold where Holm's p is at most 0.05."""
    text = interval_text(row, form)
    return f"**{text}**" if row["p_holm"] <= 0.05 else text


def rows_of(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def table(kept: Kept, interval: int) -> list[str]:
    """All selectors at age weight 0, the closest to the full picture first."""
    scores, likeness = kept.against(kept.scores, interval), kept.against(kept.likeness, interval)
    rows = []
    names = [method for method in kept.methods if (setting(method) or (0,))[::2] == (interval, 0.0)]
    for name in sorted(names, key=lambda method: -kept.likeness[method].mean()):
        selector, figures = setting(name)[1], kept.methods[name]
        paired = ["", ""]
        if selector != REFERENCE:
            paired = [bold(likeness.loc[(selector, 0.0)], "+.2f"), bold(scores.loc[(selector, 0.0)], "+.3f")]
        lost = compare(kept.scores[[FULL, name]], FULL, margin=kept.margin).iloc[0]
        rows.append(
            [selector if selector == NOTHING else f"`{selector}`", f"{kept.likeness[name].mean():.2f}", paired[0]]
            + [interval_text(lost, "+.3f"), paired[1]]
            + [f"{figures[key]:.3f}" if key in figures else "" for key in ("uniformity", "coverage")]
            + [f"{figures['speedup']:.2f}", f"{figures['flops_ratio']:.2f}"]
        )
    columns = ["computed", "PSNR, dB", "against `random`, dB", f"{kept.score} against full", "against `random`"]
    return rows_of([*columns, "uniformity", "coverage", "speedup", "by FLOPs"], rows)


def ages(kept: Kept) -> list[str]:
    """What an age weight of 0.25 changes, selector by selector."""
    rows = []
    for interval in sorted(INTERVALS):
        for selector in SHOWN[:-1]:
            pair = [kept.label(interval, selector, age) for age in AGES]
            changes = [compare(values[pair], pair[0], margin=kept.margin).iloc[0] for values in (kept.likeness, kept.scores)]
            coverage = [f"{kept.methods[one]['coverage']:.3f}" for one in pair]
            rows.append([str(interval), f"`{selector}`", *map(interval_text, changes, ("+.2f", "+.3f")), *coverage])
    columns = ["interval", "selector", "PSNR, 0.25 against 0, dB", f"{kept.score}, 0.25 against 0", "coverage at 0", "at 0.25"]
    return rows_of(columns, rows)


def steps(kept: Kept) -> list[str]:
    """Uncached runs with fewer steps."""
    rows = []
    for name in sorted((name for name in kept.methods if name.endswith(" steps")), key=lambda name: kept.methods[name]["speedup"]):
        lost, figures = compare(kept.scores[[FULL, name]], FULL, margin=kept.margin).iloc[0], kept.methods[name]
        rows.append([name.removesuffix(" steps"), f"{kept.likeness[name].mean():.2f}", interval_text(lost, "+.3f")])
        rows[-1] += [f"{figures['speedup']:.2f}", f"{figures['flops_ratio']:.2f}"]
    return rows_of(["steps", "PSNR, dB", f"{kept.score} against full", "speedup", "by FLOPs"], rows)


def explained(kept: list[Kept]) -> list[str]:
    """Rank correlations of uniformity and coverage with what came out, over all selectors, without and with age."""
    rows = []
    for one in kept:
        for interval in sorted(INTERVALS):
            names = [m for m in one.methods if (found := setting(m)) and found[0] == interval and found[1] != NOTHING]
            ranks = []
            for figure in ("uniformity", "coverage"):
                x = [one.methods[name][figure] for name in names]
                ranks += [f"{spearmanr(x, values[names].mean()).statistic:+.2f}" for values in (one.likeness, one.scores)]
            rows.append([one.pipeline, one.scope, str(interval), *(rank.replace("-", "−") for rank in ranks)])
    columns = ["pipeline", "scope", "interval", "uniformity and PSNR", "and score", "coverage and PSNR", "and score"]
    return rows_of(columns, rows)


def pictures(kept: Kept, rows: pd.DataFrame, path: Path) -> bytes:
    """The prompts at which `random` loses most, is in the middle, and loses least, with every selector."""
    loss = (kept.scores[kept.label(INTERVALS[0], REFERENCE, 0.0)] - kept.scores[FULL]).sort_values(kind="stable")
    chosen = [loss.index[i] for i in (0, len(loss) // 2, len(loss) - 1)]
    made = rows[rows["seed"] == 0].set_index(["method", "prompt"])
    panels = []
    for prompt in chosen:
        for name in (FULL, *SHOWN):
            row = made.loc[(FULL if name == FULL else kept.label(INTERVALS[0], name, 0.0), prompt)]
            likeness = [prompt] if name == FULL else [f"PSNR {decibels(row['squared_error']):.1f} dB, {row[kept.score]:+.2f}"]
            with Image.open(path / row["picture"]) as image:
                panels.append((image.convert("RGB"), ["in full" if name == FULL else name, *likeness]))
    heading = f"{kept.title}, interval {INTERVALS[0]}, R = 0.9, seed 0: where random loses most, is in the middle, loses least"
    buffer = io.BytesIO()
    side_by_side(heading, panels, columns=len(SHOWN) + 1).save(buffer, "WEBP", quality=90)
    return buffer.getvalue()


def forest(kept: list[Kept]) -> Figure:
    """Differences to `random` of every selector, one panel for pipeline and measure."""
    figure = Figure(figsize=(9, 3.4 * len(kept)), layout="constrained")
    axes = figure.subplots(len(kept), 2, squeeze=False, sharey="row")
    for line, one in zip(axes, kept, strict=True):
        for axis, values, what in zip(line, (one.likeness, one.scores), ("PSNR, dB", one.score), strict=True):
            compared = {interval: one.against(values, interval) for interval in INTERVALS}
            names = [name for name in SHOWN if name != REFERENCE]
            axis.axvline(0, color="#555555", lw=1)
            for i, (interval, rows) in enumerate(compared.items()):
                for y, name in enumerate(names):
                    row, place = rows.loc[(name, 0.0)], y + 0.22 * (i - 0.5)
                    axis.plot([row["low"], row["high"]], [place] * 2, color=COLORS[i], lw=2)
                    solid = COLORS[i] if row["p_holm"] <= 0.05 else "white"
                    axis.plot(row["difference"], place, "o", color=COLORS[i], mfc=solid, ms=6)
                axis.plot([], [], "o-", color=COLORS[i], label=f"interval {interval}")
            axis.set(title=one.title, xlabel=f"{what}: difference to random", yticks=range(len(names)))
            axis.set(ylim=(len(names) - 0.5, -0.5), yticklabels=names)
    axes[0][0].legend(loc="best")
    return figure


def scatter(kept: list[Kept]) -> Figure:
    """Differences to `random` against uniformity and coverage; a line joins a selector without and with age."""
    figure = Figure(figsize=(16, 3.6 * len(kept)), layout="constrained")
    for line, one in zip(figure.subplots(len(kept), 4, squeeze=False), kept, strict=True):
        measures = ((one.likeness, "PSNR, dB"), (one.scores, one.score))
        panels = [(*measure, figured) for measure in measures for figured in ("uniformity", "coverage")]
        for axis, (values, what, figured) in zip(line, panels, strict=True):
            compared = one.against(values, INTERVALS[0], AGES)
            places, bars = [], []
            for name in SHOWN[:-1]:
                x = [one.methods[one.label(INTERVALS[0], name, age)][figured] for age in AGES]
                rows = [compared.loc[(name, age)] if (name, age) in compared.index else None for age in AGES]
                y = [0.0 if row is None else row["difference"] for row in rows]
                axis.plot(x, y, color="#999999", lw=1)
                for place, height, row, color, marker in zip(x, y, rows, COLORS, "os", strict=False):
                    places.append((place, height))
                    if row is not None:
                        bars.append([(place, row["low"]), (place, row["high"])])
                        axis.plot([place] * 2, [row["low"], row["high"]], color=color, alpha=0.4)
                    axis.plot(place, height, marker, color=color)
            for age, color, marker in zip(AGES, COLORS, "os", strict=False):
                axis.plot([], [], marker, color=color, label=f"age weight {age:g}")
            axis.set(title=one.title, xlabel=f"{figured}, interval {INTERVALS[0]}", ylabel=f"{what}: difference to random")
            axis.margins(x=0.15, y=0.1)
            named(figure, axis, places, bars)
        line[0].legend(loc="best", fontsize=8)
    return figure


def named(figure: Figure, axis: Any, places: list[tuple[float, float]], bars: list[list[tuple[float, float]]]) -> None:
    """Every selector's name beside its mark at age weight 0, where it covers no mark."""
    order = [*range(0, len(places), 2), *range(1, len(places), 2)]  # those with a name first
    texts = [*SHOWN[:-1], *[""] * (len(places) // 2)]
    moves = moves_apart(figure, axis, np.array(places)[order], texts, [np.array(bar) for bar in bars])
    for text, i, move in zip(SHOWN[:-1], order, moves, strict=False):
        axis.annotate(text, places[i], move, textcoords="offset points", ha="center", va="center", fontsize=8).set(in_layout=False)


if __name__ == "__main__":
    app()
