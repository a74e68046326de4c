"""What one run remembers, for every guidance branch on its own, and when it starts afresh."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dit_accel import fill, merging, when
from dit_accel.clock import Call, Moment
from dit_accel.config import TokenCacheConfig, TokenMergeConfig
from dit_accel.merge_site import MergeSite, Shared
from dit_accel.plan import Record, Todo, rule
from dit_accel.site import Memory, Site, choose_together
from dit_accel.store import forget_numbers
from dit_accel.when import Matched, Mode, Progress


@dataclass
class Branch:
    """One guidance branch: the conditional call, say. Told apart by the name the pipeline gives or by its text."""

    number: int  # in the order in which the run met them
    memories: list[Memory]
    generator: torch.Generator  # of selections
    destinations: torch.Generator  # of merging
    shared: dict[int, Shared] = field(default_factory=dict)  # by the layers' number over how many of them share
    step: int = 0
    full_step: int = 0  # the last
    next_full_step: int = 0

    def bytes(self) -> int:
        return sum(memory.bytes() for memory in self.memories) + sum(shared.bytes() for shared in self.shared.values())


@dataclass
class Run:
    """Every branch of the run under way, and a record of what was computed that outlives it."""

    config: TokenCacheConfig
    merge: TokenMergeConfig | None = None
    record: bool = False
    processors_only: bool = False
    family: Any = None
    sites: list[Site] = field(default_factory=list)
    merge_sites: list[MergeSite] = field(default_factory=list)
    attached: list[tuple[Any, Any, tuple[Site | MergeSite, ...]]] = field(default_factory=list)  # attention, processor, its sites
    branches: dict[int, Branch] = field(default_factory=dict)
    calls: list[Record] = field(default_factory=list)
    inputs: dict[int, dict[str, Any]] = field(default_factory=dict)  # of every branch, on the meta device
    selections: list[tuple[int, str, int, torch.Tensor]] = field(default_factory=list)  # call, stream, layer, index [1 or B, k]
    steps: int | None = None
    grid: tuple[int, int] = (1, 1)
    merged: int = 0  # image tokens merged into others where something is merged
    halves: bool = False  # guidance in one batch: both halves have the same latents

    @property
    def caches(self) -> bool:
        """Whether anything has to be cached; merging alone does without."""
        return self.merge is None or self.config.interval > 1

    def add(self, layer: int, stream: str) -> Site:
        self.sites.append(Site(self.config, layer, stream))
        return self.sites[-1]

    def add_merging(self) -> MergeSite:
        """Of the next layer; without a configuration it never merges."""
        self.merge_sites.append(MergeSite(self.merge or TokenMergeConfig(ratio=0), len(self.merge_sites)))
        return self.merge_sites[-1]

    def end(self) -> None:
        """Free the features; the record stays until the next run begins."""
        self.collect()
        self.branches = {}
        for site in self.sites:
            site.release()
        for merge_site in self.merge_sites:
            merge_site.release()

    def plain(self) -> None:
        for site in self.sites:
            site.mode = Mode.PLAIN
        self._merge_nothing()

    def begin(self, moment: Moment, call: Call, given: dict[str, Any]) -> None:
        self.end()
        self.grid, self.steps = self.family.grid(given), self.config.steps or moment.steps
        if self.merge is not None:
            tokens, (right, down) = self.grid[0] * self.grid[1], self.merge.stride
            self.merged = merging.merged_away(tokens, self.grid, (down, right), self.merge.ratio)
        self.calls, self.inputs, self.selections = [], {}, []
        share = self.family.BATCHED_GUIDANCE and len(call.latents) % 2 == 0 and not call.latents.is_meta
        self.halves = share and bool(torch.equal(*call.latents.chunk(2)))  # the first call reads from the device, no other does

    def answer(self, moment: Moment, call: Call, given: dict[str, Any]) -> Todo:
        self.collect()
        if moment.fresh:
            self.inputs[moment.branch] = forget_numbers(given)
            selections = torch.Generator().manual_seed(self.config.seed)
            destinations = torch.Generator().manual_seed(self.merge.seed if self.merge else 0)
            memories = [Memory() for _ in self.sites]
            self.branches[moment.branch] = Branch(moment.branch, memories, selections, destinations, step=moment.step)
        branch = self.branches[moment.branch]
        branch.step = moment.step
        self._bind(branch, call.text.shape[1], call.latents.device)
        last = moment.steps is not None and moment.step + 1 == moment.steps
        return Todo(then=functools.partial(self._free, branch)) if last else Todo()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _free(self, branch: Branch, output: Any) -> Any:
        """Forget what will not be reused any more."""
        self.collect()
        branch.memories, branch.shared = [Memory() for _ in self.sites], {}
        for site in self.sites:
            site.memory = Memory()
        for merge_site in self.merge_sites:
            merge_site.shared = Shared()
        return output

    def _lost(self) -> set[int]:
        """Ids of the sites whose attention processor was replaced: perturbed-attention guidance does so for some layers."""
        lost = [sites for attention, processor, sites in self.attached if attention.processor is not processor]
        if lost and len(lost) == len(self.attached):
            raise RuntimeError(
                "All attention processors were replaced since dit_accel.apply (by an IP-Adapter or fused projections, say); "
                "call dit_accel.apply again, or dit_accel.remove."
            )
        return {id(site) for sites in lost for site in sites}

    def _bind(self, branch: Branch, text_length: int, device: torch.device) -> None:
        config, step = self.config, branch.step
        nothing_cached = config.interval == 1 or config.cache_ratio == 0
        lost = self._lost()
        plain = tuple(i for i, site in enumerate(self.sites) if nothing_cached or id(site) in lost)
        # An interrupted full step leaves gaps, which only another full step fills.
        gaps = any(not memory.terms and i not in plain for i, memory in enumerate(branch.memories))
        mode = Mode.FULL if gaps or nothing_cached or step >= branch.next_full_step else Mode.PARTIAL
        distance = step - branch.full_step
        if mode is Mode.FULL:
            branch.full_step = step
            branch.next_full_step = step + rule(config)(Progress(step, self.steps, (), 0))
        order = config.forecast_order if config.fill == "forecast" else 0
        at_distance = torch.tensor(float(max(1, distance)), device=device) if order else None
        weights = [torch.tensor(w, device=device) for w in fill.taylor_weights(distance, order)]
        for i, (site, memory) in enumerate(zip(self.sites, branch.memories, strict=True)):
            if mode is Mode.FULL:
                memory.begin_full(order)
            site.mode = Mode.PLAIN if i in plain else mode
            site.memory, site.step = Memory() if site.mode is Mode.PLAIN else memory, step
            site.grid, site.distance, site.weights, site.chosen = self.grid, at_distance, weights, None
            site.halves = self.halves and config.share_guidance_selection
        chosen = [site for site in self.sites if site.tokens]
        if mode is Mode.PARTIAL:
            streams = [site.stream for site in self.sites]
            for site in chosen:
                place = when.Place(step, self.steps, site.layer, streams.count(site.stream), site.stream)
                site.expect(site.share(place), text_length)
            lengths = [site.tokens for site in chosen]
            noise = torch.rand(1, sum(lengths), generator=branch.generator).to(device).split(lengths, dim=1)
            for site, part in zip(chosen, noise, strict=True):
                site.noise = part
            choose_together(chosen)
        counts = tuple(site.count for site in chosen) if mode is Mode.PARTIAL else ()
        total = sum(site.tokens for site in chosen) if mode is Mode.PARTIAL else 0
        matched = self._bind_merging(branch, lost, text_length, device) if mode is Mode.FULL else ()
        if not matched:
            self._merge_nothing()
        self.calls.append(
            Record(branch.number, step, mode, 1.0, counts, total, text_length, plain, self.merged if matched else 0, matched)
        )

    def _merge_nothing(self) -> None:
        for site in self.merge_sites:
            site.count = 0

    def _bind_merging(self, branch: Branch, lost: set[int], text_length: int, device: torch.device) -> tuple[Matched, ...]:
        """Decide which layers of a full step merge, and which of them make the matching."""
        config = self.merge
        if config is None or not self.merged or branch.step < config.warmup_steps:
            return ()
        steps, layers = config.rematching
        (height, width), (right, down) = self.grid, config.stride
        done: dict[int, Matched] = {}
        groups: set[int] = set()  # of layers, whose matching is there or on its way
        for site in self.merge_sites:
            if id(site) in lost:
                site.count, done[site.layer] = 0, Matched.NOT
                continue
            shared = branch.shared.setdefault(group := site.layer // layers, Shared())
            here = group not in groups and (shared.matching is None or branch.step - shared.step >= steps)
            groups.add(group)
            if here:
                shared.matching, shared.step, cells = None, branch.step, (height // down) * (width // right)
                noise = torch.rand(cells, generator=branch.destinations) if config.randomize else None
                into = merging.destinations(self.grid, (down, right), noise).to(device)
            site.bind(shared, self.merged, height * width, text_length, self.halves, into if here else None)
            done[site.layer] = Matched.HERE if here else Matched.BEFORE
        return tuple(done.values())

    def collect(self) -> None:
        """Keep what is to be known of the call that has ended: the size of the cache and the selections."""
        if self.calls and self.branches:
            if self.calls[-1].mode is Mode.PARTIAL and len(self.calls) > 1:  # which leaves the size as it was
                used = self.calls[-2].cache_bytes
            else:
                used = sum(branch.bytes() for branch in self.branches.values())
            self.calls[-1] = replace(self.calls[-1], cache_bytes=used)
        for site in self.sites if self.record else ():
            if site.selected is not None:
                self.selections.append((len(self.calls) - 1, site.stream, site.layer, site.selected.cpu()))
                site.selected = None
