"""The report of a run: its numbers, what it says about what is missing, and that it works in a real browser."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from dit_accel.eval import cli, drawing, figures, page
from dit_accel.eval.folder import RunFolder, fewer_steps, write_json, write_table
from dit_accel.eval.report import extremes, read_run, write_report
from dit_accel.eval.summary import broken, summarize

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RESAMPLES = 200
METHODS = [
    "cache selector=random interval=3",
    "cache selector=drift interval=3",
    "cache selector=drift interval=5",
    "merge ratio=0.5",
]
PROMPTS = ["crab, 3d style", "red apple, flat style", "cactus", "a tiger"]
MORE = [*PROMPTS, "a fox", "teapot", "drum", "owl"]  # enough for verdicts
HOSTILE = '<script>document.title="taken"</script> & "quotes" ]]> --'


def make_run(
    path: Path,
    methods: list[str] = METHODS,
    prompts: list[str] = PROMPTS,
    pipelines: tuple[str, ...] = ("emoji-flux",),
    seeds: int = 2,
    scores: tuple[str, ...] = ("emoji-reward",),
    rounds: int = 3,
    side: int = 16,
    maps: bool = True,
    pictures: bool = True,
) -> Path:
    """A run folder as `dit-accel-eval run` leaves it, with figures out of a random generator."""
    rng = np.random.default_rng(0)
    cells = [("full", "full", 20), ("no-op cache", "no-op", 20), *((name, "method", 20) for name in methods)]
    cells += [("10 steps", "fewer steps", 10), ("5 steps", "fewer steps", 5)]
    spec = {
        "pipelines": pipelines,
        "prompts": prompts,
        "methods": [{"cache": {"selector": "random", "interval": 3}}],
        "seeds": seeds,
    }
    spec |= {"scores": scores, "margin": 0.1, "steps": 20, "guidance": None, "height": None, "width": None, "batch_size": 4}
    spec |= {
        "timing_rounds": rounds,
        "timing_batch_size": 1,
        "dtype": "auto",
        "device": "auto",
        "offload": "none",
        "selector_file": None,
    }
    begun = {"spec": spec, "versions": {"torch": "2.13.0", "diffusers": "0.42.1"}, "batches": []}
    begun |= {
        "labels": {"all": {name: name for name, kind, _ in cells if kind != "fewer steps"}},
        "resolved": {"dtype": "float32", "device": "cpu"},
    }
    write_json(path / "spec.json", begun)
    folder = RunFolder(path)
    rows, times = [], []
    for p, pipeline in enumerate(pipelines):
        base = {(prompt, seed): rng.normal(0.8, 0.5, len(scores)) for prompt in prompts for seed in range(seeds)}
        for number, (method, kind, steps) in enumerate(cells):
            plain = kind in ("full", "no-op")
            ratio = 1.0 if plain else 20 / steps if kind == "fewer steps" else 1 + 3 * number / len(cells)
            loss = 0.0 if plain else 0.08 * ratio * rng.uniform(-0.1, 0.6)
            work = {"flops": 1e10 / ratio, "full_flops": 1e10 * steps / 20, "peak_memory": None}
            work |= {"cache_bytes": 2**20 * 3.0 if kind == "method" else math.nan}
            common = {"pipeline": pipeline, "method": method, "kind": kind, "error": None, "steps": steps}
            common |= {"cell": folder.key(pipeline, fewer_steps(steps)) if kind == "fewer steps" else method}
            for i, (prompt, seed) in enumerate((a, b) for a in prompts for b in range(seeds)):
                score = base[prompt, seed] - (0 if plain else rng.normal(loss, 0.05, len(scores)))
                picture = Path("pictures", f"{p:02}", f"{number:02}", f"{i:04}.png")
                if pictures:
                    color = tuple(int(c) for c in np.random.default_rng(i).integers(0, 255, 3))
                    (path / picture).parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (side, side), color).save(path / picture)
                error = {} if kind == "full" else {"squared_error": 0.0 if plain else float(rng.uniform(5, 50))}
                error |= {} if kind == "full" else {"ssim": 1.0 if plain else 0.95, "psnr": 20.0}
                row = {**common, "prompt": prompt, "prompt_number": i // seeds, "seed": seed, "picture": picture.as_posix()}
                rows.append({**row, **work, **error, **dict(zip(scores, map(float, score), strict=True)), "seconds": 1.0})
            for round_number in range(1, rounds + 1):
                seconds = 2.0 / ratio**0.8 * rng.uniform(0.95, 1.1)
                cost = {"denoising_seconds": seconds, "seconds": seconds + 0.2, "round": round_number, "comparable": True}
                times.append({**common, **work, **cost, "session": 0})
            if kind == "method" and method.startswith("cache") and maps:
                share = np.round(rng.uniform(0, 0.4, (8, 8)) + np.linspace(0, 0.3, 8), 4)
                record = {
                    "pipeline": pipeline,
                    "method": method,
                    "cell": method,
                    "grid": [8, 8],
                    "share": share.tolist(),
                    "uniformity": 0.97,
                }
                write_json(
                    path / "maps" / f"{p:02}-{number:04}.json",
                    record | {"coverage": 0.31, "row_bias": 0.1, "column_bias": 0.6, "pictures": 2},
                )
    write_json(path / "cut.json", {score: 1 for score in scores})
    steps = {"10": [f"seconds of {methods[0]}"], "5": []}
    write_json(path / "baselines.json", {name: {"steps": steps, "methods": {}} for name in pipelines})
    session = {"started": "2026-01-02 03:04:05", "device": "cpu", "processes": 1, "hardware": "Some CPU", "threads": 4, "cores": 8}
    write_json(path / "sessions" / "000.json", session | {"python": "3.11.7", "platform": "Linux"})
    write_table(path / "results.parquet", rows)
    write_table(path / "timing.parquet", times)
    return path


class Table(HTMLParser):
    """Texts of the cells of the main table, and their intervals, by method and heading."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.lines: list[list[list[str]]] = []
        self.place = ""
        self.feed(html[html.index('<table id="results">') : html.index("</table>")])

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.place = tag if tag in ("button", "td", "small") else self.place
        if tag == "tr":
            self.lines.append([])
        elif tag == "td":
            self.lines[-1].append([])

    def handle_endtag(self, tag: str) -> None:
        self.place = "" if tag in ("button", "td", "small") else self.place

    def handle_data(self, text: str) -> None:
        if self.place == "button":
            self.headings.append(text)
        elif self.place:
            self.lines[-1][-1].append(text.replace("−", "-"))

    def by_method(self) -> dict[str, dict[str, list[str]]]:
        rows = [dict(zip(self.headings, line, strict=True)) for line in self.lines if line]
        return {row["method"][0]: row for row in rows}


