"""FLOPs of the report against a count of the operations that were really executed, and against published totals."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dit_accel
from dit_accel import TokenCacheConfig, TokenMergeConfig, flops
from dit_accel.when import Mode

PIXART = {"use_resolution_binning": False, "clean_caption": False, "guidance_scale": 3.0}


def executed(pipe, **call) -> int:
    """Of all calls of the transformer in one run; attention as matrix products, which the counter sees on a CPU."""
    total, forward = 0, pipe.transformer.forward

    def counted(*args, **kwargs):
        nonlocal total
        with FlopCounterMode(display=False) as counter:
            output = forward(*args, **kwargs)
        total += counter.get_total_flops()
        return output

    pipe.transformer.forward = counted
    try:
        with sdpa_kernel(SDPBackend.MATH):
            pipe(
                ["a red apple", "a tiger"], height=64, width=48, num_inference_steps=6, max_sequence_length=8,
                output_type="latent", **call,
            )  # fmt: skip
    finally:
        del pipe.transformer.forward
    return total


@pytest.mark.parametrize(
    "family, settings",
    [
        ("flux", {"selector": "random", "ratio_schedule": "toca", "fill": "forecast"}),
        ("flux", {"selector": "attention"}),
        ("flux", {"selector": "similarity", "text_tokens": "full"}),
        ("flux-true-cfg", {"selector": "k-norm", "text_tokens": "reuse"}),
        ("flux-true-cfg", {"selector": "diverse", "cache_ratio": 0.5}),
        ("pixart", {"selector": "random", "ratio_schedule": "toca"}),
        ("pixart", {"selector": "attention", "fill": "forecast"}),
        ("pixart", {"selector": "cross-entropy"}),
        ("pixart", {"selector": "v-norm", "cache_ratio": 1.0}),
    ],
    ids=str,
)
def test_reported_flops_are_those_executed(tiny_flux, tiny_pixart, family, settings):
    pipe, call = (tiny_pixart(), PIXART) if family == "pixart" else (tiny_flux(), {})
    if family == "flux-true-cfg":
        call = {"true_cfg_scale": 2.0, "negative_prompt": ["a teapot"] * 2}
    full = executed(pipe, **call)
    dit_accel.apply(pipe, TokenCacheConfig(**{"interval": 3, "cache_ratio": 0.7, **settings}))
    cached, report = executed(pipe, **call), dit_accel.report(pipe)
    assert sum(report.flops) == cached < full
    assert report.full_flops == full
    assert report.flops_ratio == full / cached
    assert report.to_dict()["flops"] == cached


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_flops_do_not_depend_on_the_precision(tiny_flux, tiny_pixart, monkeypatch, family, dtype):
    pipe, call = (tiny_pixart(), PIXART) if family == "pixart" else (tiny_flux(), {})
    counts = []
    for kind in (torch.float32, dtype):
        monkeypatch.setattr(flops, "_KNOWN", {})
        dit_accel.apply(pipe.to(kind), [TokenCacheConfig(interval=3), TokenMergeConfig()])
        pipe("a red apple", height=64, width=48, num_inference_steps=6, max_sequence_length=8, output_type="latent", **call)
        counts.append(dit_accel.report(pipe).flops)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"rematch_every": (2, 2)},
        {"ratio": 0.3, "stride": (3, 2), "merge_mlp": True, "warmup_steps": 2},
        {"keep_queries": True, "proportional_attention": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("cached", [False, True], ids=["alone", "with a cache"])
@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_reported_flops_of_merging_are_those_executed(tiny_flux, tiny_pixart, family, cached, settings):
    pipe, call = (tiny_pixart(), PIXART) if family == "pixart" else (tiny_flux(), {})
    full, config = executed(pipe, **call), TokenMergeConfig(**settings)
    dit_accel.apply(pipe, [TokenCacheConfig(interval=3, cache_ratio=0.7, selector="attention"), config] if cached else config)
    merged, report = executed(pipe, **call), dit_accel.report(pipe)
    assert sum(report.flops) == merged and report.full_flops == full


def test_what_merging_costs_and_saves_by_formula(tiny_flux):
    """One picture of 48 tokens, 24 of which merge, and 8 of text; the matching compares 36 with 12."""
    pipe = tiny_flux()
    width, layers = pipe.transformer.inner_dim, len(pipe.transformer.transformer_blocks)
    layers += len(pipe.transformer.single_transformer_blocks)
    dit_accel.apply(pipe, TokenMergeConfig(ratio=0.5, rematch_every=(3, 1)))
    pipe("a red apple", height=64, width=48, num_inference_steps=6, max_sequence_length=8, output_type="latent")
    report = dit_accel.report(pipe)
    matching = layers * 2 * 36 * 12 * width
    projections = (4 * len(pipe.transformer.transformer_blocks) + 3 * len(pipe.transformer.single_transformer_blocks)) * width**2
    saved = 2 * 24 * projections + layers * 4 * (56**2 - 32**2) * width
    plain = report.full_flops // 6
    assert report.flops == tuple(plain - saved + matching * (step in (0, 3)) for step in range(6))


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_observing_costs_no_projection_of_its_own(tiny_flux, tiny_pixart, family):
    """Norms of keys are free on a full step; attention received costs queries x keys x width once more, in every layer."""
    pipe, call = (tiny_pixart(), PIXART) if family == "pixart" else (tiny_flux(), {})
    model, layers = pipe.transformer, len(pipe.transformer.transformer_blocks)
    if family == "flux":
        pairs = (layers + len(model.single_transformer_blocks)) * 56**2 * 2  # two pictures of 48 tokens and 8 of text
    else:
        pairs = layers * 48**2 * 4  # and guidance in the same batch
    cost = {}
    for selector in ("random", "k-norm", "v-norm", "attention"):
        executed(dit_accel.apply(pipe, TokenCacheConfig(interval=3, selector=selector)), **call)
        cost[selector] = dit_accel.report(pipe).flops[0]
    assert cost["k-norm"] == cost["v-norm"] == cost["random"]
    assert cost["attention"] - cost["random"] == 2 * pairs * model.inner_dim


@pytest.fixture(scope="module")
def flux_dev():
    """FLUX.1-dev's transformer without weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True).eval()


