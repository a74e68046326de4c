"""One cached computation of the model, and what is remembered of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_accel import store, which
from dit_accel.config import TokenCacheConfig
from dit_accel.when import Mode

Take = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Memory:
    """What one guidance branch remembers of one computation."""

    past: tuple[Any, ...] = ()  # features of full steps before the gate, newest first: [B, N, C] or tuples
    older: tuple[Any, ...] = ()  # during a full step
    ages: torch.Tensor | None = None  # [1 or B, N]
    observed: dict[str, torch.Tensor] = field(default_factory=dict)  # by the names of which.OBSERVATIONS
    text: dict[str, torch.Tensor] = field(default_factory=dict)  # keys and values of a cross-attention

    def begin_full(self, order: int) -> None:
        """Forget all that a full step does not need. It is then the same computation every time, one compiled graph."""
        self.older, self.past, self.observed, self.text = self.past[:order], (), {}, {}


@dataclass
class Now:
    """What all sites share on one step."""

    step: int = 0
    grid: tuple[int, int] = (1, 1)
    halves: bool = False  # whether both halves of guidance select the same tokens
    weights: tuple[torch.Tensor, ...] = ()  # of the past, each of one number


class Cached:
    """An attention, which is reused whole. The engine binds what changes from call to call; blocks and processors only call."""

    count = 0  # tokens of which a partial step computes it

    def __init__(self, config: TokenCacheConfig, layer: int, stream: str) -> None:
        self.config, self.layer, self.stream = config, layer, stream
        self.order = config.forecast_order if config.fill == "forecast" else 0
        self.release()

    def release(self) -> None:
        """Forget everything and compute as if nothing had been applied."""
        self.mode, self.memory, self.now = Mode.PLAIN, Memory(), Now()

    def recall(self, like: torch.Tensor) -> Any:
        """The features of all tokens, in the type and on the device of `like`, where a partial step needs nothing else; or None."""
        return self.filled(like) if self.mode is Mode.PARTIAL and self.memory.past else None

    def filled(self, like: torch.Tensor) -> Any:
        features, past = store.each(lambda t: t.to(like), self.memory.past[0]), self.memory.past[1:]
        if past:
            features = store.each(lambda t: t * self.now.weights[0], features)
            for term, weight in zip(past, self.now.weights[1:], strict=True):
                features = store.each(lambda f, t, weight=weight: torch.addcmul(f, t.to(like), weight), features, term)
        return features

    def remember(self, features: Any) -> None:
        dtype, device = self.config.cache_dtype, self.config.cache_device
        if dtype is not None or device is not None:
            features = store.each(lambda t: store.narrow(t, getattr(torch, dtype or "", t.dtype), device or t.device), features)
        self.memory.past = (features, *self.memory.older)
        self.memory.older = ()

    def __call__(self, tokens: torch.Tensor, compute: Callable[[torch.Tensor, Take], Any]) -> Any:
        """What `compute` makes of all tokens [B, N, C], or what it made of them before."""
        if (known := self.recall(tokens)) is not None:
            return known
        output = compute(tokens, _all)
        if self.mode is not Mode.PLAIN:
            self.remember(output)
        return output


class Site(Cached):
    """A feed-forward, a cross-attention or the rear half of a single block, of which a partial step computes some tokens."""

    def __init__(self, config: TokenCacheConfig, layer: int, stream: str) -> None:
        self.selector = which.get(config.selector)
        super().__init__(config, layer, stream)

    def release(self) -> None:
        super().release()
        self.count = self.text = 0  # tokens to compute; of text in front of the image
        self.unseen = False  # whether nothing looks at this stream
        self.noise: torch.Tensor | None = None  # [1, N]
        self.chosen: torch.Tensor | None = None  # [1, k], where this step's selection was made before the layers are called
        self.selected: torch.Tensor | None = None  # [1 or B, k], the last selection

    @property
    def step(self) -> int:
        return self.now.step

    def __call__(self, tokens: torch.Tensor, compute: Callable[[torch.Tensor, Take], Any]) -> Any:
        """All outputs of `compute`, of which a partial step computes only some.

        Args:
            tokens: [B, N, C].
            compute: called with the tokens to compute and a function that takes the same rows out of another [B, N, C].
        """
        memory, partial = self.memory, self.mode is Mode.PARTIAL and bool(self.memory.past)
        if self.mode is Mode.PLAIN:
            return compute(tokens, _all)
        if partial and self.count == 0:
            assert memory.ages is not None
            self.selected, memory.ages = torch.empty(1, 0, dtype=torch.long, device=tokens.device), memory.ages + 1
            return self.filled(tokens)
        if not partial or self.count >= tokens.shape[1]:
            output = compute(tokens, _all)
            memory.ages = torch.zeros(len(tokens) if self.selector.per_picture else 1, tokens.shape[1], device=tokens.device)
            if "last_tokens" in self.selector.needs:
                memory.observed["last_tokens"] = tokens.clone()
            if partial:
                self.selected = torch.arange(tokens.shape[1], device=tokens.device)[None]
            if not partial or not self.order:
                self.remember(output)
            return output
        index = self.select(tokens)
        computed = compute(store.take(tokens, index), lambda other: store.take(other, index))
        if self.order == 0:
            store.put(memory.past[0], index, computed)
            return self.filled(tokens)
        features = self.filled(tokens)
        return store.put(features.clone() if features is memory.past[0] else features, index, computed)

    def select(self, tokens: torch.Tensor) -> torch.Tensor:
        """Index [1 or B, count] of the tokens to compute; the ages move on."""
        memory, index = self.memory, self.chosen
        if index is None:
            assert memory.ages is not None and self.noise is not None
            index = self.choose(tokens, memory.ages, self.noise)
            memory.ages = aged(memory.ages, index)
        if "last_tokens" in memory.observed:
            store.put(memory.observed["last_tokens"], index, store.take(tokens, index))
        self.selected = index
        return index

    def choose(self, tokens: torch.Tensor, ages: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Index [1 or B, count] of the tokens to compute, from tokens [B, N, C], ages and noise [1 or B, N]."""
        config, now = self.config, self.now
        start = self.text if config.text_tokens != "select" else 0  # what lies before is not computed
        context = which.SelectionContext(
            tokens=tokens[:, start:],
            ages=ages[:, start:],
            noise=noise[:, start:],
            count=self.count,
            grid=now.grid,
            text=self.text - start,
            where=self,
            observed={name: seen[:, start:] for name, seen in self.memory.observed.items()},
        )
        scores = which.scored(self.selector, config.selector, context, len(tokens) if self.selector.per_picture else len(noise))
        bonus = config.spatial_bonus if self.stream != "text" else 0.0
        averaged = now.halves and self.selector.per_picture and len(scores) > 1
        if config.age_weight or bonus or averaged:  # otherwise only their order counts
            scores = which.total_scores(
                scores, context.ages, config.age_weight, config.interval, bonus, now.grid, config.spatial_tile, context.text
            )
        if averaged:
            scores = scores.unflatten(0, (2, -1)).mean(dim=0)
        index = scores.topk(self.count, dim=-1, sorted=False).indices + start
        return index.repeat(2, 1) if averaged and len(index) > 1 else index


def choose_together(sites: Iterable[Site]) -> None:
    """Choose in one go what sites compute whose selector looks at no tokens: the same few operations for any number of layers."""
    alike: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        if site.selector.blind and site.noise is not None and 0 < site.count < site.noise.shape[1]:
            alike.setdefault((site.stream == "text", site.noise.shape[1], site.count, site.text), []).append(site)
    for group in alike.values():
        noise = torch.cat([site.noise for site in group if site.noise is not None])
        ages = torch.cat([site.memory.ages for site in group if site.memory.ages is not None])
        index = group[0].choose(noise[..., None], ages, noise)
        for site, chosen, later in zip(group, index.split(1), aged(ages, index).split(1), strict=True):
            site.chosen, site.memory.ages = chosen, later


def aged(ages: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Ages [1 or B, N] after these tokens were computed."""
    return (ages + 1).scatter(1, index.expand(len(ages), -1), 0.0)


def _all(tokens: torch.Tensor) -> torch.Tensor:
    return tokens
