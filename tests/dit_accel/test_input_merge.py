"""Steps on which the transformer sees a smaller picture: the algebra on pictures that are known, a reference, and every family."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig
from dit_accel.clock import Moment
from dit_accel.input_merge import InputMerge
from tests.dit_accel import tiny_pipelines

PIPELINES = dict(tiny_pipelines.pipelines())
SERVED = {"flux", "flux-true-guidance", "sd3", "auraflow", "lumina2", "cogview4", "pixart", "wan", "wan2.2", "hunyuan-video"}
SERVED |= {"mochi", "prx", "dit", "cogvideox"}


def merge(predicts="flow_prediction", level=(0.4, 0.6), packed=False, side=2, grid=(4, 6)):
    return InputMerge(Moment(False, False, 0, 0, 600.0, 1, (600.0,), (level,), predicts), side, grid, packed)


def predicted(kind, picture, noise, alpha, sigma):
    """What an ideal model returns."""
    return {
        "flow_prediction": noise - picture,
        "reversed": picture - noise,
        "v_prediction": alpha * noise - sigma * picture,
        "epsilon": noise,
        "sample": picture,
    }[kind]


@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("kind", ["flow_prediction", "reversed", "v_prediction", "epsilon", "sample"])
def test_a_flat_picture_comes_out_whole(kind, side):
    """Where cells are flat, what an ideal model says of the small picture makes up what it says of the large one."""
    flow = kind in ("flow_prediction", "reversed")
    alpha, sigma = (0.4, 0.6) if flow else (0.8, 0.6)
    one, generator = merge(kind, (alpha, sigma), side=side), torch.Generator().manual_seed(0)
    small = torch.randn(2, 3, 2, 3, generator=generator)
    picture = small.repeat_interleave(side, -2).repeat_interleave(side, -1)
    noise = torch.randn(picture.shape, generator=generator)
    latents = alpha * picture + sigma * noise
    a, s = one.smaller
    assert a + s == pytest.approx(1) if flow else math.hypot(a, s) == pytest.approx(1)
    assert a / s == pytest.approx(side * alpha / sigma), "signal over noise, so many times as high"
    _, seen = one.shrink(((), {"hidden_states": latents}))
    means = torch.stack([noise[..., i::side, j::side] for i in range(side) for j in range(side)]).mean(0)
    small_noise = means * side
    assert torch.allclose(seen["hidden_states"], a * small + s * small_noise, atol=1e-5)
    assert small_noise.std() == pytest.approx(1, abs=0.35)
    output = one.enlarge(predicted(kind, small, small_noise, a, s), latents)
    assert torch.allclose(output, predicted(kind, picture, noise, alpha, sigma), atol=1e-4)


def test_rows_of_packed_latents_are_pictures():
    """As FLUX packs them: a row holds the 2 x 2 places of one token, channel by channel."""
    one, latents = merge(packed=True), torch.arange(1.0, 1 + 24 * 8).view(1, 24, 8)
    picture = torch.zeros(1, 2, 8, 12)
    for row in range(24):
        for channel in range(2):
            for i in range(2):
                for j in range(2):
                    picture[0, channel, 2 * (row // 6) + i, 2 * (row % 6) + j] = latents[0, row, 4 * channel + 2 * i + j]
    plain = merge()
    pooled, flat = one.pooled(latents), plain.pooled(picture)
    assert pooled.shape == (1, 6, 8) and torch.equal(one._places(pooled, (2, 3)), flat)
    assert torch.equal(one._places(one.spread(pooled), (4, 6)), plain.spread(flat))
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
    assert one.shrink(((), {"hidden_states": latents, "img_ids": ids}))[1]["img_ids"].tolist() == [
        [0, i, j] for i in range(2) for j in range(3)
    ]


@pytest.mark.parametrize("name", ["sd3", "wan", "pixart"])
def test_a_step_equals_the_reference(name):
    """The call is watched from outside: what the stock forward gets and returns, and what the pipeline gets."""
    build, call = PIPELINES[name]
    pipe, seen, got = build(), [], []
    stock = pipe.transformer.forward
    names = [*inspect.signature(stock).parameters]

    def watched(*args, **kwargs):
        output = stock(*args, **kwargs)
        seen.extend([dict(zip(names, args, strict=False)) | kwargs, output])
        return output

    pipe.transformer.forward = watched
    with dit_accel.applied(pipe, OutputCacheConfig(interval=1, merged_steps=(1,))):
        handles = [
            pipe.transformer.register_forward_pre_hook(
                lambda m, a, k: got.append(dict(zip(names, a, strict=False)) | k), with_kwargs=True
            ),
            pipe.transformer.register_forward_hook(lambda m, a, output: got.append(output)),
        ]
        call(pipe, steps=6)
    for handle in handles:
        handle.remove()
    calls = len(got) // 2 // 6  # of a step
    whole, answer, small, returned = (some[2 * calls + i] for some in (got, seen) for i in (0, 1))
    latents, part = whole["hidden_states"], small["hidden_states"]
    assert part.shape[-2:] == (latents.shape[-2] // 2, latents.shape[-1] // 2)
    time = float(pipe.scheduler.timesteps[1])
    if name == "pixart":
        share = float(pipe.scheduler.alphas_cumprod[int(time)])
        alpha, sigma = share**0.5, (1 - share) ** 0.5
        ratio = 2 * alpha / sigma
        a, s = ratio / math.hypot(1, ratio), 1 / math.hypot(1, ratio)
        ratios = (pipe.scheduler.alphas_cumprod / (1 - pipe.scheduler.alphas_cumprod)) ** 0.5
        assert float(small["timestep"].flatten()[0]) == pytest.approx(float((ratios - ratio).abs().argmin()), abs=25)
    else:
        sigma = time / 1000
        alpha = 1 - sigma
        s = sigma / 2 / (alpha + sigma / 2)
        a = 1 - s
        assert float(small["timestep"].flatten()[0]) == pytest.approx(1000 * s, rel=1e-3)
    mean = sum(latents[..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    assert torch.allclose(part, mean * a / alpha, atol=1e-5)
    result = returned[0][:, : part.shape[1]]
    picture = a * part - s * result if pipe.scheduler.config.get("prediction_type") == "v_prediction" else part - s * result
    if name == "pixart" and pipe.scheduler.config.prediction_type == "epsilon":
        picture = (part - s * result) / a
    picture = picture.repeat_interleave(2, -2).repeat_interleave(2, -1)
    expected = (latents - picture) / sigma if name != "pixart" else (latents - alpha * picture) / sigma
    assert torch.allclose(answer[0][:, : part.shape[1]], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_is_served_or_refused_with_the_reason(name):
    build, call = PIPELINES[name]
    pipe = build()
    plain = call(pipe, steps=6)
    with dit_accel.applied(pipe, OutputCacheConfig(interval=1, merged_steps=2)):
        if name not in SERVED:
            with pytest.raises(ValueError, match="do not come as a picture|a time of its own"):
                call(pipe, steps=6)
            return
        found = call(pipe, steps=6)
        assert found.isfinite().all() and found.shape == plain.shape and not torch.equal(found, plain)
        report = dit_accel.report(pipe)
        assert {c.step for c in report.calls if c.merged} == {0, 1} and report.flops_ratio > 1
        assert torch.equal(call(pipe, steps=6), found)
    assert torch.equal(call(pipe, steps=6), plain)


def test_with_no_step_merged_nothing_changes():
    build, call = PIPELINES["flux"]
    pipe = build()
    plain = call(pipe, steps=6)
    for config in (OutputCacheConfig(interval=1, merged_steps=0), OutputCacheConfig(interval=1, merged_steps=(7,))):
        with dit_accel.applied(pipe, config), pytest.warns(UserWarning):
            assert torch.equal(call(pipe, steps=6), plain)


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_steps_above_a_noise_level_are_merged(name):
    """0.5: as much noise as signal."""
    build, call = PIPELINES[name]
    pipe = build()
    plain = call(pipe, steps=6)
    if name == "flux":
        above = [i for i, sigma in enumerate(pipe.scheduler.sigmas[:6].tolist()) if sigma > 0.5]
    else:
        shares = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].tolist()
        above = [i for i, share in enumerate(shares) if share < 0.5]
    assert 0 < len(above) < 6
    found = []
    for settings in ({"merged_above": 0.5}, {"merged_steps": tuple(above)}):
        with dit_accel.applied(pipe, OutputCacheConfig(interval=1, **settings)):
            found.append(call(pipe, steps=6))
            calls = dit_accel.report(pipe).calls
            assert [bool(one.merged) for one in calls] == [one.step in above for one in calls]
    assert torch.equal(*found) and not torch.equal(found[0], plain)
    with dit_accel.applied(pipe, OutputCacheConfig(interval=1, merged_above=1)):
        assert torch.equal(call(pipe, steps=6), plain)


def kept_by_hand(picture, count):
    """Of [H, W, C] the cells of 2 x 2 with the largest variance, summed over channels."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    spread = {
        (i, j): picture[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(0, 1).var(0).sum()
        for i in range(height)
        for j in range(width)
    }
    return sorted(sorted(spread, key=lambda cell: -spread[cell])[:count])