def run_at_1024(model, steps):
    """`steps` calls with the shapes of one picture of 1024 px and 512 text tokens."""
    kind = {"dtype": model.dtype, "device": "meta"}
    latents, text, pooled = (torch.empty(1, *shape, **kind) for shape in ((4096, 64), (512, 4096), (768,)))
    ids, one = (torch.empty(4096, 3, device="meta"), torch.empty(512, 3, device="meta")), torch.empty(1, **kind)
    with torch.no_grad():
        for _ in range(steps):
            model(latents, text, pooled, one, *ids, guidance=one, return_dict=False)
    return dit_accel.report(model)


@pytest.mark.slow
@pytest.mark.parametrize("interval, full_steps, published", [(4, 14, 1263), (5, 12, 1127), (6, 10, 990)])
def test_toca_on_flux_dev_costs_what_was_published(flux_dev, interval, full_steps, published):
    """50 steps at 1024 px, in TFLOP: arXiv 2410.05317. The release caches attention before its output projection, which it
    then applies to all tokens on every partial step; ours is cached behind it. Scores are left out on both sides."""
    config = TokenCacheConfig.preset("toca-flux", interval=interval, selector="random")
    report = run_at_1024(dit_accel.apply(flux_dev, config), 50)
    steps = [call.step for call in report.calls if call.mode is Mode.FULL]
    text = [int(0.1 * 0.4 * (1.5 - i / 27) * 512) for i in range(19)]
    double = [n for i in range(19) for n in (int(0.1 * 0.4 * (1.5 - i / 27) * 4096), 0)]
    assert steps == [0, 1, 2, *range(2 + interval, 50, interval)] and len(steps) == full_steps
    saved = (50 - full_steps) * 19 * 2 * (4096 + 512) * 3072**2  # output projections of the double blocks
    saved += (50 - full_steps) * sum(text) * 2 * 2 * 4 * 3072**2  # feed-forwards of text, which never reach the picture
    assert abs((sum(report.flops) + saved) / 1e12 - published) < 0.01 * published
    assert abs(report.full_flops / 1e12 - 3719.5) < 1
    single = [int(round(0.1 * 1.6 * (1.5 - i / 27) * 4608, 6)) for i in range(38)]
    assert all(call.counts == (*double, *single) for call in report.calls if call.mode is Mode.PARTIAL)


def test_cache_of_flux_dev_at_1024_px_fits(flux_dev):
    """bfloat16, one picture: at most 3.3 GB, from the shapes of what is kept."""
    model = dit_accel.apply(flux_dev.to(torch.bfloat16), TokenCacheConfig())
    report = run_at_1024(model, 3)
    assert 3.0e9 < report.cache_bytes <= 3.3e9
