"""What is searched: configurations with values of their own for every full step, and how one is changed into another."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dit_accel import OutputCacheConfig
from dit_accel.config import each
from dit_accel.pipelines.tuning.starts import spaced

OPTIONS = {"damping": (0.0, 0.3, 0.5, 0.7, 0.85, 1.0), "correct": (0.0, 0.25, 0.5, 0.75, 1.0), "order": (0, 1, 2)}
RANGES = {"dampings": (0.0, 1.5), "corrects": (0.0, 1.5), "leads": (-1.0, 1.0)}  # in which small changes stay
DAMPED = ("dampings", "corrects")
SIDES = (2, 4)  # of the cells of merged steps
HOWS = (("polynomial", "output"), ("logit", "output"), ("polynomial", "data"))


@dataclass(frozen=True)
class Candidate:
    """A configuration as it is searched: orders, dampings, corrections and leads for every full step, `guided` those with both
    guidance branches, `merged` how many of the first are merged, in cells of `side`, which costs one of `shares` of a whole one;
    `run` are the run's steps as shares of the pipeline's own, which it has if there are none."""

    steps: tuple[int, ...]
    orders: tuple[int, ...]
    dampings: tuple[float, ...]
    corrects: tuple[float, ...]
    leads: tuple[float, ...]
    how: str = "logit"
    space: str = "output"
    guided: tuple[int, ...] | None = None
    run: tuple[float, ...] = ()
    merged: int = 0
    side: int = SIDES[0]
    shares: tuple[float, ...] = (1.0, 1.0)  # by side

    @property
    def cost(self) -> float:
        """In full evaluations of both branches of guidance."""
        branches = [1 if self.guided is None or step in self.guided else 0.5 for step in self.steps]
        return sum(branches[self.merged :]) + self.shares[SIDES.index(self.side)] * sum(branches[: self.merged])

    @property
    def config(self) -> OutputCacheConfig:
        lists = (self.orders, self.dampings, self.corrects, self.leads)
        order, damping, correct, lead = (values[0] if len(set(values)) == 1 else values for values in lists)
        how: dict[str, Any] = {"order": order, "damping": damping, "how": self.how if self.space == "output" else "polynomial"}
        if max(self.orders) == 0:  # damping and how then say nothing
            how = {"order": 0}
        steps: Any = len(self.run) if self.run == even(len(self.run)) else self.run
        return OutputCacheConfig(
            full_steps=self.steps,
            sampler_steps=steps or None,
            space=self.space,
            correct=correct,
            lead=lead,
            guidance_steps=self.guided,
            merged_steps=self.steps[: self.merged] or None,
            merged_side=self.side if self.merged else SIDES[0],
            **how,
        )

    @classmethod
    def of(cls, config: OutputCacheConfig) -> Candidate | None:
        """What a configuration is as a candidate; None of one that no list of full steps, or more than such, describes."""
        steps, run, guided, merged = config.full_steps, config.sampler_steps, config.guidance_steps, config.merged_steps or ()
        if steps is None or callable(config.how) or isinstance(guided, int) or config.compute_ratio:
            return None
        early = tuple(step for step in steps if step < merged) if isinstance(merged, int) else merged
        if early != steps[: len(early)] or config.merged_above is not None or config.merged_keep:
            return None

        def listed(values: Any) -> tuple[Any, ...]:
            return tuple(each(values)[min(i, len(each(values)) - 1)] for i in range(len(steps)))

        lists = map(listed, (config.order, config.damping, config.correct, config.lead))
        run = even(run) if isinstance(run, int) else run or ()
        return cls(steps, *lists, config.how, config.space, guided, run, len(early), config.merged_side)

    def at(self, places: Sequence[int], steps: Sequence[int], guided: tuple[int, ...] | None) -> Candidate:
        """Other full steps, each with the values of one of these."""
        lists = ("orders", "dampings", "corrects", "leads")
        own: dict[str, Any] = {name: tuple(getattr(self, name)[i] for i in places) for name in lists}
        return replace(self, steps=tuple(steps), guided=guided, merged=sum(i < self.merged for i in places), **own)


def even(count: int) -> tuple[float, ...]:
    """Where the steps of a run of so many lie."""
    return tuple(round(i / count, 4) for i in range(count))


def changed(one: Candidate, steps: int, most: float, halves: bool, rng: random.Random) -> Candidate:
    """A candidate with one thing changed, or all weights a little, which costs at most as much."""
    asked, steps = steps, len(one.run) or steps
    kinds = {"move": 6, "run": 6, "weights": 6, "damping": 2, "order": 2, "correct": 2, "lead": 2, "how": 1, "guidance": 2 * halves}
    if len(one.steps) == steps:  # nothing is forecast
        kinds = {"run": 6, "lead": 6, "how": 1, "guidance": 2 * halves}
    kinds["merged"] = 2 * (min(one.shares) < 1)
    kind = rng.choices([*kinds], [*kinds.values()])[0]
    if kind == "run":
        return elsewhere(one, steps, asked, rng)
    i = rng.randrange(len(one.steps))
    if kind == "move" and len(one.steps) > 1:
        i = rng.randrange(1, len(one.steps))
        free = sorted(set(range(1, steps)) - set(one.steps))
        near = [step for step in free if abs(step - one.steps[i]) <= 2] or free or [one.steps[i]]
        new = rng.choice(near if rng.random() < 0.7 or not free else free)
        guided = None if one.guided is None else tuple(sorted({new if s == one.steps[i] else s for s in one.guided}))
        return replace(one, steps=tuple(sorted({*one.steps} - {one.steps[i]} | {new})), guided=guided)
    if kind == "weights":
        spread = rng.choice((0.05, 0.1, 0.25))
        return replace(one, **{name: nudged(getattr(one, name), name, range(len(one.steps)), spread, rng) for name in DAMPED})
    if kind == "lead" and len(one.steps) > 1:
        some = rng.sample(range(1, len(one.steps)), rng.choice((1, 1, 2)) if len(one.steps) > 2 else 1)
        return replace(one, leads=nudged(one.leads, "leads", some, 0.2, rng))
    if kind in ("damping", "order", "correct"):
        values: list[Any] = list(getattr(one, f"{kind}s"))
        value = rng.choice([option for option in OPTIONS[kind] if option != values[i]])
        places = range(len(values)) if rng.random() < 0.4 else (range(i, len(values)) if rng.random() < 0.5 else (i,))
        for place in places:
            values[place] = value
        return replace(one, **{f"{kind}s": tuple(values)})
    if kind == "how":
        how, space = rng.choice([both for both in HOWS if both != (one.how, one.space)])
        return replace(one, how=how, space=space)
    if kind == "merged":
        count = min(max(one.merged + rng.choice((-1, 0, 1)), 0), len(one.steps))
        return fitted(replace(one, merged=count, side=rng.choice(SIDES)), asked, most, rng)
    return guided_otherwise(one, asked, most, rng) if halves else one


def nudged(values: Sequence[float], name: str, places: Sequence[int], spread: float, rng: random.Random) -> tuple[float, ...]:
    """Values of that name, those in these places changed a little."""
    low, high = RANGES[name]
    return tuple(
        round(min(max(value + rng.gauss(0, spread), low), high), 2) if i in places else value for i, value in enumerate(values)
    )


def elsewhere(one: Candidate, steps: int, asked: int, rng: random.Random) -> Candidate:
    """With one, two or all of the run's steps at other places; or with a forecast step more, up to those asked for, or less."""
    places, forecast, made = [*(one.run or even(steps)), 1.0], sorted(set(range(steps)) - set(one.steps)), one
    kind = rng.random()
    if (kind < 0.15 and steps < asked) or (0.15 <= kind < 0.3 and forecast):
        at = rng.choice(forecast) if kind >= 0.15 else rng.randrange(1, steps + 1)
        more = -1 if kind >= 0.15 else 1
        places[at : at + (more < 0)] = [(places[at - 1] + places[at]) / 2] * (more > 0)
        renumbered = [tuple(s + more * (s >= at) for s in some) for some in (one.steps, one.guided or ())]
        made = replace(one, steps=renumbered[0], guided=None if one.guided is None else renumbered[1])
    elif kind < 0.5:  # all of them bent
        power, bend = math.exp(rng.gauss(0, 0.1)), rng.gauss(0, 0.03)
        places = [place**power + bend * math.sin(2 * math.pi * place) for place in places]
    else:
        most = rng.choice((1, 2, len(places)))
        for at in rng.sample(range(1, len(places) - 1), min(most, len(places) - 2)):
            room = min(places[at] - places[at - 1], places[at + 1] - places[at])
            places[at] += max(-0.9, min(0.9, rng.gauss(0, 0.3))) * room
    run = tuple(round(max(0.0, place), 4) for place in places[:-1])
    valid = run[0] == 0 and run[-1] < 1 and list(run) == sorted(set(run))
    return replace(made, run=run) if valid else one


