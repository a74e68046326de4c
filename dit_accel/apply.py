"""Put a configuration on a pipeline or a transformer, and take it off again."""

from __future__ import annotations

import inspect
import types
from typing import Any, TypeVar

import torch
from diffusers import CacheMixin
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager

from dit_accel.config import TokenCacheConfig
from dit_accel.families import family_of
from dit_accel.state import Run

HOOK = "dit_accel"
Model = TypeVar("Model")


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

    def __init__(self, run: Run, hook: _ContextHook) -> None:
        self.run, self.hook = run, hook

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        self.run.begin_call(given["hidden_states"], given["encoder_hidden_states"], given["timestep"], self.hook.branch)


def transformer_of(model: Any) -> Any:
    """The transformer of a pipeline, or the model itself if it is one.

    Raises:
        TypeError: if there is none that could be served.
    """
    transformer = getattr(model, "transformer", None) if not isinstance(model, torch.nn.Module) else model
    if transformer is None:
        raise TypeError(f"{type(model).__name__} has no transformer; give a FLUX or PixArt pipeline or its transformer.")
    family_of(transformer)
    return transformer


def apply(model: Model, config: TokenCacheConfig) -> Model:
    """Compute only some tokens from now on. Whatever was applied before is replaced.

    Args:
        model: a FLUX or PixArt pipeline, or its transformer.
        config: what to compute.

    Returns:
        The model given.

    Raises:
        TypeError: for a model or a configuration that is not supported.
        RuntimeError: when something else that cannot be combined is active; the message says what to switch off.
    """
    if not isinstance(config, TokenCacheConfig):
        raise TypeError(f"The configuration must be a TokenCacheConfig, not a {type(config).__name__}.")
    transformer = transformer_of(model)
    if getattr(transformer, "is_cache_enabled", False):
        raise RuntimeError("A cache of diffusers is enabled on this transformer; call transformer.disable_cache() first.")
    if getattr(transformer, "_parallel_config", None) is not None:
        raise RuntimeError("Context parallelism splits the tokens over devices, so they cannot be selected; disable it first.")
    remove(model)
    run, family = Run(config), family_of(transformer)
    try:
        family.attach(transformer, run)
    except TypeError:
        family.detach(transformer)
        raise
    wrapped_before = "forward" in vars(transformer)
    hook = _ContextHook(run)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.register_hook(hook, HOOK)
    handle = transformer.register_forward_pre_hook(_BeginCall(run, hook), with_kwargs=True)
    if not isinstance(transformer, CacheMixin):  # what lets a pipeline announce the end of its run
        transformer._reset_stateful_cache = types.MethodType(CacheMixin._reset_stateful_cache, transformer)
    transformer._dit_accel = (run, handle, wrapped_before)
    return model


def remove(model: Any) -> None:
    """Put everything back as it was; does nothing where nothing is applied.

    Raises:
        TypeError: for a model that is not supported.
    """
    transformer = transformer_of(model)
    if "_dit_accel" not in vars(transformer):
        return
    run, handle, wrapped_before = transformer._dit_accel
    run.end()
    handle.remove()
    family_of(transformer).detach(transformer)
    registry = transformer._diffusers_hook
    registry.remove_hook(HOOK, recurse=False)
    if not registry.hooks:
        del transformer._diffusers_hook
        if not wrapped_before:  # diffusers' registry leaves the original forward behind as an attribute
            del transformer.forward
    if not isinstance(transformer, CacheMixin):
        del transformer._reset_stateful_cache
    del transformer._dit_accel
