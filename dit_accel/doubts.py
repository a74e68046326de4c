"""Options that do nothing, and settings that are possible but probably not meant: a sentence about each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, NamedTuple

from dit_accel.config import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig, each

FEW = 4  # steps, of which a model made for so few needs nearly all


class DoubtWarning(UserWarning):
    """What it says is possible, but probably not meant."""


class Rule(NamedTuple):
    """Options of a configuration that do nothing where a condition holds, and that condition in words."""

    kind: type
    options: tuple[str, ...]
    idle: Callable[[Any], bool]
    words: str


def _looks_at_attention(config: TokenCacheConfig) -> bool:
    from dit_accel import which

    return "attention" in which.get(config.selector).needs


SELECTION = (
    *("selector", "age_weight", "spatial_bonus", "spatial_tile", "query_share", "share_guidance_selection", "seed"),
    *("ratio_schedule", "text_tokens"),
)
CACHE = ("warmup_steps", "interval_spread", "fill", "forecast_order", "cache_dtype", "cache_device", *SELECTION)
RULES = (
    Rule(TokenCacheConfig, ("cache_ratio", *CACHE), lambda c: c.interval == 1, "with interval=1"),
    Rule(TokenCacheConfig, ("interval", *CACHE), lambda c: c.cache_ratio == 0, "with cache_ratio=0"),
    Rule(TokenCacheConfig, SELECTION, lambda c: c.cache_ratio == 1, "with cache_ratio=1"),
    Rule(TokenCacheConfig, ("forecast_order",), lambda c: c.fill != "forecast", "without fill='forecast'"),
    Rule(TokenCacheConfig, ("spatial_tile",), lambda c: c.spatial_bonus == 0, "without spatial_bonus"),
    Rule(
        TokenCacheConfig,
        ("query_share",),
        lambda c: not _looks_at_attention(c),
        "without a selector that looks at attention, such as selector='attention'",
    ),
    Rule(OutputCacheConfig, ("interval",), lambda c: c.full_steps is not None and not c.age_weight, "with full_steps"),
    Rule(OutputCacheConfig, ("interval",), lambda c: c.when is not None and not c.age_weight, "with when={c.when!r}"),
    Rule(OutputCacheConfig, ("order", "damping"), lambda c: c.how == "reuse", "with how='reuse'"),
    Rule(OutputCacheConfig, ("how", "damping"), lambda c: max(each(c.order)) == 0, "with order=0"),
    Rule(OutputCacheConfig, ("guidance_order",), lambda c: c.guidance_steps is None, "without guidance_steps"),
    Rule(OutputCacheConfig, ("attention", "age_weight"), lambda c: c.compute_ratio == 0, "without compute_ratio"),
    Rule(OutputCacheConfig, ("selector", "seed"), lambda c: not (c.compute_ratio or c.merged_keep), "without compute_ratio"),
    Rule(OutputCacheConfig, ("merged_side", "merged_keep"), lambda c: not c.merging, "without merged_steps"),
    Rule(TokenMergeConfig, ("seed",), lambda c: not c.randomize, "with randomize=False"),
)


def of_options(config: Any, given: Collection[str] | None = None) -> list[str]:
    """About the options that do nothing beside the others: of those given, or of those that are not what they are by default."""
    said = {
        name: f"{name} does nothing {rule.words.format(c=config)}."
        for rule in reversed(RULES)
        if isinstance(config, rule.kind) and rule.idle(config)
        for name in rule.options
        if name in _given(config, given)
    }
    return list(said.values())


def of_model(config: Any, family: Any) -> list[str]:
    """About what does nothing, or was published for another model, on a family of `dit_accel.families`."""
    said: list[str] = []
    if isinstance(config, TokenCacheConfig):
        name, published = family.transformer.split("Transformer")[0], config.published_as
        own = f"toca-{name.lower()}"
        if published.startswith("toca-") and published != own:
            said.append(f"The preset {published} was published for another model than {name}, for which there is {own}.")
        if not config.share_guidance_selection and not family.batched_guidance:
            said.append(f"share_guidance_selection does nothing on {name}, whose guidance is not batched.")
    return said


def of_run(config: Any, steps: int | None, given: Collection[str] | None = None, few: bool | None = None) -> list[str]:
    """About a configuration in a run of so many steps, None if unknown.

    Args:
        given: as for `of_options`.
        few: whether the model was made for few steps; if that is not known, the number of steps tells.
    """
    said: list[str] = []
    steps = getattr(config, "run_steps", None) or steps
    if steps is None or steps == 1 or (isinstance(config, TokenCacheConfig) and (config.interval == 1 or config.cache_ratio == 0)):
        return said
    if (steps <= FEW if few is None else few) and not isinstance(config, TokenMergeConfig):
        said.append(f"With {FEW} steps or fewer, or a model made for so few, little can be reused without showing.")
    if config.warmup_steps >= steps:
        said.append(f"warmup_steps={config.warmup_steps} covers all {steps} steps: nothing is left out of any.")
    elif "interval" in _given(config, given) and config.interval > steps:
        said.append(f"interval={config.interval} is longer than the run of {steps} steps: there is one full step at its start.")
    for name in ("full_steps", "guidance_steps", "merged_steps"):
        asked = getattr(config, name, None)
        if isinstance(asked, tuple) and (late := [step for step in asked if step >= steps]):
            which = ", ".join(map(str, late))
            said.append(f"{name} has {which}, but the last of the {steps} steps is {steps - 1}, counted from 0.")
    return said


def _given(config: Any, given: Collection[str] | None) -> Collection[str]:
    return [f.name for f in fields(config) if getattr(config, f.name) != f.default] if given is None else given
