"""The page on what compression breaks says what its records say, and these what their pictures' rows say."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

DOCS = Path(__file__).parents[1] / "docs"
sys.path.append(str(DOCS))

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
