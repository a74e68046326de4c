"""Put a configuration on a pipeline or a transformer, and take it off again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dit_accel import which
from dit_accel.config import TokenCacheConfig, TokenMergeConfig
from dit_accel.families import family_of
from dit_accel.state import Run

Model = TypeVar("Model")
Config = TokenCacheConfig | TokenMergeConfig


@dataclass
class _Applied:
    """What `remove` needs to know, kept on the transformer."""

    run: Run
    handle: torch.utils.hooks.RemovableHandle


def transformer_of(model: Any) -> Any:
    """The transformer of a pipeline, or the model itself if it is one.

    Raises:
        TypeError: if there is none that could be served.
    """
    transformer = getattr(model, "transformer", None) if not isinstance(model, torch.nn.Module) else model
    transformer = getattr(transformer, "_orig_mod", transformer)  # of torch.compile
    if transformer is None:
        raise TypeError(f"{type(model).__name__} has no transformer; give a FLUX or PixArt pipeline or its transformer.")
    family_of(transformer)
    return transformer


def run_of(model: Any) -> Run | None:
    """The run of what is applied to a model, if something is."""
    applied = vars(transformer_of(model)).get("_dit_accel")
    return applied.run if applied is not None else None


def apply(model: Model, config: Config | Sequence[Config], *, record: bool = False) -> Model:
    """Compute only some tokens from now on. Whatever was applied before is replaced.

    Args:
        model: a FLUX or PixArt pipeline, or its transformer.
        config: what to compute; of caching and merging together, merging works on the full steps.
        record: whether `report` shall also tell which tokens were computed.

    Returns:
        The model given.

    Raises:
        TypeError: for a model or a configuration that is not supported.
        ValueError: for a selector or an option that this family has no use for.
        RuntimeError: when something else that cannot be combined is active; the message says what to switch off.
    """
    transformer = transformer_of(model)
    processors = _attach(model, config, record, processors_only=False)
    transformer.set_attn_processor(processors)
    return model


def attn_processors(transformer: Any, config: Config | Sequence[Config]) -> dict[str, Any]:
    """Attention processors that reuse or merge attention alone and leave the rest of every block to be computed in full.

    `transformer.set_attn_processor(attn_processors(transformer, config))` puts them in; `remove` takes them out. `apply` saves
    far more with a cache: attention is less than half of the work, see docs/token-caching.md. Processors match the tokens that
    enter attention, `apply` those that enter the block.

    Raises:
        As `apply`.
    """
    return _attach(transformer, config, record=False, processors_only=True)


def _understand(config: Any) -> tuple[TokenCacheConfig, TokenMergeConfig | None]:
    """The one of each kind; without a cache, one that never caches."""
    given = list(config) if isinstance(config, (list, tuple)) else [config]
    caches = [c for c in given if isinstance(c, TokenCacheConfig)]
    merges = [c for c in given if isinstance(c, TokenMergeConfig)]
    if not given or len(caches) + len(merges) != len(given) or len(caches) > 1 or len(merges) > 1:
        raise TypeError(
            "The configuration must be a TokenCacheConfig, a TokenMergeConfig, or a list of one of each, not "
            f"{', '.join(type(c).__name__ for c in given) or 'empty'}."
        )
    return caches[0] if caches else TokenCacheConfig(interval=1), merges[0] if merges else None


def _attach(model: Any, config: Any, record: bool, processors_only: bool) -> dict[str, Any]:
    from dit_accel import hook  # which loads what diffusers takes a second for

    cache, merge = _understand(config)
    if processors_only and merge is not None and merge.merge_mlp:
        raise ValueError("Attention processors cannot reach the feed-forward: leave merge_mlp off, or use dit_accel.apply.")
    transformer = transformer_of(model)
    family = family_of(transformer)
    hook.refuse_other_caches(transformer)
    if missing := sorted(which.get(cache.selector).needs - family.OBSERVATIONS):
        raise ValueError(
            f"The selector {cache.selector!r} needs {', '.join(missing)}, which {type(transformer).__name__} does not have; "
            "choose another one."
        )
    remove(model)
    run = Run(cache, merge, record, processors_only)
    try:
        processors = dict(family.attach(transformer, run, processors_only))
        if cache.text_tokens != "select" and not any(site.stream in ("text", "joint") for site in run.sites):
            raise ValueError(f"{type(transformer).__name__} computes no text tokens; leave text_tokens at 'select'.")
    except (TypeError, ValueError):
        family.detach(transformer)
        raise
    handle = hook.listen(transformer, run, family, None if model is transformer else model)
    transformer._dit_accel = _Applied(run, handle)
    return processors


def remove(model: Any) -> None:
    """Put everything back as it was; does nothing where nothing is applied.

    Raises:
        TypeError: for a model that is not supported.
    """
    transformer = transformer_of(model)
    applied = vars(transformer).get("_dit_accel")
    if applied is None:
        return
    from dit_accel import hook

    applied.run.end()
    hook.stop(transformer, applied.handle)
    family_of(transformer).detach(transformer)
    del transformer._dit_accel
