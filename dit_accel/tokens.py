"""Which tokens a packed step computes: one selection for all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dit_accel import which
from dit_accel.config import OutputCacheConfig
from dit_accel.families.table import lookup
from dit_accel.packed import Packed
from dit_accel.steps import Memory
from dit_accel.subset import subset_check

OBSERVED = frozenset({"last_tokens"})


def packing(transformer: Any, config: OutputCacheConfig) -> Packed:
    """Packed steps of a transformer, attached to it.

    Raises:
        TypeError: if its family is not described, or something mixes tokens that is not.
        ValueError: for a selector that needs what nobody observes here, or attention that cannot be computed afresh.
    """
    family = lookup(transformer)
    if family is None:
        raise TypeError(
            f"No tokens of {type(transformer).__name__} can be selected: its blocks are not described. Set compute_ratio=0."
        )
    if missing := sorted(which.get(config.selector).needs - OBSERVED):
        fitting = ", ".join(name for name in which.selectors() if which.get(name).needs <= OBSERVED)
        raise ValueError(
            f"The selector {config.selector!r} needs {', '.join(missing)}, not observed at model scope; choose one of {fitting}."
        )
    subset_check(transformer, family)
    packed = Packed(transformer, family, config.attention)
    packed.attach()
    return packed


class Selection:
    """The selections of one guidance branch between two full steps.

    Args:
        tokens: how many there are; count: how many are computed; grid: rows and columns in which they lie.
        memory: of the branch, which knows what entered the blocks at the full step.
    """

    layer, stream = 0, "image"

    def __init__(self, config: OutputCacheConfig, tokens: int, count: int, grid: tuple[int, int], memory: Memory) -> None:
        self.config, self.tokens, self.count, self.grid, self.memory = config, tokens, count, grid, memory
        self.selector = which.get(config.selector)
        self.step = 0
        self.ages: torch.Tensor | None = None  # [1 or B, tokens]
        self.last: torch.Tensor | None = None  # [B, tokens, C], for selectors that ask for it

    def at(self, step: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Chooses, of the tokens that enter the first block on this step, those to compute: an ascending index [k] or [B, k]."""
        self.step = step
        chosen: Callable[[torch.Tensor], torch.Tensor] = self.choose
        return chosen

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def choose(self, entering: torch.Tensor) -> torch.Tensor:
        tokens = entering[:, -self.tokens :]
        generator = torch.Generator().manual_seed(100_003 * self.config.seed + self.step)
        noise = torch.rand(1, self.tokens, generator=generator).to(tokens.device)
        rows = len(tokens) if self.selector.per_picture else 1
        if self.ages is None:
            self.ages = torch.zeros(rows, self.tokens, device=tokens.device)
            self.last = self.memory.features["entered"][0].clone() if "last_tokens" in self.selector.needs else None
        height, width = self.grid if self.grid[0] * self.grid[1] == self.tokens else (1, self.tokens)
        context = which.SelectionContext(tokens, self.ages, noise, self.count, (height, width), 0, self, last_tokens=self.last)
        scores = which.scored(self.selector, self.config.selector, context, rows)
        index: torch.Tensor = scores.topk(self.count, dim=-1, sorted=False).indices.sort(dim=-1).values
        self.ages = (self.ages + 1).scatter(1, index.expand(len(self.ages), -1), 0.0)
        if self.last is not None:
            places = index.expand(len(tokens), -1)[..., None].expand(-1, -1, tokens.shape[-1])
            self.last.scatter_(1, places, tokens.gather(1, places))
        return index[0] if len(index) == 1 else index
