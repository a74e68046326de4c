"""torch.compile after apply: as many graphs as there are kinds of steps, none in the second run, the same pictures."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel
from dit_accel import TokenCacheConfig, TokenMergeConfig

PIXART = {"use_resolution_binning": False, "clean_caption": False}


def picture(pipe, seed=0, **extra):
    return pipe(
        "a red apple", height=64, width=48, num_inference_steps=7, max_sequence_length=8, output_type="latent",
        generator=torch.Generator().manual_seed(seed), **extra,
    ).images  # fmt: skip


def compare(build, call, config, backend, regional=False, **how):
    """Graphs of the first run and of the next two, and the relative error against eager."""
    torch._dynamo.reset()
    eager = picture(dit_accel.apply(build(), config), **call)
    pipe, counter = dit_accel.apply(build(), config), CompileCounterWithBackend(backend)
    compile_it = pipe.transformer.compile_repeated_blocks if regional else pipe.transformer.compile
    compile_it(fullgraph=True, backend=counter, **how)
    first = picture(pipe, **call)
    graphs = counter.frame_count
    picture(pipe, seed=1, **call)
    assert torch.equal(picture(pipe, **call), first)
    return graphs, counter.frame_count - graphs, ((first - eager).norm() / eager.norm()).item()


CONFIGS = {
    "random": (dict(), 2),
    "attention": (dict(selector="attention", spatial_bonus=0.4, ratio_schedule="toca"), 2),
    "stratified": (dict(selector="stratified"), 2),
    "drift": (dict(selector="drift"), 2),
    "diverse": (dict(selector="diverse"), 2),
    "no tokens": (dict(cache_ratio=1.0), 2),
    "nothing cached": (dict(interval=1), 1),
    "forecast": (dict(fill="forecast", forecast_order=1), 4),  # full and partial, without and with a full step before
}


@pytest.mark.parametrize("name", CONFIGS)
def test_flux_compiles_into_a_full_and_a_partial_graph(tiny_flux, name):
    changes, expected = CONFIGS[name]
    config = TokenCacheConfig(**{"interval": 3, "cache_ratio": 0.7, **changes})
    graphs, more, error = compare(lambda: tiny_flux(layers=1, single_layers=1), {}, config, "eager")
    assert (graphs, more) == (expected, 0) and error < 1e-5


@pytest.mark.parametrize("name", ["random", "attention", "nothing cached", "forecast"])
def test_pixart_compiles_into_a_full_and_a_partial_graph(tiny_pixart, name):
    changes, expected = CONFIGS[name]
    config = TokenCacheConfig(**{"interval": 3, "cache_ratio": 0.7, **changes, "ratio_schedule": "constant"})
    graphs, more, error = compare(lambda: tiny_pixart(layers=2), PIXART, config, "eager")
    assert (graphs, more) == (expected, 0) and error < 1e-5


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_changing_counts_do_not_recompile_in_the_second_run(tiny_flux, tiny_pixart, family):
    """PixArt's published schedule computes another number of tokens on every step."""
    config = TokenCacheConfig(interval=4, cache_ratio=0.6, ratio_schedule="toca")
    build, call = {"flux": (tiny_flux, {}), "pixart": (lambda: tiny_pixart(layers=2), PIXART)}[family]
    graphs, more, error = compare(build, call, config, "eager")
    assert graphs <= 6 and more == 0 and error < 1e-5


@pytest.mark.parametrize("how, expected", [(dict(dynamic=False), 6), (dict(), 7)])
def test_repeated_blocks_share_their_graphs(tiny_flux, how, expected):
    """The first single block of FLUX gets hidden states of other strides, with or without caching.

    Hooks of diffusers run all blocks through one function, whose arguments torch then takes for dynamic, their views' bases too.
    """
    config = TokenCacheConfig(interval=3, cache_ratio=0.7, selector="attention")
    graphs, more, error = compare(lambda: tiny_flux(layers=3, single_layers=4), {}, config, "eager", regional=True, **how)
    assert (graphs, more) == (expected, 0) and error < 1e-5


MERGES = {
    "attention": dict(),
    "all": dict(merge_mlp=True, rematch_every=(3, 2)),
    "keys": dict(keep_queries=True, proportional_attention=True),
}


@pytest.mark.parametrize("family", ["flux", "pixart"])
@pytest.mark.parametrize("name", MERGES)
def test_merging_compiles_into_graphs_that_match_and_that_reuse(tiny_flux, tiny_pixart, family, name):
    build, call = {"flux": (tiny_flux, {}), "pixart": (lambda: tiny_pixart(layers=2), PIXART)}[family]
    graphs, more, error = compare(build, call, TokenMergeConfig(**MERGES[name]), "eager")
    assert (graphs, more) == (2, 0) and error < 1e-5


def test_merging_and_caching_compile_together(tiny_flux):
    config = [TokenCacheConfig(interval=3, cache_ratio=0.7), TokenMergeConfig(rematch_every=(5, 1))]
    graphs, more, error = compare(lambda: tiny_flux(layers=1, single_layers=1), {}, config, "eager")
    assert (graphs, more) == (3, 0) and error < 1e-5


def test_repeated_blocks_share_their_graphs_of_merging(tiny_flux):
    config = TokenMergeConfig(rematch_every=(3, 2), merge_mlp=True)
    graphs, more, error = compare(lambda: tiny_flux(layers=3, single_layers=4), {}, config, "eager", regional=True)
    assert graphs <= 8 and more == 0 and error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "pixart"])
@pytest.mark.parametrize("selector", ["random", "attention"])
def test_inductor_gives_the_same_picture(tiny_flux, tiny_pixart, family, selector):
    config = TokenCacheConfig(interval=3, cache_ratio=0.7, selector=selector)
    build, call = {"flux": (tiny_flux, {}), "pixart": (tiny_pixart, PIXART)}[family]
    graphs, more, error = compare(build, call, config, "inductor")
    assert (graphs, more) == (2, 0) and error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "pixart"])
@pytest.mark.parametrize("name", MERGES)
def test_inductor_merges_the_same_picture(tiny_flux, tiny_pixart, family, name):
    build, call = {"flux": (tiny_flux, {}), "pixart": (tiny_pixart, PIXART)}[family]
    graphs, more, error = compare(build, call, TokenMergeConfig(**MERGES[name]), "inductor")
    assert (graphs, more) == (2, 0) and error < 1e-4