def written(path: Path, resamples: int = RESAMPLES) -> str:
    return write_report(RunFolder(path), path / "report", resamples).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report. Tests do not change it."""
    path = make_run(tmp_path_factory.mktemp("runs") / "ordinary")
    written(path)
    return path


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def change(path: Path, name: str, where: Any, **values: Any) -> None:
    """Set columns of some rows of a table of the run."""
    table = pd.read_parquet(path / f"{name}.parquet")
    for column, value in values.items():
        table[column] = table[column].astype(object) if column in ("error", "method") else table[column]
        table.loc[where(table), column] = value
    write_table(path / f"{name}.parquet", table)


def test_table_agrees_with_the_rows(run: Path, html: str) -> None:
    """Means, paired differences, seconds and ratios, recomputed from the tables with nothing of the summary."""
    rows, times = (pd.read_parquet(run / f"{name}.parquet") for name in ("results", "timing"))
    shown = Table(html).by_method()
    scores = rows.pivot_table(index="prompt", columns="method", values="emoji-reward")
    seconds = times.pivot_table(index="round", columns="method", values="denoising_seconds")
    assert list(shown) == ["full", "no-op cache", *METHODS, "10 steps", "5 steps"]
    for method, row in shown.items():
        assert row["score"][0] == f"{scores[method].mean():.3f}"
        assert row["seconds"][0] == f"{seconds[method].median():.3f}"
        low, high = np.percentile(seconds[method], [25, 75])
        assert row["seconds"][1] == f"[{low:.3f}, {high:.3f}]"
        assert row["speed-up, measured"][0] == f"{(seconds['full'] / seconds[method]).median():.2f}"
        if method not in ("full", "no-op cache"):
            assert row["difference to full"][0] == f"{(scores[method] - scores['full']).mean():+.3f}"
            error = rows.loc[rows["method"] == method, "squared_error"].mean()
            assert row["PSNR, dB"][0] == f"{10 * math.log10(255**2 / error):.1f}"
            assert row["non-inferior"] == ["too few prompts"]
    assert shown["full"]["difference to full"] == ["–"]
    assert shown["5 steps"]["FLOPs ratio"] == ["4.00"]
    assert shown["no-op cache"]["PSNR, dB"] == ["identical"] and shown["no-op cache"]["identical"] == ["100%"]
    assert shown[METHODS[0]]["cache, MiB"] == ["3.0"] and shown[METHODS[0]]["peak memory, MiB"] == ["–"]


def test_table_agrees_with_the_summary(run: Path, html: str) -> None:
    rows, times = (pd.read_parquet(run / f"{name}.parquet") for name in ("results", "timing"))
    summary = summarize(rows, times, score="emoji-reward", margin=0.1, resamples=RESAMPLES).set_index("method")
    for method, row in Table(html).by_method().items():
        one = summary.loc[method]
        assert row["score"][1] == f"[{one['score_low']:.3f}, {one['score_high']:.3f}]"
        if pd.notna(one["difference"]):
            assert row["difference to full"][1] == f"[{one['low']:+.3f}, {one['high']:+.3f}]"
            assert row["p (Holm)"] == [f"{one['p_holm']:.3f}"]
    front = set(re.findall(r'data-name="([^"]*)"[^>]*class="[^"]*front', html))
    assert front == set(summary.index[summary["pareto"]])


def test_verdicts(tmp_path: Path) -> None:
    """Non-inferior, and against fewer steps at the same seconds, from the tables alone; both in words above the table."""
    path = make_run(tmp_path / "run", METHODS[:2], MORE, pictures=False, maps=False)
    steps = {"10": [f"seconds of {METHODS[0]}"]}
    write_json(path / "baselines.json", {"emoji-flux": {"steps": steps, "methods": {}}})
    better = lambda t: t["method"] == METHODS[0]
    rows = pd.read_parquet(path / "results.parquet")
    change(path, "results", better, **{"emoji-reward": rows.loc[better(rows), "emoji-reward"] + 0.2})
    html = written(path)
    shown = Table(html).by_method()
    rows = pd.read_parquet(path / "results.parquet")
    scores = rows.pivot_table(index="prompt", columns="method", values="emoji-reward")
    for method in METHODS[:2]:
        low = float(shown[method]["difference to full"][1][1:].split(",")[0])
        assert shown[method]["non-inferior"] == ["yes" if low > -0.1 else "no"]
    one = shown[METHODS[0]]
    assert one["against fewer steps"][0] == f"{(scores[METHODS[0]] - scores['10 steps']).mean():+.3f}"
    assert one["against fewer steps"][1].endswith("] 10 steps")
    assert one["verdict"][0].startswith("better than 10 steps at its seconds: " + one["against fewer steps"][0])
    assert shown[METHODS[1]]["verdict"] == ["no faster than full"] and shown["10 steps"]["verdict"] == ["–"]
    assert f"1 of 2 does better than fewer steps at the same seconds: {METHODS[0]}." in html
    assert "too few prompts for a verdict" in written(make_run(tmp_path / "few", METHODS[:1], pictures=False, maps=False))


def test_what_cannot_be_read_is_named_and_what_is_there_is_shown(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", METHODS[:1], pictures=False)
    rows, times = (pd.read_parquet(path / f"{name}.parquet") for name in ("results", "timing"))
    for number, some in rows.groupby("method", sort=False):
        write_table(path / "rows" / f"{number}.parquet".replace(" ", "-"), some)
    write_table(path / "timing" / "1.parquet", times)
    for cut_off in ("results.parquet", "rows/5-steps.parquet", "cut.json", "sessions/000.json"):
        (path / cut_off).write_bytes(b"")
    (path / "maps" / "extra.json").write_text("[1, 2")
    html = written(path)
    assert "32 of 40 pictures" in html
    for cut_off in ("results.parquet", "rows/5-steps.parquet", "cut.json", "sessions/000.json", "maps/extra.json"):
        assert str(path / cut_off) in html
    (path / "spec.json").write_text("")
    done = CliRunner().invoke(cli.app, ["report", str(path)])
    assert done.exit_code == 2 and "no spec.json that can be read" in done.output.replace("\n", " ").replace("│ │", "")


def test_seconds_of_different_hardware_are_doubted() -> None:
    table = pd.DataFrame({"pipeline": ["p"], "kind": ["method"], "identical": [0.0], "compared": [1], "failed": [0]})
    assert page.doubts(table.assign(comparable=True), "", machines=["A"]) == []
    (text,) = page.doubts(table.assign(comparable=True), "", machines=["A", "B"])
    assert "different hardware: A, B" in text


def test_figures_come_as_png_and_csv(run: Path) -> None:
    report = run / "report"
    names = ["quality-latency-00", "latency-flops-00", "differences-00", "selection-maps-00"]
    for name in names:
        with Image.open(report / f"{name}.png") as image:
            assert image.width > 800
        assert len(pd.read_csv(report / f"{name}.csv"))
    assert {file.suffix for file in report.iterdir()} == {".html", ".png", ".csv"}
    rows = pd.read_parquet(run / "results.parquet")
    scores = rows.pivot_table(index="prompt", columns="method", values="emoji-reward")
    differences = pd.read_csv(report / "differences-00.csv").set_index(["prompt", "method"])["difference"]
    assert len(differences) == len(PROMPTS) * (len(METHODS) + 2)
    for (prompt, method), value in differences.items():
        assert value == pytest.approx(scores.at[prompt, method] - scores.at[prompt, "full"])
    quality = pd.read_csv(report / "quality-latency-00.csv").set_index("method")
    for method in METHODS:
        assert quality.at[method, "score"] == pytest.approx(scores[method].mean())
        assert quality.at[method, "bar_low"] < quality.at[method, "score"] < quality.at[method, "bar_high"]
        full = quality.at["full", "score"]
        assert quality.at[method, "bar_low"] - full == pytest.approx(quality.at[method, "low"])
    maps = pd.read_csv(report / "selection-maps-00.csv")
    record = json.loads((run / "maps" / "00-0003.json").read_text())
    drawn = maps[maps["method"] == record["method"]].pivot(index="row", columns="column", values="share")
    assert np.array_equal(drawn.to_numpy(), record["share"])


def test_worst_and_best_pictures(run: Path, html: str) -> None:
    rows = pd.read_parquet(run / "results.parquet")
    full = rows[rows["method"] == "full"].set_index(["prompt", "seed"])["emoji-reward"]
    listed = pd.read_csv(run / "report" / "pictures.csv")
    for method in METHODS:
        own = rows[rows["method"] == method].set_index(["prompt", "seed"])["emoji-reward"]
        order = [f"{prompt}, seed {seed}" for prompt, seed in (own - full).sort_values().index]
        some = listed[listed["method"] == method]
        for place, wanted in (("worst", order[:3]), ("best", order[:-4:-1])):
            found = some[some["place"] == place]
            assert [f"{row.prompt}, seed {row.seed}" for row in found.itertuples()] == wanted
    assert not set(listed["method"]) & {"full", "no-op cache"}
    assert html.count("data:image/webp;base64,") == 2 * len(listed)
    first = listed[(listed["method"] == METHODS[0]) & (listed["place"] == "worst")].iloc[0]
    caption = f"({first.score:.3f} against {first.score_full:.3f} uncached), PSNR {first.psnr:.1f} dB.<br>{first.prompt}, seed"
    assert caption in html.replace("−", "-")


def test_few_pictures_are_not_shown_twice(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", METHODS[:1], PROMPTS[:2], seeds=2, rounds=1, pictures=False)
    run = read_run(RunFolder(path))
    table = summarize(run.rows, run.times, score="emoji-reward", margin=0.1, resamples=50).assign(key="k")
    some = extremes(run, table)
    some = some[some["method"] == METHODS[0]]
    assert list(some["place"]) == ["worst"] * 2 + ["best"] * 2
    assert not some.duplicated(["prompt", "seed"]).any()
    assert "The file is gone." in written(path, 50)


def test_protocol(html: str) -> None:
    for text in (
        "4 prompts, each with 2 seeds",
        "emoji-flux: 20",
        "emoji-flux: 3 of 3 rounds",
        "0.1, declared",
        "emoji-reward: 1 of 4",
        f"10 steps: seconds of {METHODS[0]}",
        "bit-identical to full in all 8 pictures",
        "torch 2.13.0",
        "Some CPU",
        "timing_rounds: 3",
        "BCa",
        "Holm",
    ):
        assert text in html
    assert 'class="doubt"' not in html


def test_findings_name_the_fastest_of_the_non_inferior(run: Path) -> None:
    table = pd.DataFrame(
        {
            "pipeline": "p",
            "method": ["full", "slow", "fast", "bad", "5 steps"],
            "kind": ["full", "method", "method", "method", "fewer steps"],
            "number": range(5),
            "non_inferior": [math.nan, True, True, False, False],
            "speedup": [1.0, 1.5, 2.0, 9.0, 4.0],
            "difference": -0.01,
            "comparable": True,
            "matched_difference": math.nan,
        }
    ).assign(speedup_low=1.0, speedup_high=3.0, low=-0.02, high=0.01)
    (text,) = page.findings(table, 0.1)
    assert "2 of 3 methods are non-inferior" in text and "fast (#2), measured speed-up 2.00" in text
    assert "bad" not in text and "5 steps" not in text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ["cache " + HOSTILE, "merge $a$ %s {{ 7*7 }}"], [HOSTILE, "b"], rounds=2)
    change(path, "results", lambda t: (t["method"] == "5 steps") & (t["seed"] == 1), error=f"ValueError: {HOSTILE}")
    html = written(path)
    assert "<script>document" not in html
    assert html.count("<script>") == 1
    assert "&lt;script&gt;document" in html and "{{ 7*7 }}" in html
    assert Table(html).by_method().keys() >= {"cache " + HOSTILE, "merge $a$ %s {{ 7*7 }}"}


def test_failures_are_listed(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", rounds=2)
    broken = ["emoji-reward", "squared_error", "psnr", "ssim", "picture"]
    change(path, "results", lambda t: t["method"] == METHODS[3], error="OutOfMemoryError: no room", **dict.fromkeys(broken))
    change(
        path,
        "results",
        lambda t: (t["method"] == METHODS[0]) & (t["prompt"] == "cactus"),
        error="ValueError: odd",
        **dict.fromkeys(broken),
    )
    change(path, "timing", lambda t: t["method"] == METHODS[3], error="OutOfMemoryError: no room")
    html = written(path)
    shown = Table(html).by_method()
    assert shown[METHODS[3]]["pictures"] == ["0", "8 failed"] and shown[METHODS[3]]["seconds"] == ["–"]
    assert shown[METHODS[0]]["pictures"] == ["6", "2 failed"]
    assert "10 pictures of 2 methods failed" in html
    assert re.search(rf"<b>{re.escape(METHODS[3])}</b>: 8 pictures, .*OutOfMemoryError: no room", html)
    assert re.search(rf"<b>{re.escape(METHODS[3])}</b>: 2 timing rounds, .*OutOfMemoryError: no room", html)
    assert re.search(rf"<b>{re.escape(METHODS[0])}</b>: 2 pictures, .*cactus.*ValueError: odd", html)


def test_doubts_come_first(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", rounds=2, maps=False)
    one = lambda t: (t["method"] == "no-op cache") & (t["prompt"] == "cactus") & (t["seed"] == 0)
    change(path, "results", one, squared_error=0.5)
    change(path, "timing", lambda t: t["method"] == METHODS[0], comparable=False)
    html = written(path)
    assert "the no-op cache is not bit-identical to full: 7 of 8 pictures are" in html
    assert html.index("not bit-identical") < html.index('<table id="results">')
    assert "in all 8 pictures" not in html
    assert "Processes shared a device while 1 method was timed" in html
    assert Table(html).by_method()[METHODS[0]]["speed-up, measured"][1].endswith("shared device")
    assert "There are no selection maps" in html and not (path / "report" / "selection-maps-00.png").exists()


def test_no_op_that_is_almost_identical(tmp_path: Path) -> None:
    """999 of 1000 are not all: nothing may round that to 100 %."""
    table = pd.DataFrame({"pipeline": ["p"], "kind": ["no-op"], "identical": [0.999], "compared": [1000], "failed": [0]})
    (text,) = page.doubts(table.assign(comparable=True), "")
    assert "999 of 1000" in text


def test_unfinished_run(tmp_path: Path) -> None:
    """What there is, and how much of what was asked; also before anything was timed, or compared with full."""
    path = make_run(tmp_path / "run", METHODS[:1])
    rows, times = (pd.read_parquet(path / f"{name}.parquet") for name in ("results", "timing"))
    for name in ("results", "timing"):
        (path / f"{name}.parquet").unlink()
    runner = CliRunner()
    nothing = runner.invoke(cli.app, ["report", str(path)])
    assert nothing.exit_code == 1 and "has no pictures yet" in nothing.output
    write_table(path / "rows" / "00-0000-00000.parquet", rows[rows["method"] == "full"].head(3))
    html = written(path)
    assert "This run is unfinished: 3 of 40 pictures." in html and html.index("unfinished") < html.index("<table")
    assert "not measured yet" in html
    write_table(path / "rows" / "00-0000-00001.parquet", rows[rows["method"] == "full"].tail(5))
    write_table(path / "rows" / "00-0002-00000.parquet", rows[rows["method"] == METHODS[0]].head(6))
    write_table(path / "timing" / "00-001.parquet", times[times["round"] == 1])
    html = written(path)
    assert "14 of 40 pictures" in html and "1 of 3 rounds" in html
    assert Table(html).by_method()[METHODS[0]]["difference to full"][0] != "–"


def test_rows_that_all_failed(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", METHODS[:1], maps=False)
    rows = pd.read_parquet(path / "results.parquet").assign(error="RuntimeError: x")
    bare = ["pipeline", "method", "kind", "cell", "prompt", "prompt_number", "seed", "error"]
    for name in ("results", "timing"):
        (path / f"{name}.parquet").unlink()
    write_table(path / "rows" / "00-0000-00000.parquet", rows[bare])
    html = written(path)
    assert "RuntimeError: x" in html and "<svg" not in html


def test_several_scores_and_pipelines(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", METHODS[:2], pipelines=("emoji-flux", "folder/my pipe"), scores=("a", "b"), rounds=2)
    html = written(path)
    rows = pd.read_parquet(path / "results.parquet")
    rows = rows[rows["pipeline"] == "folder/my pipe"]
    scores = rows.pivot_table(index="prompt", columns="method", values="b")
    row = Table(html).by_method()[METHODS[1]]  # the last pipeline's
    assert row["pipeline"] == ["folder/my pipe"]
    assert row["b"][0] == f"{scores[METHODS[1]].mean():.3f}"
    assert row["b: difference"][0] == f"{(scores[METHODS[1]] - scores['full']).mean():+.3f}"
    assert len(row["b: difference"]) == 2
    assert {file.name for file in (path / "report").glob("*-01.png")} == {
        f"{name}-01.png" for name in ("quality-latency", "latency-flops", "differences", "selection-maps")
    }
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_what_breaks_is_what_lies_below_full(tmp_path: Path) -> None:
    """By hand: c loses nothing for sure; b loses most of its interval's widths."""
    row = {"difference": -0.2, "low": -0.3, "high": -0.1}
    row |= {"1: difference": -0.1, "1: low": -0.11, "1: high": -0.09, "2: difference": -0.5, "2: low": -1.1, "2: high": 0.1}
    assert broken(row, ("a", "b", "c")) == ["b", "a"]
    unknown = {f"{prefix}{part}": math.nan for prefix in ("", "1: ") for part in ("difference", "low", "high")}
    assert broken(unknown, ("a", "b")) == []
    run = make_run(tmp_path / "run", prompts=MORE, scores=("emoji-reward", "other"))
    text = write_report(RunFolder(run), tmp_path / "out", RESAMPLES).read_text()
    assert ">breaks<" in text


