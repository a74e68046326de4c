"""Options that would do nothing are errors, settings that are probably not meant get a sentence."""

from __future__ import annotations

import pytest
import typer

from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig
from dit_accel.pipelines.checks import RULES, doubts, refuse_unused
from dit_accel.pipelines.options import KNOBS, flags_of
from dit_accel.pipelines.terminal import spelled


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (TokenCacheConfig(), "forecast_order", "--forecast-order does nothing without --fill forecast."),
        (TokenCacheConfig(cache_ratio=1), "selector", "--selector does nothing unless --cache-ratio is between 0 and 1."),
        (TokenCacheConfig(cache_ratio=0), "age_weight", "--age-weight does nothing unless --cache-ratio"),
        (TokenCacheConfig.preset("fora"), "selection_seed", "--selection-seed does nothing unless --cache-ratio"),
        (TokenCacheConfig(), "spatial_tile", "--spatial-tile does nothing without --spatial-bonus."),
        (TokenCacheConfig(), "query_share", "--query-share does nothing without a selector that looks at attention"),
        (TokenCacheConfig(interval=1), "cache_ratio", "--cache-ratio does nothing unless --interval is at least 2."),
        (OutputCacheConfig(full_steps=(0, 1)), "interval", "--interval does nothing beside --full-steps or --when."),
        (OutputCacheConfig(how="reuse"), "order", "--order does nothing with --how reuse."),
        (OutputCacheConfig(), "guidance_order", "--guidance-order does nothing without --guidance-steps."),
        (OutputCacheConfig(), "selector", "--selector does nothing without --compute-ratio."),
        (TokenMergeConfig(randomize=False), "merge_seed", "--merge-seed does nothing with --no-merge-randomize."),
    ],
)
def test_options_that_do_nothing_are_refused(config, given, message):
    with pytest.raises(typer.BadParameter) as error:
        refuse_unused([config], [given])
    assert str(error.value).startswith(message)
    refuse_unused([config], [])


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (TokenCacheConfig(fill="forecast"), ("forecast_order", "selector", "fill")),
        (TokenCacheConfig(interval=1), ("interval",)),
        (TokenCacheConfig(spatial_bonus=0.4), ("spatial_tile", "spatial_bonus")),
        (TokenCacheConfig(selector="attention"), ("query_share",)),
        (OutputCacheConfig(tolerance=0.1), ("interval", "order")),
        (OutputCacheConfig(compute_ratio=0.5, guidance_steps=2), ("selector", "attention", "guidance_order")),
        (TokenMergeConfig(), ("merge_seed",)),
    ],
)
def test_options_that_do_something_are_not(config, given):
    refuse_unused([config], given)


def test_rules_speak_of_options_that_there_are():
    for rule in RULES:
        assert all(rule.method in KNOBS[name] for name in rule.options)


def said(*configs, given=(), steps=28, few=False, flux=True, preset=None) -> str:
    return " ".join(doubts(configs, given, steps, few, flux, preset))


def test_doubts():
    assert said(TokenCacheConfig()) == said() == said(few=True) == said(TokenMergeConfig(), few=True) == ""
    assert "4 steps or fewer" in said(TokenCacheConfig(), few=True) and "4 steps or fewer" in said(OutputCacheConfig(), few=True)
    long = TokenCacheConfig(interval=30)
    assert said(long) == said(long, given=["interval"], steps=30) == "", "not asked for, or as long as the run"
    assert said(long, given=["interval"]).startswith("--interval 30 is longer than the run of 28 steps")
    assert "--warmup-steps 28 covers all 28 steps" in said(OutputCacheConfig(warmup_steps=28))
    assert "--merge-warmup-steps 30 covers all" in said(TokenMergeConfig(warmup_steps=30))
    assert "--full-steps names 28, 40" in said(OutputCacheConfig(full_steps=(0, 27, 28, 40)))
    assert "--guidance-steps names 30" in said(OutputCacheConfig(guidance_steps=(0, 30)))
    assert said(OutputCacheConfig(full_steps=(0, 27), guidance_steps=40)) == ""
    config = TokenCacheConfig.preset("toca-flux")
    assert said(config, preset="toca-flux") == "" and "toca-pixart" in said(config, flux=False, preset="toca-flux")
    assert "toca-flux is that of FLUX" in said(config, preset="toca-pixart")
    shared = dict(given=["share_guidance_selection"])
    assert "not batched" in said(config, **shared) and said(config, flux=False, **shared) == ""


@pytest.mark.parametrize(
    ("method", "message", "expected"),
    [
        ("token-cache", "interval must be a whole number.", "--interval must be a whole number."),
        ("token-cache", "seed must be 0, not x.", "--selection-seed must be 0, not x."),
        (
            "output-cache",
            "full_steps, tolerance and when each say when a step is full; give one of them.",
            "--full-steps, --tolerance and --when each say when a step is full; give one of them.",
        ),
        (
            "token-merge",
            "keep_queries and proportional_attention are about merged attention; leave merge_attention on.",
            "--merge-keys-only and --merge-proportional are about merged attention; leave --merge-attention on.",
        ),
        ("token-cache", "There is no selector 'fill'; choose a selector.", "There is no selector 'fill'; choose a selector."),
        ("token-cache", "steps must be known.", "steps must be known."),
    ],
)
def test_messages_have_the_options_own_spelling(method, message, expected):
    assert spelled(message, flags_of(method)) == expected
