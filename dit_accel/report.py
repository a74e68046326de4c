"""What the last run computed, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_accel.apply import transformer_of
from dit_accel.schedule import Mode
from dit_accel.state import Call


@dataclass(frozen=True)
class Report:
    """The calls of one run.

    `tokens_share` is the share of tokens that the token-wise computations of partial steps worked on; `cache_bytes` the most
    that the cache held.
    """

    calls: tuple[Call, ...]

    @property
    def full_steps(self) -> int:
        return sum(call.mode is Mode.FULL for call in self.calls)

    @property
    def partial_steps(self) -> int:
        return sum(call.mode is Mode.PARTIAL for call in self.calls)

    @property
    def tokens_share(self) -> float:
        """Of the partial steps; 1 if there were none."""
        total = sum(call.tokens for call in self.calls)
        return sum(call.tokens_computed for call in self.calls) / total if total else 1.0

    @property
    def cache_bytes(self) -> int:
        return max((call.cache_bytes for call in self.calls), default=0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "full_steps": self.full_steps,
            "partial_steps": self.partial_steps,
            "tokens_share": self.tokens_share,
            "cache_bytes": self.cache_bytes,
            "calls": [{**vars(call), "mode": call.mode.value} for call in self.calls],
        }

    def __str__(self) -> str:
        if not self.calls:
            return "No run yet: call the pipeline first."
        return (
            f"{self.full_steps} full and {self.partial_steps} partial calls; a partial call computed "
            f"{self.tokens_share:.1%} of its tokens; the cache held up to {self.cache_bytes / 2**20:.1f} MiB."
        )


def report(model: Any) -> Report:
    """What the last run of a pipeline or transformer computed; it stays until the next run begins.

    Raises:
        RuntimeError: if nothing is applied to the model.
    """
    applied = vars(transformer_of(model)).get("_dit_accel")
    if applied is None:
        raise RuntimeError("Nothing is applied to this model; call dit_accel.apply first.")
    return Report(tuple(applied[0].calls))
