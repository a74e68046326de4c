"""Put a configuration on a pipeline or a transformer, and take it off again."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import CacheMixin
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import HookFunctionReference, StateManager

from dit_accel import selection
from dit_accel.config import TokenCacheConfig, TokenMergeConfig
from dit_accel.families import Family, family_of
from dit_accel.flops import forget_numbers
from dit_accel.state import Inputs, Run

HOOK = "dit_accel"
CACHES = ("_cache", "pyramid_attention_broadcast")  # how the modules of diffusers' own caches are named
Model = TypeVar("Model")
Config = TokenCacheConfig | TokenMergeConfig


class _ContextHook(ModelHook):  # type: ignore[misc]
    """Hears from diffusers which guidance branch is called and when a run ends; changes nothing."""

    _is_stateful = True

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.manager = StateManager(object)

    @property
    def branch(self) -> str | None:
        context = self.manager._context
        return context.name if context is not None else None

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.run.end()
        return module


class _BeginCall:
    """The transformer's pre-hook: tells the run about every call before it begins."""

    def __init__(self, run: Run, hook: _ContextHook, family: Family, pipeline: Any) -> None:
        self.run, self.hook, self.family = run, hook, family
        self.signature = inspect.signature(family.TRANSFORMER.forward)
        self.pipeline = weakref.ref(pipeline) if pipeline is not None else lambda: None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _refuse_what_cannot_be_combined(module)
        given = self.signature.bind_partial(module, *args, **kwargs).arguments
        self.run.begin_call(
            Inputs(
                latents=given["hidden_states"],
                text=given["encoder_hidden_states"],
                timestep=given["timestep"],
                name=self.hook.branch,
                first=getattr(getattr(self.pipeline(), "scheduler", None), "step_index", 0) is None,
                grid=functools.partial(self.family.grid, given),
                steps=self._steps,
                batched_guidance=self.family.BATCHED_GUIDANCE,
                remember=functools.partial(forget_numbers, given),
            )
        )

    def _steps(self, timestep: float) -> int | None:
        """Steps of the run that begins at this timestep, from the pipeline's scheduler; img2img begins in the middle.

        None if the scheduler has no such timestep: then the call comes from somewhere else.
        """
        timesteps = getattr(getattr(self.pipeline(), "scheduler", None), "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            return None
        away = (timesteps.float().cpu() - timestep * self.family.TIMESTEP_SCALE).abs()
        begin = int(away.argmin())
        near = float(away[begin]) <= 0.01 * max(1.0, float(timesteps[begin]))  # half precision rounds timesteps
        return len(timesteps) - begin if near else None


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
    cache, merge = _understand(config)
    if processors_only and merge is not None and merge.merge_mlp:
        raise ValueError("Attention processors cannot reach the feed-forward: leave merge_mlp off, or use dit_accel.apply.")
    transformer = transformer_of(model)
    family = family_of(transformer)
    _refuse_what_cannot_be_combined(transformer)
    for module in transformer.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if type(hook).__module__.endswith(CACHES):
                raise RuntimeError(f"A cache of diffusers ({type(hook).__name__}) is on this transformer; take it off first.")
    if missing := sorted(selection.get(cache.selector).needs - family.OBSERVATIONS):
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
    hook = _ContextHook(run)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    # In front and without wrapping `forward`, which offloading may wrap and unwrap meanwhile: the hook only listens.
    registry.hooks[HOOK] = hook
    registry._hook_order.insert(0, HOOK)
    registry._fn_refs.insert(0, HookFunctionReference())
    begin = _BeginCall(run, hook, family, None if model is transformer else model)
    handle = transformer.register_forward_pre_hook(begin, with_kwargs=True)
    if not isinstance(transformer, CacheMixin):  # what lets a pipeline announce the end of its run
        transformer._reset_stateful_cache = types.MethodType(CacheMixin._reset_stateful_cache, transformer)
    transformer._dit_accel = _Applied(run, handle)
    return processors


def _refuse_what_cannot_be_combined(transformer: Any) -> None:
    if getattr(transformer, "is_cache_enabled", False):
        raise RuntimeError("A cache of diffusers is enabled on this transformer; call transformer.disable_cache() first.")
    if getattr(transformer, "_parallel_config", None) is not None:
        raise RuntimeError("Context parallelism splits the tokens over devices, so they cannot be selected; disable it first.")


def remove(model: Any) -> None:
    """Put everything back as it was; does nothing where nothing is applied.

    Raises:
        TypeError: for a model that is not supported.
    """
    transformer = transformer_of(model)
    applied = vars(transformer).get("_dit_accel")
    if applied is None:
        return
    applied.run.end()
    applied.handle.remove()
    family_of(transformer).detach(transformer)
    registry = transformer._diffusers_hook
    del registry.hooks[HOOK], registry._fn_refs[registry._hook_order.index(HOOK)]
    registry._hook_order.remove(HOOK)
    if not registry.hooks:
        del transformer._diffusers_hook
    if not isinstance(transformer, CacheMixin):
        del transformer._reset_stateful_cache
    del transformer._dit_accel
