"""The promises of the library, on tiny random pipelines and on the embedded ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline, PixArtSigmaPipeline

import dit_accel
from dit_accel import TokenCacheConfig, TokenMergeConfig, store

SAMPLES = Path(__file__).parents[2] / "samples"
CACHED = TokenCacheConfig(interval=3, cache_ratio=0.8, selector="attention", age_weight=0.1)
RANDOM = TokenCacheConfig(interval=3, cache_ratio=0.8)
MERGED = TokenMergeConfig(ratio=0.5, merge_mlp=True, rematch_every=(2, 3))
KEYS = TokenMergeConfig(ratio=0.75, keep_queries=True, proportional_attention=True)
CONFIGS = [RANDOM, CACHED, MERGED, KEYS, [RANDOM, MERGED]]
NAMES = ["random", "attention", "merged", "merged keys", "random and merged"]


class Case:
    """A pipeline and how it is called."""

    def __init__(self, pipe, size, **call) -> None:
        self.pipe, self.call = (
            pipe,
            {"height": size[0], "width": size[1], "num_inference_steps": 7, "output_type": "latent", **call},
        )
        pipe.set_progress_bar_config(disable=True)

    def run(self, prompts="red apple, 3d style", seeds=(0,), **call) -> torch.Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self.pipe(prompts, generator=generator, **{**self.call, **call}).images


PIXART = {"use_resolution_binning": False, "clean_caption": False}


@pytest.fixture(params=["tiny-flux", "tiny-flux-true-cfg", "tiny-pixart", "emoji-flux", "emoji-pixart"])
def case(request, tiny_flux, tiny_pixart) -> Case:
    match request.param:
        case "tiny-flux":
            return Case(tiny_flux(), (64, 48), max_sequence_length=8)
        case "tiny-flux-true-cfg":
            return Case(tiny_flux(), (64, 48), max_sequence_length=8, true_cfg_scale=2.0, negative_prompt="a teapot")
        case "tiny-pixart":
            return Case(tiny_pixart(), (64, 48), max_sequence_length=8, **PIXART)
        case "emoji-flux":
            pipe = FluxPipeline.from_pretrained(SAMPLES / "emoji-flux", dtype=torch.float32)
            return Case(pipe, (128, 128), max_sequence_length=24)
        case _:
            pipe = PixArtSigmaPipeline.from_pretrained(SAMPLES / "emoji-pixart", dtype=torch.float32)
            return Case(pipe, (128, 128), max_sequence_length=24, guidance_scale=3.0, **PIXART)


NOTHING = [
    TokenCacheConfig(interval=1),
    TokenCacheConfig(cache_ratio=0.0),
    TokenMergeConfig(ratio=0),
    TokenMergeConfig(ratio=0.01, merge_mlp=True, merge_cross_attention=False, warmup_steps=99),
    [TokenCacheConfig(cache_ratio=0), TokenMergeConfig(ratio=0.0, merge_mlp=True, keep_queries=True)],
]


@pytest.mark.parametrize("config", NOTHING, ids=["interval 1", "ratio 0", "merge 0", "merge later", "both 0"])
def test_settings_that_save_nothing_change_no_bit(case, config):
    plain = case.run()
    dit_accel.apply(case.pipe, config)
    assert torch.equal(case.run(), plain)
    report = dit_accel.report(case.pipe)
    assert report.partial_steps == 0 and report.tokens_merged == 0 and report.flops_ratio == 1


def test_remove_restores_everything(case):
    transformer = case.pipe.transformer
    look = lambda: (
        list(transformer.state_dict()),
        [(name, type(module)) for name, module in transformer.named_modules()],
        {name: id(processor) for name, processor in transformer.attn_processors.items()},
        {name: sorted(set(vars(module)) - {"_diffusers_hook"}) for name, module in transformer.named_modules()},
        list(transformer._forward_pre_hooks),
    )
    plain, before = case.run(), look()
    dit_accel.apply(case.pipe, RANDOM)
    for config in (MERGED, [CACHED, MERGED], CACHED, KEYS):
        dit_accel.apply(case.pipe, config)
        assert not torch.equal(case.run(), plain)
    dit_accel.remove(case.pipe)
    assert look() == before
    assert torch.equal(case.run(), plain)
    dit_accel.remove(case.pipe)  # once more does nothing


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_repeated_and_interrupted_runs_give_the_same_bits(case, config):
    dit_accel.apply(case.pipe, config)
    first = case.run()
    assert torch.equal(case.run(), first)

    class Stop(Exception):
        pass

    for step in (0, 1, 4):
        calls = 0

        def stop(*args, step=step):
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise Stop

        hook = case.pipe.transformer.proj_out.register_forward_hook(stop)
        with pytest.raises(Stop):
            case.run("blue teapot", seeds=(3,))
        hook.remove()
        assert torch.equal(case.run(), first), f"interrupted in call {step}"
    case.run("a blue teapot, flat style", seeds=(5,), num_inference_steps=5)
    assert torch.equal(case.run(), first)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_a_picture_does_not_depend_on_its_batch(case, config):
    # A flat background has tokens that differ by less than float32's rounding, which a batch's size changes.
    case.pipe.to(torch.float64)
    dit_accel.apply(case.pipe, config)
    prompts, seeds = ["red apple, 3d style", "tiger face", "a flat teapot"], (0, 1, 2)
    guidance = {"negative_prompt": [case.call["negative_prompt"]] * 3} if "negative_prompt" in case.call else {}
    together = case.run(prompts, seeds, **guidance, num_inference_steps=4)
    for i, prompt in enumerate(prompts):
        alone = case.run(prompt, (seeds[i],), num_inference_steps=4)[0]
        assert (together[i] - alone).norm() / alone.norm() < 1e-9


def test_caching_in_the_pipeline_follows_the_schedule(case):
    dit_accel.apply(case.pipe, RANDOM)
    case.run()
    report = dit_accel.report(case.pipe)
    branches = {call.branch for call in report.calls}
    assert len(branches) == (2 if "negative_prompt" in case.call else 1)
    for branch in branches:
        modes = [call.mode.value for call in report.calls if call.branch == branch]
        assert modes == ["full", "partial", "partial", "full", "partial", "partial", "full"]
    assert 0.15 < report.tokens_share <= 0.2
    assert report.cache_bytes > 0


@torch.no_grad()
@pytest.mark.parametrize("config", [CACHED, MERGED, [CACHED, MERGED]], ids=["cached", "merged", "both"])
@pytest.mark.parametrize("named", [True, False], ids=["cache_context", "by text"])
def test_guidance_branches_do_not_see_each_other(tiny_flux, named, config):
    g = torch.Generator().manual_seed(0)
    texts, pooled = torch.randn(2, 1, 8, 32, generator=g).unbind(), torch.randn(2, 1, 32, generator=g).unbind()
    latents, ids = torch.randn(7, 1, 16, 32, generator=g), torch.zeros(4, 4, 3)
    ids[..., 1], ids[..., 2] = torch.arange(4)[:, None], torch.arange(4)
    ids = ids.flatten(0, 1)

    def outputs(branches):
        model = dit_accel.apply(tiny_flux().transformer, config)
        rows = {b: [] for b in branches}
        for step, x in enumerate(latents):
            for b in branches:
                call = lambda x=x, b=b, step=step: model(
                    x, texts[b], pooled[b], torch.tensor([1 - step / 7]), ids, torch.zeros(8, 3), return_dict=False
                )[0]
                if named:
                    with model.cache_context("cond" if b else "uncond"):
                        rows[b].append(call())
                else:
                    rows[b].append(call())
        return rows

    both = outputs([0, 1])
    for branch in (0, 1):
        for ours, alone in zip(both[branch], outputs([branch])[branch], strict=True):
            assert torch.equal(ours, alone)


def test_gradients_compute_everything(tiny_flux):
    model = tiny_flux().transformer
    inputs = (torch.randn(1, 16, 32), torch.randn(1, 8, 32), torch.randn(1, 32), torch.tensor([0.5]))
    ids = dict(img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3), return_dict=False)
    plain = model(*inputs, **ids)[0]
    dit_accel.apply(model, [RANDOM, TokenMergeConfig()])
    for _ in range(3):
        assert torch.equal(model(*inputs, **ids)[0], plain)


def test_features_are_freed_at_the_end_of_a_run(case):
    dit_accel.apply(case.pipe, [RANDOM, MERGED])
    case.run()
    run = case.pipe.transformer._dit_accel
    assert store.size_in_bytes([branch.kept() for branch in run.branches.values()]) == 0
    assert not any(site.memory.past for site in run.sites) and not any(site.shared.matching for site in run.merge_sites)
    assert dit_accel.report(case.pipe).full_steps > 0


def test_what_cannot_be_served_is_refused(tiny_flux, tiny_pixart):
    with pytest.raises(TypeError, match="Linear is not supported; supported transformers are Flux"):
        dit_accel.apply(torch.nn.Linear(2, 2), RANDOM)
    for config in ({"interval": 3}, [], [RANDOM, CACHED], [RANDOM, MERGED, KEYS], None):
        with pytest.raises(TypeError, match="must be a TokenCacheConfig, a TokenMergeConfig, or a list"):
            dit_accel.apply(tiny_flux(), config)
    with pytest.raises(ValueError, match="no cross-attention"):
        dit_accel.apply(tiny_flux(), TokenMergeConfig(merge_cross_attention=True))
    with pytest.raises(ValueError, match="use dit_accel.apply"):
        dit_accel.attn_processors(tiny_flux().transformer, MERGED)
    with pytest.raises(RuntimeError, match=r"call dit_accel\.apply first"):
        dit_accel.report(tiny_flux())
    pipe = tiny_flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(RuntimeError, match="disable_cache"):
        dit_accel.apply(pipe, RANDOM)
    pipe = tiny_pixart()
    pipe.transformer.transformer_blocks[1].ff = torch.nn.Sequential(pipe.transformer.transformer_blocks[1].ff)
    with pytest.raises(TypeError, match=r"transformer_blocks\.1\.ff is a Sequential"):
        dit_accel.apply(pipe, RANDOM)
    assert all("Token" not in type(p).__name__ for p in pipe.transformer.attn_processors.values())