def test_cells_with_detail_keep_their_tokens():
    """Step 1 of a tiny FLUX, watched from outside: which tokens enter, with which ids and time, and what the pipeline gets."""
    build, call = PIPELINES["flux"]
    pipe, seen, got = build(), [], []
    stock = pipe.transformer.forward

    def watched(**kwargs):
        output = stock(**kwargs)
        seen.append((kwargs, output[0].clone()))
        return output

    pipe.transformer.forward = watched
    config = OutputCacheConfig(interval=1, merged_steps=2, merged_keep=0.5, selector="variance")
    with dit_accel.applied(pipe, config):
        handles = [
            pipe.transformer.register_forward_pre_hook(lambda m, a, k: got.append([k]), with_kwargs=True),
            pipe.transformer.register_forward_hook(lambda m, a, output: got[-1].append(output[0])),
        ]
        call(pipe, steps=6, height=96, width=64)
        report = dit_accel.report(pipe)
        assert [one.merged for one in report.calls[:3]] == [report.grid[0] * report.grid[1] * 3 // 4, 3 * 3, 0]
    for handle in handles:
        handle.remove()
    (height, width), sigma = report.grid, float(pipe.scheduler.sigmas[1])
    (whole, answer), (given, returned) = got[1], seen[1]
    x, ids, first = whole["hidden_states"], whole["img_ids"], got[0][1]
    cells = height // 2 * width // 2 // 2
    assert cells == 3 and (height, width) == (6, 4)
    picture = (x - sigma * first)[0]
    kept = kept_by_hand(picture.view(height, width, -1), cells)
    rows = [(2 * i + a) * width + 2 * j + b for i, j in kept for a in (0, 1) for b in (0, 1)]
    rest = [(i, j) for i in range(height // 2) for j in range(width // 2) if (i, j) not in kept]
    assert given["timestep"].flatten()[0] == whole["timestep"].flatten()[0] and given["hidden_states"].shape[1] == 4 * 3 + 3
    assert torch.equal(given["hidden_states"][:, :12], x[:, rows]) and torch.equal(given["img_ids"][:12], ids[rows])
    assert given["img_ids"][12:].tolist() == [[0, 2 * i + 0.5, 2 * j + 0.5] for i, j in rest]
    assert torch.equal(answer[:, rows], returned[:, :12])
    # Of a cell that is merged: the means of its latents at their own noise level, and the picture of that in its places.
    s = sigma / 2 / (1 - sigma + sigma / 2)
    i, j = rest[0]
    tokens = [(2 * i + a) * width + 2 * j + b for a in (0, 1) for b in (0, 1)]
    latents = x[0, tokens].view(2, 2, -1, 2, 2)  # cell's row and column, channel, row and column in the token
    means = latents.mean((-2, -1)).permute(2, 0, 1).flatten() * (1 - s) / (1 - sigma)
    assert torch.allclose(given["hidden_states"][0, 12], means, atol=1e-5)
    small = (means - s * returned[0, 12]).view(-1, 2, 2)
    for place, token in zip(((0, 0), (0, 1), (1, 0), (1, 1)), tokens, strict=True):
        expected = (x[0, token].view(-1, 4) - small[:, place[0], place[1]][:, None]) / sigma
        assert torch.allclose(answer[0, token].view(-1, 4), expected, atol=1e-4)


def test_whole_tokens_beside_merged_ones_go_with_everything_else():
    build, call = PIPELINES["flux"]
    pipe = build()
    plain = call(pipe, steps=6)
    for more in (
        {"selector": "random"},
        {"selector": "similarity", "space": "data"},
        {"selector": "attention"},
        {"merged_keep": 1.0},
    ):
        config = OutputCacheConfig(**{"full_steps": (0, 1, 3, 4), "merged_steps": 4, "merged_keep": 0.4, **more})
        with dit_accel.applied(pipe, config):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                found = call(pipe, steps=6)
            assert found.isfinite().all() and not torch.equal(found, plain)
            assert sum(dit_accel.report(pipe).flops) == pytest.approx(counter.get_total_flops(), rel=0.01)
            assert torch.allclose(call(pipe, steps=6), found, atol=1e-3)
    with dit_accel.applied(pipe, OutputCacheConfig(interval=1, merged_steps=4, merged_keep=1.0)):
        call(pipe, steps=6)
        assert [bool(one.merged) for one in dit_accel.report(pipe).calls] == [True, *[False] * 5]
    with pytest.raises(TypeError, match="positions of PixArtTransformer2DModel"):
        dit_accel.apply(PIPELINES["pixart"][0](), config)
    with pytest.raises(ValueError, match="'cross-entropy' needs entropy, not observed of cells; choose one of random, attention"):
        dit_accel.apply(pipe, OutputCacheConfig(merged_steps=4, merged_keep=0.4, selector="cross-entropy"))
    asks_for_nothing = lambda context: context.attention
    with dit_accel.applied(pipe, OutputCacheConfig(interval=1, merged_steps=4, merged_keep=0.4, selector=asks_for_nothing)):
        with pytest.raises(ValueError, match="context.attention, which is kept only on request"):
            call(pipe, steps=6)


def tokens_of(cells, width, side=2):
    """Numbers of the tokens of cells (row, column), cell by cell."""
    return [(side * i + a) * width + side * j + b for i, j in cells for a in range(side) for b in range(side)]


class Attended(TorchFunctionMode):
    """Attention maps of what runs inside, [B, heads, S, S], for whoever listens."""

    def __init__(self, listen):
        super().__init__()
        self.listen = listen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key = args[:2] if args else (kwargs["query"], kwargs["key"])
            self.listen(torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1))
        return func(*args, **kwargs)


def run_watched(config, **size):
    """A tiny FLUX, step by step: what the pipeline tells it and gets, what its stock forward is given, and attention inside."""
    build, call = PIPELINES["flux"]
    pipe, steps = build(), []
    stock = pipe.transformer.forward

    def watched(**kwargs):
        steps[-1].given = kwargs
        return stock(**kwargs)

    pipe.transformer.forward = watched
    with dit_accel.applied(pipe, config):
        begin = lambda m, a, k: steps.append(SimpleNamespace(told=k, maps=[]))
        pipe.transformer.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
        pipe.transformer.register_forward_hook(lambda m, a, output: setattr(steps[-1], "answer", output[0]))
        with Attended(lambda map: steps[-1].maps.append(map)):
            call(pipe, **size)
        report = dit_accel.report(pipe)
    for step, sigma in zip(steps, pipe.scheduler.sigmas.tolist(), strict=False):
        step.picture = step.told["hidden_states"] - sigma * step.answer
    return steps, report


def best_cells(scores, count):
    """Of scores by cell, in the order of the picture."""
    return sorted(sorted(scores, key=lambda cell: -scores[cell])[:count])


@pytest.mark.parametrize("selector", ["attention", "mine"])
def test_cells_are_kept_by_the_attention_that_they_received(selector):
    """On the step before, of merged tokens alone and then beside whole ones; 96 x 64 px are 3 x 2 cells."""
    if selector == "mine":
        dit_accel.register_selector("mine", needs={"attention"})(lambda context: -context.attention)
    config = OutputCacheConfig(interval=1, merged_steps=3, merged_keep=0.5, selector=selector)
    steps, report = run_watched(config, steps=6, height=96, width=64)
    assert [one.merged for one in report.calls] == [18, 9, 9, 0, 0, 0] and report.grid == (6, 4)
    cells, before = [(i, j) for i in range(3) for j in range(2)], []
    for step, after in zip(steps[:2], steps[1:], strict=False):
        entered = step.given["hidden_states"].shape[1]
        received = torch.stack([one.mean((0, 1, 2))[-entered:] for one in step.maps]).mean(0).tolist()
        scores, merged = {}, [cell for cell in cells if cell not in before]
        for place, cell in enumerate(before):
            scores[cell] = sum(received[4 * place : 4 * place + 4]) / 4
        scores |= dict(zip(merged, received[4 * len(before) :], strict=True))
        before = best_cells({cell: (-1 if selector == "mine" else 1) * score for cell, score in scores.items()}, 3)
        rows = tokens_of(before, 4)
        assert torch.equal(after.given["hidden_states"][:, :12], after.told["hidden_states"][:, rows])
        assert torch.equal(after.given["img_ids"][:12], after.told["img_ids"][rows])


@pytest.mark.parametrize("merged", [3, (1, 3)])
def test_cells_are_kept_where_the_picture_turned_the_most(merged):
    """Between the last two full steps, merged or not; before there are two, no cell is kept."""
    config = OutputCacheConfig(interval=1, merged_steps=merged, merged_keep=0.5, selector="drift")
    steps, report = run_watched(config, steps=6, height=96, width=64)
    at = max(merged) if isinstance(merged, tuple) else merged - 1
    assert [one.merged for one in report.calls] == [18 * (merged == 3), 18, 9 * (merged == 3), 9 * (at == 3), 0, 0]
    turned = 1 - torch.cosine_similarity(steps[at - 1].picture, steps[at - 2].picture, dim=-1)[0].view(6, 4)
    scores = {(i, j): float(turned[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean()) for i in range(3) for j in range(2)}
    rows = tokens_of(best_cells(scores, 3), 4)
    assert torch.equal(steps[at].given["hidden_states"][:, :12], steps[at].told["hidden_states"][:, rows])


def test_with_the_forecast_and_with_half_of_the_guidance():
    for name, more in (("flux", {}), ("pixart", {"guidance_steps": 2})):
        build, call = PIPELINES[name]
        pipe = build()
        with dit_accel.applied(pipe, OutputCacheConfig(full_steps=(0, 1, 2, 4, 6), merged_steps=(0, 1, 4), **more)):
            assert call(pipe, steps=8).isfinite().all()
            report = dit_accel.report(pipe)
        assert [c.step for c in report.calls if c.merged] == [0, 1, 4] and report.partial_steps == 3


EARLY = OutputCacheConfig(interval=1, merged_steps=2)
LATE = {
    "cached": [TokenCacheConfig(interval=2, cache_ratio=0.5)],
    "merged": [TokenMergeConfig(ratio=0.5, merge_mlp=True)],
    "cached and merged": [TokenCacheConfig(interval=3, cache_ratio=0.5, selector="attention"), TokenMergeConfig(ratio=0.5)],
    "packed": OutputCacheConfig(interval=2, compute_ratio=0.3, selector="drift"),
    "packed afresh": OutputCacheConfig(interval=2, compute_ratio=0.3, selector="variance", attention="fresh"),
}


def heard(pipe, run):
    """What the pipeline tells its transformer in a run, and what it gets."""
    calls = []
    hear = lambda module, args, kwargs, output: calls.append((args, kwargs, output))
    handle = pipe.transformer.register_forward_hook(hear, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_after_merged_steps_tokens_are_cached_merged_or_packed(name, late):
    """The first two steps are those of merging alone; what comes after is what begins there without it."""
    build, call = PIPELINES[name]
    pipe, rest = build(), LATE[late]
    both = [*rest, EARLY] if isinstance(rest, list) else replace(rest, merged_steps=2)
    with dit_accel.applied(pipe, EARLY):
        first = heard(pipe, lambda: call(pipe, steps=7))
    with dit_accel.applied(pipe, both):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            found = heard(pipe, lambda: call(pipe, steps=7))
        report = dit_accel.report(pipe)
        assert sum(report.flops) == pytest.approx(counter.get_total_flops(), rel=0.01)
    if late != "merged":
        modes = "full full " + ("full partial partial full partial" if "and" in late else "full partial full partial full")
        assert [one.mode.value for one in report.calls] == modes.split()
    assert all(torch.allclose(a[2][0], b[2][0], atol=1e-5) for a, b in zip(first[:2], found[:2], strict=True))
    assert not torch.equal(first[3][2][0], found[3][2][0])
    with torch.no_grad(), dit_accel.applied(pipe.transformer, rest):
        for args, kwargs, output in found[2:]:
            assert torch.allclose(pipe.transformer(*args, **kwargs)[0], output[0], atol=1e-4)


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ([TokenCacheConfig(interval=3, cache_ratio=0.5), replace(EARLY, merged_steps=(0, 2))], "FFFFPPF"),
        (OutputCacheConfig(full_steps=(0, 1, 2, 5), compute_ratio=0.3, selector="drift", merged_steps=(0, 2)), "FFFFPFP"),
        (OutputCacheConfig(interval=3, compute_ratio=0.3, selector="drift", merged_steps=(0, 2), tolerance=9.0), "FFFFFFP"),
    ],
)
def test_after_a_merged_step_in_the_middle_the_next_one_is_full(config, modes):
    """With a tolerance every step is full until one has two others before it, from which its own forecast's error is known."""
    build, call = PIPELINES["flux"]
    pipe = build()
    with dit_accel.applied(pipe, config):
        assert call(pipe, steps=7).isfinite().all()
        report = dit_accel.report(pipe)
    assert "".join(one.mode.value[0].upper() for one in report.calls) == modes
    assert [one.step for one in report.calls if one.merged] == [0, 2]


def test_flops_are_those_of_the_run():
    build, call = PIPELINES["flux"]
    pipe = build()
    with dit_accel.applied(pipe, OutputCacheConfig(full_steps=(0, 2, 4), merged_steps=(0, 2))):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call(pipe, steps=6)
        assert sum(dit_accel.report(pipe).flops) == counter.get_total_flops()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="merged_keep are about all tokens"):
        OutputCacheConfig(merged_steps=2, merged_keep=0.5, compute_ratio=0.3)
    with pytest.raises(ValueError, match="merged_side must be one of 2, 4"):
        OutputCacheConfig(merged_steps=2, merged_side=3)
    build, call = PIPELINES["flux"]
    pipe = build()
    for other in (OutputCacheConfig(), replace(EARLY, merged_keep=0.5), replace(EARLY, interval=2)):
        with pytest.raises(ValueError, match="says which steps see a smaller picture, and nothing else"):
            dit_accel.apply(pipe, [TokenCacheConfig(), other])
    with dit_accel.applied(pipe, OutputCacheConfig(merged_steps=1)):
        with pytest.raises(ValueError, match="do not divide"):
            call(pipe, steps=4, height=48, width=48)
    given = {"hidden_states": torch.zeros(1, 3, 4, 6), "controlnet_block_samples": [torch.zeros(1)]}
    with pytest.raises(ValueError, match="controlnet_block_samples belongs to all tokens"):
        merge().shrink(((), given))
