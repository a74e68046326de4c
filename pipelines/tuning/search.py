"""Search recipes: which steps to compute and how to forecast the others, for every speed asked for, judged by final pictures.

A candidate is worth what its pictures have in common with those of the uncached pipeline, as PSNR: on a few prompts first, then on
all. An interrupted search goes on: it is the same again, with what was evaluated looked up in a file.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dit_accel import OutputCacheConfig
from dit_accel.pipelines.generation import Settings, denoise, switched
from dit_accel.pipelines.pictures import decibels, squared_error
from dit_accel.pipelines.tuning.starts import schedules, spaced, trajectory

RACE = (2, 4)  # so many prompts have to be won before a candidate is tried on more
BEST = 60.0  # dB that identical pictures count as: among so close ones, differences say nothing
OPTIONS = {"damping": (0.0, 0.3, 0.5, 0.7, 0.85, 1.0), "correct": (0.0, 0.25, 0.5, 0.75, 1.0), "order": (0, 1, 2)}
MOST = 1.5  # that a damping or a correction may become
TIMED = 5  # pairs of runs that are timed
IDLE = 400  # changes in a row that bring nothing before a search ends
HOWS = (("polynomial", "output"), ("logit", "output"), ("polynomial", "data"))
# Where a search starts: order, damping, correction, how and space. The first three are tried on every schedule, all on the best
# one; the last is fewer steps of Euler's method at the best times.
MANNERS = (
    (1, 0.7, 0.5, "logit", "output"),
    (1, 0.85, 0.0, "logit", "output"),
    (1, 0.7, 0.25, "polynomial", "data"),
    (1, 1.0, 1.0, "logit", "output"),
    (1, 1.0, 1.0, "polynomial", "data"),
    (1, 0.7, 0.0, "polynomial", "output"),
    (0, 1.0, 1.0, "polynomial", "output"),
    (0, 1.0, 0.0, "polynomial", "output"),
)


@dataclass(frozen=True)
class Candidate:
    """A configuration as it is searched: orders, dampings and corrections for every full step, `guided` those with both guidance
    branches."""

    steps: tuple[int, ...]
    orders: tuple[int, ...]
    dampings: tuple[float, ...]
    corrects: tuple[float, ...]
    how: str = "logit"
    space: str = "output"
    guided: tuple[int, ...] | None = None

    @property
    def cost(self) -> float:
        """In full evaluations of both branches of guidance."""
        return float(len(self.steps)) if self.guided is None else (len(self.steps) + len(self.guided)) / 2

    @property
    def config(self) -> OutputCacheConfig:
        lists = (self.orders, self.dampings, self.corrects)
        order, damping, correct = (values[0] if len(set(values)) == 1 else values for values in lists)
        how: dict[str, Any] = {"order": order, "damping": damping, "how": self.how if self.space == "output" else "polynomial"}
        if max(self.orders) == 0:  # damping and how then say nothing
            how = {"order": 0}
        return OutputCacheConfig(full_steps=self.steps, space=self.space, correct=correct, guidance_steps=self.guided, **how)

    def at(self, places: Sequence[int], steps: Sequence[int], guided: tuple[int, ...] | None) -> Candidate:
        """Other full steps, each with the values of one of these."""
        lists = ([values[i] for i in places] for values in (self.orders, self.dampings, self.corrects))
        orders, dampings, corrects = map(tuple, lists)
        return replace(self, steps=tuple(steps), orders=orders, dampings=dampings, corrects=corrects, guided=guided)


@dataclass
class Bench:
    """Evaluates configurations on prompts, and remembers what it evaluated in a file.

    Attributes:
        settings: of the uncached pipeline; every prompt has a seed of its own, from settings.seed on.
        path: of the file, one evaluation a line.
        on_step: called after every denoising step.
        spent: seconds of everything asked for so far, also of what an earlier search had evaluated: an interrupted one goes on as
            if it had not been.
    """

    pipe: Any
    prompts: list[str]
    settings: Settings
    path: Path
    on_step: Callable[[], None] = lambda: None
    spent: float = 0.0
    known: dict[str, tuple[float, float]] = field(default_factory=dict)  # what came out, a PSNR, and seconds
    asked: set[str] = field(default_factory=set)
    plain: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                found = json.loads(line)
            except ValueError:  # the last one, cut off as it was written
                continue
            self.known[found["key"]] = found["psnr"], found["seconds"]

    def psnr(self, config: OutputCacheConfig, places: Sequence[int]) -> list[float]:
        """Likeness to the uncached pictures of the prompts in these places, in dB."""
        name = json.dumps(config.to_dict(), sort_keys=True)
        keys = {i: f"{name} {self.settings.steps} {self.settings.seed + i} {self.prompts[i]}" for i in places}
        if missing := [i for i in places if keys[i] not in self.known]:
            start = time.perf_counter()
            if new := [i for i in missing if i not in self.plain]:
                self.plain |= zip(new, self.pictures(None, new), strict=True)
            made = self.pictures(config, missing)
            seconds = (time.perf_counter() - start) / len(missing)
            for i, picture in zip(missing, made, strict=True):
                self.keep(keys[i], min(BEST, decibels(squared_error(self.plain[i], picture))), seconds)
        self.spent += sum(self.known[key][1] for key in set(keys.values()) - self.asked)
        self.asked.update(keys.values())
        return [self.known[keys[i]][0] for i in places]

    def keep(self, key: str, psnr: float, seconds: float) -> None:
        """Remember what came out, here and in the file."""
        self.known[key] = psnr, seconds
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "psnr": psnr, "seconds": seconds}) + "\n")

    def pictures(self, config: OutputCacheConfig | None, places: Sequence[int]) -> list[Any]:
        """Made as many at a time as the settings say."""
        batch, made = self.settings.batch_size, []
        with switched(self.pipe, config):
            for start in range(0, len(places), batch):
                some = [(self.prompts[i], self.settings.seed + i) for i in places[start : start + batch]]
                made += [picture.image for picture in denoise(self.pipe, some, self.settings, self.on_step, applied=False)]
        return made

    def along(self) -> tuple[list[np.ndarray], list[float]]:
        """What the transformer returns on every step of an uncached run of a few prompts, and the steps' noise levels."""
        places = range(min(RACE[0], len(self.prompts)))
        return trajectory(self.pipe, lambda: self.plain.update(zip(places, self.pictures(None, places), strict=True)))

    def room(self, speedup: float) -> float:
        """Full evaluations that leave denoising so many times as fast by the clock, forecasts and the scheduler included."""
        steps, key = self.settings.steps, f"seconds of a run with one full step over those of one with {self.settings.steps}"
        if key not in self.known:
            once = OutputCacheConfig(full_steps=(0,), order=0)
            self.keep(key, median(self.seconds(once) / self.seconds(None) for _ in range(TIMED)), 0.0)
        one = self.known[key][0]
        return max(1.0, 1 + (steps - 1) * (1 / speedup - one) / (1 - one))

    def seconds(self, config: OutputCacheConfig | None) -> float:
        """Of denoising one picture."""
        with switched(self.pipe, config):
            pair = [(self.prompts[0], self.settings.seed)]
            return denoise(self.pipe, pair, self.settings, self.on_step, applied=False)[0].denoising_seconds

    def mean(self, config: OutputCacheConfig) -> float:
        """Likeness on all prompts."""
        return float(np.mean(self.psnr(config, range(len(self.prompts)))))

    def better(self, candidate: OutputCacheConfig, incumbent: OutputCacheConfig) -> bool:
        """Whether a candidate is closer: on the mean of few prompts, of some, and of all."""
        counts = sorted({min(count, len(self.prompts)) for count in (*RACE, len(self.prompts))})
        return all(np.mean(np.subtract(*(self.psnr(c, range(count)) for c in (candidate, incumbent)))) > 0 for count in counts)


