"""Guards against what hardly ever happens: each test fails when its guard is taken away."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks import HookRegistry
from diffusers.models.transformers.transformer_flux import FluxAttention

import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig, store
from dit_accel.apply import transformers_of
from tests.dit_accel import tiny

CACHES = [TokenCacheConfig(interval=3, cache_ratio=0.8), OutputCacheConfig(interval=3)]
IDS = ["module", "model"]


def inputs(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    latents, text, pooled = (torch.randn(1, *s, generator=g).to(dtype) for s in ((16, 32), (8, 32), (32,)))
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return dict(
        hidden_states=latents, encoder_hidden_states=text, pooled_projections=pooled,
        img_ids=ids, txt_ids=torch.zeros(8, 3), return_dict=False,
    )  # fmt: skip


def modes(model):
    return "".join(call.mode.value[0] for call in dit_accel.report(model).calls)


@torch.no_grad()
@pytest.mark.parametrize("config", CACHES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_timesteps_that_coincide_in_half_precision_are_steps_of_their_own(tiny_flux, config, dtype):
    """Four hundred steps at the noisy end: neighbours are told the same number, and the schedule goes on."""
    pipe = tiny_flux()
    sigmas = torch.linspace(1, 0.9, 400).tolist()
    told = torch.tensor(sigmas).to(dtype)
    assert len(told.unique()) < 400
    pipe.to(dtype)
    dit_accel.apply(pipe, config)
    pipe("red apple", sigmas=sigmas[:30], num_inference_steps=30, height=64, width=64, max_sequence_length=8, output_type="latent")
    assert len(told[:30].unique()) < 30 and modes(pipe) == 10 * "fpp"
    report = dit_accel.report(pipe)
    assert [call.step for call in report.calls] == list(range(30)) and {call.branch for call in report.calls} == {0}


@pytest.mark.parametrize("narrow, largest", [("float16", 65504.0), ("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0)])
def test_what_a_narrow_type_cannot_hold_becomes_its_largest_number(narrow, largest):
    dtype = getattr(torch, narrow)
    features = torch.tensor([1e30, -1e30, 2 * largest, 1.0])
    for wide in (features, features.bfloat16()):
        assert store.narrow(wide, dtype, "cpu").float().tolist() == [largest, -largest, largest, 1.0]
    kept = torch.tensor([1.0, -70000.0])
    assert torch.equal(store.narrow(kept.bfloat16(), torch.float32, "cpu"), kept.bfloat16().float())
    assert store.narrow(torch.tensor([float("inf")]), torch.float32, "cpu").isinf(), "what is not narrowed is as it was"


@torch.no_grad()
@pytest.mark.parametrize("narrow", ["float16", "float8_e4m3fn"])
def test_large_features_stay_finite_in_a_narrow_cache(tiny_flux, narrow):
    model = tiny_flux().transformer
    for block in model.transformer_blocks:
        block.ff.net[2].weight.mul_(1e6)
    dit_accel.apply(model, TokenCacheConfig(interval=4, cache_ratio=1.0, cache_dtype=narrow))
    for t in (1.0, 0.9):
        output = model(**inputs(), timestep=torch.tensor([t]))[0]
    assert modes(model) == "fp" and output.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [TokenCacheConfig(interval=3, cache_ratio=0.5), TokenCacheConfig(interval=1)], ids=["cached", "plain"]
)
def test_blocks_of_flux_clip_float16_as_stock_does(tiny_flux, config):
    """Text tokens of double blocks and all of single ones may leave float16's range: clipped, not infinite."""
    for name, weight in (("transformer_blocks", "ff_context.net.2"), ("single_transformer_blocks", "proj_out")):
        model = tiny_flux().transformer.half()
        block = getattr(model, name)[0]
        block.get_submodule(weight).bias.fill_(60000)
        modulation = (block.norm1_context if name == "transformer_blocks" else block.norm).linear
        modulation.bias.fill_(2.0)  # gates: 2 * 60000 is too large
        seen = {}
        block.register_forward_hook(lambda module, args, output: seen.update(output=output))
        given = inputs(dtype=torch.float16)
        call = lambda t, model=model, given=given: model(**given, timestep=torch.tensor([t], dtype=torch.float16))[0]
        stock, clipped = call(1.0), seen["output"]
        assert max(float(part.abs().max()) for part in clipped) == 65504, "the test needs numbers out of range"
        dit_accel.apply(model, config)
        assert torch.equal(call(1.0), stock)
        for part, expected in zip(seen["output"], clipped, strict=True):
            assert torch.equal(part, expected)
        call(0.9)
        assert all(part.isfinite().all() for part in seen["output"])


