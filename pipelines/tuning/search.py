"""Search recipes for every speed asked for, judged by final pictures: how many steps a run has and where they lie, which of them to
compute, and how to forecast the others.

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
from dit_accel.pipelines.tuning.candidates import SIDES, Candidate, changed, even, fitted
from dit_accel.pipelines.tuning.starts import schedules, spaced, trajectory

RACE = (4, 12)  # so many prompts have to be won before a candidate is tried on more
SLACK, NEAR = 1.5, 0.4  # dB that a start, and a change, may be farther on the fewest prompts to be tried on more
BEST = 60.0  # dB that identical pictures count as: among so close ones, differences say nothing
TIMED = 5  # pairs of runs that are timed
TRIALS = TIMED * (1 + 2 * len(SIDES)) + 1  # uncached pictures that this costs at most: of one full step, and of merged ones
IDLE = 400  # changes in a row that bring nothing before a search ends
# Where a search starts: order, damping, correction, how and space. The first three are tried on every schedule, all on the best
# one; the last is fewer steps of Euler's method at the best times.
MANNERS = (
    (1, 0.7, 0.5, "logit", "output"),
    (1, 0.85, 0.25, "polynomial", "output"),
    (1, 0.7, 0.25, "polynomial", "data"),
    (1, 0.85, 0.0, "logit", "output"),
    (1, 1.0, 0.0, "polynomial", "output"),
    (1, 1.0, 1.0, "logit", "output"),
    (1, 1.0, 1.0, "polynomial", "data"),
    (1, 0.7, 0.0, "polynomial", "output"),
    (0, 1.0, 1.0, "polynomial", "output"),
    (0, 1.0, 0.0, "polynomial", "output"),
)


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
        return max(1.0, self.evaluations(1 / speedup))

    def shares(self) -> tuple[float, ...]:
        """What a step on tokens merged in cells of 2 x 2, and 4 x 4, costs beside a full one, by the clock; 1 where none can be."""
        steps, found = self.settings.steps, []
        for side in SIDES:
            try:
                merged = OutputCacheConfig(interval=1, merged_steps=steps, merged_side=side)
                found.append(min(1.0, self.evaluations(self.part(f"{steps} steps merged by {side}", merged)) / steps))
            except (TypeError, ValueError):  # which says why to those who ask for merged steps
                found.append(1.0)
        return tuple(found)

    def evaluations(self, part: float) -> float:
        """Full evaluations in a run that takes such a part of the seconds of one in full."""
        one = self.part("one full step", OutputCacheConfig(full_steps=(0,), order=0))
        return 1 + (self.settings.steps - 1) * (part - one) / (1 - one)

    def part(self, what: str, config: OutputCacheConfig) -> float:
        """The seconds of a run over those of one in full, measured once."""
        key = f"seconds of a run with {what} over those of one with {self.settings.steps}"
        if key not in self.known:
            self.keep(key, median(self.seconds(config) / self.seconds(None) for _ in range(TIMED)), 0.0)
        return self.known[key][0]

    def seconds(self, config: OutputCacheConfig | None) -> float:
        """Of denoising one picture."""
        with switched(self.pipe, config):
            pair = [(self.prompts[0], self.settings.seed)]
            return denoise(self.pipe, pair, self.settings, self.on_step, applied=False)[0].denoising_seconds

    def mean(self, config: OutputCacheConfig) -> float:
        """Likeness on all prompts."""
        return float(np.mean(self.psnr(config, range(len(self.prompts)))))

    def better(self, candidate: OutputCacheConfig, incumbent: OutputCacheConfig, slack: float = 0.0) -> bool:
        """Whether a candidate is closer on the mean of all prompts, and on that of few not farther by more than `slack` dB."""
        counts = sorted({min(count, len(self.prompts)) for count in (*RACE, len(self.prompts))})
        return all(
            np.mean(np.subtract(*(self.psnr(c, range(count)) for c in (candidate, incumbent))))
            > (0.0 if count == len(self.prompts) else -slack * counts[0] / count)
            for count in counts
        )


def search(
    bench: Bench, most: float, seconds: float, halves: bool, along: Any, seed: int = 0, first: Sequence[Candidate] = ()
) -> tuple[Candidate, float]:
    """The closest candidate found that costs at most so many full evaluations, and the seconds of evaluating that it took.

    Args:
        halves: whether guidance computes two branches, one of which may be left out.
        along: what `Bench.along` returned.
        first: other candidates to start from.

    Merged steps are tried where they cost less by the clock; likeness alone decides about them as about everything else.
    """
    rng, steps, begun, count = random.Random(seed), bench.settings.steps, bench.spent, max(1, math.floor(most))
    shares = bench.shares()

    def plain(chosen: Sequence[int], manner: tuple[int, float, float, str, str], every: int = 1, run: int = 0) -> Candidate:
        n, (order, damping, correct, how, space) = len(chosen), manner
        guided = None if every == 1 else tuple(chosen[::every])
        lists = ((value,) * n for value in (order, damping, correct, 0.0))
        return Candidate(tuple(chosen), *lists, how, space, guided, even(run), shares=shares)

    kinds = [(count, 1)]
    if halves:  # more full steps, of which every second or third has both branches
        kinds += [(min(steps, math.floor(2 * most * every / (every + 1))), every) for every in (2, 3)]
    starts = list[Candidate]()
    for number, every in kinds:  # fewer steps; twice or three times as many, of which every second or third is full; and others
        starts += [plain(range(number), MANNERS[-1], every, number)]
        if every > 1:  # which rarely wins, and can still be come to
            starts.append(plain(spaced(steps, number, lambda share: share), MANNERS[0], every))
            continue
        starts += [plain(range(0, n * number, n), m, every, n * number) for n in (2, 3) for m in MANNERS[:3] if n * number <= steps]
        starts += [plain(schedule, manner, every) for schedule in schedules(steps, number, *along) for manner in MANNERS[:3]]
    best, *others = [one for one in (*(replace(one, shares=shares) for one in first), *starts) if one.cost <= most]
    for one in others:  # which differ much: that few prompts like one less says little
        best = one if bench.better(one.config, best.config, SLACK) else best
    for side, share in zip(SIDES, shares, strict=True):  # a full step more, and the first one merged
        number = min(steps, math.floor(most + 1 - share))
        for one in (best, plain(range(number), MANNERS[-1], run=number)) if share < 1 else ():
            early = fitted(replace(one, merged=1, side=side), steps, most, rng)
            best = early if bench.better(early.config, best.config, SLACK) else best
    every = 1 if best.guided is None else -(-len(best.steps) // len(best.guided))
    forecasts = len(best.steps) < (len(best.run) or steps)  # if there are any, in other manners
    for one in [replace(plain(best.steps, manner, every), run=best.run) for manner in MANNERS if forecasts]:
        best = one if one.cost <= most and bench.better(one.config, best.config, SLACK) else best
    tried, idle = {best}, 0
    while bench.spent - begun < seconds and idle < IDLE:
        one = changed(best, steps, most, halves, rng)
        idle += 1
        if one in tried:
            continue
        tried.add(one)
        if bench.better(one.config, best.config, NEAR):
            best, idle = one, 0
    return best, bench.spent - begun
