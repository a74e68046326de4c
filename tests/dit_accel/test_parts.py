"""Config, schedule, selection, fill and importance, each on its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dit_accel
from dit_accel import TokenCacheConfig, importance, store, which
from dit_accel.plan import rule
from dit_accel.when import full_steps, tokens_to_compute


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"interval": 0}, "at least 1"),
        ({"interval": 2.0}, "whole number"),
        ({"interval": True}, "whole number"),
        ({"warmup_steps": 0}, "at least 1"),
        ({"cache_ratio": 1.1}, "between 0 and 1"),
        ({"cache_ratio": float("nan")}, "between 0 and 1"),
        ({"age_weight": -1}, "at least 0"),
        ({"age_weight": float("nan")}, "at least 0"),
        ({"text_tokens": "some"}, "select, reuse, full"),
        ({"cache_ratio": "0.9"}, "must be a number"),
        ({"age_weight": None}, "must be a number"),
        ({"seed": 1.5}, "whole number"),
        ({"share_guidance_selection": "no"}, "True or False"),
        ({"selector": "best"}, "random, attention, k-norm"),
    ],
)
def test_bad_settings_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenCacheConfig(**settings)


def test_config_round_trip_and_unknown_keys():
    config = TokenCacheConfig(interval=5, selector="attention", text_tokens="full")
    assert TokenCacheConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="no option ratio. .*Its options are interval"):
        TokenCacheConfig.from_dict({"ratio": 0.5})


def test_published_full_steps():
    """ToCa on FLUX, 50 steps: 14, 12 and 10 full steps for N = 4, 5, 6; FORA: every N-th."""

    def full(preset, steps, **changes):
        return full_steps(rule(TokenCacheConfig.preset(preset, **changes)), steps)

    assert full("toca-flux", 50) == [0, 1, 2, *range(6, 50, 4)]
    assert [len(full("toca-flux", 50, interval=n)) for n in (4, 5, 6)] == [14, 12, 10]
    assert len(full("taylorseer", 50)) == 10
    assert full("fora", 50) == list(range(0, 50, 3))
    # PixArt, N = 3, w = 0.2, 20 steps: 3 / 0.8 -> 4, 3 / 0.88 -> 3, 3 / 0.94 -> 3, 3 / 1.0 -> 3, 3 / 1.06 -> 3, 3 / 1.12 -> 3
    assert full("toca-pixart", 20) == [0, 4, 7, 10, 13, 16, 19]


@pytest.mark.parametrize(
    "share, tokens, k", [(1 - 0.9, 4096, 409), (1 - 0.9, 10, 1), (1 - 0.7, 10, 3), (1.2, 8, 8), (-0.1, 8, 0), (0.19, 10, 1)]
)
def test_tokens_to_compute(share, tokens, k):
    assert tokens_to_compute(share, tokens) == k


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 12), st.data())
def test_take_and_put_against_loops(seed, batch, tokens, data):
    g = torch.Generator().manual_seed(seed)
    cached, computed_all = torch.randn(2, batch, tokens, 3, generator=g).unbind()
    k, rows = data.draw(st.integers(1, tokens)), data.draw(st.sampled_from([1, batch]))
    index = torch.stack([torch.randperm(tokens, generator=g)[:k] for _ in range(rows)])
    before = cached.clone()
    filled = store.put(cached, index, store.take(computed_all, index))
    for b in range(batch):
        chosen = index[b if rows > 1 else 0].tolist()
        for n in range(tokens):
            assert torch.equal(filled[b, n], (computed_all if n in chosen else before)[b, n])


@pytest.mark.parametrize("queries, keys", [(7, 7), (130, 300), (3, 65)])
def test_attention_received_is_the_column_mean_of_the_map(queries, keys):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, queries, 3, 16, generator=g), torch.randn(2, keys, 3, 16, generator=g)
    received = importance.attention_received(q, k)
    # scaled_dot_product_attention with the identity as values returns the map itself.
    eye = torch.eye(keys).expand(2, 3, keys, keys)
    maps = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), eye)
    torch.testing.assert_close(received, maps.mean(dim=(1, 2)))
    torch.testing.assert_close(received.sum(-1), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_map_is_in_the_type_of_queries_and_keys(dtype):
    """Nothing larger than the keys is made in float32; the scores agree to rounding."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 128, 4, 16, generator=g), torch.randn(1, 300, 4, 16, generator=g)

    class Large(TorchDispatchMode):
        made = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            self.made |= {t.dtype for t in tree_leaves(output) if t.numel() > k.numel()}
            return output

    for score in (importance.attention_received, lambda q, k: importance.attention_entropy(q, k, None, False)):
        with Large() as large:
            found = score(q.to(dtype), k.to(dtype))
        assert large.made == {dtype} and found.dtype is torch.float32
        torch.testing.assert_close(found, score(q, k), rtol=0.01, atol=0)


