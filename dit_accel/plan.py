"""What a call computes, decided from the configuration and the clock alone: no features, no model, no device."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dit_accel import how, when
from dit_accel.clock import Moment
from dit_accel.config import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig, each
from dit_accel.when import Matched, Mode


@dataclass(frozen=True)
class Todo:
    """How a call is answered."""

    instead: Callable[[], Any] | None = None  # called in place of the model's own forward
    change: Callable[[Any], Any] | None = None  # made of its arguments
    within: AbstractContextManager[Any] = nullcontext()  # what it is called in
    then: Callable[[Any], Any] = lambda output: output  # makes the answer of what it returns


@dataclass
class Past:
    """What the host knows of a guidance branch."""

    times: list[float] = field(default_factory=list)  # of the full steps remembered, newest first; at module scope, numbers
    guided: list[float] = field(default_factory=list)  # of those whose difference of the branches is remembered
    number: int = 0  # of full steps in this run
    next_full: int = 0  # number of the next full step
    matched: dict[int, int] = field(default_factory=dict)  # by group of layers, when it was matched
    step: int = 0  # number of the last full step


@dataclass(frozen=True)
class StepPlan:
    """What one call computes."""

    mode: Mode  # everything (FULL), or some tokens or none (PARTIAL)
    weights: tuple[float, ...] = ()  # of what is remembered, newest first
    difference: tuple[float, ...] = ()  # of the remembered differences, if the unconditional branch follows from them
    rows: float = 1.0  # share of the batch that runs: less where the unconditional branch is left out
    counts: tuple[int, ...] = ()  # tokens that a partial step computes at every token-wise site
    tokens: int = 0  # that a full step computes there
    unseen: bool = False  # whether a text stream is left as it is, because nothing looks at it
    plain: tuple[int, ...] = ()  # sites, by their place, that are computed as if nothing were applied
    merged: int = 0  # image tokens merged into others in every merging layer
    matched: tuple[Matched, ...] = ()  # how, layer by layer
    ahead: bool = False  # whether cells that stay whole on a later step are chosen by what this full step shows
    correction: tuple[float, ...] = ()  # of a full step's output and of what is remembered, newest first, to be added to it


@dataclass(frozen=True, kw_only=True)
class Record(StepPlan):
    """What one call of the transformer computed."""

    branch: int  # number of the guidance branch
    step: int  # from 0
    transformer: int = 0  # its place in the pipeline
    text: int = 0  # text tokens
    cache_bytes: int = 0  # after the call, all branches together

    @property
    def saves(self) -> bool:
        """Whether it computed less than the model's own code."""
        return self.mode is Mode.PARTIAL or self.rows < 1 or self.merged > 0

    @property
    def tokens_computed(self) -> int:
        return sum(self.counts)


def step_plan(config: OutputCacheConfig, moment: Moment, past: Past, tokens: int = 0) -> StepPlan:
    """The plan at model scope for a call of this branch, which has this past; `tokens` can be selected."""
    following = difference(config, moment.time, past)
    if moment.fresh or not past.times or moment.step >= past.next_full:
        steps, corrected = config.guidance_steps, () if moment.fresh else correction(config, moment, past)
        following = () if steps is None or guided(steps, moment.step, past.number) else following
        return StepPlan(Mode.FULL, correction=corrected, difference=following)
    counts = (when.tokens_to_compute(config.compute_ratio, tokens),) if tokens else ()
    return StepPlan(Mode.PARTIAL, forecast(config, moment.time, past), following, float(bool(tokens)), counts, tokens)


@dataclass(frozen=True)
class Layout:
    """What a plan at module scope knows of the model and its input."""

    sites: Sequence[tuple[int, str, int]]  # place, stream and layer of token-wise computations
    lengths: Mapping[str, int]  # tokens of every stream
    text: int  # of those of a joint stream, the text's
    unseen: bool  # whether nothing reads what a partial step computes of text
    layers: int = 0  # that may merge
    merged: int = 0  # image tokens to merge in each
    plain: tuple[int, ...] = ()  # sites whose attention processor was replaced
    lost: frozenset[int] = frozenset()  # layers likewise


def module_plan(
    config: TokenCacheConfig, merge: TokenMergeConfig | None, moment: Moment, past: Past, layout: Layout, nothing: tuple[int, ...]
) -> StepPlan:
    """The plan at module scope; `nothing` are all sites, which are plain where nothing is cached."""
    uncached = config.interval == 1 or config.cache_ratio == 0
    plain = nothing if uncached else layout.plain
    if uncached or moment.fresh or not past.times or moment.step >= past.next_full:
        matched = matchings(merge, moment.step, past, layout) if merge is not None else ()
        return StepPlan(Mode.FULL, plain=plain, merged=layout.merged if matched else 0, matched=matched)
    streams, share = [stream for _, stream, _ in layout.sites], 1 - config.cache_ratio
    schedule = config.ratio_schedule if callable(config.ratio_schedule) else when.RATIO_SCHEDULES[config.ratio_schedule]
    counts, total, steps = [], 0, config.steps or moment.steps
    for place, stream, layer in layout.sites:
        if place not in plain:
            wanted = share * schedule(when.Place(moment.step, steps, layer, streams.count(stream), stream))
            spared = layout.text if stream == "joint" and config.text_tokens != "select" else 0
            left_out = stream == "text" and layout.unseen
            counts.append(0 if left_out else when.tokens_to_compute(wanted, layout.lengths[stream] - spared))
            total += layout.lengths[stream]
    order = config.forecast_order if config.fill == "forecast" else 0
    weights = how.coefficients("taylor", past.times, float(moment.step), order)
    return StepPlan(Mode.PARTIAL, tuple(weights), counts=tuple(counts), tokens=total, unseen=layout.unseen, plain=plain)


