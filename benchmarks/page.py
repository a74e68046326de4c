"""Writes the page of all benchmarks from their records; every number in it comes from there.

    python benchmarks/page.py out/bench --docs out/bench/page
    python benchmarks/page.py docs/data/benchmarks      # docs/benchmarks.md anew from the records that lie beside it

The words are those of page.md.j2. Beside the page go its figures, and under data/ the records it was made from.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import recording
import typer
from growth import draw
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from peers import WITHOUT
from quality import PIPELINES, REACHED, SCORE, TARGETS, Cell, by_all, recipe_cell
from width import flux_dev, summary

from dit_accel.eval.drawing import COLORS, MARKERS, style
from dit_accel.eval.fidelity import decibels
from dit_accel.eval.statistics import MANY, compare, mean_interval, per_prompt
from dit_accel.eval.statistics import paired as paired_values
from dit_accel.eval.summary import summarize
from dit_accel.pipelines.pictures import write_atomically
from dit_accel.pipelines.tuning.search import BEST
from dit_accel.recipe import SHIPPED

HERE = Path(__file__).parent
RECORDS = ("startup", "overhead", "growth", "width", "memory", "quantized", "quantized-width")
NEAR = 0.12  # share by which speeds may differ that are compared in a row
MARGIN = 0.1  # of non-inferiority, declared beforehand; as in docs/selectors.md
BLOCKS = {"flux": "{} double and {} single blocks of FLUX.1-dev", "pixart": "{} blocks of PixArt-XL"}
MAKERS = {"stock": "fewer steps", "dit-accel": "dit-accel", "diffusers": "diffusers", "cache-dit": "cache-dit"}


class Quality:
    """What came out on one embedded pipeline."""

    def __init__(self, records: Path, name: str) -> None:
        self.name = name
        self.search, self.seconds = (json.loads(path.read_text()) for path in self.files(records, name).values())
        rows, timed = rows_of(records, name), {row["method"] for row in self.seconds["rows"]}
        self.rows = rows[rows["method"].isin(timed)]  # of what only a former search chose, pictures may be left, and no times
        self.owners = {row["method"]: row["by"] for row in self.search["rows"]}
        reached = {row["method"] for row in self.search["rows"] if statistics.median(row["speedups"]) >= REACHED * TARGETS[0]}
        self.none = [method for method in self.owners if method not in reached]
        self.without = WITHOUT["flux" if "flux" in name else "pixart"]
        names = {
            Cell(row["method"], row["setting"]).label: f"{row['method']}, {short(row['setting'])}" for row in self.search["rows"]
        }
        self.times = pd.DataFrame(self.seconds["rows"]).assign(error=None, comparable=True, cache_bytes=None)
        every, some = by_all(self.rows), by_all(leaders(self.rows))
        more = len(some) / some["method"].nunique() > len(every) / every["method"].nunique()
        some = some if more else every
        self.table = self.summary(every, names)
        self.leaders = self.summary(some, names) if more else self.table
        self.values = {"score": per_prompt(some, SCORE), "psnr": -per_prompt(some, "squared_error")}
        self.values["decibels"] = per_prompt(some.assign(psnr=some["psnr"].clip(upper=BEST)), "psnr")
        self.bests = {value: self.compared(self.best(value, self.leaders), value) for value in self.values}
        self.makers = self.best("score", self.table)
        self.pictures, self.more = pictures(every), pictures(some) if more else ""
        self.intervals = [interval(rows) for rows in (every, some)]

    def summary(self, rows: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
        """One row a method, by speed."""
        table = summarize(rows, self.times, score=SCORE, margin=MARGIN).set_index("method")
        near = rows.assign(psnr=rows["psnr"].clip(upper=BEST))
        for value, of in (("ssim", "ssim"), ("decibels", "psnr")):
            for method, values in per_prompt(near, of).items():
                found = mean_interval(values)
                table.loc[method, [value, f"{value}_low", f"{value}_high"]] = [found.mean, found.low, found.high]
        table["by"] = [self.owners.get(self.name_of(method), "stock") for method in table.index]
        table["label"] = [names.get(method, method) for method in table.index]
        return table.sort_values("speedup")

    @staticmethod
    def files(records: Path, name: str) -> dict[str, Path]:
        """The records, by the names under which they are kept."""
        return {f"quality-{name}-{kind}.json": first(records, name, kind) for kind in ("search", "seconds")}

    def name_of(self, method: str) -> str:
        """A method without its setting."""
        return max((name for name in self.owners if method.startswith(name + " ")), key=len, default=method)

    def best(self, value: str, table: pd.DataFrame) -> list[dict[str, Any]]:
        """For every target, the best method of each maker among those of a table that reach it on the prompts compared.

        Args:
            value: one of `values`: what the best is best at.
        """
        found = []
        for target in TARGETS:
            row: dict[str, Any] = {"target": target}
            for maker in MAKERS:
                own = table[(table["by"] == maker) & (table["kind"] != "full")]
                own = own[own["speedup"] >= REACHED * target]
                row[maker] = own.sort_values(value).iloc[-1] if len(own) else None
            found.append(row)
        return found

    def compared(self, best: list[dict[str, Any]], value: str) -> list[dict[str, Any]]:
        """These rows, with ours and the best of all others compared in that value, paired over the leaders' pictures."""
        for row in best:
            ours = row["dit-accel"]
            others = [row[maker] for maker in MAKERS if maker != "dit-accel" and row[maker] is not None]
            if ours is not None and others:
                rival = max(others, key=lambda other: other[value])
                pair = self.values[value][[ours.name, rival.name]]
                row |= {"ours": ours, "rival": rival, "against": compare(pair, rival.name, margin=MARGIN).iloc[0]}
        return best

    def figure(self) -> Figure:
        """Score and PSNR against the measured speed-up, a line for every method, the front drawn through."""
        names = list(dict.fromkeys(self.name_of(method) for method in self.table.index if method != "full"))
        names.sort(key=lambda name: list(MAKERS).index(self.owners[name]))
        lines = {"stock": ("-", 2.2), "dit-accel": ("-", 1.6), "diffusers": ("--", 1.1), "cache-dit": (":", 1.3)}
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        for panel, value in zip(figure.subplots(1, 2), ("score", "decibels"), strict=True):
            for number, name in enumerate(names):
                own = self.table[[self.name_of(method) == name for method in self.table.index]].sort_values("speedup")
                color, (line, width) = COLORS[number % len(COLORS)], lines[self.owners[name]]
                look = {"color": "black" if self.owners[name] == "stock" else color, "ls": line, "lw": width}
                look |= {"marker": MARKERS[number % len(MARKERS)], "ms": 5, "label": f"{name}, {self.owners[name]}"}
                panel.plot(own["speedup"], own[value], **look)
                if value == "decibels":
                    ends = own["decibels_low"], own["decibels_high"]
                else:
                    ends = (own["score"] - own["difference"] + own[end].astype(float) for end in ("low", "high"))
                panel.vlines(own["speedup"], *ends, color=look["color"], lw=0.8, alpha=0.5)
            front = self.table[self.table["pareto"]]
            if value == "score":
                panel.plot(front["speedup"], front["score"], color="#c4c4c4", lw=5, zorder=0, label="front")
                panel.axhline(self.table.loc["full", "score"], color="#555555", lw=1)
            panel.set(xlabel="speed-up of denoising, measured", title=self.name)
            panel.set_ylabel(SCORE if value == "score" else "PSNR to the picture in full, dB")
            low, high = self.table[value].quantile(0.1), self.table.loc[self.table["kind"] != "full", value].max()
            panel.set_ylim(low - 0.15 * (high - low), high + 0.12 * (high - low))
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8, handlelength=3)
        return figure


