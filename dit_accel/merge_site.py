"""Merging in one layer of the model: what its attention and its feed-forward share."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dit_accel import merging
from dit_accel.config import TokenMergeConfig


class Shared:
    """One matching for all the layers and steps that use it."""

    matching: Any = None


class MergeSite:
    """One layer's merging. Where text, or a reference picture, shares a sequence, the image's tokens are those from `start` on."""

    def __init__(self, config: TokenMergeConfig) -> None:
        self.config = config
        self.bind()

    def release(self) -> None:
        """Merge nothing."""
        self.bind()

    def bind(
        self, shared: Any = None, count: int = 0, tokens: int = 0, text: int = 0, halves: bool = False, into: Any = None
    ) -> None:
        """Merge `count` of the image's tokens, behind so many of text; by a new matching if there are destinations `into`, [D].

        By default nothing is merged. `halves`: guidance is in one batch.
        """
        self.shared, self.count, self.tokens, self.text = shared or Shared(), count, tokens, text
        self.halves, self.into = halves, into

    @property
    def merges_mlp(self) -> bool:
        return self.count > 0 and self.config.merge_mlp

    def see(self, tokens: torch.Tensor) -> None:
        """Match the tokens that enter the layer, [B, N, C] with the image in front, if a matching is to be made here."""
        if not self.count or self.into is None:
            return
        into, self.into = self.into, None
        tokens = tokens[:, : self.tokens]
        if self.halves:  # one matching for both, by the mean of their similarities
            tokens = torch.cat(F.normalize(tokens.float(), dim=-1).chunk(2), dim=-1)
        matching = merging.match(tokens, into, self.count)
        if self.halves:
            matching = merging.Matching(**{name: part.repeat(2, 1) for name, part in vars(matching).items()})
        self.shared.matching = matching

    def merge(self, tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Image tokens merged, the others kept: [B, S, C] -> [B, S - count, C]."""
        return self._within(tokens, start, self.tokens, merging.merge)

    def unmerge(self, merged: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The inverse of `merge` in shape; every token gets what its group has."""
        return self._within(merged, start, self.tokens - self.count, merging.unmerge)

    def _within(
        self, tokens: torch.Tensor, start: int, length: int, change: Callable[[torch.Tensor, merging.Matching], torch.Tensor]
    ) -> torch.Tensor:
        image = change(tokens[:, start : start + length], self.shared.matching)
        if length == tokens.shape[1]:
            return image
        return torch.cat([tokens[:, :start], image, tokens[:, start + length :]], dim=1)

    def mlp(self, compute: Callable[..., torch.Tensor], *tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
        """What `compute` makes of tokens [B, S, C], by way of merged ones if so asked."""
        if not self.merges_mlp:
            return compute(*tokens)
        return self.unmerge(compute(*(self.merge(part, start) for part in tokens)), start)

    def places(self, start: int, length: int) -> torch.Tensor:
        """The token whose place each merged token takes, in a whole sequence of this length: [B, length - count]."""
        every = torch.arange(length, device=self.shared.matching.places.device).expand(len(self.shared.matching.places), -1)
        return torch.cat([every[:, :start], self.shared.matching.places + start, every[:, start + self.tokens :]], dim=1)

    def mask(
        self, mask: torch.Tensor | None, like: torch.Tensor, start: int, length: int, queries: bool, keys: bool = True
    ) -> torch.Tensor | None:
        """The attention mask for merged tokens, with the sizes of groups in it if attention shall be proportional.

        A merged token is masked as the mean of its tokens; in a boolean mask it is masked as soon as one of them is.

        Args:
            mask: boolean or added to the scores, [B or 1, ..., Q or 1, S].
            like: a tensor of the batch, type and device of the queries.
            length: S, of the whole sequence.
            queries, keys: whether they are merged.

        Returns:
            [B, ..., Q' or 1, S'].
        """
        if mask is not None:
            boolean, mask = mask.dtype is torch.bool, mask.to(like.dtype).expand(len(like), *mask.shape[1:])
            for axis, merged in ((-1, keys), (-2, queries)):
                if merged and mask.shape[axis] == length:
                    rows = mask.movedim(axis, 1)
                    mask = self.merge(rows.flatten(2), start).unflatten(2, rows.shape[2:]).movedim(1, axis)
            mask = mask >= 1 if boolean else mask
        if not (keys and self.config.proportional_attention):
            return mask
        sizes = self.shared.matching.sizes.log()
        weights = F.pad(sizes, (start, length - start - self.tokens)).to(like.dtype)[:, None]
        if mask is None:
            return weights
        weights = weights.reshape(len(weights), *[1] * (mask.ndim - 2), -1)
        return torch.where(mask, weights, float("-inf")) if mask.dtype is torch.bool else mask + weights
