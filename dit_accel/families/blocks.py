"""Blocks that compute only some tokens: what an attention processor cannot reach."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.models import attention

from dit_accel import hook
from dit_accel.merge_site import MergeSite
from dit_accel.sites import Cached
from dit_accel.when import Mode

FEED_FORWARDS = ("ff", "ff_context")
HOOK = "dit_accel_block"


@dataclass(frozen=True)
class Blocks:
    """Blocks of one kind at module scope."""

    kind: Any  # their class in diffusers
    compute: Callable[..., Any]  # the forward, token by token: (block, sites, merging, arguments by name)
    streams: tuple[str, ...]  # of the token-wise computations
    attentions: Mapping[str, str | None]  # by name, the stream of which it computes tokens; None: whole


class BlockHook(ModelHook):  # type: ignore[misc]
    """Computes a block token by token where its sites say so, and otherwise leaves it to diffusers."""

    def __init__(self, blocks: Blocks, sites: tuple[Any, ...], merging: MergeSite) -> None:
        super().__init__()
        self.compute, self.sites, self.merging = blocks.compute, sites, merging
        self.names = tuple(inspect.signature(blocks.kind.forward).parameters)[1:]

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.merging.see(given["hidden_states"])
        if self.sites[0].mode is Mode.PLAIN and not self.merging.merges_mlp:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.compute(module, self.sites, self.merging, given)


def attach(block: Any, blocks: Blocks, sites: tuple[Any, ...], merging: MergeSite, name: str) -> None:
    """Let the family's function stand in for a block's forward; TypeError if anything in it is not what diffusers made."""
    parts = [(getattr(block, ff), f"{name}.{ff}", attention.FeedForward) for ff in FEED_FORWARDS if hasattr(block, ff)]
    for part, its_name, expected in [(block, name, blocks.kind), *parts]:
        if type(part) is not expected:
            raise TypeError(
                f"{its_name} is a {type(part).__name__}, not diffusers' {expected.__name__}, "
                "so it cannot be computed token by token."
            )
    if "forward" in vars(block) and not (hasattr(block, "_diffusers_hook") or hasattr(block, "_hf_hook")):
        raise TypeError(f"{name}.forward was replaced by something unknown. Call dit_accel.apply before that.")
    hook.register(block, BlockHook(blocks, sites, merging), HOOK)


def detach(block: Any) -> None:
    """The inverse of `attach`; does nothing for other blocks."""
    hook.unregister(block, HOOK)


def add_gated(site: Cached, hidden: torch.Tensor, gate: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """hidden + gate * features with hidden and features [B, N, C] and the gate [B, 1, C].

    A partial step reads and writes the memory only once; a full one rounds as diffusers does.
    """
    return torch.addcmul(hidden, gate, features) if site.mode is Mode.PARTIAL else hidden + gate * features
