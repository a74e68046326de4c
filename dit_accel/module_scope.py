"""Module scope: every attention is reused, every other computation of the model runs for selected tokens; tokens are merged."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dit_accel import input_merge, merging, store, which
from dit_accel.clock import Call, Moment
from dit_accel.config import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig
from dit_accel.engine import Engine
from dit_accel.families import blocks as token_wise
from dit_accel.families.attention import TokenAttnProcessor, unwrapped
from dit_accel.families.table import family_of
from dit_accel.merge_site import MergeSite, Shared
from dit_accel.plan import Layout, Past, StepPlan, Todo, merges, module_plan, rule
from dit_accel.sites import Cached, Memory, Now, Site, choose_together
from dit_accel.when import Matched, Mode, Progress


@dataclass
class Branch:
    """What is remembered of one guidance branch: by site; and by group of layers, its matching."""

    memories: list[Memory]
    selections: torch.Generator
    destinations: torch.Generator
    shared: dict[int, Shared] = field(default_factory=dict)
    past: Past = field(default_factory=Past)

    def kept(self) -> Any:
        return [vars(part) for part in self.memories], [vars(s.matching) for s in self.shared.values() if s.matching]


class ModuleScope(Engine):
    """Caching and merging in FLUX and PixArt; raises what `dit_accel.apply` raises."""

    def __init__(
        self,
        config: TokenCacheConfig,
        merge: TokenMergeConfig | None,
        transformer: Any,
        record: bool,
        processors_only: bool,
        early: OutputCacheConfig | None = None,
    ) -> None:
        super().__init__(transformer)
        self.early = early  # whose merged steps come first
        self.config, self.merge, self.record, self.processors_only = config, merge, record, processors_only
        (self.row, self.family), name = family_of(transformer), type(transformer).__name__
        self.sites: list[Cached] = []
        self.merge_sites: list[MergeSite] = []
        self.processors: dict[str, tuple[Any, Any, list[int], int | None]] = {}  # attention, processor, sites, merging layer
        self.merged = 0
        streams = {stream for blocks in self.family.BLOCKS.values() for stream in blocks.streams}
        if missing := sorted(which.get(config.selector).needs - self.family.OBSERVATIONS):
            raise ValueError(
                f"The selector {config.selector!r} needs {', '.join(missing)}, which {name} does not have; choose another one."
            )
        if merge is not None and merge.merge_cross_attention and "cross-attention" not in streams:
            raise ValueError(f"{name} has no cross-attention; leave merge_cross_attention off.")
        if config.text_tokens != "select" and not streams & {"text", "joint"}:
            raise ValueError(f"{name} computes no text tokens; leave text_tokens at 'select'.")
        self.joint = "joint" in streams

    def settings(self) -> str:
        return f"{self.config} {self.merge} {self.processors_only} {self.early}"

    def twin(self, transformer: Any) -> Engine:
        config = replace(self.config, cache_device=None)  # numbers on the CPU do not mix with none
        other = ModuleScope(config, self.merge, transformer, False, self.processors_only, self.early)
        other.run = self.run
        other.attach()
        transformer.set_attn_processor(other.attn_processors())
        return other

    def _blocks(self) -> Iterator[tuple[str, int, Any, token_wise.Blocks]]:
        for name, blocks in self.family.BLOCKS.items():
            for layer, block in enumerate(getattr(self.transformer, name)):
                yield f"{name}.{layer}", layer, block, blocks

    def attach(self) -> None:
        caches, merge = self.merge is None or self.config.interval > 1, self.merge or TokenMergeConfig(ratio=0)
        for number, (name, layer, block, blocks) in enumerate(self._blocks()):
            first, crossing = len(self.sites), set(blocks.attentions.values()) - {None}
            streams = [stream for stream in blocks.streams if not self.processors_only or stream in crossing]
            found: list[Any] = [Cached(self.config, layer, "attention"), *(Site(self.config, layer, s) for s in streams)]
            self.sites += found
            self.merge_sites.append(merge_site := MergeSite(merge))
            if not self.processors_only:
                token_wise.attach(block, blocks, tuple(found), merge_site, name)
            for part, stream in blocks.attentions.items():
                attn, own = getattr(block, part), 0 if stream is None else 1 + streams.index(stream)
                merges = self.merge is not None and (stream is None or merge.merge_cross_attention)
                site, processor = found[own] if caches else None, attn.processor
                if site is not None or merges:
                    scored = tuple(found[1:])
                    processor = TokenAttnProcessor(processor, site, merge_site if merges else None, scored, self.joint)
                rest = [first + own] if own else [first + i for i, site in enumerate(found) if site.stream not in crossing]
                self.processors[f"{name}.{part}.processor"] = attn, processor, rest, None if own else number

    def attn_processors(self) -> dict[str, Any]:
        return {name: processor for name, (_, processor, _, _) in self.processors.items()}

    def detach(self) -> None:
        for _, _, block, blocks in self._blocks():
            for attn in (getattr(block, part) for part in blocks.attentions):
                if (inner := unwrapped(attn.processor)) is not attn.processor:
                    attn.set_processor(inner)
            token_wise.detach(block)

    def plain(self) -> None:
        for site in self.sites:
            site.mode = Mode.PLAIN
        for merge_site in self.merge_sites:
            merge_site.bind()

    def end(self) -> None:
        super().end()
        self._release()

    def _release(self) -> None:
        """Sites forget everything, and compute as if nothing had been applied."""
        every: list[Any] = [*self.sites, *self.merge_sites]
        for site in every:
            site.release()

    def begin(self, moment: Moment, call: Call, given: dict[str, Any]) -> None:
        super().begin(moment, call, given)
        config = self.transformer.config
        (_, height, width), self.run.tokens = self.row.grid(config, given), self.row.count(config, given)
        self.run.grid = height, width
        if self.early is not None:
            input_merge.prepare(self.run, self.transformer, call.latents, (1, height, width), self.early.merged_side)
        if self.merge is not None:
            self.merged = merging.merged_away(height * width, self.run.grid, self.merge.stride[::-1], self.merge.ratio)
        share = self.row.batched_guidance and len(call.latents) % 2 == 0 and not call.latents.is_meta
        self.run.halves = bool(share and torch.equal(*call.latents.chunk(2)))  # the first call reads from the device, no other

    def new_branch(self) -> Branch:
        selections, destinations = torch.Generator(), torch.Generator()
        selections.manual_seed(self.config.seed)
        destinations.manual_seed(self.merge.seed if self.merge else 0)
        return Branch([Memory() for _ in self.sites], selections, destinations)

    def _lengths(self, text: int) -> dict[str, int]:
        """Tokens of every stream."""
        image = dict.fromkeys(("image", "cross-attention", "feed-forward"), self.run.tokens)
        return {**image, "text": text, "joint": text + self.run.tokens}

    def answer(self, moment: Moment, call: Call, given: dict[str, Any]) -> Todo:
        return super().answer(moment if self.early is None else input_merge.known(moment, "merged_steps"), call, given)

    def plan(self, branch: Branch, moment: Moment, call: Call) -> StepPlan:
        if self.early is not None and merges(self.early, moment):
            branch.past.times = []  # of a smaller picture nothing is remembered: the next step is full
            return StepPlan(Mode.FULL, plain=tuple(range(len(self.sites))), merged=self.run.merged)
        lost = [entry for entry in self.processors.values() if entry[0].processor is not entry[1]]
        if lost and len(lost) == len(self.processors):
            raise RuntimeError(
                "All attention processors were replaced since dit_accel.apply (by an IP-Adapter or fused projections, say); "
                "call dit_accel.apply again, or dit_accel.remove."
            )
        plain = tuple(sorted(i for _, _, sites, _ in lost for i in sites))
        if any(not memory.past and i not in plain for i, memory in enumerate(branch.memories)):
            branch.past.times = []  # an interrupted full step leaves gaps, which only another full step fills
        text, uses_tokens = call.text.shape[1], which.get(self.config.selector).uses_tokens
        layout = Layout(
            tuple((i, site.stream, site.layer) for i, site in enumerate(self.sites) if isinstance(site, Site)),
            self._lengths(text),
            text,
            not plain and (self.config.text_tokens != "select" or not uses_tokens),
            len(self.merge_sites),
            self.merged,
            plain,
            frozenset(layer for _, _, _, layer in lost if layer is not None),
        )
        return module_plan(self.config, self.merge, moment, branch.past, layout, tuple(range(len(self.sites))))

    def carry_out(self, plan: StepPlan, branch: Branch, moment: Moment, call: Call) -> Todo:
        if self.early is not None and plan.merged and not plan.matched:
            self.plain()
            return input_merge.todo(input_merge.of(self.early, self.transformer, self.run, moment), call.latents)
        config, past, device, text = self.config, branch.past, call.latents.device, call.text.shape[1]
        if plan.mode is Mode.FULL:
            order = self.sites[0].order
            past.times = [float(moment.step), *past.times][: order + 1]
            past.next_full = moment.step + rule(config)(Progress(moment.step, config.steps or moment.steps, (), 0))
            for memory in branch.memories:
                memory.begin_full(order)
        weights = tuple(torch.tensor(plan.weights, device=device).unbind()) if len(plan.weights) > 1 else ()
        now = Now(moment.step, self.run.grid, self.run.halves and config.share_guidance_selection, weights)
        for i, (site, memory) in enumerate(zip(self.sites, branch.memories, strict=True)):
            site.mode = Mode.PLAIN if i in plan.plain else plan.mode
            site.memory, site.now = Memory() if i in plan.plain else memory, now
        if plan.mode is Mode.PARTIAL:  # every site computes its number of tokens, with noise of its own
            chosen = [site for i, site in enumerate(self.sites) if isinstance(site, Site) and i not in plan.plain]
            lengths = [self._lengths(text)[site.stream] for site in chosen]
            noise = store.sent(torch.rand(1, sum(lengths), generator=branch.selections), device).split(lengths, dim=1)
            for one, count, part in zip(chosen, plan.counts, noise, strict=True):
                one.count, one.noise, one.chosen, one.text = count, part, None, text if one.stream == "joint" else 0
                if one.stream == "text" and plan.unseen:
                    one.unseen, one.selected = True, torch.empty(1, 0, dtype=torch.long)
            choose_together(chosen)
        self._bind_merging(plan, branch, moment.step, text if self.joint else 0, device)
        return Todo(then=self._then)

    def _bind_merging(self, plan: StepPlan, branch: Branch, step: int, text: int, device: torch.device) -> None:
        (height, width), merge = self.run.grid, self.merge or TokenMergeConfig(ratio=0)
        (right, down), layers = merge.stride, merge.rematching[1]
        for layer, site in enumerate(self.merge_sites):
            if not plan.matched or plan.matched[layer] is Matched.NOT:
                site.bind()
                continue
            shared, into = branch.shared.setdefault(layer // layers, Shared()), None
            if plan.matched[layer] is Matched.HERE:
                shared.matching, branch.past.matched[layer // layers] = None, step
                cells = (height // down) * (width // right)
                noise = torch.rand(cells, generator=branch.destinations) if merge.randomize else None
                into = store.sent(merging.destinations(self.run.grid, (down, right), noise), device)
            site.bind(shared, plan.merged, height * width, text, self.run.halves, into)

    def _then(self, output: Any) -> Any:
        for site in self.sites if self.record else ():
            if isinstance(site, Site) and site.selected is not None:
                self.selections.append((len(self.calls) - 1, site.stream, site.layer, site.selected.cpu()))
                site.selected = None
        return output

    def free(self, branch: Branch) -> None:
        branch.memories, branch.shared = [Memory() for _ in self.sites], {}
        self._release()
