"""The engine against the slow reference, over whole runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode

import dit_accel
from dit_accel import TokenCacheConfig, TokenMergeConfig
from tests.dit_accel import reference

STEPS = 8
SELECTORS = [name for name in reference.SCORES]
SETTINGS = [
    *(dict(selector=name, interval=3, cache_ratio=0.7, age_weight=0.0) for name in SELECTORS),
    *(dict(selector=name, interval=4, cache_ratio=0.6, age_weight=0.01) for name in SELECTORS),
    dict(selector="random", interval=4, cache_ratio=0.9, age_weight=0.25, warmup_steps=3),
    dict(selector="attention", interval=3, cache_ratio=0.8, age_weight=0.01, spatial_bonus=0.4, spatial_tile=4),
    dict(selector="random", interval=4, cache_ratio=0.7, spatial_bonus=2.0, spatial_tile=3, age_weight=0.0),
    dict(selector="random", interval=4, interval_spread=0.4, cache_ratio=0.7, ratio_schedule="toca"),
    dict(selector="v-norm", interval=3, cache_ratio=0.7, fill="forecast", forecast_order=1),
    dict(selector="random", interval=2, cache_ratio=0.8, fill="forecast", forecast_order=3),
    dict(selector="drift", interval=3, cache_ratio=0.7, fill="forecast", forecast_order=2, warmup_steps=2),
    dict(selector="drift", interval=4, cache_ratio=0.3, ratio_schedule="toca", age_weight=0.1),  # more than all, at times
    dict(interval=3, cache_ratio=1.0),
    dict(interval=3, cache_ratio=1.0, fill="forecast", forecast_order=2, warmup_steps=3),
]
name = lambda settings: "-".join(str(value) for value in settings.values())


def assert_close(ours, theirs):
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


NO_CACHE = TokenCacheConfig(interval=1)
MERGES = [
    dict(ratio=0.5, rematch_every=1),
    dict(ratio=0.7, rematch_every=(3, 2), stride=(2, 3), warmup_steps=1, seed=3),
    dict(ratio=0.25, rematch_every=(2, 9), randomize=False, stride=(1, 2)),
    dict(ratio=0.5, merge_mlp=True),
    dict(ratio=0.5, merge_mlp=True, merge_attention=False),
    dict(ratio=0.5, keep_queries=True),
    dict(ratio=0.6, proportional_attention=True),
    dict(ratio=0.6, keep_queries=True, proportional_attention=True, merge_mlp=True),
]
CACHES = [
    dict(interval=3, cache_ratio=1.0),
    dict(interval=3, cache_ratio=0.7, selector="random", age_weight=0.0),
    dict(interval=3, cache_ratio=0.7, selector="drift", fill="forecast", warmup_steps=2),
]


def flux_runs_agree(tiny_flux, config, batch, grid=(6, 4), merge=None, more_tokens=0):
    model, plain = (tiny_flux().transformer for _ in range(2))
    dit_accel.apply(model, [config, merge] if merge and config is not NO_CACHE else merge or config)
    merging = reference.Merge(merge, grid) if merge else None
    g = torch.Generator().manual_seed(5)
    x, text, pooled = (torch.randn(batch, *s, generator=g) for s in ((grid[0] * grid[1] + more_tokens, 32), (8, 32), (32,)))
    ids = torch.zeros(*grid, 3)
    ids[..., 1], ids[..., 2] = torch.arange(grid[0])[:, None], torch.arange(grid[1])
    more = torch.stack([torch.ones(more_tokens), torch.zeros(more_tokens), torch.arange(more_tokens)], dim=1)
    ids, txt_ids = torch.cat([ids.flatten(0, 1), more]), torch.zeros(8, 3)
    cache, ours, theirs = reference.Cache(config, grid, STEPS), x, x
    for step in range(STEPS):
        t = torch.full((batch,), 1 - step / STEPS)
        a = model(ours, text, pooled, t, ids, txt_ids, return_dict=False)[0]
        b = reference.flux_forward(plain, cache, theirs, text, pooled, t, ids, txt_ids, merging)
        ours, theirs = ours - 0.3 * a, theirs - 0.3 * b
        assert_close(a, b)
    assert_close(ours, theirs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.get("selector") != "cross-entropy"], ids=name)
@torch.no_grad()
def test_flux_equals_the_reference(tiny_flux, settings, batch):
    flux_runs_agree(tiny_flux, TokenCacheConfig(**settings, steps=STEPS), batch)


@pytest.mark.parametrize("text_tokens", ["reuse", "full"])
@pytest.mark.parametrize("settings", [s for s in SETTINGS[::3] if s.get("selector") != "cross-entropy"], ids=name)
@torch.no_grad()
def test_flux_text_tokens_equal_the_reference(tiny_flux, settings, text_tokens):
    flux_runs_agree(tiny_flux, TokenCacheConfig(**settings, steps=STEPS, text_tokens=text_tokens), batch=2)


def pixart_runs_agree(tiny_pixart, config, batch, guidance, merge=None):
    model, plain = (tiny_pixart().transformer for _ in range(2))
    dit_accel.apply(model, [config, merge] if merge and config is not NO_CACHE else merge or config)
    merging = reference.Merge(merge, (6, 4), guidance) if merge else None
    g = torch.Generator().manual_seed(5)
    halves = guidance and config.share_guidance_selection
    x, text = (torch.randn(batch, *s, generator=g) for s in ((8, 12, 8), (8, 32)))
    mask = (torch.arange(8)[None] < torch.tensor([3, 8, 5, 6])[:batch, None]).long()
    if guidance:
        x = torch.cat([x[: batch // 2]] * 2)
    cache, ours, theirs = reference.Cache(config, (6, 4), STEPS, halves), x, x
    for step in range(STEPS):
        t = torch.full((batch,), 900 - 100 * step)
        a = model(
            ours, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
        b = reference.pixart_forward(plain, cache, theirs, text, mask, t, merging)
        assert_close(a, b)
        if guidance:  # as the pipelines do: both halves go on from the same latents
            a, b = (torch.cat([3 * y[batch // 2 :] - 2 * y[: batch // 2]] * 2) for y in (a, b))
        ours, theirs = ours - 0.3 * a, theirs - 0.3 * b
    assert_close(ours, theirs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=name)
@torch.no_grad()
def test_pixart_equals_the_reference(tiny_pixart, settings, batch):
    pixart_runs_agree(tiny_pixart, TokenCacheConfig(**settings, steps=STEPS), batch, guidance=False)


@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("selector", SELECTORS)
@torch.no_grad()
def test_pixart_guidance_equals_the_reference(tiny_pixart, selector, share, batch):
    config = TokenCacheConfig(interval=3, cache_ratio=0.7, selector=selector, share_guidance_selection=share, age_weight=0.02)
    pixart_runs_agree(tiny_pixart, config, batch, guidance=True)


@pytest.mark.parametrize("settings", MERGES, ids=name)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_merging_on_flux_equals_the_reference(tiny_flux, settings, batch):
    flux_runs_agree(tiny_flux, NO_CACHE, batch, merge=TokenMergeConfig(**settings))


@torch.no_grad()
def test_merging_leaves_a_reference_picture_alone(tiny_flux):
    flux_runs_agree(tiny_flux, NO_CACHE, 2, merge=TokenMergeConfig(merge_mlp=True), more_tokens=10)


@pytest.mark.parametrize("settings", [*MERGES, dict(merge_cross_attention=True)], ids=name)
@pytest.mark.parametrize("guidance", [True, False])
@torch.no_grad()
def test_merging_on_pixart_equals_the_reference(tiny_pixart, settings, guidance):
    pixart_runs_agree(tiny_pixart, NO_CACHE, 4, guidance, TokenMergeConfig(**settings))


@pytest.mark.parametrize("cache", CACHES, ids=name)
@pytest.mark.parametrize("merge", [MERGES[1], MERGES[3], MERGES[7]], ids=name)
@torch.no_grad()
def test_caching_and_merging_together_equal_the_reference(tiny_flux, tiny_pixart, cache, merge):
    cache, merge = TokenCacheConfig(**cache, steps=STEPS), TokenMergeConfig(**merge)
    flux_runs_agree(tiny_flux, cache, 2, merge=merge)
    pixart_runs_agree(tiny_pixart, cache, 4, True, merge)


class Maps(TorchFunctionMode):
    """Attention maps as they are computed, averaged over heads and queries."""

    def __init__(self):
        super().__init__()
        self.received = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key = (part.transpose(1, 2) for part in args[:2] or (kwargs["query"], kwargs["key"]))
            self.received.append(reference.softmax_map(query, key).mean(dim=(1, 2)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("merge", [MERGES[0], MERGES[5]], ids=name)
@torch.no_grad()
def test_tokens_receive_the_attention_of_the_one_they_are_merged_into(tiny_flux, merge):
    model, g = tiny_flux().transformer, torch.Generator().manual_seed(5)
    cache = TokenCacheConfig(interval=3, cache_ratio=0.7, selector="attention")
    dit_accel.apply(model, [cache, TokenMergeConfig(**merge)])
    engine, grid = model._dit_accel, (6, 4)
    ids = torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(n)) for n in grid))
    x, text, pooled = (torch.randn(2, *s, generator=g) for s in ((24, 32), (8, 32), (32,)))
    with Maps() as maps:
        model(x, text, pooled, torch.ones(2), ids, torch.zeros(8, 3))
    blocks = [[site for site in engine.sites if site.layer == i and site.stream in s] for s in ("image", "joint") for i in (0, 1)]
    for layer, (received, (site,)) in enumerate(zip(torch.cat(maps.received).split(2), blocks, strict=True)):
        merging = engine.merge_sites[layer]
        assert received.shape[1] == 32 - merging.count < 32
        expected = torch.cat([received[:, :8], received[:, 8:].gather(1, merging.shared.matching.group)], dim=1)
        assert_close(site.memory.observed["attention"], expected[:, 8:] if site.stream == "image" else expected)


@torch.no_grad()
def test_partial_steps_differ_from_full_ones(tiny_flux):
    """The comparison above would be empty if caching changed nothing."""
    model = tiny_flux().transformer
    plain = copy.deepcopy(model)
    dit_accel.apply(model, TokenCacheConfig(interval=2, cache_ratio=0.9))
    g = torch.Generator().manual_seed(5)
    x, text, pooled = (torch.randn(1, *s, generator=g) for s in ((16, 32), (8, 32), (32,)))
    call = lambda m, x, t: m(x, text, pooled, torch.tensor([t]), torch.zeros(16, 3), torch.zeros(8, 3), return_dict=False)[0]
    assert torch.equal(call(model, x, 1.0), call(plain, x, 1.0))
    assert not torch.allclose(call(model, 2 * x, 0.5), call(plain, 2 * x, 0.5), atol=1e-2)
