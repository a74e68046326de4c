"""Recipes to start from say what they are: an embedded pipeline's shape, with no figure of their own."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pandas as pd
import pytest
import torch

import dit_accel
from dit_accel import OutputCacheConfig
from dit_accel.recipe import SHIPPED, Recipe

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from recording import left  # noqa: E402
from starting import MODELS, shapes, starting, transferred  # noqa: E402


@pytest.mark.parametrize("model", MODELS)
def test_what_ships_is_what_the_embedded_pipelines_have(model):
    assert json.loads((SHIPPED / f"{model.lower()}.json").read_text()) == starting(model, SHIPPED)
    kind = MODELS[model][1]["class"]
    assert hasattr(diffusers, kind)


@pytest.mark.parametrize(
    "name, kind, config",
    [
        ("FLUX.1-dev", diffusers.FluxTransformer2DModel, {"guidance_embeds": True}),
        ("FLUX.2-dev", diffusers.Flux2Transformer2DModel, {}),
        ("PixArt-Sigma", diffusers.PixArtTransformer2DModel, {}),
        ("Qwen-Image", diffusers.QwenImageTransformer2DModel, {}),
        ("Stable-Diffusion-3.5-large", diffusers.SD3Transformer2DModel, {"num_layers": 38}),
        ("Wan-2.2", diffusers.WanTransformer3DModel, {}),
        ("Z-Image", diffusers.ZImageTransformer2DModel, {}),
    ],
)
def test_they_fit_the_published_models_and_claim_nothing(name, kind, config, tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_ACCEL_RECIPES", str(tmp_path))
    with torch.device("meta"):
        found = dit_accel.recipes(kind(**config))  # diffusers' defaults are the depth and width of the published model
    assert {one.model for one in found} == {name} and [one.speedup for one in found] == [1.5, 2, 2.5, 3, 4, 6]
    assert all(one.measured is None and "not measured on this model" in str(one) for one in found)


def test_what_may_go_over_to_another_model():
    """A recipe of 4 full steps of 8, for a run of 20: by hand."""
    config = OutputCacheConfig(full_steps=(0, 1, 3, 6), damping=(0.5, 0.6, 0.7, 0.8), lead=(0.0, 0.1, 0.2, 0.3), correct=1.0)
    one = Recipe("a", {}, 2.0, tuple(1 - i / 8 for i in range(8)), config)
    found = shapes(one, 20)
    whole = found["all but the leads"].config
    assert whole == replace(config, lead=0.0)
    line = found["its full steps, forecast by a line"].config
    assert line == OutputCacheConfig(full_steps=(0, 1, 3, 6))
    assert found["as many full steps, evenly"] == OutputCacheConfig(full_steps=tuple(range(0, 20, 2)))
    assert found["as many steps in all"].run_steps == 10
    rows = pd.DataFrame(
        {"pipeline": "p", "shape": label, "speedup": speedup, "flops": 2.0, "psnr": psnr}
        for label, speedup, psnr in (("a", 2.0, 20.0), ("a", 2.0, 22.0), ("b", 2.0, 30.0), ("a", 3.0, 10.0), ("b", 3.0, 11.0))
    )
    assert transferred(rows)[2:] == ["| p | a | 21.0 (2.00x) | 10.0 (2.00x) |", "| p | b | 30.0 (2.00x) | 11.0 (2.00x) |"]


def test_the_page_says_what_went_over():
    rows = json.loads((ROOT / "docs" / "data" / "transfer.json").read_text())["rows"]
    assert "\n".join(transferred(pd.DataFrame(rows))) in (ROOT / "docs" / "recipes.md").read_text()


def test_settings_that_are_new_are_measured_of_prompts_that_are_known():
    rows = [{"pipeline": "p", "prompt": prompt, "setting": "a"} for prompt in ("one", "two")]
    rows.append({"pipeline": "p", "prompt": "two", "setting": "b"})
    prompts = ["one", "two", "three", "four"]
    assert [prompt for _, prompt in left(rows, "p", prompts, 4)] == ["three", "four"]
    assert [prompt for _, prompt in left(rows, "p", prompts, 4, ["a", "b"])] == ["one", "three", "four"]
    assert [number for number, _ in left(rows, "q", prompts, 2, ["a"])] == [0, 1]
