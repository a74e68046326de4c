"""One cached computation of the model, and what is remembered of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from dit_accel import fill, when, which
from dit_accel.config import TokenCacheConfig
from dit_accel.when import Mode

Take = Callable[[torch.Tensor], torch.Tensor]


class Memory:
    """What one guidance branch remembers of one site."""

    def __init__(self) -> None:
        self.terms: tuple[Any, ...] = ()  # features before the gate, [B, N, C] or a tuple of them; then their derivatives
        self.past: tuple[Any, ...] = ()  # on a full step: the terms before it that the new ones are made from
        self.ages: torch.Tensor | None = None  # [1 or B, N]
        self.observed: dict[str, torch.Tensor] = {}  # what the selector needs, by the names of which.OBSERVATIONS
        self.text: dict[str, torch.Tensor] = {}  # projections of the text in a cross-attention, by the names of their layers

    def begin_full(self, order: int) -> None:
        """Forget all that a full step does not need. It is then the same computation every time, one compiled graph."""
        self.terms, self.past, self.observed, self.text = (), self.terms[:order], {}, {}

    def bytes(self) -> int:
        return fill.size_in_bytes((self.terms, self.past, self.ages, *self.observed.values(), *self.text.values()))


class Site:
    """One cached computation of the model: an attention, a feed-forward, the rear half of a single block.

    The transformer's pre-hook binds everything that changes from call to call (`bind`); blocks and processors only call.
    """

    def __init__(self, config: TokenCacheConfig, layer: int, stream: str) -> None:
        self.config, self.layer, self.stream = config, layer, stream
        self.selector = which.get(config.selector)
        self.order = config.forecast_order if config.fill == "forecast" else 0
        self.release()

    def release(self) -> None:
        """Forget everything and compute as if nothing had been applied."""
        self.mode, self.memory = Mode.PLAIN, Memory()
        self.step = self.count = self.text = 0
        self.grid, self.halves = (1, 1), False
        self.noise: torch.Tensor | None = None  # [1, N]
        self.distance: torch.Tensor | None = None  # steps since the last full step
        self.weights: list[torch.Tensor] = []  # of the derivatives
        self.chosen: torch.Tensor | None = None  # [1, k], where this step's selection was made before the layers are called
        self.selected: torch.Tensor | None = None  # [1 or B, k], the last selection

    @property
    def tokens(self) -> int:
        """Tokens of this computation; 0 if nothing is remembered of it, or if it is reused whole."""
        return self.memory.terms[0].shape[1] if self.memory.terms and self.stream != "attention" else 0

    def share(self, place: when.Place) -> float:
        """Share of the tokens to compute, before it is clamped."""
        rule = self.config.ratio_schedule
        return (1 - self.config.cache_ratio) * (rule if callable(rule) else when.RATIO_SCHEDULES[rule])(place)

    def expect(self, share: float, text_length: int) -> None:
        """Work out how many tokens this partial step computes; only the joint sequence starts with text."""
        self.text, tokens = text_length if self.stream == "joint" else 0, self.tokens
        if self.config.text_tokens == "select":
            self.count = when.tokens_to_compute(share, tokens)
        elif self.stream == "text":
            self.count = tokens if self.config.text_tokens == "full" else 0
        else:
            self.count = when.tokens_to_compute(share, max(0, tokens - self.text))
            self.count += self.text if self.config.text_tokens == "full" else 0

    def recall(self, like: torch.Tensor) -> Any:
        """The remembered outputs of all tokens, in the type of `like`, where a partial step needs nothing else; or None."""
        if self.mode is not Mode.PARTIAL or not self.memory.terms:
            return None
        return fill.extrapolate(self.memory.terms, self.weights, like)

    def __call__(self, tokens: torch.Tensor, compute: Callable[[torch.Tensor, Take], Any]) -> Any:
        """All outputs of `compute`, of which a partial step computes only some.

        Args:
            tokens: [B, N, C].
            compute: called with the tokens to compute and a function that takes the same rows out of another [B, N, C].
        """
        memory = self.memory
        if self.mode is Mode.PLAIN:
            return compute(tokens, _all)
        if self.mode is Mode.FULL or not memory.terms:
            return self._remember(tokens, compute(tokens, _all))
        if self.stream != "attention" and self.count >= tokens.shape[1]:
            output = compute(tokens, _all)
            self._computed_all(tokens)
            self.selected = torch.arange(tokens.shape[1], device=tokens.device)[None]
            if self.order == 0:
                memory.terms = (self._kept(output),)
            return output
        if self.count == 0 or self.stream == "attention":
            if self.stream != "attention":
                self.selected = torch.empty(1, 0, dtype=torch.long, device=tokens.device)
                assert memory.ages is not None
                memory.ages = memory.ages + 1
            return fill.extrapolate(memory.terms, self.weights, tokens)
        index = self._select(tokens)
        computed = compute(fill.take(tokens, index), lambda other: fill.take(other, index))
        if self.order == 0:
            fill.put(memory.terms[0], index, computed)
            return fill.extrapolate(memory.terms, [], tokens)
        features = fill.extrapolate(memory.terms, self.weights, tokens)
        return fill.put(features.clone() if features is memory.terms[0] else features, index, computed)

    def _remember(self, tokens: torch.Tensor, output: Any) -> Any:
        memory = self.memory
        memory.terms = tuple(self._kept(term) for term in fill.expansion(output, memory.past, self.distance))
        memory.past = ()
        if self.stream != "attention":
            self._computed_all(tokens)
        return output

    def _computed_all(self, tokens: torch.Tensor) -> None:
        rows = tokens.shape[0] if self.selector.per_picture else 1
        self.memory.ages = torch.zeros(rows, tokens.shape[1], device=tokens.device)
        if "last_tokens" in self.selector.needs:
            self.memory.observed["last_tokens"] = tokens.clone()

    def _kept(self, features: Any) -> Any:
        """As they are stored."""
        dtype, device = self.config.cache_dtype, self.config.cache_device
        if dtype is None and device is None:
            return features
        return fill.map_features(lambda t: fill.narrow(t, getattr(torch, dtype or "", t.dtype), device or t.device), features)

    def _select(self, tokens: torch.Tensor) -> torch.Tensor:
        """Index [1 or B, count] of the tokens to compute; the ages move on."""
        memory = self.memory
        assert memory.ages is not None and self.noise is not None
        index = self.chosen
        if index is None:
            index = self._choose(tokens, memory.ages, self.noise)
            memory.ages = _aged(memory.ages, index)
        if "last_tokens" in memory.observed:
            fill.put(memory.observed["last_tokens"], index, fill.take(tokens, index))
        self.selected = index
        return index

    def _choose(self, tokens: torch.Tensor, ages: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Index [1 or B, count] of the tokens to compute, from tokens [B, N, C], ages and noise [1 or B, N]."""
        config = self.config
        start = self.text if config.text_tokens != "select" else 0  # what lies before is computed always or never
        always = start if config.text_tokens == "full" else 0
        if self.count == always:
            return torch.arange(always, device=tokens.device)[None].expand(len(noise), -1)
        context = which.SelectionContext(
            tokens=tokens[:, start:],
            ages=ages[:, start:],
            noise=noise[:, start:],
            count=self.count - always,
            grid=self.grid,
            text=self.text - start,
            where=self,
            **{name: seen[:, start:] for name, seen in self.memory.observed.items()},
        )
        scores = which.scored(self.selector, config.selector, context, len(tokens) if self.selector.per_picture else len(noise))
        bonus = config.spatial_bonus if self.stream != "text" else 0.0
        averaged = self.halves and self.selector.per_picture and len(scores) > 1
        if config.age_weight or bonus or averaged:  # otherwise only their order counts
            scores = which.total_scores(
                scores, context.ages, config.age_weight, config.interval, bonus, self.grid, config.spatial_tile, context.text
            )
        if averaged:
            scores = scores.unflatten(0, (2, -1)).mean(dim=0)
        index = scores.topk(context.count, dim=-1, sorted=False).indices + start
        if always:
            index = torch.cat([torch.arange(always, device=index.device).expand(len(index), -1), index], dim=1)
        return index.repeat(2, 1) if averaged and len(index) > 1 else index


def choose_together(sites: Iterable[Site]) -> None:
    """Choose in one go what sites compute whose selector looks at no tokens: the same few operations for any number of layers."""
    alike: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        if site.selector.blind and 0 < site.count < site.tokens:
            alike.setdefault((site.stream == "text", site.tokens, site.count, site.text), []).append(site)
    for group in alike.values():
        noise = torch.cat([site.noise for site in group if site.noise is not None])
        ages = torch.cat([site.memory.ages for site in group if site.memory.ages is not None])
        index = group[0]._choose(noise[..., None], ages, noise)
        for site, chosen, aged in zip(group, index.split(1), _aged(ages, index).split(1), strict=True):
            site.chosen, site.memory.ages = chosen, aged


def _aged(ages: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Ages [1 or B, N] after these tokens were computed."""
    return (ages + 1).scatter(1, index.expand(len(ages), -1), 0.0)


def _all(tokens: torch.Tensor) -> torch.Tensor:
    return tokens
