"""The table of merged steps says what the records say."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from input_merge import page, settings  # noqa: E402


def test_the_table_is_what_the_records_give(tmp_path):
    copy = tmp_path / "model-scope.md"
    copy.write_text((ROOT / "docs" / "model-scope.md").read_text())
    page(ROOT / "docs" / "data" / "input-merge.json", copy)
    assert copy.read_text() == (ROOT / "docs" / "model-scope.md").read_text()


def test_the_first_full_steps_of_a_recipe_are_merged():
    found = {label: config for label, config, side in settings("emoji-flux") if side == 1}
    plain, half = (found[f"recipe for 4x, {merged} of 6 full steps merged"] for merged in (0, 3))
    assert plain.merged_steps is None and half.merged_steps == half.full_steps[:3] and half.full_steps == plain.full_steps
