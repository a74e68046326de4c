"""Memory of every selection and of a matching grows no faster than the tokens; the guard sees it when one does."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import dit_accel
from dit_accel import TokenCacheConfig
from dit_accel.when import Mode

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # its scripts import each other by their bare names
from growth import Layer, add_exponents, exponent, matching, measure, selecting  # noqa: E402

FLUX, PIXART = Layer(64, 4, 16, "joint"), Layer(64, 4, 16, "feed-forward")
LIKE = {"dtype": torch.float32, "device": "cpu"}
# So many tokens are computed, and asked as queries, that chunks of a fixed size are full at both sizes.
OPTIONS = {"interval": 2, "cache_ratio": 0.3, "query_share": 1.0}
CONFIG = TokenCacheConfig(**OPTIONS)


def growth(make, sizes=(1024, 4096)) -> float:
    """Exponent of the memory of make(tokens)() between both sizes."""
    with torch.no_grad():
        points = [(tokens, measure(make(tokens), repeats=0, limit=0, device="cpu")["peak_bytes"]) for tokens in sizes]
    return exponent(*points)


@pytest.mark.parametrize("layer", [FLUX, PIXART], ids=["joint", "alone"])
@pytest.mark.parametrize("name", dit_accel.selectors())
def test_memory_of_a_selection_grows_at_most_as_the_tokens(name, layer):
    assert growth(lambda tokens: selecting(name, layer, tokens, CONFIG, **LIKE)) <= 1.03


@pytest.mark.parametrize("then_merge", [False, True], ids=["matching", "merging"])
def test_memory_of_merging_grows_at_most_as_the_tokens(then_merge):
    assert growth(lambda tokens: matching(FLUX, tokens, then_merge, **LIKE), sizes=(4096, 16384)) <= 1.03


@pytest.mark.parametrize("name", dit_accel.selectors())
def test_memory_of_steps_that_select_grows_at_most_as_the_tokens(tiny_flux, tiny_pixart, name):
    """A full and a partial step of a whole transformer: what observes and selects in it hides no map either."""
    family = "pixart" if name == "cross-entropy" else "flux"
    model = (tiny_pixart() if family == "pixart" else tiny_flux(layers=1, single_layers=1)).transformer

    def make(tokens):
        side = math.isqrt(tokens)
        given = {"encoder_hidden_states": torch.randn(1, 8, 32)}
        if family == "pixart":
            given["hidden_states"] = torch.randn(1, 8, 2 * side, 2 * side)
            given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        else:
            places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))
            given |= {"hidden_states": torch.randn(1, tokens, 32), "pooled_projections": torch.randn(1, 32)}
            given |= {"img_ids": places, "txt_ids": torch.zeros(8, 3)}
        dit_accel.apply(model, TokenCacheConfig(selector=name, **OPTIONS))
        return lambda: [model(**given, timestep=torch.tensor([time])) for time in (1.0, 0.9)]

    assert growth(make) <= 1.03
    assert [call.mode for call in dit_accel.report(model).calls] == [Mode.FULL, Mode.PARTIAL]


@pytest.mark.parametrize("share", [1, 16], ids=["whole map", "a sixteenth of it"])
def test_a_map_of_all_pairs_is_noticed(share):
    @dit_accel.register_selector("pairs")
    def pairs(context):
        tokens = context.tokens
        return (tokens[:, ::share] @ tokens.transpose(1, 2)).amax(dim=1)

    assert growth(lambda tokens: selecting("pairs", PIXART, tokens, CONFIG, **LIKE)) > 1.4


def test_a_selection_is_of_the_asked_number_and_repeats_itself():
    for name in dit_accel.selectors():
        work = selecting(name, FLUX, 64, CONFIG, **LIKE)
        first, second = work().sort().values, work().sort().values
        assert first.shape == (1, round(0.7 * (64 + 16))) and torch.equal(first, second)
        assert len(first.unique()) == first.shape[1] and 0 <= first.min() and first.max() < 64 + 16


def test_exponents_compare_rows_of_one_kind_by_size():
    def row(tokens, size, what="matching", threads=1):
        return {"what": what, "by": "dit-accel", "config": {"threads": threads}, "tokens": tokens, "peak_bytes": size}

    rows = [row(4096, 64), row(256, 2), row(1024, 8), row(1024, 3, what="other"), row(4096, 5, threads=2)]
    add_exponents(rows)
    assert [each["exponent"] for each in rows] == pytest.approx([1.5, None, 1.0, None, None])
