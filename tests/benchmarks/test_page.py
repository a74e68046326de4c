"""The page says what the records say, and the arithmetic in between is right."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from page import overhead_rows, quantized_rows, recipe_tables, render, spans, summary_for_readme, verdicts  # noqa: E402
from quality import chosen  # noqa: E402
from recording import fast_dtype, renew  # noqa: E402
from width import extrapolated, flux_dev, summary  # noqa: E402

from dit_accel.recipe import SHIPPED  # noqa: E402


@pytest.fixture(scope="module")
def rendered():
    return render(ROOT / "docs" / "data" / "benchmarks")


def test_the_page_is_what_the_records_give(rendered):
    """No number of it was typed by hand, and none is of an earlier record."""
    assert rendered[0] == (ROOT / "docs" / "benchmarks.md").read_text()


def test_ours_and_the_best_of_the_others_are_compared_on_all_their_pictures(rendered):
    """Those of the comparison at the top are more than those that every method made."""
    for quality in rendered[2]:
        rows, lead = quality.rows, quality.leaders
        pairs = rows.groupby("method").apply(lambda some: set(zip(some["prompt"], some["seed"], strict=True)))
        assert (lead["pictures"] == len(set.intersection(*pairs[lead.index]))).all()
        assert (quality.table["pictures"] == len(set.intersection(*pairs[quality.table.index]))).all()
        for row in quality.bests["decibels"]:
            own = rows[rows["method"] == row["ours"].name]
            own = own[[pair in set.intersection(*pairs[lead.index]) for pair in zip(own["prompt"], own["seed"], strict=True)]]
            assert row["ours"]["decibels"] == pytest.approx(own["psnr"].clip(upper=60).groupby(own["prompt"]).mean().mean())


def test_the_recipes_that_ship_say_what_was_measured_of_them(rendered):
    """On all pictures of the comparison; those for 6x are not in it. Their page has the same."""
    for quality in rendered[2]:
        for one in json.loads((SHIPPED / f"{quality.name}.json").read_text())["recipes"]:
            if (label := f"recipe speedup={one['speedup']:g}") in quality.leaders.index:
                own = quality.leaders.loc[label]
                assert one["measured"]["psnr"][0] == pytest.approx(own["decibels"], abs=0.01)
                assert one["measured"]["seconds"] == pytest.approx(own["speedup"], abs=0.03)
                assert one["measured"]["pictures"] == own["pictures"]
            else:
                assert one["speedup"] == 6
    assert "\n".join(recipe_tables(rendered[2])) in (ROOT / "docs" / "recipes.md").read_text()


def test_the_table_of_the_readme_is_what_the_records_give(rendered):
    assert "\n".join(summary_for_readme(rendered[2])) in (ROOT / "README.md").read_text()


def test_only_what_lies_between_the_marks_is_renewed(tmp_path):
    page = tmp_path / "page.md"
    other, ends = "<!-- made by b -->\nkept\n<!-- end -->\n", "<!-- made by a -->\n\n{}\n\n<!-- end -->\nafter <!-- end -->\n"
    page.write_text(other + ends.format("old"))
    renew(page, "a", ["new", "lines"])
    assert page.read_text() == other + ends.format("new\nlines")
    renew(page, "c", ["nothing"])
    assert "nothing" not in page.read_text()


def test_the_page_names_the_interval_that_is_used(tmp_path):
    """Of fewer than a hundred prompts it is another one."""
    shutil.copytree(ROOT / "docs" / "data" / "benchmarks", tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("quality-*.parquet"):
        rows = pd.read_parquet(file)
        rows[rows["prompt"].isin(rows["prompt"].unique()[:20])].to_parquet(file)
    assert "seeds averaged: the wider of Student's t and the bootstrap-t), bold" in render(tmp_path)[0]


def test_the_page_says_what_was_computed_in(tmp_path):
    for name in ("width.json", "growth.json", "overhead.json"):
        record = (ROOT / "docs" / "data" / "benchmarks" / name).read_text()
        (tmp_path / name).write_text(record.replace('"bfloat16"', '"float32"'))
    text = render(tmp_path)[0]
    assert "with random weights in float32:" in text
    assert "of FLUX.1 at full width, float32;" in text
    assert "Steps of the embedded pipelines in float32," in text


@pytest.mark.parametrize("capability, dtype", [("AVX512", "bfloat16"), ("AVX2", "float32"), ("DEFAULT", "float32")])
def test_without_instructions_for_bfloat16_real_width_is_measured_in_float32(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert fast_dtype() == dtype


def test_pictures_of_a_setting_that_is_no_longer_chosen_are_left_out(tmp_path):
    """A search made anew leaves them behind: there are pictures of it, and no times."""
    shutil.copytree(ROOT / "docs" / "data" / "benchmarks", tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("quality-*.parquet"):
        rows = pd.read_parquet(file)
        pd.concat([rows, rows[rows["method"] != "full"].head(48).assign(method="recipe speedup=7")]).to_parquet(file)
    assert render(tmp_path)[0] == (ROOT / "docs" / "benchmarks.md").read_text()


def test_the_closest_setting_that_reaches_a_speed_is_chosen():
    def row(method: str, n: int, psnr: float, *speedups: float) -> dict:
        return {"method": method, "setting": {"n": n}, "speedups": speedups, "psnr": [psnr - 1, psnr + 1]}

    rows = [row("a", 1, 50, 1.2, 1.3, 9.0), row("a", 2, 30, 1.45, 1.46, 1.47), row("a", 3, 20, 2.9, 3.2, 3.1)]
    found = chosen([*rows, row("a", 4, 21, 2.1, 2.2, 2.3), row("b", 1, 60, 1.1, 1.2, 1.3)])
    assert [(one["setting"]["n"], one["targets"]) for one in found["a"]] == [(2, [1.5]), (4, [2.0]), (3, [2.5, 3.0])]
    steps = [row("fewer steps", 7, 26, 2.92), row("fewer steps", 6, 25, 3.4), row("fewer steps", 5, 23, 4.0)]
    few = chosen(steps)["fewer steps"]  # of 3x, those that nearly reach it, and those that surely do
    assert [(one["setting"]["n"], one["targets"]) for one in few] == [(7, [1.5, 2.0, 2.5, 3.0]), (6, [3.0]), (5, [4.0])]
    assert found["b"] == []


def test_bytes_at_another_depth_and_size():
    """A cache of 7 bytes, 2 a block, 3 a token, and 5 for each token of each block: exact at any depth and size."""

    def held(units: int, tokens: int) -> int:
        return 7 + 2 * units + 3 * tokens + 5 * units * tokens

    corners = {(u, n): held(u, n) for u in (1, 2) for n in (64, 256)}
    assert extrapolated(corners, 19, 4096) == pytest.approx(held(19, 4096), rel=1e-12)
    rows = [{"method": "cache", "by": "x", "units": u, "tokens": n, "held_bytes": held(u, n) + 100} for u, n in corners]
    rows += [{"method": "fewer steps", "by": "stock", "units": u, "tokens": n, "held_bytes": 100} for u, n in corners]
    assert flux_dev(rows) == {"cache": ("x", pytest.approx(held(19, 4096))), "fewer steps": ("stock", 0)}


def test_efficiency_compares_with_the_runs_in_full_of_the_same_round():
    def row(number: int, method: str, seconds: float, flops: int) -> dict:
        sizes = {"peak_bytes": 0, "held_bytes": 0}
        return {"model": "flux", "pixels": 512, "round": number, "method": method, "setting": {}, **sizes} | {
            "seconds": seconds,
            "flops": flops,
        }

    rows = [row(0, "full", 9.0, 100), row(0, "cache", 5.0, 25), row(0, "full", 11.0, 100)]
    rows += [row(1, "full", 20.0, 100), row(1, "cache", 10.0, 25), row(1, "full", 20.0, 100)]
    found = {one["method"]: one for one in summary(rows)}["cache"]
    assert found["speedup"] == 2.0 and found["flops_ratio"] == 4.0 and found["efficiency"] == 0.5
    assert {one["method"]: one for one in summary(rows)}["full"]["speedup"] == 1


def test_a_part_of_a_stock_step_is_that_of_the_same_process():
    """The machine was twice as slow in the second process, which is no gain of either."""

    def row(kind: str, checkout: str, *seconds: float) -> dict:
        same = {"pipeline": "p", "step": "full", "matrix_seconds": [], "operators": []}
        return same | {"kind": kind, "checkout": checkout, "seconds": list(seconds)}

    rows = [row("stock", "before", 1.0, 2.0), row("random", "before", 0.5, 1.0)]
    rows += [row("stock", "now", 2.0, 4.0), row("random", "now", 0.5, 1.0)]
    random = next(one for one in overhead_rows(rows) if one["kind"] == "random")
    assert random["before"]["share"] == 0.5 and random["now"]["share"] == 0.25
    assert random["before"]["ms"] == random["now"]["ms"] == 750


def test_loops_that_left_nothing_out_say_how_far_times_differ_by_themselves():
    def row(method: str, seconds: float, flops: int, pixels: int = 512) -> dict:
        return {"model": "flux", "pixels": pixels, "method": method, "seconds": seconds, "flops": flops}

    rows = [row("cache", 2.0, 500), row("idle cache", 8.0, 999), row("full", 9.0, 1000), row("full", 10.0, 1000)]
    rows += [row("full", 3.0, 400, pixels=256)]
    assert spans(rows) == {("flux", 512): (8.0, 10.0), ("flux", 256): (3.0, 3.0)}


def test_losses_that_add_up_are_sums_of_squared_errors():
    """By hand: int8 alone is off by 1e-4, the recipe alone by 3e-4, both by 9e-4, and by 5e-4 from the picture of int8 alone."""
    errors = {("float32", 1.0): (0, 0), ("float32", 3.0): (3e-4, 3e-4), ("int8", 1.0): (1e-4, 0), ("int8", 3.0): (9e-4, 5e-4)}
    rows = [
        {"pipeline": "p", "prompt": prompt, "numbers": n, "speed": speed, "to_float32": far * 255**2, "to_its_own": own * 255**2}
        | {"emoji-reward": 1.0 - 100 * far + 0.001 * i * (n == "int8")}
        for i, prompt in enumerate("abcdef")
        for (n, speed), (far, own) in errors.items()
    ]
    found = {(row["numbers"], row["speed"]): row for row in quantized_rows(rows)}
    assert set(found) == set(errors) - {("float32", 1.0)}
    both = found["int8", 3.0]
    assert both["psnr"].mean == pytest.approx(-10 * math.log10(9e-4)) and both["own"].mean == pytest.approx(-10 * math.log10(5e-4))
    assert both["added"].mean == pytest.approx(-10 * math.log10(4e-4)) and both["score"].mean == pytest.approx(-0.0875)


def test_verdicts_are_those_of_the_intervals_and_of_speeds_that_both_reach():
    intervals = [(-0.3, -0.1), (-0.2, -0.1), (-0.1, 0.1), (0.1, 0.2)]
    best = [{"target": 1}, *({"against": {"low": low, "high": high}} for low, high in intervals)]
    assert verdicts(best, "psnr") == "farther at 2, not told apart at 1, closer at 1 of 4 speeds"
    assert verdicts(best, "score") == "worse at 2, not told apart at 1, better at 1 of 4 speeds"
