"""What a call computes, decided from the configuration and the clock alone: no features, no model, no device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from dit_accel import how, when
from dit_accel.clock import Moment
from dit_accel.config import OutputCacheConfig, TokenCacheConfig, each
from dit_accel.when import Mode


@dataclass(frozen=True)
class Todo:
    """How a call is answered: with an output, or by the model's own forward.

    Attributes:
        done: whether `output` is the answer.
        change: made of the arguments that the forward is called with; None leaves them.
        within: what the forward is called in.
        then: makes the answer of what the forward returns; None leaves it.
    """

    done: bool = False
    output: Any = None
    change: Callable[[Any], Any] | None = None
    within: AbstractContextManager[Any] = nullcontext()
    then: Callable[[Any], Any] | None = None


@dataclass
class Past:
    """What the host knows of a guidance branch.

    Attributes:
        times: of the full steps whose outputs are remembered, newest first.
        guided: of those whose difference of the guidance branches is remembered, newest first.
        number: how many full steps there have been in this run.
        next_full: number of the next full step.
    """

    times: list[float] = field(default_factory=list)
    guided: list[float] = field(default_factory=list)
    number: int = 0
    next_full: int = 0


@dataclass(frozen=True)
class StepPlan:
    """What one call computes.

    Attributes:
        mode: everything (FULL) or a forecast, perhaps with some tokens (PARTIAL).
        weights: of the remembered outputs, newest first, for the forecast.
        difference: of the remembered differences of the guidance branches, if the unconditional one follows from the conditional
            one; empty if it is computed.
    """

    mode: Mode
    weights: tuple[float, ...] = ()
    difference: tuple[float, ...] = ()


@dataclass(frozen=True)
class Record:
    """What one call of the transformer computed.

    Attributes:
        branch: number of the guidance branch; step: from 0.
        rows: share of the batch that ran through the model: less where the unconditional branch was left out.
        counts: tokens computed by every token-wise site, in the order of the run's sites; tokens: that a full step computes there.
        text: text tokens.
        plain: sites, by their place in the run's, that this call computed as if nothing were applied.
        merged: image tokens merged into others in every merging layer; matched: how, layer by layer.
        cache_bytes: after the call, all branches together.
    """

    branch: int
    step: int
    mode: Mode
    rows: float = 1.0
    counts: tuple[int, ...] = ()
    tokens: int = 0
    text: int = 0
    plain: tuple[int, ...] = ()
    merged: int = 0
    matched: tuple[when.Matched, ...] = ()
    cache_bytes: int = 0

    @property
    def saves(self) -> bool:
        """Whether it computed less than the model's own code."""
        return self.mode is Mode.PARTIAL or self.rows < 1 or self.merged > 0

    @property
    def tokens_computed(self) -> int:
        return sum(self.counts)


def step_plan(config: OutputCacheConfig, moment: Moment, past: Past) -> StepPlan:
    """The plan of a call of this branch, which has this past."""
    if moment.fresh or not past.times or moment.step >= past.next_full:
        steps = config.guidance_steps
        both = steps is None or guided(steps, moment.step, past.number)
        return StepPlan(Mode.FULL, (), () if both else difference(config, moment.time, past))
    return StepPlan(Mode.PARTIAL, forecast(config, moment.time, past), difference(config, moment.time, past))


def forecast(config: OutputCacheConfig, now: float, past: Past) -> tuple[float, ...]:
    """Weights of the remembered outputs for a forecast in the interval after the last full step."""
    order, damping = (each(values)[min(past.number, len(each(values))) - 1] for values in (config.order, config.damping))
    return tuple(how.coefficients(config.how, past.times, now, order, damping))


def difference(config: OutputCacheConfig, now: float, past: Past) -> tuple[float, ...]:
    """Weights of the remembered differences of the guidance branches."""
    return tuple(how.coefficients(config.how, past.guided, now, config.guidance_order)) if past.guided else ()


def rule(config: OutputCacheConfig | TokenCacheConfig) -> when.Rule:
    """How many steps after a full step the next one comes."""
    if isinstance(config, TokenCacheConfig):
        chosen = when.spread(config.interval, config.interval_spread)
    elif config.full_steps is not None:
        chosen = when.listed(config.full_steps)
    elif config.tolerance is not None:
        chosen = when.within(config.tolerance, config.interval)
    elif config.when is not None:
        chosen = when.get(config.when) if isinstance(config.when, str) else config.when
    else:
        chosen = when.every(config.interval)
    return lambda progress: 1 if progress.step + 1 < config.warmup_steps else chosen(progress)


def guided(steps: tuple[int, ...] | int, step: int, number: int) -> bool:
    """Whether a full step, before which there were `number`, computes the unconditional branch too."""
    return step in steps if isinstance(steps, tuple) else number % steps == 0
