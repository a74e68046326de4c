"""Which tokens a packed step computes: one selection for all layers."""

from typing import Any

import torch

from dit_accel import which
from dit_accel.config import OutputCacheConfig, TokenCacheConfig
from dit_accel.sites import Now, Site
from dit_accel.steps import Index, Memory
from dit_accel.store import sent

OBSERVED = frozenset({"last_tokens", "attention", "key_norms", "value_norms"})  # at model scope


def refuse_unobserved(selector: Any, where: str) -> frozenset[str]:
    """What is to be observed of attention for this selector; ValueError if it needs anything that is not observed there."""
    needs = which.get(selector).needs
    if missing := sorted(needs - OBSERVED):
        fitting = ", ".join(one for one in which.selectors() if which.get(one).needs <= OBSERVED)
        raise ValueError(f"The selector {selector!r} needs {', '.join(missing)}, not observed {where}; choose one of {fitting}.")
    return needs - {"last_tokens"}


class Selection:
    """The selections of one guidance branch between two full steps.

    Args:
        tokens: how many there are; count: how many are computed; grid: rows and columns in which they lie.
        memory: of the branch, which knows what entered the blocks at the full step.
    """

    def __init__(self, config: OutputCacheConfig, tokens: int, count: int, grid: tuple[int, int], memory: Memory) -> None:
        self.seed, self.tokens, self.grid = config.seed, tokens, grid if grid[0] * grid[1] == tokens else (1, tokens)
        ranking = TokenCacheConfig(selector=config.selector, age_weight=config.age_weight, interval=config.interval)
        self.site = site = Site(ranking, 0, "image")
        entered: Any = memory.features["entered"][0]
        self.device = entered.device  # where tokens are; a blind selector works on the host
        rows, where = len(entered) if site.selector.per_picture else 1, "cpu" if site.selector.blind else self.device
        site.memory.observed = dict(memory.observed)
        site.count, site.memory.ages = count, torch.zeros(rows, tokens, device=where)
        if "last_tokens" in site.selector.needs:
            site.memory.observed["last_tokens"] = entered.clone()

    def at(self, step: int) -> Index:
        """Which tokens to compute on this step, an ascending index [k] or [B, k]; or what chooses them as they enter the blocks.

        What a blind selector chooses depends on nothing that is on the device, and so is chosen on the host, without a kernel.
        """
        noise = torch.rand(1, self.tokens, generator=torch.Generator().manual_seed(100_003 * self.seed + step))
        self.site.now, self.site.noise = Now(step, self.grid), noise
        if self.site.selector.blind:
            return sent(self.choose(noise[..., None]), self.device)
        self.site.noise = sent(noise, self.device)
        return self.choose

    def choose(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of these [B, N, C]."""
        index: torch.Tensor = self.site.select(tokens).sort(dim=-1).values
        return index[0] if len(index) == 1 else index
