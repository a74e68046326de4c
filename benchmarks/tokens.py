"""Tokens or steps? At equal seconds, a bare forecast against fewer full steps between which some tokens are computed.

    python benchmarks/tokens.py seconds     # what steps cost, and so how many full ones a speed leaves room for
    python benchmarks/tokens.py pictures    # makes, compares and scores the pictures, prompt by prompt
    python benchmarks/tokens.py page        # docs/tokens-or-steps.md's tables and figure

All settings share one forecast, and full steps that are spaced alike; they differ in how many tokens are computed between them,
which, and against what. The oracle computes those whose forecast is the farthest off, which it knows from a transformer that
computes everything beside; its time is taken from a random selection, so it says what knowing which would be worth. What the output
folder holds is kept, so an interrupted run goes on. `seconds` wants a machine that does nothing else.
"""

from __future__ import annotations

import copy
import io
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import recording
import torch
import typer
from rich.progress import track

import dit_accel
from dit_accel import OutputCacheConfig, store
from dit_accel.eval import drawing
from dit_accel.eval.fidelity import decibels, squared_error
from dit_accel.eval.folder import write_table
from dit_accel.eval.prompt_sets import read_prompt_set
from dit_accel.eval.rewards import load_reward
from dit_accel.eval.spec import noise_seed
from dit_accel.eval.statistics import paired
from dit_accel.families.table import lookup
from dit_accel.pipelines.generation import DenoisingClock, Picture, Settings, denoise, settings_for, switched
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.pictures import write_atomically
from dit_accel.pipelines.terminal import quiet
from dit_accel.pipelines.tuning.search import BEST
from dit_accel.pipelines.tuning.starts import spaced
from dit_accel.when import Mode

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
ROOT = Path(__file__).parent.parent
PIPELINES, SPEEDS = ["emoji-flux", "emoji-pixart"], (1.5, 2.0, 3.0)
RATIOS, ATTENTION = (0.1, 0.3, 0.5), ("reuse", "fresh")
SELECTORS, ORACLE = ("random", "attention", "k-norm", "v-norm", "similarity"), "oracle"
FORECAST: dict[str, Any] = dict(order=1, damping=0.7)
POWER = {"emoji-flux": 2.5, "emoji-pixart": 1.0}  # the i-th of n full steps lies at (i / n) ** this: best for the bare forecast
SCORE = "emoji-reward"
PROMPTS = read_prompt_set(ROOT / "eval" / "specs" / "embedded.txt")
TIMED = read_prompt_set(ROOT / "pipelines" / "tuning" / "emoji.txt")[:3]  # those that are timed are not compared
assert not set(TIMED) & set(PROMPTS)


@dataclass(frozen=True)
class Setting:
    """How many of the tokens are computed between full steps, against what, and which."""

    ratio: float = 0.0
    attention: str = "none"
    selector: str = "none"
    gift: bool = False  # whether it has as many full steps as the bare forecast, though it takes longer

    @property
    def label(self) -> str:
        if not self.ratio:
            return "bare forecast"
        return f"{self.ratio:.0%} {self.attention} {self.selector}{', a gift' * self.gift}"

    def config(self, steps: int, count: int, power: float, selector: Any = None) -> OutputCacheConfig:
        """With so many full steps."""
        packed: dict[str, Any] = {}
        if self.ratio:
            packed = dict(compute_ratio=self.ratio, attention=self.attention, selector=selector or self.selector)
        return OutputCacheConfig(full_steps=spaced(steps, count, lambda share: share**power), **FORECAST, **packed)


BARE = Setting()
SETTINGS = [BARE] + [Setting(r, attention, s) for r in RATIOS for attention in ATTENTION for s in (*SELECTORS, ORACLE)]
GIFTS = [Setting(0.3, attention, selector, gift=True) for attention in ATTENTION for selector in ("random", ORACLE)]


