"""The page of the selector comparison says what its records say, and these what their pictures' rows say."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pandas as pd
import pytest

DOCS = Path(__file__).parents[1] / "docs"
sys.path.append(str(DOCS))

import comparison  # noqa: E402

RECORDS = sorted((DOCS / "data" / "selectors").glob("*.json"))
AGED = re.compile(r"selector=(?P<selector>\S+) age_weight=(?P<age>\S+)")


def test_the_tables_are_what_the_records_give(tmp_path):
    copy = tmp_path / "selectors.md"
    copy.write_text((DOCS / "selectors.md").read_text())
    comparison.page(copy, figures=False)
    assert copy.read_text() == (DOCS / "selectors.md").read_text() and RECORDS


@pytest.mark.slow
def test_the_figures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "FIGURES", tmp_path)
    copy = tmp_path / "selectors.md"
    copy.write_text((DOCS / "selectors.md").read_text())
    comparison.page(copy)
    scopes = {path.stem.split("-")[0] for path in RECORDS}
    drawn = {f"selectors-{name}-{scope}.png" for name in ("against-random", "coverage") for scope in scopes}
    assert {path.name for path in tmp_path.glob("*.png")} == drawn
    assert all(
        f"](figures/{path.name})" in copy.read_text() and (DOCS / "figures" / path.name).exists() for path in tmp_path.glob("*.png")
    )


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_figures_are_those_of_the_pictures(record):
    """By hand, from the rows: means over seeds, decibels of a prompt's mean error, and differences between prompts."""
    rows, (scope, pipeline) = pd.read_parquet(record.with_suffix(".parquet")), record.stem.split("-", 1)
    page, minus = (DOCS / "selectors.md").read_text(), str.maketrans("−", "-", "*")
    sizes = rows.groupby("method").size()
    assert (sizes == sizes["full"]).all() and sizes["full"] >= 100 and rows.groupby("prompt")["seed"].nunique().eq(3).all()
    mean = rows.groupby(["method", "prompt"])[["squared_error", "emoji-reward"]].mean().unstack("method")
    score, likeness = mean["emoji-reward"], mean["squared_error"].map(lambda error: 10 * math.log10(255**2 / (error or math.nan)))
    methods = {}
    for name in score:
        if found := AGED.search(name):
            methods[int(re.search(r"interval=(\d+)", name)[1]), found["selector"], found["age"]] = name
    assert len(methods) == 2 * 7 * 2

    for interval in (3, 6):
        table = page.split(f"<!-- {scope} {pipeline} {interval} -->\n")[1].split("\n<!-- end")[0].translate(minus).splitlines()[2:]
        cells = {line.split("|")[1].strip(" `"): [cell.strip() for cell in line.split("|")[2:]] for line in table}
        assert len(cells) == 8 and set(cells) - {"nothing"} == {selector for _, selector, _ in methods}
        random = methods[interval, "random", "0"]
        for selector, row in cells.items():
            if selector != "nothing":
                name = methods[interval, selector, "0"]
                assert float(row[0]) == pytest.approx(likeness[name].mean(), abs=0.006)
                assert float(row[2].split()[0]) == pytest.approx((score[name] - score["full"]).mean(), abs=6e-4)
                if selector != "random":
                    assert float(row[1].split()[0]) == pytest.approx((likeness[name] - likeness[random]).mean(), abs=0.006)
                    assert float(row[3].split()[0]) == pytest.approx((score[name] - score[random]).mean(), abs=6e-4)
    for line in page.split(f"<!-- {scope} {pipeline} age -->\n")[1].split("\n<!-- end")[0].translate(minus).splitlines()[2:]:
        interval, selector, closer, better, *_ = (cell.strip(" `") for cell in line.split("|")[1:])
        without, aged = (methods[int(interval), selector, age] for age in ("0", "0.25"))
        assert float(closer.split()[0]) == pytest.approx((likeness[aged] - likeness[without]).mean(), abs=0.006)
        assert float(better.split()[0]) == pytest.approx((score[aged] - score[without]).mean(), abs=6e-4)
