"""Which tokens are computed on a partial step: a score per token, larger first.

A selector of one's own:

    @dit_accel.register_selector("norm")
    def norm(context):
        "Tokens with the largest input first."
        return context.tokens.norm(dim=-1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SelectionContext:
    """What a selector may look at, for one layer on one partial step.

    Attributes:
        tokens: inputs of the layer now, [B, N, C].
        ages: partial steps since each token was computed, [1 or B, N].
        noise: uniform numbers in 0..1, [1, N], drawn afresh for every step and layer and shared by the batch, so that the
            tokens computed for one picture do not depend on the others.
        received: attention that each token received on the last full step, [B, N], where a selector needs it, else None.
        layer: index of the layer within its stream.
        stream: which computation: "image", "text", "joint", "cross-attention" or "feed-forward".
        step: number of the step, from 0.
    """

    tokens: torch.Tensor
    ages: torch.Tensor
    noise: torch.Tensor
    received: torch.Tensor | None
    layer: int
    stream: str
    step: int


Score = Callable[[SelectionContext], torch.Tensor]


@dataclass(frozen=True)
class Selector:
    score: Score
    description: str
    needs_attention: bool


_SELECTORS: dict[str, Selector] = {}


def register_selector(name: str, *, needs_attention: bool = False) -> Callable[[Score], Score]:
    """Decorator that makes a function SelectionContext -> scores [1 or B, N] known by name.

    Args:
        name: what configurations and the command line call it. A name can be taken only once.
        needs_attention: whether full steps must record the attention that each token receives.
    """

    def register(score: Score) -> Score:
        if name in _SELECTORS:
            raise ValueError(f"There is a selector named {name!r} already; choose another name.")
        _SELECTORS[name] = Selector(score, (score.__doc__ or "").strip().split("\n")[0], needs_attention)
        return score

    return register


def get(name: str) -> Selector:
    """The selector of that name; ValueError with the known names if there is none."""
    if name not in _SELECTORS:
        raise ValueError(f"There is no selector {name!r}; there are {', '.join(_SELECTORS)}.")
    return _SELECTORS[name]


def selectors() -> dict[str, str]:
    """Name and one-line description of every selector."""
    return {name: selector.description for name, selector in _SELECTORS.items()}


@register_selector("random")
def random(context: SelectionContext) -> torch.Tensor:
    """Every token with the same chance."""
    return context.noise


@register_selector("attention", needs_attention=True)
def attention(context: SelectionContext) -> torch.Tensor:
    """Tokens that received the most attention on the last full step."""
    if context.received is None:
        raise RuntimeError("No attention was recorded on the last full step; apply the configuration again.")
    return context.received


def total_scores(scores: torch.Tensor, ages: torch.Tensor, age_weight: float, interval: int) -> torch.Tensor:
    """Scores normalised by their L2 norm over the tokens, plus age_weight * age / interval; [1 or B, N]."""
    scores = scores.float() / scores.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return scores + age_weight / interval * ages if age_weight else scores
