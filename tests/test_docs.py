"""The examples of the documentation run, from top to bottom of each page."""

from __future__ import annotations

import importlib
import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem)
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


def test_the_site_has_every_page_and_every_public_name():
    import dit_accel

    pages: list[str] = []

    def collect(part):
        for one in part.values() if isinstance(part, dict) else part:
            pages.append(one) if isinstance(one, str) else collect(one)

    collect(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    made = {"docs/site/options.md"}  # by docs/site/options.py
    assert {page.relative_to(ROOT).as_posix() for page in PAGES} <= set(pages)
    assert all((ROOT / page).exists() for page in set(pages) - made)
    named = re.findall(r"^::: (dit_accel\.\w+)\.(\w+)$", (ROOT / "docs/site/api.md").read_text(), flags=re.MULTILINE)
    assert {name for _, name in named} == set(dit_accel.__all__)
    assert all(getattr(importlib.import_module(module), name) is getattr(dit_accel, name) for module, name in named)


def test_the_site_lists_every_option(capsys):
    runpy.run_path(str(ROOT / "docs/site/options.py"))
    page = capsys.readouterr().out
    for config in (TokenCacheConfig, TokenMergeConfig, OutputCacheConfig):
        for field in fields(config):
            assert f"| `{field.name}` | " in page and field.metadata["help"] in page
    assert "| `ratio` | `--merge-ratio` | `0.5` |" in page and "| `steps` |  | `None` |" in page


def test_every_selector_is_explained():
    import dit_accel

    text = (ROOT / "docs/token-caching.md").read_text()
    for name in dit_accel.selectors():
        assert f"| `{name}` |" in text and f'selector="{name}"' in text
