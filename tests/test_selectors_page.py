"""The page of the selector comparison says what its records say, and these what their pictures' rows say."""

from __future__ import annotations

import json
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
    assert (sizes == sizes["full"]).all() and sizes["full"] == 330 and rows.groupby("prompt")["seed"].nunique().eq(3).all()
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


def test_rows_of_other_prompts_are_added(tmp_path, monkeypatch):
    """A record is cut in two runs with other prompts: the second is added to the first, unless it was made otherwise."""
    whole, values = pd.read_parquet(RECORDS[0].with_suffix(".parquet")), json.loads(RECORDS[0].read_text())
    monkeypatch.setattr(comparison, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    record = tmp_path / "data" / RECORDS[0].name
    record.write_text(json.dumps(values))
    first = whole["prompt"].isin(whole["prompt"].unique()[::2])
    whole[first].to_parquet(record.with_suffix(".parquet"))

    def run(name: str, rows: pd.DataFrame, **changes: object) -> Path:
        begun = {"spec": {"pipelines": [values["pipeline"]], "scores": [values["score"]], "margin": values["margin"]}}
        begun |= {"resolved": values["resolved"], "versions": values["versions"], "labels": {}, "batches": []} | changes
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").write_text(json.dumps(begun))
        rows.assign(pipeline=values["pipeline"], kind="cache").to_parquet(tmp_path / name / "results.parquet")
        return tmp_path / name

    comparison.keep([run("rest", whole[~first])])
    order = ["method", "prompt", "seed"]
    added = pd.read_parquet(record.with_suffix(".parquet")).sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(added, whole.sort_values(order, ignore_index=True))
    assert json.loads(record.read_text()) == values

    other = whole[~first].assign(prompt="another " + whole["prompt"])
    with pytest.raises(ValueError, match="differ in versions"):
        comparison.keep([run("newer", other, versions=values["versions"] | {"torch": "3.0"})])
    with pytest.raises(ValueError, match="differ in their methods"):
        comparison.keep([run("fewer", other[other["method"] != "full"])])