class Bench:
    """A loaded pipeline, one thread, and what it is called with."""

    def __init__(self, name: str) -> None:
        torch.set_num_threads(1)
        quiet()
        self.pipe = load(name, "float32")
        self.settings: Settings = settings_for(self.pipe, name)
        self.steps = self.settings.steps

    def make(self, prompt: str, config: Any = None) -> Picture:
        with switched(self.pipe, config):
            return denoise(self.pipe, [(prompt, noise_seed(prompt, 0))], self.settings, lambda: None, applied=False)[0]

    def costs(self, config: Any, prompt: str) -> tuple[float, float]:
        """What a full and a partial step cost, as shares of a plain step: medians of one run after the other."""
        seconds: list[list[float]] = []
        for one in (None, config):
            with switched(self.pipe, one), DenoisingClock(self.pipe) as clock:
                denoise(self.pipe, [(prompt, 0)], self.settings, lambda: None, applied=False)
                calls = dit_accel.report(self.pipe).calls if one is not None else ()
            full = [call.mode is Mode.FULL for call in calls] or [True] * len(clock.calls)
            for kind in (True, False):
                seconds.append([spent for spent, is_full in zip(clock.calls, full, strict=True) if is_full is kind])
        plain, _, full_step, partial = (statistics.median(some or [0.0]) for some in seconds)
        return full_step / plain, partial / plain


@contextmanager
def oracle(bench: Bench) -> Iterator[Any]:
    """A selector that knows the forecast's true error, valid while it is applied."""
    applied, family = bench.pipe.transformer, lookup(bench.pipe.transformer)
    whole, given, rows = copy.deepcopy(applied), {}, []
    handles = [
        applied.register_forward_pre_hook(lambda module, args, kwargs: given.update(args=args, kwargs=kwargs), with_kwargs=True),
        whole.get_submodule(family.head).register_forward_hook(lambda module, args, output: rows.append(output)),
    ]

    def largest_error(context: Any) -> torch.Tensor:
        """Tokens whose forecast is the farthest from what the transformer would return."""
        record, rows[:] = applied._dit_accel.calls[-1], []
        whole(*given["args"], **given["kwargs"])
        past = applied._dit_accel.branches[record.branch].tokens.outputs[: len(record.weights)]
        [forecast] = store.combined(past, store.numbers(record.weights))
        true = rows[0].flatten(1, -2)[:, -forecast.flatten(1, -2).shape[1] :]  # of FLUX, without the text
        return (true - forecast.flatten(1, -2)).square().sum(-1)

    try:
        yield largest_error
    finally:
        for handle in handles:
            handle.remove()


Pipelines = typer.Option(PIPELINES, "--pipeline", help="emoji-flux or emoji-pixart; may be repeated.")
Output = typer.Option(ROOT / "docs" / "data" / "tokens-or-steps", help="Folder of the measurements, a file for each pipeline.")