def test_age_and_normalisation_of_scores():
    scores, ages = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])
    torch.testing.assert_close(which.total_scores(scores, ages, 0.25, 4), torch.tensor([[0.6 + 0.25 * 2 / 4, 0.8]]))
    torch.testing.assert_close(which.total_scores(scores, ages, 0.0, 4), torch.tensor([[0.6, 0.8]]))


def test_age_makes_every_token_take_its_turn(tiny_flux):
    """With a large age weight and a fifth computed, five partial steps in a row compute every token once."""
    pipe, seen = tiny_flux(layers=1, single_layers=0), []

    @dit_accel.register_selector("recording")
    def recording(context):
        "Records what it is asked."
        if context.stream == "image":
            seen.append((context.step, context.ages.clone(), context.tokens.shape, context.noise.shape))
        return context.noise

    dit_accel.apply(pipe, TokenCacheConfig(interval=6, cache_ratio=0.8, age_weight=1e3, selector="recording"))
    pipe("a", height=40, width=64, num_inference_steps=6, max_sequence_length=8, output_type="latent")
    assert [step for step, *_ in seen] == [1, 2, 3, 4, 5]
    for turn, (_, ages, tokens, noise) in enumerate(seen):
        assert tokens == (1, 40, 32) and noise == (1, 40)
        counts = [(ages == age).sum().item() for age in range(turn + 1)]
        assert counts == ([40] if turn == 0 else [8] * turn + [40 - 8 * turn])


@pytest.mark.parametrize("text_tokens", ["select", "reuse", "full"])
def test_a_blind_selector_scores_all_layers_at_once_and_selects_the_same(tiny_flux, text_tokens):
    """Pictures and selections are those of the same selector asked layer by layer; steps are what it is called for."""
    pictures, chosen, asked = [], [], []
    for blind in (False, True):

        @dit_accel.register_selector(f"turns, blind={blind}", per_picture=False, blind=blind, uses_tokens=False)
        def turns(context):
            asked.append(context.noise)
            return context.noise.square() + context.ages / 3

        pipe = tiny_flux(layers=2, single_layers=3)
        config = TokenCacheConfig(interval=4, cache_ratio=0.7, selector=f"turns, blind={blind}", text_tokens=text_tokens)
        dit_accel.apply(pipe, config, record=True)
        generator = torch.Generator().manual_seed(1)
        pictures.append(pipe("a", height=40, width=64, num_inference_steps=8, max_sequence_length=8, generator=generator).images[0])
        chosen.append(dit_accel.report(pipe).selections)
        layers = [len(noise) for noise in asked]
        asked.clear()
    assert set(layers) == {2, 3} and len(layers) == 6 * 2  # the text stream makes no choice: nothing looks at it
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert len(chosen[0]) == len(chosen[1]) == 6 * (2 + 2 + 3)
    for one, other in zip(*chosen, strict=True):
        assert (one.call, one.stream, one.layer) == (other.call, other.stream, other.layer)
        assert torch.equal(one.tokens.sort().values, other.tokens.sort().values)


def test_drift_in_pieces_is_the_cosine_of_every_token():
    """Of more tokens than are compared at once, and a number that no piece divides."""
    now, last = torch.randn(2, 2, 1111, 6, generator=torch.Generator().manual_seed(0))
    nothing = dict(ages=torch.zeros(1, 1111), noise=torch.zeros(1, 1111), count=1, grid=(1, 1111), text=0, where=None)
    found = which.get("drift").score(which.SelectionContext(tokens=now, observed={"last_tokens": last}, **nothing))
    cosine = (now * last).sum(-1) / (now.norm(dim=-1) * last.norm(dim=-1))
    torch.testing.assert_close(found, 1 - cosine)


def test_selector_names():
    assert {"random", "attention"} <= set(dit_accel.selectors())
    assert all(dit_accel.selectors().values())
    for looks in (dict(per_picture=True), dict(per_picture=False, needs={"attention"})):
        with pytest.raises(ValueError, match="looks at no picture"):
            dit_accel.register_selector("seeing", blind=True, **looks)