def test_the_same_run_makes_the_same_files(run: Path, tmp_path: Path) -> None:
    write_report(RunFolder(run), tmp_path, RESAMPLES)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (run / "report" / file.name).read_bytes(), file.name


def test_command(tmp_path: Path) -> None:
    runner = CliRunner()
    path = make_run(tmp_path / "run", METHODS[:1], rounds=1)
    done = runner.invoke(cli.app, ["report", str(path), "--output", str(tmp_path / "here")])
    assert done.exit_code == 0, done.output
    assert Path(done.output.strip()) == tmp_path / "here" / "index.html" and Path(done.output.strip()).is_file()
    missing = runner.invoke(cli.app, ["report", str(tmp_path)], env={"COLUMNS": "240"})
    assert missing.exit_code == 2 and "is no run" in missing.output
    assert "FileNotFoundError" not in missing.output


def test_help_needs_none_of_the_libraries() -> None:
    code = "import dit_accel.eval.cli, sys; sys.exit(bool({'torch', 'matplotlib', 'pandas', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_series() -> None:
    assert (
        drawing.series("cache selector=drift interval=3 stride=2x2 cache_ratio=0.9 + merge ratio=0.5")
        == "cache selector=drift + merge"
    )
    assert drawing.series("cache preset=toca") == "cache preset=toca"