@app.command()
def seconds(pipelines: list[str] = Pipelines, output: Path = Output) -> None:
    """Time every kind of step, choose full steps so that all settings take equally long, and time what was chosen."""
    for name in pipelines:
        if (path := output / f"{name}.json").exists():
            continue
        bench, costs = Bench(name), {}
        own, steps = [one for one in SETTINGS if one.selector != ORACLE], bench.steps
        for setting in track(own, description=name):
            config = setting.config(steps, steps // 3, 1.0)
            costs[setting] = [bench.costs(config, prompt) for prompt in TIMED]
        rows = []
        for setting in own:
            alike = [one for one in own if (one.attention, one.selector) == (setting.attention, setting.selector)]
            full = statistics.median(cost[0] for one in alike for cost in costs[one])  # however many tokens partial steps compute
            partial = statistics.median(cost[1] for cost in costs[setting])
            for speed in SPEEDS:
                count = round((steps / speed - steps * partial) / (full - partial))
                rows.append({**asdict(setting), "speed": speed, "full": full, "partial": partial, "count": max(0, count)})
        recording.save(path, rows)


@app.command()
def pictures(
    pipelines: list[str] = Pipelines,
    prompts: int = typer.Option(len(PROMPTS), min=2, max=len(PROMPTS), help="How many prompts, spread over the set."),
    output: Path = Output,
) -> None:
    """Make every prompt's picture in full and by every setting."""
    reward = load_reward(SCORE)
    for name in pipelines:
        timed = recording.rows_of(output / f"{name}.json")
        counts = {(Setting(r["ratio"], r["attention"], r["selector"]), r["speed"]): r["count"] for r in timed}
        bench, path = Bench(name), output / f"{name}.parquet"
        done = pd.read_parquet(path) if path.exists() else pd.DataFrame({"prompt": []})
        wanted = [PROMPTS[i * len(PROMPTS) // prompts] for i in range(prompts)]
        for prompt in track([one for one in wanted if one not in set(done["prompt"])], description=name):
            rows: list[dict[str, Any]] = []
            for speed in SPEEDS:
                made = bench.make(prompt)
                full = made.image
                row = {"setting": "full", "speed": speed, "squared_error": 0.0, "seconds": made.denoising_seconds}
                rows.append(row | {SCORE: float(reward.score([prompt], [full])[0])})
                for setting in SETTINGS + GIFTS:
                    knows, given = setting.selector == ORACLE, setting in GIFTS
                    timed = BARE if given else Setting(setting.ratio, setting.attention, "random") if knows else setting
                    if (count := counts[timed, speed]) < 1:
                        continue
                    with oracle(bench) if knows else nullcontext() as selector:
                        made = bench.make(prompt, setting.config(bench.steps, count, POWER[name], selector))
                    row = {"setting": setting.label, "speed": speed, "full_steps": count, **asdict(setting)}
                    row |= {"squared_error": squared_error(full, made.image), "seconds": made.denoising_seconds}
                    rows.append(row | {SCORE: float(reward.score([prompt], [made.image])[0])})
            done = pd.concat([done, pd.DataFrame(rows).assign(prompt=prompt)], ignore_index=True)
            write_table(path, done)


def against_bare(table: pd.DataFrame) -> pd.DataFrame:
    """Every setting's likeness and score, and what it has more than the bare forecast of the same speed, with intervals."""
    rows = []
    for speed, some in table.assign(psnr=[min(BEST, decibels(error)) for error in table["squared_error"]]).groupby("speed"):
        wide = {value: some.pivot(index="prompt", columns="setting", values=value) for value in ("psnr", SCORE, "seconds")}
        for label in wide["psnr"].columns.drop("full"):
            first = some[some["setting"] == label].iloc[0]
            row = {
                "speed": speed,
                "setting": label,
                **{key: first[key] for key in ("ratio", "attention", "selector", "full_steps")},
            }
            row["measured"] = (wide["seconds"]["full"] / wide["seconds"][label]).median()
            for value in ("psnr", SCORE):
                row[value] = wide[value][label].mean()
                if label != BARE.label:
                    found = paired(wide[value][label] - wide[value][BARE.label])
                    row |= {f"{value}_more": found.mean, f"{value}_low": found.low, f"{value}_high": found.high}
            rows.append(row)
    return pd.DataFrame(rows)


def drawn(found: dict[str, pd.DataFrame], path: Path) -> None:
    """What computed tokens add to or take from the likeness, at equal seconds."""
    import matplotlib.pyplot as plt

    found = {name: table[~table["setting"].isin([one.label for one in GIFTS])] for name, table in found.items()}
    with drawing.style():
        figure, axes = plt.subplots(
            len(found), len(SPEEDS), figsize=(11, 3.1 * len(found)), sharex=True, sharey="row", squeeze=False
        )
        for (name, table), row in zip(found.items(), axes, strict=True):
            for speed, axis in zip(SPEEDS, row, strict=True):
                axis.axhline(0, color="0.4", linewidth=1)
                for number, (attention, selector) in enumerate(product(ATTENTION, (*SELECTORS, ORACLE))):
                    own = table[(table["speed"] == speed) & (table["attention"] == attention) & (table["selector"] == selector)]
                    shift = (number - 5.5) * 0.006
                    more, low, high = (own[f"psnr_{end}"] for end in ("more", "low", "high"))
                    color = "black" if selector == ORACLE else f"C{SELECTORS.index(selector)}"
                    look: dict[str, Any] = dict(color=color, marker="o" if attention == "reuse" else "^", markersize=4, linewidth=1)
                    look |= dict(linestyle="-" if attention == "reuse" else ":", label=f"{selector}, {attention}")
                    axis.errorbar(own["ratio"] + shift, more, [more - low, high - more], **look)
                axis.set(title=f"{name}, {speed:g}x", xticks=(0, *RATIOS))
                axis.xaxis.set_major_formatter("{x:.0%}")
            row[0].set_ylabel("PSNR beside the bare forecast, dB")
        figure.supxlabel("share of the tokens computed between full steps", fontsize=10)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


MARK = "<!-- made by benchmarks/tokens.py page -->"
HEADS = (
    *("tokens", "attention", "selector", "a partial step costs", "full steps", "measured", "PSNR, dB"),
    *("beside the bare forecast", "score beside it"),
)


def rows_of(table: pd.DataFrame, costs: pd.DataFrame, settings: list[Setting]) -> Iterator[str]:
    """Of a table in Markdown, one for each setting."""
    yield f"| {' | '.join(HEADS)} |"
    yield "| --- " * len(HEADS) + "|"
    for setting in settings:
        timed = "random" if setting.selector == ORACLE else setting.selector
        same = (costs["ratio"] == setting.ratio) & (costs["attention"] == setting.attention) & (costs["selector"] == timed)
        cells = [f"{setting.ratio:.0%}", setting.attention, setting.selector, f"{costs[same].iloc[0].partial:.2f}"]
        own = table[table["setting"] == setting.label]
        if own.empty:
            cells += ["-"] * 5
        for _, one in own.iterrows():
            measured = "" if setting.selector == ORACLE else f"{one.measured:.2f}x"
            more, score = ([one[f"{value}_{end}"] for end in ("more", "low", "high")] for value in ("psnr", SCORE))
            cells += [f"{one.full_steps:.0f}", measured, f"{one.psnr:.1f}"]
            cells += ["{:+.1f} ({:+.1f} to {:+.1f})".format(*more), "{:+.2f} ({:+.2f} to {:+.2f})".format(*score)]
        yield f"| {' | '.join(cells)} |"


@app.command()
def page(output: Path = Output, docs: Path = typer.Option(ROOT / "docs", help="Folder of tokens-or-steps.md.")) -> None:
    """Renew the tables and the figure; the text before them stays."""
    tables = {name: pd.read_parquet(output / f"{name}.parquet") for name in PIPELINES}
    found = {name: against_bare(table) for name, table in tables.items()}
    drawn(found, docs / "figures" / "tokens-or-steps.png")
    lines = [MARK, "", "![What computed tokens add at equal seconds](figures/tokens-or-steps.png)"]
    for name, table in found.items():
        costs, prompts = pd.DataFrame(recording.rows_of(output / f"{name}.json")), tables[name]["prompt"].nunique()
        lines += ["", f"## {name}", "", f"{prompts} prompts, one seed each. A dash: not even one full step is left at this speed."]
        for speed, some in table.groupby("speed"):
            bare = some[some["setting"] == BARE.label].iloc[0]
            lines += ["", f"### {name}, {speed:g}x", ""]
            lines += [f"Bare forecast: {bare.full_steps:.0f} full steps, {bare.measured:.2f}x, {bare.psnr:.1f} dB.", ""]
            lines += [
                *rows_of(some, costs, SETTINGS[1:]),
                "",
                "With as many full steps as the bare forecast, which takes longer:",
                "",
            ]
            lines += rows_of(some, costs, GIFTS)
    path = docs / "tokens-or-steps.md"
    head = path.read_text(encoding="utf-8").split(MARK)[0] if path.exists() else "# Tokens or steps?\n\n"
    write_atomically(path, (head + "\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    app()
