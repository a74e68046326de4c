"""Put a configuration on a pipeline or a transformer, and take it off again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dit_accel import which
from dit_accel.config import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig
from dit_accel.families import family_of
from dit_accel.state import Run

Model = TypeVar("Model")
Config = TokenCacheConfig | TokenMergeConfig | OutputCacheConfig


@dataclass
class _Applied:
    """What is applied to a transformer, kept on it: its engine, and how to put everything back."""

    engine: Any
    detach: Callable[[], None]

    def put_on(self, transformer: Any) -> None:
        transformer._dit_accel, transformer.__reduce_ex__ = self, _refuse_copies

    def take_off(self, transformer: Any) -> None:
        self.detach()
        del transformer._dit_accel, transformer.__reduce_ex__


def _refuse_copies(protocol: int) -> Any:
    raise TypeError("A transformer cannot be copied or pickled while dit_accel is applied; call dit_accel.remove first.")


def transformers_of(model: Any) -> list[Any]:
    """The transformers of a pipeline (Wan 2.2 has two), or the model itself if it is one.

    Raises:
        TypeError: if there is none.
    """
    found = (
        [model] if isinstance(model, torch.nn.Module) else [getattr(model, name, None) for name in ("transformer", "transformer_2")]
    )
    found = [_bare(one) for one in found if one is not None]
    if not found or not all(isinstance(one, torch.nn.Module) for one in found):
        raise TypeError(f"{type(model).__name__} has no transformer; give a pipeline of diffusers that has one, or a transformer.")
    return found


def _bare(model: Any) -> Any:
    """Without the wrappers of torch.compile and of peft."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def transformer_of(model: Any) -> Any:
    """The transformer of a pipeline, the first if there are two, or the model itself if it is one."""
    return transformers_of(model)[0]


def applied_to(model: Any) -> Any:
    """The engine of what is applied to a model, or None."""
    applied = vars(transformer_of(model)).get("_dit_accel")
    return applied.engine if applied is not None else None


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
    if isinstance(config, (list, tuple)) and len(config) == 1:
        [config] = config
    if isinstance(config, OutputCacheConfig):
        _attach_output_cache(model, config)
    else:
        processors = _attach(model, config, record, processors_only=False)
        transformer_of(model).set_attn_processor(processors)
    return model


def attn_processors(transformer: Any, config: Config | Sequence[Config]) -> dict[str, Any]:
    """Attention processors that reuse or merge attention alone and leave the rest of every block to be computed in full.

    `transformer.set_attn_processor(attn_processors(transformer, config))` puts them in; `remove` takes them out. `apply` saves
    far more with a cache: attention is less than half of the work, see docs/token-caching.md. Processors match the tokens that
    enter attention, `apply` those that enter the block. Raises what `apply` raises.
    """
    return _attach(transformer, config, record=False, processors_only=True)


def _understand(config: Any) -> tuple[TokenCacheConfig, TokenMergeConfig | None]:
    """The one of each kind; without a cache, one that never caches."""
    given = list(config) if isinstance(config, (list, tuple)) else [config]
    caches = [c for c in given if isinstance(c, TokenCacheConfig)]
    merges = [c for c in given if isinstance(c, TokenMergeConfig)]
    if not given or len(caches) + len(merges) != len(given) or len(caches) > 1 or len(merges) > 1:
        raise TypeError(
            "The configuration must be a TokenCacheConfig, a TokenMergeConfig, or a list of one of each; or an OutputCacheConfig "
            f"alone; not {', '.join(type(c).__name__ for c in given) or 'empty'}."
        )
    return caches[0] if caches else TokenCacheConfig(interval=1), merges[0] if merges else None


def _attach_output_cache(model: Any, config: OutputCacheConfig) -> None:
    from dit_accel import hook, model_scope  # which load what diffusers takes a second for

    found = transformers_of(model)
    for transformer in found:
        if not hasattr(transformer, "config"):
            raise TypeError(f"{type(transformer).__name__} is not a transformer of diffusers.")
        hook.refuse_other_caches(transformer)
    remove(model)
    for transformer in found:
        engine = model_scope.OutputCache(config, transformer)
        hook.attach(transformer, engine, None if isinstance(model, torch.nn.Module) else model)
        _Applied(engine, functools.partial(_detach_output_cache, transformer, engine)).put_on(transformer)


def _detach_output_cache(transformer: Any, engine: Any) -> None:
    from dit_accel import hook

    engine.end()
    hook.unregister(transformer, hook.HOOK)
    if engine.packed is not None:
        engine.packed.detach()


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
    run = Run(cache, merge, record, processors_only, family)
    try:
        processors = dict(family.attach(transformer, run, processors_only))
        if cache.text_tokens != "select" and not any(site.stream in ("text", "joint") for site in run.sites):
            raise ValueError(f"{type(transformer).__name__} computes no text tokens; leave text_tokens at 'select'.")
    except (TypeError, ValueError):
        family.detach(transformer)
        raise
    hook.attach(transformer, run, None if isinstance(model, torch.nn.Module) else model)

    def detach() -> None:
        run.end()
        hook.unregister(transformer, hook.HOOK)
        family.detach(transformer)

    _Applied(run, detach).put_on(transformer)
    return processors


def remove(model: Any) -> None:
    """Put everything back as it was; does nothing where nothing is applied.

    Raises:
        TypeError: for a model that is not supported.
    """
    for transformer in transformers_of(model):
        applied = vars(transformer).get("_dit_accel")
        if applied is not None:
            applied.take_off(transformer)
