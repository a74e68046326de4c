"""Model scope: between full steps the transformer's output is forecast from past ones, and no block runs.

Works on any transformer of diffusers: what goes in and what comes out is all that is looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from dit_accel import store
from dit_accel.clock import Call, Moment
from dit_accel.config import OutputCacheConfig, each
from dit_accel.plan import Past, Record, Todo, difference, forecast, guided, rule, step_plan
from dit_accel.store import forget_numbers, later_rows
from dit_accel.when import Mode, Progress

UNCONDITIONAL = ("uncond", "neg")  # how the names of such branches begin


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


@dataclass(frozen=True)
class Answer:
    """How a call is answered.

    Attributes:
        rows: share of the batch that runs through the model.
        then: the output's leaves, of those that the model returned; of none if it is not called.
        change: made of the model's arguments.
    """

    rows: float
    then: Callable[[list[Any]], list[Any]]
    change: Callable[[Any], Any] | None = None


class OutputCache:
    """Carries out the plans of one transformer's calls."""

    def __init__(self, config: OutputCacheConfig) -> None:
        self.config, self.rule = config, rule(config)
        self.branches: dict[int, Branch] = {}
        self.calls: list[Record] = []
        self.inputs: dict[int, dict[str, Any]] = {}
        self.halves = False
        self.spec: TreeSpec | None = None  # the nest of an output's leaves

    def plain(self) -> None:
        pass

    def end(self) -> None:
        self.branches = {}

    def begin(self, moment: Moment, call: Call, given: dict[str, Any]) -> None:
        self.branches, self.calls, self.inputs = {}, [], {}
        latents = call.latents
        even = isinstance(latents, torch.Tensor) and len(latents) % 2 == 0
        self.halves = self.config.guidance_steps is not None and even and bool(torch.equal(*latents.chunk(2)))

    def answer(self, moment: Moment, call: Call, given: dict[str, Any]) -> Todo:
        if moment.fresh:
            self.branches[moment.branch] = Branch()
            self.inputs[moment.branch] = forget_numbers(given)
        branch = self.branches.setdefault(moment.branch, Branch())
        if self.halves:
            answer = self._both(moment, branch, len(call.latents))
        elif self._follows(moment, call):
            answer = self._unconditional(moment, branch, self.branches[0])
        else:
            answer = self._alone(moment, branch)
        self.calls.append(Record(moment.branch, moment.step, Mode.FULL if answer.rows else Mode.PARTIAL, answer.rows))
        if answer.rows == 0:
            return Todo(True, self._given(moment, branch, answer.then([])))

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def then(output: Any) -> Any:
            leaves, self.spec = tree_flatten(output)
            return self._given(moment, branch, answer.then(leaves))

        return Todo(change=answer.change, then=then)

    def _given(self, moment: Moment, branch: Branch, leaves: list[Any]) -> Any:
        """The output of these leaves; afterwards the call is over."""
        if moment.steps is not None and moment.step + 1 == moment.steps:  # nothing will be forecast any more
            branch.outputs, branch.differences, branch.past = [], [], Past()
        used = sum(b.bytes() for b in self.branches.values())
        self.calls[-1] = replace(self.calls[-1], cache_bytes=used)
        assert self.spec is not None
        return tree_unflatten(leaves, self.spec)

    def _alone(self, moment: Moment, branch: Branch) -> Answer:
        plan = step_plan(self.config, moment, branch.past)

        def then(leaves: list[Any]) -> list[Any]:
            if plan.mode is Mode.PARTIAL:
                leaves = store.combined(branch.outputs, plan.weights)
            else:
                self._remember(branch, moment, leaves)
            if self.config.guidance_steps is not None:
                branch.latest = moment.step, plan.mode, store.copied(leaves)
            return leaves

        return Answer(float(plan.mode is Mode.FULL), then)

    def _both(self, moment: Moment, branch: Branch, batch: int) -> Answer:
        """Guidance in one batch, the unconditional half first."""
        plan = step_plan(self.config, moment, branch.past)
        if plan.mode is Mode.FULL and not plan.difference:

            def whole(leaves: list[Any]) -> list[Any]:
                unconditional, conditional = store.halves(leaves)
                self._differ(branch, moment, conditional, unconditional)
                self._remember(branch, moment, conditional)
                return leaves

            return Answer(1.0, whole)

        def half(leaves: list[Any]) -> list[Any]:
            if plan.mode is Mode.FULL:
                self._remember(branch, moment, leaves)
            else:
                leaves = store.combined(branch.outputs, plan.weights)
            return store.joined(store.minus(leaves, store.combined(branch.differences, plan.difference)), leaves)

        later = torch.compiler.disable(functools.partial(tree_map, lambda part: later_rows(part, batch, 0.5)))
        return Answer(0.5 if plan.mode is Mode.FULL else 0.0, half, later)

    def _follows(self, moment: Moment, call: Call) -> bool:
        """Whether this call is that of the unconditional branch, and the conditional one has been called on this step."""
        name, main = getattr(call.context, "name", None), self.branches.get(0)
        second = name.startswith(UNCONDITIONAL) if isinstance(name, str) else moment.branch > 0
        known = main is not None and main.latest is not None and main.latest[0] == moment.step
        return self.config.guidance_steps is not None and second and moment.branch > 0 and known

    def _unconditional(self, moment: Moment, branch: Branch, main: Branch) -> Answer:
        """The unconditional call of a step: computed where it is its turn, else what the conditional one says."""
        assert main.latest is not None and self.config.guidance_steps is not None
        _, mode, conditional = main.latest
        weights = difference(self.config, moment.time, branch.past)
        if weights and (mode is Mode.PARTIAL or not guided(self.config.guidance_steps, moment.step, main.past.number - 1)):
            return Answer(0.0, lambda _: store.minus(conditional, store.combined(branch.differences, weights)))

        def then(leaves: list[Any]) -> list[Any]:
            self._differ(branch, moment, conditional, leaves)
            return leaves

        return Answer(1.0, then)

    def _differ(self, branch: Branch, moment: Moment, conditional: list[Any], unconditional: list[Any]) -> None:
        """Keep the difference of the branches."""
        less = store.minus(conditional, unconditional)
        store.push(branch.differences, branch.past.guided, moment.time, less, self.config.guidance_order)

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
