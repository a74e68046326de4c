"""When is everything computed, and how many tokens otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Mode(Enum):
    """What one call of the transformer computes."""

    PLAIN = "plain"  # everything, as if nothing had been applied
    FULL = "full"  # everything, and remembers it
    PARTIAL = "partial"  # the selected tokens; the rest comes from memory


@dataclass(frozen=True)
class Place:
    """Where in the run and in the model a share of tokens is asked for.

    Attributes:
        step: number of the step, from 0.
        steps: how many there are; None where nobody said.
        layer: index of the layer within its stream.
        layers: how many there are in the stream.
        stream: "image", "text", "joint", "cross-attention" or "feed-forward".
    """

    step: int
    steps: int | None
    layer: int
    layers: int
    stream: str

    @property
    def progress(self) -> float:
        """step / steps; RuntimeError where the number of steps is not known."""
        return self.step / known(self.steps)


RatioSchedule = Callable[[Place], float]


def known(steps: int | None) -> int:
    """The number of steps; RuntimeError if nobody said it."""
    if steps is None:
        raise RuntimeError(
            "This schedule depends on the number of steps, which the transformer alone does not know. "
            "Give dit_accel.apply the pipeline, or set steps in the configuration."
        )
    return steps


def constant(place: Place) -> float:
    return 1.0


def toca(place: Place) -> float:
    """ToCa's released schedules for FLUX (double and single blocks) and PixArt; both count 27 layers for every stream."""
    depth = place.layer / 27
    if place.stream in ("image", "text", "joint"):
        return (1.5 - depth) * (1.6 if place.stream == "joint" else 0.4)
    return (1.9 - 1.8 * place.progress) * (1.6 - 1.2 * depth) * (0.6 if place.stream == "cross-attention" else 1.6)


RATIO_SCHEDULES: dict[str, RatioSchedule] = {"constant": constant, "toca": toca}


def interval_after(step: int, interval: int, spread: float, steps: int | None) -> int:
    """Steps from a full step to the next one: round(N / (1 - w + 2 w s / S)), at least 1; N where w is 0."""
    if spread == 0:
        return interval
    return max(1, round(interval / (1 - spread + 2 * spread * step / known(steps))))


def tokens_to_compute(share: float, tokens: int) -> int:
    """k = int(clamp(share) * tokens), truncated; 0 is allowed. A share of 1 - 0.9 counts as 0.1."""
    return int(round(min(max(share, 0.0), 1.0) * tokens, 6))
