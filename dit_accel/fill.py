"""How tokens that are not computed get their features, and how computed ones get in and out of the sequence."""

from __future__ import annotations

import torch


def take(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` [1 or B, k] of tokens [B, N, C]; one index row serves the whole batch. Returns [B, k, C]."""
    if index.shape[0] == 1:
        return tokens.index_select(1, index[0])
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def reuse(cached: torch.Tensor, index: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
    """The cached features [B, N, C] with the rows `index` [1 or B, k] replaced by computed [B, k, C]."""
    if index.shape[0] == 1:
        return cached.index_copy(1, index[0], computed)
    return cached.scatter(1, index[..., None].expand_as(computed), computed)