def test_against_any_method(tmp_path: Path) -> None:
    """The differences are those of the rows, prompt by prompt, and nothing is compared with itself."""
    run = make_run(tmp_path / "run", prompts=MORE, pipelines=("emoji-flux", "emoji-pixart"))
    report = ["report", str(run), "--output", str(tmp_path / "out"), "--against"]
    assert CliRunner().invoke(cli.app, [*report, METHODS[3], "--against", "10 steps"]).exit_code == 0
    found, rows = pd.read_csv(tmp_path / "out" / "against.csv"), read_run(RunFolder(run)).rows
    assert set(found["against"]) == {METHODS[3], "10 steps"} and set(found["value"]) == {"emoji-reward", "ssim"}
    assert not (found["method"] == found["against"]).any() and (found["n"] == len(MORE)).all()
    for row in found.itertuples():
        own = rows[rows["pipeline"] == row.pipeline].set_index(["method", "prompt", "seed"])[row.value]
        by_hand = (own[row.method] - own[row.against]).groupby("prompt").mean()
        assert row.difference == pytest.approx(by_hand.mean()) and row.low <= row.difference <= row.high
    html = (tmp_path / "out" / "index.html").read_text()
    assert html.count('aria-label="Against') == 4
    assert page.signed(found["difference"].iloc[0], "+.3f") in html
    wrong = CliRunner().invoke(cli.app, [*report, "10 step"])
    assert wrong.exit_code == 2 and "did you mean '10 steps'" in " ".join(wrong.output.split())


