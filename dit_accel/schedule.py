"""When is everything computed, and how many tokens otherwise."""

from __future__ import annotations

from enum import Enum


class Mode(Enum):
    """What one call of the transformer computes."""

    PLAIN = "plain"  # everything, as if nothing had been applied
    FULL = "full"  # everything, and remembers it
    PARTIAL = "partial"  # the selected tokens; the rest comes from memory


def mode_of(step: int, interval: int, warmup_steps: int) -> Mode:
    """The first `warmup_steps` steps are full, then every `interval`-th, counted from the last of them.

    Args:
        step: 0 for the first call of a run, counted per guidance branch.
    """
    since = step - (warmup_steps - 1)
    return Mode.FULL if since <= 0 or since % interval == 0 else Mode.PARTIAL


def tokens_to_compute(share: float, tokens: int) -> int:
    """k = int(clamp(share) * tokens), truncated; 0 is allowed. A share of 1 - 0.9 counts as 0.1."""
    return int(round(min(max(share, 0.0), 1.0) * tokens, 6))
