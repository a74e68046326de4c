"""What the attention processors of all families share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from dit_accel.schedule import Mode
from dit_accel.site import Site


class TokenCacheAttnProcessor:
    """Computes attention through the processor it wraps and remembers the output.

    Args:
        inner: the processor that was there.
        site: where the output is remembered; without one the inner processor is called and nothing else.
        scored: the sites that select tokens by what is observed here.
    """

    default_inner: type

    def __init__(self, inner: Any = None, site: Site | None = None, scored: tuple[Site, ...] = ()) -> None:
        self.inner, self.site, self.scored = inner or self.default_inner(), site, scored
        self.accepted = frozenset(inspect.signature(self.inner.__call__).parameters)

    @property
    def observing(self) -> frozenset[str]:
        """What has to be observed in this call."""
        if self.site is None or self.site.mode is not Mode.FULL or not self.scored:
            return frozenset()
        return self.scored[0].selector.needs - {"last_tokens"}

    # diffusers sets the attention backend on the processor it finds.
    @property
    def _attention_backend(self) -> Any:
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.inner._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.inner._parallel_config = config


def key_and_value_observations(project: Callable[[int], torch.Tensor], needs: frozenset[str]) -> dict[str, torch.Tensor]:
    """What is asked of keys and values alone; project(1) gives the keys and project(2) the values, [B, N, H, D]."""
    seen = {}
    for which, name in ((1, "key"), (2, "value")):
        if needs & {f"{name}s", f"{name}_norms"}:
            heads = project(which)
            if f"{name}s" in needs:
                seen[f"{name}s"] = heads
            if f"{name}_norms" in needs:
                seen[f"{name}_norms"] = heads.float().norm(dim=-1).mean(dim=-1)
    return seen
