"""Model scope: between full steps the transformer's output is forecast from past ones, and no block runs.

Works on any transformer of diffusers: what goes in and what comes out is all that is looked at.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from dit_accel import store
from dit_accel.clock import Call, Clock, Moment
from dit_accel.config import OutputCacheConfig, each
from dit_accel.flops import forget_numbers, later_rows
from dit_accel.plan import Past, Record, StepPlan, difference, forecast, guided, rule, step_plan
from dit_accel.when import Mode, Progress

HOOK = "dit_accel"
TEXT = ("encoder_hidden_states", "cap_feats", "class_labels")  # arguments that tell guidance branches apart
TIMESTEP = ("timestep", "t")
UNCONDITIONAL = ("uncond", "neg")  # how the names of such branches begin
WASTED = 3  # runs in a row that begin in the middle of another one before a warning says so


class Names(StateManager):  # type: ignore[misc]
    """Hears from diffusers which call of a step comes next."""

    current: Any = None

    def set_context(self, context: Any) -> None:
        super().set_context(context)
        self.current = context


@dataclass
class Branch:
    """What is remembered of one guidance branch; an output is the list of its leaves.

    Attributes:
        outputs: of full steps, newest first, as many as `past` has times; of batched guidance, their conditional half.
        differences: of the conditional branch less the unconditional one, newest first, as many as `past` is guided.
        latest: step and mode of the last call and its output, for the other branch.
    """

    past: Past = field(default_factory=Past)
    outputs: list[list[Any]] = field(default_factory=list)
    differences: list[list[Any]] = field(default_factory=list)
    latest: tuple[int, Mode, list[Any]] | None = None

    def bytes(self) -> int:
        kept = [*self.outputs, *self.differences, self.latest[2] if self.latest else []]
        return sum(map(store.size_in_bytes, kept))


class OutputCacheHook(ModelHook):  # type: ignore[misc]
    """Carries out the plans of one transformer's calls.

    Args:
        pipeline: whose transformer it is, if that is known.
    """

    _is_stateful = True

    def __init__(self, config: OutputCacheConfig, pipeline: Any = None) -> None:
        super().__init__()
        self.config, self.rule = config, rule(config)
        self.pipeline: Callable[[], Any] = weakref.ref(pipeline) if pipeline is not None else lambda: None
        self.clock = Clock(lambda: getattr(self.pipeline(), "scheduler", None))
        self.names = Names(object)
        self.on, self.told, self.wasted = True, False, 0
        self.branches: dict[int, Branch] = {}
        self.calls: list[Record] = []
        self.inputs: dict[int, dict[str, Any]] = {}
        self.halves = False
        self.spec: TreeSpec | None = None  # the nest of an output's leaves

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self.signature = inspect.signature(type(module).forward)
        return module

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.end()
        return module

    def end(self) -> None:
        """Free what is remembered; the record stays until the next run begins."""
        self.branches = {}
        self.clock.end()

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        stock = self.fn_ref.original_forward
        if not self.on or torch.is_grad_enabled():  # gradient checkpointing repeats calls
            return stock(*args, **kwargs)
        given = self.signature.bind_partial(module, *args, **kwargs).arguments
        call = self._call(given)
        moment = self.clock.tick(call)
        if moment.begins:
            self._begin(call)
        if moment.fresh:
            self.branches[moment.branch] = Branch()
            self.inputs[moment.branch] = forget_numbers(given)
        branch = self.branches.setdefault(moment.branch, Branch())
        plan = step_plan(self.config, moment, branch.past)
        leaves, rows = self._carry_out(plan, moment, branch, call, stock, args, kwargs)
        used = sum(b.bytes() for b in self.branches.values())
        self.calls.append(Record(moment.branch, moment.step, Mode.FULL if rows else Mode.PARTIAL, rows, cache_bytes=used))
        self.wasted = 0 if rows < 1 else self.wasted
        if moment.steps is not None and moment.step + 1 == moment.steps:  # nothing will be forecast any more
            branch.outputs, branch.differences, branch.past = [], [], Past()
        assert self.spec is not None
        return tree_unflatten(leaves, self.spec)

    def _call(self, given: dict[str, Any]) -> Call:
        text = next((given[name] for name in TEXT if given.get(name) is not None), None)
        timestep = next((given[name] for name in TIMESTEP if given.get(name) is not None), float("nan"))
        latents = next(value for name, value in given.items() if name != "self")
        return Call(latents, text, timestep, self.names.current)

    def _begin(self, call: Call) -> None:
        self.branches, self.calls, self.inputs = {}, [], {}
        self.wasted = self.wasted + 1 if self.clock.why else 0
        if self.wasted >= WASTED and not self.told:
            self.told = True
            warnings.warn(
                f"dit_accel saves nothing here: {self.clock.why}, so every call began a run. Give each series of calls its own "
                "name with transformer.cache_context(name), or call the pipeline that dit_accel.apply was given.",
                stacklevel=2,
            )
        latents = call.latents
        self.halves = (
            self.config.guidance_steps is not None
            and isinstance(latents, torch.Tensor)
            and len(latents) % 2 == 0
            and bool(torch.equal(*latents.chunk(2)))
        )

    def _carry_out(
        self, plan: StepPlan, moment: Moment, branch: Branch, call: Call, stock: Any, args: Any, kwargs: Any
    ) -> tuple[list[Any], float]:
        """The output's leaves, and the share of the batch that was computed."""
        if self.halves:
            return self._both(plan, moment, branch, call, stock, args, kwargs)
        if self._follows(moment, call):
            return self._unconditional(moment, branch, self.branches[0], stock, args, kwargs)
        if plan.mode is Mode.PARTIAL:
            leaves = store.combined(branch.outputs, plan.weights)
        else:
            leaves = self._computed(stock, args, kwargs)
            self._remember(branch, moment, leaves)
        if self.config.guidance_steps is not None:
            branch.latest = moment.step, plan.mode, store.copied(leaves)
        return leaves, float(plan.mode is Mode.FULL)

    def _both(
        self, plan: StepPlan, moment: Moment, branch: Branch, call: Call, stock: Any, args: Any, kwargs: Any
    ) -> tuple[list[Any], float]:
        """Guidance in one batch, the unconditional half first."""
        if plan.mode is Mode.FULL and not plan.difference:
            leaves = self._computed(stock, args, kwargs)
            unconditional, conditional = store.halves(leaves)
            self._differ(branch, moment, conditional, unconditional)
            self._remember(branch, moment, conditional)
            return leaves, 1.0
        if plan.mode is Mode.FULL:
            half = tree_map(lambda value: later_rows(value, len(call.latents), 0.5), (args, kwargs))
            conditional = self._computed(stock, *half)
            self._remember(branch, moment, conditional)
        else:
            conditional = store.combined(branch.outputs, plan.weights)
        unconditional = store.minus(conditional, store.combined(branch.differences, plan.difference))
        return store.joined(unconditional, conditional), 0.5 * (plan.mode is Mode.FULL)

    def _follows(self, moment: Moment, call: Call) -> bool:
        """Whether this call is that of the unconditional branch, and the conditional one has been called on this step."""
        name, main = getattr(call.context, "name", None), self.branches.get(0)
        second = name.startswith(UNCONDITIONAL) if isinstance(name, str) else moment.branch > 0
        known = main is not None and main.latest is not None and main.latest[0] == moment.step
        return self.config.guidance_steps is not None and second and moment.branch > 0 and known

    def _unconditional(
        self, moment: Moment, branch: Branch, main: Branch, stock: Any, args: Any, kwargs: Any
    ) -> tuple[list[Any], float]:
        """The unconditional call of a step: computed where it is its turn, else what the conditional one says."""
        assert main.latest is not None and self.config.guidance_steps is not None
        _, mode, conditional = main.latest
        weights = difference(self.config, moment.time, branch.past)
        if weights and (mode is Mode.PARTIAL or not guided(self.config.guidance_steps, moment.step, main.past.number - 1)):
            return store.minus(conditional, store.combined(branch.differences, weights)), 0.0
        leaves = self._computed(stock, args, kwargs)
        self._differ(branch, moment, conditional, leaves)
        return leaves, 1.0

    def _differ(self, branch: Branch, moment: Moment, conditional: list[Any], unconditional: list[Any]) -> None:
        """Keep the difference of the branches."""
        less = store.minus(conditional, unconditional)
        store.push(branch.differences, branch.past.guided, moment.time, less, self.config.guidance_order)

    def _computed(self, stock: Any, args: Any, kwargs: Any) -> list[Any]:
        leaves, self.spec = tree_flatten(stock(*args, **kwargs))
        return leaves

    def _remember(self, branch: Branch, moment: Moment, leaves: list[Any]) -> None:
        """Keep the output of a full step, and find out when the next one is."""
        past, error, order = branch.past, None, 0
        distance = moment.time - past.times[0] if past.times else 0.0
        if self.config.tolerance is not None and len(past.times) > 1 and distance:
            weights = forecast(self.config, moment.time, past)
            error, order = store.relative_error(store.combined(branch.outputs, weights), leaves), len(weights) - 1
        past.number += store.push(branch.outputs, past.times, moment.time, leaves, max(each(self.config.order)))
        progress = Progress(moment.step, moment.steps, moment.times, past.number, error, distance, order)
        past.next_full = moment.step + self.rule(progress)


def attach(transformer: Any, config: OutputCacheConfig, pipeline: Any) -> OutputCacheHook:
    """Put a hook on a transformer that caches its outputs from now on."""
    hook = OutputCacheHook(config, pipeline)
    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, HOOK)
    return hook


def detach(transformer: Any, hook: OutputCacheHook) -> None:
    """The inverse of `attach`."""
    hook.on = False
    hook.end()
    HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(HOOK, recurse=False)