def test_labels_keep_apart() -> None:
    places = np.random.default_rng(0).uniform(20, 280, (40, 2))
    texts = [str(i) for i in range(40)]
    moves = drawing.labels_apart(places, texts, np.array([0.0, 0.0, 300.0, 300.0]), [])
    centres = places + np.array(moves)
    for i in range(40):
        for j in range(i):
            assert abs(centres[i, 1] - centres[j, 1]) > 9 or abs(centres[i, 0] - centres[j, 0]) > 3 * (
                len(texts[i]) + len(texts[j])
            )


@pytest.mark.parametrize("seed", range(5))
def test_labels_of_48_methods_keep_apart_where_most_of_them_crowd(seed: int) -> None:
    """Most methods score about as the uncached pipeline does. No label covers a label or a point, and none leaves the frame."""
    rng = np.random.default_rng(seed)
    high = np.where(rng.random(48) < 0.6, rng.uniform(200, 235, 48), rng.uniform(50, 235, 48))
    places, frame = np.column_stack([rng.uniform(60, 290, 48), high]), np.array([40.0, 40.0, 300.0, 240.0])
    texts = [str(i) for i in range(48)]
    centers = places + np.array(drawing.labels_apart(places, texts, frame, []))
    half = np.array([[3.2 * len(text), 4.9] for text in texts])
    assert (centers - half >= frame[:2]).all() and (centers + half <= frame[2:]).all()
    for i in range(48):
        others = np.delete(np.arange(48), i)
        assert (np.abs(centers[others] - centers[i]) >= half[others] + half[i]).any(axis=1).all()
        assert (np.abs(places - centers[i]) >= half[i] + 4).any(axis=1).all()


