"""Options that do nothing, and settings that are probably not meant, get a warning each."""

from __future__ import annotations

import logging
import warnings

import pytest

import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig, doubts
from dit_accel.doubts import DoubtWarning


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (TokenCacheConfig(forecast_order=2), "forecast_order does nothing without fill='forecast'."),
        (TokenCacheConfig(cache_ratio=1, selector="drift"), "selector does nothing with cache_ratio=1."),
        (TokenCacheConfig(cache_ratio=1.0, ratio_schedule="toca"), "ratio_schedule does nothing with cache_ratio=1."),
        (TokenCacheConfig(cache_ratio=0, interval=5), "interval does nothing with cache_ratio=0."),
        (TokenCacheConfig(interval=1, cache_ratio=0.5), "cache_ratio does nothing with interval=1."),
        (TokenCacheConfig(spatial_tile=2), "spatial_tile does nothing without spatial_bonus."),
        (TokenCacheConfig(query_share=1), "query_share does nothing without a selector that looks at attention, such as"),
        (OutputCacheConfig(full_steps=(0, 1), interval=5), "interval does nothing with full_steps."),
        (OutputCacheConfig(when=lambda progress: 1, interval=5), "interval does nothing with when=<function"),
        (OutputCacheConfig(how="reuse", order=2), "order does nothing with how='reuse'."),
        (OutputCacheConfig(order=0, how="taylor"), "how does nothing with order=0."),
        (OutputCacheConfig(guidance_order=1), "guidance_order does nothing without guidance_steps."),
        (OutputCacheConfig(selector="similarity"), "selector does nothing without compute_ratio."),
        (OutputCacheConfig(attention="fresh"), "attention does nothing without compute_ratio."),
        (TokenMergeConfig(randomize=False, seed=1), "seed does nothing with randomize=False."),
    ],
)
def test_an_option_that_does_nothing_is_named(config, sentence):
    (said,) = doubts.of_options(config)
    assert said.startswith(sentence)


@pytest.mark.parametrize(
    "config",
    [
        *(
            TokenCacheConfig(),
            OutputCacheConfig(),
            TokenMergeConfig(),
            TokenCacheConfig(interval=1),
            TokenCacheConfig(cache_ratio=1),
        ),
        *(TokenCacheConfig.preset(name) for name in ("toca-flux", "toca-pixart", "fora", "taylorseer")),
        TokenCacheConfig(spatial_bonus=0.4, spatial_tile=2, seed=3, fill="forecast", forecast_order=2),
        TokenCacheConfig(selector="attention", query_share=1),
        OutputCacheConfig(tolerance=0.1, interval=5, order=2, damping=0.5),
        OutputCacheConfig(compute_ratio=0.5, attention="fresh", selector="drift", guidance_steps=2, guidance_order=1),
        TokenMergeConfig(seed=3),
    ],
)
def test_an_option_that_does_something_is_not(config):
    assert doubts.of_options(config) == []


def test_rules_speak_of_options_that_there_are():
    for rule in doubts.RULES:
        assert set(rule.options) <= set(rule.kind.kinds())


def test_a_selector_of_ones_own_may_look_at_attention():
    @dit_accel.register_selector(needs={"attention"})
    def mine(context):
        return context.attention

    assert doubts.of_options(TokenCacheConfig(selector="mine", query_share=1)) == []
    assert doubts.of_options(TokenCacheConfig(selector=lambda context: context.noise, query_share=1))


def run(pipe, steps):
    pipe("a", height=64, width=48, num_inference_steps=steps, max_sequence_length=8, output_type="latent")


def told(act, *args):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        act(*args)
    return [str(one.message) for one in found if one.category is DoubtWarning]


def test_apply_and_runs_warn(tiny_flux, tiny_pixart):
    flux, pixart = tiny_flux(), tiny_pixart()
    assert told(dit_accel.apply, flux, TokenCacheConfig(forecast_order=2)) == [
        "forecast_order does nothing without fill='forecast'."
    ]
    for preset in ("toca-flux", TokenCacheConfig.preset("toca-flux", interval=5)):
        (said,) = told(dit_accel.apply, pixart, preset)
        assert said == "The preset toca-flux was published for another model than PixArt, for which there is toca-pixart."
    assert told(dit_accel.apply, pixart, "toca-pixart") == told(dit_accel.apply, flux, "toca-flux") == []
    alone_on_flux = TokenCacheConfig(share_guidance_selection=False)
    assert told(dit_accel.apply, pixart, alone_on_flux) == []
    assert told(dit_accel.apply, flux, alone_on_flux) == [
        "share_guidance_selection does nothing on Flux, whose guidance is not batched."
    ]
    few = "With 4 steps or fewer, or a model made for so few, little can be reused without showing."
    for config, steps, sentences in (
        (TokenCacheConfig(interval=9), 8, ["interval=9 is longer than the run of 8 steps: there is one full step at its start."]),
        (TokenCacheConfig(interval=8), 8, []),
        (TokenCacheConfig(), 4, [few]),
        (OutputCacheConfig(), 4, [few]),
        (TokenMergeConfig(), 4, []),
        (TokenCacheConfig(interval=1), 4, []),
        (TokenCacheConfig(), 5, []),
        (OutputCacheConfig(full_steps=(0, 5, 6)), 6, ["full_steps has 6, but the last of the 6 steps is 5, counted from 0."]),
    ):
        assert told(dit_accel.apply, flux, config) == []
        assert (told(run, flux, steps), told(run, flux, steps)) == (sentences, []), "once"


def test_what_records_nothing_is_refused(tiny_flux):
    with pytest.raises(ValueError, match="without compute_ratio none are"):
        dit_accel.apply(tiny_flux(), OutputCacheConfig(), record=True)


def test_inside_a_block_and_not_after_it(tiny_flux):
    pipe = tiny_flux()
    with dit_accel.applied(pipe, TokenCacheConfig(interval=2), record=True) as same:
        assert same is pipe
        run(pipe, 5)
        assert dit_accel.report(pipe).partial_steps == 2 and dit_accel.report(pipe).selections
    assert "_dit_accel" not in vars(pipe.transformer)
    with pytest.raises(KeyError), dit_accel.applied(pipe, "fora"):
        raise KeyError
    with pytest.raises(RuntimeError, match="Nothing is applied"):
        dit_accel.report(pipe)


def test_presets_by_name(tiny_flux):
    pipe = tiny_flux()
    for preset in ("fora", ["fora"]):
        dit_accel.apply(pipe, preset)
        assert pipe.transformer._dit_accel.config == TokenCacheConfig.preset("fora")
    dit_accel.apply(pipe, ["toca-flux", TokenMergeConfig()])
    assert pipe.transformer._dit_accel.merge == TokenMergeConfig()
    with pytest.raises(ValueError, match="Did you mean toca-flux. Known presets: toca-flux, toca-pixart, fora, taylorseer"):
        dit_accel.apply(pipe, "toca-flx")


def test_notes_go_to_a_logger_and_nothing_is_printed(tiny_flux, caplog, capsys):
    pipe = tiny_flux()
    with caplog.at_level(logging.INFO, logger="dit_accel"):
        dit_accel.remove(dit_accel.apply(pipe, TokenCacheConfig(interval=7)))
    applied, removed = caplog.messages
    assert applied.startswith("Applied to FluxTransformer2DModel: TokenCacheConfig(interval=7,")
    assert removed == "Removed from FluxTransformer2DModel" and capsys.readouterr() == ("", "")
