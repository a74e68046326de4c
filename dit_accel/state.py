"""What one run remembers, for every guidance branch on its own, and when it starts afresh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_accel import fill, selection
from dit_accel.config import TokenCacheConfig
from dit_accel.schedule import Mode, mode_of, tokens_to_compute

Take = Callable[[torch.Tensor], torch.Tensor]


class Memory:
    """What one guidance branch remembers of one site."""

    def __init__(self) -> None:
        self.output: Any = None  # [B, N, C] before the gate; a tuple of two for joint attention
        self.ages: torch.Tensor | None = None  # [1 or B, N]; None when all are 0
        self.received: torch.Tensor | None = None  # [B, N]

    def bytes(self) -> int:
        outputs = self.output if isinstance(self.output, tuple) else (self.output,)
        return sum(t.numel() * t.element_size() for t in (*outputs, self.ages, self.received) if t is not None)


class Site:
    """One cached computation of the model: an attention, a feed-forward, the rear half of a single block.

    The transformer's pre-hook binds `mode`, `memory`, `count` and `noise` before every call; blocks and processors only
    call the site.
    """

    def __init__(self, config: TokenCacheConfig, layer: int, stream: str) -> None:
        self.config, self.layer, self.stream = config, layer, stream
        self.selector = selection.get(config.selector)
        self.mode = Mode.PLAIN
        self.memory = Memory()
        self.step = 0
        self.count = 0  # tokens to compute on this partial step
        self.text = 0  # text tokens at the front of the sequence
        self.noise: torch.Tensor | None = None  # [1, N]

    def __call__(self, tokens: torch.Tensor, compute: Callable[[torch.Tensor, Take], Any]) -> Any:
        """All outputs of `compute`, of which a partial step computes only some.

        Args:
            tokens: [B, N, C].
            compute: called with the tokens to compute and a function that takes the same rows out of another [B, N, C].
        """
        memory = self.memory
        if self.mode is Mode.PLAIN:
            return compute(tokens, _all)
        if self.mode is Mode.FULL or memory.output is None or self.count >= tokens.shape[1]:
            memory.output, memory.ages = compute(tokens, _all), None
        elif self.count:
            index = self._select(tokens)
            computed = compute(fill.take(tokens, index), lambda other: fill.take(other, index))
            memory.output = fill.reuse(memory.output, index, computed)
        return memory.output

    def expect(self, text_length: int, step: int) -> None:
        """Work out how many tokens this partial step computes; only the joint sequence starts with text."""
        self.step, self.text = step, text_length if self.stream == "joint" else 0
        if self.stream == "attention":  # reused whole
            self.count = 0
            return
        tokens = self.memory.output.shape[1] if self.memory.output is not None else 0
        share = 1 - self.config.cache_ratio
        if self.config.text_tokens == "select":
            self.count = tokens_to_compute(share, tokens)
        elif self.stream == "text":
            self.count = tokens if self.config.text_tokens == "full" else 0
        else:
            self.count = tokens_to_compute(share, tokens - self.text)
            self.count += self.text if self.config.text_tokens == "full" else 0

    def _select(self, tokens: torch.Tensor) -> torch.Tensor:
        """Index [1 or B, count] of the tokens to compute; the ages move on."""
        memory, config = self.memory, self.config
        ages = memory.ages if memory.ages is not None else torch.zeros(1, tokens.shape[1], device=tokens.device)
        assert self.noise is not None
        context = selection.SelectionContext(tokens, ages, self.noise, memory.received, self.layer, self.stream, self.step)
        scores = selection.total_scores(self.selector.score(context), ages, config.age_weight, config.interval)
        if self.text == 0 or config.text_tokens == "select":
            index = scores.topk(self.count, dim=-1, sorted=False).indices
        else:
            always = self.text if config.text_tokens == "full" else 0
            index = scores[:, self.text :].topk(self.count - always, dim=-1, sorted=False).indices + self.text
            index = torch.cat([torch.arange(always, device=index.device).expand(len(index), -1), index], dim=1)
        memory.ages = (ages + 1).expand(len(index), -1).scatter(1, index, 0.0)
        return index


def _all(tokens: torch.Tensor) -> torch.Tensor:
    return tokens


@dataclass
class Branch:
    """One guidance branch: the conditional call, say. Told apart by the name the pipeline gives or by its text."""

    number: int  # in the order in which the run met them
    text: torch.Tensor
    memories: list[Memory]
    generator: torch.Generator
    step: int = 0
    timestep: float = float("inf")


@dataclass(frozen=True)
class Call:
    """What one call of the transformer computed."""

    branch: int
    step: int
    mode: Mode
    tokens_computed: int  # over all sites that work token by token
    tokens: int
    cache_bytes: int


@dataclass
class Run:
    """Every branch of the run under way, and a record of what was computed that outlives it."""

    config: TokenCacheConfig
    sites: list[Site] = field(default_factory=list)
    branches: dict[Any, Branch] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    latents: tuple[Any, ...] = ()
    first: float = 0.0
    last: float = float("inf")
    fresh: bool = True

    def add(self, layer: int, stream: str) -> Site:
        self.sites.append(Site(self.config, layer, stream))
        return self.sites[-1]

    def end(self) -> None:
        """Free the features; the record stays until the next run begins."""
        self.branches, self.fresh = {}, True
        for site in self.sites:
            site.mode, site.memory, site.noise = Mode.PLAIN, Memory(), None

    def begin_call(self, latents: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor, name: str | None) -> None:
        """Decide what this call computes and point every site at its branch's memory.

        A new run starts when time goes up, when it is back at the first timestep (half precision, whose first timesteps can
        coincide, goes by the text instead), when the latents' shape, dtype or device or a named branch's text changes, or
        after `end`. So an interrupted run leaves nothing behind.

        Args:
            latents: any shape; text: [B, T, C]; timestep: any shape, its first element counts.
            name: the branch's name if the pipeline gives one.
        """
        if torch.is_grad_enabled():  # gradient checkpointing repeats calls, which would advance the state twice
            for site in self.sites:
                site.mode = Mode.PLAIN
            return
        time = float(timestep.reshape(-1)[0])
        signature = (latents.shape, latents.dtype, latents.device)
        key, branch = self._find(text, time, name)
        again = branch is not None and time == self.first and timestep.dtype not in (torch.float16, torch.bfloat16)
        changed = branch is not None and not _same(branch.text, text)
        if self.fresh or signature != self.latents or time > self.last or again or changed:
            self.end()
            self.calls, self.latents, self.first, self.fresh, branch = [], signature, time, False, None
        if branch is None:
            generator = torch.Generator().manual_seed(self.config.seed)
            branch = self.branches[key] = Branch(len(self.branches), text, [Memory() for _ in self.sites], generator)
        self.last = branch.timestep = time
        self._bind(branch, text.shape[1], latents.device)
        branch.step += 1

    def _find(self, text: torch.Tensor, time: float, name: str | None) -> tuple[Any, Branch | None]:
        """By name; else by the very tensor of the text; else by equal text not yet seen at this time."""
        if name is not None:
            return name, self.branches.get(name)
        for key, branch in self.branches.items():
            if branch.text is text:
                return key, branch
        for key, branch in self.branches.items():
            if branch.timestep != time and _same(branch.text, text):
                return key, branch
        return len(self.branches), None

    def _bind(self, branch: Branch, text_length: int, device: torch.device) -> None:
        nothing_cached = self.config.interval == 1 or self.config.cache_ratio == 0
        mode = Mode.FULL if nothing_cached else mode_of(branch.step, self.config.interval, self.config.warmup_steps)
        for site, memory in zip(self.sites, branch.memories, strict=True):
            site.mode, site.memory = Mode.PLAIN if nothing_cached else mode, memory
        computed = total = 0
        if mode is Mode.PARTIAL:
            chosen = [site for site in self.sites if site.stream != "attention" and site.memory.output is not None]
            lengths = [site.memory.output.shape[1] for site in chosen]
            noise = torch.rand(1, sum(lengths), generator=branch.generator).to(device).split(lengths, dim=1)
            for site in self.sites:
                site.expect(text_length, branch.step)
            for site, part in zip(chosen, noise, strict=True):
                site.noise = part
            computed, total = sum(site.count for site in chosen), sum(lengths)
        used = sum(memory.bytes() for b in self.branches.values() for memory in b.memories)
        self.calls.append(Call(branch.number, branch.step, mode, computed, total, used))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool(torch.equal(a, b)))
