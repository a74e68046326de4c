"""Which tokens a packed step computes: one selection for all layers."""

from __future__ import annotations

from typing import Any

import torch

from dit_accel import which
from dit_accel.config import OutputCacheConfig
from dit_accel.families.table import lookup
from dit_accel.packed import Packed
from dit_accel.steps import Index, Memory
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
        entered = memory.features["entered"][0]
        self.device = entered.device  # where tokens are; a blind selector works on the host
        rows, where = len(entered) if self.selector.per_picture else 1, "cpu" if self.selector.blind else self.device
        self.ages = torch.zeros(rows, tokens, device=where)  # [1 or B, tokens]
        self.noise = torch.empty(1, tokens)
        self.last = entered.clone() if "last_tokens" in self.selector.needs else None  # [B, tokens, C]

    def at(self, step: int) -> Index:
        """Which tokens to compute on this step, an ascending index [k] or [B, k]; or what chooses them as they enter the blocks.

        What a blind selector chooses depends on nothing that is on the device, and so is chosen on the host, without a kernel.
        """
        self.step = step
        generator = torch.Generator().manual_seed(100_003 * self.config.seed + step)
        self.noise = torch.rand(1, self.tokens, generator=generator)
        if self.selector.blind:
            return sent(self.choose(self.noise[..., None]), self.device)
        self.noise = sent(self.noise, self.device)
        return self.choose

    def choose(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of these [B, N, C]."""
        height, width = self.grid if self.grid[0] * self.grid[1] == self.tokens else (1, self.tokens)
        context = which.SelectionContext(tokens, self.ages, self.noise, self.count, (height, width), 0, self, last_tokens=self.last)
        scores = which.scored(self.selector, self.config.selector, context, len(self.ages))
        index: torch.Tensor = scores.topk(self.count, dim=-1, sorted=False).indices.sort(dim=-1).values
        self.ages = (self.ages + 1).scatter(1, index.expand(len(self.ages), -1), 0.0)
        if self.last is not None:
            places = index.expand(len(tokens), -1)[..., None].expand(-1, -1, tokens.shape[-1])
            self.last.scatter_(1, places, tokens.gather(1, places))
        return index[0] if len(index) == 1 else index


def sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values of the host on a device; the host does not wait for it."""
    pinned = device.type == "cuda"
    return (values.pin_memory() if pinned else values).to(device, non_blocking=pinned)
