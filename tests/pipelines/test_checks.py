"""What the library says of doubtful options, in the options' own spelling: errors before anything is made, and warnings."""

from __future__ import annotations

import warnings

import pytest
import typer

from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig, doubts
from dit_accel.pipelines.checks import doubtful, refuse_unused
from dit_accel.pipelines.options import flags_of
from dit_accel.pipelines.terminal import spelled


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (TokenCacheConfig(), "forecast_order", "--forecast-order does nothing without --fill forecast."),
        (TokenCacheConfig(cache_ratio=1), "selector", "--selector does nothing with --cache-ratio 1."),
        (TokenCacheConfig(cache_ratio=0), "age_weight", "--age-weight does nothing with --cache-ratio 0."),
        (TokenCacheConfig.preset("fora"), "selection_seed", "--selection-seed does nothing with --cache-ratio 1."),
        (TokenCacheConfig(), "spatial_tile", "--spatial-tile does nothing without --spatial-bonus."),
        (TokenCacheConfig(interval=1), "cache_ratio", "--cache-ratio does nothing with --interval 1."),
        (OutputCacheConfig(full_steps=(0, 1)), "interval", "--interval does nothing with --full-steps."),
        (OutputCacheConfig(how="reuse"), "order", "--order does nothing with --how reuse."),
        (OutputCacheConfig(), "guidance_order", "--guidance-order does nothing without --guidance-steps."),
        (OutputCacheConfig(), "selector", "--selector does nothing without --compute-ratio."),
        (TokenMergeConfig(randomize=False), "merge_seed", "--merge-seed does nothing with --no-merge-randomize."),
    ],
)
def test_options_that_do_nothing_are_refused(config, given, message):
    with pytest.raises(typer.BadParameter) as error:
        refuse_unused([config], [given])
    assert str(error.value) == message
    refuse_unused([config], [])
    refuse_unused([config], ["interval"] if isinstance(config, TokenCacheConfig) and config.cache_ratio else ["steps"])


@pytest.fixture
def said(tiny_flux, tiny_pixart):
    pipes = {"flux": tiny_flux(guidance_embeds=True), "schnell": tiny_flux(), "pixart": tiny_pixart()}

    def sentences(*configs, given=(), steps=28, pipe="flux"):
        return " ".join(doubtful(pipes[pipe], "tiny", configs, given, steps))

    with warnings.catch_warnings():
        yield sentences


def test_doubts_in_the_options_own_spelling(said):
    assert said(TokenCacheConfig()) == said(TokenMergeConfig(), pipe="schnell") == said() == ""
    assert "4 steps or fewer" in said(TokenCacheConfig(), pipe="schnell")
    assert said(TokenCacheConfig(), steps=4) == "", "as few as that of a model made for more are the user's choice"
    long = TokenCacheConfig(interval=30)
    assert said(long) == said(long, given=["interval"], steps=30) == "", "not asked for, or as long as the run"
    assert said(long, given=["interval"]).startswith("--interval 30 is longer than the run of 28 steps")
    assert "--warmup-steps 28 covers all 28 steps" in said(OutputCacheConfig(warmup_steps=28))
    assert "--merge-warmup-steps 30 covers all" in said(TokenMergeConfig(warmup_steps=30))
    assert "--full-steps has 28, 40, but" in said(OutputCacheConfig(full_steps=(0, 27, 28, 40)))
    assert "toca-pixart" in said(TokenCacheConfig.preset("toca-flux"), pipe="pixart")
    assert said(TokenCacheConfig(share_guidance_selection=False)).startswith("--share-guidance-selection does nothing on Flux")


def test_the_library_does_not_repeat_what_the_command_has_said(said):
    warnings.simplefilter("error")
    said(TokenCacheConfig())
    warnings.warn("anything", doubts.DoubtWarning, stacklevel=1)


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
        ("output-cache", "No tokens can be selected; set compute_ratio=0.", "No tokens can be selected; set --compute-ratio 0."),
        ("token-cache", "Try fill='reuse', interval=3.", "Try --fill reuse, --interval 3."),
        ("token-cache", "Try cache_ratio=0.9.", "Try --cache-ratio 0.9."),
        ("token-merge", "Set randomize=False or merge_mlp=True.", "Set --no-merge-randomize or --merge-mlp."),
    ],
)
def test_messages_have_the_options_own_spelling(method, message, expected):
    assert spelled(message, flags_of(method)) == expected
