"""The page on what compression breaks says what its records say, and these what their pictures' rows say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

DOCS = Path(__file__).parents[1] / "docs"
sys.path.append(str(DOCS))

import comparison  # noqa: E402
from comparison import ASPECTS, compression  # noqa: E402

RECORDS = sorted((DOCS / "data" / "compression").glob("*.csv"))


def test_the_tables_are_what_the_records_give(tmp_path):
    copy = tmp_path / "compression.md"
    copy.write_text((DOCS / "compression.md").read_text())
    compression(None, copy)
    assert copy.read_text() == (DOCS / "compression.md").read_text() and RECORDS


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_differences_are_those_of_the_pictures(record):
    """By hand: the same prompts with a method and without, where the prompt asks for it."""
    table, rows = pd.read_csv(record).set_index("method"), pd.read_parquet(record.with_suffix(".parquet"))
    full = rows[rows["method"] == "full"].set_index("prompt")
    for method, made in rows.groupby("method"):
        assert len(made) == len(full) and made["prompt"].is_unique
        if method != "full":
            for i, score in enumerate(ASPECTS):
                lost = (made.set_index("prompt")[score] - full[score]).dropna()
                column = f"{i}: difference" if i else "difference"
                assert 0 < len(lost) <= len(full) and table.loc[method, column] == pytest.approx(lost.mean(), abs=1e-6)


def test_rows_of_other_prompts_are_added(tmp_path, monkeypatch):
    """A record is cut in two: what is kept and a run with other prompts, added to it, give the differences of the whole."""
    names = ["full", "7 steps", "recipe speedup=2"]
    whole = pd.read_parquet(RECORDS[0].with_suffix(".parquet")).query("method in @names")
    table = pd.read_csv(RECORDS[0]).set_index("method").loc[names].reset_index()
    monkeypatch.setattr(comparison, "HERE", tmp_path)
    monkeypatch.setattr(comparison, "RESAMPLES", 100)
    (kept := tmp_path / "data" / "compression").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (page := tmp_path / "compression.md").write_text((DOCS / "compression.md").read_text())

    first, [pipeline] = whole["prompt"].isin(whole["prompt"].unique()[::2]), table["pipeline"].unique()
    whole[first].to_parquet(kept / f"{pipeline}.parquet")
    made = whole[~first].merge(table[["pipeline", "method", "kind"]]).assign(cell="", error=None, ssim=1.0)
    made.to_parquet(tmp_path / "run" / "results.parquet")
    costs = ["pipeline", "method", "kind", "seconds", "flops", "cache_bytes", "peak_memory"]
    times = table[costs].assign(round=1, comparable=True, cell="", error=None, denoising_seconds=table["seconds"])
    times.to_parquet(tmp_path / "run" / "timing.parquet")
    spec = {"pipelines": [pipeline], "scores": list(ASPECTS), "margin": 0.1, "seeds": 1}
    spec["prompts"] = list(made["prompt"].unique())
    begun = {"spec": spec, "resolved": {}, "versions": {}, "labels": {}, "batches": []}
    (tmp_path / "run" / "spec.json").write_text(json.dumps(begun))

    compression([tmp_path / "run"], page, add=True)
    order = ["method", "prompt", "seed"]
    added = pd.read_parquet(kept / f"{pipeline}.parquet").sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(added, whole.sort_values(order, ignore_index=True))
    now = pd.read_csv(kept / f"{pipeline}.csv").set_index("method").loc[names].reset_index()
    columns = ["pictures", "score", "psnr", "seconds", *(f"{i}: difference" if i else "difference" for i in range(len(ASPECTS)))]
    pd.testing.assert_frame_equal(now[columns], table[columns])
