"""What can be configured, asked for and combined, each on its own."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig, importance
from dit_accel.when import Mode
from tests.dit_accel import reference

CONFIG = TokenCacheConfig(interval=3, cache_ratio=0.7, selector="attention", age_weight=0.05)
EXTRA = {"flux": {}, "pixart": {"use_resolution_binning": False, "clean_caption": False}}


@pytest.fixture(params=["flux", "pixart"])
def family(request):
    return request.param


@pytest.fixture
def build(family, tiny_flux, tiny_pixart):
    return tiny_flux if family == "flux" else tiny_pixart


@pytest.fixture
def run(family):
    def picture(pipe, prompts="a red apple", seeds=(0,), **call):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = dict(height=64, width=48, num_inference_steps=7, max_sequence_length=8, output_type="latent")
        return pipe(prompts, generator=generator, **{**size, **EXTRA[family], **call}).images

    return picture


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_a_ratio_schedule_of_ones_own_says_how_many_tokens(family, build, run):
    places = []

    def mine(place):
        places.append(place)
        return 0.5 + place.layer + place.progress

    pipe = dit_accel.apply(build(), replace(CONFIG, ratio_schedule=mine))
    run(pipe)
    report, sites = dit_accel.report(pipe), [s for s in pipe.transformer._dit_accel.sites if s.stream != "attention"]
    assert {place.steps for place in places} == {7} and {place.step for place in places} == {1, 2, 4, 5}
    tokens = {"image": 48, "text": 8, "joint": 56, "cross-attention": 48, "feed-forward": 48}
    assert {place.stream for place in places} == (
        {"image", "text", "joint"} if family == "flux" else {"cross-attention", "feed-forward"}
    )
    for place in places:
        assert place.layers == sum(site.stream == place.stream for site in sites) > place.layer
    for call in report.calls:
        if call.mode is Mode.PARTIAL:
            share = [min(1, 0.3 * (0.5 + site.layer + call.step / 7)) for site in sites]
            wanted = [int(s * tokens[site.stream] + 1e-6) for s, site in zip(share, sites, strict=True)]
            assert call.counts == tuple(0 if site.stream == "text" else n for n, site in zip(wanted, sites, strict=True))


@pytest.mark.parametrize("fill", ["reuse", "forecast"])
@pytest.mark.parametrize("dtype, size, error", [("float32", 4, 0), ("bfloat16", 2, 0.02), ("float8_e4m3fn", 1, 0.2)])
def test_a_narrower_cache_takes_less_and_changes_little(family, build, run, fill, dtype, size, error):
    own = replace(CONFIG, fill=fill, selector="random")
    pipe = dit_accel.apply(build(), own)
    expected, most = run(pipe), dit_accel.report(pipe).cache_bytes
    dit_accel.apply(pipe, replace(own, cache_dtype=dtype))
    picture, bytes_now = run(pipe), dit_accel.report(pipe).cache_bytes
    assert relative(picture, expected) <= error and (error == 0) == torch.equal(picture, expected)
    layers = len(pipe.transformer.transformer_blocks)
    text = 0 if family == "flux" else layers * 2 * 2 * 8 * pipe.transformer.inner_dim * 4  # keys and values, both halves
    assert bytes_now - text == pytest.approx((most - text) * size / 4, rel=0.1)  # ages stay as they are


@pytest.mark.parametrize("fill", ["reuse", "forecast"])
def test_a_cache_on_another_device_changes_nothing(build, run, fill):
    pipe = dit_accel.apply(build(), replace(CONFIG, fill=fill))
    expected = run(pipe)
    assert torch.equal(run(dit_accel.apply(pipe, replace(CONFIG, fill=fill, cache_device="cpu"))), expected)
    assert sum(dit_accel.report(pipe).flops) > 0


@pytest.mark.parametrize("name", [n for n in reference.SCORES if n != "cross-entropy"])
def test_every_selector_is_deterministic_and_independent_of_the_batch(build, run, name):
    pipe = dit_accel.apply(build(), replace(CONFIG, selector=name, age_weight=0.02), record=True)
    prompts, seeds = ["red apple", "a tiger", "blue"], (0, 1, 2)
    together, chosen = run(pipe, prompts, seeds), dit_accel.report(pipe).selections
    assert torch.equal(run(pipe, prompts, seeds), together)
    alone = run(pipe, prompts[1], (seeds[1],))
    assert relative(alone[0], together[1]) < 1e-4
    for both, single in zip(chosen, dit_accel.report(pipe).selections, strict=True):
        rows = both.tokens[1 if len(both.tokens) > 1 else 0]
        assert sorted(rows.tolist()) == sorted(single.tokens[0].tolist())


def test_recorded_selections_are_what_was_computed(build, run):
    pipe = build()
    run(dit_accel.apply(pipe, CONFIG))
    assert dit_accel.report(pipe).selections == ()
    run(dit_accel.apply(pipe, CONFIG, record=True))
    report = dit_accel.report(pipe)
    for number, call in enumerate(report.calls):
        made = [s for s in report.selections if s.call == number]
        assert [s.tokens.shape[1] for s in made] == list(call.counts)
        assert all(len(set(row)) == len(row) for s in made for row in s.tokens.tolist())
    frame = report.to_pandas()
    assert frame["tokens_computed"].sum() == sum(s.tokens.shape[1] for s in report.selections)
    assert list(frame["flops"]) == list(report.flops) and len(frame) == 7


@pytest.mark.parametrize("share, queries", [(1.0, 1032), (1 / 2, 516), (1 / 16, 258)])
@torch.no_grad()
def test_attention_received_from_a_sample_of_the_queries(tiny_flux, share, queries):
    """Of a whole single block, against the map of the very queries that are asked: every n-th of the sequence."""
    model, seen = tiny_flux(layers=0, single_layers=1).transformer, {}
    block = model.single_transformer_blocks[0]
    dit_accel.apply(model, TokenCacheConfig(interval=2, selector="attention", query_share=share))
    block.attn.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    g = torch.Generator().manual_seed(0)
    ids = torch.zeros(1024, 3)
    ids[:, 1], ids[:, 2] = torch.arange(1024) // 32, torch.arange(1024) % 32
    x, text, pooled = (torch.randn(1, *s, generator=g) for s in ((1024, 32), (8, 32), (32,)))
    model(x, text, pooled, torch.tensor([1.0]), ids, torch.zeros(8, 3), return_dict=False)
    found = next(s for s in model._dit_accel.sites if s.stream == "joint").memory.observed["attention"]
    heads = lambda layer: layer(seen["hidden_states"]).unflatten(-1, (block.attn.heads, -1))
    query, key = block.attn.norm_q(heads(block.attn.to_q)), block.attn.norm_k(heads(block.attn.to_k))
    query, key = (apply_rotary_emb(part, seen["image_rotary_emb"], sequence_dim=1) for part in (query, key))
    stride = 1032 // queries
    asked = query[:, importance.sample(1032, stride, query.device)]
    assert asked.shape[1] == queries
    torch.testing.assert_close(found, reference.softmax_map(asked, key).mean(dim=(1, 2)), rtol=1e-4, atol=1e-7)
    exact = reference.softmax_map(query, key).mean(dim=(1, 2))
    assert torch.corrcoef(torch.cat([found, exact]))[0, 1] > 0.9


def test_the_sample_of_queries_spares_no_column():
    """64 columns, every 16th token: a comb would ask four columns only."""
    for tokens, stride in ((4096, 16), (4096, 4), (1024, 4), (100, 1), (7, 16)):
        places = importance.sample(tokens, stride, torch.device("cpu"))
        assert len(places) == -(-tokens // stride) and len(places.unique()) == len(places) and places.max() < tokens
        blocks = places // stride
        assert torch.equal(blocks, torch.arange(len(places)))
    columns = torch.bincount(importance.sample(4096, 16, torch.device("cpu")) % 64, minlength=64)
    assert columns.min() >= 3 and columns.max() <= 6


def test_query_stride():
    assert [importance.query_stride(4608, share) for share in (1, 1 / 4, 1 / 16, 1 / 64)] == [1, 4, 16, 18]
    assert importance.query_stride(300, 1 / 16) == 1


def test_processors_alone_reuse_attention_and_compute_the_rest(family, build, run):
    """As if every token of the feed-forward (and of FLUX's single blocks) were selected."""
    everything = lambda place: 1.0 if place.stream == "cross-attention" else 1e6
    expected = run(dit_accel.apply(build(), replace(CONFIG, selector="random", ratio_schedule=everything)))
    pipe = build()
    plain = run(pipe)
    pipe.transformer.set_attn_processor(dit_accel.attn_processors(pipe.transformer, replace(CONFIG, selector="random")))
    if family == "flux":
        assert relative(run(pipe), expected) < 1e-5
    else:  # the number of selecting layers differs, and with it their random numbers
        assert 0 < relative(run(pipe), plain) < 1
    assert [call.mode for call in dit_accel.report(pipe).calls].count(Mode.PARTIAL) == 4
    dit_accel.remove(pipe)
    assert torch.equal(run(pipe), plain)


def test_a_block_whose_processor_was_replaced_is_computed_in_full(tiny_flux):
    """As perturbed-attention guidance does with some layers."""
    pipe = tiny_flux()
    model = dit_accel.apply(pipe, CONFIG).transformer
    model.transformer_blocks[0].attn.set_processor(FluxAttnProcessor())
    size = dict(height=64, width=48, num_inference_steps=4, max_sequence_length=8, output_type="latent")
    modes = []
    model.proj_out.register_forward_hook(lambda *_: modes.append({(s.layer, s.stream): s.mode for s in model._dit_accel.sites}))
    pipe("a", **size)
    assert modes[1][0, "image"] is modes[1][0, "text"] is Mode.PLAIN
    assert modes[1][1, "image"] is modes[1][0, "joint"] is Mode.PARTIAL
    run_flops = dit_accel.report(pipe).flops
    assert min(run_flops) < max(run_flops)
    dit_accel.remove(pipe)
    assert all(type(processor) is FluxAttnProcessor for processor in model.attn_processors.values())


@pytest.mark.parametrize(
    "name, text_tokens, computed",
    [("random", "select", 0), ("attention", "select", 0), ("drift", "select", 4), ("drift", "reuse", 0), ("drift", "full", 0)],
)
def test_text_is_computed_only_where_it_can_reach_the_picture(tiny_flux, name, text_tokens, computed):
    """On partial steps nothing looks at the text stream but selectors that look at tokens, among which text is: noise in place of
    its feed-forwards' results leaves the picture as it is to the bit."""
    size = dict(height=64, width=48, num_inference_steps=3, max_sequence_length=8, output_type="latent")
    config, calls, pictures = TokenCacheConfig(interval=3, cache_ratio=0.5, selector=name, text_tokens=text_tokens), [], []
    for noisy in (False, True):
        pipe = dit_accel.apply(tiny_flux(), config)
        steps = [0]
        pipe.transformer.register_forward_pre_hook(lambda *_: steps.append(len(steps)))
        for block in pipe.transformer.transformer_blocks:

            def replaced(module, args, output, steps=steps, noisy=noisy):
                calls.append(steps[-1])
                return torch.randn_like(output) if noisy and steps[-1] > 1 else output

            block.ff_context.register_forward_hook(replaced)
        pictures.append(pipe("a", **size, generator=torch.Generator().manual_seed(0)).images)
        assert sum(step > 1 for step in calls) == computed and calls.count(1) == 2
        calls.clear()
    assert computed or torch.equal(*pictures)


def test_a_cache_of_diffusers_enabled_afterwards_is_noticed(tiny_flux):
    pipe = dit_accel.apply(tiny_flux(), CONFIG)
    run = lambda: pipe(
        "a", height=64, width=48, num_inference_steps=4, max_sequence_length=8, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    cached = run()
    broadcast = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    for other in (FirstBlockCacheConfig(), broadcast):
        pipe.transformer.enable_cache(other)
        with pytest.raises(RuntimeError, match=r"disable_cache\(\) first, or dit_accel\.remove"):
            run()
        pipe.transformer.disable_cache()
        assert torch.equal(run(), cached)


@torch.no_grad()
def test_a_transformer_alone_does_not_know_the_number_of_steps(tiny_flux):
    g = torch.Generator().manual_seed(0)
    x, text, pooled = (torch.randn(1, *s, generator=g) for s in ((16, 32), (8, 32), (32,)))
    call = lambda m: m(x, text, pooled, torch.tensor([1.0]), torch.zeros(16, 3), torch.zeros(8, 3), return_dict=False)[0]
    config = replace(CONFIG, interval_spread=0.2)
    with pytest.raises(RuntimeError, match="Give dit_accel.apply the pipeline, or set steps"):
        call(dit_accel.apply(tiny_flux().transformer, config))
    call(dit_accel.apply(tiny_flux().transformer, replace(config, steps=10)))


def test_scores_of_a_wrong_shape_are_explained(build, run):
    @dit_accel.register_selector("wrong")
    def wrong(context):
        return context.noise[0]

    with pytest.raises(ValueError, match=r"selector 'wrong' returned scores of shape \[\d+\]; it must return \[1( or \d)?, \d+\]"):
        run(dit_accel.apply(build(), replace(CONFIG, selector="wrong")))


def test_a_processor_that_cannot_be_observed_is_explained(build, run):
    pipe = build()
    block = pipe.transformer.transformer_blocks[0]
    attn = getattr(block, "attn", None) or block.attn1

    class Foreign(type(attn.processor)):
        def __call__(self, attn, *args, **kwargs):
            return super().__call__(getattr(attn, "attn", attn), *args, **kwargs)  # its own way to the projections

    class Blind(type(attn.processor)):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
            return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)

    for processor, selector, message in (
        (Foreign(), "k-norm", "Foreign does not use diffusers' projections.*choose another one"),
        (Blind(), "attention", "Blind does not compute attention by PyTorch's.*'native'.*choose a selector that looks at no"),
    ):
        attn.set_processor(processor)
        run(dit_accel.apply(pipe, replace(CONFIG, selector="random")))
        with pytest.raises(RuntimeError, match=message):
            run(dit_accel.apply(pipe, replace(CONFIG, selector=selector)))
        dit_accel.remove(pipe)


def test_a_selector_that_this_family_cannot_serve_is_refused(tiny_flux):
    with pytest.raises(ValueError, match="'cross-entropy' needs entropy, which FluxTransformer2DModel does not have"):
        dit_accel.apply(tiny_flux(), replace(CONFIG, selector="cross-entropy"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interruption_in_the_first_step_leaves_nothing_behind(build, run, dtype):
    """Neither within the first call nor between the first two, when the same prompt is asked with other noise."""
    pipe = dit_accel.apply(build(), CONFIG).to(dtype)
    expected = run(pipe, seeds=(1,))
    for part in (pipe.transformer.proj_out, pipe.transformer.transformer_blocks[1]):

        def stop(*_):
            raise KeyboardInterrupt

        hook = part.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            run(pipe)
        hook.remove()
        assert torch.equal(run(pipe, seeds=(1,)), expected)
        assert len(dit_accel.report(pipe).calls) == 7


@pytest.mark.parametrize("settings", [{"interval": 1}, {"cache_ratio": 0}], ids=str)
def test_nothing_cached_costs_what_the_plain_model_costs(build, run, settings):
    pipe = dit_accel.apply(build(), replace(CONFIG, **settings))
    run(pipe)
    assert dit_accel.report(pipe).flops_ratio == 1 and dit_accel.report(pipe).cache_bytes == 0


@pytest.mark.parametrize("name", [n for n in reference.SCORES if n != "cross-entropy"])
@pytest.mark.parametrize("text_tokens", ["select", "reuse", "full"])
def test_no_image_token_at_all(tiny_flux, name, text_tokens):
    config = TokenCacheConfig(interval=3, cache_ratio=1.0, selector=name, text_tokens=text_tokens)
    pipe = dit_accel.apply(tiny_flux(), config, record=True)
    pipe("a", height=64, width=48, num_inference_steps=3, max_sequence_length=8, output_type="latent")
    report = dit_accel.report(pipe)
    assert all(made.tokens.numel() == 0 or made.tokens.max() < 8 for made in report.selections)
    assert report.calls[1].tokens_computed == 0


def test_all_tokens_at_times(build, run):
    """A schedule above 1 computes every token, which is recorded and makes all of them fresh."""
    pipe = dit_accel.apply(build(), replace(CONFIG, ratio_schedule=lambda place: 10.0), record=True)
    run(pipe)
    report = dit_accel.report(pipe)
    partial = [call for call in report.calls if call.mode is Mode.PARTIAL]
    text = sum(8 for site in pipe.transformer._dit_accel.sites if site.stream == "text")  # which nothing looks at
    assert partial and all(call.tokens_computed == call.tokens - text for call in partial)
    assert all(sorted(made.tokens[0].tolist()) == list(range(made.tokens.shape[1])) for made in report.selections)


def test_caches_of_diffusers_put_on_by_hand_are_refused(tiny_flux):
    from diffusers.hooks import apply_first_block_cache, apply_pyramid_attention_broadcast

    pipe = tiny_flux()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig())
    with pytest.raises(RuntimeError, match="take it off first"):
        dit_accel.apply(pipe, CONFIG)
    pipe = tiny_flux()
    broadcast = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    apply_pyramid_attention_broadcast(pipe.transformer, broadcast)
    with pytest.raises(RuntimeError, match="take it off first"):
        dit_accel.apply(pipe, CONFIG)


def test_a_transformer_wrapped_by_torch_compile_is_found(tiny_flux):
    pipe = dit_accel.apply(tiny_flux(), CONFIG)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert dit_accel.report(pipe).calls == ()
    dit_accel.remove(pipe)
    assert not hasattr(pipe.transformer._orig_mod, "_dit_accel")


def test_text_tokens_of_a_family_without_any_are_refused(tiny_pixart):
    pipe = tiny_pixart()
    with pytest.raises(ValueError, match="computes no text tokens"):
        dit_accel.apply(pipe, replace(CONFIG, text_tokens="full"))
    assert not any("dit_accel" in type(module).__module__ for module in pipe.transformer.modules())


@torch.no_grad()
def test_a_full_step_that_was_cut_short_is_followed_by_another(tiny_flux):
    """A transformer alone in half precision cannot tell a new run from the next step of the same text."""
    g = torch.Generator().manual_seed(0)
    x, text, pooled = (torch.randn(1, *s, generator=g).bfloat16() for s in ((16, 32), (8, 32), (32,)))
    ids, plain = (torch.zeros(16, 3), torch.zeros(8, 3)), tiny_flux().transformer.bfloat16()
    call = lambda model: model(x, text, pooled, torch.tensor([1.0]).bfloat16(), *ids, return_dict=False)[0]
    model = dit_accel.apply(tiny_flux().transformer.bfloat16(), CONFIG)

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.transformer_blocks[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        call(model)
    hook.remove()
    assert torch.equal(call(model), call(plain))


@pytest.mark.parametrize("config", [TokenCacheConfig, TokenMergeConfig, OutputCacheConfig])
def test_every_option_is_explained_where_it_is_declared(config):
    text = " ".join(config.__doc__.split())
    for field in fields(config):
        assert f"{field.name}: {field.metadata['help']}" in text
        assert config.kinds()[field.name]
