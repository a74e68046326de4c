"""What TokenMergeConfig's options do, one by one, and the processors on their own."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import dit_accel
from dit_accel import TokenCacheConfig, TokenMergeConfig
from dit_accel.families.attention import TokenAttnProcessor
from dit_accel.merge_site import MergeSite, Shared
from dit_accel.merging import destinations, match
from tests.dit_accel.test_neighbours import add_ip_adapter

PIXART = {"use_resolution_binning": False, "clean_caption": False, "guidance_scale": 3.0}


def run(pipe, prompts="a red apple", **call):
    prompts = [prompts] if isinstance(prompts, str) else prompts
    generator = [torch.Generator().manual_seed(i) for i in call.pop("seeds", range(len(prompts)))]
    given = {"height": 64, "width": 48, "num_inference_steps": 7, "max_sequence_length": 8, "output_type": "latent", **call}
    return pipe(prompts, generator=generator, **given).images


def matchings(pipe):
    """By step, for every layer, where its matching came from."""
    return ["".join({"here": "M", "before": ".", "not": "-"}[how.value] for how in c.matched) for c in dit_accel.report(pipe).calls]


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(rematch_every=1), ["MMMM"] * 7),
        (dict(rematch_every=2), ["M.M.", "...."] * 3 + ["M.M."]),
        (dict(rematch_every=(3, 1)), ["MMMM", "....", "....", "MMMM", "....", "....", "MMMM"]),
        (dict(rematch_every=(9, 3)), ["M..M", *["...."] * 6]),
        (dict(rematch_every=(3, 9), warmup_steps=2), ["", "", "M...", "....", "....", "M...", "...."]),
    ],
    ids=str,
)
def test_matchings_serve_as_many_steps_and_layers_as_asked(tiny_flux, settings, expected):
    """Two double and two single blocks."""
    pipe = dit_accel.apply(tiny_flux(), TokenMergeConfig(**settings))
    run(pipe)
    assert matchings(pipe) == expected


def test_with_a_cache_only_full_steps_merge(tiny_flux):
    pipe = dit_accel.apply(tiny_flux(), [TokenMergeConfig(rematch_every=(5, 9)), TokenCacheConfig(interval=3)])
    run(pipe)
    assert matchings(pipe) == ["M...", "", "", "....", "", "", "M..."]
    text = str(dit_accel.report(pipe))
    assert "all, 24 merged" in text and "Up to 24 of 48 image tokens" in text
    assert [row["tokens_merged"] for row in dit_accel.report(pipe).to_dict()["calls"]] == [24, 0, 0, 24, 0, 0, 24]


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_processors_alone_merge_attention(tiny_flux, tiny_pixart, family):
    pipe, call = (tiny_flux(), {}) if family == "flux" else (tiny_pixart(), PIXART)
    plain, before = run(pipe, **call), dict(pipe.transformer.attn_processors)
    inner = FluxAttnProcessor if family == "flux" else AttnProcessor2_0
    processors = dit_accel.attn_processors(pipe.transformer, TokenMergeConfig())
    ours = [name for name, processor in processors.items() if type(processor) is TokenAttnProcessor]
    assert ours == [name for name in before if "attn2" not in name]
    assert all(type(processors[name].inner) is inner for name in ours)
    pipe.transformer.set_attn_processor(processors)
    merged = run(pipe, **call)
    assert not torch.equal(merged, plain) and dit_accel.report(pipe).flops_ratio > 1
    dit_accel.remove(pipe)
    assert torch.equal(run(pipe, **call), plain) and pipe.transformer.attn_processors == before


@pytest.mark.parametrize("cached", [False, True], ids=["alone", "with a cache"])
def test_a_layer_whose_processor_was_replaced_is_not_merged(tiny_flux, cached):
    """The matching of its group is then made by the next layer."""
    pipe = tiny_flux()
    merge = TokenMergeConfig(rematch_every=(3, 9), merge_mlp=True)
    dit_accel.apply(pipe, [merge, TokenCacheConfig(interval=2)] if cached else merge)
    pipe.transformer.transformer_blocks[0].attn.set_processor(FluxAttnProcessor())
    run(pipe)
    assert matchings(pipe)[0] == "-M.."
    assert dit_accel.report(pipe).flops_ratio > 1
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        block.attn.set_processor(FluxAttnProcessor())
    with pytest.raises(RuntimeError, match=r"call dit_accel\.apply again"):
        run(pipe)


@pytest.mark.parametrize("settings", [{}, {"proportional_attention": True}, {"merge_mlp": True}], ids=str)
def test_ip_adapters_of_a_batch(tiny_flux, settings):
    """Pictures that merge differently are attended one by one, each with its own adapter's picture."""
    pipe, g = tiny_flux(), torch.Generator().manual_seed(0)
    add_ip_adapter(pipe.transformer)
    dit_accel.apply(pipe, TokenMergeConfig(**settings))
    looks = torch.randn(2, 1, 16, generator=g)
    name = "ip_adapter_image_embeds"
    adapters = lambda look: {name: [look], f"negative_{name}": [look]}
    model, texts = pipe.transformer, torch.randn(2, 8, 32, generator=g)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(6.0))
    inputs = torch.randn(2, 48, 32, generator=g), texts, torch.randn(2, 32, generator=g), torch.tensor([0.5, 0.5])

    @torch.no_grad()
    def call(rows):
        dit_accel.apply(pipe, TokenMergeConfig(**settings))
        extra = {"ip_adapter_image_embeds": [looks[rows]]}
        return model(*(x[rows] for x in inputs), ids, torch.zeros(8, 3), joint_attention_kwargs=extra, return_dict=False)[0]

    together = call(slice(0, 2))
    for b in range(2):
        torch.testing.assert_close(together[b], call(slice(b, b + 1))[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together, call(slice(0, 2)).flip(0), atol=1e-2)
    dit_accel.apply(pipe, TokenMergeConfig(keep_queries=True))
    with pytest.raises(RuntimeError, match="leave keep_queries off"):
        run(pipe, **adapters(looks[:1]))


@pytest.mark.parametrize("settings", [{}, {"keep_queries": True}, {"proportional_attention": True}], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_masked_text_of_flux_stays_unseen(tiny_flux, settings, batch):
    model, g = tiny_flux().transformer, torch.Generator().manual_seed(0)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(6.0))
    latents, text, pooled = (torch.randn(batch, *shape, generator=g) for shape in ((48, 32), (8, 32), (32,)))
    other = torch.cat([text[:, :5], torch.randn(batch, 3, 32, generator=g)], dim=1)
    seen = torch.ones(batch, 1, 1, 56, dtype=torch.bool)
    seen[..., 5:8] = False

    def call(text, mask):
        dit_accel.apply(model, TokenMergeConfig(**settings))
        extra = {} if mask is None else {"attention_mask": mask}
        time = torch.full((batch,), 0.5)
        return model(latents, text, pooled, time, ids, torch.zeros(8, 3), joint_attention_kwargs=extra, return_dict=False)[0]

    assert not torch.allclose(call(text, None), call(other, None), atol=1e-3)
    for mask in (seen, torch.where(seen, 0.0, -1e4), seen.expand(-1, -1, 56, -1)):
        torch.testing.assert_close(call(text, mask), call(other, mask))
        torch.testing.assert_close(call(text, mask), call(text, seen))


@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("proportional", [True, False])
def test_masks_of_merged_tokens_by_hand(queries, boolean, proportional):
    g = torch.Generator().manual_seed(0)
    site = MergeSite(TokenMergeConfig(proportional_attention=proportional))
    matching = match(torch.randn(2, 16, 4, generator=g), destinations((4, 4), (2, 2)), 8)
    shared = Shared()
    shared.matching = matching
    site.bind(shared, count=8, tokens=16, text=3)
    length, like = 3 + 16 + 2, torch.zeros(2, 1)
    mask = torch.randn(2, 1, length, length, generator=g)
    mask = mask > -0.5 if boolean else mask
    ours = site.mask(mask, like, 3, length, queries)
    for b in range(2):
        groups = [[i] for i in range(3)]
        groups += [[3 + i for i in range(16) if matching.group[b, i] == m] for m in range(8)]
        groups += [[i] for i in range(19, 21)]
        rows = groups if queries else [[i] for i in range(length)]
        for q, asking in enumerate(rows):
            for k, answering in enumerate(groups):
                part = mask[b, 0][asking][:, answering]
                value = part.all() if boolean else part.mean()
                if proportional:
                    weight = torch.tensor(len(answering)).log()
                    value = (weight if value else torch.tensor(float("-inf"))) if boolean else value + weight
                torch.testing.assert_close(ours[b, 0, q, k], value)


def test_more_than_can_be_merged_is_refused():
    with pytest.raises(ValueError, match=r"between 0 and 0\.75, not 0\.8; a larger stride"):
        TokenMergeConfig(ratio=0.8)
    assert TokenMergeConfig(ratio=0.8, stride=(3, 2)).ratio == 0.8


def test_a_picture_too_small_for_any_cell_is_refused_and_the_next_one_made(tiny_flux):
    pipe = tiny_flux()
    plain = run(pipe)
    dit_accel.apply(pipe, TokenMergeConfig(stride=(7, 2)))  # of 6 tokens width
    for _ in range(2):
        with pytest.raises(ValueError, match="can be at most 0"):
            run(pipe)
    assert not torch.equal(run(pipe, width=64), plain)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(ratio=-0.1), "of at least 0"),
        (dict(ratio="half"), "must be a number of at least 0, not 'half'"),
        (dict(ratio=float("nan")), "of at least 0"),
        (dict(stride=2), "two whole numbers"),
        (dict(stride=(0, 2)), "two whole numbers"),
        (dict(rematch_every=0), "two whole numbers"),
        (dict(rematch_every=(1, 2, 3)), "two whole numbers"),
        (dict(rematch_every=True), "two whole numbers"),
        (dict(warmup_steps=-1), "at least 0"),
        (dict(seed=1.5), "at least 0"),
        (dict(randomize="yes"), "True or False"),
        (dict(merge_attention=False), "Nothing would be merged"),
        (dict(merge_attention=False, merge_mlp=True, keep_queries=True), "leave merge_attention on"),
    ],
    ids=str,
)
def test_options_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        TokenMergeConfig(**wrong)


def test_plain_dicts_and_back():
    config = TokenMergeConfig(ratio=0.3, stride=(3, 2), rematch_every=(4, 2), keep_queries=True)
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in config.to_dict().items()}
    assert TokenMergeConfig.from_dict(values) == config
    with pytest.raises(ValueError, match=r"TokenMergeConfig has no option rate\. .*Its options are ratio, stride"):
        TokenMergeConfig.from_dict({"rate": 0.5})


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_the_seed_moves_the_destinations(tiny_flux, tiny_pixart, family):
    pipe, call = (tiny_flux(), {}) if family == "flux" else (tiny_pixart(), PIXART)
    made = [run(dit_accel.apply(pipe, TokenMergeConfig(seed=seed)), **call) for seed in (0, 1, 0)]
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
    fixed = [run(dit_accel.apply(pipe, TokenMergeConfig(seed=seed, randomize=False)), **call) for seed in (0, 1)]
    assert torch.equal(*fixed)
