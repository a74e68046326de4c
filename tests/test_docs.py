"""The examples of the documentation run, from top to bottom of each page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)):
        exec(compile(code, f"{page.name}, example {number + 1}", "exec"), names)
    said = capsys.readouterr().out
    assert said and ("partial" in said) == ("dit_accel.report(" in page.read_text())


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "samples").glob("*.md")], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_selector_is_explained():
    import dit_accel

    text = (ROOT / "docs/token-caching.md").read_text()
    for name in dit_accel.selectors():
        assert f"| `{name}` |" in text and f'selector="{name}"' in text
