"""Names: misspelled ones are guessed, functions can stand in their place, and a cell that registers one can be run again."""

from __future__ import annotations

import pytest
import torch

import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig, how, when, which


@pytest.fixture(autouse=True)
def names_of_a_test_end_with_it(monkeypatch):
    monkeypatch.setattr(how, "HOW", dict(how.HOW))
    monkeypatch.setattr(when, "WHEN", {})  # dit_accel has none of its own; other tests may have left theirs


@pytest.fixture
def run(tiny_flux):
    """Latents of a run of the tiny FLUX with this configuration."""

    def picture(config):
        pipe = dit_accel.apply(tiny_flux(), config)
        generator = torch.Generator().manual_seed(0)
        size = dict(height=64, width=48, num_inference_steps=6, max_sequence_length=8, output_type="latent")
        return pipe("a red apple", generator=generator, **size).images

    return picture


def cached(selector):
    return TokenCacheConfig(interval=3, cache_ratio=0.7, selector=selector)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenCacheConfig(intervall=4), r"^TokenCacheConfig has no option intervall\. Did you mean interval\? Its options"),
        (lambda: OutputCacheConfig(full_step=(0, 1)), r"has no option full_step\. Did you mean full_steps\?"),
        (lambda: TokenMergeConfig(keep_query=True), r"has no option keep_query\. Did you mean keep_queries\?"),
        (lambda: TokenCacheConfig.preset("fora", cacheratio=1.0), r"has no option cacheratio\. Did you mean cache_ratio\?"),
        (lambda: TokenCacheConfig(zebra=1), r"has no option zebra\. Its options are interval"),
        (lambda: TokenCacheConfig(selector="atention"), r"no selector 'atention'\. Did you mean attention\? Known selectors: "),
        (lambda: OutputCacheConfig(selector="randon"), r"Did you mean random\?"),
        (lambda: OutputCacheConfig(how="tailor"), r"no method 'tailor'\. Did you mean taylor\? Known methods: reuse"),
        (lambda: OutputCacheConfig(when="mine"), r"no rule 'mine'\. Known rules: none\."),
        (lambda: TokenCacheConfig.preset("toca-flx"), r"no preset 'toca-flx'\. Did you mean toca-flux\? Known presets: toca-flux"),
        (lambda: TokenCacheConfig(fill="forcast"), r"fill must be one of reuse, forecast, not 'forcast'\. Did you mean forecast\?"),
    ],
)  # fmt: skip
def test_misspelled_names_are_guessed(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_misspelled_option_is_a_type_error_as_of_any_function():
    with pytest.raises(TypeError):
        TokenCacheConfig(intervall=4)


def test_a_cell_that_registers_can_be_run_again():
    for number in (1.0, 2.0):
        dit_accel.register_selector("mine")(lambda context, number=number: context.noise * number)
        dit_accel.register_how("mine")(lambda times, now, order, number=number: [number])
        dit_accel.register_when("mine")(lambda progress, number=number: int(number))
        context = which.SelectionContext(None, None, torch.ones(1, 2), 1, (1, 2), 0, None)
        assert which.get("mine").score(context).tolist() == [[number, number]]
        assert how.coefficients("mine", [0.0], 1.0, 0) == [number] and when.get("mine")(None) == number


def test_names_of_our_own_are_not_taken():
    for register, name in ((dit_accel.register_selector, "random"), (dit_accel.register_how, "reuse")):
        with pytest.raises(ValueError, match=f"'{name}' is one of dit_accel's own; choose another name"):
            register(name)(lambda *_: None)
    assert which.get("random").blind and how.get("reuse") is how.reuse


@pytest.mark.parametrize("bare", [True, False])
def test_a_function_is_registered_by_its_own_name(bare):
    def decorated(register, function, **more):
        return register(function) if bare else register(**more)(function)

    def nearest(context):
        "Small ones first."
        return -context.noise

    assert decorated(dit_accel.register_selector, nearest, needs={"keys"}) is nearest
    assert dit_accel.selectors()["nearest"] == "Small ones first." and which.get(nearest) is which.get("nearest")
    assert which.get("nearest").needs == (set() if bare else {"keys"})

    def always(progress):
        return 1

    def newest(times, now, order):
        return [1.0]

    assert decorated(dit_accel.register_when, always) is always is when.get("always")
    assert decorated(dit_accel.register_how, newest) is newest is how.get("newest")


def test_a_function_in_the_place_of_a_name(run):
    def largest(context):
        return context.tokens.norm(dim=-1)

    dit_accel.register_selector("largest")(largest)
    assert torch.equal(run(cached(largest)), run(cached("largest")))
    assert not torch.equal(run(cached(largest)), run(cached("random")))
    half = dict(interval=3, compute_ratio=0.3, attention="reuse")
    assert torch.equal(run(OutputCacheConfig(selector=largest, **half)), run(OutputCacheConfig(selector="largest", **half)))
    assert torch.equal(run(OutputCacheConfig(how=lambda times, now, order: [1.0])), run(OutputCacheConfig(how="reuse")))
    with pytest.raises(ValueError, match="selector must be a name or a function, not 5"):
        cached(5)


def test_a_registered_function_has_what_it_needs(run):
    @dit_accel.register_selector(needs={"key_norms"})
    def longest(context):
        return context.key_norms

    assert torch.equal(run(cached(longest)), run(cached("k-norm")))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda c: None, r"'mine' returned None; it must return a tensor of scores \[1, \d+\], one for each of context\.tokens\.$"),
        (lambda c: [1, 2], r"'mine' returned \[1, 2\]; it must return a tensor"),
        (lambda c: c.noise[0], r"'mine' returned scores of shape \[\d+\]; it must return \[1, \d+\]"),
        (lambda c: c.tokens[..., :2], r"'mine' returned scores of shape \[1, \d+, 2\]"),
        (lambda c: c.noise.log() * 0 / 0, r"'mine' returned NaN for some tokens of layer 0 on step 1; it must return numbers\.$"),
        (
            lambda c: c.key_norms,
            r"looks at context\.key_norms, which is kept only on request; register it with needs=\{'key_norms'\}\.$",
        ),
    ],
)
def test_what_a_selector_does_wrong_is_one_sentence(run, score, message):
    dit_accel.register_selector("mine")(score)
    with pytest.raises(ValueError, match=message):
        run(cached("mine"))
    with pytest.raises(ValueError, match="cannot need heat; it can need keys, values"):
        dit_accel.register_selector("mine", needs={"heat"})
    with pytest.raises(AttributeError, match="has no tokenz"):
        which.SelectionContext(None, None, None, 1, (1, 1), 0, None).tokenz  # noqa: B018


def test_nan_is_found_once_where_looking_makes_the_host_wait(run, monkeypatch):
    """Off the CPU: stood in for by a device of another name."""
    looks = []

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

        def isnan(self):
            looks.append(self)
            return torch.isnan(torch.Tensor(self))

    dit_accel.register_selector("mine")(lambda context: context.noise.as_subclass(Elsewhere))
    context = which.SelectionContext(torch.zeros(1, 4, 2), None, torch.rand(1, 4), 1, (2, 2), 0, None)
    for _ in range(3):
        which.scored(which.get("mine"), "mine", context, 1)
    assert len(looks) == 1
