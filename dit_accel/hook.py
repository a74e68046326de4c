"""Hears of every call of a transformer, of its guidance branch and of the end of a run; changes nothing.

Not part of `apply.py`, which anybody imports: diffusers takes a second to load its hooks.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from typing import Any

import torch
from diffusers import CacheMixin
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import HookFunctionReference, StateManager

from dit_accel.families import Family
from dit_accel.flops import forget_numbers
from dit_accel.state import Inputs, Run

HOOK = "dit_accel"
CACHES = ("_cache", "pyramid_attention_broadcast")  # how the modules of diffusers' own caches are named


class ContextHook(ModelHook):  # type: ignore[misc]
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


class BeginCall:
    """The transformer's pre-hook: tells the run about every call before it begins."""

    def __init__(self, run: Run, hook: ContextHook, family: Family, pipeline: Any) -> None:
        self.run, self.hook, self.family = run, hook, family
        self.signature = inspect.signature(family.TRANSFORMER.forward)
        self.pipeline = weakref.ref(pipeline) if pipeline is not None else lambda: None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_what_cannot_be_combined(module)
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


def listen(transformer: Any, run: Run, family: Family, pipeline: Any) -> torch.utils.hooks.RemovableHandle:
    """Tell the run about every call from now on, until `stop`.

    Args:
        pipeline: whose transformer it is, if that is known.
    """
    hook = ContextHook(run)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    # In front and without wrapping `forward`, which offloading may wrap and unwrap meanwhile: the hook only listens.
    registry.hooks[HOOK] = hook
    registry._hook_order.insert(0, HOOK)
    registry._fn_refs.insert(0, HookFunctionReference())
    if not isinstance(transformer, CacheMixin):  # what lets a pipeline announce the end of its run
        transformer._reset_stateful_cache = types.MethodType(CacheMixin._reset_stateful_cache, transformer)
    begin = BeginCall(run, hook, family, pipeline)
    handle: torch.utils.hooks.RemovableHandle = transformer.register_forward_pre_hook(begin, with_kwargs=True)
    return handle


def stop(transformer: Any, handle: torch.utils.hooks.RemovableHandle) -> None:
    """The inverse of `listen`, whose result is the handle."""
    handle.remove()
    registry = transformer._diffusers_hook
    del registry.hooks[HOOK], registry._fn_refs[registry._hook_order.index(HOOK)]
    registry._hook_order.remove(HOOK)
    if not registry.hooks:
        del transformer._diffusers_hook
    if not isinstance(transformer, CacheMixin):
        del transformer._reset_stateful_cache


def refuse_other_caches(transformer: Any) -> None:
    """RuntimeError if a cache of diffusers is on the transformer, however it came there."""
    refuse_what_cannot_be_combined(transformer)
    for module in transformer.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if type(hook).__module__.endswith(CACHES):
                raise RuntimeError(f"A cache of diffusers ({type(hook).__name__}) is on this transformer; take it off first.")


def refuse_what_cannot_be_combined(transformer: Any) -> None:
    if getattr(transformer, "is_cache_enabled", False):
        raise RuntimeError("A cache of diffusers is enabled on this transformer; call transformer.disable_cache() first.")
    if getattr(transformer, "_parallel_config", None) is not None:
        raise RuntimeError("Context parallelism splits the tokens over devices, so they cannot be selected; disable it first.")
