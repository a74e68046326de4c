"""Carries out plans: what both scopes share."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_accel import doubts, store
from dit_accel.clock import Call, Moment
from dit_accel.plan import Record, StepPlan, Todo
from dit_accel.recipe import Recipe


@dataclass
class Run:
    """What is known of a run's input."""

    tokens: int = 0  # that can be selected
    grid: tuple[int, int] = (1, 1)  # rows and columns of the picture
    halves: bool = False  # whether both halves of guidance are in the batch
    merged: int = 0  # tokens that a step of merged_steps leaves out
    packed: bool = False  # whether latents are rows of 2 x 2 places
    asked: int = 0  # steps that the pipeline was asked for, if the run has others


class Engine:
    """Answers the calls of one transformer; the only writer of what is remembered of it."""

    # What the scopes fill in.
    new_branch: Callable[[], Any]  # what is remembered of a branch, which is nothing yet
    plan: Callable[[Any, Moment, Call], StepPlan]
    carry_out: Callable[[StepPlan, Any, Moment, Call], Todo]
    free: Callable[[Any], None]  # forget what will not be used any more of a branch
    settings: Callable[[], str]  # what the FLOPs of a plan depend on besides
    twin: Callable[[Any], Any]  # the same for a copy of the transformer, attached to it

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.branches: dict[int, Any] = {}  # what is remembered, by number
        self.calls: list[Record] = []  # stays until the next run begins
        self.inputs: dict[int, dict[str, Any]] = {}  # of each branch, for counting FLOPs
        self.selections: list[tuple[int, str, int, torch.Tensor]] = []  # call, stream, layer, index [1 or B, k]
        self.run, self.warned = Run(), False
        self.recipe: Recipe | None = None  # that the configuration is of
        self.sampler: Any = None  # that sets the pipeline's scheduler to other steps
        self.configs: tuple[Any, ...] = ()  # as they were given
        self.told: set[str] = set()  # doubts

    def attach(self) -> None:
        """Prepare the transformer."""

    def detach(self) -> None:
        """The inverse of `attach`."""

    def attn_processors(self) -> dict[str, Any]:
        """To be set by the caller; none by default."""
        return {}

    def plain(self) -> None:
        """The next call is the model's own, and nothing is remembered of it."""

    def end(self) -> None:
        """Free what is remembered."""
        self.branches = {}

    def begin(self, moment: Moment, call: Call, given: dict[str, Any]) -> None:
        """A run begins with this call, whose arguments are given by name."""
        self.end()
        self.calls, self.inputs, self.selections, self.run = [], {}, [], Run()
        if self.recipe is None:
            self.tell([sentence for config in self.configs for sentence in doubts.of_run(config, moment.steps)])

    def tell(self, sentences: list[str]) -> None:
        """Warn of each once."""
        for sentence in sentences:
            if sentence not in self.told:
                warnings.warn(sentence, doubts.DoubtWarning, stacklevel=2)
        self.told.update(sentences)

    def answer(self, moment: Moment, call: Call, given: dict[str, Any]) -> Todo:
        """How a call is answered."""
        if moment.fresh or moment.branch not in self.branches:
            self.branches[moment.branch] = self.new_branch()
            self.inputs[moment.branch] = {name: store.on_meta(value) for name, value in given.items() if name != "self"}
        branch = self.branches[moment.branch]
        plan = self.plan(branch, moment, call)
        text = call.text.shape[1] if isinstance(call.text, torch.Tensor) and call.text.ndim > 1 else 0
        self.calls.append(Record(**vars(plan), branch=moment.branch, step=moment.step, text=text))
        todo = self.carry_out(plan, branch, moment, call)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def then(output: Any) -> Any:
            output = todo.then(output)
            if moment.steps is not None and moment.step + 1 == moment.steps:
                self.free(branch)
                self._warn(moment.steps)
            used = store.size_in_bytes([branch.kept() for branch in self.branches.values()])
            self.calls[-1] = replace(self.calls[-1], cache_bytes=used)
            return output

        return replace(todo, then=then)

    def _warn(self, steps: int) -> None:
        """Say once that a run saved nothing."""
        if not self.warned and self.run.asked <= steps > 1 and not any(call.saves for call in self.calls):
            self.warned = True
            warnings.warn(
                f"dit_accel saved nothing in a run of {steps} steps: every step was computed in full. Lower interval, warmup_steps "
                "or the number of full steps, or leave out more tokens.",
                stacklevel=2,
            )
