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
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import recording
import torch
import typer
from rich.progress import track

import dit_accel
from dit_accel import OutputCacheConfig, store
from dit_accel.eval.fidelity import squared_error
from dit_accel.eval.folder import write_table
from dit_accel.eval.prompt_sets import read_prompt_set
from dit_accel.eval.rewards import load_reward
from dit_accel.eval.spec import noise_seed
from dit_accel.eval.statistics import paired
from dit_accel.families.table import lookup
from dit_accel.pipelines.generation import DenoisingClock, Picture, Settings, denoise, settings_for, switched
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.terminal import quiet
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

    @property
    def label(self) -> str:
        return f"{self.ratio:.0%} {self.attention} {self.selector}" if self.ratio else "bare forecast"

    def config(self, steps: int, count: int, power: float, selector: Any = None) -> OutputCacheConfig:
        """With so many full steps."""
        packed: dict[str, Any] = {}
        if self.ratio:
            packed = dict(compute_ratio=self.ratio, attention=self.attention, selector=selector or self.selector)
        return OutputCacheConfig(full_steps=spaced(steps, count, lambda share: share**power), **FORECAST, **packed)


BARE = Setting()
SETTINGS = [BARE] + [Setting(r, attention, s) for r in RATIOS for attention in ATTENTION for s in (*SELECTORS, ORACLE)]


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
        bench, rows = Bench(name), []
        own, steps = [one for one in SETTINGS if one.selector != ORACLE], bench.steps
        for setting in track(own, description=name):
            config = setting.config(steps, steps // 3, 1.0)
            costs = [bench.costs(config, prompt) for prompt in TIMED for _ in range(2)]
            full, partial = (statistics.median(values) for values in zip(*costs, strict=True))
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
                score = float(reward.score([prompt], [full])[0])
                rows.append(
                    {"setting": "full", "speed": speed, "squared_error": 0.0, SCORE: score, "seconds": made.denoising_seconds}
                )
                for setting in SETTINGS:
                    knows = setting.selector == ORACLE
                    twin = Setting(setting.ratio, setting.attention, "random") if knows else setting
                    if (count := counts[twin, speed]) < 1:
                        continue
                    with oracle(bench) if knows else nullcontext() as selector:
                        made = bench.make(prompt, setting.config(bench.steps, count, POWER[name], selector))
                    image = made.image
                    row = {"setting": setting.label, "speed": speed, "full_steps": count, **asdict(setting)}
                    score = float(reward.score([prompt], [image])[0])
                    rows.append(
                        row | {"squared_error": squared_error(full, image), SCORE: score, "seconds": made.denoising_seconds}
                    )
            done = pd.concat([done, pd.DataFrame(rows).assign(prompt=prompt)], ignore_index=True)
            write_table(path, done)


def against_bare(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Every setting's mean, and its difference from the bare forecast of the same speed, with its interval over prompts."""
    rows = []
    for speed, some in table[table["setting"] != "full"].groupby("speed"):
        wide = some.pivot(index="prompt", columns="setting", values=value)
        for label in wide:
            found = paired(wide[label] - wide[BARE.label]) if label != BARE.label else None
            first = some[some["setting"] == label].iloc[0]
            ends = dict(difference=found.mean, low=found.low, high=found.high) if found else dict(difference=0.0, low=0.0, high=0.0)
            keys = {key: first[key] for key in ("ratio", "attention", "selector", "full_steps")}
            rows.append({"speed": speed, "setting": label, **keys, "mean": wide[label].mean(), **ends, "n": len(wide)})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    app()