def changed(one: Candidate, steps: int, most: float, halves: bool, rng: random.Random) -> Candidate:
    """A candidate with one thing changed, or all weights a little, which costs at most as much."""
    kind = rng.choices(("move", "weights", "damping", "order", "correct", "how", "guidance"), (6, 6, 2, 2, 2, 1, 2 * halves))[0]
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
        dampings, corrects = (
            tuple(round(min(max(value + rng.gauss(0, spread), 0.0), MOST), 2) for value in values)
            for values in (one.dampings, one.corrects)
        )
        return replace(one, dampings=dampings, corrects=corrects)
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
    return guided_otherwise(one, steps, most, rng) if halves else one


def guided_otherwise(one: Candidate, steps: int, most: float, rng: random.Random) -> Candidate:
    """With the unconditional branch computed on other steps, and as many full steps as that leaves room for."""
    guided = set(one.steps if one.guided is None else one.guided)
    guided ^= {rng.choice(one.steps[1:] or one.steps)}
    guided |= {0}
    made = replace(one, guided=tuple(sorted(guided)))
    while made.cost > most and len(made.steps) > 1:  # without a step, or without its unconditional branch
        step = rng.choice(made.steps[1:])
        assert made.guided is not None
        rest = tuple(s for s in made.guided if s != step)
        if step in made.guided and rng.random() < 0.5:
            made = replace(made, guided=rest)
            continue
        places = [i for i, own in enumerate(made.steps) if own != step]
        made = made.at(places, [made.steps[i] for i in places], rest)
    while made.cost + 0.5 <= most and (free := sorted(set(range(1, steps)) - set(made.steps))):
        step = rng.choice(free)
        after = sum(own < step for own in made.steps)
        places = sorted([*range(len(made.steps)), after - 1])  # its values are those of the step before
        made = made.at(places, sorted([*made.steps, step]), made.guided)
    return made


