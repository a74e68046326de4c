"""Recipes to start from say what they are: an embedded pipeline's shape, with no figure of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import dit_accel
from dit_accel.recipe import SHIPPED

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from starting import MODELS, starting  # noqa: E402


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
