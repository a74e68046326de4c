"""The examples of the documentation run, from top to bottom of each page."""

from __future__ import annotations

import importlib
import json
import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FluxPipeline

from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig
from dit_accel.doubts import DoubtWarning
from dit_accel.pipelines.catalog import CATALOG
from dit_accel.recipe import SHIPPED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem)
def test_examples_run(page, monkeypatch, capsys, tmp_path):
    """In a folder that has what the repository has, and gets what they write."""
    for path in ROOT.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)):
        exec(compile(code, f"{page.name}, example {number + 1}", "exec"), names)
    said = capsys.readouterr().out
    assert said and ("partial" in said) == ("dit_accel.report(" in page.read_text())


def test_the_example_of_flux_dev_runs(tiny_flux, monkeypatch, capsys, tmp_path):
    """Around a tiny model, for which its native size is taken down, with its recipe; both ways to place it."""
    recipes = json.loads((SHIPPED / "flux.1-dev.json").read_text()) | {"transformer": {"class": "FluxTransformer2DModel"}}
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/tiny.json").write_text(json.dumps(recipes))
    monkeypatch.setenv("DIT_ACCEL_RECIPES", str(tmp_path / "recipes"))
    first, code = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert all(line.partition("  #")[0] in code.splitlines() for line in first.splitlines()), "two lines of it"
    best = CATALOG["black-forest-labs/FLUX.1-dev"]
    run, loaded, placed = FluxPipeline.__call__, [], []
    monkeypatch.setattr(
        FluxPipeline, "from_pretrained", lambda *name, **how: loaded.append((name, how)) or tiny_flux(guidance_embeds=True)
    )
    monkeypatch.setattr(FluxPipeline, "to", lambda self, device: placed.append(device))
    monkeypatch.setattr(FluxPipeline, "enable_model_cpu_offload", lambda self: placed.append("offloaded"))

    def smaller(self, prompt, **given):
        assert (given["height"], given["width"], given["num_inference_steps"]) == (best.size, best.size, best.steps)
        assert (given["guidance_scale"], given["max_sequence_length"]) == (best.guidance, best.max_sequence_length)
        return run(self, prompt, **given | dict(height=64, width=64, max_sequence_length=8))

    monkeypatch.setattr(FluxPipeline, "__call__", smaller)
    monkeypatch.chdir(tmp_path)
    for way in (code, re.sub(r"pipe\.to\(.*instead: ", "", code)):
        with pytest.warns(DoubtWarning, match="not measured on this model"):
            exec(compile(way, "README.md", "exec"), {})
    assert loaded == [((best.name,), dict(dtype=torch.bfloat16))] * 2 and placed == ["cuda", "offloaded"]
    assert (tmp_path / "tiger.png").is_file() and "16 full and 34 partial calls" in capsys.readouterr().out


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