def search(
    bench: Bench, most: float, seconds: float, halves: bool, along: Any, seed: int = 0, first: Sequence[Candidate] = ()
) -> tuple[Candidate, float]:
    """The closest candidate found that costs at most so many full evaluations, and the seconds of evaluating that it took.

    Args:
        halves: whether guidance computes two branches, one of which may be left out.
        along: what `Bench.along` returned.
        first: other candidates to start from.
    """
    rng, steps, begun, count = random.Random(seed), bench.settings.steps, bench.spent, max(1, math.floor(most))

    def plain(chosen: tuple[int, ...], manner: tuple[int, float, float, str, str], every: int = 1) -> Candidate:
        n, (order, damping, correct, how, space) = len(chosen), manner
        guided = None if every == 1 else chosen[::every]
        return Candidate(chosen, (order,) * n, (damping,) * n, (correct,) * n, how, space, guided)

    kinds = [(count, 1)]
    if halves:  # more full steps, of which every second or third has both branches
        kinds += [(min(steps, math.floor(2 * most * every / (every + 1))), every) for every in (2, 3)]
    starts = [
        plain(schedule, manner, every)
        for number, every in kinds
        for schedule in schedules(steps, number, *along)
        for manner in MANNERS[:3]
    ]
    best, *others = [one for one in starts if one.cost <= most]
    for one in others:
        best = one if bench.better(one.config, best.config) else best
    every = 1 if best.guided is None else -(-len(best.steps) // len(best.guided))
    for one in [*[plain(best.steps, manner, every) for manner in MANNERS], *first]:
        best = one if one.cost <= most and bench.better(one.config, best.config) else best
    tried, idle = {best}, 0
    while bench.spent - begun < seconds and idle < IDLE:
        one = changed(best, steps, most, halves, rng)
        idle += 1
        if one in tried:
            continue
        tried.add(one)
        if bench.better(one.config, best.config):
            best, idle = one, 0
    return best, bench.spent - begun


def fewer(one: Candidate, most: float) -> Candidate:
    """As many of its full steps as that leaves room for, evenly thinned out; the first one stays."""
    for count in range(len(one.steps), 0, -1):
        kept = spaced(len(one.steps), count, lambda share: share)
        steps = [one.steps[i] for i in kept]
        thin = one.at(kept, steps, None if one.guided is None else tuple(step for step in steps if step in one.guided))
        if thin.cost <= most:
            break
    return thin
