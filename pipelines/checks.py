"""Options that would do nothing, and settings that are probably not meant: each gets an error or a warning."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import typer

from dit_accel.config import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig
from dit_accel.pipelines.methods import Config, parts
from dit_accel.pipelines.options import KNOBS, flags_of, written

FEW_STEPS = 4  # of a model that was distilled to so few, nearly all are needed


class Rule(NamedTuple):
    """Options of a method that do nothing unless a configuration fulfills a condition, and that condition in words."""

    method: str
    options: tuple[str, ...]
    active: Callable[[Any], bool]
    needs: str


def _looks_at_attention(config: TokenCacheConfig) -> bool:
    from dit_accel import which

    return "attention" in which.get(config.selector).needs


SELECTION = ("selector", "age_weight", "spatial_bonus", "spatial_tile", "query_share", "share_guidance_selection", "selection_seed")
RULES = (
    Rule(
        "token-cache",
        (
            *("cache_ratio", "warmup_steps", "interval_spread", "ratio_schedule", *SELECTION),
            *("text_tokens", "fill", "forecast_order", "cache_dtype", "cache_device"),
        ),
        lambda c: c.interval > 1,
        "unless --interval is at least 2",
    ),
    Rule("token-cache", (*SELECTION, "ratio_schedule"), lambda c: 0 < c.cache_ratio < 1, "unless --cache-ratio is between 0 and 1"),
    Rule("token-cache", ("forecast_order",), lambda c: c.fill == "forecast", "without --fill forecast"),
    Rule("token-cache", ("spatial_tile",), lambda c: c.spatial_bonus > 0, "without --spatial-bonus"),
    Rule("token-cache", ("query_share",), _looks_at_attention, "without a selector that looks at attention: --selector attention"),
    Rule("output-cache", ("interval",), lambda c: c.full_steps is None and c.when is None, "beside --full-steps or --when"),
    Rule("output-cache", ("order", "damping"), lambda c: c.how != "reuse", "with --how reuse"),
    Rule("output-cache", ("guidance_order",), lambda c: c.guidance_steps is not None, "without --guidance-steps"),
    Rule("output-cache", ("selector", "attention", "selection_seed"), lambda c: c.compute_ratio > 0, "without --compute-ratio"),
    Rule("token-merge", ("merge_seed",), lambda c: c.randomize, "with --no-merge-randomize"),
)


def refuse_unused(configs: Sequence[Config], given: Collection[str]) -> None:
    """BadParameter for an option that does nothing in these configurations. `given` are the parameters that were given."""
    found = parts(configs)
    for rule in RULES:
        if rule.method in found and not rule.active(found[rule.method]):
            for name in rule.options:
                if name in given:
                    others = [m for m in found if m != rule.method and m in KNOBS.get(name, {})]
                    if not others:
                        raise typer.BadParameter(f"{written(name)} does nothing {rule.needs}.")


def doubts(configs: Sequence[Config], given: Collection[str], steps: int, few: bool, flux: bool, preset: str | None) -> list[str]:
    """Sentences about what is possible, but probably not meant.

    Args:
        configs: what is asked for.
        given: the parameters of the command that were given.
        steps: of the run.
        few: whether the model was made for very few steps.
        flux: whether it is of the FLUX family, not PixArt.
        preset: its name, if one was asked for.
    """
    found, said = parts(configs), []
    caches = [config for config in found.values() if not isinstance(config, TokenMergeConfig)]
    if few and caches:
        said.append(f"This model was made for {FEW_STEPS} steps or fewer: little can be reused without showing; use --method none.")
    family, other = ("FLUX", "pixart") if flux else ("PixArt", "flux")
    if preset == f"toca-{other}":
        said.append(f"The preset {preset} was published for another family; toca-{family.lower()} is that of {family}.")
    if flux and "share_guidance_selection" in given and "token-cache" in found:
        said.append(f"{written('share_guidance_selection')} does nothing on FLUX, whose guidance is not batched.")
    for method, config in found.items():
        flags = flags_of(method)
        if config.warmup_steps >= steps:
            said.append(f"{flags['warmup_steps']} {config.warmup_steps} covers all {steps} steps: nothing is left out of any.")
        elif not isinstance(config, TokenMergeConfig) and "interval" in given and config.interval > steps:
            said.append(
                f"--interval {config.interval} is longer than the run of {steps} steps: there is one full step at its start."
            )
        if isinstance(config, OutputCacheConfig):
            for name in ("full_steps", "guidance_steps"):
                asked = getattr(config, name)
                late = [step for step in asked if step >= steps] if isinstance(asked, tuple) else []
                if late:
                    which = ", ".join(map(str, late))
                    said.append(f"{flags[name]} names {which}, but the last of the {steps} steps is {steps - 1}, counted from 0.")
    return said
