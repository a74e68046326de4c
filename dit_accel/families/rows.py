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

    Attributes:
        blocks: name of the transformer's ModuleList.
        mixers: submodules of a block through which tokens see each other; a block that lacks one is fine.
        tokens: argument of the block that holds the tokens, [B, N, C].
        idle: submodules that work for text alone, and so not at all while no text is computed.
        text: argument that holds a text stream of its own; None if text is part of the tokens or only looked at.
        returns: what the block returns, in order; a block that returns a single tensor returns tokens.
        joint: whether the tokens are a joint sequence of text and image.
        text_last: whether text follows the image in joint sequences, also inside joint attention.
        per_token: arguments that hold a row for every token, [B, N, ...], at least in some pipelines.
        positions: arguments that hold rotary tables with a row for every token; only fresh attention needs them.
        masks: arguments that are costly to prepare for mixers, and so left out while attention is reused.
        refused: arguments that change the order of tokens or who sees whom, and so must be None.
        fused: carries out a mixer that computes more than attention. `fused(mixer, forward, args, kwargs, None)` returns the
            mixer's output and what to remember, [B, N, C]; given the selected rows of that, it returns the output alone.
        example: shapes of the block's further tensors without the batch, for the subset check. A number below 0 stands for as
            many times the width of the tokens, a name for the input width of that submodule; () is an integer.
    """

    blocks: str
    mixers: tuple[str, ...]
    idle: tuple[str, ...] = ()
    tokens: str = "hidden_states"
    text: str | None = None
    returns: tuple[str, ...] = ("tokens",)
    joint: bool = False
    text_last: bool = False
    per_token: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    fused: Fused | None = None
    example: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """What model scope knows of a transformer.

    Attributes:
        transformer: name of its class in diffusers.
        stacks: its blocks, in the order in which they run.
        grid: frames, height and width in tokens, from the transformer's configuration and arguments. Of tokens that are not the
            picture's own (reference images) it says nothing. It may read the device, so ask once a run.
        tokens: how many tokens are not text, where these are neither the rows of the latents nor a full grid.
        head: the last module that treats one token at a time; the output is put together from its rows.
        latents, text, timestep: the arguments of the forward that hold them; text is what tells guidance branches apart.
        batched_guidance: order of the halves of guidance in the batch; empty where pipelines call once for each.
        least_text: text tokens to keep on a partial step though nobody looks at them.
        stale_only: why attention cannot be computed afresh on a partial step; empty if it can.
    """

    transformer: str
    stacks: tuple[Stack, ...]
    grid: Callable[[Any, Given], Grid]
    tokens: Callable[[Any, Given], int] | None = None
    head: str = "proj_out"
    latents: str = "hidden_states"
    text: str = "encoder_hidden_states"
    timestep: str = "timestep"
    batched_guidance: tuple[str, ...] = ()
    least_text: int = 0
    stale_only: str = ""

    def count(self, config: Any, given: Given) -> int:
        """How many tokens can be selected: everything but text."""
        if self.tokens is not None:
            return self.tokens(config, given)
        latents = given[self.latents]
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
