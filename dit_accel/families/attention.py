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


class Listening:
    """An attention module as its processor sees it, which keeps what the projections return: observing costs none of its own.

    Args:
        attn: the module.
        known: projections by name that are not to be computed again.
    """

    SEPARATE = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))  # of the image, of the text
    FUSED = ("to_qkv", "to_added_qkv", "to_kv")

    def __init__(self, attn: Any, known: dict[str, torch.Tensor] | None = None) -> None:
        self.attn, self.heard = attn, dict(known or {})

    def __getattr__(self, name: str) -> Any:
        part = getattr(self.attn, name)
        if name not in self.FUSED and not any(name in names for names in self.SEPARATE):
            return part

        def project(*args: Any, **kwargs: Any) -> Any:
            if name not in self.heard:
                self.heard[name] = part(*args, **kwargs)
            return self.heard[name]

        return project

    def projection(self, which: int, text: bool = False) -> torch.Tensor:
        """Query (0), key (1) or value (2) of all tokens of the image or of the text, [B, N, H, D], before norms.

        Raises:
            RuntimeError: if the processor never asked for it.
        """
        if (name := self.SEPARATE[text][which]) in self.heard:
            projected = self.heard[name]
        elif (name := self.FUSED[text]) in self.heard:
            projected = self.heard[name].chunk(3, dim=-1)[which]
        elif "to_kv" in self.heard and which > 0:
            projected = self.heard["to_kv"].chunk(2, dim=-1)[which - 1]
        else:
            raise RuntimeError(
                f"{type(self.attn.processor.inner).__name__} does not use diffusers' projections, so there is nothing to "
                "observe for this selector; choose another one, such as random."
            )
        heads: torch.Tensor = projected.unflatten(-1, (self.attn.heads, -1))
        return heads


def key_and_value_observations(project: Callable[[int], torch.Tensor], needs: frozenset[str]) -> dict[str, torch.Tensor]:
    """What is asked of keys and values alone; project(1) gives the keys and project(2) the values, [B, N, H, D]."""
    seen = {}
    for which, name in ((1, "key"), (2, "value")):
        if needs & {f"{name}s", f"{name}_norms"}:
            heads = project(which)
            if f"{name}s" in needs:
                seen[f"{name}s"] = heads.contiguous()  # of fused projections, this part only
            if f"{name}_norms" in needs:
                seen[f"{name}_norms"] = heads.float().norm(dim=-1).mean(dim=-1)
    return seen