def test_intervals_that_an_axis_cuts_are_marked(run: Path) -> None:
    """Bars that reach far beyond all points are cut by the axis: an arrowhead at its limit points to where they go on."""
    number = dict(pipeline="p", kind="method", comparable=True, pareto=False, seconds_low=math.nan, seconds_high=math.nan)
    part = pd.DataFrame(
        [
            {**number, "method": "full", "kind": "full", "seconds": 2.0, "score": 1.0, "difference": 0.0, "low": 0.0, "high": 0.0},
            {**number, "method": "a", "seconds": 1.0, "score": 0.9, "difference": -0.1, "low": -9.0, "high": 0.0},
            {**number, "method": "b", "seconds": 1.5, "score": 0.95, "difference": -0.05, "low": -0.06, "high": -0.04},
            {**number, "method": "c", "seconds": 1.2, "score": 0.92, "difference": -0.08, "low": -0.09, "high": 7.0},
        ]
    ).assign(number=range(4), key=list("0abc"))
    with drawing.style():
        found = figures.quality_latency("q", part, 0.1, "score").svg
        wide = figures.quality_latency("q", part.assign(low=part["difference"], high=part["difference"]), 0.1, "score").svg
    assert re.findall(r'data-method="(\w)" data-part="cut"', found) == ["a", "c"] and 'data-part="cut"' not in wide
    axes = Figure().add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    for bar, flat in (([-1, 2], False), ([0.5, 3], True), ([0.2, 0.4], True)):
        drawing.mark_cuts(axes, bar, 0.3, flat)
    assert [(*line.get_xydata()[0], line.get_marker()) for line in axes.lines] == [(0.3, 0, "v"), (0.3, 1, "^"), (1, 0.3, ">")]


