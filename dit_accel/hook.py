"""Stands before a transformer's forward: tells an engine where every call lies, and lets it answer.

Not part of `apply.py`, which anybody imports: diffusers takes a second to load its hooks.
"""

import contextlib
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager

from dit_accel.clock import Call, Clock
from dit_accel.engine import Engine
from dit_accel.plan import Todo

HOOK = "dit_accel"
CACHES = ("_cache", "pyramid_attention_broadcast")  # how the modules of diffusers' own caches are named
LATENTS, TIMESTEP = ("hidden_states", "x"), ("timestep", "t", "timesteps")  # arguments of a transformer's forward
# Of which the text tells guidance branches apart.
TEXT = ("encoder_hidden_states", "encoder_hidden_states_t5", "cap_feats", "text_bth", "input_ids", "class_labels")
WASTED = 3  # runs in a row that begin in the middle of another one before a warning says so


class Names(StateManager):  # type: ignore[misc]
    """Hears from diffusers which call of a step comes next."""

    current: Any = None

    def set_context(self, context: Any) -> None:
        super().set_context(context)
        self.current = context


class EngineHook(ModelHook):  # type: ignore[misc]
    """Hands every call of a transformer to an engine; the pipeline's scheduler tells the time, if the pipeline is known."""

    _is_stateful = True

    def __init__(self, engine: Engine, pipeline: Any = None) -> None:
        super().__init__()
        self.engine = engine
        known = weakref.ref(pipeline) if pipeline is not None else lambda: None
        self.clock = Clock(lambda: getattr(known(), "scheduler", None))
        self.names = Names(object)
        self.wasted, self.told = 0, False
        self.busy = threading.Lock()  # while a call is under way

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self.signature = inspect.signature(type(module).forward)
        return module

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.engine.end()
        self.clock.end()
        return module

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def decide(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Todo:
        """What to do with a call of the module's forward."""
        refuse_what_cannot_be_combined(module)
        if torch.is_grad_enabled():  # gradient checkpointing repeats calls, which would advance the state twice
            self.engine.plain()
            return Todo()
        given = self.signature.bind_partial(module, *args, **kwargs).arguments
        call = call_of(given, self.names.current)
        moment = self.clock.tick(call)
        if moment.begins:
            self._warn()
            self.engine.begin(moment, call, given)
        todo = self.engine.answer(moment, call, given)
        self.wasted = 0 if self.engine.calls[-1].saves else self.wasted
        return todo

    def _warn(self) -> None:
        self.wasted = self.wasted + 1 if self.clock.why else 0
        if self.wasted >= WASTED and not self.told:
            self.told = True
            warnings.warn(
                f"dit_accel saves nothing here: {self.clock.why}, so every call began a run. Give each series of calls its own "
                "name with transformer.cache_context(name), or call the pipeline that dit_accel.apply was given.",
                stacklevel=2,
            )


def call_of(given: dict[str, Any], context: Any = None) -> Call:
    """From the arguments of a transformer's forward by name."""
    latents, text, timestep = (
        next((given[name] for name in names if given.get(name) is not None), None) for names in (LATENTS, TEXT, TIMESTEP)
    )
    return Call(latents, text, timestep, context)


def attach(transformer: Any, engine: Engine, pipeline: Any) -> None:
    """Let an engine answer the calls of a transformer until `unregister(transformer, HOOK)`."""
    hook = EngineHook(engine, pipeline)
    with _without_offloading(transformer):
        HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, HOOK)
        stock = transformer.forward

        # Not the hook's own `new_forward`, whose wrapper torch.compile would have to see through: it compiles the stock forward
        # alone, or what is called in its place. When the hook is removed, whatever lies on top is linked to the forward beneath
        # it, and this here is gone.
        @functools.wraps(stock)
        @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not hook.busy.acquire(blocking=False):
                raise RuntimeError(
                    "This transformer was called from two threads at once while dit_accel is applied, which would mix what it "
                    "remembers of them. Give each thread a transformer of its own, or let one wait for the other."
                )
            try:
                todo = hook.decide(transformer, args, kwargs)
                if todo.instead is not None:
                    return todo.then(todo.instead())
                if todo.change is not None:
                    args, kwargs = todo.change((args, kwargs))
                with todo.within:
                    output = stock(*args, **kwargs)
                return todo.then(output)
            finally:
                hook.busy.release()

        transformer.forward = forward


def register(module: Any, hook: Any, name: str) -> None:
    """Put a hook of diffusers around a module's forward."""
    with _without_offloading(module):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def unregister(module: Any, name: str) -> None:
    """The inverse of `register`; nothing of it stays, however far it came."""
    with _without_offloading(module):
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.remove_hook(name, recurse=False)
        if not registry.hooks:
            del module._diffusers_hook
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward  # the class has it


@contextlib.contextmanager
def _without_offloading(module: Any) -> Iterator[None]:
    """Accelerate's hook is lifted meanwhile, so that ours lies beneath it: pipelines take it off and on again after every call."""
    offloading = getattr(module, "_hf_hook", None)
    if offloading is None:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    try:
        yield
    finally:
        add_hook_to_module(module, offloading)


def refuse_other_caches(transformer: Any) -> None:
    """RuntimeError if a cache of diffusers is on the transformer, however it came there."""
    refuse_what_cannot_be_combined(transformer)
    for module in transformer.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if type(hook).__module__.endswith(CACHES):
                raise RuntimeError(f"A cache of diffusers ({type(hook).__name__}) is on this transformer; take it off first.")


def refuse_what_cannot_be_combined(transformer: Any) -> None:
    if getattr(transformer, "is_cache_enabled", False):
        raise RuntimeError(
            "A cache of diffusers is enabled on this transformer; call transformer.disable_cache() first, or dit_accel.remove."
        )
    if getattr(transformer, "_parallel_config", None) is not None:
        raise RuntimeError("Context parallelism splits the tokens over devices, so they cannot be selected; disable it first.")
