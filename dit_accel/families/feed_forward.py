"""A feed-forward that computes only some tokens: what an attention processor cannot reach."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention

from dit_accel.site import Site


class FeedForward(attention.FeedForward):  # type: ignore[misc]  # the name is kept: diffusers and PEFT match modules by it
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        site: Site | None = self.__dict__.get("_dit_accel_site")
        base = attention.FeedForward.forward  # not super(): a wrapper put around this method may outlive the class here
        if site is None:
            return base(self, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        output: torch.Tensor = site(hidden_states, lambda tokens, take: base(self, tokens, *args, **kwargs))
        return output


def attach(module: Any, site: Site, name: str) -> None:
    """Turn diffusers' feed-forward into the token-wise one, in place; weights and state-dict keys stay.

    Raises:
        TypeError: if it is not diffusers' own class, whose forward is known to work token by token.
    """
    if type(module) is not attention.FeedForward:
        raise TypeError(
            f"{name} is a {type(module).__name__}, not diffusers' FeedForward, so it cannot be computed token by token."
        )
    refuse_wrapped(module, name)
    module.__class__ = FeedForward
    module._dit_accel_site = site


def refuse_wrapped(module: Any, name: str) -> None:
    """TypeError for a module whose forward was replaced on the instance: a class's forward would never be called."""
    if "forward" in vars(module):
        raise TypeError(f"{name}.forward is wrapped, by offloading for example. Call dit_accel.apply before enabling it.")


def detach(module: Any) -> None:
    if isinstance(module, FeedForward):
        del module._dit_accel_site
        module.__class__ = attention.FeedForward
