"""Model scope: between full steps the output is forecast from past ones, and no block runs, or all of them on some tokens.

The forecast works on any transformer of diffusers: what goes in and what comes out is all that is looked at. Tokens are computed
where the family is described in families/.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from dit_accel import input_merge, spaces, store
from dit_accel.clock import Call, Moment
from dit_accel.config import OutputCacheConfig, each
from dit_accel.engine import Engine
from dit_accel.families.rows import UNCONDITIONAL_FIRST
from dit_accel.families.table import lookup
from dit_accel.input_merge import Known
from dit_accel.packed import During, Packed
from dit_accel.plan import Past, StepPlan, Todo, difference, forecast, guided, keeps_ahead, merges, rule, step_plan
from dit_accel.recipe import Recipe
from dit_accel.steps import Memory, Partial
from dit_accel.subset import subset_check
from dit_accel.tokens import Selection, refuse_unobserved
from dit_accel.when import Mode, Progress

UNCONDITIONAL = ("uncond", "pred_uncond", "neg")  # how the names of such branches begin


@dataclass
class Branch:
    """What is remembered of one guidance branch; an output is the list of its leaves."""

    past: Past = field(default_factory=Past)
    outputs: list[list[Any]] = field(default_factory=list)  # of full steps; of batched guidance, their half
    differences: list[list[Any]] = field(default_factory=list)  # conditional less unconditional
    added: list[Any] | None = None  # what the last call made up for
    latest: tuple[int, Mode, list[Any]] | None = None  # step, mode and output of the last call, for the other branch
    conditional: tuple[int, Mode, list[Any]] | None = None  # that of the other branch
    tokens: Memory = field(default_factory=Memory)  # instead of outputs, where some tokens are computed
    selection: Selection | None = None  # of them
    known: Known = field(default_factory=Known)  # for the selector of cells
    spec: TreeSpec | None = None  # the nest of an output's leaves

    def kept(self) -> Any:
        tokens = self.tokens
        cells = self.known.pictures, self.known.memory.observed
        return self.outputs, self.differences, self.added, self.latest, (tokens.outputs, tokens.features, tokens.observed), cells


class ModelScope(Engine):
    """The forecast, packed steps, and the guidance branch on its own list of steps; raises what `dit_accel.apply` raises."""

    def __init__(self, config: OutputCacheConfig, transformer: Any, recipe: Recipe | None = None, record: bool = False) -> None:
        name, family = type(transformer).__name__, lookup(transformer)
        if not hasattr(transformer, "config"):
            raise TypeError(f"{name} is not a transformer of diffusers.")
        super().__init__(transformer)
        self.recipe, self.record = recipe, record
        self.latest: Moment | None = None  # of the last call, with the times that the transformer is told
        self.config, self.rule, self.family, self.packed = config, rule(config), family, None
        self.order = UNCONDITIONAL_FIRST if family is None else family.batched_guidance  # of guidance in one batch
        if config.merging and family is None:
            raise TypeError(f"The picture of {name} cannot be merged: its tokens are not described. Leave merged_steps out.")
        self.observer = input_merge.observer(config, transformer, family)
        if config.compute_ratio:
            if family is None:
                raise TypeError(f"No tokens of {name} can be selected: its blocks are not described. Set compute_ratio=0.")
            needs = refuse_unobserved(config.selector, "at model scope")
            self.packed = Packed(transformer, family, config.attention, needs)

    def attach(self) -> None:
        if self.packed is not None:
            subset_check(self.transformer, self.packed.family)
        self._attach()

    def _attach(self) -> None:
        for part in (self.packed, self.observer):
            if part is not None:
                part.attach()

    def detach(self) -> None:
        for part in (self.packed, self.observer):
            if part is not None:
                part.detach()

    def settings(self) -> str:
        return f"{self.config.attention} {self.config.selector}"

    def twin(self, transformer: Any) -> Engine:
        other = ModelScope(self.config, transformer)
        other.run = self.run
        other._attach()  # what was checked already
        return other

    def begin(self, moment: Moment, call: Call, given: dict[str, Any]) -> None:
        super().begin(moment, call, given)
        self.run.asked = self.sampler.asked if self.sampler is not None else 0
        if self.recipe is not None:
            self.config = self.recipe.of(self.run.asked) if self.run.asked else self.recipe.at(moment.times)
            self.rule = rule(self.config)
            if self.config is not self.recipe.config:
                asked = self.run.asked or moment.steps
                self.tell([f"The {self.recipe.model} recipe is for other steps; its full steps are spread over these {asked}."])
        if self.config.run_steps is not None and len(moment.times) not in (0, self.config.run_steps):
            self.tell(
                ["The pipeline has another scheduler than at dit_accel.apply: sampler_steps does nothing with it; apply anew."]
            )
        latents, name = call.latents, getattr(call.context, "name", None)
        if self.config.guidance_steps is not None:
            if isinstance(name, str) and name.startswith(UNCONDITIONAL):
                raise ValueError(
                    f"guidance_steps lets the unconditional branch follow from the conditional one, but here {name!r} is called "
                    "first; call the conditional one first, or leave guidance_steps out."
                )
            even = isinstance(latents, torch.Tensor) and len(latents) % 2 == 0 and self.order == UNCONDITIONAL_FIRST
            # Two pictures of one seed are no guidance where the call has a branch's name.
            self.run.halves = even and name in (None, "cond_uncond") and bool(torch.equal(*latents.chunk(2)))
        if self.family is None or (self.packed is None and not self.config.merging):
            return
        frames, height, width = self.family.grid(self.transformer.config, given)
        self.run.grid = frames * height, width
        if self.packed is not None:
            self.run.tokens = self.packed.family.count(self.transformer.config, given)
        if self.config.merging:
            input_merge.prepare(self.run, self.transformer, latents, (frames, height, width), self.config.merged_side)

    def new_branch(self) -> Branch:
        return Branch()

    def answer(self, moment: Moment, call: Call, given: dict[str, Any]) -> Todo:
        if self.config.space == "data" or self.config.merging:
            moment = input_merge.known(moment, "space='data'" if self.config.space == "data" else "merged_steps")
        self.latest = moment
        if self.config.space == "data":
            times = tuple(math.log(alpha / sigma) for alpha, sigma in moment.levels)
            moment = replace(moment, time=times[moment.step], times=times)
        return super().answer(moment, call, given)

    def plan(self, branch: Branch, moment: Moment, call: Call) -> StepPlan:
        plan = self._plan(branch, moment, call)
        if plan.mode is not Mode.FULL or not self.config.merging:
            return plan
        plan = replace(plan, ahead=keeps_ahead(self.config, moment))
        if not merges(self.config, moment):
            return plan
        less = self.config.merged_side**2 - 1
        cells = self.run.merged // less
        kept = round(self.config.merged_keep * cells) if branch.known.enough(self.config) else 0
        return replace(plan, merged=(cells - kept) * less)

    def _plan(self, branch: Branch, moment: Moment, call: Call) -> StepPlan:
        branch.conditional = self._conditional(moment, call)
        if branch.conditional is not None and self.config.guidance_steps is not None:
            weights, turn = difference(self.config, moment.time, branch.past), self.branches[0].past.number - 1
            if weights and not (branch.conditional[1] is Mode.FULL and guided(self.config.guidance_steps, moment.step, turn)):
                return StepPlan(Mode.PARTIAL, difference=weights, rows=0.0)
            return StepPlan(Mode.FULL)
        plan = step_plan(self.config, moment, branch.past, self.run.tokens)
        return replace(plan, rows=0.5) if self.run.halves and plan.rows and plan.difference else plan

    def _conditional(self, moment: Moment, call: Call) -> tuple[int, Mode, list[Any]] | None:
        """The call of the conditional branch on this step, if this one is that of the unconditional branch."""
        name, main = getattr(call.context, "name", None), self.branches[0]
        second = moment.branch > 0 and (not isinstance(name, str) or name.startswith(UNCONDITIONAL))
        return main.latest if second and main.latest is not None and main.latest[0] == moment.step else None

    def carry_out(self, plan: StepPlan, branch: Branch, moment: Moment, call: Call) -> Todo:
        config, full = self.config, plan.mode is Mode.FULL
        instead: Callable[[], Any] | None = None
        change: Callable[[Any], Any] | None = None
        within: AbstractContextManager[Any] = nullcontext()
        if plan.rows == 0:
            kept, weights = branch.outputs, plan.weights
            if branch.conditional is not None:
                kept, weights = branch.differences, plan.difference
            instead = functools.partial(store.combined, kept[: len(weights)], store.numbers(weights))
        if plan.rows == 0.5:
            part = functools.partial(store.later_rows, batch=len(call.latents), share=0.5)
            change = torch.compiler.disable(functools.partial(tree_map, part))
        merge = None
        if plan.merged:
            merge = input_merge.of(config, self.transformer, self.run, self.latest or moment)
            whole = (self.run.merged - plan.merged) // (config.merged_side**2 - 1)
            merge = merge.keeping(whole, config, branch.known, call.latents)
            half, shrink = change or (lambda nest: nest), torch.compiler.disable(merge.shrink)
            change = lambda nest: half(shrink(nest))  # noqa: E731
        if plan.ahead and self.observer is not None:
            within = self.observer.look(branch.known.memory, math.prod(self.run.grid) - plan.merged)
        if plan.rows and self.packed is not None and branch.conditional is None:
            if merge is not None:  # of a smaller picture no token is remembered
                branch.tokens, branch.selection = Memory(), None
            elif full:
                pictures = len(call.latents) // 2 if self.run.halves else 0
                within = self.packed.full(branch.tokens, self.run.tokens, moment.time, max(each(config.order)), pictures)
                branch.selection = None
            else:
                branch.selection = branch.selection or Selection(
                    config, self.run.tokens, plan.counts[0], self.run.grid, branch.tokens
                )
                within = self.packed.partial(branch.tokens, branch.selection.at(moment.step), plan.weights)

        def then(output: Any) -> Any:
            leaves = output
            if instead is None:
                leaves, branch.spec = tree_flatten(output)
            if self.record and isinstance(within, During) and isinstance(within.call, Partial):
                self.selections.append((len(self.calls) - 1, "image", 0, torch.atleast_2d(within.call.index).cpu()))
            if merge is not None:
                leaves = [merge.enlarge(leaves[0], call.latents), *leaves[1:]]
            if plan.ahead:
                branch.known.remember(self.latest or moment, merge, leaves[0], call.latents)
            leaves = self._answer(plan, branch, moment, call, leaves)
            branch.conditional = None
            if 0 < moment.branch == max(self.branches):  # nobody asks any more
                self.branches[0].latest = self.branches[0].added = None
            assert branch.spec is not None
            return tree_unflatten(leaves, branch.spec)

        return Todo(instead, change, within, then)

    def _answer(self, plan: StepPlan, branch: Branch, moment: Moment, call: Call, leaves: list[Any]) -> list[Any]:
        """The output's leaves, of those that the model returned, or that were forecast in its place."""
        known, full, data = leaves, plan.mode is Mode.FULL, self.config.space == "data"
        if data:
            latents = list(call.latents) if isinstance(call.latents, (list, tuple)) else [call.latents]
            numbers = spaces.IMPLIED[moment.predicts](*moment.levels[moment.step])
            if full:
                known = store.paired(lambda leaf, x: spaces.implied(leaf, x, numbers), leaves, latents)
        answer = self._uncorrected(plan, branch, moment, known)
        added = (branch if branch.conditional is None else self.branches[0]).added
        many = 2 if self.run.halves else 1  # both halves of guidance alike: their difference stays
        if added is not None:
            answer = store.paired(lambda a, b: a + torch.cat([b] * many), answer, added)
        elif answer is known and full:
            return leaves
        return store.paired(lambda leaf, x: spaces.output_of(leaf, x, numbers), answer, latents) if data else answer

    def _uncorrected(self, plan: StepPlan, branch: Branch, moment: Moment, leaves: list[Any]) -> list[Any]:
        full = plan.mode is Mode.FULL
        if branch.conditional is not None:
            conditional = branch.conditional[2]
            if not full:
                return store.paired(torch.sub, conditional, leaves)
            self._differ(branch, moment, conditional, leaves)
            return leaves
        whole, half = leaves, self.run.halves
        if half and full and not plan.difference:
            unconditional, leaves = (store.paired(lambda leaf, i=i: leaf.chunk(2)[i], leaves) for i in (0, 1))
            self._differ(branch, moment, leaves, unconditional)
        branch.added = store.combined([leaves, *branch.outputs], plan.correction) if plan.correction else None
        if full:
            self._remember(branch, moment, leaves)
        if half:
            if full and not plan.difference:
                return whole
            unconditional = store.paired(torch.sub, leaves, store.combined(branch.differences, plan.difference))
            return store.paired(lambda a, b: torch.cat([a, b]), unconditional, leaves)
        if self.config.guidance_steps is not None:
            branch.latest = moment.step, plan.mode, store.paired(torch.clone, leaves)
        return leaves

    def _differ(self, branch: Branch, moment: Moment, conditional: list[Any], unconditional: list[Any]) -> None:
        """Keep the difference of the branches."""
        less = store.paired(torch.sub, conditional, unconditional)
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
            past.number += not branch.tokens.times or past.times[:1] != branch.tokens.times[:1]
            past.times = list(branch.tokens.times)
        if self.packed is not None and not branch.tokens.times:  # after a merged step
            past.times, branch.outputs = [], []
        past.step = moment.step
        progress = Progress(moment.step, moment.steps, moment.times, past.number, error, distance, order)
        past.next_full = moment.step + self.rule(progress)

    def free(self, branch: Branch) -> None:
        branch.outputs, branch.differences, branch.tokens, branch.selection, branch.known = [], [], Memory(), None, Known()
        branch.past = Past(number=branch.past.number)
        if len(self.branches) == 1:  # otherwise the other one asks for these
            branch.latest = branch.added = None
