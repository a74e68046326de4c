"""Model scope: between full steps the output is forecast from past ones, and no block runs, or all of them on some tokens.

The forecast works on any transformer of diffusers: what goes in and what comes out is all that is looked at. Tokens are computed
where the family is described in families/.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from dit_accel import store, when
from dit_accel.clock import Call, Moment
from dit_accel.config import OutputCacheConfig, each
from dit_accel.families.table import lookup
from dit_accel.plan import Past, Record, Todo, difference, forecast, guided, rule, step_plan
from dit_accel.rows import UNCONDITIONAL_FIRST
from dit_accel.steps import Memory
from dit_accel.store import forget_numbers, later_rows
from dit_accel.tokens import Selection, packing
from dit_accel.when import Mode, Progress

UNCONDITIONAL = ("uncond", "pred_uncond", "neg")  # how the names of such branches begin


@dataclass
class Branch:
    """What is remembered of one guidance branch; an output is the list of its leaves.

    Attributes:
        outputs: of full steps, newest first, as many as `past` has times; of batched guidance, their conditional half.
        differences: of the conditional branch less the unconditional one, newest first, as many as `past` is guided.
        latest: step and mode of the last call and its output, for the other branch.
        tokens: where some tokens are computed between full steps, what that needs, in place of outputs; and the selection.
    """

    past: Past = field(default_factory=Past)
    outputs: list[list[Any]] = field(default_factory=list)
    differences: list[list[Any]] = field(default_factory=list)
    latest: tuple[int, Mode, list[Any]] | None = None
    tokens: Memory = field(default_factory=Memory)
    selection: Selection | None = None

    def bytes(self) -> int:
        kept = [*self.outputs, *self.differences, self.latest[2] if self.latest else []]
        return sum(map(store.size_in_bytes, kept)) + self.tokens.bytes()


@dataclass(frozen=True)
class Answer:
    """How a call is answered.

    Attributes:
        rows: share of the batch that runs through the model.
        then: the output's leaves, of those that the model returned; of none if it is not called.
        change: made of the model's arguments.
        within: what the model is called in.
        count: tokens that it computes where it does not compute all.
    """

    rows: float
    then: Callable[[list[Any]], list[Any]]
    change: Callable[[Any], Any] | None = None
    within: AbstractContextManager[Any] = nullcontext()
    count: int = 0


class OutputCache:
    """Carries out the plans of one transformer's calls.

    Raises:
        TypeError: for tokens to be computed between full steps of a transformer for which nobody has described how, or where
            something mixes tokens that is not described.
        ValueError: for a selector that asks for what is not observed at this scope.
    """

    def __init__(self, config: OutputCacheConfig, transformer: Any) -> None:
        self.config, self.rule, self.transformer = config, rule(config), transformer
        self.packed = packing(transformer, config) if config.compute_ratio else None
        family = lookup(transformer)
        self.order = UNCONDITIONAL_FIRST if family is None else family.batched_guidance  # of guidance in one batch
        self.branches: dict[int, Branch] = {}
        self.calls: list[Record] = []
        self.inputs: dict[int, dict[str, Any]] = {}
        self.halves = False
        self.spec: TreeSpec | None = None  # the nest of an output's leaves
        self.count, self.grid = 0, (1, 1)  # tokens that can be selected, and how they lie

    def plain(self) -> None:
        pass

    def end(self) -> None:
        self.branches = {}

    def begin(self, moment: Moment, call: Call, given: dict[str, Any]) -> None:
        self.branches, self.calls, self.inputs = {}, [], {}
        latents = call.latents
        even = isinstance(latents, torch.Tensor) and len(latents) % 2 == 0
        # Two pictures of one seed are no guidance where pipelines call twice for it, nor where the call has a branch's name.
        named = getattr(call.context, "name", None) not in (None, "cond_uncond")
        batched = self.config.guidance_steps is not None and even and not named and self.order == UNCONDITIONAL_FIRST
        self.halves = batched and bool(torch.equal(*latents.chunk(2)))
        if self.halves and self.packed is not None:
            raise ValueError(
                "guidance_steps and compute_ratio cannot be combined where both halves of guidance share a batch; leave one out."
            )
        if self.packed is not None:
            self.count = self.packed.family.count(self.transformer.config, given)
            frames, height, width = self.packed.family.grid(self.transformer.config, given)
            self.grid = frames * height, width

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
        partial = answer.rows == 0 or answer.count > 0
        tokens = self.count if self.packed is not None and partial else 0
        counts = (answer.count,) if tokens else ()
        mode = Mode.PARTIAL if partial else Mode.FULL
        self.calls.append(Record(moment.branch, moment.step, mode, answer.rows, counts, tokens))
        if answer.rows == 0:
            return Todo(True, self._given(moment, branch, answer.then([])))

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def then(output: Any) -> Any:
            leaves, self.spec = tree_flatten(output)
            return self._given(moment, branch, answer.then(leaves))

        return Todo(change=answer.change, then=then, within=answer.within)

    def _given(self, moment: Moment, branch: Branch, leaves: list[Any]) -> Any:
        """The output of these leaves; afterwards the call is over."""
        if moment.steps is not None and moment.step + 1 == moment.steps:  # nothing will be forecast any more
            branch.outputs, branch.differences, branch.past, branch.tokens = [], [], Past(number=branch.past.number), Memory()
        used = sum(b.bytes() for b in self.branches.values())
        self.calls[-1] = replace(self.calls[-1], cache_bytes=used)
        assert self.spec is not None
        return tree_unflatten(leaves, self.spec)

    def _alone(self, moment: Moment, branch: Branch) -> Answer:
        plan = step_plan(self.config, moment, branch.past)
        full = plan.mode is Mode.FULL

        def then(leaves: list[Any]) -> list[Any]:
            if full:
                self._remember(branch, moment, leaves)
            elif self.packed is None:
                leaves = store.combined(branch.outputs, plan.weights)
            if self.config.guidance_steps is not None:
                branch.latest = moment.step, plan.mode, store.copied(leaves)
            return leaves

        if self.packed is None:
            return Answer(float(full), then)
        if full:
            within = self.packed.full(branch.tokens, self.count, moment.time, max(each(self.config.order)))
            branch.selection = None
            return Answer(1.0, then, within=within)
        count = when.tokens_to_compute(self.config.compute_ratio, self.count)
        branch.selection = branch.selection or Selection(self.config, self.count, count, self.grid, branch.tokens)
        return Answer(1.0, then, None, self.packed.partial(branch.tokens, branch.selection.at(moment.step), plan.weights), count)

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
        if self.packed is None or self.config.tolerance is not None:
            past.number += store.push(branch.outputs, past.times, moment.time, leaves, max(each(self.config.order)))
        else:  # which has remembered the output's rows
            past.number += past.times[:1] != branch.tokens.times[:1]
            past.times = list(branch.tokens.times)
        progress = Progress(moment.step, moment.steps, moment.times, past.number, error, distance, order)
        past.next_full = moment.step + self.rule(progress)
