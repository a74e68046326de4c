"""How good are pictures that come 1.5 to 4 times as soon? Every method on the embedded pipelines, one picture at a time.

    python benchmarks/quality.py search              # finds the settings, on prompts that are not compared
    python benchmarks/quality.py seconds             # times what was found, all methods in turn
    python benchmarks/quality.py pictures            # makes, scores and compares the pictures
    python benchmarks/quality.py pictures --leaders 1  # more of them, of ours and the best of the others
    python benchmarks/quality.py resume              # puts the records that are kept where the commands above go on from them
    python benchmarks/quality.py recipes             # writes what came out of ours into the recipes that ship

What the output folder holds already is kept, so an interrupted run goes on. `search` and `seconds` want a machine that does nothing
else; `pictures` may run in several processes, each with its `--part`. The prompts compared are those of eval/specs/embedded.txt.
The caches that look at differences decide for a whole batch, so there is one picture in it, as when somebody waits for it; what a
small model then spends besides matrix work (overhead.py) counts against the methods that still compute something.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import recording
import torch
import typer
from meter import Meter
from peers import METHODS, applied, calibrate, family, steps_of
from rich.progress import track

from dit_accel.eval.fidelity import decibels, squared_error, ssim
from dit_accel.eval.folder import write_json, write_table
from dit_accel.eval.prompt_sets import read_prompt_set
from dit_accel.eval.rewards import load_reward
from dit_accel.eval.rewards.pictures import open_picture
from dit_accel.eval.spec import FULL, noise_seed
from dit_accel.eval.statistics import mean_interval, per_prompt
from dit_accel.pipelines.generation import Picture, Settings, denoise, settings_for
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.pictures import png, write_atomically
from dit_accel.pipelines.terminal import quiet
from dit_accel.pipelines.tuning.search import BEST
from dit_accel.recipe import SHIPPED

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
PIPELINES = ["emoji-flux", "emoji-pixart"]
TARGETS, REACHED = (1.5, 2.0, 2.5, 3.0, 4.0), 0.97  # a setting reaches a target if its speed-up is at least this share of it
NEARLY = 0.94  # and may turn out to, once it is timed anew
SCORE = "emoji-reward"
ROOT = Path(__file__).parent.parent
PROMPTS = read_prompt_set(ROOT / "eval" / "specs" / "embedded.txt")
SEARCH_PROMPTS = read_prompt_set(ROOT / "pipelines" / "tuning" / "emoji.txt")[:8]  # those on which recipes are searched, too
assert not set(SEARCH_PROMPTS) & set(PROMPTS)


@dataclass(frozen=True)
class Cell:
    """A method at one setting; without a name the run in full. Its file is named after both."""

    name: str = ""
    setting: Any = None

    @property
    def label(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.setting.items())]) if self.name else FULL

    @property
    def file(self) -> str:
        return re.sub(r"[^\w.=-]+", "_", self.label)

    @property
    def kind(self) -> str:
        return "full" if not self.name else "fewer steps" if self.name == "fewer steps" else "method"


class Bench:
    """A loaded pipeline, one thread, and what it is called with."""

    def __init__(self, name: str, dtype: str) -> None:
        torch.set_num_threads(1)
        quiet()
        self.name, self.pipe = name, load(name, dtype)
        self.settings: Settings = settings_for(self.pipe, name)
        calibrate(self.pipe, self.settings.steps, lambda: self.make(Cell(), SEARCH_PROMPTS[0]))

    def cells(self, only: list[str]) -> list[Cell]:
        """Every method, or only these, at every rung of its ladder."""
        own = [method for method in METHODS.values() if family(self.pipe) in method.families and method.name in (only or METHODS)]
        return [Cell(method.name, setting) for method in own for setting in method.ladder]

    @contextmanager
    def having(self, cell: Cell) -> Iterator[None]:
        if not cell.name:
            yield
            return
        with applied(self.pipe, METHODS[cell.name], cell.setting, self.settings.steps):
            yield

    def make(self, cell: Cell, prompt: str, seed: int = 0) -> Picture:
        """A picture with the cell's number of steps, of the pipeline as it is."""
        steps = steps_of(METHODS[cell.name], cell.setting, self.settings.steps) if cell.name else self.settings.steps
        settings = Settings(**{**vars(self.settings), "steps": steps})
        return denoise(self.pipe, [(prompt, noise_seed(prompt, seed))], settings, lambda: None, applied=False)[0]

    def round(self, cells: list[Cell], prompt: str, number: int) -> Iterator[tuple[Cell, Picture]]:
        """A picture of every cell, shuffled, between two in full."""
        order = list(cells)
        random.Random(number).shuffle(order)
        for cell in track([Cell(), *order, Cell()], description=f"{self.name}, round {number + 1}"):
            with self.having(cell):
                yield cell, self.make(cell, prompt)


