"""The measures of realism, on the shipped pipelines in a few steps and on pictures whose answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from border import ring_errors
from data import STYLES, concepts, held_together
from generate import background_scenes, defaults, generate, pair_scenes
from realism import MUST, decode, fine_detail, measure, predictions, singles, table

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.mark.parametrize("name", ["emoji-flux", "emoji-pixart"])
def test_predictions_sharpen_into_the_picture(name):
    pipe = DiffusionPipeline.from_pretrained(SAMPLES / name)
    pipe.set_progress_bar_config(disable=True)
    guidance = defaults(pipe)[1]
    with predictions(pipe) as kept:
        final = generate(pipe, ["red apple, 3d style", "owl, flat style"], [0, 1], (64, 128), 4, guidance)
    assert "step" not in vars(pipe.scheduler), "the scheduler is left as it was"
    assert final.shape == (2, 3, 64, 128) and len(kept) == 4
    pictures = [decode(pipe, latents, (64, 128)) for latents in kept]
    assert torch.allclose(pictures[-1], final, atol=1e-3)
    errors = [(picture - final).square().mean().item() for picture in pictures]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-3


def test_measures_are_those_of_single_pictures():
    pipe = DiffusionPipeline.from_pretrained(SAMPLES / "emoji-flux")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["red apple, 3d style", "owl, flat style", "key, cartoon style"]
    pictures, measured, curve = measure(pipe, prompts, (64, 64), steps=5, guidance=1.0, batch=2, seed=7)
    expected = generate(pipe, prompts, [7, 8, 9], (64, 64), 5, 1.0)
    assert torch.allclose(pictures, expected, atol=1e-3)
    assert len(curve) == 5 and curve[-1] == pytest.approx(1, abs=1e-3)
    assert measured["first detail"] == curve[0] and measured["fifth detail"] == curve[1]
    for name, (seeds, steps) in {"seeds": ([10, 11, 12], 5), "half": ([7, 8, 9], 2), "quarter": ([7, 8, 9], 1)}.items():
        other = generate(pipe, prompts, seeds, (64, 64), steps, 1.0)
        psnr = 10 * torch.log10(4 / (other - expected).square().mean(dim=(1, 2, 3)))
        assert measured[name] == pytest.approx(psnr.mean().item(), abs=0.1)


def test_fine_detail_is_what_a_blur_takes_away():
    flat, ramp = torch.full((1, 3, 32, 32), 0.3), torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    checks = torch.where((torch.arange(32)[:, None] + torch.arange(32)) % 2 == 0, 0.5, -0.5).expand(1, 3, 32, 32)
    assert fine_detail(flat).abs().max() < 1e-5
    assert fine_detail(ramp).view(3, 32, 32)[:, 4:-4, 4:-4].abs().max() < 1e-5
    assert torch.allclose(fine_detail(checks + ramp).view(3, 32, 32)[:, 4:-4, 4:-4], checks[0, :, 4:-4, 4:-4], atol=0.01)


def test_ring_errors_of_latents_that_are_known():
    latents = torch.full((2, 8, 8), 0.5)
    latents[:, 1:-1, 1:-1] = 0.25
    latents[:, 2:-2, 2:-2] = 0.0
    assert ring_errors(latents) == pytest.approx([0.5, 0.25])
    assert ring_errors(latents, spread=2.0) == pytest.approx([0.25, 0.125])
    latents[0] = 0.0
    assert ring_errors(latents)[0] == pytest.approx(0.5 / 2**0.5)


def test_scenes_to_measure_with():
    scenes = singles(40, plain=False)
    assert scenes == singles(40, plain=False) and len(set(scenes)) == 40
    assert sum(bool(scene.background) for scene in scenes) == 20 and {scene.style for scene in scenes} == {"3d", "flat", "cartoon"}
    assert not any(scene.background for scene in singles(40, plain=True))
    assert all(scene.background and len(scene.subjects) == 1 for scene in background_scenes(30))
    for held in (False, True):
        pairs = pair_scenes(24, held)
        assert all(held_together(*scene.subjects) == held for scene in pairs)
        assert {scene.relation for scene in pairs} == {"left of", "right of", "above", "below"}
    every = singles(3 * len(concepts()), plain=True)
    assert {(scene.subjects[0], scene.style) for scene in every} == {(c, style) for c in concepts() for style in STYLES}


def test_the_table_marks_what_is_not_as_it_must_be():
    page = table({"first detail": 0.5, "half": 30.0, "object": 0.95, "background": 0.5, "places": 0.1}, "title")
    words, values, musts = (list(column.cells) for column in page.columns)
    assert words == [MUST[name][0] for name in ("first detail", "half", "object", "background", "places")]
    assert values == ["[red]0.50[/red]", "30.0", "95.0%", "[red]50.0%[/red]", "10.0%"]
    assert musts == ["at most 0.30", "at most 36.0", "at least 90.0%", "at least 90.0%", "reported"]