def guided_otherwise(one: Candidate, asked: int, most: float, rng: random.Random) -> Candidate:
    """With the unconditional branch computed on other steps, and as many full steps as that leaves room for."""
    guided = set(one.steps if one.guided is None else one.guided)
    guided ^= {rng.choice(one.steps[1:] or one.steps)}
    return fitted(replace(one, guided=tuple(sorted(guided | {0}))), asked, most, rng)


def fitted(made: Candidate, asked: int, most: float, rng: random.Random) -> Candidate:
    """With as many full steps as there is room for, on a run that has no more steps than those asked for."""
    while made.cost > most and len(made.steps) > 1:  # without a step, or without its unconditional branch
        step = rng.choice(made.steps[1:])
        rest = None if made.guided is None else tuple(s for s in made.guided if s != step)
        if made.guided and step in made.guided and rng.random() < 0.5:
            made = replace(made, guided=rest)
            continue
        places = [i for i, own in enumerate(made.steps) if own != step]
        made = made.at(places, [made.steps[i] for i in places], rest)
    while True:
        free = sorted(set(range(1, len(made.run) or asked)) - set(made.steps))
        if not free and made.run and len(made.run) < asked:  # nothing is forecast: the run has a step more
            places = [*made.run, 1.0]
            after = rng.choice([i for i in range(len(made.run)) if places[i + 1] - places[i] > 0.5 / asked])
            run = sorted([*made.run, round((places[after] + places[after + 1]) / 2, 4)])
            steps, guided = ([s + (s > after) for s in some] for some in (made.steps, made.guided or ()))
            larger = replace(made, run=tuple(run), steps=tuple(steps), guided=made.guided and tuple(guided))
            more = with_step(larger, after + 1)
        elif free:
            more = with_step(made, rng.choice(free))
        else:
            return made
        if more.cost > most:
            return made
        made = more


def with_step(one: Candidate, step: int) -> Candidate:
    """With one full step more, with the values of the one before, and no unconditional branch if some have none."""
    after = sum(own < step for own in one.steps)
    return one.at(sorted([*range(len(one.steps)), after - 1]), sorted([*one.steps, step]), one.guided)


def fewer(one: Candidate, most: float) -> Candidate:
    """As many of its full steps as that leaves room for, evenly thinned out; the first one stays."""
    for count in range(len(one.steps), 0, -1):
        kept = spaced(len(one.steps), count, lambda share: share)
        steps = [one.steps[i] for i in kept]
        thin = one.at(kept, steps, None if one.guided is None else tuple(step for step in steps if step in one.guided))
        if thin.cost <= most:
            break
    return thin