def chosen(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By method, of the settings that reach each target the closest to the pictures in full, each once, with its `targets`.

    Fewer steps come in few speeds: where the closest reach a target but for little, so do those that surely reach it.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["method"], [])
    for name, some in found.items():
        shares = (REACHED, 1.0) if name == "fewer steps" else (REACHED,)
        for target, share in itertools.product(TARGETS, shares):
            fast = [row for row in rows if row["method"] == name and statistics.median(row["speedups"]) >= share * target]
            if fast:
                best = max(fast, key=lambda row: statistics.mean(row["psnr"]))
                same = next((row for row in some if row["setting"] == best["setting"]), None)
                if same is None:
                    some.append(same := {**best, "targets": []})
                same["targets"] = sorted({*same["targets"], target})
    return found


def cells_to_compare(folder: Path) -> list[Cell]:
    rows = recording.rows_of(folder / "search.json")
    if not rows:
        raise SystemExit(f"There is no {folder / 'search.json'}: run `python benchmarks/quality.py search` first.")
    return [Cell(row["method"], row["setting"]) for some in chosen(rows).values() for row in some]


Pipelines = typer.Option(PIPELINES, "--pipeline", help="emoji-flux or emoji-pixart; may be repeated.")
Dtype = typer.Option("float32", help="What the pipeline computes in; recipes were searched in float32.")
Output = typer.Option(Path("out/quality"), help="Folder of the measurements, one for each pipeline in it.")


@app.command()
def search(
    pipelines: list[str] = Pipelines,
    methods: list[str] = typer.Option(
        [], "--method", help="Only this one, anew; may be repeated. What is known of others is kept."
    ),
    rounds: int = typer.Option(len(SEARCH_PROMPTS), min=1, max=len(SEARCH_PROMPTS), help="Prompts that every setting is timed on."),
    dtype: str = Dtype,
    output: Path = Output,
) -> None:
    """Time every setting of every method, and choose the closest ones that reach the targets."""
    for name in pipelines:
        known = recording.rows_of(path := output / name / "search.json")
        if known and not methods:
            continue
        bench = Bench(name, dtype)
        cells = {cell.label: cell for cell in bench.cells(methods)}
        ratios: dict[str, list[float]] = {label: [] for label in cells}
        likeness: dict[str, list[float]] = {label: [] for label in cells}
        for number in range(rounds):
            made: dict[str, list[Picture]] = {}
            for cell, picture in bench.round(list(cells.values()), SEARCH_PROMPTS[number], number):
                made.setdefault(cell.label, []).append(picture)
            full = statistics.mean(picture.denoising_seconds for picture in made[FULL])
            for label in cells:
                ratios[label].append(full / made[label][0].denoising_seconds)
                likeness[label].append(decibels(squared_error(made[FULL][0].image, made[label][0].image)))
        rows = [
            {
                "method": cell.name,
                "by": METHODS[cell.name].by,
                "setting": cell.setting,
                "speedups": ratios[label],
                "psnr": likeness[label],
            }
            for label, cell in cells.items()
        ]
        rows += [row for row in known if row["method"] not in methods]
        recording.save(path, sorted(rows, key=lambda row: list(METHODS).index(row["method"])))
        for method, some in chosen(rows).items():
            found = [f"{statistics.median(row['speedups']):.2f}x {row['setting']}" for row in some]
            typer.echo(f"{name}: {method}: {', '.join(found) or 'reaches none of the targets'}")