def matchings(merge: TokenMergeConfig, step: int, past: Past, layout: Layout) -> tuple[Matched, ...]:
    """Which layers of a full step merge, and which of them make the matching."""
    if not layout.merged or step < merge.warmup_steps:
        return ()
    steps, layers = merge.rematching
    found, groups = [], set[int]()  # whose matching is there or on its way
    for layer in range(layout.layers):
        group = layer // layers
        if layer in layout.lost:
            found.append(Matched.NOT)
            continue
        made = past.matched.get(group)
        found.append(Matched.HERE if group not in groups and (made is None or step - made >= steps) else Matched.BEFORE)
        groups.add(group)
    return tuple(found)


def forecast(config: OutputCacheConfig, now: float, past: Past) -> tuple[float, ...]:
    """Weights of the remembered outputs for a forecast in the interval after the last full step."""
    order, damping = int(within(config.order, past.number)), within(config.damping, past.number)
    return tuple(how.coefficients(config.how, past.times, now, order, damping))


def within(values: float | tuple[float, ...], number: int) -> float:
    """Of values, one for all full steps or one for each, the last of which stays, that of the full step of this number, from 1."""
    return float(each(values)[min(number, len(each(values))) - 1])


def correction(config: OutputCacheConfig, moment: Moment, past: Past) -> tuple[float, ...]:
    """Weights of a full step's own output, and of those remembered, for what is added to it: its lead, and what makes up for the
    forecasts since the last full step.

    What they moved the picture by, step by step, is compared with what outputs interpolated between both full steps would have;
    the step from here, if long enough, makes up for the difference.
    """
    now, times = moment.step, moment.times
    if not past.times or past.times[0] == moment.time:
        return ()
    total = np.zeros(1 + len(past.times))
    total[:2] += np.array((1.0, -1.0)) * within(config.lead, past.number + 1)
    if any(each(config.correct)) and times and now - past.step > 1:
        total += within(config.correct, past.number) * _missing(config, moment, past)
    return tuple(total.tolist()) if any(total) else ()


def _missing(config: OutputCacheConfig, moment: Moment, past: Past) -> np.ndarray:
    """What the forecasts since the last full step left out, as part of the step from here."""
    now, times = moment.step, moment.times
    if config.space == "data":  # whose steps are long by the ratio of signal to noise
        steps = (*map(math.exp, times), math.inf)
    else:
        steps = (*times, 0.0 if times[0] > times[-1] else how.unit(times))
    axis = "logit" if config.how == "logit" else "polynomial"
    missing = np.zeros(1 + len(past.times))
    for step in range(past.step, now):
        ahead = steps[step + 1] - steps[step]
        meant = how.coefficients(axis, (moment.time, past.times[0]), times[step], 1)
        moved = (0.0, *(forecast(config, times[step], past) if step > past.step else (1.0,)))
        missing[:2] += ahead * np.array(meant)
        missing[: len(moved)] -= ahead * np.array(moved)
    return missing / (steps[now + 1] - steps[now])


def difference(config: OutputCacheConfig, now: float, past: Past) -> tuple[float, ...]:
    """Weights of the remembered differences of the guidance branches."""
    return tuple(how.coefficients(config.how, past.guided, now, config.guidance_order)) if past.guided else ()


def rule(config: OutputCacheConfig | TokenCacheConfig) -> when.Rule:
    """How many steps after a full step the next one comes."""
    if isinstance(config, TokenCacheConfig):
        chosen = when.every(config.interval, config.interval_spread)
    elif config.full_steps is not None:
        chosen = when.listed(config.full_steps)
    elif config.tolerance is not None:
        chosen = when.within(config.tolerance, config.interval)
    elif config.when is not None:
        chosen = when.get(config.when) if isinstance(config.when, str) else config.when
    else:
        chosen = when.every(config.interval)
    return lambda progress: 1 if progress.step + 1 < config.warmup_steps else chosen(progress)


def merges(config: OutputCacheConfig, moment: Moment) -> bool:
    """Whether this step, if full, sees the picture at a fraction of its side."""
    steps, above = config.merged_steps or 0, config.merged_above
    listed = moment.step in steps if isinstance(steps, tuple) else moment.step < steps
    if listed or above is None:
        return listed
    alpha, sigma = moment.levels[moment.step]
    return sigma / (alpha + sigma) > above  # the noise level of flow matching; elsewhere what it would be


def keeps_ahead(config: OutputCacheConfig, moment: Moment) -> bool:
    """Whether a later step merges some cells and keeps others."""
    later = range(moment.step + 1, len(moment.times))
    return bool(config.merged_keep) and any(merges(config, replace(moment, step=step)) for step in later)


def guided(steps: tuple[int, ...] | int, step: int, number: int) -> bool:
    """Whether a full step, before which there were `number`, computes the unconditional branch too."""
    return step in steps if isinstance(steps, tuple) else number % steps == 0
