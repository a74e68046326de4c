"""Blocks that compute only some tokens: what an attention processor cannot reach."""

from __future__ import annotations

import types
from typing import Any

import torch
from diffusers.models import attention

from dit_accel.merge_site import MergeSite
from dit_accel.site import Site
from dit_accel.when import Mode

FEED_FORWARDS = ("ff", "ff_context")


def attach(block: Any, kind: type, sites: tuple[Site, ...], merging: MergeSite, name: str) -> None:
    """Turn diffusers' block into the token-wise `kind`, a subclass of its class, in place; weights and their names stay.

    Raises:
        TypeError: if it is not diffusers' own class, or its feed-forward is not, which is known to work token by token; or if
            something unknown has replaced its forward.
    """
    parts: list[tuple[Any, str, Any]] = [(block, name, kind.__base__)]
    parts += [(getattr(block, ff), f"{name}.{ff}", attention.FeedForward) for ff in FEED_FORWARDS if hasattr(block, ff)]
    for part, its_name, expected in parts:
        if type(part) is not expected:
            raise TypeError(
                f"{its_name} is a {type(part).__name__}, not diffusers' {expected.__name__}, "
                "so it cannot be computed token by token."
            )
    if not _become(block, kind):
        raise TypeError(f"{name}.forward was replaced by something unknown. Call dit_accel.apply before that.")
    block._dit_accel = sites, merging


def attached(block: Any, tokens: torch.Tensor) -> tuple[tuple[Any, ...], MergeSite] | None:
    """What `attach` was given, or None where diffusers' own forward is to do all the work.

    Args:
        block: ours.
        tokens: the image tokens that enter it, [B, N, C], for merging to match.
    """
    sites, merging = vars(block).get("_dit_accel", (None, None))
    if sites is None:
        return None
    merging.see(tokens)
    return (sites, merging) if sites[0].mode is not Mode.PLAIN or merging.merges_mlp else None


def detach(block: Any) -> None:
    """The inverse of `attach`; does nothing for other blocks."""
    if "_dit_accel" in vars(block):
        del block._dit_accel
        if not _become(block, base := type(block).__base__):
            block.__class__ = base  # something wraps the forward meanwhile, which without sites is that of the base


def _become(block: Any, kind: Any) -> bool:
    """Change the class, also where hooks keep the old one's forward: offloading's, of accelerate and of diffusers.

    False, with nothing changed, where the instance's forward cannot be traced to its class.
    """
    references = getattr(getattr(block, "_diffusers_hook", None), "_fn_refs", [])
    holders = [(block, "forward"), (block, "_old_forward")]
    holders += [(reference, name) for reference in references for name in ("forward", "original_forward")]
    own = [(h, name) for h, name in holders if getattr(vars(h).get(name), "__func__", None) is type(block).forward]
    if "forward" in vars(block) and not own:
        return False
    block.__class__ = kind
    for holder, name in own:
        setattr(holder, name, types.MethodType(kind.forward, block))
    return True


def add_gated(site: Site, hidden: torch.Tensor, gate: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """hidden + gate * features with hidden and features [B, N, C] and the gate [B, 1, C].

    A partial step reads and writes the memory only once; a full one rounds as diffusers does.
    """
    return torch.addcmul(hidden, gate, features) if site.mode is Mode.PARTIAL else hidden + gate * features
