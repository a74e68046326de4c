"""A family of transformers as data: where its tokens are, which modules mix them, what comes out in which order.

Everything in a diffusion transformer treats one token at a time, except for its mixers (attention). A description that names the
mixers is therefore enough to run the stock blocks on some of the tokens: see packed.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Given = Mapping[str, Any]  # arguments of the transformer's forward by name
Grid = tuple[int, int, int]  # frames, height, width, in tokens
Fused = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any], "torch.Tensor | None"], Any]


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind, run one after the other.

    `fused(mixer, forward, args, kwargs, None)` carries out a mixer that computes more than attention, and returns its output and
    what to remember, [B, N, C]; given the selected rows of that in place of None, it returns the output alone.
    """

    blocks: str  # name of the transformer's ModuleList
    mixers: tuple[str, ...]  # submodules through which tokens see each other; a block may lack some
    idle: tuple[str, ...] = ()  # submodules that work for text alone: not at all while no text is computed
    tokens: str = "hidden_states"  # argument of the block that holds the tokens, [B, N, C]
    text: str | None = None  # argument that holds a text stream; None if text is among the tokens or only looked at
    returns: tuple[str, ...] = ("tokens",)  # what the block returns, in order; a single tensor is tokens
    joint: bool = False  # whether the tokens are a joint sequence of text and image
    text_last: bool = False  # whether text follows the image in joint sequences, also inside joint attention
    per_token: tuple[str, ...] = ()  # arguments that may hold a row for every token, [B, N, ...]
    positions: tuple[str, ...] = ()  # rotary tables with a row for every token, for fresh attention
    masks: tuple[str, ...] = ()  # costly to prepare for mixers: left out while attention is reused
    refused: tuple[str, ...] = ()  # change the order of tokens or who sees whom: must be None
    fused: Fused | None = None
    # Shapes of further tensors for the subset check, without the batch: below 0, so many times the width; a name, that submodule's
    # input width; () is an integer.
    example: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """What model scope knows of a transformer.

    `grid` gives frames, height and width in tokens, from the transformer's configuration and arguments, without tokens that are not
    the picture's own (reference images). It may read the device, so ask once a run.
    """

    transformer: str  # name of its class in diffusers
    stacks: tuple[Stack, ...]  # its blocks, in the order in which they run
    grid: Callable[[Any, Given], Grid]
    tokens: Callable[[Any, Given], int] | None = None  # how many are not text, if neither the rows of the latents nor a full grid
    head: str = "proj_out"  # the last module that treats one token at a time: the output is made of its rows
    rotary: str = ""  # submodule that makes rotary tables, which nobody looks at while attention is reused
    batched_guidance: tuple[str, ...] = ()  # order of the halves in the batch; empty: one call for each
    least_text: int = 0  # text tokens to keep on a partial step though nobody looks at them
    stale_only: str = ""  # why attention cannot be computed afresh; empty if it can

    def count(self, config: Any, given: Given) -> int:
        """How many tokens can be selected: everything but text."""
        if self.tokens is not None:
            return self.tokens(config, given)
        latents = given["hidden_states"]
        return int(latents.shape[1]) if latents.ndim == 3 else math.prod(self.grid(config, given))


UNCONDITIONAL_FIRST = ("uncond", "cond")
CONDITIONAL_FIRST = ("cond", "uncond")


def picture_grid(config: Any, given: Given) -> Grid:
    """Of latents [B, C, H, W] in square patches."""
    height, width = given["hidden_states"].shape[-2:]
    return 1, height // config.patch_size, width // config.patch_size


def ids_grid(name: str) -> Callable[[Any, Given], Grid]:
    """From position ids [N, (time, height, width, ...)]; reference images have another time. A flat grid if they are no grid."""

    def grid(config: Any, given: Given) -> Grid:
        ids = given[name]
        ids = (ids[0] if ids.ndim == 3 else ids)[-given["hidden_states"].shape[1] :]
        if ids.is_meta:
            return 1, 1, len(ids)
        picture = ids[ids[:, 0] == ids[0, 0]][:, 1:3].cpu()
        height, width = (int(extent) + 1 for extent in picture.amax(0) - picture.amin(0))
        return (1, height, width) if height * width == len(picture) else (1, 1, len(ids))

    return grid
