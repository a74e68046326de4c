"""Recipes: which are found and chosen, what they become at other numbers of steps, and that they are what runs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy
import pytest
import torch

import dit_accel
from dit_accel import OutputCacheConfig, recipe
from dit_accel.doubts import DoubtWarning

STEPS = 8
LEVELS = [1 - i / STEPS for i in range(STEPS)]
FITS = {"class": "FluxTransformer2DModel", "num_layers": 1}


def measured(seconds, low, high):
    return {"flops": seconds, "seconds": seconds, "psnr": [(low + high) / 2, low, high]}


def written(folder, name="tiny", fits=FITS, rows=((2, (0, 1, 3, 5), 30, 32), (4, (0, 2), 20, 22)), **more):
    """A file of recipes: speed, full steps, and the ends of the PSNR's interval."""
    made = [
        {
            "speedup": speedup,
            "config": {"full_steps": steps, "correct": 1.0},
            "measured": measured(speedup + 0.1, low, high) if low else None,
        }
        for speedup, steps, low, high in rows
    ]
    content = {"model": name, "transformer": fits, "levels": LEVELS, "measured": {"pictures": 8}, "recipes": made, **more}
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_ACCEL_RECIPES", str(tmp_path))
    return tmp_path


def model(**config):
    module = torch.nn.Linear(1, 1)
    kind = type("FluxTransformer2DModel", (type(module),), {"config": {"num_layers": 1, **config}})
    module.__class__ = kind
    return module


def test_recipes_that_fit_are_found_and_sorted(own):
    written(own, rows=((4, (0, 2), 20, 22), (2, (0, 1, 3, 5), 30, 32)))
    written(own, "other", {**FITS, "num_layers": 19})
    found = dit_accel.recipes(model())
    assert [one.speedup for one in found] == [2, 4] and {one.model for one in found} == {"tiny"}
    assert found[0].config == OutputCacheConfig(full_steps=(0, 1, 3, 5), correct=1.0)
    assert found[0].measured["pictures"] == 8 and found[0].psnr == (31, 30, 32)
    assert [one.model for one in dit_accel.recipes(model(num_layers=19))] == ["other"] * 2
    assert dit_accel.recipes(model(num_layers=2)) == ()


def test_ones_own_stand_in_for_those_that_ship(own, monkeypatch, tmp_path_factory):
    shipped = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr(recipe, "SHIPPED", shipped)
    written(shipped, "shipped")
    assert {one.model for one in dit_accel.recipes(model())} == {"shipped"}
    written(own)
    assert {one.model for one in dit_accel.recipes(model())} == {"tiny"}


def test_the_closest_that_is_fast_enough_and_the_fastest_that_is_close_enough(own):
    written(own, rows=((2, (0, 1, 3, 5), 25, 27), (3, (0, 1, 4), 30, 32), (4, (0, 2), 20, 22), (6, (0,), None, None)))
    chosen = lambda **asked: recipe.choose(model(), asked.get("speedup"), asked.get("min_psnr")).speedup
    assert [chosen(speedup=s) for s in (1, 2, 3, 3.1, 4, 5)] == [3, 3, 3, 4, 4, 6], "a faster one may be closer, too"
    assert [chosen(min_psnr=p) for p in (20, 20.5, 25, 30)] == [4, 3, 3, 3], "the lower end of the interval counts"
    with pytest.raises(ValueError, match=r"at least 31 dB on this model: the closest one has 30\.0"):
        chosen(min_psnr=31)
    with pytest.raises(ValueError, match="between 1 and 6 for this model, not 7"):
        chosen(speedup=7)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": "x", "transformer": {}, "levels": [], "recipes": [{}]}'])
def test_a_file_that_holds_no_recipes_is_named(own, content):
    (own / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=r"bad\.json holds no recipes.*dit-accel tune"):
        dit_accel.recipes(model())


def made(full_steps=(0, 1, 2, 4), levels=LEVELS, **more):
    return recipe.Recipe("tiny", FITS, 2.0, tuple(levels), OutputCacheConfig(full_steps=full_steps, **more))


def test_its_own_steps_are_taken_as_they_are():
    for times in (LEVELS, [1000 * level for level in LEVELS], [1 - level for level in LEVELS], []):
        assert made().at(times) is made().config or made().at(times) == made().config


@pytest.mark.parametrize("steps", [4, 5, 6, 12, 16, 28, 50])
@pytest.mark.parametrize("shift", [1, 3])
def test_other_steps_have_the_same_share_of_full_ones_at_like_noise_levels(steps, shift):
    own, levels = made(), [1 - i / steps for i in range(steps)]
    levels = [shift * level / (1 + (shift - 1) * level) for level in levels]
    full = own.at(levels).full_steps
    assert full[0] == 0 and len(full) == round(steps / 2) and all(a < b for a, b in pairwise(full)) and full[-1] < steps
    # What lies below a noise level: as large a share as of the recipe's, within one step of either.
    for level in (0.25, 0.5, 0.75):
        theirs = numpy.interp(-level, [-LEVELS[s] for s in own.config.full_steps] + [0], numpy.linspace(0, 1, 5))
        ours = numpy.interp(-level, [-levels[s] for s in full] + [0], numpy.linspace(0, 1, len(full) + 1))
        if steps > 6:
            assert abs(ours - theirs) < 0.2


