"""The engine against the slow reference, over whole runs."""

from __future__ import annotations

import copy

import pytest
import torch

import dit_accel
from dit_accel import TokenCacheConfig
from tests.dit_accel import reference

SETTINGS = [
    dict(interval=3, cache_ratio=0.7, selector="random", age_weight=0.0),
    dict(interval=4, cache_ratio=0.9, selector="random", age_weight=0.25, warmup_steps=3),
    dict(interval=3, cache_ratio=0.6, selector="attention", age_weight=0.0),
    dict(interval=3, cache_ratio=0.8, selector="attention", age_weight=0.01),
    dict(interval=3, cache_ratio=1.0),
]
STEPS = 8


def assert_close(ours, theirs):
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("text_tokens", ["select", "reuse", "full"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_flux_equals_the_reference(tiny_flux, settings, text_tokens, batch):
    config = TokenCacheConfig(**settings, text_tokens=text_tokens)
    model, plain = (tiny_flux().transformer for _ in range(2))
    dit_accel.apply(model, config)
    g = torch.Generator().manual_seed(5)
    x, text, pooled = (torch.randn(batch, *s, generator=g) for s in ((6 * 4, 32), (8, 32), (32,)))
    ids = torch.zeros(6, 4, 3)
    ids[..., 1], ids[..., 2] = torch.arange(6)[:, None], torch.arange(4)
    ids, txt_ids = ids.flatten(0, 1), torch.zeros(8, 3)
    caches = [reference.Cache(config) for _ in range(batch)]
    ours = theirs = x
    for step in range(STEPS):
        t = torch.full((batch,), 1 - step / STEPS)
        a = model(ours, text, pooled, t, ids, txt_ids, return_dict=False)[0]
        rows = [
            reference.flux_forward(plain, caches[b], theirs[b : b + 1], text[b : b + 1], pooled[b : b + 1], t[:1], ids, txt_ids)
            for b in range(batch)
        ]
        ours, theirs = ours - 0.3 * a, theirs - 0.3 * torch.cat(rows)
        assert_close(a, torch.cat(rows))
    assert_close(ours, theirs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_pixart_equals_the_reference(tiny_pixart, settings, batch):
    config = TokenCacheConfig(**settings)
    model, plain = (tiny_pixart().transformer for _ in range(2))
    dit_accel.apply(model, config)
    g = torch.Generator().manual_seed(5)
    x, text = (torch.randn(batch, *s, generator=g) for s in ((8, 12, 8), (8, 32)))
    mask = (torch.arange(8)[None] < torch.tensor([3, 8, 5])[:batch, None]).long()
    caches = [reference.Cache(config) for _ in range(batch)]
    ours = theirs = x
    for step in range(STEPS):
        t = torch.full((batch,), 900 - 100 * step)
        a = model(
            ours, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
        rows = [
            reference.pixart_forward(plain, caches[b], theirs[b : b + 1], text[b : b + 1], mask[b : b + 1], t[:1])
            for b in range(batch)
        ]
        ours, theirs = ours - 0.3 * a, theirs - 0.3 * torch.cat(rows)
        assert_close(a, torch.cat(rows))
    assert_close(ours, theirs)


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
