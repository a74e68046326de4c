"""Runs with other steps than the pipeline is asked for: against the plain pipeline asked for them, in every family."""

from __future__ import annotations

import copy

import diffusers
import numpy as np
import pytest
import torch

import dit_accel
from dit_accel import OutputCacheConfig, recipe
from dit_accel.doubts import DoubtWarning
from dit_accel.recipe import Recipe
from tests.dit_accel import tiny_pipelines

PIPELINES = dict(tiny_pipelines.pipelines())
SHARES = (0.0, 0.25, 0.4, 0.8)


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    build, call = PIPELINES[request.param]
    return build(), call


def fewer(steps, **more):
    return OutputCacheConfig(sampler_steps=steps, interval=1, **more)


def test_fewer_steps_are_those_of_the_plain_pipeline(pipeline):
    pipe, call = pipeline
    plain, few = call(pipe, steps=6), call(pipe, steps=3)
    with dit_accel.applied(pipe, fewer(3)):
        found = call(pipe, steps=6)
        match type(pipe).__name__:
            case (
                "MochiPipeline" | "CogView4Pipeline"
            ):  # whose own levels depend on how many there are: these are along those of six
                assert not torch.equal(found, few)
            case "ZImagePipeline":  # which rounds otherwise
                assert torch.allclose(found, few, rtol=1e-3, atol=1e-3)
            case _:
                assert torch.equal(found, few)
        assert len(pipe.scheduler.timesteps) == 3
    assert "set_timesteps" not in vars(pipe.scheduler)
    assert torch.equal(call(pipe, steps=6), plain)


def test_steps_lie_where_they_are_asked_for(pipeline):
    pipe, call = pipeline
    call(pipe, steps=6)
    own = pipe.scheduler.timesteps.tolist()
    rising = own[0] < own[-1]
    wanted = np.interp(np.array(SHARES) * 6, range(7), [*own, pipe.scheduler.config.num_train_timesteps * rising])
    with dit_accel.applied(pipe, fewer(SHARES)):
        if "DDIM" in type(pipe.scheduler).__name__:
            with pytest.raises(ValueError, match="takes no timesteps of one's own"):
                call(pipe, steps=6)
            return
        found = call(pipe, steps=6)
        # A pipeline's own levels are spread before its scheduler shifts them; whole times are rounded.
        assert pipe.scheduler.timesteps.tolist() == pytest.approx(
            wanted.tolist(), abs=25 if not float(own[1]).is_integer() else 0.51
        )
        assert torch.equal(found, call(pipe, steps=6)) and found.isfinite().all()
        assert len(dit_accel.report(pipe).calls) == len({(c.transformer, c.branch, c.step) for c in dit_accel.report(pipe).calls})
    assert "set_timesteps" not in vars(pipe.scheduler)


def sd3():
    build, call = PIPELINES["sd3"]
    return build(), call


def test_places_of_the_own_steps_change_nothing():
    for name in ("sd3", "flux", "pixart", "wan"):
        build, call = PIPELINES[name]
        pipe = build()
        plain = call(pipe, steps=4)
        with dit_accel.applied(pipe, fewer((0.0, 0.25, 0.5, 0.75))):
            assert torch.allclose(call(pipe, steps=4), plain, atol=1e-5), name


def test_full_steps_are_some_of_the_runs_own_and_flops_are_of_the_steps_asked_for():
    pipe, call = sd3()
    with dit_accel.applied(pipe, OutputCacheConfig(sampler_steps=6, full_steps=(0, 1, 4))):
        call(pipe, steps=12)
        report = dit_accel.report(pipe)
    assert [c.step for c in report.calls if c.mode.value == "full"] == [0, 1, 4] and len(report.calls) == 6
    with dit_accel.applied(pipe, OutputCacheConfig(full_steps=(0, 1, 4))):
        call(pipe, steps=12)
        assert report.full_flops == dit_accel.report(pipe).full_flops and report.flops_ratio == 4.0


def test_a_recipe_has_as_large_a_share_of_other_steps():
    made = Recipe("m", {}, 2.0, tuple(1 - i / 8 for i in range(8)), OutputCacheConfig(sampler_steps=4, full_steps=(0, 1, 3)))
    assert made.of(8) is made.config
    assert made.of(16).sampler_steps == 8 and len(made.of(16).full_steps) == 6
    assert made.of(4).sampler_steps == 2
    places = Recipe("m", {}, 2.0, made.levels, OutputCacheConfig(sampler_steps=(0.0, 0.1, 0.3, 0.7), full_steps=(0, 1, 2, 3)))
    assert places.of(16).sampler_steps == pytest.approx((0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85))
    assert places.of(16).full_steps == tuple(range(8))
    pipe, call = sd3()
    with dit_accel.applied(pipe, places):
        call(pipe, steps=8)
        assert len(dit_accel.report(pipe).calls) == 4
        with pytest.warns(DoubtWarning, match="spread over these 16"):
            call(pipe, steps=16)
        assert len(dit_accel.report(pipe).calls) == 8


def test_a_copy_of_the_scheduler_is_set_by_itself():
    pipe, call = sd3()
    with dit_accel.applied(pipe, fewer(3)):
        call(pipe, steps=6)
        own, other = pipe.scheduler.timesteps, copy.deepcopy(pipe.scheduler)
        other.set_timesteps(9)
        assert len(other.timesteps) == 3 and pipe.scheduler.timesteps is own


def test_another_scheduler_is_noticed():
    pipe, call = sd3()
    dit_accel.apply(pipe, OutputCacheConfig(sampler_steps=4, interval=2))
    first = pipe.scheduler
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.warns(DoubtWarning, match="another scheduler"):
        call(pipe, steps=8)
    dit_accel.remove(pipe)
    assert "set_timesteps" not in vars(first)


def test_what_cannot_be_is_refused():
    pipe, call = sd3()
    for wrong in (0, (), (0.1, 0.5), (0.0, 0.5, 0.5), (0.0, 1.0), 2.5):
        with pytest.raises(ValueError, match="sampler_steps must be"):
            OutputCacheConfig(sampler_steps=wrong)
    with pytest.raises(ValueError, match="give dit_accel.apply the pipeline"):
        dit_accel.apply(pipe.transformer, fewer(3))
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with dit_accel.applied(pipe, fewer(SHARES)), pytest.raises(ValueError, match="as one number"):
        call(pipe, steps=6)
    assert not hasattr(pipe.transformer, "_dit_accel")


def test_a_run_of_fewer_steps_is_no_run_that_saved_nothing(recwarn):
    pipe, call = sd3()
    with dit_accel.applied(pipe, fewer(5)):
        call(pipe, steps=8)
    assert not [w for w in recwarn if "saved nothing" in str(w.message)]


def test_the_shipped_recipes_hold_steps_that_fit():
    for path in recipe.SHIPPED.glob("*.json"):
        for one in recipe.read(path):
            steps = one.config.run_steps or len(one.levels)
            assert max(one.config.full_steps) < steps <= len(one.levels)
