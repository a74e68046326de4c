"""FLOPs of the calls of a run, counted on a weightless copy of the transformer: 2 for every multiply-add, attention included."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from dit_accel.families import family_of
from dit_accel.plan import Record
from dit_accel.state import Run
from dit_accel.store import later_rows
from dit_accel.when import Matched, Mode

_KNOWN: dict[Any, dict[Any, int]] = {}  # counted already, by what is applied to what: a whole session asks the same few


class FlopCounter:
    """Replays calls on the meta device: the model's own code and the engine's, without arithmetic or memory.

    Adapters (LoRA, IP-Adapter) are not part of the copy and not counted.

    Args:
        transformer: the one that ran; only its class and configuration are kept.
        run: its run.
    """

    def __init__(self, transformer: Any, run: Run) -> None:
        self.build, self.settings, self.processors_only = type(transformer).from_config, transformer.config, run.processors_only
        self.config = dataclasses.replace(run.config, cache_device=None)  # numbers on the CPU do not mix with none
        self.grid, self.halves = run.grid, run.halves
        self.merge, self.merged = run.merge, run.merged
        self.inputs: Mapping[int, dict[str, Any]] = run.inputs
        kind = self.build, str(sorted(transformer.config.items()))
        same = (*kind, run.config, run.merge, run.grid, run.halves, run.processors_only)
        self.known = _KNOWN.setdefault(same, {})

    def __call__(self, calls: Iterable[Record]) -> list[int]:
        """FLOPs of every call."""
        calls = list(calls)
        keys = [(self._shapes(call.branch), call.mode, call.counts, call.text, call.plain, call.matched) for call in calls]
        if missing := {key: call for key, call in zip(keys, calls, strict=True) if key not in self.known}:
            with torch.device("meta"):
                model = self.build(self.settings).eval()
            family = family_of(model)
            run = Run(self.config, self.merge, family=family)
            processors = dict(family.attach(model, run, self.processors_only))
            model.set_attn_processor(processors)
            for key, call in missing.items():
                self.known[key] = self._count(model, run, call)
        return [self.known[key] for key in keys]

    def plain(self, calls: Iterable[Record]) -> list[int]:
        """What every call would cost if nothing were applied."""
        return self([Record(call.branch, call.step, Mode.PLAIN) for call in calls])

    def _shapes(self, branch: int) -> tuple[Any, ...]:
        return tuple((name, value.shape) for name, value in self.inputs[branch].items() if isinstance(value, torch.Tensor))

    def _count(self, model: Any, run: Run, call: Record) -> int:
        inputs = {name: value for name, value in self.inputs[call.branch].items() if name != "joint_attention_kwargs"}
        if Matched.BEFORE in call.matched:
            self._bind_merging(run, call, here=(Matched.HERE, Matched.BEFORE))
            self._forward(model, run, Mode.FULL, call.plain, inputs)
        self._bind_merging(run, call, here=(Matched.HERE,))
        for site in run.sites:
            site.release()
            site.grid, site.halves = self.grid, self.halves and self.config.share_guidance_selection
        if call.mode is Mode.PARTIAL:  # fills the memories
            self._forward(model, run, Mode.FULL, call.plain, inputs)
            chosen = [site for site in run.sites if site.tokens]
            for site, count in zip(chosen, call.counts, strict=True):
                site.count, site.text = count, call.text if site.stream == "joint" else 0
                site.noise = torch.empty(1, site.tokens, device="meta")
        return self._forward(model, run, call.mode, call.plain, inputs)

    def _bind_merging(self, run: Run, call: Record, here: tuple[Matched, ...]) -> None:
        """Let every layer merge as in the call; these make a matching of their own."""
        if run.merge is None:
            return
        (height, width), (right, down) = self.grid, run.merge.stride
        cells = (height // down) * (width // right)
        for site, how in zip(run.merge_sites, call.matched or [Matched.NOT] * len(run.merge_sites), strict=True):
            into = torch.empty(cells, dtype=torch.long, device="meta") if how in here else None
            count = self.merged if how is not Matched.NOT else 0
            site.bind(site.shared, count, height * width, call.text, self.halves, into)

    def _forward(self, model: Any, run: Run, mode: Mode, plain: tuple[int, ...], inputs: dict[str, Any]) -> int:
        for i, site in enumerate(run.sites):
            site.mode = Mode.PLAIN if i in plain else mode
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs)
        return int(counter.get_total_flops())


class OutputFlopCounter:
    """Counts calls of which the model's own code computed everything, some pictures, some tokens, or nothing.

    Args:
        transformer: the one that ran; only its class and configuration are kept.
        inputs: of every branch, without numbers.
        attention: of computed tokens, "reuse" or "fresh".
    """

    def __init__(self, transformer: Any, inputs: Mapping[int, dict[str, Any]], attention: str) -> None:
        self.build, self.settings, self.inputs = type(transformer).from_config, transformer.config, dict(inputs)
        self.attention = attention
        self.known: dict[tuple[int, float, int, int], int] = {}

    def __call__(self, calls: Iterable[Record]) -> list[int]:
        """FLOPs of every call."""
        return [self._count(call.branch, call.rows, call.tokens, call.tokens_computed) for call in calls]

    def plain(self, calls: Iterable[Record]) -> list[int]:
        """What every call would cost if nothing were applied."""
        return [self._count(call.branch, 1.0, 0, 0) for call in calls]

    def _count(self, branch: int, rows: float, tokens: int, count: int) -> int:
        if rows == 0:
            return 0
        if (key := (branch, rows, tokens, count)) not in self.known:
            with torch.device("meta"):
                model = self.build(self.settings).eval()
            given = self.inputs[branch]
            latents = next(iter(given.values()))
            if rows < 1:
                given = tree_map(lambda value: later_rows(value, len(latents), rows), given)
            with torch.no_grad(), self._packed(model, given, tokens, count), FlopCounterMode(display=False) as counter:
                model(**given)
            self.known[key] = int(counter.get_total_flops())
        return self.known[key]

    def _packed(self, model: Any, given: dict[str, Any], tokens: int, count: int) -> contextlib.AbstractContextManager[Any]:
        """Inside, the model computes `count` of `tokens`, after a full step; everything where tokens are 0."""
        if not tokens:
            return contextlib.nullcontext()
        from dit_accel.families.table import lookup
        from dit_accel.packed import Packed
        from dit_accel.steps import Memory

        family = lookup(model)
        assert family is not None
        packed, memory = Packed(model, family, self.attention), Memory()
        packed.attach()
        with packed.full(memory, tokens, 0.0):
            model(**given)
        return packed.partial(memory, torch.arange(count, device="meta"), [1.0])
