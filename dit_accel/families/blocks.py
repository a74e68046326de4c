"""Blocks that compute only some tokens: what an attention processor cannot reach."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.models import attention

from dit_accel import hook
from dit_accel.merge_site import MergeSite
from dit_accel.site import Site
from dit_accel.when import Mode

FEED_FORWARDS = ("ff", "ff_context")
Compute = Callable[..., Any]


HOOK = "dit_accel_block"


class BlockHook(ModelHook):  # type: ignore[misc]
    """Computes a block token by token where its sites say so, and otherwise leaves it to diffusers.

    Args:
        compute: called as compute(block, sites, merging, arguments of the block's forward by name).
        signature: of the block's own forward, whose first argument is the image tokens [B, N, C].
    """

    def __init__(self, compute: Compute, signature: tuple[str, ...], sites: tuple[Site, ...], merging: MergeSite) -> None:
        super().__init__()
        self.compute, self.signature, self.sites, self.merging = compute, signature, sites, merging

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.signature, args, strict=False)), **kwargs}
        self.merging.see(given["hidden_states"])
        if self.sites[0].mode is Mode.PLAIN and not self.merging.merges_mlp:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.compute(module, self.sites, self.merging, **given)


def attach(block: Any, kind: Any, compute: Compute, sites: tuple[Site, ...], merging: MergeSite, name: str) -> None:
    """Let `compute` stand in for the forward of a block, whose class is `kind`.

    Raises:
        TypeError: if it is not diffusers' own class, or its feed-forward is not, which is known to work token by token; or if
            something unknown has replaced its forward.
    """
    parts: list[tuple[Any, str, Any]] = [(block, name, kind)]
    parts += [(getattr(block, ff), f"{name}.{ff}", attention.FeedForward) for ff in FEED_FORWARDS if hasattr(block, ff)]
    for part, its_name, expected in parts:
        if type(part) is not expected:
            raise TypeError(
                f"{its_name} is a {type(part).__name__}, not diffusers' {expected.__name__}, "
                "so it cannot be computed token by token."
            )
    if "forward" in vars(block) and not (hasattr(block, "_diffusers_hook") or hasattr(block, "_hf_hook")):
        raise TypeError(f"{name}.forward was replaced by something unknown. Call dit_accel.apply before that.")
    signature = tuple(inspect.signature(kind.forward).parameters)[1:]
    hook.register(block, BlockHook(compute, signature, sites, merging), HOOK)


def detach(block: Any) -> None:
    """The inverse of `attach`; does nothing for other blocks."""
    if HOOK in getattr(getattr(block, "_diffusers_hook", None), "hooks", {}):
        hook.unregister(block, HOOK)


def add_gated(site: Site, hidden: torch.Tensor, gate: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """hidden + gate * features with hidden and features [B, N, C] and the gate [B, 1, C].

    A partial step reads and writes the memory only once; a full one rounds as diffusers does.
    """
    return torch.addcmul(hidden, gate, features) if site.mode is Mode.PARTIAL else hidden + gate * features