def test_cuts_are_explained_where_there_are_any(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", METHODS[:2], maps=False, pictures=False, rounds=1)
    assert ("Arrowheads" in (html := written(path))) == ('data-part="cut"' in html)
    odd = lambda t: (t["method"] == METHODS[0]) & (t["prompt"] == "crab, 3d style")
    change(path, "results", odd, **{"emoji-reward": -30.0})
    html = written(path)
    assert 'data-part="cut"' in html and html.count("Arrowheads: the interval goes on beyond the axis.") == 1


def test_many_prompts_are_an_outline() -> None:
    part = pd.DataFrame({"pipeline": "p", "method": ["a"], "kind": "method", "number": 0, "key": "0-0", "difference": 0.0})
    table = pd.DataFrame({"a": np.linspace(-1, 1, figures.DOTS + 1)}).rename_axis("prompt")
    with drawing.style():
        for values in (table, table.iloc[1:]):
            found = figures.differences("d", part.assign(low=-0.1, high=0.1), values, 0.1, "score")
            drawn = found.svg[found.svg.index('data-part="dots"') : found.svg.index('data-part="bar"')]
            assert drawn.count("<use") == (len(values) if len(values) <= figures.DOTS else 1)
            assert len(found.table) == len(values)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("no chromium on the path: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, run: Path) -> Iterator[Any]:
    """The page of the ordinary run, at the width of a desktop; fails where anything else is loaded or an error is logged."""
    yield from visited(browser, run, 1280)


def visited(browser: Any, run: Path, width: int) -> Iterator[Any]:
    tab = browser.new_context(viewport={"width": width, "height": 800}, offline=True).new_page()
    loaded, errors = [], []
    tab.on("request", lambda request: loaded.append(request.url))
    tab.on("console", lambda message: errors.append(message.text))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    address = (run / "report" / "index.html").resolve().as_uri()
    tab.goto(address)
    yield tab
    assert [url for url in loaded if not url.startswith("data:")] == [address]
    assert not errors
    tab.close()


VISIBLE = """selector => [...document.querySelectorAll(selector)].filter(e => e.matches('[data-method]'))
  .map(e => e.getBoundingClientRect()).filter(b => b.width + b.height > 0).length"""


def test_plots_are_drawn(opened: Any) -> None:
    sizes = opened.evaluate(
        "[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect()).map(b => [b.width, b.height])"
    )
    assert len(sizes) == 4 and all(width > 250 and height > 100 for width, height in sizes)
    cells = len(METHODS) + 4
    for figure, part, wanted in (
        ("quality-latency-00", "point", cells),
        ("quality-latency-00", "label", cells),
        ("latency-flops-00", "point", cells),
        ("differences-00", "dots", cells - 2),
        ("selection-maps-00", "map", 3),
    ):
        assert opened.evaluate(VISIBLE, f"#{figure} [data-part={part}]") == wanted
    loaded = opened.evaluate("[...document.images].every(e => e.complete && e.naturalWidth > 0)")
    assert loaded and opened.evaluate("document.images.length") > 0
    assert opened.evaluate("document.querySelector('#quality-latency-00 [data-method] title').textContent") == "full"


def test_filters(opened: Any) -> None:
    points, dots = "#quality-latency-00 [data-part=point]", "#differences-00 [data-part=dots]"
    rows, maps, folds = "#results tr", "#selection-maps-00 [data-part=map]", "details"
    counts = lambda: [opened.evaluate(VISIBLE, selector) for selector in (rows, points, dots, maps, folds)]
    assert counts() == [8, 8, 6, 3, 6]
    opened.fill("#search", "drift INTERVAL=5")
    assert counts() == [1, 1, 1, 1, 1]
    assert opened.text_content("#shown") == "1 of 8 shown"
    opened.fill("#search", "")
    opened.uncheck("[value='fewer steps']")
    assert counts() == [6, 6, 4, 3, 4]
    opened.uncheck("[value=method]")
    assert counts() == [2, 2, 0, 0, 0]
    opened.check("[value=method]")
    opened.check("[value='fewer steps']")
    assert counts() == [8, 8, 6, 3, 6]


def test_filter_by_pipeline(browser: Any, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", METHODS[:1], pipelines=("one", "two"), rounds=1)
    written(path, 50)
    for tab in visited(browser, path, 1280):
        tab.uncheck("[name=pipeline][value='0']")
        assert not tab.is_visible("#quality-latency-00") and tab.is_visible("#quality-latency-01")
        assert tab.evaluate(VISIBLE, "#results tr") == 5
        assert {row.inner_text() for row in tab.locator("#results tbody tr:visible td:nth-child(3)").all()} == {"two"}


def test_sorting(opened: Any) -> None:
    def column(heading: str) -> list[str]:
        opened.click(f"#results th button:text-is('{heading}')")
        place = opened.evaluate(
            "h => [...document.querySelectorAll('#results th')].findIndex(e => e.innerText.startsWith(h))", heading
        )
        return opened.evaluate(
            "i => [...document.querySelectorAll('#results tbody tr')].map(r => r.children[i].dataset.order)", place
        )

    seconds = list(map(float, column("seconds")))
    assert seconds == sorted(seconds) and seconds == list(map(float, column("seconds")))[::-1]
    differences = column("difference to full")
    assert differences[-2:] == ["", ""] and list(map(float, differences[:-2])) == sorted(map(float, differences[:-2]))
    assert column("difference to full")[-2:] == ["", ""]  # nothing measured stays last
    names = column("method")
    assert names[0] == "10 steps" and names[-1] == "no-op cache"
    assert opened.get_attribute("#results th[aria-sort]", "aria-sort") == "ascending"


def test_pictures_enlarge_and_a_slider_compares_them_with_the_baseline(opened: Any, run: Path) -> None:
    """Pixel by pixel of what is on the screen: to the left of the boundary the baseline, to its right the method."""
    pair = opened.locator(".pair").first
    rows = pd.read_csv(run / "report" / "pictures.csv")
    first = rows[(rows["method"] == METHODS[0]) & (rows["place"] == "worst")].iloc[0]
    Image.new("RGB", (16, 16), "red").save(buffer := io.BytesIO(), "PNG")
    red = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    baseline = Image.open(run / first["picture_full"]).convert("RGB").getpixel((8, 8))
    pair.locator("img").first.evaluate("(image, red) => image.src = red", red)
    small = pair.locator("img").first.bounding_box()
    pair.locator("button").first.click()
    stack = opened.locator("#viewer .stack")
    large = stack.bounding_box()
    assert large["width"] > 2 * small["width"] and f"{first['prompt']}, seed {first['seed']}" in opened.inner_text("#viewed")

    def seen(share: float) -> tuple[int, ...]:
        with Image.open(io.BytesIO(stack.screenshot())) as shown:
            return shown.convert("RGB").getpixel((round(share * shown.width), shown.height // 2))

    for place in (50, 20, 90):
        if place != 50:
            opened.evaluate(
                "v => { const s = document.getElementById('slider'); s.value = v; s.dispatchEvent(new Event('input')); }", place
            )
        left, right = seen(place / 100 - 0.08), seen(place / 100 + 0.08)
        assert right == (255, 0, 0) and max(abs(a - b) for a, b in zip(left, baseline, strict=True)) < 12
    opened.focus("#slider")
    opened.keyboard.press("Home")
    assert seen(0.04) == (255, 0, 0), "from the keyboard, too"
    opened.keyboard.press("Escape")
    assert not opened.is_visible("#viewer")
    pair.locator("button").last.click()
    opened.click("#viewer button")
    assert not opened.is_visible("#viewer")


def test_a_picture_whose_baseline_is_gone_enlarges_alone(browser: Any, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", METHODS[:1], PROMPTS[:2], rounds=1)
    shutil.rmtree(path / "pictures" / "00" / "00")  # of full
    written(path, 50)
    for tab in visited(browser, path, 1280):
        tab.locator(".pair button").first.click()
        assert tab.locator("#viewer .stack img").count() == 1 and tab.is_visible("#viewer .stack img")
        assert not tab.is_visible("#slider")


def test_tables_say_that_they_scroll(browser: Any, run: Path) -> None:
    """At a width that the table does not fit, until its end is reached; not where all of it is seen."""
    hint, box = ".hint:has(+ [aria-label=Results])", "[aria-label=Results]"
    for tab in visited(browser, run, 700):
        assert tab.is_visible(hint) and "Scroll sideways" in tab.inner_text(hint)
        assert "more" in tab.get_attribute(box, "class")
        tab.evaluate("box => document.querySelector(box).scrollLeft = 1e6", box)
        tab.wait_for_function("box => !document.querySelector(box).classList.contains('more')", arg=box)
    for tab in visited(browser, run, 4000):
        tab.add_style_tag(content="body { max-width: none !important; }")
        tab.wait_for_function("hint => document.querySelector(hint).hidden", arg=hint)
        assert "more" not in tab.get_attribute(box, "class")


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_overflows(browser: Any, run: Path, width: int) -> None:
    for tab in visited(browser, run, width):
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        edges = tab.evaluate(
            "[...document.querySelectorAll('body > *, figure, details, dd')].map(e => e.getBoundingClientRect().right)"
        )
        assert max(edges) <= width
        sizes = tab.evaluate("[...document.querySelectorAll('figure svg text')].map(e => e.getBoundingClientRect().height)")
        assert min(size for size in sizes if size) >= 10
        heights = tab.evaluate("[...document.querySelectorAll('#results td')].map(e => parseFloat(getComputedStyle(e).fontSize))")
        assert min(heights) >= 12


def test_hostile_names_in_a_browser(browser: Any, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ["cache " + HOSTILE], [HOSTILE, "b"], rounds=1)
    written(path, 50)
    for tab in visited(browser, path, 1280):
        assert tab.title() == "run: quality against speed"
        assert tab.evaluate("document.scripts.length") == 1