def leaders(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of those methods that made more pictures than others; of all, if none did."""
    counts = rows.groupby("method").size()
    more = counts[counts > counts.min()].index
    return rows[rows["method"].isin(more)] if len(more) else rows


def pictures(rows: pd.DataFrame) -> str:
    """How many there are of every method."""
    prompts, seeds = rows["prompt"].nunique(), rows["seed"].nunique()
    return f"{prompts} prompts, {seeds} seed{'s' if seeds > 1 else ''} each"


def interval(rows: pd.DataFrame) -> str:
    """Which one `mean_interval` takes for so many prompts."""
    return "BCa" if rows["prompt"].nunique() >= MANY else "the wider of Student's t and the bootstrap-t"


def first(records: Path, name: str, kind: str) -> Path:
    """A record of one pipeline's quality, as it was measured or as it is kept."""
    measured = records / "quality" / name / f"{kind}.json"
    return measured if measured.exists() else records / f"quality-{name}-{kind}.json"


def rows_of(records: Path, name: str) -> pd.DataFrame:
    """All pictures of one pipeline."""
    kept = records / f"quality-{name}.parquet"
    if kept.exists():
        return pd.read_parquet(kept)
    rows = pd.concat([pd.read_parquet(path) for path in sorted((records / "quality" / name / "pictures").glob("*.parquet"))])
    order = rows["method"].map({method: i for i, method in enumerate(rows["method"].unique())})
    return rows.assign(order=order).sort_values(["order", "seed"], kind="stable").drop(columns="order").reset_index(drop=True)


def short(setting: dict[str, Any]) -> str:
    """A setting in a table; what is only switched on by its name alone."""
    return ", ".join(key.replace("_", " ") + ("" if value is True else f" {value}") for key, value in setting.items())


def paired(row: Any, form: str = "+.3f") -> str:
    """A difference with its interval, bold where Holm's p is at most 0.05."""
    text = f"{row['difference']:{form}} [{row['low']:{form}}, {row['high']:{form}}]".replace("-", "−")
    return f"**{text}**" if row["p_holm"] <= 0.05 else text


def verdict(against: Any, value: str) -> str:
    """What the interval of a paired difference, ours less theirs, says: at 95 %, of `value` "score" or a likeness."""
    worse, better = ("worse", "better") if value == "score" else ("farther", "closer")
    return worse if against["high"] < 0 else better if against["low"] > 0 else "not told apart"


def verdicts(best: list[dict[str, Any]], value: str) -> str:
    """How often each verdict fell: "farther at 3, not told apart at 1 of 4 speeds"."""
    counts = Counter(verdict(row["against"], value) for row in best if "against" in row)
    return ", ".join(f"{name} at {count}" for name, count in counts.most_common()) + f" of {counts.total()} speeds"


def overhead_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Before beside now, a row for each kind of step; `share` is its part of a stock step of the same process."""
    stock = {(row["pipeline"], row["checkout"]): row["seconds"] for row in rows if row["kind"] == "stock"}
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        own = found.setdefault((row["pipeline"], row["kind"], row["step"]), {key: row[key] for key in ("pipeline", "kind", "step")})
        own[row["checkout"]] = {
            "ms": 1e3 * statistics.median(row["seconds"]),
            "share": statistics.median(a / b for a, b in zip(row["seconds"], stock[row["pipeline"], row["checkout"]], strict=True)),
            "matrix": 1e3 * statistics.median(row["matrix_seconds"]) if row["matrix_seconds"] else None,
            "operators": round(statistics.median(row["operators"])) if row["operators"] else None,
        }
    return list(found.values())


def growth_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a quantity, with its seconds, bytes and exponents by tokens."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        own = found.setdefault((row["what"], row["by"]), {"what": row["what"], "by": row["by"], "at": {}})
        own["at"][row["tokens"]] = row | {"median": statistics.median(row["seconds"])}
    return list(found.values())


def width_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The summary, by size, fastest last, with what is `held` beyond what a run in full holds anyway."""
    found = summary(rows)
    plain = {(row["model"], row["pixels"]): row["held_bytes"] for row in found if row["method"] == "full"}
    found = [row | {"held": max(0, row["held_bytes"] - plain[row["model"], row["pixels"]])} for row in found]
    return sorted(found, key=lambda row: (row["model"], row["pixels"], row["speedup"]))


def spans(rows: list[dict[str, Any]]) -> dict[tuple[str, int], tuple[float, float]]:
    """By model and pixels, the fewest and the most seconds of all runs that left nothing out: what the machine alone changes."""
    full = {(row["model"], row["pixels"]): row["flops"] for row in rows if row["method"] == "full"}
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row["flops"] > 0.99 * full[size := (row["model"], row["pixels"])]:
            found.setdefault(size, []).append(row["seconds"])
    return {size: (min(seconds), max(seconds)) for size, seconds in found.items()}


def summary_for_readme(qualities: list[Quality]) -> list[str]:
    """The table of the README: at every speed ours, and the best of all others."""
    lines = [
        "| | at least | dit-accel | closest of the others | score: dit-accel | best of the others |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for quality in qualities:
        for close, best in zip(quality.bests["decibels"], quality.bests["score"], strict=True):
            if "against" in close:
                ours, rival, theirs = close["ours"], close["rival"], best["rival"]
                cells = [quality.name, f"{close['target']:g}x", f"{ours['speedup']:.2f}x, {ours['decibels']:.1f} dB"]
                cells.append(f"{maker(rival)}: {rival['decibels']:.1f} dB ({verdict(close['against'], 'decibels')})")
                cells.append(f"{best['ours']['score']:.2f}")
                cells.append(f"{maker(theirs)}: {theirs['score']:.2f} ({verdict(best['against'], 'score')})")
                lines.append(f"| {' | '.join(cells)} |")
    counts = ", ".join(f"{quality.name} {quality.more or quality.pictures}" for quality in qualities)
    about = f"*{counts}; in parentheses what the 95 % interval of the paired difference says of ours.*"
    return [*lines, "", about]


def recipe_tables(qualities: list[Quality]) -> list[str]:
    """The tables of docs/recipes.md: what was measured of the recipes that ship, and fewer steps at the speed nearest to each."""
    lines = []
    for quality in qualities:
        content = json.loads((SHIPPED / f"{quality.name}.json").read_text())
        rest = quality.table[~quality.table.index.isin(quality.leaders.index)]
        plain = pd.concat([quality.leaders, rest]).query("kind == 'fewer steps'")
        heads = [
            f"{quality.name}, asked",
            "measured",
            "full steps",
            "PSNR, dB",
            "score beside the uncached",
            "pictures",
            "fewer steps, dB",
        ]
        lines += ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        for one in content["recipes"]:
            measured, steps = one["measured"], one["config"].get("sampler_steps", len(content["levels"]))
            mean, low, high = measured["psnr"]
            cells = [f"{one['speedup']:g}x", f"{measured['seconds']:.2f}x"]
            cells.append(f"{len(one['config']['full_steps'])} of {steps if isinstance(steps, int) else len(steps)}")
            cells.append(f"{mean:.1f} ({low:.1f} to {high:.1f})")
            label = recipe_cell(one["speedup"]).label
            own = quality.leaders.loc[label] if label in quality.leaders.index else None
            cells.append("" if own is None else f"{own['difference']:+.3f} ({own['low']:+.3f} to {own['high']:+.3f})")
            cells.append(str(measured.get("pictures", content["measured"]["pictures"])))
            near = plain.iloc[(plain["speedup"] - measured["seconds"]).abs().argmin()]
            known = abs(near["speedup"] / measured["seconds"] - 1) < NEAR
            cells.append(f"{near['decibels']:.1f} at {near['speedup']:.2f}x" if known else "")
            lines.append(f"| {' | '.join(cells)} |")
    return lines[1:]


def maker(row: Any) -> str:
    """A method's name and whose it is, without its setting."""
    return "fewer steps" if row["by"] == "stock" else f"{row['label'].partition(',')[0]} ({row['by']})"


def quantized_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a pipeline, kind of numbers and speed: mean PSNR to float32, what it were if squared errors added up, that to the
    pipeline's own numbers, and the paired difference of the score to float32, uncached."""
    found, table = [], pd.DataFrame(rows)
    for name, some in table.groupby("pipeline", sort=False):
        columns = ["numbers", "speed"]
        errors, own, scores = (some.pivot(index="prompt", columns=columns, values=v) for v in ("to_float32", "to_its_own", SCORE))
        for numbers, speed in errors.columns:
            if (numbers, speed) == ("float32", 1.0):
                continue
            both = errors[numbers, 1.0] + errors["float32", speed]
            near = {"psnr": errors[numbers, speed], "added": both, "own": own[numbers, speed]}
            row: dict[str, Any] = {"pipeline": name, "numbers": numbers, "speed": speed, "prompts": len(errors)}
            row |= {key: mean_interval([min(BEST, decibels(value)) for value in values]) for key, values in near.items()}
            found.append(row | {"score": paired_values(scores[numbers, speed] - scores["float32", 1.0])})
    return found


def largest_last(held: dict[str, tuple[str, float]]) -> list[tuple[str, str, float]]:
    return sorted(((name, by, size) for name, (by, size) in held.items()), key=lambda row: row[2])


def save_figure(figure: Figure, path: Path) -> None:
    figure.savefig(png := BytesIO(), format="png", dpi=130)
    write_atomically(path, png.getvalue())


def render(records: Path) -> tuple[str, dict[str, Any], list[Quality]]:
    """The page's text; the records by name; the qualities."""
    found = {name: json.loads(path.read_text()) for name in RECORDS if (path := records / f"{name}.json").exists()}
    qualities = [Quality(records, name) for name in PIPELINES if first(records, name, "seconds").exists()]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"paired": paired, "short": short, "median": statistics.median, "verdict": verdict, "verdicts": verdicts}
    environment.filters |= {"seconds": EngFormatter("s", places=1), "bytes": EngFormatter("B", places=1)}
    wide = width_rows(found["width"]["rows"]) if "width" in found else []
    text = environment.get_template("page.md.j2").render(
        records=found,
        qualities=qualities,
        makers=MAKERS,
        targets=", ".join(f"{target:g}" for target in TARGETS[:-1]) + f" and {TARGETS[-1]:g}",
        score=SCORE,
        most=f"{BEST:g}",
        width=wide,
        spans=spans(found["width"]["rows"]) if wide else {},
        sizes=list(dict.fromkeys((row["model"], row["pixels"]) for row in wide)),
        units={row["model"]: BLOCKS[row["model"]].format(row["units"], 2 * row["units"]) for row in wide},
        flux_dev=largest_last(flux_dev(found["memory"]["rows"])) if "memory" in found else [],
        overhead=overhead_rows(found["overhead"]["rows"]) if "overhead" in found else [],
        quantized=quantized_rows(found["quantized"]["rows"]) if "quantized" in found else [],
        growth=growth_rows(found["growth"]["rows"]) if "growth" in found else [],
        tokens=sorted({row["tokens"] for row in found["growth"]["rows"]}) if "growth" in found else [],
    )
    return text, found, qualities


def main(
    records: Path = typer.Argument(help="Folder of what the benchmarks wrote.", exists=True, file_okay=False),
    docs: Path = typer.Option(HERE.parent / "docs", help="Folder that gets benchmarks.md, figures/ and data/benchmarks/."),
) -> None:
    text, found, qualities = render(records)
    data = docs / "data" / "benchmarks"
    for name, record in found.items():
        write_atomically(data / f"{name}.json", json.dumps(record, indent=1).encode())
    with style():
        for quality in qualities:
            for name, path in quality.files(records, quality.name).items():
                write_atomically(data / name, path.read_bytes())
            quality.rows.to_parquet(data / f"quality-{quality.name}.parquet", index=False, compression="zstd")
            save_figure(quality.figure(), docs / "figures" / f"benchmarks-{quality.name}.png")
    if "growth" in found:
        draw(found["growth"]["rows"], docs / "figures" / "benchmarks-growth.png")
    write_atomically(docs / "benchmarks.md", text.encode())
    if (readme := docs.parent / "README.md").exists():
        recording.renew(readme, "benchmarks/page.py", summary_for_readme(qualities))
    if (recipes := docs / "recipes.md").exists():
        recording.renew(recipes, "benchmarks/page.py", recipe_tables(qualities))
    typer.echo(f"{docs / 'benchmarks.md'}")


if __name__ == "__main__":
    typer.run(main)