def test_orders_damping_and_guidance_go_with_their_full_steps():
    own = made(
        order=(0, 0, 1, 2), damping=(1.0, 1.0, 0.5, 0.25), guidance_steps=(0, 2), merged_steps=(0, 1), lead=(0, 0.1, 0.2, 0.3)
    )
    twice = own.at([1 - i / 16 for i in range(16)])
    assert len(twice.full_steps) == 8
    assert twice.order == (0, 0, 0, 0, 1, 1, 2, 2) and twice.damping == (1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25)
    assert twice.lead == (0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3) and twice.merged_steps == (0, 1, 2, 3)
    assert twice.guidance_steps == tuple(twice.full_steps[i] for i in (0, 1, 4, 5))


@pytest.fixture
def pipe():
    from tests.dit_accel.tiny_pipelines import pipelines

    build, call = dict(pipelines())["flux"]
    made = build()
    return SimpleNamespace(pipe=made, run=lambda steps=STEPS: call(made, steps=steps))


def times_of(pipe):
    return recipe.levels_of(pipe.scheduler.timesteps.tolist())


def test_speedup_is_the_recipe_and_the_report_says_so(own, pipe):
    pipe.run()
    written(own, fits={"class": type(pipe.pipe.transformer).__name__}, levels=times_of(pipe.pipe))
    dit_accel.apply(pipe.pipe, speedup=2)
    quick = pipe.run()
    report = dit_accel.report(pipe.pipe)
    assert [call.step for call in report.calls if call.mode.value == "full"] == [0, 1, 3, 5]
    assert "recipe of tiny for 2x: 2.10x measured, PSNR 31.0 dB (30.0 to 32.0)" in str(report) and report.recipe.speedup == 2
    dit_accel.apply(pipe.pipe, OutputCacheConfig(full_steps=(0, 1, 3, 5), correct=1))
    assert torch.equal(pipe.run(), quick) and dit_accel.report(pipe.pipe).recipe is None
    with dit_accel.applied(pipe.pipe, min_psnr=20):
        pipe.run()
        assert dit_accel.report(pipe.pipe).full_steps == 2
    dit_accel.apply(pipe.pipe, dit_accel.recipes(pipe.pipe)[1])
    with pytest.warns(DoubtWarning, match=r"recipe is for other steps; its full steps are spread over these 12"):
        pipe.run(12)
    assert dit_accel.report(pipe.pipe).full_steps == 3


def test_without_a_recipe_errors_decide(own, pipe, monkeypatch):
    monkeypatch.setattr(recipe, "TOLERANCES", {1.0: 1e-12, 4.0: 9.0})  # random weights change much from step to step
    with pytest.warns(DoubtWarning, match=r"Nothing was measured on this model: .*tolerance.*dit-accel tune"):
        dit_accel.apply(pipe.pipe, speedup=4)
    pipe.run()
    assert dit_accel.report(pipe.pipe).partial_steps > 0
    with pytest.raises(ValueError, match="there is none at all"):
        dit_accel.apply(pipe.pipe, min_psnr=30)


def test_a_recipe_that_was_not_measured_says_so(own, pipe):
    pipe.run()
    fits = {"class": type(pipe.pipe.transformer).__name__}
    written(own, fits=fits, levels=times_of(pipe.pipe), rows=((2, (0, 1, 3, 5), None, None),))
    with pytest.warns(DoubtWarning, match="not measured on this model"):
        dit_accel.apply(pipe.pipe, speedup=2)


@pytest.mark.parametrize("asked", [{"speedup": 2, "min_psnr": 30}, {"config": OutputCacheConfig(), "speedup": 2}])
def test_one_thing_is_asked_for(asked, pipe):
    with pytest.raises(TypeError, match="Give either a configuration, or speedup, or min_psnr"):
        dit_accel.apply(pipe.pipe, **asked)
    with pytest.raises(TypeError, match="The configuration must be"):
        dit_accel.apply(pipe.pipe)


def test_shipped_recipes_are_read():
    found = [one for path in recipe.SHIPPED.glob("*.json") for one in recipe.read(path)]
    for one in found:
        merged = (1 - 1 / one.config.merged_side**2) * len(one.config.merged_steps or ())  # full steps that these save
        assert 1 <= 0.97 * one.speedup <= len(one.levels) / (len(one.config.full_steps) - merged)
        assert list(one.levels) == sorted(one.levels, reverse=True)


SAMPLES = Path(__file__).parents[2] / "samples"
SHIPPED = ("emoji-flux", "emoji-pixart")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_embedded_pipelines_have_recipes(own, name):
    config = json.loads((SAMPLES / name / "transformer/config.json").read_text())
    kind = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        found = dit_accel.recipes(kind.from_config(config))
    assert {one.model for one in found} == {name} and [one.speedup for one in found] == [1.5, 2, 2.5, 3, 4, 6]
    assert all(one.measured["seconds"] >= 0.95 * one.speedup for one in found), "slower than it says"
    assert all(slower.psnr[0] > faster.psnr[0] for slower, faster in pairwise(found))
    assert all(one.psnr[1] < one.psnr[0] < one.psnr[2] for one in found)


def test_a_recipe_draws_nearly_the_same_picture_where_as_few_steps_do_not(own):
    pipe = diffusers.FluxPipeline.from_pretrained(SAMPLES / "emoji-flux", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def picture(steps=28):
        generator = torch.Generator().manual_seed(7)
        call = dict(height=128, width=128, num_inference_steps=steps, max_sequence_length=24, guidance_scale=3.5)
        return pipe("red apple, flat style, on a blue background", generator=generator, output_type="pt", **call).images

    def psnr(one):
        return -10 * (one - plain).square().mean().log10()

    plain, fewer = picture(), picture(14)
    dit_accel.apply(pipe, speedup=2)
    near = picture()
    assert dit_accel.report(pipe).full_steps <= 14
    assert psnr(near) > 35 and psnr(near) > psnr(fewer) + 5