@app.command()
def seconds(
    pipelines: list[str] = Pipelines,
    rounds: int = typer.Option(7, min=2, help="Pictures of every method, each round's of another prompt."),
    dtype: str = Dtype,
    output: Path = Output,
) -> None:
    """Time what `search` chose on prompts that are compared, and count FLOPs and bytes once."""
    for name in pipelines:
        path = output / name / "seconds.json"
        cells, rows = cells_to_compare(output / name), recording.rows_of(path)
        done = {row["round"] for row in rows}
        if len(done) >= rounds:
            continue
        bench, work = Bench(name, dtype), {}
        for cell in track([Cell(), *cells], description=f"{name}, FLOPs"):
            with Meter() as meter, bench.having(cell):
                bench.make(cell, PROMPTS[0])
            work[cell.label] = {"flops": meter.flops, "peak_memory": meter.peak_bytes}
        for number in sorted(set(range(rounds)) - done):
            for cell, picture in bench.round(cells, PROMPTS[number * len(PROMPTS) // rounds], number):
                row = {"pipeline": name, "method": cell.label, "kind": cell.kind, "round": number, "seconds": picture.seconds}
                rows.append(row | work[cell.label] | {"denoising_seconds": picture.denoising_seconds})
            recording.save(path, rows)


@app.command()
def pictures(
    pipelines: list[str] = Pipelines,
    seeds: int = typer.Option(3, min=1, help="Pictures of every prompt."),
    prompts: int = typer.Option(len(PROMPTS), min=2, max=len(PROMPTS), help="How many prompts."),
    leaders: int = typer.Option(
        0, min=0, help="Only of recipes and so many others, the best at each speed of those whose pictures are made; 0: of all."
    ),
    part: str = typer.Option("1/1", help="Of several processes, this one's number and how many there are: 1/2 and 2/2."),
    dtype: str = Dtype,
    output: Path = Output,
) -> None:
    """Make the pictures of what `search` chose, score them, and compare each with its twin in full."""
    process, processes = map(int, part.split("/"))
    reward = load_reward(SCORE)
    for name in pipelines:
        bench, folder = Bench(name, dtype), output / name
        cells = [Cell(), *cells_to_compare(folder)]
        if leaders:
            wanted = leading(folder, leaders)
            cells = [cell for cell in cells if cell.name in ("", "recipe") or cell.label in wanted]
        todo = [(seed, number) for seed in range(seeds) for number in range(len(cells))]
        mine = [place for i, place in enumerate(todo) if i % processes == process - 1]
        for seed, number in track(mine, description=f"{name}, part {part}"):
            path = folder / "pictures" / f"{cells[number].file}-{seed}.parquet"
            known = pd.read_parquet(path).to_dict("records") if path.exists() else []
            left = [prompt for prompt in PROMPTS[:prompts] if prompt not in {row["prompt"] for row in known}]
            if left:
                write_table(path, known + rows_of(bench, cells[number], seed, left, reward, folder / "full"))


def leading(folder: Path, count: int) -> set[str]:
    """Of the others, the best at every speed on the pictures that are made of all: by score, mean PSNR, or mean squared error."""
    rows = pd.concat([pd.read_parquet(path) for path in sorted((folder / "pictures").glob("*-0.parquet"))], ignore_index=True)
    rows = by_all(rows)
    times = pd.DataFrame(recording.rows_of(folder / "seconds.json")).pivot_table("denoising_seconds", "round", "method")
    speeds = times[[FULL]].to_numpy() / times
    own = {cell.label for cell in cells_to_compare(folder) if METHODS[cell.name].by == "dit-accel"} | {FULL}
    rows = rows[~rows["method"].isin(own)].assign(
        psnr=lambda rows: rows["psnr"].clip(upper=BEST), near=lambda rows: -rows["squared_error"]
    )
    means, found = rows.groupby("method")[[SCORE, "psnr", "near"]].mean(), set[str]()
    for target, share in itertools.product(TARGETS, (NEARLY, REACHED)):
        fast = means[speeds.median().reindex(means.index) >= share * target]
        found |= {label for value in means for label in fast[value].nlargest(count).index}
    return found


@app.command()
def resume(
    pipelines: list[str] = Pipelines,
    records: Path = typer.Option(ROOT / "docs" / "data" / "benchmarks", help="Folder of the records that are kept."),
    output: Path = Output,
) -> None:
    """Put the records that are kept where `search`, `seconds` and `pictures` go on from them. Nothing is overwritten."""
    for name in pipelines:
        for kind in ("search", "seconds"):
            if not (path := output / name / f"{kind}.json").exists():
                write_atomically(path, (records / f"quality-{name}-{kind}.json").read_bytes())
        cells = {cell.label: cell.file for cell in [Cell(), *cells_to_compare(output / name)]}
        for (method, seed), rows in pd.read_parquet(records / f"quality-{name}.parquet").groupby(["method", "seed"]):
            if method in cells and not (path := output / name / "pictures" / f"{cells[method]}-{seed}.parquet").exists():
                write_table(path, rows.to_dict("records"))


@app.command()
def recipes(
    pipelines: list[str] = Pipelines,
    output: Path = Output,
    folder: Path = typer.Option(SHIPPED, help="Folder of the recipes, a file for each pipeline."),
) -> None:
    """Write what came out into the recipes that ship."""
    for name in pipelines:
        parts = [pd.read_parquet(path) for path in sorted((output / name / "pictures").glob("recipe*.parquet"))]
        table = by_all(pd.concat(parts, ignore_index=True))
        timed = json.loads((output / name / "seconds.json").read_text())
        times = pd.DataFrame(timed["rows"])
        values = {"psnr": per_prompt(table.assign(psnr=table["psnr"].clip(upper=BEST)), "psnr")}
        values |= {"ssim": per_prompt(table, "ssim"), "score": per_prompt(table, SCORE)}
        full = times[times["method"] == FULL]
        content = json.loads((folder / f"{name}.json").read_text())
        for one in content["recipes"]:
            label = recipe_cell(one["speedup"]).label
            own = times[times["method"] == label]
            if own.empty:
                continue
            seconds = full.set_index("round")["denoising_seconds"] / own.set_index("round")["denoising_seconds"]
            one["measured"] = {
                "flops": round(full["flops"].iloc[0] / own["flops"].iloc[0], 3),
                "seconds": round(float(seconds.median()), 3),
                "pictures": int((table["method"] == label).sum()),
            }
            for value, by_prompt in values.items():
                found = mean_interval(by_prompt[label])
                one["measured"][value] = [round(end, 4 if value == "ssim" else 2) for end in (found.mean, found.low, found.high)]
        content["measured"] |= {"date": date.today().isoformat(), "machine": timed["machine"]["processor"], "score": SCORE}
        write_json(folder / f"{name}.json", content)


def recipe_cell(speedup: float) -> Cell:
    """That of a recipe for so many times the speed, whole or not."""
    return Cell("recipe", {"speedup": int(speedup) if speedup == int(speedup) else speedup})


def by_all(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of prompts and seeds that every method in them made a picture of."""
    methods = rows["method"].nunique()
    return rows.groupby(["prompt", "seed"]).filter(lambda some: len(some) == methods)


def rows_of(bench: Bench, cell: Cell, seed: int, prompts: list[str], reward: Any, fulls: Path) -> list[dict[str, Any]]:
    """One row a prompt; the pictures in full are kept."""
    twins = [twin(bench, prompt, seed, fulls) for prompt in prompts]
    with bench.having(cell):
        images = [bench.make(cell, prompt, seed).image for prompt in prompts] if cell.name else twins
    scores = reward.score(prompts, images)
    rows = []
    for prompt, full, image, score in zip(prompts, twins, images, scores, strict=True):
        error = squared_error(full, image)
        row = {"pipeline": bench.name, "method": cell.label, "kind": cell.kind, "prompt": prompt, "seed": seed, "error": None}
        rows.append(row | {"squared_error": error, "psnr": decibels(error), "ssim": ssim(full, image), SCORE: float(score)})
    return rows


def twin(bench: Bench, prompt: str, seed: int, folder: Path) -> Any:
    """The picture in full, made once."""
    path = folder / f"{PROMPTS.index(prompt):03d}-{seed}.png"
    if not path.exists():
        write_atomically(path, png(bench.make(Cell(), prompt, seed).image, {"prompt": prompt, "pipeline": bench.name}))
    return open_picture(path)


if __name__ == "__main__":
    app()