@torch.no_grad()
@pytest.mark.parametrize("config", CACHES, ids=IDS)
@pytest.mark.parametrize("how", ["swapped", "in place"])
def test_a_text_swapped_under_one_name_is_computed_in_full(tiny_flux, config, how):
    """Its output is what stock makes of it, and its branch goes on from there."""
    model = tiny_flux().transformer
    red, blue = inputs(0), inputs(1)
    blue["hidden_states"] = red["hidden_states"]
    times = [torch.tensor([t]) for t in (1.0, 0.9, 0.8, 0.7)]
    stock = model(**blue, timestep=times[1])[0]
    dit_accel.apply(model, config)
    given = dict(red)
    for step, time in enumerate(times):
        if step == 1 and how == "swapped":
            given = blue
        elif step == 1:
            for name in ("encoder_hidden_states", "pooled_projections"):
                given[name].copy_(blue[name])
        with model.cache_context("cond"):
            output = model(**given, timestep=time)[0]
        if step == 1:
            assert torch.equal(output, stock)
    assert modes(model) == "ffpp"


@torch.no_grad()
@pytest.mark.parametrize("config", CACHES, ids=IDS)
def test_the_number_of_steps_is_that_of_the_run(tiny_flux, config):
    """A scheduler that was set for something else says nothing about a loop that it does not drive."""
    pipe = tiny_flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.scheduler.set_timesteps(50)
    dit_accel.apply(pipe, config)
    seen, clock = [], pipe.transformer._diffusers_hook.hooks["dit_accel"].clock
    tick = clock.tick
    clock.tick = lambda call: seen.append(tick(call)) or seen[-1]
    given = inputs()
    for t in torch.linspace(0.8, 0.1, 8):
        pipe.transformer(**given, timestep=t[None])
    assert modes(pipe) == "fppfppfp" and [moment.steps for moment in seen[2:]] == 6 * [None]


def state(model):
    modules = list(model.named_modules())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for _, module in modules]
    processors = [type(processor) for processor in model.attn_processors.values()]
    return [(path, type(module), sorted(vars(module))) for path, module in modules], hooks, processors, list(model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        OutputCacheConfig(),
        OutputCacheConfig(compute_ratio=0.5),
        [TokenCacheConfig(interval=3), TokenMergeConfig(merge_mlp=True)],
    ],
    ids=["forecast", "packed", "module"],
)
def test_where_applying_fails_nothing_stays(tiny_flux, monkeypatch, config):
    """Whichever hook or processor it is that cannot be put in, on the first or the second transformer of the pipeline."""
    pipe = tiny_flux(layers=1, single_layers=1)
    if isinstance(config, OutputCacheConfig):
        pipe.transformer_2 = tiny_flux(layers=1, single_layers=1).transformer
    models = transformers_of(pipe)
    add_hook_to_module(models[0], ModelHook())  # as offloading does
    before, stock = [state(model) for model in models], models[0](**inputs(), timestep=torch.tensor([0.7]))[0]
    left = 0

    def failing(stock):
        def fails(*args, **kwargs):
            nonlocal left
            left -= 1
            if not left:
                raise RuntimeError("out of luck")
            return stock(*args, **kwargs)

        return fails

    register = ["register_forward_hook", "register_forward_pre_hook"]
    owners = [(torch.nn.Module, name) for name in register] + [(HookRegistry, "register_hook"), (FluxAttention, "set_processor")]
    for owner, name in owners:
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    for failures in range(1, 1000):
        left = failures
        try:
            dit_accel.apply(pipe, config)
        except (RuntimeError, TypeError):
            assert [state(model) for model in models] == before
            continue
        break
    assert failures > 2
    left = 0
    dit_accel.remove(pipe)
    assert [state(model) for model in models] == before
    assert torch.equal(models[0](**inputs(), timestep=torch.tensor([0.7]))[0], stock)


def test_a_transformer_that_is_refused_is_left_as_it_was():
    """By a part of a block that was looked at after others."""
    model, _ = tiny.transformer("pixart")
    block, before = model.transformer_blocks[0], state(model)
    block.ff.net.append(torch.nn.Conv1d(3, 3, 3))
    with pytest.raises(TypeError, match=r"transformer_blocks\.0\.ff\.net\.3 \(Conv1d\) mixes tokens"):
        dit_accel.apply(model, OutputCacheConfig(compute_ratio=0.5))
    del block.ff.net[3]
    assert state(model) == before
