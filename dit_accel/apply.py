"""Put a configuration on a pipeline or a transformer, and take it off again."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

from dit_accel import doubts
from dit_accel.config import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig
from dit_accel.recipe import Recipe, choose
from dit_accel.sampler import Sampler

Model = TypeVar("Model")
Config = TokenCacheConfig | TokenMergeConfig | OutputCacheConfig | Recipe
Parts = (TokenCacheConfig, TokenMergeConfig, OutputCacheConfig)
Configs = Config | str | Sequence[Config | str]
LOG = logging.getLogger("dit_accel")


def _refuse_copies(protocol: int) -> Any:
    raise TypeError("A transformer cannot be copied or pickled while dit_accel is applied; call dit_accel.remove first.")


def transformers_of(model: Any) -> list[Any]:
    """The transformers of a pipeline (Wan 2.2 has two), or the model itself if it is one; without wrappers.

    Raises:
        TypeError: if there is none.
    """
    parts = [model] if isinstance(model, torch.nn.Module) else [getattr(model, n, None) for n in ("transformer", "transformer_2")]
    found = [getattr(part, "_orig_mod", part) for part in parts if part is not None]  # of torch.compile
    found = [getattr(part, "get_base_model", lambda part=part: part)() for part in found]  # of peft
    if not found or not all(isinstance(part, torch.nn.Module) for part in found):
        raise TypeError(f"{type(model).__name__} has no transformer; give a pipeline of diffusers that has one, or a transformer.")
    return found


def applied_to(model: Any) -> Any:
    """The engine of what is applied to a model, that of the first transformer if there are two, or None."""
    return vars(transformers_of(model)[0]).get("_dit_accel")


def apply(
    model: Model,
    config: Configs | None = None,
    *,
    speedup: float | None = None,
    min_psnr: float | None = None,
    record: bool = False,
) -> Model:
    """Compute only some tokens from now on. Whatever was applied before is replaced; after an error, nothing stays applied by half.

    Args:
        model: a pipeline of diffusers or its transformer; FLUX or PixArt for token caching and merging.
        config: what to compute, or the name of a preset (see `TokenCacheConfig.preset`), or one of `recipes`; of caching and
            merging together, merging works on the full steps; with `OutputCacheConfig(interval=1, merged_steps=...)` beside them
            the first steps see a smaller picture.
        speedup: in place of a configuration: the closest recipe that is at least so fast. Without a recipe for this model, the
            output is forecast wherever the error that the last full steps had allows it, for about this speed.
        min_psnr: in place of a configuration: the fastest recipe that was measured to be at least so close, in dB.
        record: whether `report` shall also tell which tokens were computed.

    Returns:
        The model given.

    Raises:
        TypeError: for a model or a configuration that is not supported.
        ValueError: for a selector or an option that this family has no use for, or a speed or likeness that no recipe has.
        RuntimeError: when something else that cannot be combined is active; the message says what to switch off.
    """
    if [config, speedup, min_psnr].count(None) < 2:
        raise TypeError("Give either a configuration, or speedup, or min_psnr.")
    if speedup is not None or min_psnr is not None:
        config = choose(model, speedup, min_psnr)
        if not isinstance(config, Recipe) or config.measured is None:
            warnings.warn(
                f"Nothing was measured on this model: {config}. `dit-accel tune` searches and measures recipes for it.",
                doubts.DoubtWarning,
                stacklevel=2,
            )
    _attach(model, config, record, processors_only=False)
    return model


@contextlib.contextmanager
def applied(model: Model, config: Configs | None = None, **more: Any) -> Iterator[Model]:
    """`apply` for a `with` block, at the end of which, also after an error, everything is put back as it was: `remove`."""
    apply(model, config, **more)
    try:
        yield model
    finally:
        remove(model)


def attn_processors(transformer: Any, config: Configs) -> dict[str, Any]:
    """Attention processors that reuse or merge attention alone and leave the rest of every block to be computed in full.

    `transformer.set_attn_processor(attn_processors(transformer, config))` puts them in; `remove` takes them out. `apply` saves
    far more with a cache: attention is less than half of the work, see docs/token-caching.md. Processors match the tokens that
    enter attention, `apply` those that enter the block. Raises what `apply` raises.
    """
    if any(isinstance(part, TokenMergeConfig) and part.merge_mlp for part in _listed(config)):
        raise ValueError("Attention processors cannot reach the feed-forward: leave merge_mlp off, or use dit_accel.apply.")
    (engine,) = _attach(transformer, config, record=False, processors_only=True)
    processors: dict[str, Any] = engine.attn_processors()
    return processors


def _listed(config: Any) -> list[Any]:
    parts = config if isinstance(config, (list, tuple)) else [config]
    return [TokenCacheConfig.preset(part) if isinstance(part, str) else part for part in parts]


def _attach(model: Any, config: Any, record: bool, processors_only: bool) -> list[Any]:
    from dit_accel import hook  # which loads what diffusers takes a second for, as do the engines
    from dit_accel.families.table import lookup

    given, found = _listed(config), transformers_of(model)
    recipe = given[0] if len(given) == 1 and isinstance(given[0], Recipe) else None
    given = [recipe.config] if recipe is not None else given
    kinds = [type(part) for part in given]
    for transformer in found:
        hook.refuse_other_caches(transformer)
    if kinds == [OutputCacheConfig] and not processors_only:
        if record and not given[0].compute_ratio:
            raise ValueError("record tells which tokens are computed, and without compute_ratio none are; leave it out.")
        from dit_accel.model_scope import ModelScope

        engines: list[Any] = [ModelScope(given[0], transformer, recipe, record) for transformer in found]
    elif kinds and set(kinds) != {OutputCacheConfig} and len(set(kinds)) == len(kinds) and set(kinds) <= set(Parts):
        from dit_accel.module_scope import ModuleScope

        cache = next((part for part in given if isinstance(part, TokenCacheConfig)), TokenCacheConfig(interval=1))
        merge = next((part for part in given if isinstance(part, TokenMergeConfig)), None)
        early = next((part for part in given if isinstance(part, OutputCacheConfig)), None)
        if early is not None and (processors_only or not early.merging or early != early.merging_alone):
            raise ValueError(
                "Beside token caching or merging, an OutputCacheConfig says which steps see a smaller picture, and nothing else: "
                "OutputCacheConfig(interval=1, merged_steps=...), also with merged_above or merged_side."
            )
        engines = [ModuleScope(cache, merge, found[0], record, processors_only, early)]
    else:
        raise TypeError(
            "The configuration must be a TokenCacheConfig, a TokenMergeConfig, or a list of one of each, also with an "
            "OutputCacheConfig that only merges steps; or an OutputCacheConfig or a Recipe alone; not "
            f"{', '.join(kind.__name__ for kind in kinds) or 'empty'}."
        )
    sampled = kinds == [OutputCacheConfig] and given[0].sampler_steps is not None
    if sampled and not hasattr(model, "scheduler"):
        raise ValueError("sampler_steps sets the pipeline's scheduler: give dit_accel.apply the pipeline, not its transformer.")
    for part in given:
        for sentence in doubts.of_options(part) + doubts.of_model(part, lookup(found[0])):
            warnings.warn(sentence, doubts.DoubtWarning, stacklevel=3)
    remove(model)
    sampler = Sampler(model.scheduler, recipe or given[0]) if sampled else None
    try:
        for engine in engines:
            engine.configs, engine.sampler = tuple(given), sampler
            engine.transformer._dit_accel, engine.transformer.__reduce_ex__ = engine, _refuse_copies
            engine.attach()
            if sampler is not None:
                sampler.attach()
            hook.attach(engine.transformer, engine, None if isinstance(model, torch.nn.Module) else model)
            if not processors_only and (processors := engine.attn_processors()):
                engine.transformer.set_attn_processor(processors)
    except BaseException:
        remove(model)
        raise
    LOG.info("Applied to %s: %s", ", ".join(type(part).__name__ for part in found), ", ".join(map(str, given)))
    return engines


def remove(model: Any) -> None:
    """Put everything back as it was; does nothing where nothing is applied.

    Raises:
        TypeError: for a model that is not supported.
    """
    for transformer in transformers_of(model):
        if (engine := vars(transformer).get("_dit_accel")) is not None:
            from dit_accel import hook

            engine.end()
            if engine.sampler is not None:
                engine.sampler.detach()
            hook.unregister(transformer, hook.HOOK)
            engine.detach()
            del transformer._dit_accel, transformer.__reduce_ex__
            LOG.info("Removed from %s", type(transformer).__name__)
