"""How tokens that are not computed get their features, and how computed ones get in and out of the sequence.

Features are tensors [B, N, C]; joint attention has a tuple of them, one for each stream. What is remembered of a computation
is a tuple of terms: the features of the last full step, then their derivatives by the step. Reusing features is the expansion
of order 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def take(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` [1 or B, k] of tokens [B, N, C]; one index row serves the whole batch. Returns [B, k, C]."""
    if index.shape[0] == 1:
        return tokens.index_select(1, index[0])
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def put(features: torch.Tensor, index: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
    """Write computed [B, k, C] into the rows `index` [1 or B, k] of features [B, N, C], in place; returns them."""
    target, source, index = features, narrow(computed, features.dtype, features.device), index.to(features.device)
    if features.dtype.itemsize == 1:  # torch moves float8 about as bytes only
        target, source = features.view(torch.uint8), source.view(torch.uint8)
    if index.shape[0] == 1:
        target.index_copy_(1, index[0], source)
    else:
        target.scatter_(1, index[..., None].expand_as(source), source)
    return features


def narrow(features: torch.Tensor, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """To a type and a device; numbers beyond the type's range become its largest."""
    most = torch.finfo(dtype).max
    if most >= torch.finfo(features.dtype).max:
        return features.to(device, dtype)
    if dtype.itemsize == 1:  # float8 has no infinity that could be clamped afterwards
        return features.clamp(-most, most).to(device, dtype)
    return features.to(device, dtype).clamp_(-most, most)  # before, bfloat16 would round float16's largest up


def expansion(features: Any, past: tuple[Any, ...], distance: torch.Tensor | None) -> tuple[Any, ...]:
    """The terms after a full step: features and one derivative for every term of the past, by backward differences.

    Args:
        features: of this full step; past: the terms after the full step before, () if there was none.
        distance: steps since then, a tensor of one number.

    Source: TaylorSeer, arXiv 2503.06923, section 3.
    """
    terms = [features]
    for before in past:
        terms.append(map_features(lambda now, then: (now - then.to(now)) / distance, terms[-1], before))
    return tuple(terms)


def extrapolate(terms: tuple[Any, ...], weights: list[torch.Tensor], like: torch.Tensor) -> Any:
    """Features some steps after the last full step: sum of terms[i] * weights[i], in the type and on the device of `like`.

    Args:
        weights: `taylor_weights` of the distance, from order 1 on, as tensors of one number.
    """
    features = map_features(lambda t: t.to(like), terms[0])
    for term, weight in zip(terms[1:], weights, strict=False):
        features = map_features(lambda f, t, weight=weight: torch.addcmul(f, t.to(like), weight), features, term)
    return features


def taylor_weights(distance: float, order: int) -> list[float]:
    """distance^i / i! for i from 1 to order."""
    return [distance**i / math.factorial(i) for i in range(1, order + 1)]


def map_features(function: Callable[..., torch.Tensor], *features: Any) -> Any:
    """A function of tensors, applied to features that may be tuples of them."""
    if isinstance(features[0], tuple):
        return tuple(function(*parts) for parts in zip(*features, strict=True))
    return function(*features)


def size_in_bytes(features: Any) -> int:
    """Of a tensor, a tuple of what this function takes, or None."""
    if isinstance(features, tuple):
        return sum(size_in_bytes(part) for part in features)
    return features.numel() * features.element_size() if features is not None else 0
