"""When is everything computed, and how many tokens otherwise."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dit_accel.names import look_up, registering


class Mode(Enum):
    """What one call of the transformer computes."""

    PLAIN = "plain"  # everything, as if nothing had been applied
    FULL = "full"  # everything, and remembers it
    PARTIAL = "partial"  # the selected tokens; the rest comes from memory


class Matched(Enum):
    """Whether a layer's matching is computed, reused or skipped."""

    HERE = "here"
    BEFORE = "before"
    NOT = "not"


@dataclass(frozen=True)
class Place:
    """Where in the run and in the model a share of tokens is asked for.

    Attributes:
        step: number of the step, from 0; steps: how many there are, None if unknown.
        layer: index of the layer within its stream; layers: how many there are in the stream.
        stream: "image", "text", "joint", "cross-attention" or "feed-forward".
    """

    step: int
    steps: int | None
    layer: int
    layers: int
    stream: str

    @property
    def progress(self) -> float:
        """step / steps; RuntimeError if the number of steps is unknown."""
        return self.step / known(self.steps)


def known(steps: int | None) -> int:
    """The number of steps; RuntimeError if it is unknown."""
    if steps is None:
        raise RuntimeError(
            "This schedule depends on the number of steps, which the transformer alone does not know. "
            "Give dit_accel.apply the pipeline, or set steps in the configuration."
        )
    return steps


RatioSchedule = Callable[[Place], float]


def toca(place: Place) -> float:
    """ToCa's released schedules for FLUX (double and single blocks) and PixArt; both count 27 layers for every stream."""
    depth = place.layer / 27
    if place.stream in ("image", "text", "joint"):
        return (1.5 - depth) * (1.6 if place.stream == "joint" else 0.4)
    return (1.9 - 1.8 * place.progress) * (1.6 - 1.2 * depth) * (0.6 if place.stream == "cross-attention" else 1.6)


RATIO_SCHEDULES: dict[str, RatioSchedule] = {"constant": lambda place: 1.0, "toca": toca}


def tokens_to_compute(share: float, tokens: int) -> int:
    """k = int(clamp(share) * tokens), truncated; 0 is allowed. A share of 1 - 0.9 counts as 0.1."""
    return int(round(min(max(share, 0.0), 1.0) * tokens, 6))


@dataclass(frozen=True)
class Progress:
    """What is known of a guidance branch after a full step, on the host.

    Attributes:
        step: its number, from 0; steps: how many there are, None if unknown.
        times: of all steps, as the transformer is told them; empty if unknown.
        number: how many full steps there have been, this one included.
        error: relative error (RMS) that a forecast of this step's output would have had; None without a past to forecast from.
        distance: of that forecast: this step's time less that of the full step before; order: of that forecast.
    """

    step: int
    steps: int | None
    times: tuple[float, ...]
    number: int
    error: float | None = None
    distance: float = 0.0
    order: int = 0


Rule = Callable[[Progress], int]
WHEN: dict[str, Rule] = {}


def register_when(name: str | Rule | None = None) -> Callable[..., Any]:
    """Decorator that makes a function Progress -> steps until the next full one known by name, by default its own.

    @dit_accel.register_when("mine")
    def mine(progress):
        "Dense at both ends."
        return 1 if progress.step < 4 or progress.step > progress.steps - 4 else 3
    """
    return registering("rule", name, WHEN)


def get(name: str | Rule) -> Rule:
    """The rule of that name, or the function itself; ValueError with the known names if there is none."""
    return name if callable(name) else look_up("rule", name, WHEN)


def every(interval: int, spread: float = 0.0) -> Rule:
    """A full step every `interval` steps, or round(N / (1 - w + 2 w s / S)), at least 1, with a spread w (ToCa on PixArt)."""
    if spread == 0:
        return lambda progress: interval
    return lambda progress: max(1, round(interval / (1 - spread + 2 * spread * progress.step / known(progress.steps))))


def full_steps(rule: Rule, steps: int) -> list[int]:
    """The full steps of a run, by a rule that asks for no error."""
    found = [0]
    while (step := found[-1] + rule(Progress(found[-1], steps, (), len(found)))) < steps:
        found.append(step)
    return found


def listed(steps: tuple[int, ...]) -> Rule:
    """Full steps by number; after the last one there are none."""
    return lambda progress: next((s for s in steps if s > progress.step), progress.step + 10**9) - progress.step


def within(tolerance: float, most: int) -> Rule:
    """The longest interval of at most `most` steps whose forecast's predicted error stays under the tolerance.

    An error e at distance h is expected to be e (h' / h)^(order + 1) at distance h'.
    """

    def rule(progress: Progress) -> int:
        if progress.error is None or not progress.times:
            return 1
        now, growth, interval = progress.times[progress.step], progress.order + 1, 1
        for ahead, time in enumerate(progress.times[progress.step + 1 : progress.step + most], start=1):
            # `time` would be the last one forecast if the interval were one longer.
            if progress.error * abs((time - now) / progress.distance) ** growth > tolerance:
                break
            interval = ahead + 1
        return interval

    return rule
